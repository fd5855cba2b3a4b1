"""Opening files without trust, and files and directories that appear complete or not at all.

Who may have written a file is never known: `open_regular_file` opens nothing but plain files, and `read_file` reads no
more than a stated number of bytes.

Everything is first built under a staging name next to its final path, `.NAME.fedqsn-` and 16 random hex digits,
which its maker holds an flock on. A kill leaves the staging name behind; the next run that makes the same
NAME finds it unlocked and deletes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from fedqsn_cli import linux
from fedqsn_cli.checkpoint.in_order import InOrderWriter, ahead
from fedqsn_cli.errors import FormatError, InputError, OutputExists


def open_regular_file(path: Path) -> int:
    """Open a regular file for reading and return its descriptor; never blocks on a pipe.

    Raises:
        InputError: there is no such file, it cannot be read, or it is a directory, pipe or device, or a file in which
            the kernel shows what it knows: those have no size and may have no end.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, ValueError):  # ValueError: a null character in a name that a file gives
        raise InputError("there is no such file", where=path) from None
    except OSError as error:
        raise InputError(f"cannot be opened ({error.strerror})", where=path) from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_dev in _kernel_devices():
        os.close(descriptor)
        raise InputError("not a regular file", where=path)
    return descriptor


@cache
def _kernel_devices() -> frozenset[int]:
    """The devices of file systems that no disk holds."""
    return frozenset(os.stat(place).st_dev for place in ("/proc", "/sys") if os.path.ismount(place))


def check_size(path: Path, most: int) -> None:
    """Refuse what is not a plain file of at most `most` bytes. Raises InputError, FormatError."""
    descriptor = open_regular_file(path)
    try:
        _check_size(descriptor, path, most)
    finally:
        os.close(descriptor)


def _check_size(descriptor: int, path: Path, most: int) -> None:
    if os.fstat(descriptor).st_size > most:
        raise FormatError(f"larger than {most} bytes, which no such file needs", where=path)


def read_file(path: Path, most: int) -> bytes:
    """All bytes of a plain file, which may also be reached through links.

    Args:
        most: a longer file is refused, also one that grows while it is read.

    Raises:
        InputError: as from `open_regular_file`. FormatError: the file is larger than `most` bytes.
    """
    with open(open_regular_file(path), "rb") as file:
        _check_size(file.fileno(), path, most)
        data = file.read(most)
        _check_size(file.fileno(), path, len(data))
    return data


def require_file_target(path: str | Path) -> None:
    """Refuse, before any work is done, a path at which no file can be written: a file is made beside it, and deleted.

    A device or pipe is refused too: the file would take its place, and /dev/null would be gone from the machine.

    Raises:
        InputError: its directory is missing or cannot be written, or something that is not a plain file is there.
    """
    _check_target(path)
    staging, descriptor = _open_staging(Path(path), 0o600)
    os.unlink(staging)
    os.close(descriptor)


def _check_target(path: str | Path) -> None:
    """Raises InputError: as `require_file_target`, which also tries."""
    if not Path(path).absolute().parent.is_dir():
        raise InputError("there is no such folder", where=Path(path).parent, hint="make it first")
    if os.path.isdir(path):
        raise InputError("is a directory", where=path, hint="name a file")
    if os.path.lexists(path) and not os.path.isfile(path):  # lexists: a link to nothing, or to itself, too
        raise InputError("is not a plain file", where=path, hint="name another file")


def keep_outside(out: Path, **files: str | Path | None) -> None:
    """Refuse a key, ledger or report inside of a folder that is sent, or that --force replaces.

    Args:
        out: the directory. files: paths by the option that gives them.

    Raises:
        InputError: one of them is inside.
    """
    for option, file in files.items():
        if file is not None and Path(os.path.realpath(file)).is_relative_to(os.path.realpath(out)):
            raise InputError(f"is inside of {out}", where=f"--{option}", hint="keep it elsewhere")


def write_file_atomically(path: Path, data: bytes, mode: int | None = None) -> None:
    """Write a file so that `path` is the old one or the new one at any instant, whatever happens.

    Args:
        mode: permission bits; None means 0666 less the umask, as for any new file.

    Raises:
        InputError: the directory is missing or cannot be written.
        OSError: the disk is full or failed.
    """
    staging, descriptor = stage_file(path, [data], 0o666 if mode is None else mode, mode is not None)
    try:
        os.replace(staging, path)
        sync_directory(path.parent)
    finally:
        remove_tree(staging)  # gone if all went well
        os.close(descriptor)


