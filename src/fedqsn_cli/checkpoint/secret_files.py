"""Files that only their owner can open: keys. They are read strictly, and created complete and once."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from fedqsn_cli import linux
from fedqsn_cli.checkpoint.files import remove_tree, rename_exclusive, stage_file, sweep, sync_directory, write_all
from fedqsn_cli.errors import InputError, KeyFileError


def read_secret(path: str | Path, limit: int, mark: bytes) -> bytes:
    """Read a file that nobody but its owner can open.

    It is opened first, and then looked at: a file that is swapped in between changes nothing.

    Args:
        limit: bytes that it may have.
        mark: what any such file holds; one that others can open and that lacks it is not a key, and nobody is asked to
            close it.

    Raises:
        KeyFileError: it is missing, no regular file, another user's, open to others, or too large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise KeyFileError("there is no key", where=path) from None
    except OSError as error:
        raise KeyFileError(f"cannot open the key ({error.strerror})", where=path) from None
    try:
        found = os.fstat(descriptor)
        _check_owner(found, path)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    finally:
        os.close(descriptor)
    _check_mode(found, mark in data, path)
    if len(data) > limit:
        raise KeyFileError("the file is too large for a key", where=path)
    return data


def _check_owner(found: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise KeyFileError("the key must be a regular file", where=path)
    if found.st_uid not in (os.geteuid(), 0):
        raise KeyFileError("the key belongs to another user", where=path)


def _check_mode(found: os.stat_result, is_key: bool, path: str | Path) -> None:
    if found.st_mode & 0o077:
        if not is_key:
            raise KeyFileError("not a key file", where=path)
        mode = stat.S_IMODE(found.st_mode)
        raise KeyFileError(f"other users can open the key (mode {mode:04o})", where=path, hint=f"run: chmod 600 {path}")


def create_secret(path: Path, data: bytes) -> None:
    """Create a file that only its owner can read, complete from the instant at which it appears.

    It has no other name at any instant, so a kill leaves nothing behind; only where the file system cannot do that is
    it built under a staging name.

    Raises:
        FileExistsError: there is something at `path`; it is left alone, also when two processes race.
        InputError: the directory is missing or cannot be written.
        OSError: the disk is full or failed.
    """
    if _create_nameless(path, data):
        return
    staging, descriptor = stage_file(path, [data], 0o600, True)
    try:
        try:
            os.link(staging, path)
        except OSError as error:
            if error.errno not in linux.NOT_SUPPORTED:
                raise
            rename_exclusive(staging, path)  # a file system without hard links
        sync_directory(path.parent)
    finally:
        remove_tree(staging)
        os.close(descriptor)


def _create_nameless(path: Path, data: bytes) -> bool:
    """Write a file of mode 0600 that has no name yet, and give it its own; False where that is not supported.

    Raises:
        FileExistsError: there is something at `path`. InputError: the directory is missing or cannot be written.
    """
    sweep(path)
    try:
        descriptor = os.open(path.parent, linux.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in linux.NOT_SUPPORTED | {errno.EISDIR}:  # EISDIR: a kernel that does not know O_TMPFILE
            return False
        raise InputError(f"cannot be written ({error.strerror})", where=path) from None
    try:
        os.fchmod(descriptor, 0o600)
        write_all(descriptor, data)
        os.fsync(descriptor)
        # With a descriptor of a directory, Python calls linkat with AT_SYMLINK_FOLLOW, which open(2) prescribes here.
        os.link(f"/proc/self/fd/{descriptor}", path.absolute(), src_dir_fd=descriptor, follow_symlinks=True)
        sync_directory(path.parent)
    except OSError as error:
        if error.errno not in linux.NOT_SUPPORTED | {errno.ENOENT}:  # ENOENT: there is no /proc
            raise
        return False
    finally:
        os.close(descriptor)
    return True
