"""Any job that the commands allow, as hypothesis draws it: family, dtype, sizes, axis, format, layout, ratios, fill."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedqsn_cli import export_proxy, mask, quantize
from support.helpers import SHAPES, hidden_elements, make_config, make_model, make_tensors, write_model

FAST_PROFILE = "tests"  # of hypothesis, in tests/conftest.py
ENOUGH = 2 << 30  # bytes; containers often have 64 MiB there
MEMORY = (  # where fsync costs nothing
    "/dev/shm" if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > ENOUGH else None
)
RATIOS = (0.0, 0.1, 0.5, 0.9)


def few(count: int) -> settings:
    """Settings for tests that write files: so many examples in `make soak`, and a third of them in `make test`."""
    fast = settings.get_current_profile_name() == FAST_PROFILE
    return settings(max_examples=max(4, count // 3) if fast else count, print_blob=False)


@dataclass(frozen=True)
class Scenario:
    """One job's options."""

    family: str
    dtype: str
    hidden: int
    inner: int
    shards: int
    axis: str
    format: str
    layout: str | None
    block_size: int
    double_quant: bool
    fill: str
    p1: float
    p2: float

    @property
    def packing(self) -> dict[str, Any]:
        """Options of quantize and export-proxy."""
        return {
            "format": self.format,
            "layout": self.layout,
            "block_size": self.block_size,
            "double_quant": self.double_quant,
        }


@st.composite
def scenarios(draw: st.DrawFn, **fixed: Any) -> Scenario:
    """Any scenario; options that are given are fixed."""

    def one(name: str, values: Any) -> Any:
        return fixed[name] if name in fixed else draw(st.sampled_from(list(values)))

    format = one("format", ("nf4", "fp4", "int8", "nf3", "nf2", "none"))
    layouts = ("bnb", "dense", None) if format in {"nf4", "fp4", "int8"} else ("dense", None)
    layout = one("layout", layouts if format != "none" else (None,))
    fill = one("fill", ("zero", "zero", "base"))
    packs = format in {"nf4", "fp4"} and layout != "dense" and fill == "zero"
    return Scenario(
        family=one("family", SHAPES),
        dtype=one("dtype", ("F32", "F16", "BF16")),
        hidden=one("hidden", (32, 33, 47, 64)),
        inner=one("inner", (48, 51, 128)),
        shards=one("shards", (1, 3)),
        axis=one("axis", ("neuron", "neuron", "input", "element")),
        format=format,
        layout=layout,
        block_size=one("block_size", (32, 64, 64, 256)),
        double_quant=one("double_quant", (False, packs)),
        fill=fill,
        p1=one("p1", RATIOS),
        p2=one("p2", RATIOS),
    )


@dataclass(frozen=True)
class JobFolder:
    """A scenario on disk: the global model, its public base, and shorthands for the commands."""

    scenario: Scenario
    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def key(self) -> Path:
        return self.root / "job.key"

    def copied(self, root: Path) -> JobFolder:
        """The same in another place, to be changed."""
        shutil.copytree(self.root, root)
        (root / "job.key").chmod(0o600)
        return JobFolder(self.scenario, root)

    @property
    def filled(self) -> dict[str, Any]:
        """Options about the fill."""
        return {"fill": "base", "public_base": str(self.root / "base")} if self.scenario.fill == "base" else {}

    def export(self, source: Path, name: str, *, clients: tuple[str, ...] = ("ann", "bob"), **options: Any) -> Path:
        """Export the proxies of one round into `name`/<client>; returns the folder of them all."""
        out = self.root / name
        export_proxy(
            str(source),
            out / "{client}",
            **{
                "client": clients,
                "round": 1,
                "key": self.key,
                "ledger": self.root / "ledger.jsonl",
                "axis": self.scenario.axis,
                "p1": self.scenario.p1,
                "p2": self.scenario.p2,
                **self.scenario.packing,
                **self.filled,
                **options,
            },
        )
        return out

    def server(self, source: Path, name: str) -> Path:
        """The server model of a global model."""
        mask(str(source), self.root / name, key=self.key, p1=self.scenario.p1, axis=self.scenario.axis, **self.filled)
        return self.root / name

    def quantized(self, source: Path, name: str) -> Path:
        """A quantized server model."""
        quantize(str(source), self.root / name, **self.scenario.packing)
        return self.root / name

    def rewritten(self, name: str, kind: str) -> Path:
        """The global model with every hidden weight changed to something else; needs the key."""
        hidden = hidden_elements(self.model, self.key)
        scenario = self.scenario
        tensors = make_tensors(scenario.family, dtype=scenario.dtype, hidden=scenario.hidden, inner=scenario.inner)
        for tensor, (dtype, bits) in tensors.items():
            tensors[tensor] = (dtype, replaced(bits, dtype, hidden[tensor], kind))
        return write_model(
            self.root / name, tensors, make_config(scenario.family, scenario.dtype), shards=scenario.shards
        )


@contextmanager
def job_folder(scenario: Scenario) -> Iterator[JobFolder]:
    """Write a scenario into a directory that lasts as long as the block."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        root = Path(folder)
        sizes = {"dtype": scenario.dtype, "hidden": scenario.hidden, "inner": scenario.inner}
        make_model(root / "model", scenario.family, shards=scenario.shards, **sizes)
        if scenario.fill == "base":
            make_model(root / "base", scenario.family, seed=1, **sizes)
        yield JobFolder(scenario, root)


KINDS = ("zero", "random", "huge", "inf", "nan", "all of it")
_LARGEST = {"F32": 0x7F7FFFFF, "F16": 0x7BFF, "BF16": 0x7F7F}
_INFINITE = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}


def replaced(bits: NDArray[Any], dtype: str, where: NDArray[np.bool_], kind: str) -> NDArray[Any]:
    """Stored bits with something else at `where`."""
    if dtype not in _LARGEST:
        return bits
    rng = np.random.default_rng(7)
    width = bits.dtype.type
    sign = rng.integers(2, size=bits.shape).astype(width) << width(bits.itemsize * 8 - 1)
    choices = {
        "zero": np.zeros_like(bits),
        "random": rng.integers(_INFINITE[dtype], size=bits.shape).astype(width) | sign,
        "huge": np.full_like(bits, _LARGEST[dtype]) | sign,
        "inf": np.full_like(bits, _INFINITE[dtype]) | sign,
        "nan": np.full_like(bits, _INFINITE[dtype] + 1) | sign,
    }
    if kind == "all of it":
        choices[kind] = np.choose(rng.integers(5, size=bits.shape), list(choices.values()))
    return np.where(where, choices[kind], bits).astype(width)
