"""Files in parts: whatever is interrupted or changed on the way, what appears is what was sent."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli.courier.parts import Offer, Part, PartWriter, fetch_file
from fedqsn_cli.errors import FormatError


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


def offered(folder: Path, data: bytes, size: int) -> Offer:
    (folder / "source").write_bytes(data)
    return Offer.of(folder / "source", lambda path, part: f"{path.name}@{part.start}", size)


@given(data=st.binary(max_size=200), size=st.integers(1, 60), piece=st.integers(1, 30))
def test_any_file_arrives(tmp_path_factory: pytest.TempPathFactory, data: bytes, size: int, piece: int) -> None:
    folder = tmp_path_factory.mktemp("parts")
    offer = Offer.from_document(offered(folder, data, size).to_document())
    assert fetch_file(offer, folder / "target", Line(data, piece).fetch) == 0
    assert (folder / "target").read_bytes() == data
    assert sorted(path.name for path in folder.iterdir()) == ["source", "target"]


@given(data=st.data())
def test_an_interrupted_transfer_goes_on_with_what_is_missing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder, content = tmp_path_factory.mktemp("parts"), bytes(range(100))
    offer, line = offered(folder, content, 10), Line(content)
    breaks = data.draw(st.lists(st.integers(0, 4), max_size=4))
    for after in breaks:
        line.breaks_after = len(line.fetched) + after
        try:
            fetch_file(offer, folder / "target", line.fetch)
        except ConnectionError:
            assert not (folder / "target").exists()
            continue
        break
    line.breaks_after = 10**9
    if not (folder / "target").exists():
        fetch_file(offer, folder / "target", line.fetch)
    assert (folder / "target").read_bytes() == content
    assert sorted(line.fetched) == list(range(0, 100, 10))  # each part once


def test_a_part_that_was_changed_on_the_way_is_fetched_again(tmp_path: Path) -> None:
    content = bytes(range(100))
    offer, line = offered(tmp_path, content, 30), Line(content[:40] + b"!" + content[41:])
    with pytest.raises(FormatError, match="did not arrive as it was sent"):
        fetch_file(offer, tmp_path / "target", line.fetch)
    assert not (tmp_path / "target").exists()
    assert fetch_file(offer, tmp_path / "target", Line(content).fetch) == 1
    assert (tmp_path / "target").read_bytes() == content


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"!"])
def test_a_part_that_is_too_short_or_too_long_is_refused(tmp_path: Path, change: Any) -> None:
    content = bytes(range(50))
    offer = offered(tmp_path, content, 50)

    def fetch(part: Part, writer: PartWriter) -> None:
        writer.write(change(content))

    with pytest.raises(FormatError):
        fetch_file(offer, tmp_path / "target", fetch)


def test_parts_of_another_file_under_the_same_name_are_not_kept(tmp_path: Path) -> None:
    first, second = bytes(range(60)), bytes(reversed(range(60)))
    line = Line(first)
    line.breaks_after = 2
    with pytest.raises(ConnectionError):
        fetch_file(offered(tmp_path, first, 20), tmp_path / "target", line.fetch)
    assert fetch_file(offered(tmp_path, second, 20), tmp_path / "target", Line(second).fetch) == 0
    assert (tmp_path / "target").read_bytes() == second


GOOD = {"size": 30, "parts": [[0, 20, "0" * 64, "a"], [20, 10, "1" * 64, "b"]]}


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.update(size=31),
        lambda told: told["parts"].pop(),
        lambda told: told["parts"].reverse(),
        lambda told: told["parts"][0].pop(),
        lambda told: told["parts"][0].extend([1, 2]),
        lambda told: told["parts"][1].__setitem__(0, 10),
        lambda told: told["parts"][1].__setitem__(1, -10),
        lambda told: told["parts"][1].__setitem__(2, "x"),
        lambda told: told.pop("size"),
        lambda told: told.update(parts=None),
    ],
)
def test_a_list_of_parts_with_gaps_is_refused(change: Any) -> None:
    document = copy.deepcopy(GOOD)
    assert Offer.from_document(document).size == 30
    change(document)
    with pytest.raises(FormatError, match="no list of parts"):
        Offer.from_document(document)
