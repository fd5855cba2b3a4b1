"""What a model that was put together from proxies can do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedqsn_cli import evaluate, export_proxy
from fedqsn_cli.auditing.completeness import Collector
from fedqsn_cli.auditing.findings import FunctionRecovery
from fedqsn_cli.auditing.inputs import Inputs, open_inputs
from fedqsn_cli.auditing.recovery import function
from fedqsn_cli.auditing.recovery.attackers import attack as attacks
from fedqsn_cli.auditing.recovery.attackers.assembly import Assembly
from fedqsn_cli.auditing.recovery.attackers.attack import Training
from fedqsn_cli.auditing.recovery.attackers.base_fill import BASE_FILL
from fedqsn_cli.auditing.recovery.attackers.catalogue import STARTS, TRAININGS
from fedqsn_cli.auditing.recovery.attackers.direction import DIRECTION
from fedqsn_cli.auditing.recovery.attackers.evaluation import rho
from fedqsn_cli.auditing.recovery.attackers.healing import HEALING
from fedqsn_cli.auditing.recovery.attackers.rounds import DIFFERENCE, ROUNDS, ROUNDS_AVERAGED
from fedqsn_cli.auditing.recovery.function import FunctionAttack, FunctionOptions, recover_function
from fedqsn_cli.export.outputs import METADATA
from fedqsn_cli.options import AuditOptions
from support.leaks import AuditedJob, make_job
from support.training_jobs import labelled, plain_texts


@contextmanager
def short_trainings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacks, "LEAST_STEPS", 8)
        yield


@pytest.fixture(autouse=True)
def short() -> Iterator[None]:
    with short_trainings():
        yield


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> AuditedJob:
    def decide(tensors: dict[str, torch.Tensor]) -> None:
        tensors["classifier.weight"] *= 20  # a model with an opinion

    return make_job(tmp_path_factory.mktemp("function") / "job", edit=decide, fill="base", p2=0.3)


def opened(job: AuditedJob) -> tuple[Inputs, Collector]:
    collector = Collector()
    folders = [job.proxy(client) for client in job.clients]
    given = AuditOptions(truth=job.truth, key=job.key, ledger=job.ledger, public_base=job.base)
    return open_inputs(folders, collector, given), collector


def measure(job: AuditedJob, data: Path, **options: Any) -> tuple[FunctionRecovery | None, Collector]:
    inputs, collector = opened(job)
    return recover_function(inputs, collector, data, FunctionOptions(device="cpu", **options)), collector


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled(tmp_path_factory.mktemp("public") / "public.jsonl", rows=16)


@pytest.fixture(scope="module")
def attacked(job: AuditedJob, public: Path, tmp_path_factory: pytest.TempPathFactory) -> FunctionRecovery:
    """All attacks with 8 and 16 public examples, and the base trained with them."""
    with short_trainings():
        data = labelled(tmp_path_factory.mktemp("dev") / "dev.jsonl")
        found, _ = measure(job, data, public_data=public, public_examples=(8, 16))
    assert found is not None
    return found


def test_every_model_is_measured_as_evaluate_measures_it(job: AuditedJob, tmp_path: Path) -> None:
    data = labelled(tmp_path / "dev.jsonl")
    found, collector = measure(job, data)
    assert found is not None and not collector.findings
    assert {score.model for score in found.scores} == {"global", "server", "proxy", "attacked", "base"}
    losses = {score.model: score.loss for score in found.scores}
    for model, place in (("global", job.truth), ("proxy", job.proxy()), ("base", job.base)):
        assert losses[model] == pytest.approx(evaluate(str(place), data=data, device="cpu").loss, rel=1e-4)
    assert found.floor == "base" and found.floor_loss == losses["base"]
    assert losses["attacked"] <= losses["proxy"] + 1e-4  # as sent is one of the attacks
    assert found.rho == rho(found.floor_loss, losses["attacked"], losses["global"])


def test_the_curve_has_a_point_for_every_number_of_public_examples(attacked: FunctionRecovery) -> None:
    assert [point.public_examples for point in attacked.curve] == [8, 16]
    loss = next(score.loss for score in attacked.scores if score.model == "attacked")
    assert attacked.curve[-1].loss < loss


def test_an_attack_that_starts_best_and_learns_nothing_does_not_hide_the_base_fill(
    job: AuditedJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are all zero may have a lower loss than a model that is wrong and sure of it."""
    monkeypatch.setattr(function, "TRAININGS", tuple(replace(one, rates=one.rates[-1:]) for one in TRAININGS[:2]))
    data, public = labelled(tmp_path / "dev.jsonl"), labelled(tmp_path / "public.jsonl", rows=16)
    inputs, _ = opened(job)
    assert inputs.truth is not None
    options = FunctionOptions(public_data=public, public_examples=(16,), device="cpu")
    attack = FunctionAttack.on(inputs, inputs.truth, data, options)
    build = attack.starts["union"].build
    attack.starts["union"] = replace(
        attack.starts["union"],
        build=lambda assembly: {
            name: tensor * 0 if tensor.is_floating_point() else tensor for name, tensor in build(assembly).items()
        },
    )
    dull, filled = (next(attack.curve(best, 1.0)) for best in ("union", "union, base fill"))
    assert dull.loss <= filled.loss + 1e-6


