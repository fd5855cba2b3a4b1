"""export-proxy --sign: a signature more, and not a byte less."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedqsn_cli import export_proxy, verify
from fedqsn_cli.artifacts.manifests import SIGNATURE
from fedqsn_cli.checkpoint import FILE_MODE, FILE_TIME
from fedqsn_cli.errors import InputError, KeyFileError
from support.helpers import contents, make_model, nothing_written
from support.keys import known_key
from support.signing import party


def test_proxies_are_signed_and_otherwise_the_same(tmp_path: Path) -> None:
    owner, model = party(tmp_path, "owner"), make_model(tmp_path / "model", "bert")
    made: dict[str, dict[str, bytes]] = {}
    for name, options in {"plain": {}, "signed": {"sign": owner.private}, "again": {"sign": owner.private}}.items():
        home = tmp_path / name
        with known_key(1):
            export_proxy(
                model, home / "{client}", client=["a", "b"], round=1, key=tmp_path / "key",
                ledger=home / "ledger", p1=0.1, p2=0.1, **options,
            )  # fmt: skip
        made[name] = contents(home / "a")
    signature = made["signed"].pop(SIGNATURE)
    assert made["signed"] == made["plain"] and made["again"][SIGNATURE] == signature
    for client in ("a", "b"):
        folder = tmp_path / "signed" / client
        assert verify(folder, key=owner.public).files.keys() == made["plain"].keys()
        found = (folder / SIGNATURE).stat()
        assert (found.st_mode & 0o7777, found.st_mtime, folder.stat().st_mtime) == (FILE_MODE, FILE_TIME, FILE_TIME)


def test_a_key_that_cannot_sign_or_would_be_sent_stops_the_export(tmp_path: Path) -> None:
    owner, model = party(tmp_path, "owner"), make_model(tmp_path / "model", "bert")
    common = {"client": ["a"], "round": 1, "key": tmp_path / "key", "ledger": tmp_path / "ledger", "p1": 0.1, "p2": 0.1}
    owner.public.chmod(0o600)
    with nothing_written(tmp_path), pytest.raises(KeyFileError, match="is a public key"):
        export_proxy(model, tmp_path / "a", sign=owner.public, **common)
    inside = tmp_path / "a" / "owner.key"
    with nothing_written(tmp_path), pytest.raises(InputError, match="--sign: is inside of"):
        export_proxy(model, tmp_path / "a", sign=inside, **common)
