"""Quantizing in memory: `python -m benchmarks.kernels {ours,bitsandbytes} {fp32,bf16} MILLIONS RUNS`.

Prints a JSON list of seconds. Both get the same numbers, get as many threads as there are processors, and are warm.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any


def numbers(millions: float) -> Any:
    """Normal fp32 numbers that bf16 can hold exactly."""
    import numpy as np

    x = np.random.default_rng(0).standard_normal(int(millions * 2**20), np.float32)
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def ours(x: Any, bf16: bool) -> Callable[[], object]:
    """quantize_4bit of this package, into arrays that are there."""
    import numpy as np

    from fedqsn_cli.quantization import kernels

    dtype = "BF16" if bf16 else "F32"
    if bf16:
        x = (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    packed, absmax = np.zeros(x.size // 2, np.uint8), np.zeros(x.size // 64, np.float32)
    return lambda: kernels.quantize_4bit(x, dtype, format="nf4", block=64, packed=packed, absmax=absmax)


def bitsandbytes(x: Any, bf16: bool) -> Callable[[], object]:
    """quantize_4bit of bitsandbytes on the CPU."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    tensor = torch.from_numpy(x).to(torch.bfloat16 if bf16 else torch.float32)
    return lambda: quantize_4bit(tensor, blocksize=64, quant_type="nf4")


def measure(who: str, dtype: str, millions: float, runs: int) -> list[float]:
    """Seconds of each run."""
    call = {"ours": ours, "bitsandbytes": bitsandbytes}[who](numbers(millions), dtype == "bf16")
    call()
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))))
