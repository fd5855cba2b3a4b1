"""Processes of `fedqsn` that start in milliseconds: forked from one that has imported all that training needs.

with WarmServer(folder) as server:
    child = server.start("client-train", "proxy", ..., err=file)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from support.forwarded import Request
from support.processes import environment

_PID_BYTES = 8


@dataclass(frozen=True)
class WarmProcess:
    """A process at work."""

    pid: int
    connection: socket.socket

    def wait(self) -> int:
        """The exit code once it has ended; -SIGKILL if a signal ended it."""
        with self.connection:
            code = self.connection.recv(1)
        return code[0] if code else -signal.SIGKILL


class WarmServer:
    """A process that forks others; it ends with its block."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._address = str(folder / "socket")
        sources = Path(__file__).parents[1]
        path = os.pathsep.join([str(sources.parent / "src"), str(sources)])
        self._server = subprocess.Popen(
            [sys.executable, "-m", "support.warm_processes", self._address],
            env=environment(PYTHONPATH=path, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"),
            stdout=subprocess.PIPE,
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == b"ready\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.communicate()

    def start(self, *words: str | Path, err: IO[str], folder: Path | None = None, **environ: str) -> WarmProcess:
        """Start a command; what it prints goes into `err`."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address)
        with open(os.devnull, "rb") as nothing:
            streams = [nothing.fileno(), err.fileno(), err.fileno()]
            surroundings = environment(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", **environ)
            Request([*map(str, words)], surroundings, str(folder or Path.cwd()), streams).send(connection)
            pid = int.from_bytes(connection.recv(_PID_BYTES), "big")
        return WarmProcess(pid, connection)


def serve(address: str) -> None:
    """Import what takes long, then fork a process for each connection."""
    import numba  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.bert.modeling_bert

    import fedqsn_cli.training.client  # noqa: F401

    transformers.AutoConfig, transformers.AutoTokenizer  # noqa: B018  (loaded lazily)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended children vanish by themselves
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _become_fedqsn(connection)
            connection.close()


def _become_fedqsn(connection: socket.socket) -> None:
    """Tell one's process id, run one command, and answer with the exit code."""
    from fedqsn_cli.cli.app import main

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = Request.received(connection)
    connection.sendall(os.getpid().to_bytes(_PID_BYTES, "big"))
    request.adopt()
    try:
        code = main(list(request.arguments))
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    connection.sendall(bytes([code]))
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
