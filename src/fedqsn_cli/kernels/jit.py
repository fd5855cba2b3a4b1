"""How kernels are compiled, and the bits of floats: 16-bit ones to fp32 and back.

No kernel may depend on fused or reordered arithmetic: fastmath stays off.
"""

from __future__ import annotations

import functools
import glob
import hashlib
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher
from numba.core.runtime import rtsys
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])
Bits = NDArray[Any]  # uint32 or uint16

F32, F16, BF16 = 0, 1, 2
KIND = {"F32": F32, "F16": F16, "BF16": BF16}

MAGNITUDE = np.uint32(0x7FFFFFFF)
INFINITY = np.uint32(0x7F800000)


class NonFinite(Exception):
    """A value is NaN, infinite, or beyond the range of the format."""


class CacheFile(IndexDataCacheFile):  # type: ignore[misc]
    """The files that machine code is kept in, each named by its key.

    numba numbers them, and uses numbers again when the source has changed, or when two processes compile at once: a
    process could be given the code of another signature, or of an earlier version.
    """

    def save(self, key: Any, data: Any) -> None:
        """Keep the code of a key; what is left of other versions of the source goes."""
        known = self._load_index()
        if not known:
            for path in Path(self._cache_path).glob(glob.escape(self._data_name_pattern.split("{")[0]) + "*.nbc"):
                path.unlink(missing_ok=True)
        name = self._data_name(int(hashlib.sha256(repr(key).encode()).hexdigest()[:16], 16))
        self._save_data(name, data)  # before anybody can read of it
        self._save_index({**known, key: name})


