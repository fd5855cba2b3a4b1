"""Compile the kernels that most tests need, once: several workers would each compile them at the same time.

`make setup` does this, with the jobs of a test that takes every option of an export within a few numbers.
"""

from __future__ import annotations

from auditing.test_clean_jobs import FEW, check
from support.untrainable import accept_untrainable_models


def compile_kernels() -> None:
    """Play the jobs; numba keeps the machine code beside the sources."""
    accept_untrainable_models()
    for number in FEW:
        check(number)


if __name__ == "__main__":
    compile_kernels()
