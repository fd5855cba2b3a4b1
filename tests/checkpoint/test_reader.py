"""Checkpoints: what is found in a directory, how its bytes are read, and what an index may not say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from fedqsn_cli.checkpoint import Checkpoint, descriptors, reader
from fedqsn_cli.errors import FormatError, InputError

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def sharded(folder: Path, lies: dict[str, Any] | None = None, **index: Any) -> Path:
    """A checkpoint of two shards, two tensors each, with an index that may lie."""
    shards = {
        "model-00001-of-00002.safetensors": {"a": WEIGHT, "b": WEIGHT + 1},
        "model-00002-of-00002.safetensors": {"c": WEIGHT + 2, "d": WEIGHT + 3},
    }
    folder.mkdir(exist_ok=True)
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    truth = {name: file for file, tensors in shards.items() for name in tensors}
    document = {"metadata": {"total_size": 192}, "weight_map": truth | (lies or {})}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document | index))
    return folder


def test_a_directory_gives_config_tensors_manifests_and_companions(tmp_path: Path) -> None:
    save_file({"w": WEIGHT}, tmp_path / "model.safetensors", {"format": "pt"})
    save_file({"g": WEIGHT}, tmp_path / "visible.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "proxy.json").write_text('{"round": 1}')
    for name in ("tokenizer.json", "vocab.txt", "README.md", "training_args.bin", "modeling_x.py"):
        (tmp_path / name).write_text("{}")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.path == tmp_path
        assert checkpoint.config == {"model_type": "bert"}
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.proxy_manifest == {"round": 1}
        assert checkpoint.manifest is None
        assert [path.name for path in checkpoint.companions] == ["tokenizer.json", "vocab.txt"]
        assert list(checkpoint.entries) == ["w"]
        assert checkpoint.total_bytes == 48
        assert np.array_equal(checkpoint.read("w"), WEIGHT)


@pytest.mark.parametrize("name", [".tiktoken", "\x1b[31m.tiktoken", "a\nb.tiktoken", os.fsdecode(b"\xff.tiktoken")])
def test_a_companion_with_a_name_that_no_artifact_takes_is_refused(name: str, tmp_path: Path) -> None:
    save_file({"w": WEIGHT}, tmp_path / "model.safetensors")
    (tmp_path / name).write_text("dzE= 0\n")
    with pytest.raises(InputError, match="has a name that is not taken"):
        Checkpoint.open(tmp_path)


def test_one_safetensors_file_is_a_checkpoint_without_a_config(tmp_path: Path) -> None:
    save_file({"w": WEIGHT}, tmp_path / "any.safetensors")
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path / "any.safetensors", str(tmp_path / "any.safetensors")):
        checkpoint = Checkpoint.open(path)
        assert checkpoint.config is None
        assert checkpoint.companions == []
        assert np.array_equal(checkpoint.read("w"), WEIGHT)


def test_a_directory_with_exactly_one_safetensors_file_is_a_checkpoint(tmp_path: Path) -> None:
    save_file({"w": WEIGHT}, tmp_path / "adapter.safetensors")
    assert list(Checkpoint.open(tmp_path).entries) == ["w"]
    save_file({"v": WEIGHT}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="several safetensors files"):
        Checkpoint.open(tmp_path)


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path))
    assert list(checkpoint.entries) == ["a", "b", "c", "d"]
    assert all(np.array_equal(checkpoint.read(name), WEIGHT + i) for i, name in enumerate("abcd"))


def test_shards_that_are_links_into_a_cache_are_read(tmp_path: Path) -> None:
    sharded(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("..") / "blobs" / path.name)
    assert list(Checkpoint.open(snapshot).entries) == ["a", "b", "c", "d"]


SHARD = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        ".hidden.safetensors",
        "x\0.safetensors",
    ]
    + ["..\\x.safetensors", "C:\\x.safetensors", "model.bin", "a" * 300 + ".safetensors", 7, None, ["x"], {}, True],
)
def test_an_index_cannot_point_outside_of_its_directory(file: object, tmp_path: Path) -> None:
    save_file({"x": WEIGHT}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="not a file of this directory"):
        Checkpoint.open(sharded(tmp_path / "model", {"x": file}))


@pytest.mark.parametrize(
    ("index", "complaint"),
    {
        "tensor unknown to its shard": ({"weight_map": {"a": SHARD, "b": SHARD, "x": SHARD}}, "'x' is not in model"),
        "tensor of a shard left out": ({"weight_map": {"a": SHARD}}, "'b' of model-00001.* is not in the index"),
        "missing shard": ({"weight_map": {"a": "model-00003-of-00003.safetensors"}}, "there is no such file"),
        "climbing tensor name": ({"weight_map": {"../a": SHARD}}, "looks like a path"),
        "empty weight_map": ({"weight_map": {}}, "weight_map"),
        "weight_map is a list": ({"weight_map": [SHARD]}, "weight_map"),
        "weight_map is null": ({"weight_map": None}, "weight_map"),
    }.values(),
)
def test_an_index_that_disagrees_with_its_shards_is_refused(
    index: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=complaint):
        Checkpoint.open(sharded(tmp_path, **index))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"b": WEIGHT, "c": WEIGHT, "d": WEIGHT}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(FormatError, match="'b' of model-00002.* is not in the index"):
        Checkpoint.open(tmp_path)


def test_the_same_bytes_under_two_shard_names_are_refused(tmp_path: Path) -> None:
    save_file({"a": WEIGHT}, tmp_path / "one.safetensors")
    save_file({"a": WEIGHT}, tmp_path / "two.safetensors")
    text = '{"metadata":{},"weight_map":{"a":"one.safetensors","a":"two.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match="'a' is given twice"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": NaN}', "\ufeff{}", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "proxy.json", "fedqsn.json", "model.safetensors.index.json"])
def test_a_malformed_json_file_is_refused(name: str, text: str, tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(FormatError, match=name):
        Checkpoint.open(tmp_path)


def test_a_directory_with_a_file_and_an_index_is_ambiguous(tmp_path: Path) -> None:
    save_file({"a": WEIGHT}, sharded(tmp_path) / "model.safetensors")
    with pytest.raises(InputError, match="both model.safetensors and an index; remove one"):
        Checkpoint.open(tmp_path)


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(InputError, match="only pickled weights.*convert to safetensors first"):
        Checkpoint.open(tmp_path)


def test_a_directory_without_weights_or_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no safetensors file"):
        Checkpoint.open(tmp_path)
    with pytest.raises(InputError, match="there is no such file"):
        Checkpoint.open(tmp_path / "nothing")


ARRAYS = st.builds(
    lambda kind, shape, seed: np.frombuffer(
        np.random.default_rng(seed).bytes(int(np.prod(shape, dtype=int)) * np.dtype(kind).itemsize), kind
    ).reshape(shape),
    st.sampled_from(["u1", "i1", "<i2", "<u2", "<f2", "<i4", "<u4", "<f4", "<f8", "<i8", "<u8"]),
    st.lists(st.integers(0, 6), max_size=3).map(tuple),
    st.integers(0, 2**32),
)


@given(
    st.dictionaries(st.from_regex(r"[a-z]{1,8}(\.[a-z0-9]{1,8}){0,2}", fullmatch=True), ARRAYS, min_size=1, max_size=6)
)
def test_what_the_library_writes_we_read(tensors: dict[str, np.ndarray]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "model.safetensors")
        with Checkpoint.open(folder) as checkpoint:
            for name, array in tensors.items():
                ours = checkpoint.read(name)
                assert (ours.dtype, ours.shape, ours.tobytes()) == (array.dtype, array.shape, array.tobytes())
                assert ours.flags.c_contiguous
                assert ours.flags.writeable


def test_bfloat16_and_float8_come_as_their_raw_bits(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    values = torch.tensor([1.0, -2.5, float("nan"), 3e38])
    tensors = {"bf16": values.bfloat16(), "f8": values.to(torch.float8_e4m3fn), "bool": values > 0}
    save_torch(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.read("bf16").tolist() == tensors["bf16"].view(torch.uint16).tolist()
    assert checkpoint.read("f8").tolist() == tensors["f8"].view(torch.uint8).tolist()
    assert checkpoint.read("bool").tolist() == [True, False, False, True]


def test_a_bool_that_is_neither_true_nor_false_is_refused(tmp_path: Path) -> None:
    content = save({"flag": np.array([True, False])})
    (tmp_path / "model.safetensors").write_bytes(content[:-1] + b"\2")
    with pytest.raises(FormatError, match="neither 0 nor 1"):
        Checkpoint.open(tmp_path).read("flag")


@given(st.integers(0, 48), st.integers(0, 48))
def test_any_range_of_bytes_can_be_read_into_any_buffer(one: int, other: int) -> None:
    start, end = sorted((one, other))
    with tempfile.TemporaryDirectory() as folder:
        save_file({"first": WEIGHT - 1, "w": WEIGHT}, Path(folder) / "model.safetensors")
        checkpoint = Checkpoint.open(folder)
        buffer = bytearray(end - start)
        checkpoint.read_into("w", start, memoryview(buffer))
        assert bytes(buffer) == WEIGHT.tobytes()[start:end]
        array = np.zeros((end - start) // 4, np.float32)
        checkpoint.read_into("w", start, array)
        assert array.tobytes() == WEIGHT.tobytes()[start : start + array.nbytes]


def test_reading_outside_of_a_tensor_or_into_a_strided_buffer_is_a_bug(tmp_path: Path) -> None:
    save_file({"w": WEIGHT}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for start, size in ((-1, 4), (0, 49), (48, 1)):
        with pytest.raises(ValueError, match="outside of 'w'"):
            checkpoint.read_into("w", start, memoryview(bytearray(size)))
    with pytest.raises(ValueError, match="not C-contiguous"):
        checkpoint.read_into("w", 0, np.zeros((4, 4), np.uint8)[:, ::2])


def test_a_file_that_shrinks_or_changes_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": WEIGHT}, path)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.read("w")
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(FormatError, match="truncated while it was read"):
        checkpoint.read("w")
    checkpoint.close()
    with pytest.raises(FormatError, match="changed while it was in use"):
        checkpoint.read("w")


def test_a_checkpoint_that_replaced_another_is_not_confused_with_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": WEIGHT}, path)
    old = Checkpoint.open(tmp_path)
    old.read("w")
    save_file({"w": WEIGHT + 1}, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    assert np.array_equal(Checkpoint.open(tmp_path).read("w"), WEIGHT + 1)
    assert np.array_equal(old.read("w"), WEIGHT)  # still open


def test_a_checkpoint_can_be_read_again_after_close(tmp_path: Path) -> None:
    save_file({"w": WEIGHT}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.read("w")
    before = len(descriptors.DESCRIPTORS)
    checkpoint.close()
    assert len(descriptors.DESCRIPTORS) == before - 1
    assert np.array_equal(checkpoint.read("w"), WEIGHT)
    checkpoint.close()


def test_a_checkpoint_larger_than_half_of_the_memory_reads_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.random.default_rng(0).integers(0, 255, 5_000_000, np.uint8)
    save_file({"w": array}, tmp_path / "model.safetensors")
    monkeypatch.setattr(reader, "_memory_bytes", lambda: 4_000_000)
    checkpoint = Checkpoint.open(tmp_path)
    buffer = np.empty(1_000_000, np.uint8)
    for start in range(0, array.size, buffer.size):
        checkpoint.read_into("w", start, buffer)
        assert np.array_equal(buffer, array[start : start + buffer.size])


def test_an_expected_piece_is_shown_in_part_and_given_away_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array, read = np.arange(40_000, dtype=np.float32), list[tuple[int, int]]()
    save_file({"w": array}, tmp_path / "model.safetensors")
    as_it_is = descriptors.StoredFile._read

    def noted(self: descriptors.StoredFile, start: int, count: int) -> Any:
        read.append((start, count))
        return as_it_is(self, start, count)

    monkeypatch.setattr(descriptors.StoredFile, "_read", noted)
    with Checkpoint.open(tmp_path) as checkpoint:
        begin = checkpoint.entries["w"].start
        checkpoint.expect("w", 400, 4000)
        part, whole = checkpoint.view("w", 800, 400), checkpoint.read_fresh("w", 400, 4000)
        assert read == [(begin + 400, 4000)]
        assert np.array_equal(part.view("f4"), array[200:300]) and np.array_equal(whole.view("f4"), array[100:1100])
        whole[:] = 0  # whoever took it may write to it
        assert np.array_equal(checkpoint.read_fresh("w", 400, 4000).view("f4"), array[100:1100])
        assert np.array_equal(checkpoint.view("w", 800, 400).view("f4"), array[200:300])
        assert read[1:] == [(begin + 400, 4000), (begin + 800, 400)]


def test_pieces_that_nobody_asks_for_are_dropped_and_large_ones_are_not_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"w": np.arange(1000, dtype=np.uint8)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(descriptors, "LARGEST_EXPECTED", 100)
    monkeypatch.setattr(descriptors, "MOST_EXPECTED", 300)
    with Checkpoint.open(tmp_path) as checkpoint:
        file = checkpoint.files[tmp_path / "model.safetensors"]
        begin = checkpoint.entries["w"].start
        checkpoint.expect("w", 0, 101)
        assert not file._expected
        for start in range(0, 1000, 100):
            checkpoint.expect("w", start, 100)
        assert [start - begin for start, _ in file._expected] == [700, 800, 900]
        for start in range(0, 1000, 100):
            assert np.array_equal(checkpoint.read_fresh("w", start, 100), np.arange(start, start + 100).astype("u1"))


MANY = """
import resource, sys
import numpy as np
from pathlib import Path
from safetensors.numpy import save
from fedqsn_cli.checkpoint import Checkpoint, descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
folder = Path(sys.argv[1])
for i in range(1000):
    (folder / f"{i}.safetensors").write_bytes(save({"w": np.full(3, i, np.float32)}))
