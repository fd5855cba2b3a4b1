"""merge --noise-multiplier: the noise measured, epsilon recomputed from the ledger, the budget, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedqsn_cli import inspect, merge
from fedqsn_cli.artifacts import ledger as ledgers
from fedqsn_cli.errors import FormatError, InputError
from fedqsn_cli.masks import job_key
from fedqsn_cli.merging.step.noise import BLOCK, Noise
from merging.test_merge import whole_update
from support.helpers import contents, draft, make_model, noise, nothing_written, read_model, send, to_floats
from support.passes import chunks_of, threads_of
from support.scenario import JobFolder, Scenario

CLIENTS = ("c0", "c1", "c2")
PRIVATE = {"clip_norm": 2.0, "noise_multiplier": 0.5, "delta": 1e-3}


def values(number: int) -> Any:
    """What a client sends."""
    return noise(number, 0.5 if number == 0 else 0.001)


@pytest.fixture(scope="module")
def original(module_folder: Path) -> JobFolder:
    """A small BERT and three updates: the first large, the others small."""
    job = JobFolder(
        Scenario("bert", "F32", 96, 96, 1, "neuron", "none", None, 64, False, "zero", 0.2, 0.3), module_folder
    )
    make_model(job.model, "bert", hidden=96, inner=96)
    proxies = job.export(job.model, "proxies", clients=CLIENTS)
    for number, name in enumerate(CLIENTS):
        send(proxies / name, module_folder / f"u-{name}", values(number), examples=1 + number)
    return job


@pytest.fixture
def job(original: JobFolder, folder: Path) -> JobFolder:
    """A copy of it, with a ledger of its own."""
    return original.copied(folder / "job")


def run(job: JobFolder, out: str = "next", updates: tuple[str, ...] = CLIENTS, **options: Any) -> Any:
    usual = {"key": job.key, "ledger": job.root / "ledger.jsonl", **PRIVATE}
    return merge(str(job.model), [job.root / f"u-{name}" for name in updates], job.root / out, **usual | options)


def lines(job: JobFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.root / "ledger.jsonl").read_text().splitlines()]


def gaussian_epsilon(multipliers: list[float], delta: float) -> float:
    """ε of Gaussian mechanisms by Rényi's differential privacy (Mironov 2017; Canonne et al. 2020), the best α."""
    alphas = np.linspace(1.01, 300, 200_000)
    rdp = alphas * sum(1 / (2 * z * z) for z in multipliers)
    return float(np.min(rdp + np.log1p(-1 / alphas) - np.log(delta * alphas) / (alphas - 1)))


# ---------------------------------------------------------------- the noise


def test_the_noise_is_normal_and_independent() -> None:
    x = np.zeros((4, 50_000))
    Noise(b"k" * 32, 3.0).add_to(x, "a", 0)
    assert x.std() == pytest.approx(3, rel=0.01) and abs(x.mean()) < 0.03
    y, z = np.zeros(x.shape), np.zeros(x.shape)
    Noise(b"k" * 32, 3.0).add_to(y, "b", 0)
    Noise(b"l" * 32, 3.0).add_to(z, "a", 0)
    for other in (y, z, np.roll(x, 1), np.roll(x, BLOCK)):
        assert abs(np.corrcoef(x.ravel(), other.ravel())[0, 1]) < 0.01
    shares = [(np.abs(x) > 3 * bound).mean() for bound in (1, 2, 3)]
    assert shares == pytest.approx([math.erfc(bound / math.sqrt(2)) for bound in (1, 2, 3)], rel=0.1)


def test_the_noise_of_a_weight_depends_on_its_place_alone() -> None:
    whole = np.zeros(3 * BLOCK + 7)
    Noise(b"k" * 32, 1.0).add_to(whole, "a", 0)
    for first, count in ((0, 5), (3, 1), (BLOCK - 1, 2), (BLOCK + 1, 2 * BLOCK)):
        part = np.zeros((1, count))
        Noise(b"k" * 32, 1.0).add_to(part, "a", first)
        np.testing.assert_array_equal(part[0], whole[first : first + count])


def test_the_merged_model_is_the_clipped_mean_and_noise_of_the_right_size(job: JobFolder) -> None:
    result = run(job)
    assert [client.share for client in result.clients] == [pytest.approx(1 / 3)] * 3
    proxies = job.root / "proxies"
    parts = [whole_update(proxies / name, draft(proxies / name, values(i))) for i, name in enumerate(CLIENTS)]
    norms = [math.sqrt(sum(float(((u / s) ** 2).sum()) for u, _, s in part.values())) for part in parts]
    assert norms[0] > 2 > norms[1]
    assert result.clients[0].verdict.startswith("clipped")
    before, after = read_model(job.model), read_model(job.root / "next")
    found: list[NDArray[np.float64]] = []
    for name in parts[0]:
        clipped = [min(1, 2 / norm) * part[name][0] / part[name][2] for part, norm in zip(parts, norms, strict=True)]
        seen = sum(part[name][1].astype(int) for part in parts)
        moved = to_floats(after[name][1], "F32").astype(np.float64) - to_floats(before[name][1], "F32")
        moved = moved.reshape(seen.shape)
        assert not moved[seen == 0].any()
        found.append(((moved * seen) - sum(clipped))[seen > 0])
    rest = np.concatenate(found)
    assert rest.std() == pytest.approx(0.5 * 2, rel=0.02) and abs(rest.mean()) < 0.03


