"""Kernels are cheap to import, and compile where nothing can be kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fedqsn_cli.kernels.jit import kernel


def test_importing_kernels_imports_no_framework() -> None:
    code = (
        "import sys, fedqsn_cli.quantization.kernels, fedqsn_cli.quantization.bnb_reader\n"
        "print([name for name in ('torch', 'bitsandbytes', 'transformers', 'pyarrow') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout.decode().strip() == "[]", done.stderr.decode()


def test_a_kernel_compiles_where_its_machine_code_cannot_be_kept() -> None:
    namespace: dict[str, Any] = {}
    exec("def twice(x):\n    return x + x\n", namespace)  # no file: numba finds no place for a cache
    twice = kernel(namespace["twice"])
    assert twice(np.float32(1.5)) == 3.0


def test_machine_code_that_was_kept_loads_without_what_only_compiling_needs(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from fedqsn_cli.quantization import kernels\n"
        "assert kernels.all_finite(np.zeros(8, np.uint16), 'BF16')\n"
        "print('numba.np.arraymath' in sys.modules)"
    )
    # in a folder of our own: the one beside the sources may be read-only
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path), "NUMBA_CACHE_DIR": str(tmp_path)}
    for _ in range(2):  # the first one compiles
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout.decode().strip() == "False", done.stderr.decode()
