"""Label stage: the policy judges its own responses by its implicit reward; best against worst
becomes a preference pair.

    r(y) = β(log π_{t−1}(y|x) − log π_init(y|x)) − α|y|                             S7; α > 0: S13
    y_w = argmax r, y_l = argmin r                                                              S8
    margin = r(y_w) − r(y_l) ≥ 0;   its confidence σ(margin) is what dro.py perturbs

The reference of the judgement is π_init, not π_{t−2}: the reward then counts all that was learnt so
far (SPA, Table 7, which also has `--reference previous` and `none`: β log π_{t−1} alone). |y| is in
tokens, the end-of-turn token included. log π_{t−1}(y) is computed here anyway and goes into the
row: it is the training reference, so train.py needs no reference forward for it. One model is in
memory at a time.

Other judges (judges/judge.py) write the same rows; give them --model too if train.py is to follow.
Fewer than two responses, identical ones or equal rewards carry no preference: such rows are left
out, and each reason is counted. `--pairs` judges the two sides of gold pairs again and reports how
often the judge agrees with them. `--gold` appends gold pairs to the rows, with their own labels.

    python label.py --model pi_0 --reference-model pi_init --responses responses.jsonl \\
        --out labelled.jsonl
    python label.py --model pi_0 --judge llm --judge-model judge --responses responses.jsonl \\
        --out labelled.jsonl
    torchrun --nproc_per_node=8 label.py --model pi_0 --reference-model pi_init \\
        --responses responses.jsonl --out labelled.jsonl
"""
import argparse
import math
from statistics import median

from core.folder import size_of
from core.rows import fail
from core.stage import exit_if_looking, parser, positive, publish, ranged, run_stage
from judges.flags import judge_flags, start_judging


def flags() -> argparse.Namespace:
    """The arguments. Ends the program where the output is complete."""
    cli = parser(__doc__, out="labelled rows (JSONL)",
                 precision="of matrix products, as in training")
    source = cli.add_mutually_exclusive_group(required=True)
    source.add_argument("--responses", help="response rows (JSONL)")
    source.add_argument("--pairs", help="gold preference rows (JSONL) to judge again")
    cli.add_argument("--gold", help="gold preference rows (JSONL) to append with their own labels, "
                     "scored by --model; their margin, 0, says nothing: for train.py --anchor "
                     "previous")
    judge_flags(cli, "implicit")
    cli.add_argument("--model", help="π_{t−1}, which wrote the responses")
    cli.add_argument("--reference", choices=["init", "previous", "none"], default="init",
                     help="of the judgement (SPA, Table 7)")
    cli.add_argument("--reference-model", help="π_init, or π_{t−2} with --reference previous")
    cli.add_argument("--length-penalty", type=ranged(float, 0), default=0.0,
                     help="α of S13, a token (papers: 0.001 to 0.01)")
    cli.add_argument("--beta", type=positive, default=0.1,
                     help="scale of the implicit reward; the same as in training")
    args = cli.parse_args()
    implicit = args.judge == "implicit"
    if implicit and not (args.model and (args.reference_model or args.reference == "none")):
        fail("--judge implicit needs --model and --reference-model (or --reference none)")
    if not implicit and (args.length_penalty or args.reference != "init"):
        fail("--reference and --length-penalty are of the implicit reward: --judge implicit")
    if not implicit:
        # Unused: None, so that another value is no other setting.
        args.beta = None
    if args.gold and not (args.model and args.responses):
        fail("--gold is appended to --responses and scored by --model: give both")
    start_judging(args)
    read = [path for path in (args.pairs, args.responses, args.gold) if path]
    exit_if_looking(args.out, writes=sum(map(size_of, read)))
    return args


if __name__ == "__main__":
    args = flags()  # here already: what is imported below takes seconds to load

from core.chat import Answer, encode_rows, pair_of, vocabulary
from core.models import check_same_tokens, load_config, load_tokenizer
from core.parallel import in_bf16, start_processes, this_device
from core.policy import ResponseLogps, score
from core.probe import load_scorer
from core.rows import WORST_CASE, answer_turn, read_rows, scored_digest, write_rows
from judges.judge import rewards

# What is left out, each counted by itself: answers, then rows.
LEFT_OUT = {
    "empty": "empty responses",
    "fewer_than_two": "rows with fewer than two responses",
    "unwritten": "rows that the chat template does not write in full",
    "identical": "rows of identical responses",
    "ties": "ties",
}


