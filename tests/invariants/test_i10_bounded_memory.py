"""Any size on a small machine: memory, open files and imports of real processes do not grow with the work."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli import export_proxy
from support.helpers import as_strings, contents, environment, make_model, send

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")

LIMIT = 600.0  # MiB
SLACK = 48.0  # MiB between two peaks: buffers that a small model does not fill
HEAVY = ("torch", "bitsandbytes", "transformers", "pyarrow", "accelerate", "pandas")

IN_SOAK = [pytest.param(name, marks=pytest.mark.soak) for name in ("mask", "quantize")]  # an export is both

# Runs a command, then tells what it took. VmHWM, not ru_maxrss: that one counts the process which started it, too.
RUN = """
import json, resource, sys
soft, sys.argv = int(sys.argv[1]), sys.argv[1:]
if soft:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, HARD))
from fedqsn_cli.cli.app import main
code = main(sys.argv[1:])
status = open("/proc/self/status").read()
peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
print(json.dumps({"peak": peak, "modules": sorted({name.split(".")[0] for name in sys.modules})}))
sys.exit(code)
"""


def run(*arguments: str | Path, files: int = 0, hard: str = "soft", threads: int = 1) -> dict[str, Any]:
    """Run a fedqsn command with at most `files` open files; returns its peak in MiB and the modules it imported.

    In one thread, whatever the machine has: how much of each other's work threads hold at a time depends on chance.
    """
    code = RUN.replace("HARD", hard)
    command = [sys.executable, "-c", code, str(files), *as_strings(arguments), "--quiet"]
    surroundings = environment(FEDQSN_THREADS=str(threads))
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def job(folder: Path) -> list[str | Path]:
    return ["--key", folder / "job.key", "--ledger", folder / "ledger.jsonl"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models, of 20 MB and of 100 MB."""
    folder = tmp_path_factory.mktemp("models")
    small = make_model(folder / "small", "llama", dtype="BF16", hidden=1024, inner=2048, vocabulary=1024)
    large = make_model(folder / "large", "llama", dtype="BF16", hidden=1536, inner=5632, vocabulary=6144)
    return {"small": small, "large": large}


class Runs:
    """Runs of each command on each model, with one thread or many: none is made twice."""

    def __init__(self, models: dict[str, Path], folder: Path) -> None:
        self._models, self._folder = models, folder
        self.told = cache(self._told)

    def _told(self, command: str, size: str, threads: int) -> dict[str, Any]:
        """What a run took."""
        place = self._folder / size
        place.mkdir(exist_ok=True)
        out = self._folder / f"{size}-{command}-{threads}"
        more = {
            "mask": ["--p1", "0.1", *job(place)[:2]],
            "quantize": ["--format", "nf4"],
            "export-proxy": ["--client", "alice", "--round", "1", "--p1", "0.1", "--p2", "0.1", *job(place)],
            "merge": [place / "update", *job(place)],
        }[command]
        if command == "merge" and not (place / "update").exists():
            self.told("export-proxy", size, 1)
            send(self._folder / f"{size}-export-proxy-1", place / "update")
        return run(command, self._models[size], "--out", out, *more, threads=threads)


@pytest.fixture(scope="module")
def runs(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(models, tmp_path_factory.mktemp("runs"))


@linux
@pytest.mark.parametrize("command", [*IN_SOAK, "export-proxy", "merge"])
def test_a_model_five_times_as_large_takes_no_more_memory_and_nothing_imports_torch(command: str, runs: Runs) -> None:
    small, large = (runs.told(command, size, 1) for size in ("small", "large"))
    assert not set(HEAVY) & {*small["modules"], *large["modules"]}
    assert large["peak"] <= LIMIT
    assert large["peak"] <= small["peak"] + SLACK


@linux
@pytest.mark.parametrize("command", [IN_SOAK[1], "export-proxy", "merge"])
def test_many_cores_take_little_more_memory_than_one(command: str, runs: Runs) -> None:
    """However many there are, few chunks are worked on at once."""
    one, many = (runs.told(command, "large", threads) for threads in (1, 64))
    assert many["peak"] <= LIMIT
    assert many["peak"] <= one["peak"] + 2 * SLACK


@linux
def test_a_public_base_of_another_dtype_and_vocabulary_goes_by_in_chunks(
    models: dict[str, Path], tmp_path: Path
) -> None:
    peaks = {}
    for size, (hidden, inner, vocabulary) in {"small": (1024, 2048, 1000), "large": (1536, 5632, 6000)}.items():
        sizes = {"hidden": hidden, "inner": inner, "vocabulary": vocabulary}
        base = make_model(tmp_path / size / "base", "llama", dtype="F32", seed=1, **sizes)
        options = ["--p1", "0.5", "--fill", "base", "--public-base", base, "--key", tmp_path / size / "job.key"]
        peaks[size] = float(run("mask", models[size], "--out", tmp_path / size / "out", *options)["peak"])
        shutil.rmtree(tmp_path / size)

    assert peaks["large"] <= LIMIT
    assert peaks["large"] <= peaks["small"] + SLACK


@linux
def test_many_clients_take_little_more_memory_than_one(models: dict[str, Path], tmp_path: Path) -> None:
    peaks = {}
    for count in (1, 40):
        folder = tmp_path / str(count)
        folder.mkdir()
        clients = [word for number in range(count) for word in ("--client", f"c{number}")]
        options = ["--round", "1", "--p1", "0.1", "--p2", "0.1", *job(folder)]
        told = run("export-proxy", models["small"], "--out", folder / "{client}", *clients, *options)
        peaks[count] = float(told["peak"])

    assert peaks[40] <= peaks[1] + 2 * SLACK


def test_many_updates_are_merged_with_few_open_files(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", dtype="F32")
    clients = [f"c{number:03d}" for number in range(120)]
    export_proxy(
        str(model),
        str(tmp_path / "proxy-{client}"),
        client=clients,
        round=1,
        p1=0.1,
        p2=0.1,
        key=tmp_path / "job.key",
        ledger=tmp_path / "ledger.jsonl",
    )
    updates = [send(tmp_path / f"proxy-{client}", tmp_path / f"update-{client}") for client in clients]

    run("merge", model, *updates, "--out", tmp_path / "next", *job(tmp_path), files=100, threads=64)

    merged = contents(tmp_path / "next")
    assert merged["model.safetensors"] == (model / "model.safetensors").read_bytes()  # zeros change nothing


def test_more_clients_than_one_pass_takes_get_the_same_proxies(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", dtype="BF16")
    clients = [word for number in range(130) for word in ("--client", f"c{number}")]
    ratios = ["--round", "1", "--p1", "0.1", "--p2", "0.1"]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    run(
        "export-proxy",
        model,
        "--out",
        tmp_path / "{client}",
        *clients,
        *ratios,
        *job(tmp_path),
        files=64,
        hard=str(hard),
        threads=64,
    )
    run("export-proxy", model, "--out", tmp_path / "alone", "--client", "c129", *ratios, *job(tmp_path))

    assert contents(tmp_path / "c129") == contents(tmp_path / "alone")
    assert contents(tmp_path / "c0").keys() == contents(tmp_path / "c127").keys()
