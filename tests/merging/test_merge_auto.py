"""merge with --server-lr auto and --blend auto: the measured models are those of plain commands; the best is chosen."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedqsn_cli import client_train, evaluate, export_proxy, mask, merge
from fedqsn_cli.errors import DataError, GateFailed, InputError, RefusedUpdate
from fedqsn_cli.merging.ending.interpolate import Interpolation
from fedqsn_cli.merging.results import MergeResult
from support.helpers import (
    as_strings,
    contents,
    draft,
    hidden_elements,
    noise,
    nothing_written,
    read_file,
    read_model,
    send,
    to_bits,
    to_floats,
    write_model,
)
from support.processes import run
from support.training_jobs import labelled, plain_texts, small_model


@dataclass(frozen=True)
class Job:
    """A job on disk: model/, server/, dev.jsonl, key, ledger, and the updates good/ and bad/ of its first round."""

    root: Path
    family: str
    dtype: str

    @property
    def options(self) -> dict[str, Any]:
        return {"key": self.root / "key", "ledger": self.root / "ledger.jsonl"}

    @property
    def data(self) -> Path:
        return self.root / "dev.jsonl"

    def release(self, source: Path, name: str, round: int = 1) -> Path:
        export_proxy(str(source), self.root / name, client=[name], round=round, p2=0.1, format="none", **self.options)
        return self.root / name

    def step(self, out: Path, update: str = "good", source: str = "model", **options: Any) -> MergeResult:
        return merge(str(self.root / source), [self.root / update], out, **self.options | options)

    def restore(self, out: Path, **options: Any) -> MergeResult:
        trained = str(self.root / "trained")
        return merge(str(self.root / "model"), [], out, key=self.root / "key", restore=trained, **options)


def make_job(root: Path, family: str, dtype: str) -> Job:
    """One round: an update that helps, one that hurts, and a server model that the first one was merged into."""
    job = Job(root, family, dtype)
    small_model(root / "model", family, dtype=dtype)
    (labelled if family == "bert" else plain_texts)(job.data)
    mask(str(root / "model"), root / "server", key=root / "key", p1=0.3)
    proxy = job.release(root / "server", "ann")
    client_train(proxy, root / "good", data=job.data, max_steps=6, lr=2e-3, batch_size=8, device="cpu")
    opposite = draft(proxy, noise(1))
    learnt = read_file(root / "good/update.safetensors")
    opposite.tensors = {name: (kind, to_bits(-to_floats(bits, kind), kind)) for name, (kind, bits) in learnt.items()}
    opposite.write(root / "bad")
    merge(str(root / "server"), [root / "good"], root / "trained", **job.options)
    return job


IN_SOAK = [pytest.param(name, marks=pytest.mark.soak) for name in ("gpt2-float16", "mixtral-float32")]


@pytest.fixture(scope="module", params=["bert-float32", "llama-bfloat16", *IN_SOAK])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    family, dtype = request.param.split("-")
    return make_job(tmp_path_factory.mktemp(family), family, dtype)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("one"), "bert", "float32")


def check_points(job: Job, found: MergeResult, write: Any, values: list[float]) -> None:
    """The losses of the curve are those of the files that the plain command writes."""
    assert found.search is not None
    for value in values:
        point = found.search.at(value)
        measured = evaluate(write(value), data=job.data)
        assert point.loss == pytest.approx(measured.loss, rel=1e-6 if job.dtype == "float32" else 1e-3)
        assert (point.accuracy, point.perplexity is None) == (measured.accuracy, measured.perplexity is None)
    losses = {point.loss for point in found.search.curve}
    assert len(losses) > len(found.search.curve) // 2  # it is a curve


@pytest.mark.parametrize("source", ["model", "server"])
def test_the_curve_of_steps_is_that_of_the_files_and_the_best_is_written(job: Job, source: str, tmp_path: Path) -> None:
    found = job.step(tmp_path / "auto", source=source, server_lr="auto", eval_data=job.data)
    search = found.search
    assert search is not None and search.option == "--server-lr"
    assert search.examples == (24 if job.family == "bert" else 12)

    def write(value: float) -> Path:
        out = tmp_path / f"{value}"
        plain = job.step(out, source=source, server_lr=value)
        assert (plain.clients, plain.covered) == (found.clients, found.covered)
        return out

    check_points(job, found, write, [0.25, 1.0, 3.0])
    now = evaluate(job.root / source, data=job.data)
    assert search.at(0.0).loss == pytest.approx(now.loss, rel=1e-6 if job.dtype == "float32" else 1e-3)
    assert search.at(search.chosen).loss == min(point.loss for point in search.curve if point.value > 0)
    assert search.at(search.chosen).loss < now.loss
    assert found.server_lr == search.chosen
    out = tmp_path / f"{search.chosen}"
    assert contents(tmp_path / "auto") == contents(out if out.exists() else write(search.chosen))


def test_the_curve_of_blends_is_that_of_the_files_and_the_best_is_written(job: Job, tmp_path: Path) -> None:
    found = job.restore(tmp_path / "auto", blend="auto", eval_data=job.data)
    search = found.search
    assert search is not None and search.option == "--blend"

    def write(value: float) -> Path:
        out = tmp_path / f"{value}"
        job.restore(out, blend=value)
        return out

    check_points(job, found, write, [0.0, 0.25, 0.625, 1.0])
    assert search.at(search.chosen).loss == min(point.loss for point in search.curve)
    assert found.blend == search.chosen
    out = tmp_path / f"{search.chosen}"
    assert contents(tmp_path / "auto") == contents(out if out.exists() else write(search.chosen))


def test_a_second_round_starts_from_what_16_bits_could_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight by weight: steps this small vanish in the losses, and in ends that are rounded to 16 bits."""
    job = make_job(tmp_path, "llama", "bfloat16")
    seen: dict[float, dict[str, Any]] = {}
    measure = Interpolation.measure

    def spied(line: Interpolation, at: float) -> Any:
        point = measure(line, at)
        seen[at] = {name: tensor.numpy().copy() for name, tensor in line._model.state_dict().items()}
        return point

    monkeypatch.setattr(Interpolation, "measure", spied)
    job.step(tmp_path / "next")
    update = send(job.release(tmp_path / "next", "cleo", round=2), tmp_path / "tiny", noise(3, 2e-4))
    auto = {"server_lr": "auto", "eval_data": job.data, "allow_worse": True}
    job.step(tmp_path / "auto", update=update.name, source="next", **auto)
    for value in (0.5, 1.0, 3.0):
        job.step(tmp_path / f"{value}", update=update.name, source="next", server_lr=value)
        written = read_model(tmp_path / f"{value}")
        equal = [(to_floats(bits, dtype) == seen[value][name]).reshape(-1) for name, (dtype, bits) in written.items()]
        assert np.mean(np.concatenate(equal)) > 0.995  # a few fall to the other side when they are rounded


