"""A folder that takes what an export writes and compares it, byte by byte, with what is there: no second copy.

Memory holds a few chunks, as in an export.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.checkpoint import FILE_MODE, FILE_TIME, TensorSink, TensorSpec
from fedqsn_cli.checkpoint.descriptors import StoredFile
from fedqsn_cli.checkpoint.tensor_sink import split_into_shards
from fedqsn_cli.errors import InputError
from fedqsn_cli.kernels.hash_threads import HashQueue
from fedqsn_cli.linux import file_flags

Bytes = NDArray[np.uint8]

_LABEL, _SELINUX = "security.selinux", re.compile(rb"([a-z_]+:[a-z_]+:[a-z_]+(:s0)?\0?)?")  # the system sets it
_FOLDER_MODES = frozenset({0o700, 0o750, 0o755, 0o770, 0o775, 0o777})  # what the usual umasks leave
_MISSING = "0" * 64  # in place of a digest
_SMALL = 4 << 10  # bytes that may wait to be hashed
_JSON_KEY = re.compile(r'( *)"((?:[^"\\]|\\.)*)": ')


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a file is not what an export writes.

    Args:
        offset: of the first byte that differs. place: what is there. tensor: if it is in one.
    """

    file: str
    offset: int
    place: str
    tensor: str | None = None


@dataclass
class ComparedFile:
    """A file of tensors, compared with what an export writes in any order.

    Args:
        size: in bytes, as it should be. stored: the file, where it is open already.
        hashing: takes what is read, if that is in the order of the file.
        first: offset of the first byte that differs.
    """

    path: Path
    size: int
    stored: StoredFile | None
    hashing: HashQueue
    first: int | None = None
    _head: bytes = b""
    _taken: int = 0
    _sha256: Any = field(default_factory=hashlib.sha256)
    _hashed: int = 0
    _waiting: dict[int, Bytes] = field(default_factory=dict)
    _last: Future[None] | None = None

    def create(self) -> None:
        """There is nothing to create."""

    @property
    def complete(self) -> bool:
        """Whether every byte was compared."""
        return self._taken == self.size

    def write(self, offset: int, data: memoryview) -> None:
        """Compare the bytes [offset, offset + len(data)) of the file."""
        if self._taken == 0:
            self._open()
        if offset == 0:
            self._head = bytes(data)  # a header is written at once
        self._taken += len(data)
        found = np.empty(0, np.uint8) if self.stored is None else self.stored.read(offset, len(data))
        wanted = np.frombuffer(data, np.uint8)
        if offset == self._hashed or len(data) < _SMALL:
            self._waiting[offset] = found
        while (piece := self._waiting.pop(self._hashed, None)) is not None:
            self._last = self.hashing.submit(self._sha256.update, piece.data)
            self._hashed += piece.size
        unequal = np.flatnonzero(wanted[: found.size] != found)
        if unequal.size or found.size < wanted.size:
            self._differs(offset + int(unequal[0] if unequal.size else found.size))
        if self.complete:
            self.close()

    def _open(self) -> None:
        try:
            self.stored = self.stored or StoredFile.open(self.path)
        except InputError:
            return  # no byte is as it should be
        there = self.stored.identity.size
        self._hashed = 0 if there == self.size else -1  # of another size, no digest helps
        if there > self.size:
            self._differs(self.size)

    def _differs(self, offset: int) -> None:
        self.first = offset if self.first is None else min(self.first, offset)

    def close(self) -> None:
        """Compare no more."""
        if self.stored is not None:
            self.stored.close()

    def digest(self) -> str | None:
        """SHA-256 of the file, in hex; None where it was not read in its order."""
        if self._last is None or self._hashed != self.size:
            return None
        self._last.result()
        return str(self._sha256.hexdigest())

    def difference(self) -> Difference | None:
        """The first byte that differs."""
        if self.first is None:
            return None
        place, tensor = _in_safetensors(self._head, self.first)
        return Difference(self.path.name, self.first, place, tensor)


