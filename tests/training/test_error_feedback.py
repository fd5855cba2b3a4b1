"""Updates in few bits, and what they lose: kept on the client, added in the next round, of the same job only."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedqsn_cli import client_train, export_proxy, merge
from fedqsn_cli.artifacts.manifests import ProxyManifest, UpdateManifest, read_manifest
from fedqsn_cli.artifacts.update_folder import UPDATE_FORMATS, format_of
from fedqsn_cli.errors import FormatError, InputError, OutputExists
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.quantization.runs import decode_run
from fedqsn_cli.training.steps.visible import expanded, put_visible, rescale_factors, visible_part
from fedqsn_cli.training.updates.error_feedback import ErrorFeedback
from fedqsn_cli.training.updates.update import encode_update
from support.scenario import few
from support.training_jobs import dense_tensors, labelled, make_proxy, small_model, visible_units

FAST: dict[str, Any] = {"max_steps": 3, "batch_size": 4, "lr": 1e-2}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with proxies of rounds 1 and 2, of the same model and with other masks, and the fp32 update of each."""
    here = tmp_path_factory.mktemp("job")
    small_model(here / "model")
    labelled(here / "data.jsonl")
    for number in (1, 2):
        options = {"client": ["a"], "round": number, "p1": 0.2, "p2": 0.1 * number, "format": "none"}
        export_proxy(here / "model", here / f"p{number}", key=here / "key", ledger=here / "ledger.jsonl", **options)
        train(here, number, here / f"fp32-{number}", update_format="fp32")
    return here


def train(job: Path, number: int, out: Path, **options: Any) -> Path:
    client_train(job / f"p{number}", out, data=job / "data.jsonl", **FAST, **options)
    return out


def decoded(update: Path, proxy: Path) -> dict[str, torch.Tensor]:
    """The values of an update, flat."""
    stored, form = load_file(update / "update.safetensors"), read_manifest(update, UpdateManifest).precision
    full = load_file(proxy.parent / f"fp32-{proxy.name[1:]}" / "update.safetensors")
    found = {}
    for name, tensor in dense_tensors(proxy).items():
        if not tensor.is_floating_point():
            continue
        coding = format_of(form, tuple(tensor.shape)).coding
        if coding is None:
            found[name] = stored[name].float().reshape(-1)
        else:
            codes, scales = stored[name].numpy().reshape(-1).view("u1"), stored[name + ".absmax"].numpy()
            count = full[name].numel()
            found[name] = torch.from_numpy(decode_run(codes, scales, coding.format, coding.block, count))
    return found


@pytest.mark.parametrize(("form", "most"), [("int8", 0.02), ("nf4", 0.2)])
def test_codes_stand_for_values_near_those_of_the_fp32_update(
    job: Path, tmp_path: Path, form: str, most: float
) -> None:
    update = train(job, 1, tmp_path / "update", update_format=form)
    full = load_file(job / "fp32-1" / "update.safetensors")
    for name, values in decoded(update, job / "p1").items():
        wanted = full[name].reshape(-1)
        assert (values - wanted).norm() <= most * wanted.norm(), name
        if full[name].dim() == 1 and dense_tensors(job / "p1")[name].dim() == 1:
            assert torch.equal(values, wanted), name
    size = (update / "update.safetensors").stat().st_size
    assert size < (job / "fp32-1" / "update.safetensors").stat().st_size * {"int8": 0.5, "nf4": 0.4}[form]


@pytest.mark.parametrize("form", ["bf16", "int8", "nf4"])
def test_what_is_lost_is_kept_and_added_in_the_next_round(job: Path, tmp_path: Path, form: str) -> None:
    residual = tmp_path / "residual.safetensors"
    before: dict[str, torch.Tensor] = {}
    for number in (1, 2):
        update = train(job, number, tmp_path / f"u{number}", update_format=form, residual=residual)
        proxy = job / f"p{number}"
        sent, full = decoded(update, proxy), load_file(job / f"fp32-{number}" / "update.safetensors")
        masks, after = visible_units(proxy), load_file(residual)
        scales = rescale_factors(read_manifest(proxy, ProxyManifest), masks)
        for name, tensor in full.items():
            mask, s = masks.get(name), scales.get(name, 1.0)
            old = before.get(name, torch.zeros_like(after[name]))
            wanted = tensor.reshape(-1) + s * visible_part(old, mask).reshape(-1)
            error = (wanted - sent[name]) / s
            torch.testing.assert_close(visible_part(after[name], mask).reshape(-1), error, rtol=1e-4, atol=1e-7)
            if mask is not None:
                hidden = ~expanded(mask, tuple(old.shape))
                assert torch.equal(after[name][hidden], old[hidden]), name
        before = after
    assert any(error.any() for error in before.values())


