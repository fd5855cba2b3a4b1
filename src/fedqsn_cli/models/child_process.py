"""Work on what strangers wrote (tokenizers, templates, packed data) in a child process, killed when it takes too much.

A normalizer can double a text forty times, a regular expression can need years, a template can loop, a small file can
inflate to terabytes: libraries that run them know no limit, and compiled code cannot be interrupted. The child is a
copy of this process (fork); it may take so much processor time and memory, writes no file, and sends its result through
a pipe: as JSON, or as a stream of bytes whose pieces wait until they are taken.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import select
import signal
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NoReturn

from fedqsn_cli import errors
from fedqsn_cli.errors import FedqsnError, InputError
from fedqsn_cli.linux import end_with_parent

MEMORY = 1 << 30
"""Bytes that a child may take beyond what it begins with."""

_PIECE = 1 << 20
_HEADER = struct.Struct("<cQ")  # of everything that a child sends: its kind, and how many bytes follow
_BYTES, _OUTCOME = b"B", b"J"  # kinds: a piece of a stream; at the end, in JSON, the result or what was raised
_TOO_LONG, _TOO_MUCH = "takes too long", "takes too much memory, or crashes the library that reads it"


def in_child(
    work: Callable[[], Any],
    *,
    what: str,
    where: object,
    seconds: float,
    memory: int = MEMORY,
) -> Any:
    """Call a function in a child process, and return its result.

    Args:
        work: returns what JSON can hold; it may open files and read them, but what it changes is lost.
        what: names the work in an error message, as in "loading the tokenizer".
        where: the file or folder that decides what it takes.
        seconds: of processor time that it may take; waiting, twice as long.
        memory: bytes that it may take beyond what this process has.

    Raises:
        InputError: it took too much time or memory, or it crashed.
        FedqsnError: whatever `work` raised; any other exception becomes an InputError.
    """
    with _Child(lambda _: work(), what, where, seconds, memory, ()) as child:
        _, result = child.next()
        return result


def stream_from_child(
    work: Callable[[], Iterable[bytes]],
    *,
    what: str,
    where: object,
    seconds: float,
    memory: int = MEMORY,
    reads: Collection[int] = (),
) -> Iterator[bytes]:
    """Call a generator in a child process, and yield what it yields; the child waits until each piece is taken.

    Args:
        work, what, where, seconds, memory: as for `in_child`.
        reads: descriptors that it uses; all others are closed to it.

    Raises:
        InputError, FedqsnError: as from `in_child`.
    """

    def send_all(writing: int) -> None:
        for piece in work():
            _send(writing, _BYTES, piece)

    with _Child(send_all, what, where, seconds, memory, reads) as child:
        while (piece := child.next()[0]) is not None:
            yield piece


class _Child:
    """A child at work; it has ended when this context is left.

    Args:
        work: takes the descriptor that pieces of a stream are sent through, and returns what JSON can hold.
        what, where, seconds, memory, reads: as for `stream_from_child`.
    """

    def __init__(
        self,
        work: Callable[[int], Any],
        what: str,
        where: object,
        seconds: float,
        memory: int,
        reads: Collection[int],
    ) -> None:
        self._what, self._where = what, where
        self._left = 2 * seconds + 5  # how long to wait for it, in all
        self._is_ending = False
        self._reading, writing = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._reading)
            _run(work, {writing, *reads}, writing, seconds, memory)
        os.close(writing)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._reading)
        if not self._is_ending:
            os.kill(self._pid, signal.SIGKILL)
            self._status()

    def next(self) -> tuple[bytes | None, Any]:
        """The next piece of a stream; or None, and the result. Raises what the work raised; InputError: it failed."""
        try:
            kind, length = _HEADER.unpack(self._exactly(_HEADER.size))
            data = self._exactly(length)
        except TimeoutError:
            raise self._failed(_TOO_LONG) from None
        except EOFError:
            status = self._status()
            by_clock = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
            raise self._failed(_TOO_LONG if by_clock else _TOO_MUCH) from None
        if kind == _BYTES:
            return data, None
        self._status()
        return None, _result(json.loads(data), self._what, self._where)

    def _failed(self, problem: str) -> InputError:
        hint = "its files may come from somebody who wants this"
        return InputError(f"{self._what} {problem}", where=self._where, hint=hint)

    def _exactly(self, length: int) -> bytes:
        """So many bytes. Raises EOFError: it has ended before; TimeoutError: it does not send them in time."""
        pieces: list[bytes] = []
        while length:
            began = time.monotonic()
            if not select.select([self._reading], [], [], max(0.0, self._left))[0]:
                raise TimeoutError
            self._left -= time.monotonic() - began
            piece = os.read(self._reading, min(length, _PIECE))
            if not piece:
                raise EOFError
            pieces.append(piece)
            length -= len(piece)
        return b"".join(pieces)

    def _status(self) -> int:
        """Its wait status, once it has ended."""
        self._is_ending = True
        return os.waitpid(self._pid, 0)[1]


def _result(sent: dict[str, Any], what: str, where: object) -> Any:
    """The result that a child sent; or the error that it sent is raised."""
    if "result" in sent:
        return sent["result"]
    if sent["memory"]:
        raise InputError(f"{what} {_TOO_MUCH}", where=where)
    if sent["kind"] is None:
        raise InputError(f"{what} fails ({sent['what']})", where=where)
    raise errors.from_plain(sent)


def _run(work: Callable[[int], Any], kept: Collection[int], writing: int, seconds: float, memory: int) -> NoReturn:
    """The child: never returns, and runs nothing that the parent would run at its end."""
    code = 1
    try:
        end_with_parent()
        faulthandler.disable()
        _limit(seconds, memory)
        _let_go(kept)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads were not copied
        outcome = json.dumps(_outcome(work, writing), separators=(",", ":"))
        _send(writing, _OUTCOME, outcome.encode("utf-8", "backslashreplace"))
        code = 0
    finally:
        os._exit(code)


def _let_go(kept: Collection[int]) -> None:
    """Let go of everything else that the parent has open, and say nothing: a panic of Rust code is a page of text.

    The locks of an output are among it: in a child they would outlive a parent that is killed, and its next run would
    not dare to sweep what that one left. Nor are keys and data within reach of a stranger's file.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor not in {nothing, *kept}:
            with contextlib.suppress(OSError):  # the one that listed them
                os.fstat(descriptor)
                os.dup2(nothing, descriptor, inheritable=False)


def _outcome(work: Callable[[int], Any], writing: int) -> dict[str, Any]:
    """The result of the work, or what was raised, as JSON can hold it."""
    try:
        return {"result": work(writing)}
    except FedqsnError as error:
        return {**error.to_plain(), "memory": False}
    except MemoryError:
        return {"memory": True}
    except BaseException as error:  # a panic of Rust code is no Exception
        first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        return {"kind": None, "what": first[:300], "memory": False}


def _send(writing: int, kind: bytes, data: bytes) -> None:
    with open(writing, "wb", closefd=False) as pipe:
        pipe.writelines((_HEADER.pack(kind, len(data)), data))


def _limit(seconds: float, memory: int) -> None:
    """Limit what this process may take from here on."""
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    whole = max(1, round(seconds))
    for kind, most in (
        (resource.RLIMIT_AS, now + memory),
        (resource.RLIMIT_CPU, whole),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, hard))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells the parent, too, which ends this
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    threading.excepthook = lambda _: None
