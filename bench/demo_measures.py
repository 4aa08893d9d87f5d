"""What the method promises, measured on the finished runs of bench/demo.sh.

    worst tenth    mean gold score of the tenth of the evaluation prompts that does worst
    labels         of each round: pairs, and those whose label the gold judge agrees with (a tie ½),
                   among all, flagged by SPA, moved by the run's adversary, that an adversary of
                   radius 0.01 or 0.05 would move, and neither flagged nor moved
    held out       worst-case loss by radius (T2-3), and the share with ξ > ½, on gold pairs of the
                   evaluation prompts: π_init's answers to each, best against worst by the gold
                   judge, and the confidences ξ = σ(β[(log π − log π_init)(y_w) − (…)(y_l)]) of π_0
                   and of the run's last policy

The gold judge is the demo's, VADER. A pair that is moved in part counts in part. Log-probs need one
pass of each policy over π_init's answers; they are kept in ROOT/SEED/logps under the policy's
digest, so that π_init and π_0 are scored once a seed. The rest is read from files and written to
ROOT/SEED/ARM/measures.json, for bench/demo_table.py. What is there is not done again, and the
weights of a policy that was scored are not needed any more.

    python bench/demo_measures.py runs/table
"""
import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.lab import RADII, follower  # noqa: E402
from core.chat import encode_rows  # noqa: E402
from core.folder import fingerprint  # noqa: E402
from core.models import load_config, load_tokenizer  # noqa: E402
from core.parallel import start_processes  # noqa: E402
from core.policy import ResponseLogps, score  # noqa: E402
from core.probe import load_scorer  # noqa: E402
from core.rows import atomic_path, fail, margin_problem, read_rows  # noqa: E402
from core.stage import parser, run_stage  # noqa: E402
from evaluate import trained  # noqa: E402
from judges.judge import SCORERS, compare  # noqa: E402
from label import best_and_worst, implicit_reward  # noqa: E402

GOLD = argparse.Namespace(judge="vader")
PIECES = 6            # K of the held-out worst case and of the adversary that is imagined
WOULD = (0.01, 0.05)  # its radii
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------- pure functions


