"""The key file: private, complete or absent, and bound to one job."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli.errors import InputError, KeyFileError, OutputExists
from fedqsn_cli.masks import job_key
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.planning.plan import Plan, make_plan
from support.chance import CHANCE, by_chance

TENSORS = {"model.embed_tokens.weight": ("F32", (97, 64)), "model.layers.0.mlp.up_proj.weight": ("F32", (128, 64))}
PLAN = make_plan(TENSORS, {"model_type": "llama"})


def start(path: Path, p1: float = 0.25, plan: Plan = PLAN) -> JobKey:
    """A new job, its key on disk."""
    job, new = job_key.open_or_draw(path, p1=p1, axis=plan.axis, plan=plan)
    assert new
    job_key.save(path, job)
    return job


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "job.key"


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# ---------------------------------------------------------------- a new job


def test_a_saved_job_comes_back_as_it_was(path: Path) -> None:
    overrides = {"rule": [{"match": "*.up_proj.weight", "masked": False}]}
    job = start(path, plan=make_plan(TENSORS, None, axis="input", overrides=overrides))
    assert job_key.load(path) == job
    assert (job.p1, job.axis, job.overrides) == (0.25, "input", overrides)


def test_the_file_is_what_the_format_says(path: Path) -> None:
    job = start(path)
    assert json.loads(path.read_text()) == {
        "format": "fedqsn-key/1",
        "key": job.key.hex(),
        "p1": 0.25,
        "axis": "neuron",
        "plan": PLAN.digest,
        "overrides": {"rule": []},
        "groups": {name: list(size) for name, size in PLAN.sizes()[0].items()},
        "clear": PLAN.sizes()[1],
        "seal": json.loads(path.read_text())["seal"],
    }


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_only_the_owner_can_open_a_new_key_whatever_the_umask(path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        start(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_every_new_job_has_another_key_of_32_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.token_bytes", by_chance)
    drawn = {job_key.draw(0.1, "neuron", PLAN).key for _ in range(20)}
    assert len(drawn) == 20 and {len(key) for key in drawn} == {32}


def test_a_test_draws_the_same_keys_in_every_run_and_other_tests_draw_others() -> None:
    def drawn(owner: str) -> list[bytes]:
        with CHANCE.of(owner):
            return [job_key.draw(0.1, "neuron", PLAN).key for _ in range(2)]

    assert drawn("a test") == drawn("a test")
    assert len({*drawn("a test"), *drawn("another")}) == 4


def test_a_key_is_never_overwritten(path: Path) -> None:
    job = start(path)
    with pytest.raises(OutputExists):
        job_key.save(path, job_key.draw(0.25, "neuron", PLAN))
    assert job_key.load(path) == job


def test_drawing_a_job_writes_nothing(path: Path) -> None:
    job_key.open_or_draw(path, p1=0.5, axis="neuron", plan=PLAN)
    assert list(path.parent.iterdir()) == []


def test_nothing_but_the_key_is_left_in_the_directory(path: Path) -> None:
    start(path)
    assert list(path.parent.iterdir()) == [path]


def test_a_new_job_needs_a_ratio(path: Path) -> None:
    with pytest.raises(KeyFileError, match="there is no key") as raised:
        job_key.open_or_draw(path, p1=None, axis="neuron", plan=PLAN)
    assert "--p1" in str(raised.value)


@pytest.mark.parametrize("p1", [1.5, -0.5, float("nan")])
def test_a_job_with_an_impossible_ratio_is_not_started(path: Path, p1: float) -> None:
    with pytest.raises(InputError, match="out of range"):
        job_key.open_or_draw(path, p1=p1, axis="neuron", plan=PLAN)


# ---------------------------------------------------------------- an old job


@pytest.mark.parametrize("p1", [None, 0.25])
def test_the_same_job_goes_on(path: Path, p1: float | None) -> None:
    job = start(path)
    assert job_key.open_or_draw(path, p1=p1, axis="neuron", plan=PLAN) == (job, False)


def test_a_second_ratio_is_refused_and_both_are_named(path: Path) -> None:
    start(path)
    with pytest.raises(KeyFileError, match=r"p1 = 0\.25, but p1 = 0\.3 was asked for"):
        job_key.open_or_draw(path, p1=0.3, axis="neuron", plan=PLAN)


def test_a_ratio_that_differs_in_the_last_place_is_another_one(path: Path) -> None:
    start(path, p1=0.1)
    with pytest.raises(KeyFileError, match=r"p1 = 0\.1, but p1 = 0\.10000000000000002"):
        job_key.open_or_draw(path, p1=0.10000000000000002, axis="neuron", plan=PLAN)


def test_a_second_axis_is_refused_and_both_are_named(path: Path) -> None:
    start(path)
    with pytest.raises(KeyFileError, match="axis neuron, but axis element"):
        job_key.open_or_draw(path, p1=None, axis="element", plan=make_plan(TENSORS, None, axis="element"))


def test_another_checkpoint_is_refused(path: Path) -> None:
    start(path)
    other = make_plan({**TENSORS, "lm_head.weight": ("F32", (97, 64))}, None)
    with pytest.raises(KeyFileError, match=f"plan {PLAN.digest[:12]}, but .* plan {other.digest[:12]}: its tensors"):
        job_key.open_or_draw(path, p1=None, axis="neuron", plan=other)


def test_another_plan_file_is_refused(path: Path) -> None:
    start(path)
    other = make_plan(TENSORS, None, overrides={"rule": [{"match": "*.up_proj.weight", "masked": False}]})
    with pytest.raises(KeyFileError, match="its plan file differs"):
        job_key.open_or_draw(path, p1=None, axis="neuron", plan=other)


# ---------------------------------------------------------------- who may open it


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o660, 0o644, 0o777])
def test_a_key_that_others_can_open_is_refused_with_the_command_that_helps(path: Path, mode: int) -> None:
    start(path)
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=f"mode 0{mode:o}") as raised:
        job_key.load(path)
    assert f"chmod 600 {path}" in str(raised.value)


def test_nobody_is_asked_to_close_a_file_that_is_no_key(path: Path) -> None:
    path.write_text('{"text": "a", "label": 1}')
    path.chmod(0o644)
    with pytest.raises(KeyFileError, match="not a key file") as raised:
        job_key.load(path)
    assert raised.value.hint is None


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_key_that_only_its_owner_can_open_is_read(path: Path, mode: int) -> None:
    job = start(path)
    path.chmod(mode)
    assert job_key.load(path) == job


def test_a_link_to_a_key_is_followed_and_its_target_is_checked(path: Path, tmp_path: Path) -> None:
    job = start(path)
    link = tmp_path / "link"
    link.symlink_to(path)
    assert job_key.load(link) == job
    path.chmod(0o644)
    with pytest.raises(KeyFileError, match="other users can open"):
        job_key.load(link)


def test_a_dangling_link_is_no_new_job(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(KeyFileError, match="there is no key"):
        job_key.open_or_draw(link, p1=0.1, axis="neuron", plan=PLAN)
    assert not (tmp_path / "nowhere").exists()


def test_a_key_of_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only root can give files away, so it is we who are somebody else; root's own files are everybody's to read."""
    start(path)
    status = os.fstat

    def of_another(descriptor: int) -> os.stat_result:
        fields = list(status(descriptor))
        fields[stat.ST_UID] = os.geteuid() + 12345
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", of_another)
    with pytest.raises(KeyFileError, match="belongs to another user"):
        job_key.load(path)


