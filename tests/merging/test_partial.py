"""merge --partial: sums of a round's updates, in any grouping, end in the same bytes; hostile ones are refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli import inspect, merge
from fedqsn_cli.artifacts.manifests import file_digest, manifest_bytes, read_manifest
from fedqsn_cli.artifacts.partial_folder import PARTIAL_TENSORS, PartialManifest
from fedqsn_cli.errors import FedqsnError, InputError, RefusedUpdate
from fedqsn_cli.masks import job_key
from fedqsn_cli.merging.step import chunks
from fedqsn_cli.merging.sums import arithmetic
from fedqsn_cli.merging.sums.exact_sum import Digits
from fedqsn_cli.options import MergeOptions
from merging.test_admission import CLIENTS, job_with_updates, merged
from support.adapters import draft_adapters
from support.helpers import contents, noise, nothing_written, read_file, send
from support.raw_safetensors import write_file
from support.scenario import JobFolder, few, job_folder, scenarios

Tree = str | list[Any]
"""A client, or what is added up first."""


def exact(values: np.ndarray[Any, Any], coefficient: float) -> Digits:
    """The exact sum of one term for each value."""
    sums = Digits(np.zeros((1, values.size), np.int64), np.zeros((1, values.size), np.int64))
    arithmetic.add(sums, values.astype(np.float32), "F32", np.empty(0, np.int64), None, coefficient)
    return sums


@few(100)
@given(
    st.lists(
        st.tuples(st.floats(-1e5, 1e5, width=32), st.integers(1, 10_000), st.floats(0.25, 1)), min_size=1, max_size=20
    ),
    st.randoms(use_true_random=False),
)
def test_a_sum_is_exact_to_its_last_bit_in_any_order_and_grouping(terms: list[Any], random: Any) -> None:
    wanted = sum(
        round(Fraction(float(np.float32(u)) * (n * clip)) * 2**64) for u, n, clip in terms
    )  # each rounded once, to even
    groups = [exact(np.array([u]), n * clip) for u, n, clip in terms]
    while len(groups) > 1:
        first, second = (groups.pop(random.randrange(len(groups))) for _ in range(2))
        for part in (first, second):
            part.settle(np.empty((1, 1)))
        first.add(second)
        groups.append(first)
    out = np.empty((1, 1))
    groups[0].settle(out)
    assert (int(groups[0].high[0, 0]) << 48) + int(groups[0].low[0, 0]) == wanted
    sizes = math.fsum(abs(float(np.float32(u))) * n * clip for u, n, clip in terms)
    assert groups[0].could_be_of(len(terms), sizes)
    assert not groups[0].could_be_of(len(terms), abs(out[0, 0]) / 2 - 2**-14)
    assert math.isclose(out[0, 0], wanted / 2**64, rel_tol=2**-51, abs_tol=0)


def trees(clients: list[str]) -> st.SearchStrategy[Tree]:
    """Any grouping of clients, of any depth; of one client it or a sum of it alone."""
    if len(clients) == 1:
        return st.sampled_from([clients[0], clients])
    cuts = st.integers(1, len(clients) - 1)
    return cuts.flatmap(lambda at: st.tuples(trees(clients[:at]), trees(clients[at:])).map(list))


def add_up(job: JobFolder, tree: Tree, name: str, **options: Any) -> Path:
    """The update, or the partial sum of a tree."""
    if isinstance(tree, str):
        return job.root / f"u-{tree}"
    parts = [add_up(job, part, f"{name}-{number}", **options) for number, part in enumerate(tree)]
    usual = {"key": job.key, "ledger": job.root / "ledger.jsonl", "max_examples": 10**6}
    return Path(merge(str(job.model), parts, job.root / name, partial=True, **usual | options).path)


@few(12)
@given(
    st.sampled_from(["neuron", "input", "element"]).flatmap(lambda axis: scenarios(axis=axis)),
    st.permutations(["c0", "c1", "c2", "c3"]).flatmap(trees),
    st.lists(st.integers(1, 10**6), min_size=4, max_size=4),
    st.sampled_from([None, 0.5]),
    st.sampled_from(["coverage", "clients"]),
    st.sampled_from([1 << 20, 300]),
)
def test_any_grouping_ends_in_the_bytes_of_a_merge_of_all_at_once(
    scenario: Any, tree: Tree, examples: list[int], clip: float | None, normalize: str, rows: int
) -> None:
    """One client sends adapters, one bf16 values."""
    names = ("c0", "c1", "c2", "c3")
    with job_folder(scenario) as job, pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_ELEMENTS", rows)
        proxies = job.export(job.model, "proxies", clients=names)
        for number, (name, count) in enumerate(zip(names, examples, strict=True)):
            proxy, out = proxies / name, job.root / f"u-{name}"
            if number == 3 and scenario.axis != "element":
                draft_adapters(proxy, 3, rank=2, examples=count).write(out)
            else:
                send(proxy, out, noise(number), examples=count, precision="bf16" if number == 2 else "fp32")
        usual = {"key": job.key, "ledger": job.root / "ledger.jsonl", "max_examples": 10**6, "clip_norm": clip}
        last = {**usual, "normalize": normalize}
        told = merge(str(job.model), [job.root / f"u-{name}" for name in names], job.root / "at-once", **last)
        parts = [add_up(job, part, f"sum-{number}", clip_norm=clip) for number, part in enumerate(tree)]
        found = merge(str(job.model), parts, job.root / "next", **last)
        assert contents(job.root / "next") == contents(job.root / "at-once")
        assert (found.num_examples, found.covered) == (told.num_examples, told.covered)
        at_once, grouped = ({each.client: each for each in result.clients} for result in (told, found))
        for name, each in at_once.items():
            other = grouped[name]
            assert (each.share, each.verdict, each.round) == (other.share, other.verdict, other.round)
            assert each.norm == pytest.approx(other.norm, rel=1e-12)  # squares are added up in another order
        assert at_once.keys() == grouped.keys()


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def original(module_folder: Path) -> JobFolder:
    """A job with four updates, and the sum of the first two."""
    job = job_with_updates(module_folder / "original")
    merged(job, "ann", "bob", out="u-sum", partial=True)
    return job


@pytest.fixture
def job(original: JobFolder, folder: Path) -> JobFolder:
    """A copy of it, to be changed."""
    return original.copied(folder / "job")


def forge(job: JobFolder, change: Callable[[dict[str, Any]], object], *, sealed: bool = True) -> None:
    """Change the manifest of the partial sum; `sealed` by someone who has the key."""
    folder = job.root / "u-sum"
    manifest = read_manifest(folder, PartialManifest)
    document = json.loads(manifest_bytes(manifest))
    document["files"] = {PARTIAL_TENSORS: file_digest(folder / PARTIAL_TENSORS)}
    change(document)
    changed = PartialManifest.from_document(document, "")
    (folder / "partial.json").write_bytes(manifest_bytes(changed.sealed(job_key.load(job.key)) if sealed else changed))


def rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[JobFolder], None]:
    """Change the tensors of the partial sum, and seal them as they are."""

    def write(job: JobFolder) -> None:
        path = job.root / "u-sum" / PARTIAL_TENSORS
        tensors = read_file(path)
        change(tensors)
        write_file(path, tensors)
        forge(job, lambda manifest: None)

    return write


def sealed(change: Callable[[dict[str, Any]], object]) -> Callable[[JobFolder], None]:
    """Change the manifest, and seal it."""
    return lambda job: forge(job, change)


def client(**facts: Any) -> Callable[[JobFolder], None]:
    return sealed(lambda manifest: manifest["clients"][0].update(facts))


NAME = "bert.encoder.layer.0.attention.self.query"
HOSTILE: dict[str, tuple[Callable[[JobFolder], object], str]] = {
    "changed without the key": (
        lambda job: forge(job, lambda manifest: manifest["clients"][0].update(num_examples=11), sealed=False),
        "its seal is wrong",
    ),
    "more examples than its updates had": (client(num_examples=500), "claims 500 examples, more than 10 times"),
    "a proxy that was never released": (client(proxy_id="0" * 64), "the ledger has no proxy 000000000000"),
    "another client's proxy": (client(client="cat"), "no proxy .* of client 'cat'"),
    "another job": (sealed(lambda manifest: manifest.update(job="0" * 64)), "another job or plan"),
    "another plan": (sealed(lambda manifest: manifest.update(plan="0" * 64)), "another job or plan"),
    "another model": (sealed(lambda manifest: manifest.update(model_digest="0" * 64)), "made of another model"),
    "a client twice in it": (
        sealed(lambda manifest: manifest["clients"].append(manifest["clients"][0])),
        "'ann' sent more than one update",
    ),
    "another file": (sealed(lambda manifest: manifest["files"].update(other="0" * 64)), "must list exactly"),
    "clipped": (sealed(lambda manifest: manifest.update(clip_norm=1.0)), "merged with --clip-norm 1.0, not None"),
    "an update that is too large": (client(relative_norm=11.0), "the norm of client 'ann' is 11 times"),
    "a unit that moves too far": (
        client(largest_unit={"tensor": NAME, "unit": 3, "ratio": 12.5}),
        "client 'ann' moves unit 3 of .* by 12.5 times",
    ),
    "no clients": (lambda job: text(job, clients=[]), "field clients"),
    "a tensor too few": (rewrite(lambda tensors: tensors.pop(f"{NAME}.weight.sum")), "not those of a sum"),
    "another shape": (
        rewrite(lambda tensors: tensors.update({f"{NAME}.bias.sum": ("I64", np.zeros((33, 1, 1), np.int64))})),
        "not those of a sum",
    ),
    "another dtype": (
        rewrite(lambda tensors: tensors.update({f"{NAME}.bias.sum": ("F64", np.full((33, 2, 1), np.nan))})),
        "not those of a sum",
    ),
    "numbers that no two updates add up to": (
        rewrite(lambda tensors: tensors[f"{NAME}.weight.sum"][1].__setitem__((0, 0, 0), 2 << 49)),
        "is not a sum of 2 updates",
    ),
    "a number beyond the norms of its updates": (
        rewrite(lambda tensors: tensors[f"{NAME}.weight.sum"][1].__setitem__((0, 0, 0), 1 << 30)),
        r"is not a sum of 2 updates with the norms in partial\.json",
    ),
    "the least number": (
        rewrite(lambda tensors: tensors[f"{NAME}.weight.sum"][1].__setitem__((0, 0, 0), -(1 << 63))),
        "is not a sum of 2 updates",
    ),
    "halves that do not belong together": (
        rewrite(lambda tensors: tensors[f"{NAME}.weight.sum"][1].__setitem__((0, 1, 0), 1 << 47)),
        "is not a sum of 2 updates",
    ),
    "a unit that counts more than its clients": (
        rewrite(lambda tensors: tensors[f"{NAME}.weight.weights"][1].__setitem__(0, 22)),
        "counts more than its clients' 21 examples",
    ),
    "a unit that counts less than nothing": (
        rewrite(lambda tensors: tensors[f"{NAME}.weight.weights"][1].__setitem__(0, -1)),
        "or fewer than none",
    ),
    "a changed file": (lambda job: flip(job.root / "u-sum" / PARTIAL_TENSORS), "its digest is not the one"),
    "a file that is too short": (lambda job: shorten(job.root / "u-sum" / PARTIAL_TENSORS), "safetensors"),
}


def text(job: JobFolder, **fields: Any) -> None:
    path = job.root / "u-sum/partial.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def flip(path: Path) -> None:
    """Change one last bit of a sum."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + 8] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_partial_sum_is_refused(job: JobFolder, kind: str) -> None:
    change, reason = HOSTILE[kind]
    change(job)
    with nothing_written(job.root), pytest.raises(FedqsnError, match=reason) as caught:
        merged(job, "sum", "cat", "dan")
    assert "u-sum" in str(caught.value)