def test_a_merge_that_is_made_again_has_the_same_noise_and_counts_once(job: JobFolder) -> None:
    first = run(job)
    with chunks_of(700), threads_of(3):
        again = run(job, "again")
    assert contents(job.root / "next") == contents(job.root / "again")
    assert first.privacy == again.privacy and first.privacy.merges == 1
    for number, options in enumerate(({"noise_multiplier": 0.6}, {"clip_norm": 2.1}, {"updates": CLIENTS[:2]})):
        other = run(job, f"other-{number}", **options)
        assert other.privacy.merges == 2 + number


# ---------------------------------------------------------------- the account


def test_epsilon_is_what_the_ledger_says(job: JobFolder) -> None:
    results = [run(job, f"n{i}", noise_multiplier=z) for i, z in enumerate((1.0, 2.0, 0.7))]
    recorded = [line for line in lines(job) if line["format"] == "fedqsn-private-merge/2"]
    assert [line["noise_multiplier"] for line in recorded] == [1.0, 2.0, 0.7]
    for count, result in enumerate(results, start=1):
        by_hand = gaussian_epsilon([line["noise_multiplier"] for line in recorded[:count]], 1e-3)
        assert result.privacy.epsilon == pytest.approx(by_hand, rel=0.01)
        assert result.privacy.epsilon >= by_hand - 1e-9


def test_a_merge_over_the_budget_is_refused_and_not_recorded(job: JobFolder) -> None:
    first = run(job, noise_multiplier=2.0, epsilon=3.0)
    assert first.privacy.epsilon < 3
    before = lines(job)
    with nothing_written(job.root), pytest.raises(InputError, match=r"after 2 merges ε is .* over --epsilon 3"):
        run(job, "second", noise_multiplier=1.0, epsilon=3.0)
    assert lines(job) == before
    assert run(job, "same", noise_multiplier=2.0, epsilon=3.0).privacy == first.privacy


def test_the_ledger_is_still_one_chain_that_everyone_reads(job: JobFolder) -> None:
    run(job)
    key = job_key.load(job.key)
    ledger = job.root / "ledger.jsonl"
    assert len(ledgers.read(ledger, key)) == 3 and len(ledgers.read_merges(ledger, key)) == 1
    assert inspect(str(ledger))
    job.export(job.root / "next", "second", round=2, clients=("c9",))
    assert len(ledgers.read(ledger, key)) == 4
    text = ledger.read_text()
    ledger.write_text(text.replace('"noise_multiplier":0.5', '"noise_multiplier":5.0'))
    with pytest.raises(FormatError, match="chain"):
        run(job, "next-2")
    ledger.write_text("".join(line for line in text.splitlines(keepends=True) if "private-merge" not in line))
    with pytest.raises(FormatError):
        run(job, "next-2")


def test_a_merge_that_fails_is_not_recorded(job: JobFolder) -> None:
    before = lines(job)
    with nothing_written(job.root), pytest.raises(InputError):
        run(job, max_update_norm=1e-6)
    assert lines(job) == before


# ---------------------------------------------------------------- wrong use

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"clip_norm": None}, "--clip-norm: noise needs a fixed limit"),
    ({"clip_norm": "auto"}, "--clip-norm: noise needs a fixed limit"),
    ({"delta": None}, "--delta: is needed"),
    ({"delta": 1.0}, "--delta"),
    ({"delta": 0.6}, "--delta: 0.6 is not less than 1 / "),
    ({"noise_multiplier": 0}, "--noise-multiplier"),
    ({"noise_multiplier": 1e-160}, "--noise-multiplier: after 1 merges ε is inf .* so little noise hides nothing"),
    ({"noise_multiplier": 1e-300}, "--noise-multiplier: after 1 merges ε is inf .* so little noise hides nothing"),
    ({"noise_multiplier": None}, "--delta: there is no noise"),
    ({"noise_multiplier": None, "delta": None, "epsilon": 3.0}, "--epsilon: there is no noise"),
    ({"rule": "median", "byzantine": 1}, "--noise-multiplier: noise is made for a sum"),
    ({"keep_adapter": "adapter"}, "--keep-adapter"),
    ({"on_refused": "skip"}, "--on-refused: with noise, how many updates count must not depend"),
    ({"restore": "model"}, "no updates"),
]


@pytest.mark.parametrize(("options", "complaint"), WRONG, ids=lambda value: str(value)[:40])
def test_i11_noise_that_hides_nothing_is_refused(options: dict[str, Any], complaint: str, original: JobFolder) -> None:
    with nothing_written(original.root), pytest.raises(InputError, match=complaint):
        run(original, **options)