def test_a_step_that_makes_the_model_worse_is_not_taken(bert: Job, tmp_path: Path) -> None:
    with nothing_written(bert.root), nothing_written(tmp_path), pytest.raises(GateFailed, match="worse on the dev"):
        bert.step(tmp_path / "next", update="bad", server_lr="auto", eval_data=bert.data, report=tmp_path / "r.html")
    found = bert.step(tmp_path / "next", update="bad", server_lr="auto", eval_data=bert.data, allow_worse=True)
    assert found.search is not None and found.search.chosen > 0
    assert found.search.at(found.search.chosen).loss > found.search.at(0.0).loss
    bert.step(tmp_path / "plain", update="bad", server_lr=found.search.chosen)
    assert contents(tmp_path / "next") == contents(tmp_path / "plain")


def test_i8_updates_of_zeros_and_nothing_hidden_give_the_default(bert: Job, tmp_path: Path) -> None:
    zeros = send(bert.release(bert.root / "server", "zed"), tmp_path / "zeros")
    found = bert.step(tmp_path / "next", update=str(zeros), server_lr="auto", eval_data=bert.data)
    assert found.server_lr == 1
    model = (bert.root / "model/model.safetensors").read_bytes()
    assert (tmp_path / "next/model.safetensors").read_bytes() == model
    mask(str(bert.root / "model"), tmp_path / "whole", key=tmp_path / "key", p1=0.0)
    whole = {"key": tmp_path / "key", "restore": str(tmp_path / "whole")}
    found = merge(str(bert.root / "model"), [], tmp_path / "same", **whole, blend="auto", eval_data=bert.data)
    assert found.blend == 1
    assert (tmp_path / "same/model.safetensors").read_bytes() == model


