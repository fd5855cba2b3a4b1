"""Sealed folders: only the recipient opens them, and only as they were sealed."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli import seal, strictjson, unseal
from fedqsn_cli.checkpoint import ArtifactWriter
from fedqsn_cli.crypto import stream
from fedqsn_cli.crypto.folder import FORMAT, folder_stream, write_folder
from fedqsn_cli.errors import FormatError, InputError, KeyFileError, OutputExists, SignatureError
from support.helpers import contents, nothing_written
from support.signing import Party, party, sign_folder

ALICE, EVE = X25519PrivateKey.generate(), X25519PrivateKey.generate()


SMALL = 16  # bytes of a chunk


def sealed(plain: bytes) -> bytes:
    return b"".join(stream.encrypt([plain], ALICE.public_key(), SMALL))


def opened(data: bytes, key: X25519PrivateKey = ALICE, chunk_bytes: int = SMALL) -> bytes:
    return b"".join(stream.decrypt(io.BytesIO(data).read, key, "sealed", chunk_bytes))


def parts(data: bytes) -> list[bytes]:
    """Header and chunks."""
    size = SMALL + stream.TAG
    return [data[:48], *(data[at : at + size] for at in range(48, len(data), size))]


@given(pieces=st.lists(st.binary(max_size=70), max_size=6), size=st.integers(1, 40))
def test_a_stream_comes_back_whatever_the_pieces(pieces: list[bytes], size: int) -> None:
    data = b"".join(stream.encrypt(pieces, ALICE.public_key(), size))
    plain = b"".join(pieces)
    assert opened(data, chunk_bytes=size) == plain
    assert len(data) == 48 + len(plain) + stream.TAG * max(1, -(-len(plain) // size))


@given(data=st.data(), plain=st.binary(max_size=60))
def test_any_changed_byte_and_any_cut_is_refused(data: st.DataObject, plain: bytes) -> None:
    whole = sealed(plain)
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    flipped = whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :]
    for other in (flipped, whole[:at], whole + b"\0"):
        with pytest.raises(FormatError):
            opened(other)


def test_chunks_cannot_be_swapped_repeated_dropped_or_taken_from_another_stream() -> None:
    one, other = parts(sealed(bytes(range(64)))), parts(sealed(bytes(range(64))))
    assert len(one) == 5
    wrong = [
        [one[0], one[2], one[1], *one[3:]],
        [*one[:2], one[1], *one[2:]],
        [one[0], *one[2:]],
        one[:-1],
        [one[0], one[-1]],
        [one[0], other[1], *one[2:]],
        [other[0], *one[1:]],
        one[:1],
    ]
    for chosen in wrong:
        with pytest.raises(FormatError, match="does not open"):
            opened(b"".join(chosen))


def test_nobody_else_opens_it() -> None:
    with pytest.raises(FormatError, match="does not open"):
        opened(sealed(b"weights"), EVE)


def test_sealing_twice_gives_different_bytes() -> None:
    assert sealed(b"weights") != sealed(b"weights")


@pytest.mark.parametrize("point", [bytes(32), b"\1" + bytes(31)])
def test_a_point_of_small_order_is_refused(point: bytes) -> None:
    with pytest.raises(FormatError, match="does not open"):
        opened(stream.MAGIC + point + bytes(40))


@pytest.mark.parametrize("data", [b"", b"fedqsn-sealed/2\n" + bytes(64), stream.MAGIC + bytes(31)])
def test_something_else_is_named(data: bytes) -> None:
    with pytest.raises(FormatError, match="is not a sealed folder"):
        opened(data)


# ------------------------------------------------------------------------------------------------ folders


@pytest.fixture
def people(tmp_path: Path) -> tuple[Party, Party]:
    """Owner and alice."""
    return party(tmp_path, "owner"), party(tmp_path, "alice")


@pytest.fixture
def proxy(tmp_path: Path) -> Path:
    folder = tmp_path / "proxy"
    folder.mkdir()
    (folder / "proxy.json").write_bytes(b"{}\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 9000)  # more than two chunks
    (folder / "empty.json").write_bytes(b"")
    return folder


def test_a_proxy_travels_sealed_and_signed(tmp_path: Path, people: tuple[Party, Party], proxy: Path) -> None:
    owner, alice = people
    sign_folder(proxy, owner)
    made = seal(proxy, tmp_path / "a.sealed", to=alice.public)
    assert b"safetensors" not in Path(made.path).read_bytes()
    result = unseal(made.path, tmp_path / "in" / "proxy", key=alice.private, verify_key=owner.public)
    assert result.verified and contents(Path(result.path)) == contents(proxy)


def test_only_the_recipient_opens_and_only_the_senders_signature_counts(
    tmp_path: Path, people: tuple[Party, Party], proxy: Path
) -> None:
    owner, alice = people
    seal(proxy, tmp_path / "a.sealed", to=alice.public)
    with nothing_written(tmp_path), pytest.raises(FormatError, match="does not open"):
        unseal(tmp_path / "a.sealed", tmp_path / "out", key=owner.private)
    with nothing_written(tmp_path), pytest.raises(SignatureError, match="a.sealed: is not signed"):
        unseal(tmp_path / "a.sealed", tmp_path / "out", key=alice.private, verify_key=owner.public)
    sign_folder(proxy, alice)
    seal(proxy, tmp_path / "b.sealed", to=alice.public)
    with nothing_written(tmp_path), pytest.raises(SignatureError, match=r"b.sealed/model.sig: .* another key"):
        unseal(tmp_path / "b.sealed", tmp_path / "out", key=alice.private, verify_key=owner.public)


def test_a_cut_file_leaves_nothing_behind(tmp_path: Path, people: tuple[Party, Party], proxy: Path) -> None:
    _, alice = people
    path = tmp_path / "a.sealed"
    seal(proxy, path, to=alice.public)
    data = path.read_bytes()
    for end in (20, 48, 1 << 20, (1 << 20) + 48 + 16, len(data) - 1):
        path.write_bytes(data[:end])
        with nothing_written(tmp_path), pytest.raises(FormatError):
            unseal(path, tmp_path / "out", key=alice.private)


def test_nothing_is_replaced_and_nothing_of_the_owner_is_sealed(
    tmp_path: Path, people: tuple[Party, Party], proxy: Path
) -> None:
    _, alice = people
    seal(proxy, tmp_path / "a.sealed", to=alice.public)
    with nothing_written(tmp_path), pytest.raises(OutputExists):
        seal(proxy, tmp_path / "a.sealed", to=alice.public)
    with nothing_written(tmp_path), pytest.raises(InputError, match="inside of the folder"):
        seal(proxy, proxy / "a.sealed", to=alice.public)
    with nothing_written(tmp_path), pytest.raises(KeyFileError):
        seal(proxy, tmp_path / "b.sealed", to=alice.private)
    (proxy / "proxy.json").rename(proxy / "fedqsn.json")
    with nothing_written(tmp_path), pytest.raises(InputError, match="neither a proxy nor an update"):
        seal(proxy, tmp_path / "b.sealed", to=alice.public)


def test_a_folder_with_something_else_in_it_is_refused(
    tmp_path: Path, people: tuple[Party, Party], proxy: Path
) -> None:
    _, alice = people
    (proxy / "more").mkdir()
    with nothing_written(tmp_path), pytest.raises(InputError, match="not a regular file"):
        seal(proxy, tmp_path / "a.sealed", to=alice.public)
    (proxy / "more").rmdir()
    os.mkfifo(proxy / "more")
    with nothing_written(tmp_path), pytest.raises(InputError, match="not a regular file"):
        seal(proxy, tmp_path / "a.sealed", to=alice.public)
    (proxy / "more").unlink()
    (proxy / "more").symlink_to(alice.private)
    with nothing_written(tmp_path), pytest.raises(InputError, match="is a link"):
        seal(proxy, tmp_path / "a.sealed", to=alice.public)
    (proxy / "more").unlink()
    (proxy / ".hidden").write_bytes(b"")
    with nothing_written(tmp_path), pytest.raises(InputError, match="name that is not taken"):
        seal(proxy, tmp_path / "a.sealed", to=alice.public)


def hostile(files: object, data: bytes = b"", format: str = FORMAT) -> Iterator[bytes]:
    """A stream that a sender with other software could make."""
    index = strictjson.dumps({"files": files, "format": format}).encode()
    yield len(index).to_bytes(8, "big") + index + data


@pytest.mark.parametrize(
    "files",
    [
        [{"name": "../x", "size": 0}],
        [{"name": "/x", "size": 0}],
        [{"name": "a/b", "size": 0}],
        [{"name": "..", "size": 0}],
        [{"name": ".x", "size": 0}],
        [{"name": "", "size": 0}],
        [{"name": "x\0", "size": 0}],
        [{"name": 7, "size": 0}],
        [{"name": "x", "size": -1}],
        [{"name": "x", "size": True}],
        [{"name": "x", "size": 0.0}],
        [{"name": "x", "size": 0}, {"name": "x", "size": 0}],
        [{"name": "x", "size": 0, "link": "/etc/passwd"}],
        [{"name": "x", "size": 0, "mode": 0o60660, "device": 1}],
        [{"name": "x"}],
        [{"name": "x", "size": 1}],
        {"name": "x"},
        3,
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, files: object) -> None:
    with (
        nothing_written(tmp_path),
        ArtifactWriter(tmp_path / "out", force=False) as writer,
        pytest.raises(FormatError),
    ):
        write_folder(hostile(files), writer, "sealed")


def test_a_stream_that_goes_on_or_has_another_format_is_refused(tmp_path: Path) -> None:
    for pieces in (hostile([], b"more"), hostile([], format="fedqsn-folder/2"), iter([b"\xff" * 8]), iter([b"short"])):
        with ArtifactWriter(tmp_path / "out", force=False) as writer, pytest.raises(FormatError):
            write_folder(pieces, writer, "sealed")


NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\\", exclude_categories=["C", "Z"]), min_size=1, max_size=9
)


@given(files=st.dictionaries(NAMES.filter(lambda name: not name.startswith(".")), st.binary(max_size=50), max_size=5))
def test_any_flat_folder_comes_back(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    home = tmp_path_factory.mktemp("flat")
    (home / "from").mkdir()
    for name, data in files.items():
        (home / "from" / name).write_bytes(data)
    with ArtifactWriter(home / "to", force=False) as writer:
        write_folder(iter(folder_stream(home / "from")), writer, "sealed")
        writer.publish()
    assert contents(home / "to") == contents(home / "from")
    assert list(folder_stream(home / "to")) == list(folder_stream(home / "from"))