def test_the_residual_is_private_and_says_which_job_it_belongs_to(job: Path, tmp_path: Path) -> None:
    residual = tmp_path / "residual"
    train(job, 1, tmp_path / "update", update_format="nf4", residual=residual)
    assert stat.S_IMODE(residual.stat().st_mode) == 0o600
    with safe_open(residual, "pt") as file:
        manifest = read_manifest(job / "p1", ProxyManifest)
        wanted = {"format": "fedqsn-update-residual/1", "job": manifest.job, "proxy_id": manifest.proxy_id}
        assert wanted.items() <= file.metadata().items()
    assert sorted(path.name for path in (tmp_path / "update").iterdir()) == ["update.json", "update.safetensors"]


def test_it_stays_as_it_was_when_no_update_comes_of_the_round(job: Path, tmp_path: Path) -> None:
    residual = tmp_path / "residual"
    train(job, 1, tmp_path / "update", update_format="nf4", residual=residual)
    before = residual.read_bytes()
    failing: dict[str, Any] = {"lr": 1e30, "update_format": "nf4", "residual": residual}
    with pytest.raises(InputError, match="loss is|not finite"):
        client_train(job / "p2", tmp_path / "next", data=job / "data.jsonl", **failing)
    assert residual.read_bytes() == before
    assert not (tmp_path / "next").exists()


