"""What keeping sampled ids changes, and what asking a model costs, on a finished run of the demo.

Labels each round again from the text alone, as if the rows had no ids, and counts the pairs that
differ; times the probe of the policy in both precisions, apart from loading it.

    python bench/tokens.py runs/demo
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from core.chat import encode_rows, pair_of  # noqa: E402
from core.models import load_config, load_model, load_tokenizer  # noqa: E402
from core.probe import load_scorer  # noqa: E402
from core.rows import read_rows, write_rows  # noqa: E402
from core.sampling import check_samples  # noqa: E402


def labels_from_text(run: Path, t: int, folder: Path) -> None:
    """Prints how a round's labels and tokens differ when responses are read back from text."""
    rows = read_rows(str(run / f"round{t}/responses.jsonl"), "responses")
    kept = {row["id"]: row for row in read_rows(str(run / f"round{t}/labelled.jsonl"), "labelled")}
    stats = json.loads((run / f"round{t}/labelled.jsonl.stats.json").read_text())
    policy = run / "seed" if t == 1 else run / f"round{t - 1}/policy"
    command = stats["about"]["command"].split()
    reference = command[command.index("--reference-model") + 1]
    text, out = folder / "text.jsonl", folder / f"{t}.jsonl"
    write_rows(str(text), ({k: v for k, v in row.items() if k not in ("response_ids", "vocabulary")}
                           for row in rows))
    subprocess.run([sys.executable, ROOT / "label.py", "--model", policy, "--reference-model",
                    reference, "--responses", text, "--out", out], check=True,
                   stdout=subprocess.DEVNULL)
    again = {row["id"]: row for row in read_rows(str(out), "labelled")}
    both = kept.keys() & again.keys()
    differ = sum((kept[i]["chosen"], kept[i]["rejected"]) !=
                 (again[i]["chosen"], again[i]["rejected"]) for i in both)
    tokenizer = load_tokenizer(str(policy))
    other = responses = 0
    for row in rows:
        for answer, ids, ended in zip(row["responses"], row["response_ids"], row["ended"]):
            own = tokenizer(answer, add_special_tokens=False).input_ids
            other += own != (ids[:-1] if ended else ids)
            responses += 1
    print(f"round {t}: {other} of {responses} responses come back as other tokens; "
          f"{differ} of {len(both)} labelled pairs differ")


def probe_cost(run: Path) -> None:
    """Prints the seconds of the probe, the best of three: scoring beyond loading, and sampling."""
    path, cpu = str(run / "seed"), torch.device("cpu")
    tokenizer = load_tokenizer(path)
    rows = read_rows(str(run / "round1/labelled.jsonl"), "labelled")
    encoded = encode_rows(load_config(path), tokenizer, rows, [pair_of(row) for row in rows], path)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        loading, scoring, sampling = [], [], []
        for _ in range(3):
            start = time.perf_counter()
            load_model(path, cpu)
            loading.append(time.perf_counter() - start)
            start = time.perf_counter()
            load_scorer(path, cpu, encoded, precision, tokenizer)
            scoring.append(time.perf_counter() - start)
            model = load_model(path, cpu, dtype)
            start = time.perf_counter()
            check_samples(path, model, [prompt.tolist() for prompt, _ in encoded], 48)
            sampling.append(time.perf_counter() - start)
        print(f"probe, {precision}: {min(scoring) - min(loading):.2f} s of scoring, "
              f"{min(sampling):.2f} s of sampling")


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    with tempfile.TemporaryDirectory() as folder:
        for t in (1, 2):
            labels_from_text(run, t, Path(folder))
    probe_cost(run)


if __name__ == "__main__":
    main()
