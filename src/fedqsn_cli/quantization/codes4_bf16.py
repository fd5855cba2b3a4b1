"""nf4 codes of bf16 values by comparing 16-bit numbers: half the width, and no division.

A value's code is the number of bounds below x * (1 / absmax), in fp32. For one absmax that product never falls while x
rises. So the code is also the number of bf16 values in a short list, one a bound, that x reaches: the smallest x whose
product is above the bound. Twice the absmax gives twice the list, so that there are as many lists as bf16 has
significands; absmax near the ends of the range, where fp32 rounds otherwise, get lists of their own.

Key: bf16 as a 16-bit number that orders as the values do. Magnitudes as they are stored; negative ones complemented.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedqsn_cli.kernels.jit import kernel, to_bits, to_float, view_kernel
from fedqsn_cli.quantization.blocks import BATCH, SMALLEST, pack_pairs
from fedqsn_cli.quantization.codebooks import LEVELS

SIGNIFICANDS = 128
LANES = 32  # every block is a multiple of it; a loop of fixed length becomes one instruction a step
NEGATIVE = 7  # bounds of nf4 below zero; none is zero
LOWEST, HIGHEST = 8, 250  # biased exponents of absmax for which all products are normal numbers
MAGNITUDE, EXPONENT, INFINITE = np.uint16(0x7FFF), np.uint16(0x7F80), np.uint16(0x7F80)
ONE = np.int16(127 << 7)  # key of 1.0; twice a value has a key farther from zero by 1 << 7


@view_kernel
def key_of(bits: Any) -> Any:
    """The key of a stored bf16; its own inverse."""
    signed = np.int16(bits)
    return np.int16(signed ^ np.int16(np.int16(signed >> np.int16(15)) & np.int16(0x7FFF)))


@view_kernel
def find_thresholds(absmax: Any, bounds: Any, thresholds: Any) -> None:
    """thresholds[k] = the smallest key whose value times 1 / absmax is above bounds[k]."""
    factor = np.float32(1) / absmax
    for k in range(bounds.size):
        near = np.int32(key_of(np.uint16(to_bits(bounds[k] * absmax) >> np.uint32(16)))) - np.int32(2)
        while not to_float(np.uint32(np.uint16(key_of(np.uint16(near)))) << np.uint32(16)) * factor > bounds[k]:
            near += np.int32(1)
        thresholds[k] = near
    thresholds[bounds.size] = 0  # fills a vector


@view_kernel
def find_all_thresholds(bounds: Any, table: Any) -> None:
    """Row i of the table, [SIGNIFICANDS, LEVELS]: the thresholds of absmax = 1 + i / SIGNIFICANDS."""
    for i in range(SIGNIFICANDS):
        find_thresholds(np.float32(1) + np.float32(i) / np.float32(SIGNIFICANDS), bounds, table[i])


@view_kernel
def largest_magnitude(bits: Any) -> Any:
    """The largest magnitude of bf16 values, as it is stored."""
    most = np.uint16(0)
    for i in range(bits.size):
        magnitude = np.uint16(bits[i] & MAGNITUDE)
        most = magnitude if magnitude > most else most
    return most


@view_kernel
def count_reached(bits: Any, thresholds: Any, ranks: Any) -> None:
    """ranks[i] = how many of 15 ascending thresholds the key of bits[i] reaches: a search by four comparisons."""
    t0, t1, t2, t3, t4 = thresholds[0], thresholds[1], thresholds[2], thresholds[3], thresholds[4]
    t5, t6, t7, t8, t9 = thresholds[5], thresholds[6], thresholds[7], thresholds[8], thresholds[9]
    t10, t11, t12, t13, t14 = thresholds[10], thresholds[11], thresholds[12], thresholds[13], thresholds[14]
    for start in range(0, bits.size, LANES):
        source, target = bits[start : start + LANES], ranks[start : start + LANES]
        for i in range(LANES):
            key = key_of(source[i])
            eight = key >= t7
            four = key >= (t11 if eight else t3)
            two = key >= ((t13 if eight else t5) if four else (t9 if eight else t1))
            low = (t6 if two else t4) if four else (t2 if two else t0)
            high = (t14 if two else t12) if four else (t10 if two else t8)
            one = key >= (high if eight else low)
            target[i] = np.int16(np.int16(8) * eight + np.int16(4) * four + np.int16(2) * two + np.int16(1) * one)


@kernel
def encode_bf16(bits: Any, block: int, bounds: Any, packed: Any, absmax: Any) -> bool:
    """nf4 codes and scales of whole blocks of bf16 values. Returns False if a value is not finite."""
    batch = max(block, BATCH)
    ranks, thresholds = np.empty(batch, np.int16), np.empty(LEVELS, np.int16)
    table, fine = np.empty((SIGNIFICANDS, LEVELS), np.int16), True
    find_all_thresholds(bounds, table)
    for begin in range(0, bits.size, batch):
        part = bits[begin : min(begin + batch, bits.size)]
        for start in range(0, part.size, block):
            values = part[start : start + block]
            most = largest_magnitude(values)
            scale = to_float(np.uint32(most) << np.uint32(16))
            absmax[(begin + start) // block] = scale
            exponent = most >> np.uint16(7)
            if LOWEST <= exponent <= HIGHEST:
                row, shift = table[most & np.uint16(127)], np.int16(np.int16(most & EXPONENT) - ONE)
                for k in range(NEGATIVE):  # two loops without a choice, for vector instructions
                    thresholds[k] = row[k] - shift
                for k in range(NEGATIVE, LEVELS):
                    thresholds[k] = row[k] + shift
            elif most < INFINITE:
                find_thresholds(max(scale, SMALLEST), bounds, thresholds)
            else:
                fine = False
            count_reached(values, thresholds, ranks[start : start + block])
        pack_pairs(ranks[: part.size].view(np.uint32), packed[begin // 2 : (begin + part.size) // 2])
    return fine
