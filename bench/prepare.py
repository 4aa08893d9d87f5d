"""Does data/prepare.py take a set of the papers' size within its limits: 60 000 rows in 60 s and 2
GB, a farthest-point seed in 1 GB?

    python bench/prepare.py            asserts the limits; three quarters of a minute on two cores

The rows are random words laid out as UltraFeedback's (prompt, chosen and rejected as message lists,
300 words a response) in a parquet file; every twentieth prompt repeats another. The vectors are
random, of a 7 B model's width.
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas

ROOT = Path(__file__).resolve().parent.parent
N, WIDTH, SEED = 60_000, 4096, 2_000


def measured(*command: str) -> tuple[float, float, str]:
    """(seconds, GB at the peak, last line printed) of a Python process, its imports included."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    started = time.perf_counter()
    out = subprocess.run(
        [sys.executable, "-c", code, sys.executable, *command],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    *_, last, peak = out.splitlines()
    return time.perf_counter() - started, int(peak) * 1024 / 1e9, last


def main() -> None:
    dice = random.Random(0)
    words = ["".join(dice.choices("etaoinshrdlu", k=dice.randint(2, 9))) for _ in range(5000)]

    def text(count: int) -> str:
        return " ".join(dice.choices(words, k=count))

    prompts = [text(60) for _ in range(N * 19 // 20)]
    prompts += [p.upper() for p in prompts[: N - len(prompts)]]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/set.parquet"
        pandas.DataFrame(
            [
                {
                    "prompt": p,
                    **{
                        side: [
                            {"content": p, "role": "user"},
                            {"content": text(300), "role": "assistant"},
                        ]
                        for side in ("chosen", "rejected")
                    },
                }
                for p in prompts
            ]
        ).to_parquet(path)
        size = Path(path).stat().st_size / 1e6
        seconds, gb, line = measured(
            "-m",
            "data.prepare",
            "--data",
            path,
            "--out",
            f"{folder}/out",
            "--rounds",
            "8000",
            "20000",
        )
    print(
        f"prepare: {N} rows ({size:.0f} MB of parquet) in {seconds:.1f} s, {gb:.2f} GB at the peak"
        f"\n  {line}"
    )
    assert seconds <= 60 and gb <= 2, "prepare.py is over its limits"

    seconds, gb, line = measured(
        "-c",
        f"""if True:
        import time, torch
        from data.prepare import farthest
        vectors = torch.empty({N}, {WIDTH}, dtype=torch.float16)
        for block in vectors.split(1000):
            block.copy_(torch.nn.functional.normalize(torch.randn(len(block), {WIDTH}), dim=-1))
        started = time.perf_counter()
        farthest(vectors, {SEED})
        print(time.perf_counter() - started)""",
    )
    print(
        f"farthest: {SEED} of {N} vectors of width {WIDTH} in {float(line):.0f} s, "
        f"{gb:.2f} GB at the peak, torch itself included"
    )
    assert gb <= 1, "farthest is over its limit"


if __name__ == "__main__":
    main()
