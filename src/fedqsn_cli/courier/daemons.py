"""The processes that serve: FLARE's server, and its client at a site. Started again when they die; ended together.

A folder is served by one process, which holds its lock and writes its number into `serve.pid`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fedqsn_cli.checkpoint.files import try_lock
from fedqsn_cli.errors import InputError

PID = "serve.pid"
_SERVER = "nvflare.private.fed.app.server.server_train"
_CLIENT = "nvflare.private.fed.app.client.client_train"
_ORGANISATION = "org=fedqsn"
_RESTART = 2.0  # seconds between the end of a process and its next start
_GRACE = 10.0  # seconds that processes have to end by themselves
_LARGEST_MESSAGE = 64 << 20  # bytes; by default, a host may make a site hold 4 GiB
_FRAME = 4 << 20  # bytes of a message that are sent at once; each frame costs much Python
_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "2",  # fewer arenas hold less
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # freed messages are kept for the next ones: fresh pages cost more than
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),  # the copies into them
    "NVFLARE_ENABLE_JEMALLOC_PRELOAD": "false",
    "NVFLARE_STREAMING_MAX_BLOB_SIZE": str(_LARGEST_MESSAGE),
    "NVFLARE_STREAMING_CHUNK_SIZE": str(_FRAME),
}


@dataclass(frozen=True, slots=True)
class Daemon:
    """A process to keep alive.

    Args:
        name: of the site; None for the server. kit: FLARE's folder, in which it runs.
    """

    name: str | None
    kit: Path

    @property
    def words(self) -> list[str]:
        """The command line; nothing on it is secret."""
        module, config = (_SERVER, "fed_server.json") if self.name is None else (_CLIENT, "fed_client.json")
        given = ["secure_train=true", *([f"uid={self.name}"] if self.name is not None else []), _ORGANISATION]
        return [
            sys.executable,
            "-u",
            "-m",
            module,
            "-m",
            str(self.kit),
            "-s",
            config,
            "--set",
            *given,
            "config_folder=",
        ]

    def start(self) -> subprocess.Popen[bytes]:
        """Start it, in a process group of its own; what it prints goes into kit/daemon.log."""
        self.end_workers()
        with (self.kit / "daemon.log").open("ab") as output:
            return subprocess.Popen(
                self.words,
                cwd=self.kit,
                env=os.environ | _ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def end_workers(self) -> None:
        """End what an earlier process of this kit has left.

        Workers have groups of their own. One whose parent was killed never ends: it tries again and again to reach it.
        """
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if bytes(self.kit) in words and any(word.startswith(b"nvflare.private.") for word in words):
                    os.kill(int(process.name), signal.SIGKILL)


def keep_alive(daemons: Sequence[Daemon], ended: threading.Event) -> None:
    """Run processes until `ended` is set; those that die are started again."""
    running = {daemon: daemon.start() for daemon in daemons}
    try:
        while not ended.wait(_RESTART):
            for daemon, process in running.items():
                if process.poll() is not None:
                    _end_group(process)
                    running[daemon] = daemon.start()
    finally:
        for process in running.values():
            _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline and any(process.poll() is None for process in running.values()):
            time.sleep(0.1)
        for daemon, process in running.items():
            _end_group(process)
            daemon.end_workers()


def _end_group(process: subprocess.Popen[bytes]) -> None:
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


@contextmanager
def serving(home: Path) -> Iterator[None]:
    """Hold the lock of a folder. Raises InputError: another process serves it."""
    descriptor = os.open(home / PID, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not try_lock(descriptor):
            raise InputError("is served already", where=home, hint=f"stop it: fedqsn courier-stop {home}")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def server_of(home: Path) -> int | None:
    """The process that serves a folder; None if nobody does."""
    try:
        descriptor = os.open(home / PID, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return None if try_lock(descriptor) else int(os.pread(descriptor, 20, 0) or b"0") or None
    finally:
        os.close(descriptor)


def stop(home: Path) -> bool:
    """End the process that serves a folder, and wait for it. Returns whether there was one."""
    number = server_of(home)
    if number is None:
        return False
    os.kill(number, signal.SIGTERM)
    while server_of(home) == number:
        time.sleep(0.1)
    return True
