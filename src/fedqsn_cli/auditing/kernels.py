"""Compiled arithmetic of the audit. Sums of squares may be added in any order here: nothing is written from them."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedqsn_cli.kernels.jit import F, compiled, kernel, narrow, widen

PACKED = 3  # kind of 4-bit codes, beside those of floats
_TILE = 256  # values whose ranks stay in the first cache


def loose(function: F) -> F:
    """Compile with reordered sums, which the compiler needs to add several numbers at once."""
    return compiled(function, fastmath={"reassoc", "contract", "nsz"})


@kernel
def share_edges(edges: Any, block: int, guess: Any) -> None:
    """Replace the guess of elements that may attain a scale: one of those with the same edge does, the others do not.

    Args:
        edges: fp32 [n] the scale with the element's sign, NaN where there is none. guess: fp32 [n], in place.
    """
    for start in range(0, edges.size, block):
        stop = min(start + block, edges.size)
        for at in range(start, stop):
            edge = edges[at]
            if np.isnan(edge):
                continue
            rivals = 0
            for other in range(start, stop):
                rivals += abs(edges[other]) == abs(edge)
            guess[at] = (edge + np.float32(rivals - 1) * guess[at]) / np.float32(rivals)


@loose
def cells_of(vectors: Any, planes: Any, out: Any) -> None:
    """On which side of each plane a vector is, one bit a plane; the same for a vector and its negative.

    Args:
        vectors: fp32 [n, d]. planes: fp32 [1 to 17, d]. out: uint16 [n].
    """
    for at in range(vectors.shape[0]):
        vector, cell, first = vectors[at], np.uint32(0), np.uint32(0)
        for k in range(planes.shape[0]):
            product, plane = np.float32(0), planes[k]
            for i in range(plane.size):
                product += plane[i] * vector[i]
            side = np.uint32(product > 0)
            first = side if k == 0 else first
            cell = cell << np.uint32(1) | (side ^ first)
        out[at] = cell


@kernel
def cell_mates(one: Any, other: Any, order: Any, begin: Any, end: Any, first: int, least: Any, pairs: Any) -> Any:
    """Pairs of vectors in the same cell whose |cosine| is over `least`.

    Args:
        one, other: fp32 [n, d] and [m, d], of length 1. order: [n] indices of `one`, cell by cell.
        begin, end: [m] where the cell of each vector of `other` is in that order. first: vector of `other` to begin at.
        pairs: int64 [room, 2], filled with (index into `one`, index into `other`).

    Returns:
        Number of pairs, and the vector of `other` to go on with: there was no more room, or 2^24 were looked at.
    """
    found = looked_at = 0
    for right in range(first, other.shape[0]):
        size = end[right] - begin[right]
        if right > first and (found + size > pairs.shape[0] or looked_at + size > 1 << 24):
            return found, right
        looked_at += size
        for at in range(begin[right], end[right]):
            left = order[at]
            cosine = np.float32(0)
            for k in range(one.shape[1]):
                cosine += one[left, k] * other[right, k]
            if abs(cosine) > least and found < pairs.shape[0]:
                pairs[found, 0] = left
                pairs[found, 1] = right
                found += 1
    return found, other.shape[0]


@loose
def project_rows(bits: Any, kind: int, low: int, planes: Any, out: Any) -> None:
    """Fill out, [n, planes + 2], with products of parts of rows with all planes, their sums, and sums of squares.

    Args:
        bits: [n, cols] stored numbers; the part begins at column `low`. kind: of their dtype.
        planes: fp32 [planes, width].
    """
    count, width = planes.shape
    wide = np.empty(width, np.uint32)
    x = wide.view(np.float32)
    for row in range(bits.shape[0]):
        widen(bits[row, low : low + width], kind, wide)
        total = squares = np.float32(0)
        for i in range(width):
            total += x[i]
            squares += x[i] * x[i]
        out[row, count], out[row, count + 1] = total, squares
        for k in range(count):
            product, plane = np.float32(0), planes[k]
            for i in range(width):
                product += plane[i] * x[i]
            out[row, k] = product


@loose
def project_columns(bits: Any, kind: int, planes: Any, out: Any) -> None:
    """As `project_rows` for columns: bits [height, n], planes [planes, height]."""
    count, height = planes.shape
    wide, sums = np.empty(_TILE, np.uint32), np.empty((count + 2, _TILE), np.float32)
    x = wide.view(np.float32)
    for left in range(0, bits.shape[1], _TILE):
        right = min(left + _TILE, bits.shape[1])
        sums[:] = 0
        for row in range(height):
            widen(bits[row, left:right], kind, wide)
            for k in range(count):
                part, plane = sums[k], planes[k, row]
                for i in range(_TILE):
                    part[i] += plane * x[i]
            total, squares = sums[count], sums[count + 1]
            for i in range(_TILE):
                total[i] += x[i]
                squares[i] += x[i] * x[i]
        for i in range(right - left):
            for k in range(count + 2):
                out[left + i, k] = sums[k, i]


@kernel
def block_peaks(x: Any, block: int, down: bool, out: Any) -> None:
    """out = the largest magnitude of each value's block; [rows, cols], blocks along rows or down columns."""
    rows, cols = x.shape
    if down:
        for top in range(0, rows, block):
            out[top] = 0
            for row in range(top, min(top + block, rows)):
                for col in range(cols):
                    out[top, col] = max(out[top, col], abs(x[row, col]))
            for row in range(top + 1, min(top + block, rows)):
                out[row] = out[top]
        return
    for row in range(rows):
        for left in range(0, cols, block):
            peak = np.float32(0)
            for col in range(left, min(left + block, cols)):
                peak = max(peak, abs(x[row, col]))
            out[row, left : min(left + block, cols)] = peak


