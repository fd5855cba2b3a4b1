"""Machine code on disk: it is used again, and never after what it was compiled from has changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedqsn_cli.kernels.jit import CacheFile

CALLED = """
from fedqsn_cli.kernels.jit import kernel

LEVEL = {level}

@kernel
def called(x):
    return x {operator} 2
"""

CALLER = """
from called import LEVEL, called
from fedqsn_cli.kernels.jit import kernel

@kernel
def between(x):
    return called(x)

@kernel
def caller(x):
    return between(x) + LEVEL
"""

PROGRAM = """
from caller import caller
print(caller(10), sum(caller.stats.cache_hits.values()))
"""


def called(folder: Path) -> tuple[int, bool]:
    """What the caller returns in a new process, and whether its machine code came from the disk."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True, timeout=600
    )
    result, hits = done.stdout.split()
    return int(result), hits != "0"


@pytest.mark.long
def test_a_kernel_is_compiled_again_when_a_kernel_or_a_constant_of_another_file_changes(tmp_path: Path) -> None:
    (tmp_path / "caller.py").write_text(CALLER)
    (tmp_path / "called.py").write_text(CALLED.format(level=0, operator="+"))
    assert called(tmp_path) == (12, False)
    assert called(tmp_path) == (12, True)
    (tmp_path / "called.py").write_text(CALLED.format(level=5, operator="+"))
    assert called(tmp_path) == (17, False)
    (tmp_path / "called.py").write_text(CALLED.format(level=5, operator="-"))
    assert called(tmp_path) == (13, False)
    assert called(tmp_path) == (13, True)


def test_no_process_is_given_what_another_one_compiled_for_another_signature_or_source(tmp_path: Path) -> None:
    """Two begin at once, where machine code of an earlier source lies; and one is killed before all is written."""
    earlier, one, other, reader = (CacheFile(str(tmp_path), "f-1.py311", stamp) for stamp in ("old", *["new"] * 3))
    earlier.save("a", "old a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one, "_load_index", dict)
        patch.setattr(other, "_load_index", dict)
        one.save("a", "a")
        other.save("b", "b")
    assert {key: reader.load(key) for key in "ab"} in ({"a": None, "b": "b"}, {"a": "a", "b": "b"})
    reader.save("a", "a")
    assert {key: reader.load(key) for key in "ab"} == {"a": "a", "b": "b"}
    assert len(list(tmp_path.glob("*.nbc"))) == 2

    later = CacheFile(str(tmp_path), "f-1.py311", "newer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(later, "_save_data", lambda name, data: (_ for _ in ()).throw(OSError))
        with pytest.raises(OSError):
            later.save("a", "newer a")
    assert later.load("a") is None
    later.save("a", "newer a")
    assert later.load("a") == "newer a"
