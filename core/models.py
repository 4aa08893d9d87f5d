"""Loading: configs, models and tokenizers from a Hugging Face folder or the hub."""
import os
import sys

import torch
import transformers
from safetensors import SafetensorError

from core.rows import fail

if not sys.stderr.isatty():
    transformers.utils.logging.disable_progress_bar()


def load_config(path: str):
    """A model's config.json, from a folder or the hub."""
    if not os.path.isdir(path) and (os.path.exists(path) or path.startswith((".", "/")) or path.count("/") != 1):
        fail(f"{path}: no such model folder, and not the id of a model on the hub")
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot load the model: {str(error).splitlines()[0]}")


def load_model(path: str, device: torch.device, dtype: torch.dtype = torch.float32):
    """A causal LM from a folder or the hub: safetensors only, no remote code, dropout off.

    Dropout stays off in training too: policy and reference must be the same function of the same tokens (D8).
    """
    load_config(path)  # says so if there is no model
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        fail(f"{path}: cannot load the model: {str(error).splitlines()[0]}")
    if any(getattr(model.config, key, None) for key in ("final_logit_softcapping", "logit_scale", "logits_scaling")):
        fail(f"{path}: not supported, because the logits of {model.config.model_type} are not lm_head(hidden)")
    return model.to(device).eval()


def load_tokenizer(path: str):
    """A tokenizer that knows how a chat is written and where a turn ends."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot load the tokenizer: {str(error).splitlines()[0]}")
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        fail(f"{path}: the tokenizer needs a chat template (chat_template.jinja in the model folder) and an end-of-sequence token")
    return tokenizer


def load(path: str, device: torch.device, dtype: torch.dtype = torch.float32):
    """(model, tokenizer)."""
    return load_model(path, device, dtype), load_tokenizer(path)
