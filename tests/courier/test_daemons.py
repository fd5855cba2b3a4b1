"""Processes that serve: what one leaves behind when it is killed ends with its next start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fedqsn_cli.courier.daemons import Daemon


def test_a_worker_whose_parent_was_killed_is_ended_and_others_are_not(tmp_path: Path) -> None:
    kits = tmp_path / "kit", tmp_path / "kit-2"
    sleep = "import time; time.sleep(60)"
    workers = [
        subprocess.Popen([sys.executable, "-c", sleep, "nvflare.private.worker", "-m", str(kit)]) for kit in kits
    ]
    editor = subprocess.Popen([sys.executable, "-c", sleep, str(kits[0])])  # somebody who looks at the folder
    try:
        Daemon("alice", kits[0]).end_workers()
        assert workers[0].wait(10) == -9
        assert workers[1].poll() is None and editor.poll() is None
    finally:
        for process in (*workers, editor):
            process.kill()
            process.wait()
