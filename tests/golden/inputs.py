"""What the product is given: the small checkpoints of `support.models`, and updates.

Made apart from the product: what is recorded was made of these very bytes, and has to be made of them again.

draft(proxy, shapes, noise(1)).write(folder)            an update as a client would send it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from golden.running import sha256
from support.models import SHAPES as SHAPES
from support.models import Values, seen, visible_elements
from support.models import make_config as make_config
from support.models import make_model as make_model
from support.models import make_tensors as make_tensors
from support.models import noise as noise
from support.raw_safetensors import Tensors, to_bits, write_file


@dataclass
class Update:
    """An update on its way: what its files will hold. Change it, then `write` it."""

    tensors: Tensors
    manifest: dict[str, Any]

    def write(self, folder: Path, *, honest: bool = True) -> Path:
        """Write it; `honest` puts the file's real digest into update.json."""
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "update.safetensors", self.tensors, {"format": "pt"})
        if honest:
            self.manifest["files"] = {"update.safetensors": sha256(folder / "update.safetensors")}
        (folder / "update.json").write_text(json.dumps(self.manifest))
        return folder


def draft(
    proxy: Path, shapes: Mapping[str, tuple[int, ...]], values: Values, *, examples: int = 10, precision: str = "fp32"
) -> Update:
    """An update for a proxy: U on its visible units, `values(name, full shape)[visible]`.

    Units that are not seen drop out of their dimension; single weights lie flat.

    Args:
        shapes: of all float tensors of the model, under the proxy's own names.
    """
    dtype = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}[precision]
    manifest = json.loads((proxy / "proxy.json").read_bytes())
    shown = visible_elements(proxy)
    tensors: Tensors = {}
    for name, shape in shapes.items():
        whole = np.asarray(values(name, shape), np.float32)
        if name in shown and manifest.get("train") is None:
            whole = seen(whole, shown[name], manifest["tensors"][name]["axis"])
        tensors[name] = (dtype, to_bits(whole, dtype))
    facts = {
        "format": "fedqsn-update/1",
        "proxy_id": manifest["proxy_id"],
        "proxy_sha256": sha256(proxy / "proxy.json"),
        "num_examples": examples,
        "steps": 3,
        "losses": {"first": 1.5, "last": 1.25, "eval_before": None, "eval_after": None},
        "precision": precision,
        "tool": "test",
        "files": {},
    }
    return Update(tensors, facts)
