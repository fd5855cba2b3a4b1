"""Files in parts: whatever is interrupted or changed on the way, what appears is what was sent."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli.courier.parts import Part, PartDigests, Parts, PartWriter, fetch_file
from fedqsn_cli.errors import FormatError, InputError


class Line:
    """Carries parts of a file, and breaks when it is told to."""

    def __init__(self, data: bytes, piece: int = 7) -> None:
        self.data, self.piece = data, piece
        self.fetched: list[int] = []
        self.breaks_after = 10**9

    def fetch(self, part: Part, writer: PartWriter) -> None:
        if len(self.fetched) >= self.breaks_after:
            raise ConnectionError
        self.fetched.append(part.start)
        data = self.data[part.start : part.start + part.length]
        for at in range(0, len(data), self.piece):
            writer.write(data[at : at + self.piece])


def parts_of(folder: Path, data: bytes, size: int) -> Parts:
    (folder / "source").write_bytes(data)
    return Parts.of(folder / "source", size)


@given(data=st.binary(max_size=200), size=st.integers(1, 60), piece=st.integers(1, 30))
def test_any_file_arrives(tmp_path_factory: pytest.TempPathFactory, data: bytes, size: int, piece: int) -> None:
    folder = tmp_path_factory.mktemp("parts")
    parts = Parts.from_document(parts_of(folder, data, size).to_document())
    assert parts == parts_of(folder, data, size) and parts.size == len(data)
    assert fetch_file(parts, folder / "target", Line(data, piece).fetch) == 0
    assert (folder / "target").read_bytes() == data
    assert sorted(path.name for path in folder.iterdir()) == ["source", "target"]


@given(data=st.binary(max_size=200), size=st.integers(1, 60), cuts=st.lists(st.integers(0, 200), max_size=6))
def test_digests_do_not_depend_on_the_pieces_in_which_bytes_come(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, size: int, cuts: list[int]
) -> None:
    ends = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    pieces = [data[start:end] for start, end in zip(ends, ends[1:], strict=False)]
    digests = PartDigests(size)
    assert b"".join(digests.through(pieces)) == data
    assert Parts(digests.finish()) == parts_of(tmp_path_factory.mktemp("parts"), data, size)


@given(data=st.data())
def test_an_interrupted_transfer_goes_on_with_what_is_missing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder, content = tmp_path_factory.mktemp("parts"), bytes(range(100))
    parts, line = parts_of(folder, content, 10), Line(content)
    breaks = data.draw(st.lists(st.integers(0, 4), max_size=4))
    for after in breaks:
        line.breaks_after = len(line.fetched) + after
        try:
            fetch_file(parts, folder / "target", line.fetch)
        except ConnectionError:
            assert not (folder / "target").exists()
            continue
        break
    line.breaks_after = 10**9
    if not (folder / "target").exists():
        fetch_file(parts, folder / "target", line.fetch)
    assert (folder / "target").read_bytes() == content
    assert sorted(line.fetched) == list(range(0, 100, 10))  # each part once


def test_a_part_that_was_changed_on_the_way_is_fetched_again(tmp_path: Path) -> None:
    content = bytes(range(100))
    parts, line = parts_of(tmp_path, content, 30), Line(content[:40] + b"!" + content[41:])
    with pytest.raises(FormatError, match="did not arrive as it was sent"):
        fetch_file(parts, tmp_path / "target", line.fetch)
    assert not (tmp_path / "target").exists()
    assert fetch_file(parts, tmp_path / "target", Line(content).fetch) in (1, 2, 3)  # all before it, none twice
    assert (tmp_path / "target").read_bytes() == content


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"!"])
def test_a_part_that_is_too_short_or_too_long_is_refused(tmp_path: Path, change: Any) -> None:
    content = bytes(range(50))
    parts = parts_of(tmp_path, content, 50)

    def fetch(part: Part, writer: PartWriter) -> None:
        writer.write(change(content))

    with pytest.raises(FormatError):
        fetch_file(parts, tmp_path / "target", fetch)


def test_parts_of_another_file_under_the_same_name_are_not_kept(tmp_path: Path) -> None:
    first, second = bytes(range(60)), bytes(reversed(range(60)))
    line = Line(first)
    line.breaks_after = 2
    with pytest.raises(ConnectionError):
        fetch_file(parts_of(tmp_path, first, 20), tmp_path / "target", line.fetch)
    assert fetch_file(parts_of(tmp_path, second, 20), tmp_path / "target", Line(second).fetch) == 0
    assert (tmp_path / "target").read_bytes() == second


def test_what_the_disk_has_no_room_for_is_refused_before_a_byte_comes(tmp_path: Path) -> None:
    line = Line(b"")
    with pytest.raises(InputError, match="no room for"):
        fetch_file(Parts((Part(0, 1 << 60, "0" * 64),)), tmp_path / "target", line.fetch)
    assert not line.fetched and not list(tmp_path.iterdir())


GOOD = [[20, "0" * 64], [10, "1" * 64]]


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told[0].pop(),
        lambda told: told[0].extend([1, 2]),
        lambda told: told[1].__setitem__(0, -10),
        lambda told: told[1].__setitem__(0, 0),
        lambda told: told[1].__setitem__(0, 1 << 60),
        lambda told: told[1].__setitem__(0, True),
        lambda told: told[1].__setitem__(0, 10.0),
        lambda told: told[1].__setitem__(1, "x"),
        lambda told: told[1].__setitem__(1, None),
        lambda told: told.append(None),
    ],
)
def test_a_malformed_list_of_parts_is_refused(change: Any) -> None:
    document = copy.deepcopy(GOOD)
    assert Parts.from_document(document).size == 30
    change(document)
    for wrong in (document, None, 7, {"parts": GOOD}):
        with pytest.raises(FormatError, match="not a list of parts"):
            Parts.from_document(wrong)
