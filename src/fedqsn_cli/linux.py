"""What the operating system offers and Python does not: calls of the C library, direct input and output, signals.

Every function says what happens where a system, or a file system, has no such thing. Nothing else here imports ctypes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO_SECONDS = 1.0  # a terminal signals a whole process group, and make or a shell may pass the same signal on

PAGE = 4096  # what O_DIRECT asks of offsets, lengths and addresses
O_TMPFILE: int = getattr(os, "O_TMPFILE", os.O_DIRECTORY)  # O_DIRECTORY alone cannot be opened for writing: EISDIR
O_DIRECT: int = getattr(os, "O_DIRECT", 0)  # 0 where the system has none
NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}

_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2  # linux/fs.h
_FS_IOC_GETFLAGS = 0x80086601  # linux/fs.h
_SETTABLE_FLAGS = 0xC0FB  # SECRM, UNRM, SYNC, IMMUTABLE, APPEND, NODUMP, NOATIME, JOURNAL_DATA, NOTAIL
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_MALLOC = {-3: 32 << 20, -1: 128 << 20, -8: 1}  # malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX


def _function(name: str) -> Any:
    """A function of the C library that sets errno; None where the library does not have it."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def _last_error(*path: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), *path)


def rename_noreplace(source: Path, target: Path) -> None:
    """Rename in one step, but never onto something that exists.

    Raises:
        OSError: the target exists, or one of NOT_SUPPORTED.
    """
    _renameat2(source, target, _RENAME_NOREPLACE)


def rename_exchange(source: Path, target: Path) -> None:
    """Swap two paths in one step. Raises OSError, one of NOT_SUPPORTED where that is impossible."""
    _renameat2(source, target, _RENAME_EXCHANGE)


def _renameat2(source: Path, target: Path, flags: int) -> None:
    function = _function("renameat2") if sys.platform == "linux" else None
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)):
        raise _last_error(str(target))


def reserve(descriptor: int, size: int) -> None:
    """Reserve disk space for a file, where the file system can.

    The C library's posix_fallocate is not used: where the file system cannot, it writes to every block instead.

    Raises:
        OSError: there is not enough space.
    """
    function = _function("fallocate64")
    if function is None or not size:
        return
    if function(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        error = _last_error()
        if error.errno not in NOT_SUPPORTED:
            raise error


def set_direct(descriptor: int, wanted: bool = True) -> bool:
    """Switch O_DIRECT, so that reads and writes bypass the page cache; returns whether it is on now."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~O_DIRECT
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | (O_DIRECT if wanted else 0))
    except OSError:
        return False
    return wanted and bool(O_DIRECT)


def file_flags(path: Path) -> int:
    """Flags of a file or folder that `chattr` sets, and no file system by itself; 0 where there are none."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, bytes(8))
    except OSError:
        return 0
    finally:
        os.close(descriptor)
    return int.from_bytes(found, sys.byteorder) & _SETTABLE_FLAGS


def resident_pages(mapped: mmap.mmap, pages: Sequence[int]) -> int:
    """How many of these pages of a mapped file are in memory.

    Raises:
        OSError: the system cannot tell.
    """
    mincore = _function("mincore")
    anchor = ctypes.c_char.from_buffer(mapped)
    try:
        return sum(_is_resident(mincore, ctypes.addressof(anchor) + page * PAGE) for page in pages)
    finally:
        del anchor  # else the mapping could not be closed


def _is_resident(mincore: Any, address: int) -> bool:
    flags = (ctypes.c_ubyte * 1)()
    if mincore is None or mincore(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), flags):
        raise _last_error()
    return bool(flags[0] & 1)


def end_with_parent() -> None:
    """Let this process be killed when its parent ends; where the system cannot, it goes on."""
    prctl = _function("prctl")
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


def keep_freed_memory() -> None:
    """Let glibc hold on to freed memory, in one place for all threads; other C libraries do as they do.

    Chunks of a model come and go. Given back to the kernel they return as pages that it has to clear first, and with a
    place for each thread the peak depends on chance.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        for option, value in _MALLOC.items():
            mallopt(option, value)


def return_freed_memory() -> None:
    """Let glibc give freed memory back to the kernel, once; other C libraries do as they do."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))
