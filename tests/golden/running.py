"""How the corpus runs the product: in the same surroundings, with fixed keys, by its commands and functions alone.

Nothing in here, nor in the sections, knows where the product keeps its modules: `fedqsn_cli` itself, `python -m
fedqsn_cli` and docs/formats.md are all that may be relied on.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import runpy
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import fedqsn_cli

Records = dict[str, str]
"""Entries of one line each: what it is -> what was made of it."""

Files = dict[str, Records | str]
"""What a job records: names of files in recorded/, with entries or, where a whole text is recorded, the text."""

Job = Callable[[], Files]
"""Makes a part of the corpus in the working directory, which is empty."""

SECRET, OTHER_SECRET = (hashlib.sha256(words).hexdigest() for words in (b"golden", b"another job"))

mask = partial(fedqsn_cli.mask, allow_untrainable=True)  # most models of the corpus have no tokenizer
export_proxy = partial(fedqsn_cli.export_proxy, allow_untrainable=True)

_KEPT = ("HOME", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "TMPDIR")  # of the environment
_SURROUNDINGS = {
    "COLUMNS": "100",
    "CUDA_VISIBLE_DEVICES": "",
    "FEDQSN_ALLOW_UNTRAINABLE": "1",  # the same for the commands
    "HF_HUB_OFFLINE": "1",
    "LANG": "C.UTF-8",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
    "TERM": "dumb",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TZ": "UTC",
}
_PLAIN_ARITHMETIC = {  # the same instructions on all x86-64 processors
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "NUMBA_CPU_NAME": "generic",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
}
_FLOAT = re.compile(r"(?<![\w.-])-?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?(?![\w.])")
_DIGITS = 6


def settle(*, plainly: bool = False) -> None:
    """Give the processes that this one will start the surroundings of the corpus.

    Args:
        plainly: compute as any processor would. What the product writes is the same whatever instructions are used, so
            that it is made with the best; sums that it only measures with are not.
    """
    os.umask(0o022)
    kept = {name: value for name, value in os.environ.items() if name in _KEPT}
    os.environ.clear()
    os.environ |= kept | _SURROUNDINGS | (_PLAIN_ARITHMETIC if plainly else {})


# ------------------------------------------------------------------------------------------------ running


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


def fedqsn(*words: str | Path) -> Outcome:
    """Run a command in this process, exactly as `python -m fedqsn_cli` would."""
    out, err = io.StringIO(), io.StringIO()
    arguments = ["fedqsn", *map(str, words)]
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", arguments):
        try:
            runpy.run_module("fedqsn_cli", run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code
    return Outcome(int(code or 0), steady(out.getvalue()), steady(err.getvalue()))


def succeed(*words: str | Path) -> Outcome:
    """Run a command that has to work."""
    outcome = fedqsn(*words)
    assert outcome.code == 0, f"fedqsn {' '.join(map(str, words))}: {outcome.err}"
    return outcome


@contextmanager
def drawing(secret: str) -> Iterator[None]:
    """A block in which a new job key is not drawn by chance, but is this one."""
    drawn, by_chance = bytes.fromhex(secret), secrets.token_bytes
    with patch("secrets.token_bytes", lambda count: drawn if count == len(drawn) else by_chance(count)):
        yield


def fixed_key(secret: str, start: Callable[[], object]) -> None:
    """Begin a job whose secret is known.

    Args:
        start: lets the product make a new key in the working directory; what it makes else is removed.
    """
    before = set(os.listdir())
    with drawing(secret):
        start()
    for path in map(Path, set(os.listdir()) - before):
        if path.is_dir():
            shutil.rmtree(path)


# ------------------------------------------------------------------------------------------------ recording


def sha256(path: Path) -> str:
    """Digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(*places: str | Path, under: str = "") -> Records:
    """Digests of files, and of all files in folders: path -> SHA-256."""
    found: Records = {}
    for place in map(Path, places):
        paths = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
        found |= {f"{under}{path}": sha256(path) for path in paths}
    return found


def attempt(name: str, make: Callable[[], Records]) -> Records:
    """What is made, its names begun with `name`; or why it is refused, which is a part of the corpus, too."""
    try:
        made = make()
    except Exception as error:
        made = {"refused": refusal(error)}
    return {f"{name}: {what}": value for what, value in made.items()}


def refusal(error: Exception) -> str:
    """An exception in one line; those of the product have an exit code."""
    code = getattr(error, "exit_code", "a bug")
    return steady(f"[{code}] {type(error).__name__}: {error}")


def steady(text: str) -> str:
    """A text without what differs between machines: the working directory, and the last digits of floats."""
    return _FLOAT.sub(_rounded, text.replace(str(Path.cwd()), "{here}"))


def _rounded(match: re.Match[str]) -> str:
    """A float with six digits, if it has more."""
    digits = re.sub(r"e.*|[^0-9]", "", match[0]).lstrip("0")
    return repr(float(f"{float(match[0]):.{_DIGITS}g}")) if "." in match[0] and len(digits) > _DIGITS else match[0]


def transcript(words: str, outcome: Outcome) -> str:
    """A command and what came of it, as one would see it in a shell."""
    parts = [f"$ fedqsn {words}\n", outcome.out, *(f"stderr: {line}\n" for line in outcome.err.splitlines())]
    return "".join([*parts, f"[{outcome.code}]\n"])