def implicit_reward(policy: list[float], reference: list[float], beta: float, lengths: list[int],
                    alpha: float) -> list[float]:
    """S7: β(log π_{t−1} − log π_init) − α|y| (S13) of each response to one prompt, from log-probs
    and lengths in tokens."""
    return [beta * (p - r) - alpha * n for p, r, n in zip(policy, reference, lengths)]


def best_and_worst(texts: list[str], reward: list[float]) -> tuple[int, int] | None:
    """S8 for any number of candidates: positions of the highest and lowest reward; None where there
    is no preference."""
    best = max(range(len(texts)), key=reward.__getitem__)
    worst = min(range(len(texts)), key=reward.__getitem__)
    if reward[best] == reward[worst] or texts[best] == texts[worst]:
        return None
    return best, worst


def read_candidates(args: argparse.Namespace,
                    left_out: dict[str, int]) -> tuple[list[dict], list[list[Answer]]]:
    """Rows of --responses with the responses that compete, or of --pairs with their two sides. Rows
    with fewer than two are left out."""
    path = args.pairs or args.responses
    if args.pairs:
        rows = read_rows(path, "preferences")
        return rows, [pair_of(row) for row in rows]
    rows = []
    candidates = []
    for row in read_rows(path, "responses"):
        texts = row.pop("responses")
        count = len(texts)
        ended = row.pop("ended", [True] * count)
        ids = row.pop("response_ids", [None] * count)
        answers = list(map(Answer, texts, ended, ids))
        competing = [answer for answer in answers if answer.text.strip()]
        left_out["empty"] += count - len(competing)
        if len(competing) < 2:
            left_out["fewer_than_two"] += 1
            continue
        rows.append(row)
        candidates.append(competing)
    return rows, candidates


def encode_learnable(args: argparse.Namespace, tokenizer, rows: list[dict],
                     candidates: list[list[Answer]], path: str) -> tuple[list, list, list]:
    """The rows that the chat template writes in full, their answers with the ids that are scored,
    which are what is learnt, and both as `encode_rows` gives them."""
    encoded = encode_rows(load_config(args.model), tokenizer, rows, candidates, path)
    kept = [k for k, pair in enumerate(encoded) if pair is not None]
    rows, candidates, encoded = [[part[k] for k in kept] for part in (rows, candidates, encoded)]
    candidates = [[answer._replace(ids=y) for answer, y in zip(answers, ys)]
                  for answers, (_, ys) in zip(candidates, encoded)]
    for row in rows:
        row["vocabulary"] = vocabulary(tokenizer)
    return rows, candidates, encoded


def score_by(path: str, args: argparse.Namespace, encoded: list) -> list[list[float]]:
    """log π of every answer to every prompt by the model in `path`, which is freed again."""
    model = load_scorer(path, this_device(), encoded, args.precision)
    return score(ResponseLogps(model), encoded, args.precision)


def implicit_rewards(args: argparse.Namespace, tokenizer, encoded: list,
                     logps: list[list[float]]) -> list[list[float]]:
    """The implicit reward of every answer to every prompt, from its log-probs under the policy."""
    reference = [[0.0] * len(ys) for _, ys in encoded]
    if args.reference != "none":
        # It reads the policy's tokens: a base model has no chat template.
        check_same_tokens(tokenizer, args.reference_model, encoded)
        reference = score_by(args.reference_model, args, encoded)
    return [implicit_reward(p, r, args.beta, list(map(len, ys)), args.length_penalty)
            for p, r, (_, ys) in zip(logps, reference, encoded)]


def counted(left_out: dict[str, int]) -> str:
    """What was left out, for a line: the reasons that occur, each with its number."""
    return "".join(f", {count} {LEFT_OUT[reason]} left out"
                   for reason, count in left_out.items() if count)


def add_sides(row: dict, chosen: Answer, rejected: Answer) -> None:
    """Write two of a prompt's answers into its row, as its chosen and its rejected side. What an
    earlier label said of the pair goes."""
    for key in ("chosen_ids", "rejected_ids", "chosen_logp", "rejected_logp", *WORST_CASE):
        row.pop(key, None)
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        row |= {side: answer_turn(answer.text), f"{side}_ended": answer.ended}
        if answer.ids is not None:
            row[f"{side}_ids"] = answer.ids