updates = [Checkpoint.open(folder / f"{i}.safetensors") for i in range(1000)]
for _ in range(2):
    for i, update in enumerate(updates):
        assert update.read("w").tolist() == [i, i, i]
assert len(descriptors.DESCRIPTORS) == 64, len(descriptors.DESCRIPTORS)
for update in updates:
    update.close()
assert len(descriptors.DESCRIPTORS) == 0
"""


def test_a_thousand_checkpoints_are_open_with_256_descriptors(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", MANY, tmp_path], env=environment, check=True, timeout=600)


def test_threads_share_few_descriptors_without_losing_one_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = descriptors.DescriptorPool(2)
    for module in (reader, descriptors):
        monkeypatch.setattr(module, "DESCRIPTORS", pool)
    for i in range(8):
        save_file({"w": np.full(5000, i, np.float32)}, tmp_path / f"{i}.safetensors")
    checkpoints = [Checkpoint.open(tmp_path / f"{i}.safetensors") for i in range(8)]
    wrong: list[object] = []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 8, 200):
            try:
                if not (checkpoints[i].read("w") == i).all():
                    wrong.append(i)
                if seed == 0:
                    checkpoints[i].close()
            except Exception as error:
                wrong.append(error)

    before = len(os.listdir("/proc/self/fd"))
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for checkpoint in checkpoints:
        checkpoint.close()
    assert wrong == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_mapped_bytes_are_those_of_the_file_and_writing_to_them_does_not_change_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32), "b": np.arange(5, dtype=np.int64)}, path)
    before = path.read_bytes()
    with Checkpoint.open(path) as checkpoint:
        mapped = {name: checkpoint.mapped(name) for name in ("a", "b")}
        assert all(mapped[name].tobytes() == checkpoint.read(name).tobytes() for name in mapped)
    mapped["b"][:] = 7  # they outlive the checkpoint
    assert mapped["b"].tobytes() == b"\x07" * 40
    assert path.read_bytes() == before


def test_a_file_that_was_replaced_is_not_mapped(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32)}, path)
    checkpoint = Checkpoint.open(path)
    path.unlink()
    save_file({"a": np.arange(7, dtype=np.float32)}, path)
    with pytest.raises(FormatError):
        checkpoint.mapped("a")
