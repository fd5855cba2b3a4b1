"""The comparison of update formats plays whole jobs, and its table is relative to the first."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.uplink import CLIENTS, VARIANTS, play, table

from support.training_jobs import labelled, small_model


@pytest.mark.soak
def test_a_job_with_few_bits_and_a_residual_sends_a_fraction(tmp_path: Path) -> None:
    (tmp_path / "work" / "data").mkdir(parents=True)
    small_model(tmp_path / "work" / "owner")
    labelled(tmp_path / "work" / "data" / "test.jsonl")
    data = {name: labelled(tmp_path / f"{name}.jsonl") for name in CLIENTS}
    results = []
    for variant in (VARIANTS[0], VARIANTS[-1]):
        folder = tmp_path / variant.name
        folder.mkdir()
        results.append(play(tmp_path / "work", folder, tmp_path / "job.key", variant, 2, data))
    assert [row["update"] for row in results] == ["fp32", "nf4, residual"]
    assert 0.1 < results[1]["bytes"] / results[0]["bytes"] < 0.35
    assert (tmp_path / "nf4, residual" / "alice.residual").is_file()
    lines = table(results).splitlines()
    assert len(lines) == 4 and "| 100.0% |" in lines[2]
