"""Attacks recover what arithmetic says they must, no more and no less."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedqsn_cli import audit, export_proxy
from fedqsn_cli.auditing.completeness import Collector
from fedqsn_cli.auditing.findings import LEAST_LOG10, AttackScore, Recovery
from fedqsn_cli.auditing.inputs import open_inputs
from fedqsn_cli.auditing.recovery import attacks
from fedqsn_cli.auditing.recovery.intervals import cells
from fedqsn_cli.auditing.recovery.metrics import ErrorSums
from fedqsn_cli.auditing.stored_rows import StoredRows
from fedqsn_cli.auditing.truth_pass import recover_weights
from fedqsn_cli.export.outputs import METADATA
from fedqsn_cli.options import AuditOptions
from support.families import build
from support.leaks import AuditedJob, make_job, perturb_codes, requantize, tamper
from support.passes import threads_of

UP = "model.layers.{}.mlp.up_proj.weight"
GAUSSIAN = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
"""Size of the model whose matrices are Gaussian."""


def gaussian(home: Path, *, clients: int = 1, dtype: str = "float32", **options: Any) -> AuditedJob:
    """A job of nothing but standard normal matrices."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        noise = torch.Generator().manual_seed(1)
        for name in list(tensors):
            del tensors[name]
        for layer in (0, 1):
            tensors[UP.format(layer)] = torch.randn(256, 512, generator=noise).to(getattr(torch, dtype))

    names = [f"c{number}" for number in range(clients)]
    return make_job(home, "llama", clients=names, edit=edit, **options)


def attack(job: AuditedJob, *, base: Path | None = None, clients: Any = None) -> tuple[tuple[Recovery, ...], Collector]:
    collector = Collector()
    folders = [job.proxy(client) for client in clients or job.clients]
    inputs = open_inputs(
        folders, collector, AuditOptions(truth=job.truth, key=job.key, ledger=job.ledger, public_base=base)
    )
    return recover_weights(inputs, collector), collector


def score(recovery: Recovery, name: str) -> AttackScore:
    return next(one for one in recovery.attack_table if one.attack == name)


@pytest.mark.parametrize("axis", ["neuron", "element"])
def test_the_number_of_threads_changes_no_measure(axis: str, tmp_path: Path) -> None:
    job = gaussian(tmp_path / "job", clients=2, p1=0.2, p2=0.2, double_quant=True, axis=axis)
    found = []
    for count in (1, 4):
        with threads_of(count):
            found.append(attack(job, base=job.truth))
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("double", [False, True])
def test_one_proxy_gives_one_weight_in_64_exactly_and_an_error_of_eight_thousandths(
    dtype: str, double: bool, tmp_path: Path
) -> None:
    (found,), collector = attack(gaussian(tmp_path / "job", dtype=dtype, p1=0.0, p2=0.0, double_quant=double))
    assert not collector.findings
    best = score(found, "descale")
    assert best.exact_share == pytest.approx(1 / 64, abs=6e-4) if not double else best.exact_share < 1e-3
    assert 10**best.log10_nmse_visible == pytest.approx(8.4e-3, rel=0.04)
    assert best.log10_nmse == best.log10_nmse_visible


def test_exact_weights_of_a_masked_proxy_are_one_in_64_of_what_is_shown(tmp_path: Path) -> None:
    (found,), _ = attack(gaussian(tmp_path / "job", p1=0.25, p2=0.2))
    for tensor in found.tensors:
        assert tensor.visible_share == pytest.approx(0.75 * 0.8, abs=0.01)
        assert tensor.exact_share == pytest.approx(tensor.visible_share / 64, rel=0.01)
    assert found.best.cosine == pytest.approx(math.sqrt(0.6), abs=0.01)
    raw = score(found, attacks.AS_SENT)
    assert raw.exact_share == 0 and raw.log10_nmse > found.best.log10_nmse  # the scale is worth taking away


def test_thirty_colluders_gain_coverage_but_no_precision_when_codes_are_fixed(tmp_path: Path) -> None:
    found, _ = attack(gaussian(tmp_path / "job", clients=30, p1=0.2, p2=0.3, axis="input"))
    alone, together = found[0], found[-1]
    assert together.scope == "coalition of 30"
    for name in ("union", "average", "intersect", "scale reading"):
        assert 10 ** score(together, name).log10_nmse_visible > 7.5e-3
    assert together.peak.exact_share == pytest.approx(1 / 64, rel=0.01)  # one weight of each block is its scale
    assert together.tensors[0].visible_share == pytest.approx(0.8, abs=0.01)
    assert alone.tensors[0].visible_share == pytest.approx(0.56, abs=0.01)