def stream_new_file(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file that is complete from the instant at which it appears, and never replaces anything.

    Raises:
        OutputExists: there is something at `path`. InputError: the directory is missing or cannot be written.
        OSError: the disk is full or failed. What `pieces` raises; nothing is left behind then.
    """
    taken = OutputExists("already exists", where=path, hint="choose another path")
    if os.path.lexists(path):
        raise taken
    with contextlib.closing(ahead(pieces)) as made:
        staging, descriptor = stage_file(path, made, 0o666, False)
    try:
        rename_exclusive(staging, path)
        sync_directory(path.parent)
    except FileExistsError:
        raise taken from None
    finally:
        remove_tree(staging)  # gone if all went well
        os.close(descriptor)


def stage_file(path: Path, pieces: Iterable[bytes], mode: int, exactly: bool) -> tuple[Path, int]:
    """Write and sync the staging file of `path`; returns it with the descriptor that holds its lock.

    Args:
        exactly: whether the file gets `mode` whatever the umask is.

    Raises:
        InputError: the directory is missing or cannot be written. OSError: the disk is full or failed.
    """
    _check_target(path)
    sweep(path)
    staging, descriptor = _open_staging(path, mode)
    try:
        if exactly:
            os.fchmod(descriptor, mode)
        writer = InOrderWriter(descriptor)
        for piece in pieces:
            writer.write(piece)
        writer.finish()
        os.fsync(descriptor)
    except BaseException:
        remove_tree(staging)
        os.close(descriptor)
        raise
    return staging, descriptor


def _open_staging(path: Path, mode: int) -> tuple[Path, int]:
    """Make and lock a staging file of `path`. Raises InputError: that cannot be done there."""
    while True:
        staging = staging_path(path)
        try:
            descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        except OSError as error:
            raise InputError(f"cannot be written ({error.strerror})", where=path) from None
        if _lock_new(descriptor):
            return staging, descriptor
        os.close(descriptor)


def _lock_new(descriptor: int) -> bool:
    """Lock a file or directory that was just made; False if a sweeper took it for a leftover before that."""
    with contextlib.suppress(OSError):  # where there are no locks, nobody sweeps
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits for a sweeper that is about to delete it
    return os.fstat(descriptor).st_nlink > 0


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte at the descriptor's position."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view) :]


def staging_path(path: Path) -> Path:
    """A fresh hidden name next to `path`."""
    return beside(path, f".{path.name}.fedqsn-{secrets.token_hex(8)}")


def beside(path: Path, name: str) -> Path:
    """Another name in the folder of a path. Raises InputError: the path is `/` or `.`, which no file can have."""
    if not path.name:
        raise InputError("is a directory", where=path, hint="name a file")
    return path.with_name(name)


def sweep(path: Path) -> None:
    """Delete what killed runs left of `path`: its staging names that nobody holds a lock on."""
    pattern = re.compile(re.escape(f".{path.name}.fedqsn-") + "[0-9a-f]{16}")
    try:
        names = [name for name in os.listdir(path.parent) if pattern.fullmatch(name)]
    except OSError:
        return
    for name in names:
        leftover = path.with_name(name)
        try:
            descriptor = os.open(leftover, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # gone already, or not ours to touch
        try:
            if try_lock(descriptor):
                remove_tree(leftover)
        finally:
            os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Take the exclusive lock of a file or directory; False if another holds it or locks do not exist here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def make_staging_directory(path: Path) -> tuple[Path, int]:
    """Make and lock the staging directory of `path`; returns it with the descriptor that holds its lock.

    Raises:
        InputError: the parent directory cannot be written.
    """
    sweep(path)
    while True:
        staging = staging_path(path)
        try:
            os.mkdir(staging)
        except OSError as error:
            if not path.parent.is_dir():
                raise InputError("has no parent directory", where=path) from None
            raise InputError(f"cannot be created ({error.strerror})", where=path) from None
        try:
            descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # a sweeper was faster than our lock
        except OSError as error:
            raise InputError(f"cannot be created ({error.strerror})", where=path) from None
        if _lock_new(descriptor):
            return staging, descriptor
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Delete a file or directory as far as possible; another process may be deleting it too."""
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)
    except OSError:
        return


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_exclusive(source: Path, target: Path) -> None:
    """Rename, but never onto something that exists.

    Raises:
        FileExistsError: the target exists.
    """
    try:
        linux.rename_noreplace(source, target)
    except OSError as error:
        if error.errno not in linux.NOT_SUPPORTED:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.rename(source, target)


def exchange(source: Path, target: Path) -> None:
    """Swap two directories: in one step where the system can, else by renames with the target absent in between."""
    try:
        linux.rename_exchange(source, target)
    except OSError as error:
        if error.errno not in linux.NOT_SUPPORTED:
            raise
        _exchange_by_renames(source, target)


def _exchange_by_renames(source: Path, target: Path) -> None:
    aside = aside_path(target)
    os.rename(target, aside)
    try:
        os.rename(source, target)
    except BaseException:
        os.rename(aside, target)
        raise
    os.rename(aside, source)


def aside_path(target: Path) -> Path:
    """Where the old directory waits during an exchange by renames: no staging name, it may be the only copy."""
    return target.with_name(f".{target.name}.fedqsn-old")


def recover(target: Path) -> None:
    """Finish or undo an exchange by renames that was killed between its steps."""
    if os.path.lexists(target):
        remove_tree(aside_path(target))
    else:
        os.rename(aside_path(target), target)
