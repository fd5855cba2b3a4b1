"""model.sig: the reference tool takes ours and we take its own; whatever changes in a folder is found."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli import verify
from fedqsn_cli.artifacts.manifests import SIGNATURE
from fedqsn_cli.crypto import dsse
from fedqsn_cli.crypto.keys import load_signing_key, load_verify_key
from fedqsn_cli.crypto.signature import PREDICATE, bundle_bytes, verify_folder
from fedqsn_cli.errors import FormatError, SignatureError
from support.signing import Party, party, sign_folder

FILES = {"proxy.json": b"{}\n", "model.safetensors": bytes(range(256)), "empty": b""}


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Party:
    return party(tmp_path_factory.mktemp("keys"), "owner")


@pytest.fixture
def alice(tmp_path: Path, owner: Party) -> Path:
    """A signed folder, called as a client is."""
    folder = tmp_path / "alice"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return sign_folder(folder, owner)


def reference(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the tool of the OpenSSF."""
    words = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def checked_by_reference(folder: Path, public: Path) -> bool:
    """What the reference tool says of a folder."""
    done = reference("verify", "key", folder, "--signature", folder / SIGNATURE, "--public_key", public)
    return done.returncode == 0


def forge(folder: Path, signer: Party, change: Any) -> None:
    """Change the signed statement, and sign it anew."""
    bundle = json.loads((folder / SIGNATURE).read_bytes())
    told = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(told)
    key, payload = load_signing_key(signer.private), json.dumps(told).encode()
    (folder / SIGNATURE).write_bytes(bundle_bytes(payload, dsse.sign(payload, key), key.public_key()))


def test_the_reference_tool_verifies_what_is_signed_here(alice: Path, owner: Party, tmp_path: Path) -> None:
    assert checked_by_reference(alice, owner.public)
    assert not checked_by_reference(alice, party(tmp_path, "eve").public)
    (alice / "model.safetensors").write_bytes(b"changed")
    assert not checked_by_reference(alice, owner.public)


def test_what_the_reference_tool_signs_is_verified_here(alice: Path, owner: Party) -> None:
    (alice / SIGNATURE).unlink()
    done = reference("sign", "key", alice, "--signature", alice / SIGNATURE, "--private_key", owner.private)
    assert done.returncode == 0, done.stderr
    assert verify(alice, key=owner.public).files.keys() == FILES.keys()


def test_a_signature_does_not_name_the_folder_and_is_the_same_every_time(alice: Path, owner: Party) -> None:
    before = (alice / SIGNATURE).read_bytes()
    text = base64.b64decode(json.loads(before)["dsseEnvelope"]["payload"])
    assert b"alice" not in text and str(alice.parent).encode() not in text
    sign_folder(alice, owner)
    assert (alice / SIGNATURE).read_bytes() == before


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_found(alice: Path, owner: Party, name: str) -> None:
    with (alice / name).open("ab") as file:
        file.write(b"!")
    with pytest.raises(SignatureError, match=rf"{name}: is not the file that was signed"):
        verify(alice, key=owner.public)


def test_a_removed_an_added_and_a_renamed_file_are_found(alice: Path, owner: Party) -> None:
    (alice / "empty").rename(alice / "more")
    with pytest.raises(SignatureError, match="more: is not among the files"):
        verify(alice, key=owner.public)
    (alice / "more").unlink()
    with pytest.raises(SignatureError, match="empty: was signed, but is missing"):
        verify(alice, key=owner.public)


def test_another_key_and_no_signature_are_refused(alice: Path, owner: Party, tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match="was signed with another key"):
        verify(alice, key=party(tmp_path, "eve").public)
    (alice / SIGNATURE).unlink()
    with pytest.raises(SignatureError, match="alice: is not signed"):
        verify(alice, key=owner.public)


def test_the_signature_of_another_folder_is_refused(alice: Path, owner: Party, tmp_path: Path) -> None:
    bob = tmp_path / "bob"
    shutil.copytree(alice, bob)
    (bob / "proxy.json").write_bytes(b"{ }\n")
    with pytest.raises(SignatureError, match="is not the file that was signed"):
        verify(bob, key=owner.public)


@pytest.mark.parametrize("field", [b'"payload":"', b'"sig":"', b'"hint":"', b'"mediaType":"'])
def test_no_byte_that_says_something_can_change(alice: Path, owner: Party, field: bytes) -> None:
    path, key = alice / SIGNATURE, load_verify_key(owner.public)
    data = path.read_bytes()
    start = data.index(field) + len(field)
    for at in range(start, data.index(b'"', start), 5):
        other = b"B" if data[at : at + 1] == b"A" else b"A"
        path.write_bytes(data[:at] + other + data[at + 1 :])
        with pytest.raises((SignatureError, FormatError)):
            verify_folder(alice, key)


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told["predicate"]["resources"].append(dict(told["predicate"]["resources"][0])),
        lambda told: told["predicate"]["resources"][0].update(name="../proxy.json"),
        lambda told: told["predicate"]["resources"][0].update(name="/etc/passwd"),
        lambda told: told["predicate"]["resources"][0].update(algorithm="md5"),
        lambda told: told["predicate"]["resources"][0].update(algorithm=["sha256"]),
        lambda told: told["predicate"]["resources"][0].update(name=["proxy.json"]),
        lambda told: told["predicate"]["resources"][0].update(digest="zz"),
        lambda told: told["predicate"].pop("resources"),
        lambda told: told["subject"].append(told["subject"][0]),
        lambda told: told["subject"][0]["digest"].update(sha256="0" * 64),
        lambda told: told.update(predicateType="https://slsa.dev/provenance/v1"),
        lambda told: told.update(_type="https://in-toto.io/Statement/v0.1"),
    ],
)
def test_a_statement_that_contradicts_itself_is_refused_though_it_is_signed(
    alice: Path, owner: Party, change: Any
) -> None:
    forge(alice, owner, change)
    with pytest.raises(FormatError):
        verify(alice, key=owner.public)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"mediaType": 1}', b'{"a": 1, "a": 2}', b"\xff", b"[" * 100_000])
def test_a_malformed_signature_is_refused(alice: Path, owner: Party, text: bytes) -> None:
    (alice / SIGNATURE).write_bytes(text)
    with pytest.raises(FormatError):
        verify(alice, key=owner.public)


def test_an_envelope_of_another_kind_of_statement_is_no_signature_of_files(alice: Path, owner: Party) -> None:
    document = json.loads((alice / SIGNATURE).read_bytes())["dsseEnvelope"]
    key = load_verify_key(owner.public)
    assert dsse.opened(document, key, PREDICATE, "")[0]["predicateType"] == PREDICATE
    for change in ({"payloadType": "text/plain"}, {"signatures": []}, {"payload": "%"}, {"signatures": [{}]}):
        with pytest.raises(FormatError):
            dsse.opened(document | change, key, PREDICATE, "")
