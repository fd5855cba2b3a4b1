"""`inspect` knows every artifact, tells what ships in the clear, and never shows a secret."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cli.conftest import Round
from fedqsn_cli import inspect
from fedqsn_cli.cli import inspect as cli_inspect
from fedqsn_cli.errors import FormatError, InputError, KeyFileError, PlanError
from support.families import build
from support.processes import run

KINDS = {
    "global": "global model",
    "global/model.safetensors": "global model",
    "server": "server model",
    "server-nf4": "quantized server model",
    "alice": "proxy",
    "alice/visible.safetensors": "visible units of a proxy",
    "update": "update",
    "update/update.safetensors": "tensors of an update",
    "next": "global model",
    "job.key": "job key",
    "ledger.jsonl": "ledger",
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_it_knows_what_everything_is(played: Round, name: str, kind: str) -> None:
    assert inspect(played.folder / name).kind == kind
    assert run("inspect", played.folder / name, "--quiet").out == f"{kind}\n"


def test_shares_add_up_and_what_is_clear_is_listed(played: Round) -> None:
    for name in ("global", "server", "server-nf4", "alice"):
        found = inspect(played.folder / name)
        assert found.shares is not None
        assert sum(found.shares.values()) == pytest.approx(1)
        assert sum(each.share for each in found.clear) == pytest.approx(found.shares["clear"])


def test_layers_are_counted_together(played: Round) -> None:
    clear = {each.name: each for each in inspect(played.folder / "global").clear}
    norm = clear["bert.encoder.layer.*.output.LayerNorm.weight"]
    assert (norm.role, norm.tensors, norm.parameters) == ("norm", 2, 128)


def test_the_hidden_share_is_what_the_masks_hide(played: Round) -> None:
    assert inspect(played.folder / "server").facts["hidden"] == pytest.approx(0.25, abs=0.02)
    assert inspect(played.folder / "alice").facts["hidden"] == pytest.approx(1 - 0.75 * 0.75, abs=0.02)


def test_a_packed_model_is_counted_in_its_own_parameters(played: Round) -> None:
    dense, packed = inspect(played.folder / "server").contents, inspect(played.folder / "server-nf4").contents
    assert dense is not None and packed is not None
    assert (packed.tensors, packed.parameters) == (dense.tensors, dense.parameters)
    assert packed.bytes < dense.bytes / 2


def test_a_key_tells_its_job_and_nothing_else(played: Round) -> None:
    secret = json.loads((played.folder / "job.key").read_text())["key"]
    found = inspect(played.folder / "job.key")
    assert set(found.facts) == {"p1", "axis", "plan", "rules", "job"}
    assert secret not in repr(found)


def test_a_key_that_others_can_read_is_refused(played: Round, tmp_path: Path) -> None:
    key = Path(shutil.copy(played.folder / "job.key", tmp_path))
    key.chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        inspect(key)


def test_the_ledger_is_listed_release_by_release(played: Round) -> None:
    releases = inspect(played.folder / "ledger.jsonl").releases
    assert [(each.client, each.round, each.p2) for each in releases] == [("alice", 1, 0.25), ("bob", 1, 0.25)]
    assert "    1  alice   0.25  0.25  fresh     nf4" in run("inspect", played.folder / "ledger.jsonl").out


def test_people_see_the_latest_releases_of_a_long_ledger(played: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    # patched: the real one needs a thousand releases
    monkeypatch.setattr(cli_inspect, "_SHOWN_RELEASES", 1)
    path = played.folder / "ledger.jsonl"
    shown = run("inspect", path).out
    assert "  bob " in shown and "  alice " not in shown
    assert shown.endswith("\n\nThe latest 1 of 2 releases; --json lists all.\n")
    assert len(json.loads(run("inspect", path, "--json").out)["releases"]) == 2


def test_the_plan_is_one_row_a_tensor(played: Round) -> None:
    found = inspect(played.folder / "global", show_plan=True)
    assert found.plan is not None and found.contents is not None
    assert len(found.plan) == found.contents.tensors
    row = next(row for row in found.plan if row.name.endswith("layer.0.attention.self.query.weight"))
    assert (row.role, row.axis, row.units, row.masked, row.packable) == ("linear", "row", 64, True, True)
    out = run("inspect", played.folder / "global", "--show-plan").out
    assert "bert.encoder.layer.0.attention.self.query.bias" in out


def test_a_plan_can_be_tried_before_a_job_begins(played: Round, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text('[[rule]]\nmatch = "*.query.weight"\nmasked = false\n')
    arguments = {"axis": "input", "overrides": tmp_path / "plan.toml"}
    rows = {row.name: row for row in inspect(played.folder / "global", show_plan=True, **arguments).plan or ()}
    assert not rows["bert.encoder.layer.0.attention.self.query.weight"].masked
    assert rows["bert.encoder.layer.0.attention.self.key.weight"].axis == "column"


def test_unknown_tensors_are_named(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    tensors = {"model.layers.0.mystery_blob": np.ones((4, 4), np.float32)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert inspect(folder).unknown == ("model.layers.0.mystery_blob",)
    assert "No rule knows: model.layers.0.mystery_blob." in run("inspect", folder).out


def test_a_model_without_a_plan_is_still_described(tmp_path: Path) -> None:
    save_file({"model.layers.0.mlp.up_proj.weight": np.ones((4, 4))}, tmp_path / "model.safetensors")
    found = inspect(tmp_path / "model.safetensors")
    assert found.contents is not None
    assert (found.contents.dtypes, found.shares) == (("F64",), None)
    assert "F64 is not supported" in (found.problem or "")
    with pytest.raises(PlanError, match="F64 is not supported"):
        inspect(tmp_path / "model.safetensors", show_plan=True)


def test_visible_bits_must_fit_the_manifest(played: Round, tmp_path: Path) -> None:
    proxy = Path(shutil.copytree(played.folder / "alice", tmp_path / "alice"))
    save_file({"other": np.zeros(3, np.uint8)}, proxy / "visible.safetensors")
    with pytest.raises(FormatError, match=r"alice: visible\.safetensors has no group"):
        inspect(proxy)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.txt", b"hello", "not an artifact that fedqsn knows"),
        ("empty", b"", "not an artifact that fedqsn knows"),
        ("proxy.json", b'{"format": "fedqsn-proxy/1"}', "this is the manifest of a proxy; inspect its folder"),
        ("model.safetensors", b"\xff" * 64, "model.safetensors"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        inspect(tmp_path / name)


def test_what_has_no_plan_says_so(played: Round) -> None:
    with pytest.raises(PlanError, match="this ledger has no plan; leave out --show-plan"):
        inspect(played.folder / "ledger.jsonl", show_plan=True)
