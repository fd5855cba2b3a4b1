"""The digests of an update's tensors: by BLAKE3 or SHA-256, and compared with what is merged."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from blake3 import blake3

from fedqsn_cli import export_proxy, merge
from fedqsn_cli.errors import RefusedUpdate
from support.helpers import contents, make_model, noise, nothing_written, send
from support.signing import Party, party, sign_folder

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def home(module_folder: Path) -> Path:
    """A model and a proxy of it."""
    job = {"key": module_folder / "key", "ledger": module_folder / "ledger"}
    make_model(module_folder / "model", "llama")
    export_proxy(module_folder / "model", module_folder / "proxy", client="ann", round=1, p1=0.1, p2=0.1, **job)
    return module_folder


@pytest.fixture
def update(home: Path, tmp_path: Path) -> Path:
    """One that lists the BLAKE3 of its tensors."""
    folder = send(home / "proxy", tmp_path / "update", noise(1))
    manifest = json.loads((folder / "update.json").read_text())
    digest = blake3((folder / "update.safetensors").read_bytes()).hexdigest()
    manifest |= {"format": "fedqsn-update/2", "files": {"update.safetensors": f"blake3:{digest}"}}
    (folder / "update.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def ann(tmp_path: Path) -> Party:
    return party(tmp_path, "ann")


def merged(home: Path, update: Path, signer: Party | None = None) -> dict[str, bytes]:
    out = update.with_name(f"next-{next(NUMBERS)}")
    verify = {"verify_key": signer.public} if signer is not None else {}
    merge(home / "model", [update], out, key=home / "key", ledger=home / "ledger", **verify)
    return contents(out)


def change(update: Path) -> None:
    path = update / "update.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_algorithm_changes_nothing(home: Path, update: Path, tmp_path: Path) -> None:
    other = send(home / "proxy", tmp_path / "other/update", noise(1))
    (digest,) = json.loads((other / "update.json").read_text())["files"].values()
    assert len(digest) == 64  # SHA-256
    assert merged(home, update) == merged(home, other)


def test_changed_tensors_are_refused(home: Path, update: Path, tmp_path: Path) -> None:
    change(update)
    with nothing_written(tmp_path), pytest.raises(RefusedUpdate, match="digest is not the one in update.json"):
        merged(home, update)


def test_a_signature_is_checked_by_its_own_digests(home: Path, update: Path, ann: Party, tmp_path: Path) -> None:
    sign_folder(update, ann)
    assert merged(home, update, ann)
    change(update)
    with nothing_written(tmp_path), pytest.raises(RefusedUpdate, match="not the file that was signed"):
        merged(home, update, ann)
