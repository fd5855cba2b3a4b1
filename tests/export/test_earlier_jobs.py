"""Jobs that an earlier version began go on: their key, ledger and models are read, and the same exports are the same.

earlier_job/ was written when the content digest of a model was SHA-256 (fedqsn-ledger/1, fedqsn-model/1):

    make_model("model", "llama")
    mask("model", "server", key="job.key", p1=0.25)
    export_proxy("model", "proxies/{client}", client=("ann", "bob"), round=1, p2=0.25, key="job.key",
                 ledger="ledger.jsonl")
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedqsn_cli import audit, export_proxy, mask, merge, quantize
from golden.inputs import draft, noise
from support.models import make_model
from support.raw_safetensors import read_file

RECORDED = Path(__file__).parent / "earlier_job"
SHA256, BLAKE3 = re.compile(r"[0-9a-f]{64}"), re.compile(r"blake3:[0-9a-f]{64}")


@dataclass(frozen=True)
class EarlierJob:
    """The recorded job in a folder, with its model and its server model."""

    root: Path

    @classmethod
    def begin(cls, root: Path) -> EarlierJob:
        make_model(root / "model", "llama")
        job = cls(root)
        shutil.copy(RECORDED / "key.json", job.key)
        job.key.chmod(0o600)
        mask(root / "model", job.server, key=job.key)
        shutil.copy(RECORDED / "fedqsn.json", job.server)  # the weights are the same
        shutil.copy(RECORDED / "ledger.jsonl", job.ledger)
        shutil.copy(RECORDED / "head.json", f"{job.ledger}.head")
        return job

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def server(self) -> Path:
        return self.root / "server"

    @property
    def key(self) -> Path:
        return self.root / "job.key"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    def export(self, source: Path, name: str = "proxies", *, round: int = 1) -> Path:
        out, clients = self.root / name, ("ann", "bob")
        export_proxy(source, out / "{client}", client=clients, round=round, p2=0.25, key=self.key, ledger=self.ledger)
        return out

    def updates(self, proxies: Path) -> list[Path]:
        shapes = {name: bits.shape for name, (_, bits) in read_file(self.model / "model.safetensors").items()}
        return [
            draft(proxies / client, shapes, noise(number)).write(self.root / f"{proxies.name}-{client}")
            for number, client in enumerate(("ann", "bob"))
        ]


@pytest.fixture(scope="module")
def job(module_folder: Path) -> EarlierJob:
    return EarlierJob.begin(module_folder)


@pytest.fixture(scope="module")
def proxies(job: EarlierJob) -> Path:
    return job.export(job.model)


def test_the_same_export_is_the_same_release(job: EarlierJob, proxies: Path) -> None:
    assert proxies.is_dir()
    assert job.ledger.read_bytes() == (RECORDED / "ledger.jsonl").read_bytes()


def test_a_quantized_server_model_gives_the_same_release(job: EarlierJob) -> None:
    quantize(job.server, job.root / "quantized", format="nf4")
    job.export(job.root / "quantized", "from-quantized")
    assert job.ledger.read_bytes() == (RECORDED / "ledger.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["model", "server"])
def test_updates_are_merged_into_the_model_that_they_belong_to(name: str, job: EarlierJob, proxies: Path) -> None:
    merge(job.root / name, job.updates(proxies), job.root / f"{name}-1", key=job.key, ledger=job.ledger)
    digest = json.loads((job.root / f"{name}-1/fedqsn.json").read_text())["model_digest"]
    assert digest is None if name == "model" else SHA256.fullmatch(digest)


def test_an_audit_makes_its_releases_again(job: EarlierJob, proxies: Path) -> None:
    found = audit([proxies / "ann", proxies / "bob"], truth=job.model, key=job.key, ledger=job.ledger)
    verdicts = {check.rule: check.status for check in found.checked if check.rule in ("FQ001", "FQ012")}
    assert verdicts == {"FQ001": "pass", "FQ012": "pass"}


def test_its_next_round_has_the_digests_of_the_first(folder: Path) -> None:
    job = EarlierJob.begin(folder)
    merge(job.model, job.updates(job.export(job.model)), job.root / "next", key=job.key, ledger=job.ledger)
    job.export(job.root / "next", "proxies-2", round=2)
    digests = [json.loads(line)["model_digest"] for line in job.ledger.read_text().splitlines()]
    assert len(digests) == 4 and all(map(SHA256.fullmatch, digests))


def test_a_new_job_has_digests_by_blake3(folder: Path) -> None:
    job = EarlierJob.begin(folder)
    for path in (job.ledger, Path(f"{job.ledger}.head")):
        path.unlink()
    job.export(job.model)
    lines = [json.loads(line) for line in job.ledger.read_text().splitlines()]
    assert {line["format"] for line in lines} == {"fedqsn-ledger/2"}
    assert all(BLAKE3.fullmatch(line["model_digest"]) for line in lines)