def test_thirty_colluders_gain_precision_when_scales_follow_the_client_mask(tmp_path: Path) -> None:
    job = gaussian(tmp_path / "job", clients=30, p1=0.0, p2=0.3, axis="input")
    for client in job.clients:
        requantize(job, client, masked_before=True)
    found, _ = attack(job)
    assert 10 ** found[-1].peak.log10_nmse_visible < 2.5e-3
    assert found[-1].peak.exact_share == pytest.approx(0.055, abs=0.006)
    assert found[0].peak.exact_share == pytest.approx(1 / 64, abs=0.001)
    assert 10 ** score(found[0], "descale").log10_nmse_visible > 7e-3


def test_averaging_undoes_stochastic_rounding(tmp_path: Path) -> None:
    job = gaussian(tmp_path / "job", clients=6, p1=0.0, p2=0.0)
    before = 10 ** attack(job)[0][0].best.log10_nmse
    for seed, client in enumerate(job.clients):
        perturb_codes(job, client, seed)
    found, _ = attack(job)
    assert 10 ** score(found[-1], "average").log10_nmse < 0.6 * 10 ** score(found[0], "descale").log10_nmse
    assert before < 9e-3


def test_what_is_not_quantized_is_known_exactly(tmp_path: Path) -> None:
    (found,), _ = attack(gaussian(tmp_path / "job", p1=0.25, p2=0.2, format="none", dtype="bfloat16"))
    assert found.tensors[0].exact_share > 0.8 * found.tensors[0].visible_share
    (found,), _ = attack(gaussian(tmp_path / "plain", p1=0.0, p2=0.0, format="none"))
    assert (
        found.best.exact_share == 1 and found.best.log10_nmse == LEAST_LOG10 and found.best.cosine == pytest.approx(1)
    )


def fine_tuned(home: Path, rank: int) -> tuple[AuditedJob, Path]:
    """A model that differs from a public base by matrices of low rank."""
    noise = torch.Generator().manual_seed(2)
    public = home / "public"
    public.mkdir(parents=True)
    base = {UP.format(layer): torch.randn(256, 512, generator=noise) for layer in (0, 1)}

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors.clear()
        for name, x in base.items():
            left, right = torch.randn(256, rank, generator=noise), torch.randn(rank, 512, generator=noise)
            tensors[name] = x + 0.05 * left @ right / math.sqrt(rank)

    job = make_job(home / "job", "llama", clients=["alice"], edit=edit, p1=0.2, p2=0.1)
    save_file(base, public / "model.safetensors", METADATA)
    (public / "config.json").write_bytes((job.truth / "config.json").read_bytes())
    return job, public


def test_with_a_public_base_the_secret_difference_is_measured_and_recovered(tmp_path: Path) -> None:
    job, base = fine_tuned(tmp_path, rank=2)
    (found,), _ = attack(job, base=base)
    assert (score(found, "descale").delta_recovered or 0) < 0  # the base alone is nearer
    filled, clamped = (score(found, name).delta_recovered or 0 for name in ("descale, base fill", "clamp, base fill"))
    completed = score(found, attacks.LOW_RANK).delta_recovered or 0
    assert filled < clamped < completed
    assert completed > 0.5
    assert completed <= 0.8 * 0.9 + 0.03  # hidden rows of the difference cannot be completed
    assert found.peak.delta_recovered == max(one.delta_recovered or -9 for one in found.attack_table)


def test_a_base_that_is_the_truth_recovers_everything(tmp_path: Path) -> None:
    job = gaussian(tmp_path / "job", p1=0.2, p2=0.1)
    (found,), _ = attack(job, base=job.truth)
    best = score(found, "clamp, base fill")
    assert best.log10_nmse < -9 and best.delta_recovered is None


def test_weights_that_are_no_numbers_make_the_audit_incomplete(tmp_path: Path) -> None:
    job = gaussian(tmp_path / "job", format="none")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP.format(0)][tensors[UP.format(0)] > 2] = math.nan

    tamper(job, change, "c0")
    _, collector = attack(job)
    assert {finding.rule for finding in collector.findings} == {"FQ902"}
    weights = load_file(job.truth / "model.safetensors")
    hidden = int(job.hidden(UP.format(1)).nonzero()[0][0])
    weights[UP.format(1)][hidden, 0] = math.inf
    save_file(weights, job.truth / "model.safetensors", METADATA)
    _, collector = attack(job)
    assert {finding.tensor for finding in collector.findings} >= {UP.format(1)}


