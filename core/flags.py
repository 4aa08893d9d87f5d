"""Flags that both training stages share, and what they look at before any work. Needs no torch: a
stage reads its flags before it loads it."""
import argparse

from core.folder import policy_bytes, size_of
from core.stage import exit_if_looking, natural, parser, positive, ranged, start, work_folder

# Gradients of a larger norm are scaled down to this. No flag: the papers give no number, and 1.0 is
# TRL's default.
CLIP = 1.0


def training_flags(doc: str, epochs: int) -> argparse.ArgumentParser:
    """A parser with the flags that seed_dpo.py and train.py share; `doc` heads its help."""
    cli = parser(doc, out="folder of the trained policy")
    cli.add_argument("--model", required=True,
                     help="where training starts, and the reference: a folder or hub id")
    cli.add_argument("--pairs", required=True, help="rows with chosen and rejected (JSONL)")
    cli.add_argument("--beta", type=positive, default=0.1,
                     help="weight of the KL term (papers: 0.1; LLaMA-3 0.01 or 0.05)")
    cli.add_argument("--lr", type=positive, default=5e-7,
                     help="peak learning rate (papers: 5e-7 at 7 B, 5e-6 Phi-2)")
    cli.add_argument("--epochs", type=natural, default=epochs,
                     help=f"how often each pair is seen (papers: {epochs})")
    cli.add_argument("--batch-size", type=natural, default=32,
                     help="pairs an update, over all processes (papers: 32)")
    cli.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto",
                     help="of matrix products; weights stay fp32")
    cli.add_argument("--seed", type=ranged(int, 0), default=42,
                     help="decides the order of the pairs")
    cli.add_argument("--micro-tokens", type=natural, default=2048,
                     help="tokens a forward pass and process: memory, not mathematics")
    cli.add_argument("--gradient-checkpointing", action="store_true",
                     help="recompute each layer in backward: less memory, a third more work")
    cli.add_argument("--shard", action="store_true",
                     help="split weights, gradients and Adam over the processes (FSDP2)")
    cli.add_argument("--save-every", type=ranged(float, 0), default=10.0,
                     help="minutes between checkpoints to go on from after a kill; 0: none")
    return cli


def start_training(args: argparse.Namespace) -> None:
    """Ends the program where the policy is complete or training could not begin, as far as files
    show, or where LOOK=yes. The policy stays on the disk, checkpoints go again."""
    start(args, ["model"], ["pairs"], constants={"clip": CLIP})
    policy = policy_bytes(args.model)
    checkpoints = 0
    if args.save_every:
        # Weights and Adam's two moments, and a new one is whole before the last one goes.
        checkpoints = max(0, 6 * policy - size_of(f"{work_folder(args)}/checkpoint"))
    exit_if_looking(args.out, writes=policy, passing=checkpoints)
