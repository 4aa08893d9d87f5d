"""docs/ against the code: every tag explained, every name there; and who may import whom."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

ROOMS = ("core", "judges", "data")
STAGES = ("seed_dpo", "generate", "label", "dro", "train", "evaluate")  # in the order of a run
TAG = re.compile(r"\b(?:S\d+|T2-\d|D\d+a?|L_i)\b")
NAMED = re.compile(r"`([\w./-]+\.(?:py|sh|env))(?::(\w+))?`")
METHOD = ROOT / "docs/method.md"
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# ------------------------------------------------------------------------------------------- tags


def explained(text: str) -> list[str]:
    """The tags that head a line of a code block, if equations, or a list item, if decisions."""
    blocks = re.findall(r"^```\n(.*?)^```$", text, flags=re.M | re.S)
    heads = [TAG.match(line) for block in blocks for line in block.splitlines()]
    decisions = re.findall(r"^- \*\*(D\d+a?)\*\*", text, flags=re.M)
    return [head[0] for head in heads if head] + decisions


def sources() -> list[Path]:
    """Every file of code and settings in the repository."""
    folders = [ROOT, *(ROOT / name for name in (*ROOMS, "configs", "bench", "tests"))]
    return [
        path
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.suffix in (".py", ".sh", ".env")
    ]


def test_the_tutorial_has_at_most_125_lines():
    assert len((ROOT / "run.sh").read_text(encoding="utf-8").splitlines()) <= 125


def test_every_tag_in_code_is_explained():
    tags = explained(METHOD.read_text(encoding="utf-8"))
    assert len(tags) > 25
    used = {(tag, path.name) for path in sources() for tag in TAG.findall(path.read_text("utf-8"))}
    assert ("S12", "train.py") in used
    assert sorted((tag, name) for tag, name in used if tag not in tags) == []


# -------------------------------------------------------------------------------- names of the docs


def definitions(path: Path) -> set[str]:
    """Names of the functions and classes that a file defines at its top."""
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_what_the_docs_name_exists(page):
    text = page.read_text(encoding="utf-8")
    for name, function in NAMED.findall(text):
        assert (ROOT / name).is_file(), name
        assert not function or function in definitions(ROOT / name), f"{name}:{function}"
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in link or (page.parent / link).exists(), link


def test_the_readme_uses_a_policy(folder, tmp_path, monkeypatch, capsys):
    """Its Python lines, with the tiny model in the place of the demo's policy."""
    policy = "runs/demo/round2/policy"
    (lines,) = re.findall(r"^```python\n(.*?)^```$", DOCS[0].read_text("utf-8"), re.M | re.S)
    assert policy in lines
    monkeypatch.chdir(tmp_path)
    exec(lines.replace(policy, folder), {})
    assert "'role': 'assistant'" in capsys.readouterr().out


def test_algorithm_1_leads_to_the_code():
    """Each line of the table names where it happens, and those files carry the line's tags."""
    section = METHOD.read_text(encoding="utf-8").split("\n## Algorithm 1")[1].split("\n## ")[0]
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line[:1] == "|"]
    assert len(lines) > 12
    for number, _, equations, where in lines[2:]:
        files = {name for name, _ in NAMED.findall(where)}
        assert files, number
        there = {tag for name in files for tag in TAG.findall((ROOT / name).read_text("utf-8"))}
        assert set(TAG.findall(equations)) <= there, (number, equations, where)


# ------------------------------------------------------------------------------------------ imports


@functools.cache
def modules() -> dict[str, ast.Module]:
    """The stages and the modules of the rooms, parsed, by their dotted names."""
    paths = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name: ast.parse(path.read_text(encoding="utf-8")) for path, name in names.items()}


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of the project's own modules that a tree imports."""
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module or ""]
        own = (*ROOMS, *STAGES, "bench", "tests")
        yield from (name for name in found if name.split(".")[0] in own)


def may_import(name: str, other: str) -> bool:
    """Whether the house lets module `name` import module `other`, both of this project."""
    room, target = name.split(".")[0], other.split(".")[0]
    if room in ROOMS:
        return target in ("core", room)
    earlier = STAGES[: STAGES.index(room)]
    return target in ("core", "judges", *earlier)


@pytest.mark.parametrize("name", sorted(modules()))
def test_who_may_import_whom(name):
    tree = modules()[name]
    assert [other for other in imports(tree) if not may_import(name, other)] == []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    late = [other for function in functions for other in imports(function)]
    assert late == (["judges.pairrm"] if name == "judges.judge" else [])  # its encoder is slow
    assert "sys.path" not in ast.unparse(tree)
