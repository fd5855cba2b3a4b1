"""Work on what strangers wrote (tokenizers, templates, packed data) in a child process, killed when it takes too much.

A normalizer can double a text forty times, a regular expression can need years, a template can loop, a small file can
inflate to terabytes: libraries that run them know no limit, and compiled code cannot be interrupted. The child is a
copy of this process (fork); it may take so much processor time and memory, writes no file, and sends its result through
a pipe: bytes as they are, all else as JSON.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import select
import signal
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from fedqsn_cli import errors
from fedqsn_cli.errors import FedqsnError, InputError
from fedqsn_cli.linux import end_with_parent

MEMORY = 1 << 30
"""Bytes that a child may take beyond what it begins with."""

_PIECE = 1 << 20
_BYTES, _JSON = b"B", b"J"  # what the first byte of a result says of the rest
_TOO_LONG, _TOO_MUCH = "takes too long", "takes too much memory, or crashes the library that reads it"


def in_child(
    work: Callable[[], Any],
    *,
    what: str,
    where: object,
    seconds: float,
    memory: int = MEMORY,
    reads: Collection[int] = (),
) -> Any:
    """Call a function in a child process, and return its result.

    Args:
        work: returns bytes, or what JSON can hold; it may read files, but what it changes is lost.
        what: names the work in an error message, as in "loading the tokenizer".
        where: the file or folder that decides what it takes.
        seconds: of processor time that it may take; waiting, twice as long.
        memory: bytes that it may take beyond what this process has.
        reads: descriptors that it uses; all others are closed to it.

    Raises:
        InputError: it took too much time or memory, or it crashed.
        FedqsnError: whatever `work` raised; any other exception becomes an InputError.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run(work, {writing, *reads}, writing, seconds, memory)
    os.close(writing)
    try:
        data, status = _received(reading, child, time.monotonic() + 2 * seconds + 5)
    finally:
        os.close(reading)
    if data is None or os.WIFSIGNALED(status):
        timed_out = data is None or os.WTERMSIG(status) == signal.SIGXCPU
        problem = _TOO_LONG if timed_out else _TOO_MUCH
        raise InputError(f"{what} {problem}", where=where, hint="its files may come from somebody who wants this")
    return _result(data, what, where)


def _received(reading: int, child: int, deadline: float) -> tuple[bytes | None, int]:
    """All that a child sends, and its wait status; None where it does not end in time. It has ended afterwards."""
    pieces: list[bytes] = []
    ended = False
    try:
        while not ended:
            if not select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
                break
            pieces.append(os.read(reading, _PIECE))
            ended = not pieces[-1]
    finally:
        if not ended:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return b"".join(pieces) if ended else None, status


def _result(data: bytes, what: str, where: object) -> Any:
    """The result that a child sent; or the error that it sent is raised."""
    if data[:1] == _BYTES:
        return memoryview(data)[1:]
    try:
        sent = json.loads(data[1:])
    except ValueError:
        raise InputError(f"{what} {_TOO_MUCH}", where=where) from None
    if "result" in sent:
        return sent["result"]
    if sent["memory"]:
        raise InputError(f"{what} {_TOO_MUCH}", where=where)
    if sent["kind"] is None:
        raise InputError(f"{what} fails ({sent['what']})", where=where)
    kind = getattr(errors, sent["kind"], InputError)
    raise kind(sent["what"], where=sent["where"], hint=sent["hint"])


def _run(work: Callable[[], Any], kept: Collection[int], writing: int, seconds: float, memory: int) -> NoReturn:
    """The child: never returns, and runs nothing that the parent would run at its end."""
    code = 1
    try:
        end_with_parent()
        faulthandler.disable()
        _limit(seconds, memory)
        _let_go(kept)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads were not copied
        _send(writing, _outcome(work))
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


def _outcome(work: Callable[[], Any]) -> bytes | dict[str, Any]:
    """The result of the work if it is bytes; else it, or what was raised, as JSON can hold it."""
    try:
        result = work()
        return result if isinstance(result, bytes) else {"result": result}
    except FedqsnError as error:
        where = None if error.where is None else str(error.where)
        kind = type(error).__name__
        return {"kind": kind, "what": error.what, "where": where, "hint": error.hint, "memory": False}
    except MemoryError:
        return {"memory": True}
    except BaseException as error:  # a panic of Rust code is no Exception
        first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        return {"kind": None, "what": first[:300], "memory": False}


def _send(writing: int, outcome: bytes | dict[str, Any]) -> None:
    with os.fdopen(writing, "wb") as pipe:
        if isinstance(outcome, bytes):
            pipe.writelines((_BYTES, outcome))
        else:
            pipe.write(_JSON + json.dumps(outcome, separators=(",", ":")).encode("utf-8", "backslashreplace"))


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
