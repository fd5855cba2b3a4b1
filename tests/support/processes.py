"""Run `fedqsn` for a test: in this process (fast), or as a process of its own (the real thing)."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

from fedqsn_cli.cli import app
from support.helpers import with_sources

SOURCES = Path(app.__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """How a run ended and what it printed."""

    code: int
    out: str
    err: str


def run(*arguments: str | Path) -> Outcome:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = app.run([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


def environment(**more: str) -> dict[str, str]:
    """The environment of a child process that finds these sources."""
    return os.environ | {"PYTHONPATH": with_sources(SOURCES), "PYTHONWARNINGS": ""} | more


def command(*arguments: str | Path) -> list[str]:
    """The words that start `fedqsn` as a process."""
    return [sys.executable, "-m", "fedqsn_cli", *map(str, arguments)]


def with_signals(words: list[str], handler: str) -> list[str]:
    """The words that start a process whose SIGINT, SIGTERM and SIGHUP are heeded (SIG_DFL) or ignored (SIG_IGN).

    Who runs the tests may ignore some: nohup does, and shells do for what runs in the background.
    """
    script = (
        "import os, signal, sys\n"
        f"for name in ('SIGINT', 'SIGTERM', 'SIGHUP'): signal.signal(getattr(signal, name), signal.{handler})\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return [sys.executable, "-c", script, *words]


def process(*arguments: str | Path, **environ: str) -> Outcome:
    """Run a command as a process."""
    done = subprocess.run(command(*arguments), env=environment(**environ), capture_output=True, text=True, timeout=600)
    return Outcome(done.returncode, done.stdout, done.stderr)


def free_port() -> int:
    """A port that nobody takes before the server does: those that connections get by themselves are above 32767."""
    for port in range(20_000 + os.getpid() % 10_000, 32_768):
        with socket.socket() as found, suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(("localhost", port))
            return port
    raise AssertionError("no port is free")