def test_an_update_counts_once_however_it_comes(job: JobFolder) -> None:
    merged(job, "bob", "cat", out="u-other", partial=True)
    for names in (("sum", "bob"), ("sum", "other"), ("sum", "sum")):
        with nothing_written(job.root), pytest.raises(RefusedUpdate, match="'(ann|bob)' sent more than one update"):
            merged(job, *names)
    with nothing_written(job.root), pytest.raises(RefusedUpdate, match="client 'ann' sent an update too"):
        merged(job, "sum", "cat", control=job.root / "u-ann")


def test_a_refused_partial_sum_is_left_out_with_all_its_clients(job: JobFolder) -> None:
    HOSTILE["another client's proxy"][0](job)
    result = merged(job, "sum", "cat", "dan", on_refused="skip")
    assert [client.client for client in result.clients] == ["cat", "dan"]
    assert [Path(item.folder).name for item in result.refused] == ["u-sum"]
    with pytest.raises(RefusedUpdate, match="2 of 3 updates can be merged"):
        merged(job, "sum", "cat", "dan", out="more", on_refused="skip", min_clients=3)


def test_updates_in_partial_sums_count_towards_the_clients_that_are_needed(job: JobFolder) -> None:
    assert len(merged(job, "sum", "cat", min_clients=3).clients) == 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rule": "median", "byzantine": 0}, "median needs all updates at once"),
        ({"rule": "krum", "byzantine": 0}, "krum needs all updates at once"),
        ({"clip_norm": "auto"}, "the median of the norms needs all updates at once"),
        ({"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 0.1}, "noise needs all updates at once"),
        ({"clip_norm": 1.0}, "no --clip-norm, not 1.0"),
        ({"keep_adapter": "adapter"}, "an adapter is made of all updates"),
        ({"verify_key": "{client}.pub"}, "nobody checked the signatures"),
    ],
)
def test_a_merge_that_needs_the_updates_themselves_says_so(
    job: JobFolder, options: dict[str, Any], reason: str
) -> None:
    with nothing_written(job.root), pytest.raises(InputError, match=reason):
        merged(job, "sum", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "trimmed-mean", "byzantine": 1},
        {"clip_norm": "auto"},
        {"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 0.1},
        {"normalize": "clients"},
        {"server_lr": 0.5},
        {"server_optimizer": "momentum"},
        {"control": "u-dan"},
        {"keep_adapter": "adapter"},
        {"report": "page.html"},
        {"max_shard_size": "1MB"},
    ],
)
def test_a_partial_sum_takes_no_option_of_the_last_merge(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        MergeOptions("sum", key="key", ledger="ledger", partial=True, **options)


def test_steps_of_all_kinds_follow_a_partial_sum(job: JobFolder) -> None:
    """Server optimizers, controls and steps work on the sum of all, wherever it was made."""
    for number, options in enumerate(
        ({"server_optimizer": "momentum"}, {"server_lr": 0.3}, {"control": job.root / "u-dan"})
    ):
        merged(job, "ann", "bob", "cat", out=f"whole-{number}", **options)
        merged(job, "sum", "cat", out=f"summed-{number}", **options)
        assert contents(job.root / f"summed-{number}") == contents(job.root / f"whole-{number}")


def test_a_partial_sum_of_an_earlier_round_is_stale(job: JobFolder) -> None:
    merged(job, *CLIENTS, out="next")
    usual = {"key": job.key, "ledger": job.root / "ledger.jsonl"}
    with nothing_written(job.root), pytest.raises(RefusedUpdate, match="trained on proxies of another model"):
        merge(str(job.root / "next"), [job.root / "u-sum"], job.root / "third", **usual)


def test_inspect_says_what_is_in_a_partial_sum(job: JobFolder) -> None:
    found = inspect(str(job.root / "u-sum"))
    assert (found.kind, found.facts["clients"], found.facts["examples"]) == ("partial sum", 2, 21)
    with pytest.raises(InputError, match="this is the manifest of a partial"):
        inspect(str(job.root / "u-sum/partial.json"))


def test_a_partial_sum_is_replaced_with_force_only(job: JobFolder) -> None:
    before = contents(job.root / "u-sum")
    with pytest.raises(FedqsnError, match="already exists"):
        merged(job, "ann", "bob", out="u-sum", partial=True)
    merged(job, "bob", "ann", out="u-sum", partial=True, force=True)
    assert contents(job.root / "u-sum") == before


def test_values_that_cannot_be_summed_exactly_are_refused(job: JobFolder) -> None:
    shutil.rmtree(job.root / "u-ann")
    send(job.root / "proxies/ann", job.root / "u-ann", lambda name, shape: np.full(shape, 1e9), examples=10)
    limits = {"max_update_norm": 1e30, "max_unit_norm": 1e30}
    with nothing_written(job.root), pytest.raises(RefusedUpdate, match="cannot be summed exactly"):
        merged(job, **limits)
    skipped = merged(job, on_refused="skip", **limits)
    assert [item.client for item in skipped.refused] == ["ann"]
