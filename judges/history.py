"""How a run came about: the stages behind its policies, read from the OUT.stats.json that each of
them left, their settings by name and their wall times. Needs no torch."""
import json
import os
from pathlib import Path

from judges.report import markdown

# What the report calls a setting; the stage that has it; its key there. What a stage counted comes
# before a flag of the same name.
SHOWN = [
    ("gold pairs", "seed_dpo", "pairs"),
    ("gold labels by", "gold label", "judge"),
    ("seed stage: epochs", "seed_dpo", "epochs"),
    ("seed stage: learning rate", "seed_dpo", "lr"),
    ("seed stage: β", "seed_dpo", "beta"),
    ("prompts of each round", "generate", "prompts"),
    ("n, answers a prompt", "generate", "n"),
    ("temperature", "generate", "temperature"),
    ("length limit, tokens", "generate", "max_new_tokens"),
    ("labels by", "label", "judge"),
    ("reference of the labels", "label", "reference"),
    ("length penalty", "label", "length_penalty"),
    ("ε, the follower's radius", "dro", "epsilon"),
    ("K, tangents", "dro", "pieces"),
    ("pairs a group", "dro", "group"),
    ("anchor", "train", "anchor"),
    ("α, smoothing of flagged labels", "train", "alpha"),
    ("λ, extrapolation", "train", "lam"),
    ("labels to flag, percent", "train", "percentile"),
    ("β", "train", "beta"),
    ("learning rate", "train", "lr"),
    ("epochs", "train", "epochs"),
    ("pairs an update", "train", "batch_size"),
    ("random seed", "train", "seed"),
]


def left_behind(out: str) -> tuple[str, dict] | None:
    """(output, its stats) of the stage that wrote `out`, or the folder it lies in; None where none
    did."""
    for path in (out, os.path.dirname(out)):
        try:
            stats = json.loads(Path(f"{path}.stats.json").read_text(encoding="utf-8"))
            if "seconds" in stats["about"]:
                return path, stats
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none, or another program's
    return None


def history(outs: list[str]) -> list[dict]:
    """The stages behind `outs`, each after those whose outputs it read: {stage, out, …stats}."""
    stages = []
    seen = set()

    def visit(out: str) -> None:
        found = left_behind(out)
        if found is None or found[0] in seen:
            return
        path, stats = found
        seen.add(path)
        for source in stats["about"].get("inputs", {}).values():
            visit(source)
        name = stats["about"]["command"].removeprefix("-m ").split()[0].removesuffix(".py")
        name = name.rpartition(".")[2]
        stages.append({**stats, "stage": name, "out": path})

    for out in outs:
        visit(out)
    return stages


def by_kind(stages: list[dict]) -> dict[str, list[dict]]:
    """Stages by what they are for: those of the rounds under their own names, apart from those that
    label the gold seed or train a judge."""
    kinds = {}
    gold = set()  # answers that a judge labelled, and no policy
    for one in stages:
        if one["stage"] == "label" and not one["settings"].get("model"):
            gold.add(one["about"].get("inputs", {}).get("responses"))
    for one in stages:
        kind = one["stage"]
        if kind == "label" and not one["settings"].get("model"):
            kind = "gold label"
        if kind == "generate" and one["out"] in gold:
            kind = "gold answers"
        if kind == "seed_dpo" and one["settings"].get("objective") == "supervised":
            kind = "judge"
        kinds.setdefault(kind, []).append(one)
    return kinds


def named_input(stages: list[dict], key: str) -> str | None:
    """The first input of that name, its fingerprint beside it."""
    for one in stages:
        name = one["about"].get("inputs", {}).get(key)
        if name:
            return f"{name} ({one['settings'][key]})"
    return None


def settings_by_name(stages: list[dict]) -> dict[str, str]:
    """What a run was: method, model, data and settings; a value that differs between rounds is
    listed round by round."""
    kinds = by_kind(stages)
    trained = kinds.get("train", [])
    # the anchor is the method's, at every ε (D6a)
    of_anchor = {"init": "worst-case", "previous": "spa"}
    methods = dict.fromkeys(of_anchor[one["settings"]["anchor"]] for one in trained)
    run = {"method": ", ".join(methods)}
    run["model"] = named_input(kinds.get("seed_dpo", []) + trained, "model")
    run["reference model of the labels"] = named_input(kinds.get("label", []), "reference_model")
    run["data"] = named_input(kinds.get("prepare", []), "data")
    flipped = sum(one["flipped"] for one in kinds.get("prepare", []))
    if flipped:
        run["gold labels turned wrong on purpose"] = str(flipped)
    for text, stage, key in SHOWN:
        values = [one.get(key, one["settings"].get(key)) for one in kinds.get(stage, [])]
        values = [f"{value:g}" if isinstance(value, float) else str(value) for value in values
                  if value is not None]
        if len(set(values)) == 1:
            values = values[:1]
        run[text] = ", ".join(values)
    return {text: value for text, value in run.items() if value}


def stage_table(stages: list[dict]) -> str:
    """Every stage with its wall time, commit and machine, and the commands below."""
    rows = []
    for one in stages:
        about = one["about"]
        rows.append([one["stage"], one["out"], round(about["seconds"]), about["processes"],
                     about["commit"], about["machine"]])
    total = sum(one["about"]["seconds"] for one in stages)
    rows.append(["all", None, round(total), None, None, None])
    table = markdown(["stage", "wrote", "seconds", "processes", "commit", "machine"], rows)
    commands = "\n".join(f"python {one['about']['command']}" for one in stages)
    return f"{table}\n\n```\n{commands}\n```"
