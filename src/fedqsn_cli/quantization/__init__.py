"""Block-wise quantization, bit for bit as bitsandbytes does it.

    codebooks.py    the formats as data
    threads.py      one pool of threads for all kernels
    jit.py          how kernels are compiled; 16-bit floats to fp32 and back
    floats.py       stored floats of any dtype as fp32, piece by piece
    blocks.py       one block against a codebook
    codes4.py       4-bit codes, two a byte
    codes8.py       int8 codes, one scale a row
    nested.py       block scales that are quantized themselves
    snapping.py     values rounded to the grid of a format (snapping8.py: of int8)
    selection.py    put another code where a unit is hidden
    kernels.py      all of these under one name
    values.py       finite? scaled; widened and narrowed
    scales.py       the scales of a packed tensor, as they are stored, scaled and withheld
    bnb_format.py   names, shapes and texts of a bitsandbytes checkpoint
    bnb_reader.py   reading them back
"""
