"""Hold back signals that would end the process, until a training has saved what it has."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fedqsn_cli.linux import ECHO_SECONDS, ENDING_SIGNALS


class HeldSignals:
    """The first signal that came while signals were held back, if any."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.since = 0.0

    @property
    def any(self) -> bool:
        """Has one come?"""
        return self.number is not None


@contextmanager
def held_signals() -> Iterator[HeldSignals]:
    """Within this block a signal is only noted; afterwards it does what it would have done.

    Who sends one again after a second has it at once. Signals that are ignored stay ignored. In other threads than the
    main one, which get no signals, nothing is held.

    Raises:
        KeyboardInterrupt: a signal came, and its own handler raised nothing.
    """
    held = HeldSignals()
    if threading.current_thread() is not threading.main_thread():
        yield held
        return
    heeded = [number for number in ENDING_SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {int(number): signal.getsignal(number) for number in heeded}

    def note(number: int, frame: FrameType | None) -> None:
        if not held.any:
            held.number, held.since = number, time.monotonic()
        elif time.monotonic() - held.since > ECHO_SECONDS:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for heeded_number in heeded:
        signal.signal(heeded_number, note)
    try:
        yield held
    finally:
        for heeded_number in heeded:
            signal.signal(heeded_number, before[heeded_number])
    if held.number is not None:
        signal.raise_signal(held.number)
        raise KeyboardInterrupt
