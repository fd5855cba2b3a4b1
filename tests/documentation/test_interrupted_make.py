"""Ctrl-C in the quickstart's Makefile: what is complete stays whole, and make goes on from there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

MAKEFILE = Path(__file__).parents[2] / "examples" / "quickstart" / "Makefile"

STAND_IN = """#!/bin/sh
# Writes a whole artifact, as fedqsn does, and then make is interrupted, as often as the file `interrupts` has lines.
while [ "$1" != --out ]; do shift; done
mkdir -p "$2"
touch "$2/config.json" "$2/update.json" "$2/proxy.json"
if [ -s interrupts ]; then
    sed -i 1d interrupts
    kill -INT $PPID
    sleep 0.2
fi
"""


ARTIFACT = {"config.json", "update.json", "proxy.json"}


def test_an_interrupted_make_leaves_whole_folders(tmp_path: Path) -> None:
    shutil.copy(MAKEFILE, tmp_path)
    program = tmp_path / "bin" / "fedqsn"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    for made in (
        "prepare.py",
        "requirements.txt",
        "owner_finetune.py",
        "work/data/test.jsonl",
        "work/owner/config.json",
    ):
        (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / made).touch()
    (tmp_path / "interrupts").write_text("again\n" * 5)
    target = tmp_path / "work/fedqsn/r1/server/config.json"
    surroundings = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "MAKEFLAGS": ""}
    words = ["make", "--silent", str(target.relative_to(tmp_path)), "CLIENTS=alice", "ROUNDS=1"]
    for _ in range(6):
        ended = subprocess.run(words, cwd=tmp_path, env=surroundings, capture_output=True, text=True, timeout=600)
        artifacts = [path.parent for path in (tmp_path / "work/fedqsn").rglob("proxy.json")]
        assert artifacts
        for folder in artifacts:
            assert {path.name for path in folder.iterdir()} == ARTIFACT, (folder, ended.stderr)
    assert target.exists()
