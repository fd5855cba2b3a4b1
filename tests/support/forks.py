"""A function in a copy of this process, which has imported and compiled everything: to be killed, or to change itself.

Not for what computes with torch: its threads are not copied.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fork:
    """A copy of this process at work."""

    pid: int

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code once it has ended: 0, 1 after an exception, or minus the signal that killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def fork(work: Callable[[], object]) -> Fork:
    """Begin a function in a copy of this process."""
    if child := os.fork():
        return Fork(child)
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
