"""What a path or a hub id is, without loading it: its fingerprint, whether it is a model with a
chat template, and how large it is. Needs no torch.

LOOK=yes: a stage only looks. Inputs may not be there yet then: PROMISED holds lines
`path<TAB>bytes`, what earlier stages will write.
"""
import functools
import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import NoReturn

from core.rows import fail, note

# The fingerprint, while only looking, of what has yet to be written or downloaded.
ABSENT = "absent"
# Of each tensor its first bytes are looked at: an optimizer's step changes all tensors.
SAMPLE = 1 << 16
# Weights that nothing here reads; beside safetensors they are the same ones again.
UNREAD = (".bin", ".pth", ".pt", ".gguf", ".onnx", ".h5", ".msgpack")
# What a folder without safetensors may hold instead, by the end of a name → what to do.
INSTEAD = {
    "adapter_config.json": "a LoRA adapter without its base; merge it (peft: merge_and_unload, "
                           "then save_pretrained) and name the merged folder",
    ".gguf": "holds GGUF, llama.cpp's format; name the model that it was made from",
    ".bin": "its weights are pickles, which may run code and are never loaded; convert them to "
            "safetensors (transformers: from_pretrained, then save_pretrained)",
}
# Bytes a parameter of a published policy, in fp32.
POLICY_BYTES = 4


# ---------------------------------------------------------------------------------- only looking


def is_looking() -> bool:
    """Whether this program only looks, and writes nothing anywhere."""
    return os.environ.get("LOOK") == "yes"


def promises() -> dict[str, int]:
    """What earlier stages will write: path → bytes."""
    table = {}
    for line in os.environ.get("PROMISED", "").splitlines():
        path, _, count = line.rpartition("\t")
        table[os.path.normpath(path)] = int(count)
    return table


def is_promised(path: str) -> bool:
    """Whether an earlier stage will write `path`, or a folder that holds it."""
    path = os.path.normpath(path)
    return any(path == one or path.startswith(f"{one}/") for one in promises())


# --------------------------------------------------------------------------------- fingerprints


def files_of(path: str) -> list[Path]:
    """The file `path`, or all files in a folder, sorted; none where nothing is there."""
    return [file for file in [Path(path), *sorted(Path(path).rglob("*"))] if file.is_file()]


def size_of(path: str) -> int:
    """Bytes of a file, or of all in a folder; 0 where nothing is there."""
    return sum(file.stat().st_size for file in files_of(path))


def fingerprint(path: str, kind: str = "model") -> str:
    """Digest of the content of a file or folder; for a hub id, its name and commit: the one that
    was downloaded, or else the hub's, which is not asked while only looking.

    Of safetensors it takes size, header and the first 64 KB of every tensor, everything else whole.
    Of a folder not what is hidden, nor log.jsonl: downloads and training leave times there. `kind`
    is what a hub id is one of, "model" or "dataset"; a "file" has none.
    """
    if is_promised(path):
        return ABSENT
    if not os.path.exists(path):
        # What lies behind an address shows when it is read.
        if kind == "dataset" and "://" in path:
            return path
        if kind == "file" or not is_hub_id(path):
            fail(f"{path}: no such file or folder")
        if snapshot := snapshot_of(path, kind):
            return f"{path}@{snapshot.name}"
        if is_looking():
            return ABSENT
        info = hub_info(path, kind)
        return f"{path}@{info.sha if info else ''}"
    digest = hashlib.sha256()
    for file in files_of(path):
        name = file.relative_to(path)
        if name.name == "log.jsonl" or name.suffix in UNREAD:
            continue
        if any(part.startswith(".") for part in name.parts):
            continue
        if os.path.isdir(path):
            text = f"{name}\0{file.stat().st_size}\0"
            digest.update(text.encode(errors="surrogateescape"))
        add_content(digest, file)
    return digest.hexdigest()[:16]


