"""Attestations: what they say was signed, and is still not taken if it is not what an audit says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli.crypto import dsse
from fedqsn_cli.crypto.attestation import PREDICATE, Attestation, attestation_bytes, read_attestation
from fedqsn_cli.crypto.keys import load_signing_key, load_verify_key
from fedqsn_cli.errors import FormatError
from support.processes import run
from support.signing import Party, party

TOLD = Attestation("PASSED", "passed", "fedqsn", "0" * 64, {"proxy 1": "1" * 64}, ["FQ001"], [])


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Party:
    return party(tmp_path_factory.mktemp("keys"), "owner")


def statement(owner: Party) -> dict[str, Any]:
    """What is signed in an attestation."""
    key = load_signing_key(owner.private)
    told, _ = dsse.opened(json.loads(attestation_bytes(TOLD, key)), key.public_key(), PREDICATE, "")
    return told


def signed(told: dict[str, Any], owner: Party, path: Path) -> Path:
    """The attestation of a statement."""
    key, payload = load_signing_key(owner.private), json.dumps(told).encode()
    path.write_text(json.dumps(dsse.envelope(payload, dsse.sign(payload, key))))
    return path


def test_what_was_told_is_read(owner: Party, tmp_path: Path) -> None:
    found = read_attestation(signed(statement(owner), owner, tmp_path / "a"), load_verify_key(owner.public))
    assert (found.result, found.verdict, found.proxies) == (TOLD.result, TOLD.verdict, TOLD.proxies)
    assert (found.policy, found.passed, found.failed) == (TOLD.policy, TOLD.passed, TOLD.failed)


Change = Callable[[dict[str, Any]], object]
OTHERS: dict[str, Change] = {
    "a result of its own": lambda told: told["predicate"].update(result="passed"),
    "a number as a result": lambda told: told["predicate"].update(result=5),
    "an object as a verdict": lambda told: tool(told)["annotations"].update(verdict={}),
    "a verdict that steers a terminal": lambda told: tool(told)["annotations"].update(verdict="\x1b[2Jpassed"),
    "a long verdict": lambda told: tool(told)["annotations"].update(verdict="v" * 201),
    "a list as a version": lambda told: tool(told)["annotations"].update(version=[1]),
    "a tool without a name": lambda told: tool(told).pop("name"),
    "no tool": lambda told: told["predicate"]["configuration"].pop(),
    "a policy without a digest": lambda told: told["predicate"]["configuration"][0].update(digest={}),
    "a number as a digest": lambda told: told["subject"][0]["digest"].update(sha256=5),
    "no digest": lambda told: told["subject"][0]["digest"].update(sha256="x"),
    "a list as a name": lambda told: told["subject"][0].update(name=["proxy 1"]),
    "no subject": lambda told: told.update(subject=[]),
    "no list of subjects": lambda told: told.update(subject=5),
    "no list of tests": lambda told: told["predicate"].update(passedTests={"FQ001": 1}),
    "tests without names": lambda told: told["predicate"].update(failedTests=[None]),
    "a list as a predicate": lambda told: told.update(predicate=[]),
}


def tool(told: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = told["predicate"]["configuration"][1]
    return found


@pytest.mark.parametrize("what", OTHERS)
def test_a_statement_of_something_else_is_refused_though_it_is_signed(what: str, owner: Party, tmp_path: Path) -> None:
    told = statement(owner)
    OTHERS[what](told)
    path = signed(told, owner, tmp_path / "attestation")
    with pytest.raises(FormatError):
        read_attestation(path, load_verify_key(owner.public))
    ended = run("verify", path, "--key", owner.public)
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (2, "", 1)