@dataclass
class ComparedFolder:
    """Takes the files of a release as `ArtifactWriter` does, and compares each with that of the same name in a folder.

    Args:
        open_files: files of it that are open already. hashing: takes the bytes of all files.
        taken: receives SHA-256 of the files that were read in their order.
        known: gives SHA-256 of all files that are there: what proxy.json must say of them. Where one is not as it
            should be, that is found in the file itself.
    """

    folder: Path
    open_files: Mapping[Path, StoredFile]
    hashing: HashQueue
    taken: dict[str, str]
    known: Callable[[], Mapping[str, str]]
    _files: list[ComparedFile] = field(default_factory=list)
    _texts: dict[str, Difference | None] = field(default_factory=dict)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the files that were compared."""
        names = self.names
        known = self.taken if names <= self.taken.keys() else self.known()
        return {name: known.get(name, _MISSING) for name in names}

    def tensors(
        self, stem: str, specs: Sequence[TensorSpec], *, max_shard_bytes: int | None, metadata: dict[str, str]
    ) -> TensorSink:
        """The sink for the bytes of planned files."""
        return TensorSink(self, stem, split_into_shards(specs, max_shard_bytes), metadata)

    def place(self, name: str) -> Path:
        """Where a file of that name is."""
        return self.folder / name

    def file(self, path: Path, size: int) -> ComparedFile:
        """A file of tensors to compare."""
        self._files.append(ComparedFile(path, size, self.open_files.get(path), self.hashing))
        return self._files[-1]

    def add_bytes(self, name: str, data: bytes) -> None:
        """Compare a small file."""
        file = ComparedFile(self.folder / name, len(data), None, self.hashing)
        file.write(0, memoryview(data))
        file.close()  # an empty one is never complete
        self.finished(file)
        at = file.first
        self._texts[name] = None if at is None else Difference(name, at, _in_text(data, at))

    def drain(self) -> None:
        """Every byte was compared when it came."""

    def finished(self, file: Any) -> None:
        """Note its digest."""
        digest = file.digest()
        if digest is not None:
            self.taken[file.path.name] = digest

    @property
    def names(self) -> set[str]:
        """The files of the release."""
        return {file.path.name for file in self._files} | self._texts.keys()

    def differences(self) -> list[Difference]:
        """The first difference of each file that has one: files of tensors, then the others in their order."""
        found = [*(file.difference() for file in self._files), *self._texts.values()]
        return [one for one in found if one is not None and os.path.lexists(self.folder / one.file)]


@dataclass(frozen=True, slots=True)
class Owners:
    """Users and groups that files of a release may belong to, by number: another number could be a message."""

    users: frozenset[int]
    groups: frozenset[int]

    @classmethod
    def of(cls, ledger: Path) -> Self:
        """Those of whoever audits, and of the ledger, which the same command wrote."""
        found = ledger.stat()
        users, groups = {os.geteuid(), found.st_uid}, {os.getegid(), *os.getgroups(), found.st_gid}
        return cls(frozenset(users), frozenset(groups))

    def include(self, found: os.stat_result) -> bool:
        """Does a file belong to one of them?"""
        return found.st_uid in self.users and found.st_gid in self.groups


def wrong_entries(folder: Path, names: set[str]) -> Iterator[tuple[str, str]]:
    """Entries of a folder that are not those that an export writes: (name, problem)."""
    found = set(os.listdir(folder))
    for name in sorted(found - names):
        yield name, "is not a file of this release"
    for name in sorted(names - found):
        yield name, "is missing"


def wrong_properties(folder: Path, names: set[str], owners: Owners) -> Iterator[tuple[str, str]]:
    """What is wrong with those of these files that are there, and with their folder, whatever is in them."""
    label = _attributes(folder).get(_LABEL, b"")
    for name in (*sorted(names & set(os.listdir(folder))), "."):
        problem = _problem(folder / name, owners, label)
        if problem is not None:
            yield name, problem


def _problem(path: Path, owners: Owners, label: bytes) -> str | None:
    """Why a folder, or a file in it, is not as exports write it.

    Args:
        label: SELinux label of the folder; b"" where there is none.
    """
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        return "is a link, not a regular file or folder"
    mode, attributes = stat.S_IMODE(found.st_mode), _attributes(path)
    given = attributes.pop(_LABEL, label)
    if attributes or given != label or not _SELINUX.fullmatch(label):
        return "has extended attributes"
    if not owners.include(found):
        return "belongs to another user or group than the ledger"
    if (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)) and not _has_usual_flags(path):
        return "has flags that chattr sets"
    if found.st_mtime_ns != FILE_TIME * 10**9:
        return "has another time of modification than exports write (copy proxies with cp --archive)"
    if stat.S_ISDIR(found.st_mode):
        return None if mode in _FOLDER_MODES else f"has mode {mode:04o}, which no usual umask gives"
    if not stat.S_ISREG(found.st_mode):
        return "is not a regular file"
    if found.st_nlink != 1:
        return "has a second name (hard link)"
    if mode != FILE_MODE:
        return f"has mode {mode:04o}; exports write {FILE_MODE:04o}"
    return "is sparse (copy proxies with cp --sparse=never)" if is_sparse(path) else None


def _has_usual_flags(path: Path) -> bool:
    """Has it no flags, or those of the folder that it is in? Some file systems hand them down."""
    flags = file_flags(path)
    return not flags or flags == file_flags(Path(os.path.realpath(path.parent)))


def is_sparse(path: Path) -> bool:
    """Are zeros left out of what is stored? Exports write every byte."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return os.lseek(descriptor, 0, os.SEEK_HOLE) < os.fstat(descriptor).st_size
    except OSError:
        return False  # an empty file, or a file system without holes
    finally:
        os.close(descriptor)