def test_a_directory_is_no_key(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="regular file"):
        job_key.load(tmp_path)


@pytest.mark.timeout(300)
def test_a_pipe_is_no_key_and_does_not_hang(path: Path) -> None:
    os.mkfifo(path, 0o600)
    with pytest.raises(KeyFileError, match="regular file"):
        job_key.load(path)


def test_a_missing_key_is_refused(path: Path) -> None:
    with pytest.raises(KeyFileError, match="there is no key"):
        job_key.load(path)


# ---------------------------------------------------------------- what is in it


@pytest.mark.parametrize(
    "fields",
    [
        {"format": "fedqsn-key/2"},
        {"key": "00"},
        {"key": "0" * 63 + "G"},
        {"key": "A" * 64},
        {"key": None},
        {"p1": "0.1"},
        {"p1": True},
        {"p1": 1},
        {"p1": -0.1},
        {"p1": 10**400},
        {"axis": "row"},
        {"axis": ["neuron"]},
        {"plan": "x"},
        {"plan": 3},
        {"overrides": []},
        {"overrides": {"rule": [{"match": "a"}]}},
        {"overrides": {"rule": 3}},
        {"stray": 1},
    ],
)
def test_a_malformed_key_file_is_refused_without_showing_the_key(path: Path, fields: dict[str, Any]) -> None:
    job = start(path)
    change(path, **fields)
    with pytest.raises(KeyFileError) as raised:
        job_key.load(path)
    assert str(path) in str(raised.value) and job.key.hex() not in str(raised.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"null", b"\xff", b"{", b'{"key": 1, "key": 2}', b"[" * 100_000, b"NaN", b" " * 2**24 + b"1"],
)
def test_what_is_no_key_file_at_all_is_refused(path: Path, data: bytes) -> None:
    start(path)
    path.write_bytes(data)
    with pytest.raises(KeyFileError):
        job_key.load(path)


