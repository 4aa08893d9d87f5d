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
Identical responses or equal rewards carry no preference: such rows are dropped and counted.
`--pairs` judges the two sides of gold pairs again and reports how often the judge agrees with them.

    python label.py --model pi_0 --reference-model pi_init --responses responses.jsonl \\
        --out labelled.jsonl
    python label.py --model pi_0 --judge llm --judge-model judge --responses responses.jsonl \\
        --out labelled.jsonl
    torchrun --nproc_per_node=8 label.py --model pi_0 --reference-model pi_init \\
        --responses responses.jsonl --out labelled.jsonl
"""
import argparse
import math
import os

from core.rows import fail
from core.stage import (
    exit_if_complete,
    exit_if_looking,
    inputs_of,
    parser,
    positive,
    publish,
    ranged,
    run_stage,
    settings_of,
)
from judges.flags import check_judge, judge_flags


def flags() -> tuple[argparse.Namespace, dict]:
    """The arguments, and what decides the output. Ends the program where that is complete."""
    cli = parser(__doc__)
    source = cli.add_mutually_exclusive_group(required=True)
    source.add_argument("--responses", help="response rows (JSONL)")
    source.add_argument("--pairs", help="gold preference rows (JSONL) to judge again")
    cli.add_argument("--out", type=os.path.normpath, required=True, help="labelled rows (JSONL)")
    judge_flags(cli, ["implicit"], "implicit")
    cli.add_argument("--model", help="π_{t−1}, which wrote the responses")
    cli.add_argument("--reference", choices=["init", "previous", "none"], default="init",
                     help="of the judgement (SPA, Table 7)")
    cli.add_argument("--reference-model", help="π_init, or π_{t−2} with --reference previous")
    cli.add_argument("--length-penalty", type=ranged(float, 0), default=0.0,
                     help="α of S13, a token (papers: 0.001 to 0.01)")
    cli.add_argument("--beta", type=positive, default=0.1,
                     help="scale of the implicit reward; the same as in training")
    cli.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto",
                     help="of matrix products, as in training")
    args = cli.parse_args()
    implicit = args.judge == "implicit"
    if implicit and not (args.model and (args.reference_model or args.reference == "none")):
        fail("--judge implicit needs --model and --reference-model (or --reference none)")
    if args.length_penalty and not implicit:
        fail("--length-penalty is a part of the implicit reward; --judge implicit")
    judges = [] if args.judge == "openai" else ["judge_model"]  # a name that the endpoint knows
    settings = settings_of(args, "model", "reference_model", "responses", "pairs", *judges)
    exit_if_complete(args.out, settings)
    check_judge(args)
    exit_if_looking()
    return args, settings


if __name__ == "__main__":
    args, settings = flags()  # here already: what is imported below takes seconds to load

import torch

from core.chat import (
    encode_rows,
    from_text,
    is_foreign,
    pair_of,
    same_vocabulary,
    vocabulary,
)
from core.models import check_same_tokens, load_config, load_tokenizer
from core.parallel import start_processes
from core.policy import ResponseLogps, score
from core.probe import load_scorer
from core.rows import answer_turn, read_rows, write_rows
from judges.judge import rewards


def implicit_reward(policy: list[float], reference: list[float], beta: float, lengths: list[int],
                    alpha: float) -> list[float]:
    """S7: β(log π_{t−1} − log π_init) − α|y| (S13) of each response to one prompt, from log-probs
    and lengths in tokens."""
    return [beta * (p - r) - alpha * n for p, r, n in zip(policy, reference, lengths)]


def best_and_worst(texts: list[str], rewards: list[float]) -> tuple[int, int] | None:
    """S8 for any number of candidates: positions of the highest and lowest reward; None where there
    is no preference."""
    best = max(range(len(texts)), key=rewards.__getitem__)
    worst = min(range(len(texts)), key=rewards.__getitem__)
    if rewards[best] == rewards[worst] or texts[best] == texts[worst]:
        return None
    return best, worst


def read_candidates(args: argparse.Namespace, tokenizer) -> tuple[list[dict], int]:
    """Rows with `answers` (text, ended, ids or None), from --responses or from the two sides of
    --pairs, and how many responses were left out because special tokens stand inside them.

    An empty response is no candidate either.
    """
    path = args.pairs or args.responses
    rows = read_rows(path, "preferences" if args.pairs else "responses")
    special = 0
    for row in rows:
        if args.pairs:
            row["answers"] = pair_of(row)
            continue
        texts = row.pop("responses")
        ended = row.pop("ended", [True] * len(texts))
        ids = row.pop("response_ids", [None] * len(texts))
        inside = row.pop("special_inside", [False] * len(texts))
        if tokenizer and same_vocabulary(tokenizer, row) and ids[0] is not None:
            inside = [is_foreign(tokenizer, own.tolist(), e) for own, e in zip(ids, ended)]
        row["answers"] = [answer for *answer, out in zip(texts, ended, ids, inside)
                          if answer[0].strip() and not out]
        special += sum(inside)
    return rows, special


def score_candidates(args: argparse.Namespace, tokenizer, rows: list[dict], rank: int, world: int,
                     device: torch.device) -> tuple[list[dict], list[list[list[float]]]]:
    """The rows whose responses the chat template writes in full, and log π of their answers, by
    --model and by the reference if there is one, one model in memory after the other. From here on
    the rows carry the ids that were scored: they are what is learnt."""
    models = [args.model]
    if args.judge == "implicit" and args.reference != "none":
        models.append(args.reference_model)
    # Both models read what the policy's tokenizer wrote: a base model as the reference has no
    # chat template.
    encoded = encode_rows(load_config(args.model), tokenizer, rows,
                          [row["answers"] for row in rows], args.pairs or args.responses)
    written = [k for k, pair in enumerate(encoded) if pair is not None]
    if not written:
        fail(f"{args.pairs or args.responses}: the chat template writes no row's responses in full")
    rows = [rows[k] for k in written]
    encoded = [encoded[k] for k in written]
    for row, (_, ys) in zip(rows, encoded):
        row["answers"] = [(text, ended, ids) for (text, ended, _), ids in zip(row["answers"], ys)]
        row["vocabulary"] = vocabulary(tokenizer)
    logps = []
    for path in models:
        if path != args.model:
            check_same_tokens(tokenizer, path, encoded)
        model = load_scorer(path, device, encoded, args.precision,
                            tokenizer if path == args.model else None)
        logps.append(score(ResponseLogps(model), encoded, args.precision, device, rank, world,
                           f"score {path}"))
        del model
    return rows, logps


def implicit_rewards(args: argparse.Namespace, rows: list[dict],
                     logps: list[list[list[float]]]) -> list[list[float]]:
    """S7 of every answer to every prompt."""
    policy, *others = logps
    reference = others[0] if others else [[0.0] * len(own) for own in policy]
    lengths = [[len(ids) for _, _, ids in row["answers"]] for row in rows]
    return [implicit_reward(p, r, args.beta, n, args.length_penalty)
            for p, r, n in zip(policy, reference, lengths)]


def preference(row: dict, best: int, worst: int) -> dict:
    """The row with two of its answers as its chosen and rejected side, in the place of all."""
    answers = row.pop("answers")
    for side, (text, ended, ids) in (("chosen", answers[best]), ("rejected", answers[worst])):
        row |= {side: answer_turn(text), f"{side}_ended": ended}
        if ids is not None:
            row[f"{side}_ids"] = ids
    return row


def main(args: argparse.Namespace, settings: dict) -> None:
    tokenizer = load_tokenizer(args.model) if args.model else None
    path = args.pairs or args.responses
    rows, special = read_candidates(args, tokenizer)
    answered = [row for row in rows if row["answers"]]
    if not answered:
        fail(f"{path}: no row has a response that is not empty; has the policy collapsed?")
    rank, world, device = start_processes()
    how_read = ""
    logps = []
    if args.model:
        how_read = f", {from_text(tokenizer, answered, [row['answers'] for row in answered])}"
        candidates = len(answered)
        answered, logps = score_candidates(args, tokenizer, answered, rank, world, device)
        if len(answered) < candidates:
            how_read += f", {candidates - len(answered)} rows that the template does not write"
    if args.judge == "implicit":
        reward, behaviour = implicit_rewards(args, answered, logps), {}
    else:
        judged = [{**row, "responses": [text for text, *_ in row["answers"]]} for row in answered]
        reward, behaviour = rewards(args, judged, rank, world, device)
    if not all(math.isfinite(r) for own in reward for r in own):
        fail(f"{path}: a reward is not finite; are the weights of the judging models sound?")

    # What the margin is (D10).
    margin_of = {"judge": args.judge,
                 "reference": args.reference if args.judge == "implicit" else None,
                 "beta": args.beta, "length_penalty": args.length_penalty,
                 "policy": settings["model"]}
    labelled, agreement = [], []
    for k, (row, own) in enumerate(zip(answered, reward)):
        pair = best_and_worst([text for text, *_ in row["answers"]], own)
        # With --pairs, gold's choice stands first.
        agreement.append(0.5 if pair is None else float(pair[0] == 0))
        if pair is None:
            continue
        best, worst = pair
        row = preference(row, best, worst)
        row |= {"margin": own[best] - own[worst], "margin_of": margin_of}
        if logps:
            row |= {"chosen_logp": logps[0][k][best], "rejected_logp": logps[0][k][worst]}
        labelled.append(row)
    if not labelled:
        silent = f"; {behaviour['no_verdict']} answers without verdict" if behaviour else ""
        fail(f"{path}: no row has two responses of different reward{silent}")
    if rank > 0:
        return

    margins = sorted(row["margin"] for row in labelled)
    stats = {"prompts": len(rows), "labelled": len(labelled), "ties": len(rows) - len(labelled),
             "special_inside": special,
             "margin_quartiles": [margins[len(margins) * q // 4] for q in (1, 2, 3)],
             **behaviour}
    notes = ""
    if behaviour:
        notes = (f", {behaviour['order_disagreement']:.0%} decided by the order of the options, "
                 f"{behaviour['no_verdict']} without verdict")
    if args.pairs:
        stats["gold_agreement"] = sum(agreement) / len(agreement)
        notes += f", agreement with gold {stats['gold_agreement']:.3f}"
    publish(args.out, settings, stats, lambda tmp: write_rows(tmp, labelled),
            inputs_of(args, settings))
    print(f"label: {len(labelled)} pairs by {args.judge}, {stats['ties']} ties dropped, "
          f"{special} responses with special tokens inside left out{how_read}, median margin "
          f"{stats['margin_quartiles'][1]:.3f}{notes} → {args.out}")


if __name__ == "__main__":
    run_stage(main, args, settings)
