"""A proxy's folder: one reader of visible.safetensors, which refuses what proxy.json and the tensors do not say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fedqsn_cli import inspect
from fedqsn_cli.artifacts.manifests import GroupUnits, ProxyManifest, Units, file_digest, read_manifest
from fedqsn_cli.artifacts.proxy_folder import VisibleUnits, open_visible, verify_proxy, write_visible
from fedqsn_cli.auditing.opened_proxy import open_proxy
from fedqsn_cli.checkpoint import ArtifactWriter
from fedqsn_cli.errors import FormatError, InputError
from fedqsn_cli.training.steps.visible import read_visible
from support.helpers import contents
from support.scenario import few
from support.training_jobs import dense_tensors, make_proxy, small_model

GROUP = "classifier.weight"  # 64 units; no other tensor belongs to this group
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("original")
    return make_proxy(small_model(here / "model"), here / "proxy")


@pytest.fixture
def proxy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "proxy"))


def change_flags(proxy: Path, change: Change) -> None:
    tensors = load_file(proxy / "visible.safetensors")
    change(tensors)
    save_file(tensors, proxy / "visible.safetensors")


def change_manifest(proxy: Path, change: Change) -> None:
    document = json.loads((proxy / "proxy.json").read_text())
    change(document)
    (proxy / "proxy.json").write_text(json.dumps(document))


def shapes_of(proxy: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in dense_tensors(proxy).items()}


def training(proxy: Path) -> object:
    return read_visible(proxy, read_manifest(proxy, ProxyManifest), shapes_of(proxy))


def audit(proxy: Path) -> object:
    return open_proxy(proxy, "proxy")


READERS: dict[str, Callable[[Path], object]] = {"training": training, "inspect": inspect, "audit": audit}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_every_reader_takes_what_was_exported(reader: Callable[[Path], object], proxy: Path) -> None:
    reader(proxy)


NO_GROUP = f"visible.safetensors has no group '{GROUP}' of the size in proxy.json"
NO_UNITS = f"the groups of tensor '{GROUP}' do not match its units"

# What contradicts itself, whoever reads it.
CONTRADICTIONS: dict[str, tuple[Change | None, Change | None, str]] = {
    "group missing": (lambda t: t.pop(GROUP), None, NO_GROUP),
    "too few bytes": (
        lambda t: t.update({GROUP: np.ones(7, np.uint8)}),
        None,
        NO_GROUP,
    ),
    "too many bytes": (
        lambda t: t.update({GROUP: np.ones(9, np.uint8)}),
        None,
        NO_GROUP,
    ),
    "signed bytes": (
        lambda t: t.update({GROUP: np.ones(8, np.int8)}),
        None,
        NO_GROUP,
    ),
    "bytes in rows": (
        lambda t: t.update({GROUP: np.ones((2, 4), np.uint8)}),
        None,
        NO_GROUP,
    ),
    "other size of a group": (
        None,
        lambda m: m["groups"].update({GROUP: {"units": 63}}),
        NO_UNITS,
    ),
    "unknown group": (
        None,
        lambda m: m["tensors"][GROUP].update(groups=["other"]),
        NO_UNITS,
    ),
    "no group": (
        None,
        lambda m: m["tensors"][GROUP].update(groups=[]),
        NO_UNITS,
    ),
    "two groups for one slice": (
        None,
        lambda m: m["tensors"][GROUP].update(groups=[GROUP, GROUP]),
        NO_UNITS,
    ),
    "no slices": (
        None,
        lambda m: m["tensors"][GROUP].update(view=[0, 5, 64]),
        NO_UNITS,
    ),
    "other axis": (
        None,
        lambda m: m["tensors"][GROUP].update(axis="row"),
        NO_UNITS,
    ),
    "other shape": (
        None,
        lambda m: m["tensors"][GROUP].update(view=[1, 6, 64]),
        f"tensor '{GROUP}' does not have the shape that proxy.json gives it",
    ),
    "unknown tensor": (
        None,
        lambda m: m["tensors"].update(other=m["tensors"][GROUP]),
        "tensor 'other' does not have the shape that proxy.json gives it",
    ),
    "group without a tensor": (
        None,
        lambda m: m["tensors"].pop(GROUP),
        "proxy.json lists a group that no tensor belongs to",
    ),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize(("flags", "manifest", "complaint"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_files_that_contradict_each_other_are_refused(
    flags: Change | None, manifest: Change | None, complaint: str, reader: Callable[[Path], object], proxy: Path
) -> None:
    if flags is not None:
        change_flags(proxy, flags)
    if manifest is not None:
        change_manifest(proxy, manifest)
    with pytest.raises(FormatError, match=complaint):
        reader(proxy)


def set_bits(group: str, *positions: int) -> Change:
    """Set single bits of a group and clear all others."""

    def change(tensors: dict[str, Any]) -> None:
        flags = np.zeros(tensors[group].size * 8, np.uint8)
        flags[list(positions)] = 1
        tensors[group] = np.packbits(flags)

    return change


# What no exporter writes: clients and `inspect` refuse it, the audit opens it and reports it.
INEXACT: dict[str, tuple[Change, str]] = {
    "another tensor": (lambda t: t.update(other=np.zeros(8, np.uint8)), "tensor 'other' is not a group"),
    "no unit": (set_bits(GROUP), f"group '{GROUP}' shows no unit"),
    "only bits after the last unit": (set_bits(GROUP, 71), f"group '{GROUP}' has bits set after its last unit"),
    "a bit after the last unit": (set_bits(GROUP, 3, 68), f"group '{GROUP}' has bits set after its last unit"),
}


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A proxy in which the units of a group do not fill its last byte."""
    here = tmp_path_factory.mktemp("ragged")
    model = small_model(here / "model", hidden_size=68, num_attention_heads=2)
    return make_proxy(model, here / "proxy")