@pytest.mark.parametrize("field", ["format", "key", "p1", "axis", "plan", "overrides"])
def test_a_key_file_without_one_of_its_fields_is_refused(path: Path, field: str) -> None:
    start(path)
    document = json.loads(path.read_text())
    del document[field]
    path.write_text(json.dumps(document))
    with pytest.raises(KeyFileError, match="not a key file"):
        job_key.load(path)


# ---------------------------------------------------------------- what it tells


def test_a_job_never_shows_its_key(path: Path) -> None:
    job = start(path)
    shown = [repr(job), str(job), f"{job}", repr([job]), f"{(job,)}"]
    assert all(job.key.hex() not in text and repr(job.key) not in text for text in shown)


def test_the_commitment_is_the_same_for_all_time() -> None:
    job = JobKey(bytes(range(32)), 0.1, "neuron", PLAN.digest, {"rule": []}, {}, 0)
    message = (20).to_bytes(8, "big") + b"fedqsn/v1/commitment"
    assert job.commitment == hmac.new(bytes(range(32)), message, hashlib.sha256).hexdigest()
    assert job.commitment == "ac6ce04c005fc85d885df8594a48199a82b9fece3b091fca446e2d3b389a6305"


def test_the_commitment_depends_on_the_key_alone() -> None:
    one = JobKey(bytes(32), 0.1, "neuron", PLAN.digest, {"rule": []}, {}, 0)
    same = JobKey(bytes(32), 0.9, "element", "0" * 64, {"rule": []}, {}, 0)
    other = JobKey(bytes(31) + b"\x01", 0.1, "neuron", PLAN.digest, {"rule": []}, {}, 0)
    assert one.commitment == same.commitment != other.commitment


def test_of_two_processes_that_start_a_job_at_once_one_wins(path: Path) -> None:
    program = f"""
import sys
from fedqsn_cli.masks import job_key
from fedqsn_cli.errors import OutputExists
from fedqsn_cli.planning.plan import make_plan
plan = make_plan({TENSORS!r}, None)
job = job_key.draw(0.1, "neuron", plan)
sys.stdin.readline()
try:
    job_key.save({str(path)!r}, job)
    print(job.commitment)
except OutputExists:
    print("exists")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    racers = [
        subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True, env=environment)
        for _ in range(4)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = [racer.communicate()[0].strip() for racer in racers]
    assert said.count("exists") == 3
    assert job_key.load(path).commitment in said


# ---------------------------------------------------------------- everything in the file is bound to the key


EDITS: dict[str, Callable[[dict[str, Any]], None]] = {
    "p1": lambda file: file.update(p1=0.1),
    "axis": lambda file: file.update(axis="input"),
    "plan": lambda file: file.update(plan="0" * 64),
    "no groups": lambda file: file.update(groups={}),
    "a count": lambda file: next(iter(file["groups"].values())).__setitem__(1, 7),
    "a group more": lambda file: file["groups"].update(phantom=[64, 10**9]),
    "clear": lambda file: file.update(clear=10**15),
    "overrides": lambda file: file.update(overrides={"rule": [], "where": "outputs"}),
    "ratios": lambda file: file.update(ratios=dict.fromkeys(file["groups"], 0.0)),
    "key": lambda file: file.update(key=hashlib.sha256(b"another").hexdigest()),
    "seal": lambda file: file.update(seal="0" * 64),
}


@pytest.mark.parametrize("unsealed", [False, True])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_key_file_is_refused(edit: Callable[[dict[str, Any]], None], unsealed: bool, path: Path) -> None:
    start(path)
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    with pytest.raises(KeyFileError, match="was edited"):
        job_key.load(path, unsealed=unsealed)


def test_a_key_file_without_a_seal_is_taken_and_sealed_on_request_only(path: Path) -> None:
    job = start(path)
    sealed = path.read_bytes()
    document = json.loads(sealed)
    del document["seal"]
    path.write_text(json.dumps(document))
    with pytest.raises(KeyFileError, match=r"no seal.*") as raised:
        job_key.load(path)
    assert "--trust-records" in str(raised.value)
    assert job_key.load(path, unsealed=True) == job
    job_key.seal_file(path, job)
    assert path.read_bytes() == sealed
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("key", ["0" * 64, "f" * 64, "0123456789abcdef" * 4])
def test_a_key_that_was_not_drawn_is_refused(key: str, path: Path) -> None:
    start(path)
    change(path, key=key)
    with pytest.raises(KeyFileError, match="not a key that was drawn"):
        job_key.load(path)