@pytest.mark.parametrize("family", ["bert", "gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    "options", [{"format": "nf4"}, {"format": "int8"}, {"format": "nf2", "axis": "input"}], ids=str
)
def test_sums_by_attack_are_those_of_dense_weights(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", family, clients=["alice"], **options)
    (found,), collector = attack(job)
    assert not collector.findings
    from fedqsn_cli.checkpoint import Checkpoint
    from fedqsn_cli.models.dense import load_dense

    proxy = open_inputs([job.proxy()], Collector()).proxies[0]
    truth, sent = load_dense(Checkpoint.open(job.truth)), load_dense(Checkpoint.open(job.proxy()))
    error = energy = 0.0
    for name, w in truth.items():
        if w.is_floating_point():
            guess = sent[name].double() / float(proxy.factor(name))
            error += float((w.double() - guess).square().sum())
            energy += float(w.double().square().sum())
    assert score(found, "descale").log10_nmse == pytest.approx(math.log10(error / energy), abs=1e-4)


@pytest.mark.parametrize("format", ["nf4", "fp4", "nf3", "nf2"])
def test_every_value_lies_in_the_cell_of_its_code(format: str) -> None:
    from fedqsn_cli.quantization.codebooks import codebook

    book, (low, high) = codebook(format), cells(format)
    values = np.linspace(-1, 1, 4001, dtype=np.float32)
    codes = book.order[np.searchsorted(book.bounds, values)]
    assert ((low[codes] <= values) & (values <= high[codes])).all()


def test_sums_of_a_part_and_the_rest_make_the_whole() -> None:
    noise = np.random.default_rng(0)
    w, guess = noise.standard_normal((2, 8, 50)).astype(np.float32)
    rows, flags = noise.random(8) < 0.5, (noise.random((1, 50)) < 0.5).astype(np.float32)
    part, whole = ErrorSums(), ErrorSums()
    stored = StoredRows.of(w), StoredRows.of(guess)
    part.add(*stored, (rows, flags))
    whole.add(*stored, (np.ones(8, np.bool_), np.ones((1, 50), np.float32)))
    rest = whole.minus(part)
    on = rows[:, None] & (flags > 0)
    assert part[5] == pytest.approx(np.square((w - guess)[on]).sum(), rel=1e-5)
    assert rest[5] == pytest.approx(np.square((w - guess)[~on]).sum(), rel=1e-5)
    assert part.scaled(3)[5] == pytest.approx(np.square((w - 3 * guess)[on]).sum(), rel=1e-5)


def test_several_rounds_and_formats_are_put_together_by_format(tmp_path: Path) -> None:
    job = gaussian(tmp_path / "job", clients=2, p1=0.2, p2=0.3)
    export_proxy(
        str(job.truth),
        job.home / "later",
        client=["c0"],
        round=2,
        key=job.key,
        ledger=job.ledger,
        p2=0.3,
        format="nf3",
    )
    found, _ = attack(job, clients=["c0", "c1", "later"])
    assert [one.scope for one in found] == ["proxy c0", "proxy c1", "coalition of 2", "proxy later"]


@pytest.mark.parametrize(("attack", "fill"), [("descale", None), ("descale, base fill", "base")])
def test_the_direction_of_a_difference_is_its_squared_cosine(attack: str, fill: str | None, tmp_path: Path) -> None:
    """An oracle in numpy, on a proxy that shows visible weights as they are."""
    job = make_job(tmp_path / "job", clients=["alice"], p2=0.0, format="none", rescale=False)
    build("bert", tmp_path / "base", seed=11)
    found = audit(job.proxy(), truth=job.truth, key=job.key, public_base=tmp_path / "base")
    base = load_file(tmp_path / "base" / "model.safetensors")
    shown = load_file(job.proxy() / "model.safetensors")
    secret, learnt = [], []
    for name, weights in job.weights().items():
        if not weights.is_floating_point():
            continue
        guess = shown[name].where(shown[name] == weights, base[name]) if fill == "base" else shown[name]
        secret.append((weights - base[name]).double().flatten())
        learnt.append((guess - base[name]).double().flatten())
    one, other = torch.cat(secret), torch.cat(learnt)
    expected = float((one @ other) ** 2 / ((one @ one) * (other @ other)))
    (recovery,) = found.recovery
    score = next(score for score in recovery.attack_table if score.attack == attack)
    assert score.delta_direction == pytest.approx(expected, rel=1e-3)
