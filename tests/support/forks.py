"""Work in a copy of this process, which has imported and compiled everything: to be killed, or to change itself.

torch may be used in it, since tests let it have one thread (conftest.py): threads would not be copied.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedqsn_cli.cli import app


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


def fork_command(*words: str | Path, told: IO[str], folder: Path | None = None, **environment: str) -> Fork:
    """Begin a command of `fedqsn` in a copy of this process; it ends with the command's exit code.

    Args:
        told: what it prints goes there. folder: its working directory. environment: variables beside those of tests.
    """

    def work() -> None:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8") for number in (1, 2))
        os.chdir(folder or ".")
        os.environ.update(environment)
        code = app.main([*map(str, words)])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    return fork(work)