class _Cache(FunctionCache):  # type: ignore[misc]
    """Machine code on disk, loaded without all that only compiling needs: numba would spend half a second on that."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        place = self._impl.locator
        self._cache_file = CacheFile(place.get_cache_path(), self._impl.filename_base, place.get_source_stamp())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """As the original does, which refreshes the context first."""
        rtsys.initialize(target_context)  # memory for arrays that kernels make
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        """As the original has it, and what is compiled in from other files, in which numba looks for no changes."""
        return *super()._index_key(sig, codegen), compiled_in(self._py_func)


@functools.cache
def compiled_in(function: Callable[..., Any]) -> str:
    """SHA-256 (hex) of this file, and of the code and the constants of all kernels that a kernel calls."""
    digest, pending, seen = hashlib.sha256(Path(__file__).read_bytes()), [function], {function}
    while pending:
        current = pending.pop()
        code = current.__code__
        parts = [code, *(value for value in code.co_consts if isinstance(value, CodeType))]  # comprehensions, too
        for part in parts:
            constants = [value for value in part.co_consts if not isinstance(value, CodeType)]  # those show an address
            digest.update(repr((part.co_code, constants, part.co_names, part.co_varnames)).encode())
        for name in sorted({name for part in parts for name in part.co_names}):
            value = current.__globals__.get(name)
            if isinstance(value, Dispatcher):
                if value.py_func not in seen:
                    seen.add(value.py_func)
                    pending.append(value.py_func)
            elif isinstance(value, np.ndarray):
                digest.update(repr((name, value.dtype.str, value.shape)).encode() + value.tobytes())
            elif isinstance(value, int | float | tuple | np.generic):
                digest.update(repr((name, value)).encode())
    return digest.hexdigest()


def kernel(function: F) -> F:
    """Compile a function at its first call, without the interpreter lock, and keep the machine code on disk.

    numba keeps it next to the source, or in the user's cache directory where that is read-only. Where nothing can be
    written it compiles in every process.
    """
    return compiled(function)


def view_kernel(function: F) -> F:
    """A kernel that makes views only, no arrays: it counts no references, which would cost as much as a short loop."""
    return compiled(function, _nrt=False)


def compiled(function: F, **more: Any) -> F:
    """A kernel with more options of numba."""
    options = {"nogil": True, "error_model": "numpy", **more}
    try:
        made = numba.njit(cache=True, **options)(function)
        made._cache = _Cache(function)
    except RuntimeError:  # numba found no directory for its cache
        made = numba.njit(**options)(function)
    return cast(F, made)


def as_bits(x: NDArray[Any], dtype: str) -> tuple[Bits, int]:
    """The flat bits of an array of stored floats, and the kernel's number for their dtype.

    Raises:
        ValueError: the array's type does not go with `dtype`, or it is not C-contiguous.
    """
    wide = dtype == "F32"
    if x.dtype not in ((np.float32, np.uint32) if wide else (np.uint16, np.float16)) or not x.flags.c_contiguous:
        raise ValueError(f"{x.dtype} array cannot hold {dtype} values in C order")
    return x.reshape(-1).view(np.uint32 if wide else np.uint16), KIND[dtype]


@kernel
def to_float(bits: Any) -> Any:
    """Reinterpret 32 bits as fp32."""
    return np.uint32(bits).view(np.float32)


@kernel
def to_bits(x: Any) -> Any:
    """Reinterpret fp32 as 32 bits."""
    return np.float32(x).view(np.uint32)


@kernel
def widen_half(half: Any) -> Any:
    """Bits of an fp16 number as bits of the same number in fp32."""
    magnitude = np.uint32(half) & np.uint32(0x7FFF)
    tiny = magnitude < np.uint32(0x0400)  # subnormal: 2^-14 * (1 + m) - 2^-14, both exact
    bias = np.uint32(113 << 23) if tiny else np.uint32(112 << 23)
    bias = np.uint32(224 << 23) if magnitude >= np.uint32(0x7C00) else bias  # infinity and NaN
    less = np.float32(2.0**-14) if tiny else np.float32(0)
    value = to_bits(to_float(np.uint32((magnitude << np.uint32(13)) + bias)) - less)
    return np.uint32(value | ((np.uint32(half) & np.uint32(0x8000)) << np.uint32(16)))


@kernel
def narrow_half(bits: Any) -> Any:
    """Bits of an fp32 number rounded to fp16, ties to even; overflow becomes infinity, NaN too."""
    magnitude = np.uint32(bits & MAGNITUDE)
    sign = np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000)
    even = np.uint32(magnitude >> np.uint32(13)) & np.uint32(1)
    normal = np.uint32(magnitude - np.uint32(112 << 23) + np.uint32(0xFFF) + even) >> np.uint32(13)
    # below 2^-14 the unit in the last place is 2^-24, as it is of fp32 numbers in [0.5, 1)
    tiny = to_bits(to_float(magnitude) + np.float32(0.5)) - np.uint32(126 << 23)
    rounded = tiny if magnitude < np.uint32(113 << 23) else normal
    return np.uint16(sign | (np.uint32(0x7C00) if magnitude >= np.uint32(0x477FF000) else rounded))


@kernel
def narrow_bf16(bits: Any) -> Any:
    """Bits of an fp32 number rounded to bf16, ties to even; overflow becomes infinity."""
    even = np.uint32(bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16))


@kernel
def widen(source: Any, kind: int, out: Any) -> None:
    """out[: len(source)] = source as bits of fp32."""
    if kind == F32:
        for i in range(source.size):
            out[i] = source[i]
    elif kind == BF16:
        for i in range(source.size):
            out[i] = np.uint32(source[i]) << np.uint32(16)
    else:
        for i in range(source.size):
            out[i] = widen_half(source[i])


@kernel
def narrow(source: Any, kind: int, out: Any) -> None:
    """out = source[: len(out)], bits of fp32, rounded to the dtype of `kind`."""
    if kind == F32:
        for i in range(out.size):
            out[i] = source[i]
    elif kind == BF16:
        for i in range(out.size):
            out[i] = narrow_bf16(source[i])
    else:
        for i in range(out.size):
            out[i] = narrow_half(source[i])


@kernel
def plain_zeros(out: Any) -> None:
    """Replace -0.0 by 0.0 in an array of float bits: the sign of a zero would tell what was rounded to it."""
    for i in range(out.size):
        out[i] = 0 if out[i] << 1 == 1 << 8 * out.itemsize else out[i]
