"""Reading what is not in the page cache without filling it: O_DIRECT, into fresh page-aligned memory.

Bringing pages into the cache only to copy them out costs more processor time than everything else that happens to a
byte here, and evicts what others need. What is in the cache already is read from there.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.linux import O_DIRECT, PAGE, resident_pages

SAMPLES = 64  # pages at which a file is looked for in the page cache

Bytes = NDArray[np.uint8]


def is_uncached(descriptor: int, size: int) -> bool:
    """Whether less than half of a file is in the page cache; False where that cannot be told."""
    if not O_DIRECT or size < SAMPLES * PAGE:
        return False
    try:
        with mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) as mapped:  # address space only: nothing is read
            return 2 * resident_pages(mapped, [size // PAGE * place // SAMPLES for place in range(SAMPLES)]) < SAMPLES
    except (OSError, ValueError):
        return False


def read_direct(descriptor: int, start: int, count: int) -> Bytes | None:
    """Read `count` bytes at any offset past the page cache; as many as there are, at most.

    Returns:
        A fresh array; None where this file system cannot.
    """
    begin = start // PAGE * PAGE
    length = -(-(start + count) // PAGE) * PAGE - begin
    memory: NDArray[Any] = np.empty(length + PAGE, np.uint8)
    shift = -memory.ctypes.data % PAGE
    view = memoryview(memory[shift : shift + length].data)
    done = 0
    try:
        while done < length:
            got = os.preadv(descriptor, [view[done:]], begin + done)
            done += got
            if not got or got % PAGE:
                break  # the end of the file
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None
    found = memory[shift + start - begin : shift + max(start - begin, min(done, start - begin + count))]
    return found if start % 8 == 0 else found.copy()  # kernels want numbers aligned in memory
