"""Compile the kernels that most tests need, once: several workers would each compile them at the same time.

`make setup` does this, with the jobs of a test that takes every option of an export within a few numbers, and with
merges in every way.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from auditing.test_clean_jobs import FEW, check
from merging.test_average import WAYS, partly_trained
from support.untrainable import accept_untrainable_models


def compile_kernels() -> None:
    """Play the jobs; numba keeps the machine code beside the sources."""
    accept_untrainable_models()
    for number in FEW:
        check(number)
    for axis in ("neuron", "input"):
        with tempfile.TemporaryDirectory() as folder:
            made = partly_trained(Path(folder), axis)
            for number, way in enumerate(WAYS):
                made.merged(f"merged-{number}", way)


if __name__ == "__main__":
    compile_kernels()