def test_the_public_base_is_fine_tuned_with_the_same_examples(attacked: FunctionRecovery) -> None:
    point = attacked.curve[-1]
    losses = {score.model: score.loss for score in attacked.scores}
    assert point.base_loss is not None and point.base_loss < losses["base"]
    assert point.gain == rho(point.base_loss, point.loss, losses["global"])


def test_whoever_is_better_off_without_the_proxies_leaves_them_alone(
    job: AuditedJob, public: Path, attacked: FunctionRecovery, tmp_path: Path
) -> None:
    data = labelled(tmp_path / "dev.jsonl")
    found, _ = measure(job, data, public_data=public, public_examples=(16,), base_losses={16: 0.0})
    assert found is not None
    losses = {score.model: score.loss for score in found.scores}
    (point,) = found.curve
    assert point.rho == rho(found.floor_loss, 0.0, losses["global"])
    assert point.base_loss == 0.0 and point.loss == attacked.curve[-1].loss


def test_without_a_base_the_floor_knows_the_averages_only(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", "llama", clients=["alice"])
    found, collector = measure(job, plain_texts(tmp_path / "dev.jsonl"))
    assert found is not None and not collector.findings
    assert found.floor == "averages" and 0 < found.floor_loss < 4.6


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory: pytest.TempPathFactory) -> AuditedJob:
    """A job whose clients train everything, with a second round in folders of its own."""
    job = make_job(tmp_path_factory.mktemp("rounds") / "job", clients=["alice"], fill="base", p2=0.5, train="all")
    weights = load_file(job.truth / "model.safetensors")
    moved = {name: value + 0.001 if value.is_floating_point() else value for name, value in weights.items()}
    shutil.copytree(job.truth, job.home / "next")
    save_file(moved, job.home / "next" / "model.safetensors", METADATA)
    export_proxy(
        job.home / "next", job.home / "second", client="alice", round=2, key=job.key, ledger=job.ledger, p1=0.3,
        p2=0.5, train="all", fill="base", public_base=job.base,
    )  # fmt: skip
    return job


def of_two_rounds(job: AuditedJob) -> Assembly:
    collector = Collector()
    given = AuditOptions(truth=job.home / "next", public_base=job.base, key=job.key, earlier=[job.proxy()])
    inputs = open_inputs([job.home / "second"], collector, given)
    assert inputs.truth is not None and not collector.findings
    return Assembly(inputs, inputs.truth)


def test_who_holds_proxies_of_several_rounds_has_fewer_holes_and_less_rounding(two_rounds: AuditedJob) -> None:
    assembly = of_two_rounds(two_rounds)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    alone = Assembly(replace(assembly.inputs, earlier=()), assembly.truth)
    assert assembly.holes()[name].mean() < alone.holes()[name].mean()
    truth = load_file(two_rounds.home / "next" / "model.safetensors")[name]
    errors = {start: float((start.build(assembly)[name] - truth).norm()) for start in (BASE_FILL, ROUNDS)}
    assert errors[ROUNDS] < errors[BASE_FILL]
    assert ROUNDS_AVERAGED.build(assembly)[name].shape == truth.shape
    names = [start.name(assembly) for start in STARTS if start.applies(assembly)]
    assert names[-3:] == ["union of rounds, base fill", "rounds averaged, base fill", "difference of rounds"]
    assert not any(start.applies(alone) for start in (ROUNDS, ROUNDS_AVERAGED, DIFFERENCE))


