"""Real `fedqsn` processes that start in milliseconds: forked from one that has imported torch, transformers and numba.

    with warm_fedqsn(folder) as path:                       # a PATH on which `fedqsn` is the fast one
        subprocess.run(["bash", "-c", "fedqsn inspect model"], env=environment(PATH=path))

The program on the PATH passes its arguments, environment, working directory and standard streams to the server, which
forks. Everything else is as in a process of its own; only signals do not reach it, so tests of signals do not use it.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

STREAMS = 3  # stdin, stdout, stderr

CLIENT = """#!{python} -IS
import array, json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([{first} + sys.argv[1:], dict(os.environ), os.getcwd()]).encode("utf-8", "surrogateescape")
    streams = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))
    server.sendmsg([len(request).to_bytes(8, "big")], [streams])
    server.sendall(request)
    answer = server.recv(1)
sys.exit(answer[0] if answer else 70)
"""


def write_program(folder: Path, name: str = "fedqsn", first: Sequence[str] = ()) -> None:
    """Write a program that passes everything to whoever listens at `socket` in the folder.

    Args:
        first: words that go before its arguments.
    """
    program = folder / name
    program.write_text(CLIENT.format(python=sys.executable, address=str(folder / "socket"), first=list(first)))
    program.chmod(0o755)


@dataclass(frozen=True)
class Request:
    """A command: its words, its environment, its working directory, and descriptors of its standard streams."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    streams: list[int]

    @classmethod
    def received(cls, connection: socket.socket) -> Self:
        """What a client sends."""
        streams = array.array("i")
        head, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(STREAMS * streams.itemsize))
        streams.frombytes(ancillary[0][2][: STREAMS * streams.itemsize])
        length = int.from_bytes(head, "big")
        request = b""
        while len(request) < length:
            request += connection.recv(length - len(request))
        return cls(*json.loads(request.decode("utf-8", "surrogateescape")), streams.tolist())


@contextmanager
def warm_fedqsn(folder: Path) -> Iterator[str]:
    """A folder for the front of PATH with a `fedqsn` that a warm server runs; the server ends with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    write_program(folder)
    sources = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(sources.parent / "src"), str(sources)])}
    command = [sys.executable, "-m", "support.warm_processes", str(folder / "socket")]
    server = subprocess.Popen(command, env=environment | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield str(folder)
    finally:
        server.kill()
        server.wait()


def serve(address: str) -> None:
    """Import what takes long, then fork a process for each connection."""
    import numba  # noqa: F401
    import pydantic  # noqa: F401
    import torch  # noqa: F401
    import transformers

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
    """Run one command with the streams of its client, and answer with the exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = Request.received(connection)
    for target, stream in enumerate(request.streams):
        os.dup2(stream, target)
        os.close(stream)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    from fedqsn_cli.cli.app import main

    try:
        code = main(request.arguments)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    connection.sendall(bytes([code]))
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
