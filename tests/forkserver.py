"""An interpreter that has already imported what the stages import: a stage starts in a fork of it,
in milliseconds instead of seconds.

python tests/forkserver.py serve SOCKET      one for all tests
python tests/forkserver.py SOCKET …          in the place of `python …`, a script or a module
"""

import gc
import json
import os
import runpy
import signal
import socket
import sys


def serve(path: str) -> None:
    import datasets  # noqa: F401
    import scipy.optimize  # noqa: F401
    import torch.distributed.fsdp
    import torch.distributed.run
    import transformers

    for name in (
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
        "AutoTokenizer",
        "LlamaForCausalLM",
        "PreTrainedTokenizerFast",
    ):
        getattr(transformers, name)  # imported on first use
    gc.freeze()  # the end of a child would collect all these modules, for a second
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    while True:
        connection, _ = listener.accept()
        message, fds, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if not os.fork():
            break
        connection.close()
        for fd in fds:
            os.close(fd)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if not child:
        return start(json.loads(message), fds)
    connection.sendall(b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def start(request: dict, fds: list[int]) -> None:
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
    # the server's own may have been files, whose position is asked for
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    if sys.argv[:2] == ["-m", "torch.distributed.run"]:
        from torch.distributed.run import main as torchrun

        sys.argv = sys.argv[1:]
        return torchrun()
    if sys.argv[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return None
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    path, argv = sys.argv[1], sys.argv[2:]
    if path == "serve":
        return serve(argv[0])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        request = json.dumps(
            {"argv": [a for a in argv if a != "-u"], "cwd": os.getcwd(), "env": dict(os.environ)}
        ).encode()
        socket.send_fds(connection, [request], [0, 1, 2])
        code = int(connection.recv(16))
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
