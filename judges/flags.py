"""The flags that name a judge. Needs no torch: a stage reads its flags before it loads it."""
import argparse

from core.rows import fail
from core.stage import natural

JUDGES = ("vader", "reward-model", "pairrm", "llm", "openai")  # who they are: judges/judge.py


def judge_flags(cli: argparse.ArgumentParser, others: list[str], default: str) -> None:
    """The flags of label.py and evaluate.py that name a judge; `others` are the choices that the
    stage has besides."""
    cli.add_argument("--judge", choices=[*others, *JUDGES], default=default,
                     help="who judges (see judges/judge.py)")
    cli.add_argument("--judge-model", help="folder or hub id of the judging model; with openai the "
                                           "endpoint's name for it")
    cli.add_argument("--base-url", help="the endpoint of --judge openai; its key is read from "
                                        "OPENAI_API_KEY, never from a flag")
    cli.add_argument("--judge-tokens", type=natural, default=16,
                     help="room for an answer of --judge openai; more where it reasons first")


def check_judge(args: argparse.Namespace) -> None:
    if args.judge in ("reward-model", "pairrm", "llm", "openai") and not args.judge_model:
        fail(f"--judge {args.judge} needs --judge-model")
