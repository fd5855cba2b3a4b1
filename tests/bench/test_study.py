"""The study at tiny sizes: cells are made, kept and gone on with, and the report says what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.study import report, runner
from benchmarks.study.__main__ import main
from benchmarks.study.figures import best_so_far, rows, share, table_of
from benchmarks.study.settings import MANY_BLENDS, WEIGHTS, Cell, cells, tasks
from benchmarks.study.tables import all_tables
from benchmarks.study.worlds import world

CHOSEN = ("world", "floor", "local", "train-all-0.9")
TASKS = ("topics", "news-lm")
TRIALS = tuple(f"strong-{name}" for name in ("largest", "replacement", "layers", "ending", "rounds"))
ONE_TASK = (*TRIALS, "train-all-0.9-blends")  # of the smaller task
NAMES = {f"{task}/0/{method}" for task in TASKS for method in CHOSEN} | {f"news-lm/0/{trial}" for trial in ONE_TASK}
NAMES |= {"news-lm/0/nothing-sent", "news-lm/0/nothing-sent-consolidated", "topics/0/nothing-sent-consolidated"}
NAMES |= {"no-base/0/world", "no-base/0/floor", "no-base/0/zero-bottom"}
PAGE = Path(__file__).parents[2] / "docs" / "study" / "README.md"


def study(folder: Path, *arguments: str) -> int:
    """Run the study with tiny settings in this process."""
    only = [part for name in sorted(NAMES) for part in ("--only", name)]
    places = ["--work", str(folder / "work"), "--out", str(folder / "out")]
    return main(["--smoke", "--seeds", "1", "--jobs", "1", *places, *(arguments or only)])


@pytest.fixture(scope="module")
def studied(module_folder: Path) -> Path:
    """A study of both tasks and two methods."""
    out = module_folder / "out"
    out.mkdir()
    (out / "README.md").write_text(PAGE.read_text("utf-8"), "utf-8")
    assert study(module_folder) == 0, [log.read_text() for log in module_folder.glob("work/cells/*.log")]
    return module_folder


def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return found


@pytest.mark.soak  # it trains dozens of models; nothing in src depends on it
def test_every_chosen_cell_leaves_a_result_and_nothing_else(studied: Path) -> None:
    names = {cell["name"] for cell in document(studied)["cells"]}
    assert names == NAMES
    assert not document(studied)["failed"]
    assert {path.name for path in (studied / "work").iterdir()} == {"cells", "worlds"}


@pytest.mark.soak  # it trains dozens of models; nothing in src depends on it
def test_a_second_run_makes_nothing_again(studied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (studied / "work" / "cells").glob("*.json")}
    assert study(studied) == 0
    assert f"{len(NAMES)} of {len(NAMES)} cells are there already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.soak  # it trains dozens of models; nothing in src depends on it
def test_a_failed_cell_is_recorded_and_tried_again(
    studied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> dict[str, Any]:
        raise ValueError("something broke")

    only = ("--only", "news-lm/0/offsite")
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.study.rivals.offsite", fail)
        assert study(studied, *only) == 1
    assert "ValueError: something broke" in capsys.readouterr().out
    assert document(studied)["failed"] == ["news-lm/0/offsite"]
    assert study(studied, *only) == 0
    for path in (studied / "work" / "cells").glob("*_offsite-*"):
        path.unlink()


@pytest.mark.soak  # it trains dozens of models; nothing in src depends on it
def test_the_page_says_what_results_json_holds(studied: Path) -> None:
    study(studied, "--report")
    found = {cell["name"]: cell for cell in document(studied)["cells"]}
    page = (studied / "out" / "README.md").read_text("utf-8")
    for part in "ab":
        accuracy = found["topics/0/train-all-0.9"]["final"][part]["accuracy"]
        assert f"{100 * accuracy:.1f}" in page.partition("<!-- topics: generated -->")[2]
    row = next(one for one in document(studied)["figures"] if one["method"] == "train-all-0.9")
    cell, world, floor = (found[f"topics/0/{name}"] for name in ("train-all-0.9", "world", "floor"))
    losses = [best_so_far(one["curve"])[64] for one in (floor, cell)]
    assert row["added"]["64"] == share(losses[0], losses[1], world["owner"]["a"]["loss"])


@pytest.mark.soak  # it trains dozens of models; nothing in src depends on it
def test_the_report_says_nothing_of_the_machine_but_its_kind(studied: Path) -> None:
    text = (studied / "out" / "results.json").read_text()
    assert str(studied) not in text and "/" + "root" not in text
    assert set(document(studied)["machines"][0]) == {"cores", "processor", "python"}


@pytest.mark.soak  # it trains dozens of models; nothing in src depends on it
def test_trials_measure_what_they_change(studied: Path) -> None:
    found = {cell["name"].removeprefix("news-lm/0/"): cell for cell in document(studied)["cells"]}
    assert set(found["strong-layers"]["layers"]) == {"rest", *(f"layers.{number}." for number in range(3))}
    assert [one["blend"] for one in found["train-all-0.9-blends"]["blends"]] == list(MANY_BLENDS)
    assert 0.4 < found["strong-largest"]["never_sent"] < 0.6
    assert found["strong-replacement"]["final"]["b"]["loss"] > 0
    assert found["strong-ending"]["final"] == found["strong-rounds"]["final"]  # of one round


@pytest.mark.soak  # it trains dozens of models; nothing in src depends on it
def test_the_largest_differences_are_what_is_hidden(studied: Path) -> None:
    from benchmarks.study import trials

    from fedqsn_cli.masks import job_masks

    place = world(studied / "work", next(task for task in tasks(smoke=True) if task.name == "news-lm"), 0)
    moved = trials.group_differences(place)
    drawn = job_masks.hidden_units
    with trials.chosen_by_difference(place):
        assert job_masks.hidden_units is not drawn
        for group, sums in moved.items():
            hidden = job_masks.hidden_units(b"", group, len(sums), 0.5)
            assert hidden.sum() == len(sums) // 2 and sums[hidden].min() >= sums[~hidden].max()
    assert job_masks.hidden_units is drawn


@pytest.mark.soak  # it trains dozens of models; nothing in src depends on it
def test_all_plots_are_drawn(studied: Path) -> None:
    for name in ("picture.svg", "attacks.svg", "blends.svg"):
        drawing = (studied / "out" / name).read_text()
        assert drawing.startswith("<svg") and "NaN" not in drawing and "nan" not in drawing


def test_other_settings_are_another_cell() -> None:
    tiny, full = cells(1, smoke=True), cells(1)
    assert not {cell.file_name for cell in tiny} & {cell.file_name for cell in full}
    assert len({cell.file_name for cell in cells(3, long=True)}) == len(cells(3, long=True))


def test_a_fine_tuned_attack_that_is_worse_does_not_count() -> None:
    curve = [{"n": 64, "loss": 0.9}, {"n": 0, "loss": 0.5}, {"n": 256, "loss": 0.4}]
    assert best_so_far(curve) == {0: 0.5, 64: 0.5, 256: 0.4}


def test_a_page_without_a_place_for_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for topics"):
        report.filled("text", {"topics": "table"})


def test_the_committed_page_has_a_place_for_every_table() -> None:
    tables = all_tables({}, [])
    assert report.filled(PAGE.read_text("utf-8"), tables)
    assert not rows(table_of([]))


def test_cells_are_chosen_by_name() -> None:
    found = runner.chosen(cells(2), ["topics/*/strong"])
    assert [cell.name for cell in found] == ["topics/0/strong", "topics/1/strong"]
    assert runner.chosen(cells(1), []) == cells(1)


def test_each_task_plays_what_it_can() -> None:
    found = {cell.name: cell.method for cell in cells(1)}
    assert not any(method.fill == "base" and method.sends for name, method in found.items() if "no-base" in name)
    for task in ("related", "no-base", "topics", "news-lm"):
        names = {name.removeprefix(f"{task}/0/") for name in found if name.startswith(task)}
        assert {"world", "floor", "fedavg", "nothing-sent", "nothing-sent-consolidated", "fedavg-consolidated"} <= names


def test_a_published_report_is_taken_over_where_settings_are_the_same(tmp_path: Path) -> None:
    mine, other = (Cell(tasks(smoke=True)[0], seed, cells(1)[0].method) for seed in (0, 1))
    about = {"machine": {"cores": 2}, "versions": {"torch": "2"}, "seconds": 1.0}
    made = {cell: {"name": cell.name, "settings": cell.settings, **about, "base": 1} for cell in (mine, other)}
    made[other]["settings"] = made[other]["settings"] | {"version": 0}
    document = report.collected([*made.items(), (cells(1)[1], None)]) | {"figures": []}
    (tmp_path / "results.json").write_text(json.dumps(document))
    assert report.adopt([mine, other], tmp_path / "work", tmp_path) == 1
    assert runner.load(mine, tmp_path / "work") == made[mine]
    assert not runner.done(other, tmp_path / "work")
    assert report.adopt([mine], tmp_path / "work", tmp_path) == 0


def test_the_published_results_are_those_of_the_settings() -> None:
    known = {cell.name: cell.settings for cell in cells(3, long=True)}
    document = json.loads((PAGE.parent / report.RESULTS).read_text())
    assert {one["name"] for one in document["cells"] if one["settings"] != known.get(one["name"])} == set()


def test_another_ending_has_the_leak_of_its_job() -> None:
    whole, half = {"loss": 1.0, "accuracy": None}, {"loss": 1.5, "accuracy": None}
    base = {"loss": 2.0, "accuracy": None}
    about = {"seconds": 1.0, "bytes_down": 0, "bytes_up": 0, "never_sent": 0.5}
    made = {
        "world": {"base": {"a": base, "b": base}, "owner": {"a": whole, "b": base}},
        "floor": {"curve": [{"n": 0, **base}]},
        "fedavg": {"final": {"a": half, "b": whole}, "curve": [{"n": 0, **whole}], **about},
        "train-all-0.5": {"final": {"a": half, "b": half}, "curve": [{"n": 0, **half}], **about},
        "train-all-0.5-consolidated": {"blends": [], "consolidated": [{"weight": 1.0, "a": whole, "b": half}], **about},
        "nothing-sent": {"final": {"a": whole, "b": half}, **about, "never_sent": 1.0},
    }
    found = {row.method: row for row in rows({("related", 0, name): result for name, result in made.items()})}
    ending = found["train-all-0.5-w1"]
    assert (ending.figures["a_left"], ending.figures["gain"]) == (1.0, 0.5)
    assert ending.recovered == found["train-all-0.5"].recovered == {0: 0.5}
    assert found["nothing-sent"].recovered == {0: 0.0}


@pytest.mark.soak  # it trains dozens of models; nothing in src depends on it
def test_nothing_is_sent_is_consolidated_too(studied: Path) -> None:
    found = {cell["name"]: cell for cell in document(studied)["cells"]}
    assert found["news-lm/0/nothing-sent"]["never_sent"] == 1.0
    for task in TASKS:
        ends = found[f"{task}/0/nothing-sent-consolidated"]["consolidated"]
        assert [end["weight"] for end in ends] == list(WEIGHTS)
