"""What every stage stands on. It imports no other folder of the project.

Being stopped, a missing package, a file that cannot be read or written and a lack of memory are one
line each, also before a stage has loaded its libraries.
"""
import os
import sys
from types import TracebackType

# This process among those that work on one output, under torchrun, and how many they are. The first
# one, 0, writes and speaks.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def end_in_one_line(kind: type[BaseException], error: BaseException,
                    trace: TracebackType | None) -> None:
    """What Python calls where an exception would end the program with a traceback."""
    if kind is KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(130)
    line = ""
    if kind is ModuleNotFoundError:
        line = (f"the package {error.name} is not installed for {sys.executable}; the project's "
                "packages are in .venv, which `bash run.sh` makes once: source .venv/bin/activate")
    elif isinstance(error, OSError) and error.filename:
        line = f"{error.filename}: {error.strerror}"
    elif isinstance(error, OSError):
        line = f"{error.strerror or error}: cannot write; nothing finished is lost"
    elif is_out_of_memory(error):
        line = ("out of memory; lower --micro-tokens or --sample-tokens, or see "
                f"--gradient-checkpointing ({error})")
    if not line:
        return sys.__excepthook__(kind, error, trace)
    print("error:", *line.splitlines(), file=sys.stderr)
    raise SystemExit(2)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine's memory was too small, or a GPU's. torch is not imported here; on a CPU
    it raises a RuntimeError."""
    on_gpu = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or on_gpu or "DefaultCPUAllocator" in str(error)


sys.excepthook = end_in_one_line
