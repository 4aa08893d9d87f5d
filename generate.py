"""Generate stage: n sampled responses from the policy to every prompt of a round.

    y_1 … y_n ~ π_{t−1}(· | x) at temperature 0.7, top_p 1, at most 300 new tokens
                                                                                    SPA §5.1, B.4

A token is drawn by inverting the cumulative distribution at a uniform number that depends on (seed,
prompt id, sample, position) alone, and batches are the same for any number of processes. So the
text is the same on one process or eight, and after a kill: finished batches lie in OUT.part*, and
the same command goes on from there. Another limit of a batch or its tokens moves the text by
rounding at most. The stage itself is core/sampling.py: `generate`, and `draw`.

Writes the prompt rows with
    responses       n texts: what judges read
    response_ids    the tokens that were sampled, a sampled stop token included: what is learnt (D9)
    vocabulary      a digest of what the ids mean
    ended           False where the length limit cut a response off
    special_inside  True where special tokens stand inside an answer (multi-channel templates write
                    some), so that its text is not all of it: label.py leaves it out

    python generate.py --model pi_0 --prompts prompts_1.jsonl --out responses.jsonl -n 4
    torchrun --nproc_per_node=8 generate.py --model pi_0 --prompts prompts_1.jsonl \\
        --out responses.jsonl
"""
import argparse
import os

from core.flags import sampling_flags
from core.stage import exit_if_complete, exit_if_looking, parser, run_stage, settings_of


def flags() -> tuple[argparse.Namespace, dict]:
    """The arguments, and what decides the output. Ends the program where that is complete."""
    cli = parser(__doc__)
    cli.add_argument("--model", required=True, help="the policy: a Hugging Face folder or hub id")
    cli.add_argument("--prompts", required=True, help="prompt rows (JSONL)")
    cli.add_argument("--out", type=os.path.normpath, required=True, help="response rows (JSONL)")
    cli.add_argument("--fit", action="store_true",
                     help="a prompt too long for its answer loses its first tokens, and the answer "
                     "gets what the context leaves (MT-Bench's second turns, as in FastChat)")
    sampling_flags(cli, n=2)
    args = cli.parse_args()
    settings = settings_of(args, "model", "prompts")
    exit_if_complete(args.out, settings)
    exit_if_looking()
    return args, settings


if __name__ == "__main__":
    args, settings = flags()  # here already: what is imported below takes seconds to load

from core.parallel import start_processes
from core.sampling import generate


def main(args: argparse.Namespace, settings: dict) -> None:
    generate(args, *start_processes())


if __name__ == "__main__":
    run_stage(main, args, settings)
