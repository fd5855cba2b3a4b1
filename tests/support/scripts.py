"""Shell scripts whose programs run in the process of the test, which has imported and compiled everything.

    with Scripts(folder) as scripts:
        scripts.run(["bash", "-c", "fedqsn inspect model"], desk, os.environ)

bash and make are real processes; the `fedqsn` and `python` on their PATH pass arguments, environment, working directory
and standard streams to this process, and end with the exit code. Commands that a script starts at the same time run one
after the other. Of `python` that holds for files, `python script.py`.
"""

from __future__ import annotations

import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO, Self

from fedqsn_cli.cli import app
from support.forwarded import Request, write_program
from support.processes import Outcome

PYTHON = "python"


class Scripts:
    """Runs scripts; a folder of its own holds the programs that they find."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "socket"))
        self._listener.listen(64)
        write_program(folder / "fedqsn", folder / "socket")
        write_program(folder / "python", folder / "socket", [PYTHON])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def run(
        self,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        until: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Run a script to its end, or kill it and all that it started once `until` is true after a command."""
        path = f"{self._folder}{os.pathsep}{environment['PATH']}"
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8") as out,
            tempfile.TemporaryFile("w+", encoding="utf-8") as err,
        ):
            script = subprocess.Popen(
                command, cwd=folder, env={**environment, "PATH": path}, stdout=out, stderr=err, start_new_session=True
            )
            try:
                while self._command_arrives(script):
                    self._run_command()
                    if until():
                        break
            finally:
                if script.poll() is None:
                    os.killpg(script.pid, signal.SIGKILL)
                script.wait()
            out.seek(0)
            err.seek(0)
            return Outcome(script.returncode, out.read(), err.read())

    def _command_arrives(self, script: subprocess.Popen[bytes]) -> bool:
        """Wait for a command; False if the script ends before."""
        ended = os.pidfd_open(script.pid)
        try:
            return ended not in select.select([self._listener, ended], [], [])[0]
        finally:
            os.close(ended)

    def _run_command(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            request = Request.received(connection)
            os.close(request.streams[0])  # no command reads it
            out, err = (os.fdopen(stream, "w", encoding="utf-8") for stream in request.streams[1:])
            told = redirect_stdout(out), redirect_stderr(err)
            with out, err, told[0], told[1], chdir(request.folder), surroundings(request.environment):
                code = run_here(request)
            connection.sendall(bytes([code]))


def printed() -> IO[str]:
    """A file for what a script prints."""
    return tempfile.TemporaryFile("w+", encoding="utf-8")


def run_here(request: Request) -> int:
    """Run a command in this process. Returns the exit code."""
    if request.arguments[:1] != [PYTHON]:
        return app.run(request.arguments)
    words = request.arguments[1:]
    if not words[0].endswith(".py"):
        return subprocess.run([sys.executable, *words], stdout=sys.stdout, stderr=sys.stderr).returncode
    before = sys.argv, sys.path
    sys.argv = words
    sys.path = [request.folder, *request.environment["PYTHONPATH"].split(os.pathsep), *sys.path]
    try:
        runpy.run_path(words[0], run_name="__main__")
        return 0
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    finally:
        sys.argv, sys.path = before


@contextmanager
def surroundings(environment: Mapping[str, str]) -> Iterator[None]:
    """This process with another environment."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