@kernel
def largest_values(sent: Any, peaks: Any, divisor: Any, kind: int, out: Any) -> None:
    """out = sent / divisor, rounded to a dtype, where a value attains the peak of its block; NaN elsewhere."""
    values, bits = np.empty(_TILE, np.float32), np.empty(_TILE, np.uint16)
    for start in range(0, sent.size, _TILE):
        x, peak, target = sent[start : start + _TILE], peaks[start : start + _TILE], out[start : start + _TILE]
        for i in range(x.size):
            values[i] = x[i] / divisor
        narrow(values.view(np.uint32), kind, bits)
        widen(bits, kind, values.view(np.uint32))
        for i in range(x.size):
            target[i] = values[i] if abs(x[i]) >= peak[i] else np.float32(np.nan)


@kernel
def snapped_cells(sent: Any, peaks: Any, bounds: Any, levels: Any, low: Any, high: Any) -> None:
    """The ends of the cell that each value was rounded to, where values were stored, not codes: fp32 [n] each.

    Args:
        sent: the values. peaks: the largest magnitude in the block of each, which stands for its scale.
        bounds: between levels, and -1 and 1 at the ends. levels: of values / scale, rising.
        low, high: the ends, each moved outwards by a hundredth of the scale; infinite where the scale is not in sight.
    """
    shares, ranks = np.empty(_TILE, np.float32), np.empty(_TILE, np.int32)
    for start in range(0, sent.size, _TILE):
        size = min(_TILE, sent.size - start)
        for at in range(size):
            peak = peaks[start + at]
            shares[at] = sent[start + at] / peak if peak > 0 else np.float32(0)
            ranks[at] = 0
        for bound in bounds[1:-1]:
            for at in range(size):
                ranks[at] += not bound >= shares[at]
        for at in range(size):
            rank, peak = ranks[at], peaks[start + at]
            hidden = abs(shares[at] - levels[rank]) > np.float32(0.02)
            low[start + at] = np.float32(-np.inf) if hidden else (bounds[rank] - np.float32(0.01)) * peak
            high[start + at] = np.float32(np.inf) if hidden else (bounds[rank + 1] + np.float32(0.01)) * peak


@kernel
def add_reading(
    values: Any, certain: Any, low: Any, high: Any, row_flags: Any, flags: Any,
    first: Any, total: Any, count: Any, lowest: Any, highest: Any, edge: Any,
) -> None:  # fmt: skip
    """Add what one proxy says about rows to what others said; arrays are those of `Evidence` and `Reading`."""
    for row in range(values.shape[0]):
        if not row_flags[row]:
            continue
        line = flags[row if flags.shape[0] > 1 else 0]
        for col in range(values.shape[1]):
            shown, value, sure = line[col] > 0, values[row, col], certain[row, col]
            begin, end, known = low[row, col], high[row, col], edge[row, col]
            at_end = (value >= end or value <= begin) and not np.isnan(sure)
            edge[row, col] = sure if shown and at_end and not abs(known) <= abs(sure) else known
            lowest[row, col] = larger(lowest[row, col], begin) if shown else lowest[row, col]
            highest[row, col] = -larger(-highest[row, col], -end) if shown else highest[row, col]
            first[row, col] = value if shown and count[row, col] == 0 else first[row, col]
            total[row, col] += value if shown else np.float32(0)
            count[row, col] += np.float32(shown)


