"""Fixtures for all tests, and surroundings that are the same on every machine."""

from __future__ import annotations

import atexit
import gc
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from support.chance import CHANCE
from support.large_pages import use_large_pages
from support.untrainable import accept_untrainable_models

# What users, CI systems and parent processes leave in the environment and what would change outcomes. What the product
# has to stand stays as it is: locale, time zone, umask, HOME, TMPDIR, hash seed, instruction sets.
FOREIGN = {
    *("COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "TERMINAL_WIDTH"),
    *("MAKEFLAGS", "MAKELEVEL", "MAKEFILES", "MAKEOVERRIDES", "MFLAGS", "GNUMAKEFLAGS"),  # of the make that runs us
    *("BASH_ENV", "ENV", "SHELLOPTS", "BASHOPTS", "CDPATH", "POSIXLY_CORRECT"),
    "PYTHONDONTWRITEBYTECODE",  # every process would compile everything again
    *("PYTHONWARNINGS", "PYTHONSAFEPATH", "PYTHONOPTIMIZE", "PYTHONDEVMODE", "PYTHONVERBOSE", "PYTHONINSPECT"),
    *("PYTHONIOENCODING", "PYTHONPROFILEIMPORTTIME", "PYTHONMALLOCSTATS", "PYTHONTRACEMALLOC"),
    # what examples/quickstart and examples/ci take from the environment
    *("WORK", "P1", "P2", "FORMAT", "FILL", "ROUNDS", "ROUND", "EPOCHS", "LR", "SERVER_LR", "MAX_LENGTH", "CLIENTS"),
    *("JOBS", "JOB", "COMPARE", "POLICY", "BUDGET", "COLLUDERS"),
}
FOREIGN_STARTS = (
    "HF_",
    "HUGGINGFACE_",
    "TRANSFORMERS_",
    "TOKENIZERS_",
    "ACCELERATE_",
    "BNB_",
    "BITSANDBYTES_",  # offline, tokens
    "FEDQSN_",
    "_FEDQSN_",
    "COMP_",
    "TTY_",
    "JUPYTER_",
    "TORCH_LOGS",
    "NUMBA_DEBUG",
    "NUMBA_DISABLE_",
    "NUMBA_DUMP_",
)


MEMORY, ROOM = "/dev/shm", 4 << 30  # bytes; containers often have 64 MiB there


def room_in_memory() -> bool:
    """Whether all that tests write, programs too, has room in memory: fsync costs nothing there."""
    if not os.access(MEMORY, os.W_OK) or os.statvfs(MEMORY).f_flag & os.ST_NOEXEC:
        return False
    return shutil.disk_usage(MEMORY).free > ROOM


def settle() -> None:
    """Make the environment of this process and of its children one that decides nothing.

    Called now and not by a fixture: libraries read theirs when test modules import them.
    """
    for name in list(os.environ):
        if name in FOREIGN or name.startswith(FOREIGN_STARTS) or name.lower().endswith("_proxy"):
            del os.environ[name]
    sys.dont_write_bytecode = False
    cache = tempfile.mkdtemp(prefix="fedqsn-hf-")  # else whatever the user fetched before would be found
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ |= {
        "HF_HOME": cache,
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",  # --device auto would find other numbers there
        "TORCHDYNAMO_DISABLE": "1",  # bitsandbytes compiles some of its code where there is a C++ compiler
    }
    if room_in_memory():
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)
    accept_untrainable_models()
    os.environ["OMP_NUM_THREADS"] = "1"  # torch's threads would wait for each other, and copies of a process have none


def tame_hypothesis() -> None:
    """No time limits, and the same examples everywhere: all that tests ask for with `--hypothesis-profile soak`.

    `--hypothesis-profile explore` draws new ones.
    """
    common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "database": None}
    settings.register_profile("tests", derandomize=True, max_examples=40, **common)
    settings.register_profile("soak", derandomize=True, max_examples=100, **common)
    settings.register_profile("explore", derandomize=False, max_examples=200, **common)
    settings.load_profile("tests")


settle()
tame_hypothesis()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chance", default="0", help="draw the keys of jobs from this number, or from a new one: 'new'")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.chance == "new":  # workers get the number
        config.option.chance = str(secrets.randbits(31))
    CHANCE.install(int(config.option.chance))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.chance != "0":
        terminalreporter.write_line(f"drawn with --chance {config.option.chance}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with CHANCE.of(item.nodeid):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> Iterator[None]:
    """What tests share is the same whichever of them asks first."""
    if fixturedef.scope == "function":
        return (yield)
    number = getattr(request, "param_index", 0)
    with CHANCE.of(f"{request.node.nodeid} {fixturedef.baseid} {fixturedef.argname} {number}"):
        return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than cores: a test that waits for a process of its own, or for a site, leaves a core to another one."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Import without looking for garbage, of which imports leave little."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.hookimpl(trylast=True)  # a hook may have chosen some of them
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    gc.set_threshold(100_000, 20, 20)  # as the command line has it
    gc.freeze()  # without looking for garbage first, which takes half a second
    use_large_pages()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path != item.path:
        leave_to_rest()


def leave_to_rest() -> None:
    """Never look again at what imports have made: the garbage collector would, in each training and each child."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty directory, in memory where there is such a place: fsync costs nothing there."""
    from support.scenario import MEMORY

    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def module_folder() -> Iterator[Path]:
    """The same for all tests of a module."""
    from support.scenario import MEMORY

    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)
