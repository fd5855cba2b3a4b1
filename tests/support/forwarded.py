"""Commands that one process passes to another one: words, environment, working directory and standard streams."""

from __future__ import annotations

import array
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

STREAMS = 3  # stdin, stdout, stderr

PROGRAM = """#!{python} -IS
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


def write_program(path: Path, address: Path, first: Sequence[str] = ()) -> None:
    """Write a program that passes all to whoever listens at an address, and ends with the code that comes back.

    Args:
        first: words that go before its arguments.
    """
    path.write_text(PROGRAM.format(python=sys.executable, address=str(address), first=list(first)))
    path.chmod(0o755)


@dataclass(frozen=True)
class Request:
    """A command; the streams are descriptors."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    folder: str
    streams: Sequence[int]

    @classmethod
    def received(cls, connection: socket.socket) -> Self:
        """What was sent."""
        streams = array.array("i")
        head, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(STREAMS * streams.itemsize))
        streams.frombytes(ancillary[0][2][: STREAMS * streams.itemsize])
        length = int.from_bytes(head, "big")
        request = b""
        while len(request) < length:
            request += connection.recv(length - len(request))
        return cls(*json.loads(request.decode("utf-8", "surrogateescape")), streams.tolist())

    def send(self, connection: socket.socket) -> None:
        """Send it."""
        words = [list(self.arguments), dict(self.environment), self.folder]
        request = json.dumps(words).encode("utf-8", "surrogateescape")
        streams = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self.streams))
        connection.sendmsg([len(request).to_bytes(8, "big")], [streams])
        connection.sendall(request)

    def adopt(self) -> None:
        """Give this process all of it but the words."""
        for target, stream in enumerate(self.streams):
            os.dup2(stream, target)
            os.close(stream)
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)
