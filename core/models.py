"""Loading: configs, models and tokenizers from a Hugging Face folder or the hub.

Weights are safetensors and complete, a folder's own code never runs, and whatever goes wrong is one
line. A model comes frozen, and core/training.py alone thaws it: autocast keeps a bf16 copy of every
weight that needs a gradient.
"""
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

from core.folder import hub_trouble, snapshot_of
from core.rows import fail, in_one_line, note, reason

# A tokenizer, its chat templates, and where its model's answers end.
TOKENIZER_FILES = [
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "chat_template*", "additional_chat_templates/*", "generation_config.json",
]

# Bars of loading and saving would stand between those of the stages.
transformers.utils.logging.disable_progress_bar()
# What loading must say is said here, in one line.
if "TRANSFORMERS_VERBOSITY" not in os.environ:
    transformers.utils.logging.set_verbosity_error()


def ask_the_hub_once(path: str) -> None:
    """Where `path` is a hub id and the hub does not answer, transformers would wait for every
    file."""
    if not os.path.isdir(path):
        hub_trouble()


def load_config(path: str):
    """A model's config.json, from a folder or the hub."""
    ask_the_hub_once(path)
    with in_one_line(f"{path}: cannot load the model"):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    # Attention is what transformers takes for the family, whatever config.json names: PyTorch's,
    # but for families that need their own.
    config._attn_implementation = None
    return config


def context_of(config) -> float:
    """Tokens that a model reads as it was made to: its context, or the length at which the rotation
    of its positions changes (longrope); ∞ where it has neither."""
    config = config.get_text_config()
    # {"rope_type": "longrope", …}, or for each type of layer its own:
    # {"full_attention": {"rope_type": "longrope", …}, "sliding_attention": {…}}.
    ropes = getattr(config, "rope_parameters", None) or {}
    switches = [rope["original_max_position_embeddings"] for rope in (ropes, *ropes.values())
                if isinstance(rope, dict) and rope.get("rope_type") == "longrope"]
    return min([getattr(config, "max_position_embeddings", None) or math.inf, *switches])


def load_weights(kind, path: str, device: torch.device, dtype: torch.dtype):
    """A frozen model of an Auto class of transformers, dropout off; every weight is in the
    folder."""
    # Straight to a GPU, and not by way of main memory, which all processes of a machine share.
    target = device if device.type == "cuda" else None
    with in_one_line(f"{path}: cannot load the model"):
        model, found = kind.from_pretrained(
            path, config=load_config(path), dtype=dtype, device_map=target, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True)
        model = model.to(device).eval().requires_grad_(False)
    if missing := sorted(found["missing_keys"]):
        some = ", ".join(missing[:3])
        fail(f"{path}: {len(missing)} weights are missing ({some}); is the folder whole, and of a "
             f"{type(model).__name__}?")
    return model


def load_outline(path: str):
    """The modules of what `load_model` returns, without memory for weights (meta device)."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            load_config(path), dtype=torch.float32, trust_remote_code=False)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def load_model(path: str, device: torch.device, dtype: torch.dtype = torch.float32):
    """A frozen causal LM.

    Dropout stays off in training too: policy and reference must be the same function of the same
    tokens (D8).
    """
    return load_weights(transformers.AutoModelForCausalLM, path, device, dtype)


def load_tokenizer(path: str):
    """A tokenizer that knows how a chat is written and where a turn ends."""
    ask_the_hub_once(path)
    with in_one_line(f"{path}: cannot load the tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = tokenizer.chat_template = template.get("default")
    if template is None or tokenizer.eos_token_id is None or not tokenizer.is_fast:
        fail(f"{path}: the tokenizer needs a tokenizer.json, an end-of-sequence token and a chat "
             "template: chat_template.jinja in the model folder; of several, one named default")
    return tokenizer


def copy_tokenizer(source: str, folder: str) -> None:
    """Copy the files of the tokenizer of a model, a folder or hub id, into another folder.

    Not saved by transformers, which writes the files anew and loses what it does not know.
    """
    root = Path(source) if os.path.isdir(source) else snapshot_of(source)
    for file in [file for pattern in TOKENIZER_FILES for file in root.glob(pattern)]:
        if file.is_file():
            copy = Path(folder, file.relative_to(root))
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def check_same_tokens(tokenizer, path: str, encoded: list) -> None:
    """End the program where an id of `encoded` rows, which `tokenizer` wrote, is another token to
    the model at `path`. One that its tokenizer lacks, as a base model's lacks added tokens, is not;
    where it has no tokenizer, that is said."""
    try:
        other = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        note(f"{path}: whether its tokens are the policy's is not known: {reason(error)}")
        return
    parts = [part for prompt, responses in encoded for part in (prompt, *responses)]
    for i in np.unique(np.concatenate(parts)).tolist():
        ours = tokenizer.convert_ids_to_tokens(i)
        theirs = other.convert_ids_to_tokens(i)
        if theirs not in (ours, None):
            fail(f"{path}: token {i} is {theirs!r} there, and {ours!r} to the policy, whose tokens "
                 "are scored; give a model of the same vocabulary")