def test_a_difference_of_rounds_goes_on_where_training_went(two_rounds: AuditedJob) -> None:
    name = "bert.encoder.layer.0.output.LayerNorm.weight"  # is sent as it is
    first, last = (
        load_file(folder / "model.safetensors")[name] for folder in (two_rounds.proxy(), two_rounds.home / "second")
    )
    assert torch.equal(DIFFERENCE.build(of_two_rounds(two_rounds))[name], last + (last - first))
    assert not torch.equal(first, last)


def test_an_earlier_proxy_of_another_model_makes_the_audit_incomplete(job: AuditedJob, tmp_path: Path) -> None:
    other = make_job(tmp_path / "job", "llama", clients=["alice"])
    collector = Collector()
    open_inputs([job.proxy()], collector, AuditOptions(truth=job.truth, key=job.key, earlier=[other.proxy(), tmp_path]))
    assert [finding.rule for finding in collector.findings] == ["FQ904", "FQ903"]


def test_every_attack_of_the_catalogue_is_tried_and_reported_with_its_source(attacked: FunctionRecovery) -> None:
    found = attacked
    assert not found.left_out
    starts = [attempt.attack for attempt in found.attempts if attempt.public_examples == 0]
    assert starts == [
        "as sent",
        "union",
        "union, scaled by what is shown",
        "union, base fill",
        "rounding undone, base fill",
        "direction matching, base fill",
    ]
    assert len(starts) == len(STARTS) - 3, "three need proxies of several rounds"
    tried = [attempt for attempt in found.attempts if attempt.public_examples == 16]
    trained = [attempt for attempt in tried if not attempt.attack.startswith("base, ")]
    assert {one.attack.rsplit(", ", 1)[-1] for one in trained} == {training.name for training in TRAININGS}
    assert all(one.steps > 0 and one.source for one in trained)
    best = min(trained, key=lambda one: one.loss)
    assert (found.curve[-1].attack, found.curve[-1].loss) == (best.attack, best.loss)


@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.name)
def test_every_training_is_repeatable(job: AuditedJob, tmp_path: Path, training: Training) -> None:
    data, public = labelled(tmp_path / "dev.jsonl"), labelled(tmp_path / "public.jsonl", rows=16)
    inputs, _ = opened(job)
    assert inputs.truth is not None
    attack = FunctionAttack.on(inputs, inputs.truth, data, FunctionOptions(public_data=public, device="cpu"))
    start = attack.starts["union, base fill"]
    losses = set()
    for seed in (1, 2):  # whatever the process drew before
        torch.manual_seed(seed)
        given = attack.training_inputs(lambda: attack.load(start.build(attack.assembly)), attack.public())
        trained = training.run(given, 1e-3)
        assert trained is not None
        losses.add(attack.evaluation.score("attacked", trained.loaded).loss)
    assert len(losses) == 1


def test_healing_moves_only_what_no_proxy_shows(job: AuditedJob, tmp_path: Path) -> None:
    data, public = labelled(tmp_path / "dev.jsonl"), labelled(tmp_path / "public.jsonl", rows=16)
    inputs, _ = opened(job)
    assert inputs.truth is not None
    attack = FunctionAttack.on(inputs, inputs.truth, data, FunctionOptions(public_data=public, device="cpu"))
    holes = attack.holes()
    assert holes
    start = attack.starts["union, base fill"].build(attack.assembly)
    before = {name: value.detach().clone() for name, value in attack.load(dict(start)).model.named_parameters()}
    trained = HEALING.run(attack.training_inputs(lambda: attack.load(dict(start)), attack.public()), 1e-3)
    assert trained is not None and trained.steps > 0
    moved = {name for name, value in trained.loaded.model.named_parameters() if not value.equal(before[name])}
    assert moved and moved <= set(holes)
    for name, value in trained.loaded.model.named_parameters():
        if name in moved:
            assert bool((value[~holes[name]] == before[name][~holes[name]]).all())