@pytest.fixture(scope="module")
def kept(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The residual of round 1; not to be changed."""
    here = tmp_path_factory.mktemp("kept")
    train(job, 1, here / "update", update_format="nf4", residual=here / "residual")
    return here / "residual"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tensors, facts: facts.update(job="0" * 64), "another job"),
        (lambda tensors, facts: facts.update(format="other"), "not the residual"),
        (lambda tensors, facts: facts.clear(), "not the residual"),
        (lambda tensors, facts: tensors.popitem(), "tensors of the proxy"),
        (lambda tensors, facts: tensors.update(more=torch.zeros(2)), "tensors of the proxy"),
        (lambda tensors, facts: next(iter(tensors.values())).fill_(float("nan")), "NaN"),
    ],
)
def test_a_residual_of_something_else_is_refused(
    job: Path, kept: Path, tmp_path: Path, change: Any, complaint: str
) -> None:
    residual = tmp_path / "residual"
    tensors = load_file(kept)
    with safe_open(kept, "pt") as file:
        facts = dict(file.metadata())
    change(tensors, facts)
    save_file(tensors, residual, metadata=facts or None)
    residual.chmod(0o600)
    content = residual.read_bytes()
    with pytest.raises((InputError, FormatError), match=complaint):
        train(job, 2, tmp_path / "next", update_format="nf4", residual=residual)
    assert residual.read_bytes() == content
    assert not (tmp_path / "next").exists()


def test_a_proxy_is_not_trained_twice_with_what_its_first_update_lost(job: Path, tmp_path: Path) -> None:
    residual = tmp_path / "residual"
    train(job, 1, tmp_path / "update", update_format="nf4", residual=residual)
    with pytest.raises(InputError, match="already holds"):
        train(job, 1, tmp_path / "again", update_format="nf4", residual=residual)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"update_format": "fp32", "residual": "r"}, "fp32 loses nothing"),
        ({"update_format": "nf4", "residual": "update/r"}, "--residual: is inside of "),
        ({"update_format": "nf4", "residual": "missing/r"}, "there is no such folder"),
        ({"update_format": "nf4", "residual": "r" * 240}, "cannot be written"),
        ({"tensorboard": "update/logs"}, "--tensorboard: is inside of "),
    ],
)
def test_combinations_that_make_no_sense_are_refused(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=complaint):
        train(job, 1, Path("update"), **options)
    assert not list(tmp_path.iterdir())


def test_updates_of_both_formats_merge(job: Path, tmp_path: Path) -> None:
    for form in ("int8", "nf4"):
        update = train(job, 1, tmp_path / form, update_format=form)
        merge(job / "model", [update], tmp_path / f"next-{form}", key=job / "key", ledger=job / "ledger.jsonl")


def test_with_the_fill_trained_every_unit_has_a_residual(tmp_path: Path) -> None:
    base = small_model(tmp_path / "base", seed=1)
    proxy = make_proxy(small_model(tmp_path / "model"), tmp_path / "proxy", fill="base", public_base=base, train="all")
    labelled(tmp_path / "data.jsonl")
    residual = tmp_path / "residual"
    client_train(
        proxy, tmp_path / "update", data=tmp_path / "data.jsonl", update_format="nf4", residual=residual, **FAST
    )
    matrices = [tensor for tensor in load_file(residual).values() if tensor.dim() == 2]
    assert all((tensor != 0).float().mean() > 0.5 for tensor in matrices if tensor.shape[0] < 90)


@few(40)
@given(
    st.sampled_from(["row", "column", "element"]), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.data()
)
def test_visible_elements_are_put_where_they_were_taken(
    axis: Any, lead: int, rows: int, cols: int, data: st.DataObject
) -> None:
    units = {"row": lead * rows, "column": cols, "element": lead * rows * cols}[axis]
    flags = torch.tensor(data.draw(st.lists(st.booleans(), min_size=units, max_size=units))).numpy()
    shape = (lead, cols) if axis == "column" else flags.shape
    mask = UnitMask(axis, (lead, rows, cols), flags if axis != "column" else flags[None].repeat(lead, 0).reshape(shape))
    whole = torch.arange(1.0, lead * rows * cols + 1).reshape(lead, rows, cols)
    part, target = visible_part(whole, mask), torch.zeros_like(whole)
    put_visible(target, mask, part)
    assert torch.equal(target, whole * expanded(mask, tuple(whole.shape)))


@few(25)
@given(st.sampled_from(["int8", "nf4", "bf16"]), st.integers(1, 4), st.integers(0, 999))
def test_nothing_is_lost_over_the_rounds_whatever_their_masks_and_scales(form: Any, rounds: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape, sent, wanted = (12, 40), torch.zeros(12, 40), torch.zeros(12, 40)
    errors = {"w": torch.zeros(shape)}
    for _ in range(rounds):
        flags = torch.rand(12, generator=generator) < 0.6
        flags[0] = True
        mask = UnitMask("row", (1, 12, 40), flags.numpy())
        scale = 12 / int(flags.sum())
        feedback = ErrorFeedback(Path("unused"), "job", "proxy", errors, {"w": mask}, {"w": scale})
        update = torch.randn(int(flags.sum()), 40, generator=generator)
        encoded = encode_update("w", feedback.added("w", update), UPDATE_FORMATS[form])
        feedback.keep("w", feedback.added("w", update).reshape(-1) - encoded.decoded())
        for total, part in ((sent, encoded.decoded()), (wanted, update)):
            put_visible(whole := torch.zeros(shape), mask, part / scale)
            total += whole
    torch.testing.assert_close(sent + errors["w"], wanted, rtol=1e-5, atol=1e-5)


def killed_round(job: Path, here: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """Train round 1 with a residual, and die at a step of `client_train`'s end."""

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(at, die)
        with pytest.raises(KeyboardInterrupt):
            train(job, 1, here / "update", update_format="nf4", residual=here / "residual")


PUBLISH = "fedqsn_cli.checkpoint.writer.ArtifactWriter.publish"
REPLACE = "fedqsn_cli.training.updates.error_feedback.ErrorFeedback.replace"


def test_a_kill_between_update_and_residual_loses_nothing(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    train(job, 1, tmp_path / "whole" / "update", update_format="nf4", residual=tmp_path / "whole" / "residual")
    killed_round(job, tmp_path / "killed", monkeypatch, REPLACE)
    for name in ("whole", "killed"):
        train(job, 2, tmp_path / name / "next", update_format="nf4", residual=tmp_path / name / "residual")
    updates = [(tmp_path / name / "next" / "update.safetensors").read_bytes() for name in ("whole", "killed")]
    assert updates[0] == updates[1]
    assert load_file(tmp_path / "whole" / "residual").keys() == load_file(tmp_path / "killed" / "residual").keys()
    assert not (tmp_path / "killed" / "residual.next").exists()


def test_the_same_command_after_such_a_kill_puts_the_residual_in_place(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_round(job, tmp_path, monkeypatch, REPLACE)
    left = (tmp_path / "residual.next").read_bytes()
    with pytest.raises(OutputExists):
        train(job, 1, tmp_path / "update", update_format="nf4", residual=tmp_path / "residual")
    assert (tmp_path / "residual").read_bytes() == left
    assert not (tmp_path / "residual.next").exists()


def test_a_round_killed_before_its_update_is_trained_again(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_round(job, tmp_path, monkeypatch, PUBLISH)
    assert stat.S_IMODE((tmp_path / "residual.next").stat().st_mode) == 0o600
    train(job, 1, tmp_path / "update", update_format="nf4", residual=tmp_path / "residual")
    assert (tmp_path / "residual").exists()
    assert not (tmp_path / "residual.next").exists()


def test_an_update_that_was_moved_after_a_kill_is_asked_for(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_round(job, tmp_path, monkeypatch, REPLACE)
    (tmp_path / "update").rename(tmp_path / "sent")
    with pytest.raises(InputError, match="run: mv ") as caught:
        train(job, 2, tmp_path / "next", update_format="nf4", residual=tmp_path / "residual")
    command = str(caught.value).split("run: ")[1].split(";")[0].split()
    Path(command[1]).rename(command[2])
    train(job, 2, tmp_path / "next", update_format="nf4", residual=tmp_path / "residual")
