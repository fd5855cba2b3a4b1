"""The benchmarks run: every figure at a tiny size, with a table and JSON. How fast is not looked at here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.figures import RULES

from support.helpers import environment

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures with Linux's means")


def bench(work: Path, *options: str) -> tuple[dict, str]:
    """Run the benchmarks once at a tiny size; returns their JSON and their table."""
    out = work / "figures.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "--work",
        str(work / "work"),
        "--out",
        str(out),
        "--runs",
        "1",
        "--sizes",
        "tiny",
        "--updates",
        "2",
        "--clients",
        "3",
        "--millions",
        "0.125",
        *options,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


@pytest.mark.long
def test_figures_of_our_own_are_measured_and_written_down(tmp_path: Path) -> None:
    figures, table = bench(tmp_path, "--only", "merge")

    assert figures["format"] == "fedqsn-benchmark/1"
    assert figures["machine"]["processors"] >= 1
    assert figures["fedqsn"]
    rows = {row["figure"]: row for row in figures["rows"]}
    assert rows["merge of 2 updates (bf16) tiny"]["ratio"] > 0
    assert all(row["figure"] in table for row in figures["rows"])
    assert not any((tmp_path / "work").iterdir())  # models and outputs are gone


@pytest.mark.soak
def test_an_audit_is_measured_next_to_reading_what_it_reads(tmp_path: Path) -> None:
    figures, _ = bench(tmp_path, "--only", "audit")

    time, peak = figures["rows"]
    assert (time["figure"], time["target"]) == ("audit tiny", "<= 2x")
    assert time["ratio"] > 0 and 0 < time["theirs"]["peak"][0] < time["ours"]["peak"][0]
    assert (peak["figure"], peak["reached"]) == ("peak memory, audit", True)


@pytest.mark.soak  # each figure starts a dozen processes
def test_speed_and_memory_of_an_export_are_measured(tmp_path: Path) -> None:
    figures, _ = bench(tmp_path, "--only", "fanout", "floor", "memory")

    rows = {row["figure"]: row for row in figures["rows"]}
    assert rows["each further proxy of 3"]["ours"]["seconds"]
    assert rows["peak memory, export-proxy"]["reached"] is True


@pytest.mark.soak
def test_training_is_measured_next_to_a_plain_loop(tmp_path: Path) -> None:
    figures, _ = bench(tmp_path, "--only", "training")

    step, peak = figures["rows"]
    assert step["figure"] == "full step, tiny"
    assert step["ours"]["seconds"][0] > 0 and step["theirs"]["seconds"][0] > 0
    assert "without the" in step["note"]
    assert peak["target"] == "<= 0.8x"


@pytest.mark.soak
def test_adapters_are_measured_next_to_a_plain_loop_of_peft(tmp_path: Path) -> None:
    figures, _ = bench(tmp_path, "--only", "lora", "merge-lora")

    rows = {(row["figure"], row["peer"]): row for row in figures["rows"]}
    assert len(rows) == 6
    assert all(row["ratio"] > 0 for row in rows.values())
    assert {row["target"] for row in rows.values()} == {"<= 1.05x", "<= 1x", "<= 0.01x", "<= 1.3x", ""}


@pytest.mark.soak
def test_rules_are_measured_next_to_the_average(tmp_path: Path) -> None:
    figures, _ = bench(tmp_path, "--only", "rules", "--updates", "8")

    assert [row["figure"].split()[4] for row in figures["rows"]] == list(RULES)
    assert all(row["ratio"] > 0 and row["target"] == "<= 3x" for row in figures["rows"])


@pytest.mark.soak
def test_a_little_load_is_measured_with_memory_and_open_files(tmp_path: Path) -> None:
    figures, table = bench(tmp_path, "--only", "load", "--load", "0.03")

    rows = {row["figure"]: row for row in figures["rows"]}
    assert list(rows) == [
        "2 exports at once",
        "export of 300 tensors in 1 files",
        "export of 12 tensors in 12 files",
        "export with 3000 earlier releases",
        "export for 30 clients (tiny)",
        "merge of 30 updates (tiny)",
    ]
    assert all(row["open_files"] > 0 and row["ours"]["peak"][0] > 0 for row in rows.values())
    assert "3 of 3 releases in the ledger" in table


def test_a_figure_that_does_not_fit_on_the_disk_is_skipped_with_a_reason(tmp_path: Path) -> None:
    from benchmarks.inputs import NoRoom, Place

    with pytest.raises(NoRoom, match="GB free"):
        Place(tmp_path).need(1e18)


def test_a_process_that_fails_is_named_with_what_it_said() -> None:
    from benchmarks.measure import Failed, run

    with pytest.raises(Failed, match="exit code 3(?s:.*)some words"):
        run([sys.executable, "-c", "print('some words'); raise SystemExit(3)"])


def test_peak_memory_is_that_of_the_process_alone() -> None:
    code = (
        "import sys; from benchmarks.measure import run;"
        "print(*(run([sys.executable, '-c', f'b = bytearray({size} << 20)'])[2] for size in (1, 300)))"
    )

    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    small, large = map(float, told.split())
    assert large - small > 250
