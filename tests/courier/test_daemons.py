"""Processes that serve: what one leaves behind when it is killed ends with its next start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fedqsn_cli.courier.daemons import Daemon


def test_a_worker_whose_parent_was_killed_is_ended_and_others_are_not(tmp_path: Path) -> None:
    kits = tmp_path / "kit", tmp_path / "kit-2"
    wait = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]

    def started(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*wait, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    workers = [started("nvflare.private.worker", "-m", str(kit)) for kit in kits]
    editor = started(str(kits[0]))  # somebody who looks at the folder
    try:
        for process in (*workers, editor):
            assert process.stdout is not None and process.stdout.readline()
        Daemon("alice", kits[0]).end_workers()
        assert workers[0].wait() == -9
        assert workers[1].poll() is None and editor.poll() is None
    finally:
        for process in (*workers, editor):
            process.kill()
            process.communicate()