@pytest.mark.parametrize("reader", [training, inspect], ids=["training", "inspect"])
@pytest.mark.parametrize(("change", "complaint"), INEXACT.values(), ids=INEXACT)
def test_flags_that_no_exporter_writes_are_refused(
    change: Change, complaint: str, reader: Callable[[Path], object], ragged: Path, tmp_path: Path
) -> None:
    proxy = Path(shutil.copytree(ragged, tmp_path / "proxy"))
    change_flags(proxy, change)
    with pytest.raises(FormatError, match=complaint):
        reader(proxy)


@pytest.mark.parametrize(
    ("name", "problems"),
    [
        ("another tensor", (["other"], False, True)),
        ("no unit", ([], False, False)),
        ("only bits after the last unit", ([], True, False)),
        ("a bit after the last unit", ([], True, True)),
    ],
)
def test_the_audit_opens_flags_that_no_exporter_writes_and_sees_what_is_wrong(
    name: str, problems: tuple[list[str], bool, bool], ragged: Path, tmp_path: Path
) -> None:
    proxy = Path(shutil.copytree(ragged, tmp_path / "proxy"))
    change_flags(proxy, INEXACT[name][0])
    units = open_proxy(proxy, "proxy").units
    assert (units.unknown_tensors(), units.has_spare_bits(GROUP), bool(units.flags(GROUP).any())) == problems


def stacked(folder: Path, flags: dict[str, np.ndarray]) -> tuple[Path, ProxyManifest]:
    """A folder with visible.safetensors for one stack of two matrices (2, 4), a group of rows for each."""
    document = read_manifest(folder, ProxyManifest).model_dump(mode="json")
    document |= {
        "groups": {name: {"units": 2} for name in ("one", "two")},
        "tensors": {"stack": {"groups": ["one", "two"], "axis": "row", "view": [2, 2, 4]}},
    }
    save_file(flags, folder / "visible.safetensors")
    return folder, ProxyManifest.model_validate(document)