def add_content(digest, file: Path) -> None:
    """Add a file to a digest: all of it, or a sample of every tensor of safetensors."""
    tensors = tensors_of(file) if file.suffix == ".safetensors" else None
    with open(file, "rb") as stream:
        if tensors:
            digest.update(stream.read(min(start for start, _, _ in tensors)))
            for start, end, _ in tensors:
                stream.seek(start)
                digest.update(stream.read(min(SAMPLE, end - start)))
            return
        while block := stream.read(1 << 20):
            digest.update(block)


def tensors_of(file: Path) -> list[tuple[int, int, int]] | None:
    """(first byte, end, elements) of each tensor of a safetensors file; None where the file is not
    whole."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            begin = 8 + int.from_bytes(stream.read(8), "little")
            if begin > size:
                return None
            header = json.loads(stream.read(begin - 8))
        header.pop("__metadata__", None)
        tensors = []
        for tensor in header.values():
            start, end = tensor["data_offsets"]
            tensors.append((begin + start, begin + end, math.prod(tensor["shape"])))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    last = max((end for _, end, _ in tensors), default=begin)
    return tensors if last == size else None


# ---------------------------------------------------------------------------------------- the hub


def is_hub_id(name: str) -> bool:
    """Whether a model or data set that is no path here may be one of the hub."""
    return name.count("/") == 1 and not name.startswith((".", "/"))


def snapshot_of(name: str, kind: str = "model") -> Path | None:
    """The folder of the hub's cache that a hub id stands for; None where nothing was downloaded."""
    from huggingface_hub import constants  # slow to import, and needed for hub ids alone
    cache = Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")
    commit = cache / "refs" / "main"
    return cache / "snapshots" / commit.read_text().strip() if commit.is_file() else None


@functools.cache
def hub_trouble() -> str:
    """Why nothing can be had from the hub, or "". Asked once: where it does not answer, the process
    goes on offline with what was downloaded before, instead of waiting for every file anew."""
    import huggingface_hub  # slow to import, and needed for hub ids alone
    from huggingface_hub import constants
    if huggingface_hub.is_offline_mode():
        return "HF_HUB_OFFLINE is set, and it was not downloaded before"
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:
        constants.HF_HUB_OFFLINE = True
        # For the processes that this one starts.
        os.environ["HF_HUB_OFFLINE"] = "1"
        lines = str(error).splitlines() or [type(error).__name__]
        return (f"it was not downloaded before, and {constants.ENDPOINT} does not answer "
                f"({lines[0]}); look at the connection or HF_ENDPOINT, or give a local path")
    return ""


@functools.cache
def hub_info(name: str, kind: str = "model"):
    """What the hub says of a hub id (its commit, files, parameters), or None where it says
    nothing."""
    import huggingface_hub  # slow to import, and needed for hub ids alone
    if hub_trouble():
        return None
    try:
        return huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=5)
    except Exception:
        # Unknown, withheld, or out of order for the moment.
        return None


# ----------------------------------------------------------------------------------------- models


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; none where there is no folder."""
    return sorted(file.name for file in folder.glob("*"))


def folder_of(path: str) -> Path | None:
    """Where a model lies on this machine: its folder, or the hub's cache; None where its weights
    have yet to be written or downloaded."""
    if is_promised(path):
        return None
    if os.path.isdir(path):
        return Path(path)
    snapshot = snapshot_of(path) if is_hub_id(path) else None
    return snapshot if snapshot and weights_among(names_in(snapshot)) else None


def weights_among(names: list[str]) -> list[str]:
    """The files of a model's weights: neither an adapter nor consolidated.safetensors, which holds
    the same weights again in Mistral's own layout."""
    return [name for name in names if name.endswith(".safetensors")
            and not name.startswith(("adapter", "consolidated"))]


