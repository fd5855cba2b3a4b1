"""Proxies that leak, made from clean ones: change tensors or files, then sign everything anew, as an insider could."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedqsn_cli import export_proxy, strictjson
from fedqsn_cli.artifacts.ledger_head import write_head
from fedqsn_cli.artifacts.manifests import ProxyManifest, file_digest, read_manifest
from fedqsn_cli.auditing.checks import run_checks
from fedqsn_cli.auditing.completeness import Collector
from fedqsn_cli.auditing.findings import Audit
from fedqsn_cli.auditing.inputs import open_inputs
from fedqsn_cli.auditing.rules import CHECKS
from fedqsn_cli.checkpoint import ArtifactWriter
from fedqsn_cli.export.outputs import METADATA, ClientOutput, tensor_specs
from fedqsn_cli.export.pipeline import run
from fedqsn_cli.masks import job_key
from fedqsn_cli.masks.job_masks import ServerMasks
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.model import open_model
from fedqsn_cli.models.tensor_task import tensor_tasks
from fedqsn_cli.options import AuditOptions
from fedqsn_cli.planning.tensor_plan import TensorPlan
from fedqsn_cli.progress import Silent
from support.families import build
from support.keys import known_key

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class AuditedJob:
    """A model, a key, a ledger, and the proxies of a few clients, all in one folder."""

    home: Path
    clients: tuple[str, ...]

    @property
    def truth(self) -> Path:
        return self.home / "truth"

    @property
    def base(self) -> Path | None:
        return self.home / "base" if (self.home / "base").exists() else None

    @property
    def key(self) -> Path:
        return self.home / "job.key"

    @property
    def ledger(self) -> Path:
        return self.home / "ledger.jsonl"

    def proxy(self, client: str = "alice") -> Path:
        return self.home / client

    def copy(self, home: Path) -> AuditedJob:
        """The same job in another folder, to be tampered with."""
        shutil.copytree(self.home, home)
        return AuditedJob(home, self.clients)

    def hidden(self, tensor: str) -> np.ndarray[Any, Any]:
        """Hidden units of a tensor, as flags."""
        loaded = job_key.load(self.key)
        plan = open_model(str(self.truth), axis=loaded.axis, overrides=loaded.overrides).plan
        mask = ServerMasks(loaded).hidden(next(one for one in plan.tensors if one.name == tensor))
        assert mask is not None
        return mask.flags.reshape(-1)

    def weights(self) -> Tensors:
        """The truth."""
        return load_file(self.truth / "model.safetensors")


def make_job(
    home: Path,
    family: str = "bert",
    *,
    clients: Sequence[str] = ("alice", "bob"),
    p1: float = 0.3,
    p2: float = 0.2,
    model: dict[str, Any] | None = None,
    edit: Callable[[Tensors], None] | None = None,
    prepare: Callable[[Path], None] | None = None,
    key: int = 0,
    **options: Any,
) -> AuditedJob:
    """Build a model and export proxies of it.

    Args:
        edit: changes its tensors before. prepare: changes its folder before. key: number of the job's key.
    """
    home.mkdir(parents=True, exist_ok=True)
    build(family, home / "truth", tokenizer=True, **(model or {}))
    if edit is not None:
        tensors = load_file(home / "truth" / "model.safetensors")
        edit(tensors)
        save_file({name: x.contiguous() for name, x in tensors.items()}, home / "truth" / "model.safetensors", METADATA)
    if prepare is not None:
        prepare(home)
    if options.get("fill") == "base":
        build(family, home / "base", tokenizer=True, seed=11, **(model or {}))
        options["public_base"] = str(home / "base")
    with known_key(key):
        export_proxy(
            str(home / "truth"),
            home / "{client}",
            client=clients,
            round=1,
            key=home / "job.key",
            ledger=home / "ledger.jsonl",
            p1=p1,
            p2=p2,
            **options,
        )
    return AuditedJob(home, tuple(clients))


def audit(
    job: AuditedJob, *, clients: Sequence[str] | None = None, after: Path | None = None, blind: bool = False
) -> Audit:
    """Apply all hard invariants; blind: with nothing but the proxies."""
    collector = Collector()
    known: dict[str, Any] = {} if blind else {"truth": job.truth, "key": job.key, "ledger": job.ledger}
    if not blind:
        known |= {"public_base": job.base, "after": after}
    folders = [job.proxy(client) for client in clients or job.clients]
    inputs = open_inputs(folders, collector, AuditOptions(**known))
    run_checks(CHECKS, inputs, collector)
    return Audit(tuple(collector.findings), tuple(collector.checks))


def rules_of(found: Audit) -> set[str]:
    """Ids of the rules that found something, but for FQ012, which must find whatever another hard rule finds."""
    rules = {finding.rule for finding in found.findings}
    hard = {finding.scope for finding in found.findings if finding.severity == "hard" and finding.rule != "FQ012"}
    for check in found.checked:
        if check.rule == "FQ012" and check.status == "pass":
            assert check.scope not in hard, "a leak was found in a proxy that the export makes again"
    return rules - {"FQ012"}


def tamper(
    job: AuditedJob,
    change: Callable[[Tensors], None],
    client: str = "alice",
    *,
    metadata: dict[str, str] | None = None,
    file: str = "model.safetensors",
) -> None:
    """Change the tensors of a proxy, and sign it anew."""
    path = job.proxy(client) / file
    tensors = load_file(path)
    change(tensors)
    standard = METADATA if file == "model.safetensors" else {}
    save_file({name: x.contiguous() for name, x in tensors.items()}, path, {**standard, **(metadata or {})} or None)
    sign(job, client)


def tamper_file(job: AuditedJob, name: str, change: Callable[[bytes], bytes], client: str = "alice") -> None:
    """Change the bytes of a file of a proxy, and sign it anew."""
    path = job.proxy(client) / name
    path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    sign(job, client)


def sign(job: AuditedJob, /, client: str = "alice", **fields: Any) -> None:
    """Make proxy.json and the ledger agree with the files again."""
    folder = job.proxy(client)
    document = json.loads((folder / "proxy.json").read_text()) | fields
    old = document["proxy_id"]
    names = [path.name for path in folder.iterdir() if path.name != "proxy.json"]
    document["files"] = {name: file_digest(folder / name) for name in names}
    (folder / "proxy.json").write_text(strictjson.pretty(document))
    previous, lines = "0" * 64, []
    for text in job.ledger.read_text().splitlines():
        line = json.loads(text)
        if line["proxy_id"] == old:
            line["proxy_sha256"] = file_digest(folder / "proxy.json")
        line["previous"] = previous
        lines.append(strictjson.dumps(line))
        previous = hashlib.sha256(lines[-1].encode()).hexdigest()
    job.ledger.write_text("".join(line + "\n" for line in lines))
    digests = ["0" * 64, *(hashlib.sha256(line.encode()).hexdigest() for line in lines)]
    write_head(job.ledger, None, job_key.load(job.key), digests)


def requantize(job: AuditedJob, client: str, *, masked_before: bool) -> None:
    """Write the proxy's weights again, with block scales of the unmasked weights, or of the client-masked ones."""
    folder = job.proxy(client)
    manifest = read_manifest(folder, ProxyManifest)
    proxy = open_inputs([folder], Collector()).proxies[0]
    loaded = job_key.load(job.key)
    model = open_model(str(job.truth), axis=loaded.axis, overrides=loaded.overrides)

    def unseen(tensor: TensorPlan) -> UnitMask | None:
        visible = proxy.visible(tensor.name)
        return None if visible is None else visible.inverted()

    def nothing(tensor: TensorPlan) -> UnitMask | None:
        return None

    how = manifest.quantization
    todo = tensor_tasks(model, how, unseen if masked_before else nothing)
    with ArtifactWriter(job.home / f"{client}-again", force=False) as writer:
        sink = writer.tensors("model", tensor_specs(todo, how), max_shard_bytes=None, metadata=METADATA)
        output = ClientOutput(sink, how, nothing if masked_before else unseen, lambda tensor: proxy.factor(tensor.name))
        run(model, todo, how, [output], base=None, progress=Silent())
        sink.close()
        writer.publish()
    shutil.move(job.home / f"{client}-again" / "model.safetensors", folder / "model.safetensors")
    sign(job, client)


def perturb_codes(job: AuditedJob, client: str, seed: int) -> None:
    """Round stochastically: move some visible 4-bit codes by one."""
    noise = np.random.default_rng(seed)

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if f"{name}.absmax" in tensors]:
            codes = tensors[name].numpy().reshape(-1)
            pairs = np.stack([codes >> 4, codes & 15], axis=1)
            move = (pairs != 7) & (pairs != 0) & (pairs != 15) & (pairs != 6) & (noise.random(pairs.shape) < 0.3)
            pairs = pairs + move.astype(np.uint8)
            tensors[name] = torch.from_numpy((pairs[:, 0] << 4 | pairs[:, 1]).astype(np.uint8)).reshape(
                tensors[name].shape
            )

    tamper(job, change, client)