def test_slices_with_different_numbers_of_units_are_refused(proxy: Path) -> None:
    folder, manifest = stacked(
        proxy, {"one": np.array([0b11000000], np.uint8), "two": np.array([0b10000000], np.uint8)}
    )
    with pytest.raises(FormatError, match="the slices of tensor 'stack' show different numbers of units"):
        read_visible(folder, manifest, {"stack": (2, 2, 4)})


def test_each_slice_has_its_own_units(proxy: Path) -> None:
    folder, manifest = stacked(
        proxy, {"one": np.array([0b01000000], np.uint8), "two": np.array([0b10000000], np.uint8)}
    )
    mask = read_visible(folder, manifest, {"stack": (2, 2, 4)})["stack"]
    assert mask.flags.tolist() == [False, True, True, False]


def test_a_proxy_without_visible_units_is_refused(proxy: Path) -> None:
    (proxy / "visible.safetensors").unlink()
    for reader in READERS.values():
        with pytest.raises(InputError, match=r"visible\.safetensors"):
            reader(proxy)


@few(30)
@given(
    sizes=st.dictionaries(st.sampled_from(["a", "b", "c.d"]), st.integers(1, 40), min_size=1), seed=st.integers(0, 99)
)
def test_flags_come_back_as_they_were_written(
    sizes: dict[str, int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(seed)
    flags = {name: rng.random(units) < 0.5 for name, units in sizes.items()}
    folder = tmp_path_factory.mktemp("flags") / "out"
    with ArtifactWriter(folder, force=False) as writer:
        write_visible(writer, sizes, lambda name, _: flags[name])
        writer.publish()
    stored = load_file(folder / "visible.safetensors")
    assert {name: stored[name].tobytes() for name in sizes} == {n: np.packbits(f).tobytes() for n, f in flags.items()}
    units = visible_units(folder, sizes)
    assert all(np.array_equal(units.flags(name), flags[name]) for name in sizes)
    assert not any(units.has_spare_bits(name) for name in sizes)


def visible_units(folder: Path, sizes: dict[str, int]) -> VisibleUnits:
    manifest = ProxyManifest.model_construct(
        groups={name: GroupUnits(units=units) for name, units in sizes.items()},
        tensors={name: Units(groups=(name,), axis="row", view=(1, units, 3)) for name, units in sizes.items()},
    )
    return open_visible(folder, manifest, {name: (units, 3) for name, units in sizes.items()})


LARGE = 1 << 20  # units


def test_large_groups_are_kept_in_memory_one_at_a_time(tmp_path: Path) -> None:
    sizes = {"small": 3, "large": LARGE + 1, "larger": LARGE + 9}
    with ArtifactWriter(tmp_path / "out", force=False) as writer:
        write_visible(writer, sizes, lambda _, units: np.ones(units, np.bool_))
        writer.publish()
    units = visible_units(tmp_path / "out", sizes)
    kept = []
    for name in ("small", "large", "small", "larger"):
        assert units.flags(name).size == sizes[name]
        kept.append(set(units._flags))
    assert kept == [{"small"}, {"large"}, {"small", "large"}, {"larger"}]


def test_several_threads_may_ask_for_large_groups(tmp_path: Path) -> None:
    sizes = {name: LARGE + 1 + number for number, name in enumerate("abcd")}
    with ArtifactWriter(tmp_path / "out", force=False) as writer:
        write_visible(writer, sizes, lambda _, units: np.ones(units, np.bool_))
        writer.publish()
    units = visible_units(tmp_path / "out", sizes)
    names = list(sizes) * 50
    with ThreadPoolExecutor(4) as threads:
        assert [flags.size for flags in threads.map(units.flags, names)] == [sizes[name] for name in names]


def test_a_proxy_is_verified_file_by_file(proxy: Path) -> None:
    manifest = verify_proxy(proxy)
    assert manifest.files == {name: file_digest(proxy / name) for name in contents(proxy) if name != "proxy.json"}
