"""The artifact writer: planned headers, bytes in any order, one rename, nothing half-made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fedqsn_cli.checkpoint import ArtifactWriter, Checkpoint, TensorSpec, files, stream
from fedqsn_cli.checkpoint.tensor_sink import split_into_shards
from fedqsn_cli.errors import InputError, OutputExists
from support.checkpoints import BYTES, SPECS, fill, make


def test_an_artifact_appears_whole_and_reads_back_with_the_library(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ArtifactWriter(out, force=False) as writer:
        fill(writer)
        assert not out.exists()
        writer.publish()
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(out)) == ["model.safetensors", "proxy.json"]
    assert {name: array.tobytes() for name, array in load_file(out / "model.safetensors").items()} == BYTES
    assert Checkpoint.open(out).metadata == {"format": "pt"}


def test_digests_are_those_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("word\n" * 1000)
    with ArtifactWriter(tmp_path / "out", force=False) as writer:
        fill(writer, max_shard_bytes=20)
        writer.add_file("vocab.txt", tmp_path / "vocab.txt")
        digests = writer.digests
        out = writer.publish()
    assert digests == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
    assert len(digests) == 5


def test_missing_parents_are_made_and_unmade(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with pytest.raises(ZeroDivisionError), ArtifactWriter(out, force=False):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    assert make(out) == out


def test_a_relative_path_works_after_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ArtifactWriter(Path("out"), force=False) as writer:
        fill(writer)
        monkeypatch.chdir("/")
        writer.publish()
    assert os.listdir(tmp_path) == ["out"]


def test_a_parent_that_cannot_hold_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / ("x" * 255)):
        with pytest.raises(InputError, match="cannot"):
            ArtifactWriter(out, force=False)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.timeout(120)
def test_a_file_system_that_makes_no_folders_is_no_endless_loop() -> None:
    with pytest.raises(InputError, match="cannot be created"):
        ArtifactWriter(Path("/proc/1/out"), force=False)


@pytest.mark.parametrize("force", [False, True])
def test_the_root_folder_is_never_replaced(force: bool) -> None:
    with pytest.raises(OutputExists, match="not made by fedqsn"):
        ArtifactWriter(Path("/"), force=force)


# Existing outputs


def existing(tmp_path: Path, kind: str) -> Path:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        make(tmp_path / "artifact")
        out.symlink_to("artifact")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "thesis.tex").write_text("mine")
    return out


@pytest.mark.parametrize("kind", ["file", "folder", "empty", "link"])
@pytest.mark.parametrize("force", [False, True])
def test_what_fedqsn_did_not_make_is_never_replaced(force: bool, kind: str, tmp_path: Path) -> None:
    out = existing(tmp_path, kind)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(OutputExists, match="not made by fedqsn"):
        ArtifactWriter(out, force=force)
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("manifest", ["fedqsn.json", "proxy.json", "update.json"])
def test_force_replaces_an_artifact(manifest: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / manifest).write_text("old")
    (out / "model-00001-of-00002.safetensors").write_text("old")
    make(out, force=True)
    assert sorted(os.listdir(out)) == ["model.safetensors", "proxy.json"]
    assert os.listdir(tmp_path) == ["out"]


def test_force_replaces_no_artifact_of_another_kind(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(OutputExists, match=r"is another kind of output: it has no fedqsn\.json; choose another path"):
        ArtifactWriter(out, force=True, replaces=["fedqsn.json"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    ArtifactWriter(out, force=True, replaces=["update.json", "proxy.json"]).abort()


def test_without_force_an_artifact_stays(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(OutputExists):
        ArtifactWriter(tmp_path / "out", force=False)
    assert sorted(os.listdir(tmp_path / "out")) == ["model.safetensors", "proxy.json"]


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_that_appears_meanwhile_is_left_alone(force: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ArtifactWriter(out, force=force) as writer:
        fill(writer)
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
        with pytest.raises(OutputExists):
            writer.publish()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["thesis.tex"]


def test_a_directory_that_appears_at_the_last_instant_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make(tmp_path / "out")
    exchange = files.exchange

    def replaced_first(source: Path, target: Path) -> None:
        if (target / "model.safetensors").exists() and (source / "model.safetensors").exists():
            shutil.rmtree(target)
            target.mkdir()
            (target / "thesis.tex").write_text("mine")
        exchange(source, target)

    monkeypatch.setattr(files, "exchange", replaced_first)
    with ArtifactWriter(out, force=True) as writer:
        fill(writer)
        with pytest.raises(OutputExists, match="replaced while"):
            writer.publish()
    assert os.listdir(out) == ["thesis.tex"]
    assert os.listdir(tmp_path) == ["out"]


def test_an_exchange_killed_between_two_renames_is_undone_by_the_next_run(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    out.rename(files.aside_path(out))
    with pytest.raises(OutputExists):
        ArtifactWriter(out, force=False)
    assert os.listdir(tmp_path) == ["out"]
    shutil.copytree(out, files.aside_path(out))
    make(out, force=True)
    assert os.listdir(tmp_path) == ["out"]


def test_two_writers_of_one_path_do_not_disturb_each_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ArtifactWriter(out, force=False) as first, ArtifactWriter(out, force=False) as second:
        fill(first)
        fill(second)
        first.publish()
        with pytest.raises(OutputExists):
            second.publish()
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(out)) == ["model.safetensors", "proxy.json"]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    for mask in (0o022, 0o027, 0o077):
        before = os.umask(mask)
        try:
            out = make(tmp_path / f"out{mask}", max_shard_bytes=20)
        finally:
            os.umask(before)
        assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~mask
        assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o666 & ~mask}


# Tensors


def spec_lists(size: int) -> st.SearchStrategy[list[TensorSpec]]:
    dtypes = st.sampled_from(["U8", "I8", "F16", "BF16", "F32", "I64"])
    shapes = st.lists(st.integers(0, size), min_size=1, max_size=2).map(tuple)
    return st.lists(st.tuples(dtypes, shapes), min_size=1, max_size=8).map(
        lambda pairs: [TensorSpec(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(pairs)]
    )


@given(spec_lists(60), st.integers(1, 5000))
def test_shards_are_cut_as_huggingface_hub_cuts_them(specs: list[TensorSpec], limit: int) -> None:
    theirs = split_state_dict_into_shards_factory(
        {spec.name: spec for spec in specs},
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    ours = [[spec.name for spec in shard] for shard in split_into_shards(specs, limit)]
    assert ours == list(theirs.filename_to_tensors.values())


@settings(max_examples=60, deadline=None)
@given(st.data(), spec_lists(90), st.booleans(), st.booleans())
def test_bytes_in_any_order_and_any_pieces_give_the_same_file(
    data: st.DataObject, specs: list[TensorSpec], shuffled: bool, sharded: bool
) -> None:
    contents = {spec.name: np.random.default_rng(i).bytes(spec.nbytes) for i, spec in enumerate(specs)}
    pieces = []
    for spec in specs:
        cuts = sorted(data.draw(st.sets(st.integers(0, spec.nbytes), max_size=4)) | {0, spec.nbytes})
        pieces += [(spec.name, start, contents[spec.name][start:end]) for start, end in pairwise(cuts)]
    if shuffled:
        pieces = data.draw(st.permutations(pieces))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "BUFFER_BYTES", 4096)
        with ArtifactWriter(Path(folder) / "out", force=False) as writer:
            sink = writer.tensors("model", specs, max_shard_bytes=3000 if sharded else None, metadata={})
            for piece in pieces:
                sink.write(*piece)
            sink.close()
            digests = writer.digests
            out = writer.publish()
        checkpoint = Checkpoint.open(out)
        assert {name: checkpoint.read(name).tobytes() for name in checkpoint.entries} == contents
        for path in out.glob("*.safetensors"):
            load_file(path) if not any(spec.dtype == "BF16" for spec in specs) else None
            assert digests[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_index_says_where_each_tensor_is(tmp_path: Path) -> None:
    out = make(tmp_path / "out", max_shard_bytes=20)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 51},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "odd": "model-00002-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        },
    }
    assert len(list(out.glob("model-*"))) == 2


def test_arrays_of_any_dtype_shape_and_layout_are_accepted(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    specs = [TensorSpec("w", "F32", (6, 4)), TensorSpec("s", "F32", ()), TensorSpec("e", "F32", (0, 3))]
    with ArtifactWriter(tmp_path / "out", force=False) as writer:
        sink = writer.tensors("model", specs, max_shard_bytes=None, metadata={})
        sink.write("w", 0, array.T)
        sink.write("s", 0, np.float32(7).reshape(()))
        sink.write("e", 0, np.zeros((0, 3), np.float32))
        sink.close()
        out = writer.publish()
    assert np.array_equal(load_file(out / "model.safetensors")["w"], array.T)


def test_a_buffer_may_be_used_again_at_once(tmp_path: Path) -> None:
    count, size = 40, 1 << 20
    with ArtifactWriter(tmp_path / "out", force=False) as writer:
        sink = writer.tensors("model", [TensorSpec("w", "U8", (count, size))], max_shard_bytes=None, metadata={})
        buffer = np.empty(size, np.uint8)
        for i in range(count):
            buffer[:] = i
            sink.write("w", i * size, buffer)
        sink.close()
        out = writer.publish()
    assert (Checkpoint.open(out).read("w") == np.arange(count, dtype=np.uint8)[:, None]).all()


def test_many_threads_may_write_at_once(tmp_path: Path) -> None:
    size = 3 << 20
    specs = [TensorSpec(f"t{i}", "U8", (size + i,)) for i in range(8)]
    with ArtifactWriter(tmp_path / "out", force=False) as writer:
        sink = writer.tensors("model", specs, max_shard_bytes=None, metadata={})

        def write(number: int) -> None:
            data = np.full(specs[number].nbytes, number, np.uint8)
            for start in range(0, data.size, 700_001):
                sink.write(specs[number].name, start, data[start : start + 700_001])

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sink.close()
        digest = writer.digests["model.safetensors"]
        out = writer.publish()
    checkpoint = Checkpoint.open(out)
    assert all((checkpoint.read(f"t{i}") == i).all() for i in range(8))
    assert digest == hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def test_a_byte_written_twice_outside_or_never_is_a_bug(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out", force=False) as writer:
        sink = writer.tensors("model", SPECS, max_shard_bytes=None, metadata={})
        sink.write("a", 0, bytes(16))
        sink.write("b", 4, bytes(8))
        for name, offset, size in (("a", 0, 1), ("a", 15, 1), ("b", 0, 5), ("b", 11, 2), ("b", 4, 8), ("b", 0, 16)):
            with pytest.raises(RuntimeError, match="written twice"):
                sink.write(name, offset, bytes(size))
        for name, offset, size in (("a", 31, 2), ("a", -1, 1), ("odd", 0, 4)):
            with pytest.raises(RuntimeError, match="bytes .* of"):
                sink.write(name, offset, bytes(size))
        with pytest.raises(KeyError):
            sink.write("c", 0, b"")
        with pytest.raises(RuntimeError, match="bytes are missing"):
            sink.close()
        with pytest.raises(RuntimeError, match="before every sink is closed"):
            writer.publish()
    assert os.listdir(tmp_path) == []


def test_after_close_publish_or_abort_nothing_more_is_taken(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out", force=False) as writer:
        sink = writer.tensors("model", SPECS, max_shard_bytes=None, metadata={})
        for name, data in BYTES.items():
            sink.write(name, 0, data)
        sink.close()
        with pytest.raises(RuntimeError, match="after close"):
            sink.write("a", 0, b"x")
        writer.publish()
        with pytest.raises(ValueError):
            writer.add_bytes("late.json", b"")
        with pytest.raises(RuntimeError):
            writer.publish()
    aborted = ArtifactWriter(tmp_path / "other", force=False)
    sink = aborted.tensors("model", SPECS, max_shard_bytes=None, metadata={})
    aborted.abort()
    aborted.abort()
    with pytest.raises(RuntimeError, match="after close"):
        sink.write("a", 0, b"x")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "", ".", "..", ".lock", "a\0", "a\\b", "x" * 256])
def test_a_name_that_is_no_plain_file_name_is_a_bug(name: str, tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out", force=False) as writer, pytest.raises(ValueError):
        writer.add_bytes(name, b"")


def test_a_file_is_copied_not_linked(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("text")
    (tmp_path / "link").symlink_to("source")
    with ArtifactWriter(tmp_path / "out", force=False) as writer:
        writer.add_file("copy.txt", tmp_path / "link")
        with pytest.raises(InputError, match="there is no such file"):
            writer.add_file("other.txt", tmp_path / "nothing")
        with pytest.raises(InputError, match="not a regular file"):
            writer.add_file("folder.txt", tmp_path)
        writer.add_bytes("update.json", b"{}")
        out = writer.publish()
    (tmp_path / "source").write_text("changed")
    assert (out / "copy.txt").read_text() == "text"
    assert not (out / "copy.txt").is_symlink()
