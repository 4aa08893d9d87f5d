"""What a requirements file asks for and this interpreter lacks, one a line; the exit status is 1
where it lacks anything. Needs no package but `packaging`, and that only to compare versions.

    python -m core.packages requirements.txt            whatever is missing or of another version
    python -m core.packages requirements.txt --absent   what the first paragraph names and is not
                                                        there in any version
"""
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def lacking(text: str, absent_only: bool) -> list[str]:
    """The lines of a requirements file that this interpreter does not meet."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    missing = []
    for line in lines:
        if not line or line.startswith("-r"):
            continue
        try:
            found = version(re.match(r"[\w.-]+", line)[0])
        except PackageNotFoundError:
            missing.append(line)
            continue
        if not absent_only:
            from packaging.requirements import Requirement  # a bare interpreter has none
            if found not in Requirement(line).specifier:
                missing.append(line)
    return missing


def main() -> None:
    path, *how = sys.argv[1:]
    absent_only = how == ["--absent"]
    text = Path(path).read_text(encoding="utf-8")
    missing = lacking(text.split("\n\n")[0] if absent_only else text, absent_only)
    print(*missing, sep="\n")
    sys.exit(bool(missing))


if __name__ == "__main__":
    main()
