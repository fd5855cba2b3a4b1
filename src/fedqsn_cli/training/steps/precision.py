"""The number format that a training computes in, and what makes it repeatable."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

ChosenPrecision = Literal["fp32", "bf16", "bf16-weights"]


def choose_precision(name: str, device: torch.device) -> ChosenPrecision:
    """The precision to train in; for "auto" mixed precision, if the hardware computes bf16 faster than fp32.

    A CPU without bf16 instructions emulates them, which is many times slower.
    """
    if name == "bf16-weights":
        return "bf16-weights"
    if name != "auto":
        return "bf16" if name == "bf16" else "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _cpu_has_bf16() else "fp32"


def weights_dtype(precision: str) -> torch.dtype:
    """The dtype of the weights while they are trained."""
    return torch.bfloat16 if precision == "bf16-weights" else torch.float32


def _cpu_has_bf16() -> bool:
    """Does the CPU have instructions for bf16 matrices (AVX512-BF16, AMX; on ARM what oneDNN can use)?"""
    if platform.machine() in ("x86_64", "AMD64"):
        tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, test, bool)() for test in tests)
    test = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return test is not None and bool(test())


@contextmanager
def repeatable(device: torch.device, seed: int) -> Iterator[None]:
    """Make dropout, and on a GPU every kernel, repeatable for a seed; restores torch's settings afterwards."""
    cuda = device.type == "cuda"
    if cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, at its first use
    strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.manual_seed(seed % 2**63)
        torch.use_deterministic_algorithms(strict or cuda, warn_only=warn or cuda)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(strict, warn_only=warn)
