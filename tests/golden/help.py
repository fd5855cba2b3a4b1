"""Section help: what `--help` prints, word for word."""

from __future__ import annotations

import re

from golden.running import Files, Job, succeed


def everything() -> Files:
    """The help of the program and of every command that it lists."""
    overview = succeed("--help").out
    commands = re.findall(r"^  ([a-z-]+) +\S", overview.split("Commands:")[1].split("Options:")[0], re.MULTILINE)
    assert len(commands) > 5, overview
    texts = {name: succeed(name, "--help").out for name in commands}
    assert succeed("-h").out == overview
    assert all(succeed(name, "-h").out == text for name, text in texts.items())
    files: Files = {f"help/{name}.txt": text for name, text in texts.items()}
    return {"help/fedqsn.txt": overview, **files, "help/version.txt": succeed("--version").out}


def jobs() -> dict[str, Job]:
    """The only job of this section."""
    return {"help": everything}
