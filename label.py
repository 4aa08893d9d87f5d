"""Label stage: the policy judges its own responses by its implicit reward; best against worst becomes a preference pair.

    r(y) = β(log π_{t−1}(y|x) − log π_init(y|x));   y_w = argmax r, y_l = argmin r                    S7, S8
    margin = r(y_w) − r(y_l) ≥ 0;   its confidence σ(margin) is what dro.py perturbs

The reference of the judgement is π_init, not π_{t−1}: the reward then counts all that was learnt so far (SPA, Table 7).
log π_{t−1}(y) is computed here anyway and goes into the row: it is the training reference, so train.py needs no
reference forward for it. One model is in memory at a time.

Identical responses or equal rewards carry no preference: such rows are dropped and counted. `--judge vader` labels by a
sentiment lexicon instead: the gold standard of the demo. `--judge reward-model` labels by any one-logit classifier.

    python label.py --model pi_0 --reference-model pi_init --responses responses.jsonl --out labelled.jsonl
    torchrun --nproc_per_node=8 label.py --model pi_0 --reference-model pi_init --responses r.jsonl --out labelled.jsonl
"""
import math

import torch
import transformers
from tqdm import tqdm

from data.batches import encode_rows
from data.machine import autocast, merge, start_processes
from data.rows import fail, is_done, parser, positive, publish, read_rows, run_stage, settings_of, write_rows, wrong
from seed_dpo import ResponseLogps, load, score


def implicit_reward(policy: list[float], reference: list[float], beta: float) -> list[float]:
    """S7: β(log π_{t−1} − log π_init) of each response to one prompt, from the two lists of log-probs."""
    return [beta * (p - r) for p, r in zip(policy, reference)]


def best_and_worst(texts: list[str], rewards: list[float]) -> tuple[int, int] | None:
    """S8 for any number of candidates: positions of the highest and lowest reward; None where there is no preference."""
    best, worst = max(range(len(texts)), key=rewards.__getitem__), min(range(len(texts)), key=rewards.__getitem__)
    return None if rewards[best] == rewards[worst] or texts[best] == texts[worst] else (best, worst)


def vader_scores(rows: list[dict]) -> list[list[float]]:
    """Sentiment in [−1, 1] of every response by VADER, a lexicon rated by people (Hutto & Gilbert 2014)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # the demo's alone
    vader = SentimentIntensityAnalyzer()
    return [[vader.polarity_scores(text)["compound"] for text in row["responses"]] for row in rows]


@torch.no_grad()
def reward_model_scores(path: str, rows: list[dict], precision: str, rank: int, world: int, device: torch.device) -> list[list[float]]:
    """Logit of every response by a one-logit sequence classifier with a chat template; rows split over ranks."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot load the reward model: {str(error).splitlines()[0]}")
    if model.config.num_labels != 1 or tokenizer.chat_template is None:
        fail(f"{path}: a reward model needs one logit and a chat template; found {model.config.num_labels} logits")
    model.to(device).eval()
    mine = {}
    for i in tqdm(range(rank, len(rows), world), desc="reward model", unit="prompt", disable=None if rank == 0 else True):
        mine[i] = []
        for text in rows[i]["responses"]:
            chat = [*rows[i]["prompt"], {"role": "assistant", "content": text}]
            ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt").to(device)
            with autocast(device, precision):
                mine[i].append(model(**ids).logits.float().item())
    merged = merge(mine, world)
    return [merged[i] for i in range(len(rows))]


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--responses", required=True, help="response rows (JSONL)")
    cli.add_argument("--out", required=True, help="labelled rows (JSONL)")
    cli.add_argument("--judge", choices=["implicit", "vader", "reward-model"], default="implicit", help="who labels")
    cli.add_argument("--model", help="π_{t−1}, which wrote the responses")
    cli.add_argument("--reference-model", help="π_init, the reference of the judgement")
    cli.add_argument("--judge-model", help="the classifier of --judge reward-model")
    cli.add_argument("--beta", type=positive, default=0.1, help="scale of the implicit reward; the same as in training")
    cli.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="of matrix products, as in training")
    args = cli.parse_args()
    if args.judge == "implicit" and not (args.model and args.reference_model):
        fail("--judge implicit needs --model and --reference-model")
    if args.judge == "reward-model" and not args.judge_model:
        fail("--judge reward-model needs --judge-model")
    settings = settings_of(args, "model", "reference_model", "judge_model", "responses")
    if is_done(args.out, settings):
        return
    rows = read_rows(args.responses, "responses")
    for row in rows:  # an empty response is no candidate
        ended = row.pop("ended", [True] * len(row["responses"]))
        if wrong("ended", ended) or len(ended) != len(row["responses"]):
            fail(f"{args.responses}: id {row['id']!r}: 'ended' must hold true or false for each of its responses")
        keep = [(text, e) for text, e in zip(row["responses"], ended) if text.strip()]
        row["responses"], row["ended"] = [text for text, _ in keep], [e for _, e in keep]
    answered = [row for row in rows if row["responses"]]
    rank, world, device = start_processes()
    if args.judge == "implicit":
        logps = []
        for path in (args.model, args.reference_model):
            model, tokenizer = load(path, device)
            encoded = encode_rows(model, tokenizer, answered, args.responses, lambda row: list(zip(row["responses"], row["ended"])))
            logps.append(score(ResponseLogps(model), encoded, args.precision, device, rank, world, f"score {path}"))
            del model
        rewards = [implicit_reward(p, r, args.beta) for p, r in zip(*logps)]
    elif args.judge == "vader":
        rewards = vader_scores(answered)
    else:
        rewards = reward_model_scores(args.judge_model, answered, args.precision, rank, world, device)
    if not all(math.isfinite(r) for row in rewards for r in row):
        fail(f"{args.responses}: a reward is not finite; are the weights of the judging models sound?")

    labelled = []
    for k, (row, reward) in enumerate(zip(answered, rewards)):
        texts, ended = row.pop("responses"), row.pop("ended")
        if (pair := best_and_worst(texts, reward)) is None:
            continue
        w, l = pair
        row |= {"chosen": texts[w], "rejected": texts[l], "chosen_ended": ended[w], "rejected_ended": ended[l],
                "margin": reward[w] - reward[l]}
        if args.judge == "implicit":
            row |= {"chosen_logp": logps[0][k][w], "rejected_logp": logps[0][k][l]}
        labelled.append(row)
    if not labelled:
        fail(f"{args.responses}: no row has two responses of different reward")
    if rank == 0:
        margins = sorted(row["margin"] for row in labelled)
        stats = {"prompts": len(rows), "labelled": len(labelled), "ties": len(rows) - len(labelled),
                 "margin_quartiles": [margins[len(margins) * q // 4] for q in (1, 2, 3)]}
        publish(args.out, settings, stats, lambda tmp: write_rows(tmp, labelled))
        print(f"label: {len(labelled)} pairs by {args.judge}, {stats['ties']} ties dropped, median margin "
              f"{stats['margin_quartiles'][1]:.3f} → {args.out}")


if __name__ == "__main__":
    run_stage(main)