def check_model(path: str) -> None:
    """Ends the program where `path` is no model that can be loaded, as far as its files show: a
    folder or hub id with config.json and whole safetensors."""
    if is_promised(path):
        return
    if os.path.isfile(path):
        fail(f"{path}: is a file, and a model is a folder with config.json and *.safetensors; of "
             "GGUF, llama.cpp's format, name the model that it was made from")
    folder = folder_of(path)
    if folder:
        names = names_in(folder)
    elif is_hub_id(path) and (info := hub_info(path)):
        names = [file.rfilename for file in info.siblings]
    else:
        trouble = "it is no hub id"
        if is_hub_id(path):
            trouble = hub_trouble() or "it has no such model, or keeps it from you"
        fail(f"{path}: no such model folder, nor can it be had from the hub: {trouble}")
    weights = weights_among(names)
    for ending, remedy in INSTEAD.items():
        if not weights and any(name.endswith(ending) for name in names):
            fail(f"{path}: {remedy}")
    if "config.json" not in names or not weights:
        fail(f"{path}: not a model folder: it needs config.json and weights (*.safetensors)")
    if not folder:
        return
    read_json(folder / "config.json")
    for name in weights:
        if tensors_of(folder / name) is None:
            fail_broken(folder / name)
    if "adapter_config.json" in names:
        note(f"{path}: the adapter beside the weights is not used")


def refuse_pointer(file: Path) -> None:
    """Ends the program where a file is what Git leaves in the place of a large one."""
    with open(file, "rb") as stream:
        if stream.read(23) == b"version https://git-lfs":
            fail(f"{file}: a Git-LFS pointer in the file's place; run `git lfs pull` in its folder")


def fail_broken(file: Path) -> NoReturn:
    """Ends the program: a file is not whole."""
    refuse_pointer(file)
    fail(f"{file}: cut short or broken; download or copy it again")


def read_json(file: Path) -> dict:
    """The object in a model's JSON file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        fail_broken(file)
    return value if isinstance(value, dict) else {}


def check_tokenizer(path: str) -> None:
    """Ends the program where a model that is on this machine has no tokenizer, or no chat template
    that jinja2 can parse."""
    folder = folder_of(path)
    if folder is None:
        return
    names = names_in(folder)
    kind = re.compile(r"tokenizer|vocab|tekken|.*\.(model|tiktoken)$")
    files = list(filter(kind.match, names))
    for name in files:
        refuse_pointer(folder / name)
    if files in ([], ["tokenizer_config.json"]):
        fail(f"{path}: holds no tokenizer; copy tokenizer.json and tokenizer_config.json from the "
             "model that it was made from")
    if "tokenizer.json" in names:
        read_json(folder / "tokenizer.json")
    template = template_of(folder)
    if not template:
        fail(f"{path}: has no chat template, or several and none of them is the default: write the "
             "one to use into chat_template.jinja in its folder")
    import jinja2  # slow to import, and needed here alone
    # A block of transformers' own, which marks the assistant's tokens.
    template = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateSyntaxError as error:
        fail(f"{path}: its chat template cannot be parsed: line {error.lineno}: {error.message}")


def check_context(path: str, tokens: int) -> None:
    """Ends the program where the context of a model on this machine does not hold so many tokens of
    answers, and a prompt."""
    folder = folder_of(path)
    config = read_json(folder / "config.json") if folder else {}
    limit = config.get("text_config", config).get("max_position_embeddings") or math.inf
    if tokens >= limit:
        fail(f"{path}: its context of {limit} tokens holds no prompt with answers of {tokens}; "
             "lower --max-new-tokens (MAX_NEW_TOKENS), or take a model with a longer one")


def template_of(folder: Path) -> str | None:
    """The chat template that a model's conversations are written with; None without one."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    if not (folder / "tokenizer_config.json").is_file():
        return None
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        return {one["name"]: one["template"] for one in template}.get("default")
    return template


def parameters(path: str) -> int | None:
    """How many weights a model has, by the headers of its safetensors files or by the hub; None
    where neither says."""
    folder = folder_of(path)
    if folder is None:
        info = hub_info(path) if is_hub_id(path) else None
        return info.safetensors.total if info and info.safetensors else None
    tensors = [tensors_of(folder / name) or [] for name in weights_among(names_in(folder))]
    return sum(elements for _, _, elements in sum(tensors, [])) or None


def policy_bytes(path: str) -> int:
    """Bytes of a policy that is trained from a model; 0 where the model's size is not known."""
    promised = promises().get(os.path.normpath(path))
    return promised if promised is not None else POLICY_BYTES * (parameters(path) or 0)