def test_hidden_weights_that_are_not_finite_make_a_blend_infinitely_bad_and_no_crash(bert: Job, tmp_path: Path) -> None:
    tensors = read_model(bert.root / "model")
    for name, flags in hidden_elements(bert.root / "model", bert.root / "key").items():
        tensors[name][1][flags] = 0x7F800000
    config = json.loads((bert.root / "model/config.json").read_bytes())
    broken = write_model(tmp_path / "broken", tensors, config)
    for path in (bert.root / "model").glob("*token*"):
        (broken / path.name).write_bytes(path.read_bytes())
    found = merge(
        str(broken),
        [],
        tmp_path / "out",
        key=bert.root / "key",
        restore=str(bert.root / "trained"),
        blend="auto",
        eval_data=bert.data,
    )
    assert found.search is not None and found.blend == 0
    assert [point.loss for point in found.search.curve[1:]] == [float("inf")] * (len(found.search.curve) - 1)


def test_no_model_is_evaluated_before_the_updates_passed_every_check(
    bert: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was evaluated")

    monkeypatch.setattr(Interpolation, "__init__", never)
    send(bert.root / "ann", tmp_path / "changed", noise(1))
    send(bert.root / "ann", tmp_path / "infinite", lambda _, shape: np.full(shape, np.inf))
    path = tmp_path / "changed/update.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    auto = {"server_lr": "auto", "eval_data": bert.data}
    with nothing_written(bert.root), nothing_written(tmp_path):
        for name in ("changed", "infinite"):
            with pytest.raises(RefusedUpdate):
                bert.step(tmp_path / "next", update=str(tmp_path / name), **auto)
        with pytest.raises(RefusedUpdate, match="norm"):
            bert.step(tmp_path / "next", max_update_norm=1e-9, **auto)
        with pytest.raises(RefusedUpdate, match="another model"):
            bert.step(tmp_path / "next", source="trained", **auto)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_i6_whatever_ends_the_search_leaves_nothing_behind(
    error: type[BaseException], bert: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(*_: object) -> None:
        raise error

    monkeypatch.setattr(Interpolation, "measure", ends)
    with nothing_written(bert.root), nothing_written(tmp_path):
        with pytest.raises(error):
            bert.step(tmp_path / "new/next", server_lr="auto", eval_data=bert.data, report=tmp_path / "r.html")
        with pytest.raises(error):
            bert.restore(tmp_path / "new/final", blend="auto", eval_data=bert.data)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("step", {"server_lr": "auto"}, "--eval-data: --server-lr auto needs development data"),
    ("restore", {"blend": "auto"}, "--eval-data: --blend auto needs development data"),
    ("step", {"eval_data": "DATA"}, "--eval-data: there is nothing to search for; give it with --server-lr auto"),
    (
        "restore",
        {"eval_data": "DATA", "blend": 0.5},
        "--eval-data: there is nothing to search for; give it with --blend auto",
    ),
    ("restore", {"report": "r.html"}, "--report: there is nothing to search for"),
    ("step", {"allow_worse": True}, "--allow-worse: "),
    ("step", {"server_lr": "best"}, "--server-lr"),
    ("restore", {"blend": "best"}, "--blend"),
    ("restore", {"server_lr": "auto", "eval_data": "DATA"}, "--server-lr: a restore takes no step"),
    ("step", {"blend": "auto", "eval_data": "DATA"}, "--blend: only a restore blends"),
    ("step", {"server_lr": "auto", "eval_data": "DATA", "batch_size": 0}, "--batch-size"),
    ("step", {"server_lr": "auto", "eval_data": "DATA", "device": "tpu"}, "--device"),
    ("step", {"server_lr": "auto", "eval_data": "DATA", "report": "/nowhere/r.html"}, "/nowhere: there is no such"),
    ("step", {"server_lr": "auto", "eval_data": "DATA", "report": "/"}, "/: is a directory"),
]


@pytest.mark.parametrize(("what", "options", "complaint"), WRONG, ids=lambda value: str(value)[:50])
def test_i11_options_that_do_not_go_together_are_refused(
    what: str, options: dict[str, Any], complaint: str, bert: Job, tmp_path: Path
) -> None:
    options = {name: bert.data if value == "DATA" else value for name, value in options.items()}
    with nothing_written(bert.root), nothing_written(tmp_path), pytest.raises(InputError) as refused:
        getattr(bert, what)(tmp_path / "out", **options)
    assert complaint in str(refused.value)


def test_i11_data_that_does_not_fit_and_outputs_that_are_taken_are_refused(bert: Job, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "w5"}\n')
    (tmp_path / "taken").mkdir()
    with nothing_written(bert.root), nothing_written(tmp_path):
        with pytest.raises(DataError, match="label"):
            bert.step(tmp_path / "next", server_lr="auto", eval_data=tmp_path / "texts.jsonl")
        with pytest.raises(DataError, match="no such file"):
            bert.restore(tmp_path / "next", blend="auto", eval_data=tmp_path / "nowhere.jsonl")
        with pytest.raises(InputError, match="already exists"):
            bert.step(tmp_path / "taken", server_lr="auto", eval_data=bert.data)
        with pytest.raises(InputError, match="--report: is inside"):
            bert.step(tmp_path / "taken", server_lr="auto", eval_data=bert.data, report=tmp_path / "taken/r.html")


# ---------------------------------------------------------------- the command


def command(job: Job, *more: str | Path) -> Any:
    options = ["--key", job.root / "key", "--device", "cpu"]
    return run("merge", job.root / "model", *as_strings([*more, *options]))


def test_the_command_prints_the_curve_and_marks_the_chosen_value(bert: Job, tmp_path: Path) -> None:
    auto = ["--restore", bert.root / "trained", "--blend", "auto", "--eval-data", bert.data]
    told = command(bert, *auto, "--out", tmp_path / "a", "--json")
    document = json.loads(told.out)
    assert (told.code, told.err) == (0, "")
    search = document["search"]
    assert document["blend"] == search["chosen"] == min(search["curve"], key=lambda point: point["loss"])["value"]
    assert {"value", "loss", "accuracy", "perplexity"} == search["curve"][0].keys()
    shown = command(bert, *auto, "--out", tmp_path / "b")
    lines = [line.split() for line in shown.out.splitlines()]
    assert lines[0] == ["blend", "loss", "accuracy"]
    assert [line[0] for line in lines if line[-2:] == ["<-", "taken"]] == [f"{search['chosen']:g}"]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_command_fails_with_1_when_the_updates_hurt_and_with_2_on_wrong_use(bert: Job, tmp_path: Path) -> None:
    step = [bert.root / "bad", "--ledger", bert.root / "ledger.jsonl", "--out", tmp_path / "next"]
    auto = [*step, "--server-lr", "auto", "--eval-data", bert.data]
    with nothing_written(tmp_path):
        hurt = command(bert, *auto)
        assert (hurt.code, hurt.out, hurt.err.count("\n")) == (1, "", 1)
        for wrong in (["--server-lr", "fast"], ["--server-lr", "-1"], ["--server-lr", "auto"], ["--blend", "auto"]):
            outcome = command(bert, *step, *wrong)
            assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert command(bert, *auto, "--allow-worse", "-q").code == 0


@pytest.mark.parametrize("what", ["step", "restore"])
def test_the_report_is_one_page_with_losses_and_clients(what: str, bert: Job, tmp_path: Path) -> None:
    option = "server_lr" if what == "step" else "blend"
    page = tmp_path / "report.html"
    found = getattr(bert, what)(tmp_path / "out", **{option: "auto"}, eval_data=bert.data, report=page)
    text = page.read_text()
    assert text.startswith("<!doctype html>") and text.count("<svg") == (3 if what == "step" else 1)
    assert not re.search(r"<script|https?:|src=|href=|@import|url\(", text)
    assert str(tmp_path) not in text and str(bert.root) not in text and ("ann" in text) == (what == "step")
    assert json.loads((bert.root / "key").read_bytes())["key"] not in text
    rows = re.findall(r'<tr><td class="number">([^<]+)</td>.*?<td class="name">(taken)?</td></tr>', text)
    assert [float(row[0]) for row in rows] == [point.value for point in found.search.curve]
    assert [float(row[0]) for row in rows if row[1]] == [found.search.chosen]