def main(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.model) if args.model else None
    path = args.pairs or args.responses
    left_out = dict.fromkeys(LEFT_OUT, 0)
    rows, candidates = read_candidates(args, left_out)
    count = len(rows)
    prompts = count + left_out["fewer_than_two"]
    if args.model:
        rows, candidates, encoded = encode_learnable(args, tokenizer, rows, candidates, path)
        left_out["unwritten"] = count - len(rows)
    if not rows:
        fail(f"{path}: no row has two responses to compare{counted(left_out)}; has the policy "
             "collapsed?")

    gold, gold_sides, gold_encoded = [], [], []
    if args.gold:
        gold = read_rows(args.gold, "preferences")
        if twice := {row["id"] for row in gold} & {row["id"] for row in rows}:
            fail(f"{args.gold}: id {min(twice)!r} stands in {path} too; ids must differ")
        count = len(gold)
        gold, gold_sides, gold_encoded = encode_learnable(
            args, tokenizer, gold, list(map(pair_of, gold)), args.gold)
        left_out["unwritten"] += count - len(gold)
        if not gold:
            fail(f"{args.gold}: the chat template writes none of its pairs in full")

    device = start_processes()
    logps = [None] * len(rows)
    if args.model:
        logps = score_by(args.model, args, encoded + gold_encoded)
    behaviour = {}
    if args.judge == "implicit":
        reward = implicit_rewards(args, tokenizer, encoded, logps)                      # S7, S13
    else:
        judged = [row | {"responses": [answer.text for answer in answers]}
                  for row, answers in zip(rows, candidates)]
        reward, behaviour = rewards(args, judged)
    if not all(math.isfinite(r) for each in reward for r in each):
        fail(f"{path}: a reward is not finite; are the weights of the judging models sound?")

    # What the margin and the log-probs are (D10).
    precision = "bf16" if in_bf16(device, args.precision) else "fp32"
    margin_of = {"judge": args.judge,
                 "reference": args.reference if args.judge == "implicit" else None,
                 "beta": args.beta, "length_penalty": args.length_penalty,
                 "policy": args.settings["model"], "precision": precision if args.model else None}
    labelled, agreement = [], []
    for row, answers, r, logp in zip(rows, candidates, reward, logps):
        texts = [answer.text for answer in answers]
        pair = best_and_worst(texts, r)                                                 # S8
        # With --pairs, gold's choice stands first.
        agreement.append(0.5 if pair is None else float(pair[0] == 0))
        if pair is None:
            left_out["ties" if len(set(texts)) > 1 else "identical"] += 1
            continue
        best, worst = pair
        add_sides(row, answers[best], answers[worst])
        row["margin"] = r[best] - r[worst]
        row["margin_of"] = margin_of | {"scored": scored_digest(row)}
        if args.model:
            row |= {"chosen_logp": logp[best], "rejected_logp": logp[worst]}
        labelled.append(row)
    if not labelled:
        verdicts = f"; {behaviour['no_verdict']} answers without verdict" if behaviour else ""
        fail(f"{path}: no row has two responses of different reward{verdicts}")

    stats = {"prompts": prompts, "labelled": len(labelled), **left_out, "gold": len(gold),
             "median_margin": median(row["margin"] for row in labelled), **behaviour}
    notes = f", {len(gold)} gold pairs appended" if args.gold else ""
    if behaviour:
        notes += (f", {behaviour['order_disagreement']:.0%} decided by the order of the options, "
                  f"{behaviour['no_verdict']} without verdict")
    if args.pairs:
        stats["gold_agreement"] = sum(agreement) / len(agreement)
        notes += f", agreement with gold {stats['gold_agreement']:.3f}"
    for row, sides, (chosen, rejected) in zip(gold, gold_sides, logps[len(rows):]):
        add_sides(row, *sides)
        row |= {"margin": 0.0, "chosen_logp": chosen, "rejected_logp": rejected}
        row["margin_of"] = margin_of | {"judge": "gold", "reference": None,
                                        "scored": scored_digest(row)}
    publish(args, stats, lambda tmp: write_rows(tmp, labelled + gold))
    print(f"label: {len(labelled)} pairs by {args.judge}{counted(left_out)}, median "
          f"margin {stats['median_margin']:.3f}{notes} → {args.out}")


if __name__ == "__main__":
    run_stage(main, args)
