"""The quantization formats, as data.

    format  bits  levels                              source
    nf4     4     quantiles of N(0, 1)                bitsandbytes; QLoRA, arXiv 2305.14314
    fp4     4     sign, 2 exponent bits, 1 mantissa   bitsandbytes
    int8    8     -127 .. 127 times absmax / 127      bitsandbytes; LLM.int8(), arXiv 2208.07339
    nf3     3     as nf4, with 8 levels               the same construction
    nf2     2     as nf4, with 4 levels               the same construction
    none    -     the values as they are

NormalFloat with n = 2^k levels: n/2 positive quantiles of N(0, 1) from the probability o down to 1/2 (excluded),
n/2 - 1 negative ones likewise, an exact zero, everything divided by the largest; o = 1 - (1/2n + 1/2(n-1)) / 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.validate import BLOCK_SIZES as BLOCK_SIZES

Float32s = NDArray[np.float32]

LEVELS = 16  # every codebook is padded to this many levels, so that one compiled kernel serves them all


@dataclass(frozen=True, slots=True)
class Format:
    """One quantization format.

    Args:
        name, bits: what it is called, bits a weight (without scales).
        kind: codebook4 packs two codes a byte; codebook has no packed form; int8 is linear; none changes nothing.
        values: levels by code, largest magnitude 1; empty for int8 and none.
        zero_code: the code that an exact zero gets.
    """

    name: str
    bits: int
    kind: Literal["codebook4", "codebook", "int8", "none"]
    values: tuple[float, ...]
    zero_code: int


NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
FP4 = (
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
    0.0,
    -0.0052083334885537624,
    -0.6666666865348816,
    -1.0,
    -0.3333333432674408,
    -0.5,
    -0.1666666716337204,
    -0.25,
)
NF3 = (
    -1.0,
    -0.5350227355957031,
    -0.24693143367767334,
    0.0,
    0.1833374798297882,
    0.38199394941329956,
    0.6229857206344604,
    1.0,
)
NF2 = (-1.0, 0.0, 0.4358181655406952, 1.0)

FORMATS: dict[str, Format] = {
    "nf4": Format("nf4", 4, "codebook4", NF4, 7),
    "fp4": Format("fp4", 4, "codebook4", FP4, 0),
    "int8": Format("int8", 8, "int8", (), 0),
    "nf3": Format("nf3", 3, "codebook", NF3, 3),
    "nf2": Format("nf2", 2, "codebook", NF2, 1),
    "none": Format("none", 0, "none", (), 0),
}


@dataclass(frozen=True, slots=True)
class Codebook:
    """The levels of a format in ascending order, padded to 16 for the kernels.

    Args:
        bounds: [15] midpoints of neighbouring levels, then +inf; a value's rank is the number of bounds below it.
        levels: [16] values by rank.
        order: [16] the code of each rank (fp4 codes are not in ascending order, and two of them mean zero).
    """

    bounds: Float32s
    levels: Float32s
    order: NDArray[np.uint8]


@cache
def codebook(name: str) -> Codebook:
    """The codebook of nf4, fp4, nf3 or nf2. Raises ValueError for a format without one."""
    values = np.array(FORMATS[name].values, dtype=np.float32)
    if not values.size:
        raise ValueError(f"format {name} has no codebook")
    order = np.argsort(values, kind="stable").astype(np.uint8)
    levels = values[order]
    bounds = np.full(LEVELS - 1, np.inf, dtype=np.float32)
    bounds[: values.size - 1] = (levels[:-1] + levels[1:]) / np.float32(2)
    spare = LEVELS - values.size
    arrays = bounds, np.pad(levels, (0, spare)), np.pad(order, (0, spare))
    for array in arrays:
        array.setflags(write=False)
    return Codebook(*arrays)


# The positive levels below 1 of the 8-bit dynamic map (arXiv 1511.04561) that bitsandbytes quantizes block scales
# with: ten to the power of -6 .. 0 times midpoints of linspace(0.1, 1, 2^i + 1), with torch's own rounding of linspace.
_DYNAMIC = (
    5.5000004e-07,
    3.2500002e-06,
    7.75e-06,
    2.1249998e-05,
    4.375e-05,
    6.625e-05,
    8.875e-05,
    0.00015625001,
    0.00026875004,
    0.00038125002,
    0.00049375003,
    0.0006062501,
    0.00071875006,
    0.00083125,
    0.0009437501,
    0.0012812499,
    0.00184375,
    0.00240625,
    0.00296875,
    0.0035312497,
    0.00409375,
    0.0046562497,
    0.0052187503,
    0.00578125,
    0.00634375,
    0.00690625,
    0.00746875,
    0.00803125,
    0.00859375,
    0.009156249,
    0.00971875,
    0.01140625,
    0.01421875,
    0.01703125,
    0.019843752,
    0.02265625,
    0.02546875,
    0.028281251,
    0.03109375,
    0.03390625,
    0.036718752,
    0.03953125,
    0.042343747,
    0.04515625,
    0.04796875,
    0.05078125,
    0.05359375,
    0.05640625,
    0.059218753,
    0.06203125,
    0.06484375,
    0.067656256,
    0.070468746,
    0.07328125,
    0.07609375,
    0.07890625,
    0.08171876,
    0.08453125,
    0.08734375,
    0.09015625,
    0.092968754,
    0.09578126,
    0.09859375,
    0.107031256,
    0.12109375,
    0.13515624,
    0.14921875,
    0.16328125,
    0.17734376,
    0.19140625,
    0.20546874,
    0.21953125,
    0.23359375,
    0.24765624,
    0.26171875,
    0.27578127,
    0.28984374,
    0.30390626,
    0.31796873,
    0.33203125,
    0.34609374,
    0.36015624,
    0.37421876,
    0.38828123,
    0.40234375,
    0.41640624,
    0.43046874,
    0.44453126,
    0.45859373,
    0.47265625,
    0.4867187,
    0.50078124,
    0.5148437,
    0.5289062,
    0.54296875,
    0.5570313,
    0.5710938,
    0.58515626,
    0.5992187,
    0.61328125,
    0.6273438,
    0.6414063,
    0.65546876,
    0.6695312,
    0.68359375,
    0.6976563,
    0.7117188,
    0.72578126,
    0.7398437,
    0.75390625,
    0.7679688,
    0.78203124,
    0.79609376,
    0.8101562,
    0.82421875,
    0.8382813,
    0.85234374,
    0.86640626,
    0.8804687,
    0.89453125,
    0.9085938,
    0.92265624,
    0.93671876,
    0.9507812,
    0.96484375,
    0.9789063,
    0.99296874,
)


@cache
def dynamic_map() -> Float32s:
    """The 256 ascending levels of bitsandbytes' 8-bit dynamic map (`nested_quant_map`)."""
    positive = np.array(_DYNAMIC, dtype=np.float32)
    levels = np.concatenate([-positive[::-1], np.zeros(1, np.float32), positive, np.ones(1, np.float32)])
    levels.setflags(write=False)
    return levels
