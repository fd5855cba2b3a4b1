"""Block-wise quantization, bit for bit as bitsandbytes does it.

codebooks.py      the formats as data
layout.py         how a tensor is stored: raw, snapped or packed, and in which view
blocks.py         one block against a codebook
codes4_bf16.py    nf4 codes of bf16 values, by 16-bit comparisons
codes4.py         4-bit codes, two a byte
codes8.py         int8 codes, one scale a row
blocks8.py        int8 codes, one scale a block
runs.py           a run of values as codes, decoded slice by slice
nested_scales.py  block scales that are quantized themselves
nested.py         making them
snapping.py       values rounded to the grid of a format
snapping8.py      the same for int8
selection.py      put another code where a unit is hidden
kernels.py        all of these under one name
scales.py         the scales of a packed tensor, as they are stored, scaled and withheld
bnb_format.py     names, shapes and texts of a bitsandbytes checkpoint
bnb_reader.py     reading them back
"""
