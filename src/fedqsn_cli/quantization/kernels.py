"""All kernels under one name. Importing it imports numba, and neither torch nor bitsandbytes; nothing compiles yet."""

from __future__ import annotations

from fedqsn_cli.kernels.jit import NonFinite
from fedqsn_cli.kernels.values import all_finite, narrowed, scale_values, widened
from fedqsn_cli.quantization.codes4 import dequantize_4bit, quantize_4bit, quantize_4bit_with
from fedqsn_cli.quantization.codes8 import dequantize_int8, quantize_int8
from fedqsn_cli.quantization.nested import double_quantize
from fedqsn_cli.quantization.nested_scales import DoubleQuantized, double_dequantize
from fedqsn_cli.quantization.selection import select_codes_cols, select_codes_elements, select_codes_rows
from fedqsn_cli.quantization.snapping import snap

__all__ = [
    "DoubleQuantized",
    "NonFinite",
    "all_finite",
    "dequantize_4bit",
    "dequantize_int8",
    "double_dequantize",
    "double_quantize",
    "narrowed",
    "quantize_4bit",
    "quantize_4bit_with",
    "quantize_int8",
    "scale_values",
    "select_codes_cols",
    "select_codes_elements",
    "select_codes_rows",
    "snap",
    "widened",
]
