"""merge --rule and --clip-norm against a few lines of numpy, with masks that make coverage uneven; what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedqsn_cli import merge
from fedqsn_cli.errors import InputError, RefusedUpdate
from fedqsn_cli.merging.rules.client_weights import geometric_median
from merging.test_merge import whole_update
from support.helpers import contents, draft, make_model, noise, nothing_written, read_model, send, to_floats
from support.passes import chunks_of, threads_of
from support.scenario import JobFolder, Scenario, few, job_folder, scenarios

Doubles = NDArray[np.float64]
ORDERED = ("median", "trimmed-mean")
WHOLE = ("krum", "multi-krum", "geometric-median", "bulyan")


# ---------------------------------------------------------------- ten-line references, unit by unit


def median(x: Doubles, f: int) -> float:
    return float(np.median(x))


def trimmed_mean(x: Doubles, f: int) -> float:
    return float(np.sort(x)[f : len(x) - f].mean())


def nearest_to_median(x: Doubles, f: int) -> float:
    x = np.sort(x)
    return float(x[np.argsort(np.abs(x - np.median(x)), kind="stable")[: len(x) - 2 * f]].mean())


def combined(rule: Any, values: list[Doubles], seen: list[NDArray[np.bool_]], f: int) -> Doubles:
    """One value for each weight; 0 where fewer than 2 f + 1 clients saw it."""
    out = np.zeros(values[0].size)
    for at, (x, shown) in enumerate(zip(np.stack(values, 1), np.stack(seen, 1), strict=True)):
        if shown.sum() >= 2 * f + 1:
            out[at] = rule(x[shown], f)
    return out


def averaged(weights: Doubles, values: list[Doubles], seen: list[NDArray[np.bool_]], least: int) -> Doubles:
    shown, sums = np.stack(seen), weights @ (np.stack(values) * np.stack(seen))
    total = weights @ shown
    return np.where((shown.sum(0) >= least) & (total > 0), sums / np.where(total > 0, total, 1), 0.0)


def distances(values: list[Doubles], seen: list[NDArray[np.bool_]]) -> Doubles:
    n = len(values)
    out = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            both = seen[i] & seen[j]
            out[i, j] = ((values[i] - values[j])[both] ** 2).mean()
    return out


def krum(d: Doubles, f: int, count: int) -> list[int]:
    near = max(1, len(d) - f - 2)
    scores = [np.sort(np.delete(row, i))[:near].sum() for i, row in enumerate(d)]
    return list(np.argsort(scores, kind="stable")[:count])


def weiszfeld(points: Doubles) -> Doubles:
    z = points.mean(0)
    for _ in range(500):
        w = 1 / np.maximum(np.linalg.norm(points - z, axis=1), 1e-12)
        z = w @ points / w.sum()
    return z


def bulyan(d: Doubles, f: int) -> list[int]:
    left: list[int] = list(range(len(d)))
    chosen = []
    while len(chosen) < len(d) - 2 * f:
        best = left[krum(d[np.ix_(left, left)], f, 1)[0]] if len(left) > 1 else left[0]
        chosen.append(best)
        left.remove(best)
    return sorted(chosen)


def reference(rule: str, values: list[Doubles], seen: list[NDArray[np.bool_]], f: int, d: Doubles) -> Doubles:
    if rule in ORDERED:
        return combined({"median": median, "trimmed-mean": trimmed_mean}[rule], values, seen, f)
    if rule == "geometric-median":
        return averaged(geometric_median(d), values, seen, 2 * f + 1)
    if rule == "bulyan":
        chosen = bulyan(d, f)
        return combined(nearest_to_median, [values[k] for k in chosen], [seen[k] for k in chosen], f)
    weights = np.zeros(len(values))
    weights[krum(d, f, 1 if rule == "krum" else len(values) - f)] = 1
    return averaged(weights, values, seen, 1)


# ---------------------------------------------------------------- a round


def play(job: JobFolder, count: int, **options: Any) -> tuple[list[Path], list[Any]]:
    """Updates of some clients, which differ and agree to some degree."""
    names = tuple(f"c{number}" for number in range(count))
    proxies = job.export(job.model, "proxies", clients=names)
    common = noise(99, 0.01)

    def values(seed: int) -> Any:
        own = noise(seed, 0.004 * (1 + seed))
        return lambda name, shape: common(name, shape) + own(name, shape)

    drafts = [draft(proxies / name, values(i), examples=1 + i, **options) for i, name in enumerate(names)]
    folders = [each.write(job.root / f"u{i}") for i, each in enumerate(drafts)]
    return folders, [whole_update(proxies / name, each) for name, each in zip(names, drafts, strict=True)]


def run(job: JobFolder, updates: list[Path], out: str = "next", **options: Any) -> Any:
    usual = {"key": job.key, "ledger": job.root / "ledger.jsonl"}
    return merge(str(job.model), updates, job.root / out, **usual | options)


def flat(wholes: list[Any], factors: list[float]) -> tuple[list[Doubles], list[NDArray[np.bool_]], list[str]]:
    """Δ_k of every client in one row, and what it saw."""
    names = list(wholes[0])
    values = [np.concatenate([whole[name][0].ravel() / whole[name][2] for name in names]) for whole in wholes]
    shown = [np.concatenate([whole[name][1].ravel() for name in names]) for whole in wholes]
    return [factor * x for factor, x in zip(factors, values, strict=True)], shown, names


@few(30)
@given(scenarios(p2=0.4), st.sampled_from([*ORDERED, *WHOLE]), st.integers(0, 1), st.sampled_from([None, "auto", 0.5]))
def test_a_rule_is_what_numpy_says(scenario: Scenario, rule: str, f: int, clip: float | str | None) -> None:
    with job_folder(scenario) as job:
        updates, wholes = play(job, 4 * f + 3 if rule == "bulyan" else 5)
        result = run(job, updates, rule=rule, byzantine=f, clip_norm=clip, server_lr=0.5)
        values, seen, names = flat(wholes, [1.0] * len(wholes))
        norms = [float(np.linalg.norm(x)) for x in values]
        limit = {None: np.inf, "auto": float(np.median(norms))}.get(clip, clip)  # type: ignore[call-overload]
        values, seen, names = flat(wholes, [min(1.0, limit / norm) for norm in norms])
        step = reference(rule, values, seen, f, distances(values, seen))
        before, after, at = read_model(job.model), read_model(job.root / "next"), 0
        for name in names:
            dtype, bits = before[name]
            old = to_floats(bits, dtype).astype(np.float64)
            wanted = old + 0.5 * step[at : at + bits.size].reshape(bits.shape)
            close = {"F32": 2**-23, "F16": 2**-10, "BF16": 2**-7}[dtype]
            found = to_floats(after[name][1], dtype)
            assert (np.abs(found - wanted) <= np.abs(wanted) * close + 1e-7).all()
            np.testing.assert_array_equal(after[name][1][wanted == old], bits[wanted == old])
            at += bits.size
        assert len(result.clients) == len(updates)
        assert sum(client.share for client in result.clients) == pytest.approx(1)


@few(25)
@given(st.integers(3, 8), st.integers(0, 2**32 - 1))
def test_the_geometric_median_is_weiszfelds(count: int, seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(count, 12))
    points[0] *= 50
    apart = ((points[:, None] - points[None]) ** 2).mean(-1)
    np.testing.assert_allclose(geometric_median(apart) @ points, weiszfeld(points), atol=1e-6)


def test_the_geometric_median_of_a_majority_that_agrees_is_their_update() -> None:
    points = np.array([[1.0, 2.0]] * 3 + [[1e6, -1e6]] * 2)
    apart = ((points[:, None] - points[None]) ** 2).mean(-1)
    np.testing.assert_allclose(geometric_median(apart) @ points, [1.0, 2.0], rtol=1e-5, atol=3)


@few(8)
@given(scenarios(shards=2, p2=0.3), st.sampled_from([*ORDERED, *WHOLE]), st.data())
def test_i4_threads_chunks_and_order_change_no_byte(scenario: Scenario, rule: str, data: st.DataObject) -> None:
    with job_folder(scenario) as job:
        updates, _ = play(job, 5)
        options = {"rule": rule, "byzantine": 0, "clip_norm": "auto"}
        run(job, updates, **options)
        with chunks_of(data.draw(st.sampled_from([300, 5000]))), threads_of(3):
            run(job, data.draw(st.permutations(updates)), out="again", **options)
        assert contents(job.root / "next") == contents(job.root / "again")


@few(6)
@given(scenarios(shards=1), st.sampled_from([*ORDERED, *WHOLE]))
def test_i8_zero_updates_change_no_byte(scenario: Scenario, rule: str) -> None:
    with job_folder(scenario) as job:
        names = ("c0", "c1", "c2", "c3", "c4", "c5", "c6")
        proxies = job.export(job.model, "proxies", clients=names)
        run(job, [send(proxies / name, job.root / name) for name in names], rule=rule, byzantine=1)
        assert (job.root / "next/model.safetensors").read_bytes() == (job.model / "model.safetensors").read_bytes()


# ---------------------------------------------------------------- attackers


@pytest.fixture(scope="module")
def round_of_seven(module_folder: Path) -> tuple[JobFolder, Path]:
    job = JobFolder(
        Scenario("bert", "F32", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.2, 0.1), module_folder
    )
    make_model(job.model, "bert", hidden=33)
    names = tuple(f"c{number}" for number in range(7))
    proxies = job.export(job.model, "proxies", clients=names)
    for number, name in enumerate(names):
        common, own = noise(99, 0.01), noise(number, 0.002)
        send(proxies / name, module_folder / name, lambda *a, c=common, o=own: c(*a) + o(*a))
    return job, proxies


@pytest.mark.parametrize("rule", [*ORDERED, *WHOLE])
@pytest.mark.parametrize("factor", [-1.0, 100.0])
def test_a_rule_withstands_an_attacker_that_fedavg_does_not(
    rule: str, factor: float, round_of_seven: tuple[JobFolder, Path], folder: Path
) -> None:
    job, proxies = round_of_seven
    common = noise(99, 0.01)
    bad = send(proxies / "c0", folder / "bad", lambda *a: factor * common(*a), examples=60)
    updates = [bad, *(job.root / f"c{number}" for number in range(1, 7))]
    usual = {"key": job.key, "ledger": job.root / "ledger.jsonl", "max_unit_norm": 1e9, "max_update_norm": 1e9}
    goal = {name: to_floats(bits, dtype) for name, (dtype, bits) in read_model(job.model).items() if dtype != "I64"}

    def off(out: str, **options: Any) -> float:
        merge(str(job.model), updates, folder / out, **usual | options)
        after = read_model(folder / out)
        name = "bert.embeddings.LayerNorm.weight"
        return float(np.abs(after[name][1].view(np.float32) - goal[name] - common(name, goal[name].shape)).max())

    assert off("robust", rule=rule, byzantine=1) < 0.01
    assert off("plain") > 0.01


def test_verdicts_say_who_was_left_out_and_who_was_clipped(
    round_of_seven: tuple[JobFolder, Path], folder: Path
) -> None:
    job, proxies = round_of_seven
    bad = send(proxies / "c3", folder / "bad", noise(5, 0.3))
    updates = [bad if number == 3 else job.root / f"c{number}" for number in range(7)]
    usual = {"key": job.key, "ledger": job.root / "ledger.jsonl"}
    found = merge(str(job.model), updates, folder / "a", rule="multi-krum", byzantine=1, **usual)
    assert [c.verdict for c in found.clients] == ["merged"] * 3 + ["left out"] + ["merged"] * 3
    assert found.clients[3].share == 0
    found = merge(str(job.model), updates, folder / "b", clip_norm="auto", **usual)
    assert re.fullmatch(r"clipped to \d(\.\d+)? %", found.clients[3].verdict)


def test_a_refused_update_has_no_part_in_a_rule(round_of_seven: tuple[JobFolder, Path], folder: Path) -> None:
    job, proxies = round_of_seven

    def nan(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return np.full(shape, np.nan, np.float32)

    bad = send(proxies / "c3", folder / "bad", nan)
    updates = [job.root / f"c{number}" for number in range(7) if number != 3]
    usual = {"key": job.key, "ledger": job.root / "ledger.jsonl", "on_refused": "skip", "byzantine": 1}
    for rule in ("multi-krum", "median", "geometric-median"):
        merge(str(job.model), updates, folder / f"{rule}-a", rule=rule, **usual)
        merge(str(job.model), [bad, *updates], folder / f"{rule}-b", rule=rule, **usual)
        assert contents(folder / f"{rule}-a") == contents(folder / f"{rule}-b")


# ---------------------------------------------------------------- wrong use

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rule": "mean"}, "not a choice"),
    ({"rule": "median"}, "--byzantine: median needs to know"),
    ({"byzantine": 1}, "--byzantine: fedavg withstands no attacker"),
    ({"rule": "krum", "byzantine": -1}, "--byzantine"),
    ({"rule": "krum", "byzantine": 3}, "--byzantine: krum needs 9 updates or more to withstand 3; this merge has 7"),
    ({"rule": "bulyan", "byzantine": 2}, "needs 11 updates"),
    ({"rule": "median", "byzantine": 4}, "needs 9 updates"),
    ({"rule": "median", "byzantine": 1, "normalize": "clients"}, "--normalize"),
    ({"clip_norm": 0}, "--clip-norm"),
    ({"clip_norm": "much"}, "--clip-norm: 'much' is neither a number nor auto"),
    ({"rule": "median", "byzantine": 1, "restore": "model"}, "no updates"),
]


@pytest.mark.parametrize(("options", "complaint"), WRONG, ids=lambda value: str(value)[:40])
def test_i11_wrong_options_are_refused(
    options: dict[str, Any], complaint: str, round_of_seven: tuple[JobFolder, Path]
) -> None:
    job, _ = round_of_seven
    with nothing_written(job.root), pytest.raises(InputError, match=complaint):
        run(job, [job.root / f"c{number}" for number in range(7)], **options)


def test_i11_a_step_that_a_rule_makes_too_large_is_refused(folder: Path) -> None:
    job = JobFolder(Scenario("llama", "F16", 33, 48, 1, "neuron", "none", None, 64, False, "zero", 0.0, 0.0), folder)
    make_model(job.model, "llama", dtype="F16", hidden=33)
    names = ("c0", "c1", "c2")
    proxies = job.export(job.model, "proxies", clients=names)
    updates = [send(proxies / n, folder / n, lambda name, shape: np.full(shape, 6e4, np.float32)) for n in names]
    with nothing_written(folder), pytest.raises(RefusedUpdate, match="infinite or NaN"):
        run(job, updates, rule="median", byzantine=1, server_lr=2.0, max_update_norm=1e9)
