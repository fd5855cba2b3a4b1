"""Turn signals that would kill the process into an exception that unwinds it, so that no partial output is left."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fedqsn_cli.linux import ECHO_SECONDS, ENDING_SIGNALS

EXIT_INTERRUPTED = 130


class Interrupted(KeyboardInterrupt):
    """The user, or whoever runs the process, asked it to stop."""


@contextmanager
def clean_shutdown() -> Iterator[None]:
    """Within this block, Ctrl-C, SIGTERM and SIGHUP raise Interrupted; who insists after a second ends it at once.

    Signals that the caller of the process ignores (as `nohup` does) stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[float] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(time.monotonic())
        if len(asked) == 1:
            raise Interrupted
        if asked[-1] - asked[0] > ECHO_SECONDS:
            os._exit(EXIT_INTERRUPTED)

    heeded = [number for number in ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