def _attributes(path: Path) -> dict[str, bytes]:
    """Extended attributes; one that cannot be read counts, with a value that no label has."""
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError:
        return {}  # a file system without them
    return {name: _attribute(path, name) for name in names}


def _attribute(path: Path, name: str) -> bytes:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return b"?"


def _in_safetensors(head: bytes, offset: int) -> tuple[str, str | None]:
    """What a safetensors file with this header has at an offset; and the tensor, if it is in one."""
    if offset < 8 or not head:
        return "the length of the header", None
    document: Mapping[str, Any] = json.loads(head[8:])
    if offset < len(head):
        before = head[8:offset].decode("utf-8", "ignore")
        names = [name for name in document if f"{json.dumps(name, ensure_ascii=False)}:{{" in before]
        return "the header" + (f", at or after {names[-1]}" if names else ""), None
    for name, entry in document.items():
        begin, end = entry.get("data_offsets", (0, 0)) if name != "__metadata__" else (0, 0)
        if begin <= offset - len(head) < end:
            rows = entry["shape"][0] if entry["shape"] else 1
            row = (offset - len(head) - begin) // max(1, (end - begin) // rows)
            return f"row {row} of {rows}", name
    return "after the end", None


def _in_text(data: bytes, offset: int) -> str:
    """What a text has at an offset: the JSON pointer where it is written with one key a line, else the line."""
    if offset >= len(data):
        return "after the end"
    lines = data[: offset + 1].decode("utf-8", "replace").splitlines()
    keys: dict[int, str] = {}
    full = data.decode("utf-8", "replace").splitlines()
    for number, _ in enumerate(lines):
        match = _JSON_KEY.match(full[number])
        if match is not None:
            depth = len(match[1])
            keys = {other: key for other, key in keys.items() if other < depth} | {depth: match[2]}
    return "/" + "/".join(keys.values()) if keys and data.startswith(b"{") else f"line {len(lines)}"