@kernel
def larger(one: Any, other: Any) -> Any:
    """The larger of two numbers, NaN if one is."""
    return other if other > one or np.isnan(other) else one


@kernel
def clamp(guess: Any, low: Any, high: Any, total: Any, count: Any, out: Any) -> None:
    """out = the guess, moved into an interval, or the mean of what was shown where that is empty: fp32 [n] each."""
    for at in range(out.size):
        inside = -larger(-larger(guess[at], low[at]), -high[at])
        out[at] = inside if low[at] <= high[at] else total[at] / max(count[at], np.float32(1))


@loose
def load_row(data: Any, kind: int, start: int, scales: Any, block: int, pairs: Any, divisor: Any, row: Any) -> None:
    """Fill a row, fp32 [cols], with stored numbers / divisor, from number `start` on.

    Args:
        data: bits of floats, or packed 4-bit codes. kind: of their dtype, or PACKED.
        scales, block, pairs: of codes: fp32 scales of blocks of so many; the two levels of each byte, [256] 64 bits.
    """
    if kind != PACKED:
        widen(data[start : start + row.size], kind, row.view(np.uint32))
        if divisor != 1:
            for i in range(row.size):
                row[i] /= divisor
        return
    codes, at = data[start // 2 : (start + row.size + 1) // 2], start % 2
    words = np.empty(codes.size, np.uint64)
    for i in range(codes.size):
        words[i] = pairs[codes[i]]
    levels, first = words.view(np.float32)[at : at + row.size], 0
    while first < row.size:
        index = (start + first) // block
        stop = min((index + 1) * block - start, row.size)
        source, part, scale = levels[first:stop], row[first:stop], scales[index] / divisor
        for i in range(part.size):
            part[i] = source[i] * scale
        first = stop


@loose
def compare(
    bits: Any, w_kind: int, data: Any, kind: int, skipped: int, scales: Any, block: int, pairs: Any, divisor: Any,
    certain: Any, base: Any, row_flags: Any, flags: Any, tolerance: Any, out: Any,
) -> None:  # fmt: skip
    """Add to out what a guess is worth on the visible elements of rows; wide copies of a row stay in the first cache.

    Args:
        bits, w_kind: the weights, as `load_row` takes them. data, kind, scales, block, pairs, divisor: the guess,
            likewise; it begins after `skipped` numbers.
        certain: fp32 [rows, cols] what the attacker is certain of, NaN where nothing is; [0, cols] for the guess.
        base: fp32 [rows, cols]; [0, cols] for zeros.
        row_flags: bool [rows]. flags: fp32 [1, cols] or [rows, cols], 1 where visible; an element needs both.
        tolerance: relative; what is certain and within it counts as exact.
        out: [8] sums over visible elements: count, w, w², guess, guess², (w - guess)², exact ones, (guess - base)².
    """
    cols, with_base = flags.shape[1], base.shape[0] > 0
    one = np.float32(1) if kind == PACKED else divisor
    w, guess = np.empty(cols, np.float32), np.empty(cols, np.float32)
    for row in range(row_flags.size):
        if not row_flags[row]:
            continue
        load_row(bits, w_kind, row * cols, scales, block, pairs, np.float32(1), w)
        load_row(
            data, kind, skipped + row * cols, scales, block, pairs, divisor if kind == PACKED else np.float32(1), guess
        )
        sure = certain[row] if certain.shape[0] else guess
        line = flags[row if flags.shape[0] > 1 else 0]
        n = ws = ww = gs = gg = dd = exact = moved = np.float32(0)
        for col in range(cols):
            a = w[col] * line[col]
            b = guess[col] / one * line[col]
            d = a - b
            m = b - base[row, col] * line[col] if with_base else b
            n += line[col]
            ws += a
            ww += a * a
            gs += b
            gg += b * b
            dd += d * d
            moved += m * m
            off = abs(w[col] - sure[col] / one)
            exact += line[col] if off <= tolerance * abs(w[col]) else np.float32(0)
        out[0] += n
        out[1] += ws
        out[2] += ww
        out[3] += gs
        out[4] += gg
        out[5] += dd
        out[6] += exact
        out[7] += moved
