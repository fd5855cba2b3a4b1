"""What the tests of the owner's commands share: small checkpoints, updates, and views of what was written.

model = make_model(folder, "bert", dtype="BF16", hidden=33)     a checkpoint of a few kilobytes, in milliseconds
send(proxy, folder, lambda name, shape: ...)                    an update as a client would send it
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import Losses, UpdateManifest, file_digest, manifest_bytes
from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.masks import job_key
from fedqsn_cli.models.model import model_tensors, open_model
from support.models import SHAPES as SHAPES
from support.models import Values, seen
from support.models import make_config as make_config
from support.models import make_model as make_model
from support.models import make_tensors as make_tensors
from support.models import noise as noise
from support.models import visible_elements as visible_elements
from support.raw_safetensors import Tensors as Tensors
from support.raw_safetensors import read_file as read_file
from support.raw_safetensors import read_model as read_model
from support.raw_safetensors import to_bits as to_bits
from support.raw_safetensors import to_floats as to_floats
from support.raw_safetensors import write_file as write_file
from support.raw_safetensors import write_model as write_model

Array = NDArray[Any]

# ------------------------------------------------------------------------------------------------ looking


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def listing(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Everything below a folder, hidden things too: type and mode, size, digest. For "nothing was written"."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        digest = file_digest(path) if path.is_file() else ""
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_size if digest else 0, digest)
    return found


@contextmanager
def nothing_written(folder: Path) -> Iterator[None]:
    """Fails when anything below the folder is another one afterwards."""
    before = listing(folder)
    yield
    assert listing(folder) == before


def drawn(key: bytes, scope: Sequence[str], group: str, allowed: Array, ratio: float) -> NDArray[np.bool_]:
    """The units that a key draws, exactly as docs/formats.md puts it."""
    fields = [field.encode() for field in ("fedqsn/v1", *scope, group)]
    seed = hmac.digest(key, b"".join(len(field).to_bytes(8, "big") + field for field in fields), "sha256")
    ranks = np.frombuffer(hashlib.shake_256(seed).digest(8 * allowed.size), "<u8")
    candidates = sorted(np.flatnonzero(allowed), key=lambda unit: (ranks[unit], unit))
    hidden = np.zeros(allowed.size, np.bool_)
    hidden[candidates[: max(0, min(round(ratio * len(candidates)), len(candidates) - 1))]] = True
    return hidden


def hidden_elements(model: Path, key: Path) -> dict[str, NDArray[np.bool_]]:
    """For each tensor of a global model the elements that the key's server mask hides.

    The draw is written out here once more; only the plan (roles, groups, axes) is the product's own.
    """
    job = job_key.load(key)
    found = {}
    for tensor in open_model(str(model), axis=job.axis, overrides=job.overrides).plan.tensors:
        flags = np.zeros(tensor.view, np.bool_)
        ratio = job.p1 if tensor.p1 is None else tensor.p1
        for part in range(tensor.view[0] if tensor.masked else 0):
            units = drawn(job.key, ("server",), tensor.groups[part], np.ones(tensor.units, np.bool_), ratio)
            if tensor.axis == "row":
                flags[part, units, :] = True
            elif tensor.axis == "column":
                flags[part][:, units] = True
            else:
                flags[part] = units.reshape(tensor.view[1:])
        found[tensor.name] = flags.reshape(tensor.shape)
    return found


# ------------------------------------------------------------------------------------------------ updates


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
            self.manifest["files"] = {"update.safetensors": file_digest(folder / "update.safetensors")}
        (folder / "update.json").write_text(json.dumps(self.manifest))
        return folder


def draft(proxy: Path, values: Values, *, examples: int = 10, precision: str = "fp32") -> Update:
    """An update for a proxy: U on its visible units, `values(name, full shape)[visible]`, in the proxy's own names.

    Shapes follow docs/formats.md: units that are not seen drop out of their dimension; single weights lie flat.
    """
    dtype = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}[precision]
    manifest = json.loads((proxy / "proxy.json").read_bytes())
    shown = visible_elements(proxy)
    tensors: Tensors = {}
    with Checkpoint.open(proxy) as checkpoint:
        logical = model_tensors(checkpoint)
    for name, tensor in logical.items():
        if not tensor.is_float:
            continue
        whole = np.asarray(values(name, tensor.shape), np.float32)
        if name in shown and manifest.get("train") is None:
            whole = seen(whole, shown[name], manifest["tensors"][name]["axis"])
        tensors[name] = (dtype, to_bits(whole, dtype))
    return Update(tensors, claims(proxy, manifest["proxy_id"], num_examples=examples, precision=precision))


def claims(proxy: Path, proxy_id: str, **facts: Any) -> dict[str, Any]:
    """What update.json says about an update of a proxy; the digests of its files come when it is written."""
    told = UpdateManifest(
        proxy_id=proxy_id,
        proxy_sha256=file_digest(proxy / "proxy.json"),
        steps=3,
        losses=Losses(first=1.5, last=1.25, eval_before=None, eval_after=None),
        tool="test",
        files={},
        **facts,
    )
    document: dict[str, Any] = json.loads(manifest_bytes(told))
    return document


def send(proxy: Path, folder: Path, values: Values | None = None, **options: Any) -> Path:
    """Write an update for a proxy; without values one of zeros."""
    return draft(proxy, values or (lambda name, shape: np.zeros(shape)), **options).write(folder)


# ------------------------------------------------------------------------------------------------ processes


def environment(**more: str) -> dict[str, str]:
    """The environment of a child process that finds the same sources."""
    import fedqsn_cli

    path = with_sources(Path(fedqsn_cli.__file__).parents[1])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def with_sources(*folders: Path) -> str:
    """PYTHONPATH with these folders in front; packages may come from what it is."""
    return os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))


HOST, USER = "Zq7-this-machine", "Zq7-this-user"


def set_host_names(patch: Any) -> None:
    """Give machine and user names that stand nowhere by chance; a real one may be a word of every model, or missing."""
    patch.setattr("socket.gethostname", lambda: HOST)
    patch.setattr("platform.node", lambda: HOST)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOSTNAME"):
        patch.setenv(name, HOST if name == "HOSTNAME" else USER)


def search_path(folder: Path) -> str:
    """A PATH on which `fedqsn` and `python` are those under test, with PYTHONPATH as `environment` has it.

    The programs beside the interpreter where there are: a temporary folder may be one in which nothing can be executed.
    """
    path = os.environ.get("PATH", os.defpath)
    beside = Path(sys.executable).parent
    if all(os.access(beside / name, os.X_OK) for name in ("fedqsn", "python")):
        return f"{beside}{os.pathsep}{path}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, command in {"fedqsn": "-m fedqsn_cli", "python": ""}.items():
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{path}"


def as_strings(arguments: Sequence[str | Path]) -> list[str]:
    """Arguments of a command as text."""
    return [str(argument) for argument in arguments]