def worst_tenth(scores: np.ndarray) -> float:
    """Mean of the lowest tenth of the prompts' scores, from scores [prompts, samples]."""
    per_prompt = np.sort(scores.mean(1))
    return float(per_prompt[:max(1, len(per_prompt) // 10)].mean())


def would_move(xi: np.ndarray, epsilon: float) -> np.ndarray:
    """Fractions [N] of the pairs that the worst case within ε moves (T2-5)."""
    solution = follower(xi, PIECES, epsilon)
    return np.bincount(solution.owner, solution.weight * (solution.shift != 0), len(xi))


def label_counts(right: np.ndarray, flagged: np.ndarray, moved: np.ndarray,
                 would: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Group → [pairs, pairs whose label is right], from right in {0, ½, 1} [N], flagged bool [N]
    and the fractions [N] that are moved and would be moved."""
    shares = {"all": np.ones(len(right)), "flagged": flagged * 1.0, "moved": moved, **would,
              "others": (1 - moved) * ~flagged}
    return {name: [float(own.sum()), float((own * right).sum())] for name, own in shares.items()}


def heldout_margins(policy: list[list[float]], reference: list[list[float]],
                    sides: list[tuple[int, int] | None], beta: float) -> np.ndarray:
    """M of each gold pair, from both models' log-probs of every answer to every prompt and the
    positions of best and worst; prompts without a preference have none."""
    margins = []
    for own, other, pair in zip(policy, reference, sides):
        if pair is not None:
            reward = implicit_reward(own, other, beta, [0] * len(own), 0.0)
            margins.append(reward[pair[0]] - reward[pair[1]])
    return np.array(margins)


def heldout_losses(margins: np.ndarray) -> list[float]:
    """The worst-case loss at each of RADII, as bench/lab.py has it."""
    xi = expit(margins)
    return [follower(xi, PIECES, r).value for r in RADII]


# ------------------------------------------------------------------------------------------ a run


def folder_of(run: Path, name: str) -> str:
    """Where run.sh keeps a policy of the report."""
    return str(run / "seed" if name == "seed" else run / name / "policy")


def gold_scores(rows: list[dict]) -> np.ndarray:
    """The gold judge's scores [prompts, samples]."""
    return np.array(SCORERS[GOLD.judge](GOLD, rows, 0, 1, CPU))


def labels_of(run: Path, name: str) -> dict[str, list[float]]:
    """`label_counts` of a round."""
    rows = read_rows(str(run / name / "worst.jsonl"), "labelled")
    pairs = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    right, _ = compare(GOLD, pairs, 0, 1, CPU)
    log, _ = trained(folder_of(run, name))
    flags = {i for step in log for i in step.get("flagged", [])}
    flagged = np.array([row["id"] in flags for row in rows])
    moved = np.array([sum(weight for weight, shift in row["atoms"] if shift) for row in rows])
    would = {}
    # another judge's margins are no confidences against π_init
    if not any(margin_problem(row, row.get("margin_of", {}).get("beta", 0)) for row in rows):
        xi = expit(np.array([row["margin"] for row in rows]))
        would = {f"would {epsilon}": would_move(xi, epsilon) for epsilon in WOULD}
    return label_counts(right, flagged, moved, would)


def logps_of(path: str, digest: str, answers: Path, cache: Path,
             precision: str, device: torch.device) -> list[list[float]]:
    """log π of every answer in a file of responses, kept under the policy's digest."""
    kept = cache / f"{digest}-{fingerprint(str(answers))}-{precision}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    if not os.path.isdir(path):
        fail(f"{path}: no such model folder, and its log-probs are not in {cache}")
    if fingerprint(path) != digest:
        fail(f"{path}: without its weights, or not the policy of the run's report")
    rows = read_rows(str(answers), "responses")
    tokenizer = load_tokenizer(path)
    sampled = [list(zip(row["responses"], row["ended"], row["response_ids"])) for row in rows]
    encoded = encode_rows(load_config(path), tokenizer, rows, sampled, str(answers))
    model = load_scorer(path, device, encoded, precision, tokenizer)
    logps = score(ResponseLogps(model), encoded, precision, device, title=f"score {path}")
    write_json(kept, logps)
    return logps


def heldout_of(run: Path, report: dict, init: str, precision: str,
               device: torch.device) -> dict:
    """How many gold pairs; worst-case losses and right pairs of π_0 and of the last policy."""
    digests, answers = report["settings"], run / "eval/init.jsonl"
    cache = run.parent / "logps"
    rows = read_rows(str(answers), "responses")
    sides = [best_and_worst(row["responses"], own)
             for row, own in zip(rows, gold_scores(rows).tolist())]
    reference = logps_of(init, digests["init"], answers, cache, precision, device)
    found = {"pairs": sum(pair is not None for pair in sides)}
    for name in dict.fromkeys(["seed", list(report["policies"])[-1]]):
        path = folder_of(run, name)
        beta = trained(path)[1]["beta"]
        policy = logps_of(path, digests[name], answers, cache, precision, device)
        margins = heldout_margins(policy, reference, sides, beta)
        found[name] = {"loss": heldout_losses(margins), "right": float((margins > 0).mean())}
    return found


def write_json(path: Path, value: object) -> None:
    """Beside its place, then renamed: a file that exists is whole."""
    with atomic_path(str(path)) as tmp:
        Path(tmp).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("root", type=Path, help="the runs of bench/demo.sh: ROOT/SEED/ARM")
    cli.add_argument("--model", default="models/smollm2", help="π_init of these runs")
    cli.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="fp32",
                     help="of matrix products; bf16 moved a policy's held-out loss by 0.013, "
                          "which is as much as methods differ by")
    args = cli.parse_args()
    _, _, device = start_processes()
    reports = sorted(args.root.glob("*/*/report.md.stats.json"))
    if not reports:
        fail(f"{args.root}: no finished runs of bench/demo.sh")
    for number, path in enumerate(reports, 1):
        run, report = path.parent, json.loads(path.read_text(encoding="utf-8"))
        out = run / "measures.json"
        of = report["settings"] | {"heldout_precision": args.precision}
        if out.exists() and json.loads(out.read_text())["of"] == of:
            continue
        tenth = {}
        for name in report["policies"]:
            rows = read_rows(str(run / f"eval/{name}.jsonl"), "responses")
            tenth[name] = worst_tenth(gold_scores(rows))
        rounds = [name for name in report["policies"] if name.startswith("round")]
        labels = {name: labels_of(run, name) for name in rounds}
        heldout = heldout_of(run, report, args.model, args.precision, device)
        write_json(out, {"of": of, "tenth": tenth, "labels": labels, "radii": RADII,
                         "heldout": heldout})
        print(f"{number}/{len(reports)} {out}: {heldout['pairs']} gold pairs held out", flush=True)


if __name__ == "__main__":
    run_stage(main)
