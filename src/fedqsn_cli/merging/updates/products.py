"""Products of two factors, compiled: in double precision, in one order, rounded once to fp32.

Each element is Σ_k left[i, k] · right[k, j] with k rising, products and sums rounded one by one, whatever else is
computed with it: not so in BLAS, whose order depends on the shape of the product and on the processor.

Tiles are written as LLVM's vectors, because numba does not keep the sums of a tile in registers. LLVM cuts the vectors
to the width that the processor has.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import kernel

Doubles = NDArray[np.float64]

ROWS, LANES = 4, 8
VECTORS = 4 if get_host_cpu_features().get("avx512f") else 2
"""A tile: its rows, the numbers in a vector, and the vectors of a row, as many as there are registers for."""

WIDTH = VECTORS * LANES
BLOCK = 128  # columns that all rows go through together: 16 rows of them in double precision stay in L1

_VECTOR, _SINGLES = ir.VectorType(ir.DoubleType(), LANES), ir.VectorType(ir.FloatType(), LANES)
_LONG, _INT = ir.IntType(64), ir.IntType(32)


def product(left: Doubles, right: Doubles, scaling: float) -> NDArray[np.float32]:
    """scaling · left right, [rows, cols]; infinite or NaN where a factor or the result is.

    Args:
        left: [rows, rank]. right: [rank, cols].
    """
    rows, cols = left.shape[0], right.shape[1]
    left, right = _at_least(left, (ROWS, 1)), _at_least(right, (1, WIDTH))
    out = np.empty((left.shape[0], right.shape[1]), np.float32)
    _multiply(left, right, scaling, out)
    return out[:rows, :cols]


def _at_least(factor: Doubles, shape: tuple[int, int]) -> Doubles:
    """A factor in C order, with zeros added where it is smaller than a tile needs."""
    more = [(0, max(0, least - size)) for least, size in zip(shape, factor.shape, strict=True)]
    return np.ascontiguousarray(np.pad(factor, more) if np.any(more) else factor)


@kernel
def _multiply(left: Any, right: Any, scaling: float, out: Any) -> None:
    """Tile by tile; the last ones of rows and columns that are no multiple of a tile overlap those before."""
    rows, cols = out.shape
    for block in range(0, cols, BLOCK):
        for row in range(0, rows, ROWS):
            for column in range(block, min(block + BLOCK, cols), WIDTH):
                _tile(left, right, scaling, out, min(row, rows - ROWS), min(column, cols - WIDTH))


@intrinsic  # type: ignore[untyped-decorator]
def _tile(context: Any, left: Any, right: Any, scaling: Any, out: Any, row: Any, column: Any) -> Any:
    """ROWS rows and WIDTH columns of `out`, from `row` and `column` on."""
    signature = types.void(left, right, types.float64, out, types.intp, types.intp)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args, arguments, strict=True)
            if isinstance(kind, types.Array)
        ]
        _multiply_tile(builder, *arrays, *(arguments[at] for at in (2, 4, 5)))
        return context.get_dummy_value()

    return signature, generate


def _multiply_tile(builder: Any, left: Any, right: Any, out: Any, scaling: Any, row: Any, column: Any) -> None:
    """Generate the code of a tile: one pass over k, in which its sums stay in registers.

    Args:
        left, right, out: arrays, as numba has them. scaling, row, column: values.
    """
    rank, cols = (cgutils.unpack_tuple(builder, array.shape)[1] for array in (left, right))
    factors = [builder.mul(builder.add(row, _LONG(i)), rank) for i in range(ROWS)]
    before, loop, after = builder.block, builder.append_basic_block("terms"), builder.append_basic_block("tile")
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(_LONG)
    sums = [[builder.phi(_VECTOR) for _ in range(VECTORS)] for _ in range(ROWS)]
    start = builder.add(builder.mul(k, cols), column)
    terms = [builder.load(_at(builder, right.data, start, j * LANES, _VECTOR), align=8) for j in range(VECTORS)]
    new = []
    for line, first in zip(sums, factors, strict=True):
        factor = _spread(builder, builder.load(builder.gep(left.data, [builder.add(first, k)])))
        new.append([builder.fadd(total, builder.fmul(factor, term)) for term, total in zip(terms, line, strict=True)])
    following = builder.add(k, _LONG(1))
    for phi, value in [(k, following), *zip(sum(sums, []), sum(new, []), strict=True)]:
        phi.add_incoming(ir.Constant(phi.type, None), before)
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, rank), loop, after)
    builder.position_at_end(after)
    scale = _spread(builder, scaling)
    for i, line in enumerate(new):
        begin = builder.add(builder.mul(builder.add(row, _LONG(i)), cols), column)
        for j, total in enumerate(line):
            rounded = builder.fptrunc(builder.fmul(scale, total), _SINGLES)
            builder.store(rounded, _at(builder, out.data, begin, j * LANES, _SINGLES), align=4)


def _at(builder: Any, data: Any, start: Any, more: int, kind: Any) -> Any:
    """Where the vector begins that is so many numbers behind the first one of an array."""
    return builder.bitcast(builder.gep(data, [builder.add(start, _LONG(more))]), kind.as_pointer())


def _spread(builder: Any, value: Any) -> Any:
    """A vector that holds one number everywhere."""
    nothing = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(nothing, value, _INT(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES))
