"""Clipping and noise of a whole update: norms and variance by hand, and the δ of the Gaussian mechanism."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import integrate, stats

from fedqsn_cli import client_train, merge
from fedqsn_cli.artifacts.manifests import ProxyManifest, UpdateManifest, read_manifest
from fedqsn_cli.errors import InputError
from fedqsn_cli.training.steps.secure_random import normals, uniforms
from fedqsn_cli.training.steps.visible import rescale_factors
from fedqsn_cli.training.updates.update_noise import UpdateNoise, gaussian_delta, gaussian_epsilon
from support.training_jobs import labelled, make_proxy, small_model, visible_units

FAST: dict[str, Any] = {"max_steps": 3, "batch_size": 4, "lr": 1e-2}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a proxy whose scale is not 1, and its update without noise."""
    here = tmp_path_factory.mktemp("job")
    make_proxy(small_model(here / "model"), here / "proxy", p1=0.3)
    labelled(here / "data.jsonl")
    train(here, here / "plain")
    return here


def train(job: Path, out: Path, **options: Any) -> Path:
    client_train(job / "proxy", out, data=job / "data.jsonl", **FAST, **options)
    return out


def in_model_coordinates(job: Path, update: Path) -> torch.Tensor:
    """Δ = U / s of all tensors, flat."""
    manifest = read_manifest(job / "proxy", ProxyManifest)
    scales = rescale_factors(manifest, visible_units(job / "proxy"))
    stored = load_file(update / "update.safetensors")
    assert max(scales.values()) > 1.1
    return torch.cat([stored[name].double().reshape(-1) / scales.get(name, 1.0) for name in sorted(stored)])


def test_the_update_is_clipped_in_the_models_own_coordinates(job: Path, tmp_path: Path) -> None:
    plain = in_model_coordinates(job, job / "plain")
    limit = float(plain.norm()) / 3
    clipped = in_model_coordinates(job, train(job, tmp_path / "update", clip_norm=limit))
    assert float(clipped.norm()) == pytest.approx(limit, rel=1e-5)
    torch.testing.assert_close(clipped, plain / 3, rtol=1e-4, atol=1e-9)


def test_an_update_within_the_limit_stays_as_it_is(job: Path, tmp_path: Path) -> None:
    update = train(job, tmp_path / "update", clip_norm=1e6)
    assert torch.equal(in_model_coordinates(job, update), in_model_coordinates(job, job / "plain"))


def test_noise_has_its_deviation_in_the_models_coordinates_and_no_seed(job: Path, tmp_path: Path) -> None:
    plain = in_model_coordinates(job, job / "plain")
    limit = float(plain.norm())
    options = {"clip_norm": limit, "noise_multiplier": 2.0, "seed": 0}
    parts = [in_model_coordinates(job, train(job, tmp_path / name, **options)) - plain for name in ("a", "b")]
    for noise in parts:
        assert float(noise.std()) == pytest.approx(2.0 * limit, rel=5 * math.sqrt(1 / (2 * noise.numel())) + 1e-4)
        assert abs(float(noise.mean())) < 6 * 2.0 * limit / math.sqrt(noise.numel())
    assert not torch.equal(*parts)
    correlation = float(torch.corrcoef(torch.stack(parts))[0, 1])
    assert abs(correlation) < 6 / math.sqrt(parts[0].numel())


def test_the_manifest_says_what_was_done_and_no_losses(job: Path, tmp_path: Path) -> None:
    data = job / "data.jsonl"
    update = train(job, tmp_path / "update", clip_norm=1.0, noise_multiplier=0.5, eval_data=data)
    manifest = read_manifest(update, UpdateManifest)
    document = json.loads((update / "update.json").read_text())
    assert document["privacy"] == {"update": {"clip_norm": 1.0, "noise_multiplier": 0.5}}
    assert set(manifest.losses.model_dump().values()) == {None}
    assert "privacy" not in json.loads((job / "plain" / "update.json").read_text())


def test_a_noisy_update_in_codes_merges(job: Path, tmp_path: Path) -> None:
    options = {"clip_norm": 0.01, "noise_multiplier": 0.01, "update_format": "nf4", "residual": tmp_path / "residual"}
    update = train(job, tmp_path / "update", **options)
    merge(job / "model", [update], tmp_path / "next", key=job / "key", ledger=job / "proxy.jsonl")


def test_noise_without_a_limit_is_refused(job: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--noise-multiplier: needs --clip-norm"):
        train(job, tmp_path / "update", noise_multiplier=1.0)


def test_an_update_of_zeros_is_not_divided_by_its_norm() -> None:
    noise = UpdateNoise.of([("w", torch.zeros(3))], {}, 1.0, 0.0)
    assert torch.equal(noise.apply("w", torch.zeros(3)), torch.zeros(3))


def test_secure_numbers_have_the_distribution_that_they_should() -> None:
    count = 2_000_000
    numbers = np.sort(normals(count).astype(np.float64))
    steps = np.arange(1, count + 1) / count
    distance = np.abs(stats.norm.cdf(numbers) - steps).max()
    assert distance < 4 / math.sqrt(count)  # Kolmogorov-Smirnov: exceeded with probability 2 exp(-32)
    assert not np.array_equal(normals(5), normals(5))
    spread = uniforms(count)
    assert spread.min() > 0 and spread.max() < 1


@pytest.mark.parametrize("multiplier", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 5.0])
def test_delta_is_the_integral_of_what_one_density_has_over_the_other(multiplier: float, epsilon: float) -> None:
    distance = 2.0 / multiplier

    def excess(x: float) -> float:
        return max(0.0, stats.norm.pdf(x, distance) - math.exp(epsilon) * stats.norm.pdf(x))

    edge = distance / 2 + epsilon / distance
    wanted, _ = integrate.quad(excess, edge, edge + 40)
    assert gaussian_delta(epsilon, multiplier) == pytest.approx(wanted, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("multiplier", [0.3, 1.0, 10.0, 1000.0])
def test_epsilon_is_the_smallest_that_keeps_delta(multiplier: float) -> None:
    epsilon = gaussian_epsilon(1e-5, multiplier)
    assert gaussian_delta(epsilon, multiplier) <= 1e-5 < gaussian_delta(epsilon * 0.999, multiplier) + 1e-12
