"""Flags that several stages share. Needs no torch: a stage reads its flags before it loads it."""
import argparse
import os

from core.stage import natural, parser, positive, ranged


def training_flags(doc: str, epochs: int) -> argparse.ArgumentParser:
    """A parser with the flags that seed_dpo.py and train.py share; `doc` heads its help."""
    cli = parser(doc)
    cli.add_argument("--model", required=True,
                     help="where training starts, and the reference: a folder or hub id")
    cli.add_argument("--pairs", required=True, help="rows with chosen and rejected (JSONL)")
    cli.add_argument("--out", type=os.path.normpath, required=True,
                     help="folder of the trained policy")
    cli.add_argument("--beta", type=positive, default=0.1,
                     help="weight of the KL term (papers: 0.1; LLaMA-3 0.01 or 0.05)")
    cli.add_argument("--lr", type=positive, default=5e-7,
                     help="peak learning rate (papers: 5e-7 at 7 B, 5e-6 Phi-2)")
    cli.add_argument("--epochs", type=natural, default=epochs,
                     help=f"how often each pair is seen (papers: {epochs})")
    cli.add_argument("--batch-size", type=natural, default=32,
                     help="pairs an update, over all processes (papers: 32)")
    # Gradients of a larger norm are scaled down to this. No flag: the papers give no number, and
    # 1.0 is TRL's default. It stands among the settings, for it decides the result.
    cli.set_defaults(clip=1.0)
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


def sampling_flags(cli: argparse.ArgumentParser, n: int) -> None:
    """The flags that decide what is sampled; evaluate.py has them too."""
    cli.add_argument("-n", type=natural, default=n, help="responses a prompt (papers: 2)")
    cli.add_argument("--temperature", type=ranged(float, 0), default=0.7,
                     help="sampling temperature (papers: 0.7; 0: greedy), unless a prompt row has "
                     "a `temperature` of its own")
    cli.add_argument("--max-new-tokens", type=natural, default=300,
                     help="length limit of a response in tokens (papers: 300)")
    cli.add_argument("--batch-size", type=natural, default=128,
                     help="responses sampled together, at most; at most rounding in the text")
    cli.add_argument("--sample-tokens", type=natural, default=131072,
                     help="tokens sampled together, prompts and --max-new-tokens counted: memory "
                     "(0.13 MB a token for a 7 B Mistral, 0.33 MB for Phi-2), and at most rounding "
                     "in the text; a run may go on with another")
    cli.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto",
                     help="of the weights while sampling")
    cli.add_argument("--backend", choices=["transformers", "vllm"], default="transformers",
                     help="vllm: if installed; all GPUs of one machine, no torchrun")
    cli.add_argument("--seed", type=ranged(int, 0), default=42,
                     help="decides the text, together with the prompt's id")
