"""How far the policies of bench/demo.sh have gone, and how well they still write.

    KL         nats an answer: mean of log π(y|x) − log π_init(y|x) over answers y ~ π(·|x) that are
               sampled at T = 1 (to the same length limit) to the prompts of the evaluation
    fluency    nats a token: log π_init(y|x) of these answers, by their tokens

± one standard error over prompts. Policies are those that have answers in RUN/eval; what is known
of one is kept under its digest beside the runs, so that π_init and π_0 are measured once a seed.
Writes RUN/measures.json for bench/demo_table.py and bench/demo_plots.py. With --match it prints
only the c at which the rays of the run, named rayC, have the KL of another run's last round.

    python bench/demo_measures.py runs/table/*/*
    python bench/demo_measures.py runs/table/1/rays --match runs/table/1/spa
"""
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from core.chat import encode_rows  # noqa: E402
from core.models import load_config, load_tokenizer  # noqa: E402
from core.parallel import start_processes  # noqa: E402
from core.policy import ResponseLogps, score  # noqa: E402
from core.probe import load_scorer  # noqa: E402
from core.rows import fail, read_rows  # noqa: E402
from core.stage import parser, run_stage  # noqa: E402
from judges.history import sources_of, stage_of  # noqa: E402
from judges.measures import mean_and_error  # noqa: E402

SAMPLED = ("max_new_tokens", "seed", "precision")  # settings of the evaluation that stay


def write_json(path: Path, value: object) -> None:
    """By a rename: a kill leaves the file whole, or none."""
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    tmp.replace(path)


def logps_of(path: str, rows: list[dict], device: torch.device) -> np.ndarray:
    """log π(y|x) [prompts, samples] of the answers in rows of generate.py, in fp32."""
    tokenizer = load_tokenizer(path)
    answers = [list(zip(row["responses"], row["ended"], row["response_ids"])) for row in rows]
    encoded = encode_rows(load_config(path), tokenizer, rows, answers, path)
    model = load_scorer(path, device, encoded, "fp32")
    return np.array(score(ResponseLogps(model), encoded, "fp32"))


def far_and_fluent(policy: np.ndarray, init: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """KL and fluency from log π and log π_init [prompts, samples] of π's answers, which have so
    many tokens."""
    kl, kl_error = mean_and_error(policy - init)
    fluency = float(init.sum() / tokens.sum())
    _, error = mean_and_error((init - fluency * tokens) / tokens.mean())
    return {"kl": kl, "kl_error": kl_error, "fluency": fluency, "fluency_error": error}


def measure(answers: Path, init: str, cache: Path, device: torch.device) -> dict[str, float]:
    """The measures of the policy that gave the `answers` of an evaluation."""
    record = stage_of(str(answers))
    settings, inputs = record["settings"], sources_of(record)
    known = cache / f"{settings['model']}.json"
    if not known.exists():
        samples = known.with_suffix(".jsonl")
        flags = ["-n", "1", "--temperature", "1", "--model", inputs["model"],
                 "--prompts", inputs["prompts"]]
        for key in SAMPLED:
            flags += [f"--{key.replace('_', '-')}", str(settings[key])]
        subprocess.run([sys.executable, ROOT / "generate.py", *flags, "--out", samples], check=True)
        rows = read_rows(str(samples), "responses")
        tokens = np.array([[len(ids) for ids in row["response_ids"]] for row in rows])
        policy, start = (logps_of(path, rows, device) for path in (inputs["model"], init))
        write_json(known, far_and_fluent(policy, start, tokens))
    return json.loads(known.read_text())


def scale_at(kl: float, rays: dict[float, float]) -> float:
    """c at which a ray has this KL: √KL is nearly straight in c; rays: c → KL."""
    scales = sorted(rays)
    roots = [math.sqrt(max(rays[c], 0.0)) for c in scales]
    if not roots[0] <= math.sqrt(kl) <= roots[-1]:
        fail(f"no ray between c = {scales[0]} and {scales[-1]} has KL {kl:.1f}")
    return round(float(np.interp(math.sqrt(kl), roots, scales)), 2)


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("runs", type=Path, nargs="+", help="runs of bench/demo.sh: ROOT/SEED/ARM")
    cli.add_argument("--match", type=Path, help="run whose last round's KL the ray is to have")
    args = cli.parse_args()
    if args.match:
        rays, other = (json.loads((run / "measures.json").read_text())
                       for run in (args.runs[0], args.match))
        scales = {float(name.removeprefix("ray")): m["kl"] for name, m in rays.items()
                  if name.startswith("ray")}
        last = max(name for name in other if name.startswith("round"))
        print(scale_at(other[last]["kl"], scales | {1.0: rays["seed"]["kl"]}))
        return
    device = start_processes()
    for run in args.runs:
        if not (run / "eval/init.jsonl").exists():
            continue
        init = sources_of(stage_of(str(run / "eval/init.jsonl")))["model"]
        measures = {answers.stem: measure(answers, init, run.parent / "measured", device)
                    for answers in sorted((run / "eval").glob("*.jsonl"))}
        write_json(run / "measures.json", measures)
        print(f"{run}: " + ", ".join(f"{name} KL {m['kl']:.1f}" for name, m in measures.items()))


if __name__ == "__main__":
    run_stage(main)
