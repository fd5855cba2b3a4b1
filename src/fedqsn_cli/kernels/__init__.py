"""Digests, and what compiled kernels share: the compiler, threads, pieces of tensors. Nothing here knows about models.

jit.py           how kernels are compiled and cached; 16-bit floats to fp32 and back
threads.py       one pool of threads for all kernels
floats.py        stored floats of any dtype as fp32, piece by piece
values.py        finite? scaled; widened and narrowed
fill.py          overwrite hidden rows, columns or elements in place
read_ahead.py    run calls ahead of their use, results in order
digests.py       the digests that are recorded, and how they are written
hash_threads.py  threads that compute digests behind the work
"""