def test_the_length_of_rows_comes_from_the_base_in_direction_matching(job: AuditedJob) -> None:
    inputs, _ = opened(job)
    assert inputs.truth is not None and inputs.base is not None
    assembly = Assembly(inputs, inputs.truth)
    matched, base = DIRECTION.build(assembly), assembly.base(inputs.base)
    filled, shown = BASE_FILL.build(assembly), assembly.holes()
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    rows = (shown[name] == 0).all(dim=1)
    assert bool(rows.any())
    assert torch.allclose(matched[name][rows].norm(dim=1), base[name][rows].norm(dim=1), rtol=1e-4)
    cosines = torch.nn.functional.cosine_similarity(matched[name][rows], filled[name][rows])
    assert bool((cosines > 1 - 1e-5).all())


def test_a_time_limit_leaves_out_attacks_and_says_which(job: AuditedJob, tmp_path: Path) -> None:
    data, public = labelled(tmp_path / "dev.jsonl"), labelled(tmp_path / "public.jsonl", rows=16)
    found, _ = measure(job, data, public_data=public, public_examples=(8, 16), minutes=0.0)
    assert found is not None and found.curve == ()
    assert found.left_out and all(name.endswith(" examples") for name in found.left_out)


def test_an_audit_that_was_killed_goes_on_where_it_was(
    job: AuditedJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function, "TRAININGS", tuple(replace(one, rates=one.rates[:1]) for one in TRAININGS))
    data, public = labelled(tmp_path / "dev.jsonl"), labelled(tmp_path / "public.jsonl", rows=16)
    options: dict[str, Any] = {"public_data": public, "public_examples": (16,), "base_losses": {16: 9.0}}
    whole, _ = measure(job, data, **options)
    options["state"] = tmp_path / "attacks.json"
    trained: list[str] = []

    def killed(self: FunctionAttack, training: Training, *given: Any) -> Any:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(training.name)
        return finished(self, training, *given)

    finished = FunctionAttack._trained_at_best
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FunctionAttack, "_trained_at_best", killed)
        measure(job, data, **options)
    assert options["state"].stat().st_mode & 0o777 == 0o600
    late, _ = measure(job, data, minutes=0.0, **options)
    assert late is not None and late.curve and late.left_out, "what is known costs no time"
    again: list[str] = []
    monkeypatch.setattr(
        FunctionAttack,
        "_trained_at_best",
        lambda self, training, *given: again.append(training.name) or finished(self, training, *given),
    )
    resumed, _ = measure(job, data, **options)
    assert resumed == whole and again and len(trained) + len(again) == len(TRAININGS) + 1  # fine-tuning of two starts
    good = options["state"].read_text()
    kept = json.loads(good)
    kept["results"] = {name: one | {"loss": 99.0} for name, one in kept["results"].items()}  # no attack succeeded
    options["state"].write_text(json.dumps(kept))
    fooled, collector = measure(job, data, **options)
    assert fooled is None and "its seal is wrong" in collector.findings[0].message
    options["state"].write_text(good)
    labelled(data, rows=20)  # other inputs
    other, _ = measure(job, data, minutes=0.0, **options)
    assert other is not None and not other.curve


def test_a_file_that_holds_something_else_is_not_replaced(job: AuditedJob, tmp_path: Path) -> None:
    state = tmp_path / "policy.json"
    state.write_text('{"limits": {}}')
    found, collector = measure(job, labelled(tmp_path / "dev.jsonl"), state=state)
    assert found is None and [finding.rule for finding in collector.findings] == ["FQ903"]
    assert state.read_text() == '{"limits": {}}'


def test_data_that_cannot_be_used_makes_the_audit_incomplete(job: AuditedJob, tmp_path: Path) -> None:
    found, collector = measure(job, tmp_path / "nothing.jsonl")
    assert found is None and [finding.rule for finding in collector.findings] == ["FQ903"]


def test_rho_is_none_where_the_model_is_no_better_than_the_floor() -> None:
    assert rho(1.0, 0.5, 0.25) == pytest.approx(2 / 3)
    assert rho(1.0, 0.5, 1.0) is None
