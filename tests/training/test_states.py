"""A training that is ended at any instant goes on from its last whole state, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedqsn_cli import client_train
from fedqsn_cli.artifacts.manifests import file_digest
from fedqsn_cli.checkpoint import files
from fedqsn_cli.errors import InputError
from fedqsn_cli.options import RecipeOptions
from fedqsn_cli.progress import SILENT, Silent
from fedqsn_cli.training.steps import loop
from fedqsn_cli.training.steps.batching import Examples, Padding
from fedqsn_cli.training.steps.compact import VisibleParameters
from fedqsn_cli.training.steps.interrupts import held_signals
from fedqsn_cli.training.steps.journal import StepFigures
from fedqsn_cli.training.steps.loop import Surroundings, TrainingSummary
from fedqsn_cli.training.steps.states import KEPT, StateFolder, remove_finished
from support.forks import fork_command
from support.processes import run
from support.raw_safetensors import Tensors, read_file, write_file
from support.training_jobs import labelled, make_proxy, small_model

CPU = {"device": "cpu", "precision": "fp32"}
RECIPE = RecipeOptions(epochs=3, batch_size=4, lr=1e-2)


class Killed(BaseException):
    """Stands for a process that ends at once."""


class KillAfter:
    """A journal that ends the training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def begin(self, done: int) -> None:
        """Nothing to do."""

    def add(self, figures: StepFigures) -> None:
        """End it, perhaps."""
        if figures.step == self.step:
            raise Killed


class Notes(Silent):
    """Progress that remembers notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        """Remember it."""
        self.texts.append(text)


def new_model() -> Any:
    import transformers

    from support.families import make_config

    torch.manual_seed(0)
    config = make_config("bert", hidden_dropout_prob=0.2)
    return getattr(transformers, config.architectures[0])(config)


EXAMPLES = Examples(
    "classification",
    [{"input_ids": [5 + row] * (2 + row % 3), "attention_mask": [1] * (2 + row % 3)} for row in range(12)],
    [row % 5 for row in range(12)],
)


def trained(
    folder: StateFolder | None, recipe: RecipeOptions = RECIPE, kill_after: int = 0, progress: Any = SILENT
) -> tuple[Tensor, TrainingSummary]:
    """All weights after a training, and its figures."""
    model = new_model()
    masks = {"classifier.weight": (torch.arange(model.classifier.weight.shape[1]) % 2 == 0).expand(5, -1)}
    journals = [KillAfter(kill_after)]
    around = Surroundings(states=folder, journals=journals)
    done = loop.train(model, EXAMPLES, VisibleParameters(model, masks), recipe, Padding(0), progress, around)
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]), done


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "sgd"])
@pytest.mark.parametrize("kill_after", [1, 4, 9])
def test_what_goes_on_ends_with_the_same_bits(tmp_path: Path, optimizer: Any, kill_after: int) -> None:
    recipe = RecipeOptions(epochs=3, batch_size=4, lr=1e-2, optimizer=optimizer)
    whole, figures = trained(None, recipe)
    with StateFolder(tmp_path / "out", {}, "2").opened() as folder:
        with pytest.raises(Killed):
            trained(folder, recipe, kill_after)
        again, same_figures = trained(folder, recipe)
    assert torch.equal(whole, again)
    assert (figures.first_loss, figures.last_loss) == (same_figures.first_loss, same_figures.last_loss)
    assert (figures.steps, figures.examples) == (same_figures.steps, same_figures.examples)


def test_it_is_told_where_the_training_goes_on(tmp_path: Path) -> None:
    notes = Notes()
    with StateFolder(tmp_path / "out", {}, "2").opened() as folder:
        with pytest.raises(Killed):
            trained(folder, kill_after=6, progress=notes)
        trained(folder, progress=notes)
    assert notes.texts == ["going on after step 4 of 9"]  # it ended before the state of step 6 was written


@dataclass(frozen=True)
class KilledTraining:
    """The states of a training that was killed after step 6 of 9, and the weights that it would have ended with."""

    states: Path
    whole: Tensor

    def notes_of_a_restart(self, place: Path, damage: Callable[[Path], None]) -> list[str]:
        """What is told when its newest state is damaged; it ends as if it had not been interrupted."""
        notes = Notes()
        with StateFolder(place / "out", {}, "1").opened() as folder:
            shutil.copytree(self.states, folder.path, dirs_exist_ok=True)
            damage(folder.path / "step-00000005")
            again, _ = trained(folder, progress=notes)
        assert torch.equal(self.whole, again)
        return notes.texts


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> KilledTraining:
    with StateFolder(tmp_path_factory.mktemp("killed") / "out", {}, "1").opened() as folder:
        with pytest.raises(Killed):
            trained(folder, kill_after=6)
        return KilledTraining(folder.path, trained(None)[0])


@pytest.mark.parametrize("damage", ["truncate", "flip", "no document", "half a document", "a document of nothing"])
def test_a_damaged_state_is_passed_over_for_the_one_before(killed: KilledTraining, tmp_path: Path, damage: str) -> None:
    notes = killed.notes_of_a_restart(tmp_path, lambda newest: damage_state(newest, damage))
    assert notes[0].startswith("ignoring the damaged state step-00000005 (")
    assert notes[1] == "going on after step 4 of 9"


def rewritten(state: Path, change: Callable[[Tensors, dict[str, Any]], None]) -> None:
    """Change what a state holds, and write down the digest of that."""
    document, tensors = json.loads((state / "state.json").read_text()), read_file(state / "state.safetensors")
    change(tensors, document)
    write_file(state / "state.safetensors", tensors)
    document["files"]["state.safetensors"] = file_digest(state / "state.safetensors")
    (state / "state.json").write_text(json.dumps(document))


def renamed(old: str, new: str) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, _: tensors.update({new: tensors.pop(old)})


def filled(name: str, value: int) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, _: tensors[name][1].view(np.uint8).fill(value)


def reshaped(name: str) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, _: tensors.update({name: (tensors[name][0], tensors[name][1][..., None])})


def told(**fields: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda _, document: document.update(fields)


FOREIGN = {
    "a leaf too many": renamed("leaf.0", "leaf.999"),
    "a leaf without a number": renamed("leaf.0", "leaf.x"),
    "a leaf of another shape": reshaped("leaf.0"),
    "no losses": renamed("losses", "loss"),
    "losses in rows": reshaped("losses"),
    "losses that are no numbers": filled("losses", 255),
    "bytes that are no state of a generator": filled("random", 255),
    "generators of other processes": reshaped("random"),
    "another optimizer": renamed("optimizer.0.exp_avg", "optimizer.0.momentum"),
    "a moment too few": lambda tensors, _: tensors.pop("optimizer.0.exp_avg"),
    "a scalar too many": told(scalars={"0.zz": 1}),
    "scalars that are no numbers": told(scalars={"0.step": "x"}),
    "a step that was never made": told(step=10**9),
    "a step before all others": told(step=-1),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_state_of_something_else_is_passed_over_though_its_digest_is_right(
    killed: KilledTraining, tmp_path: Path, what: str
) -> None:
    notes = killed.notes_of_a_restart(tmp_path, lambda newest: rewritten(newest, FOREIGN[what]))
    assert [text.split(" (")[0] for text in notes] == [
        "ignoring the damaged state step-00000005",
        "going on after step 4 of 9",
    ]


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_special_file_in_a_state_is_never_read(
    killed: KilledTraining, tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    def replace(newest: Path) -> None:
        (newest / name).unlink()
        make(newest / name)

    assert killed.notes_of_a_restart(tmp_path, replace)[-1] == "going on after step 4 of 9"


def damage_state(state: Path, damage: str) -> None:
    """Make a state unusable."""
    tensors, document = state / "state.safetensors", state / "state.json"
    if damage == "truncate":
        os.truncate(tensors, tensors.stat().st_size - 7)
    elif damage == "flip":
        data = bytearray(tensors.read_bytes())
        data[-1000] ^= 4
        tensors.write_bytes(data)
    elif damage == "no document":
        document.unlink()
    elif damage == "half a document":
        document.write_text(document.read_text()[:99])
    else:
        document.write_text("[]")


def test_states_are_few_and_for_their_owner_only(tmp_path: Path) -> None:
    with StateFolder(tmp_path / "out", {}, "1").opened() as folder:
        trained(folder)
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
        states = sorted(folder.path.iterdir())
        assert [state.name for state in states] == ["step-00000008", "step-00000009"]
        assert len(states) == KEPT
        assert {stat.S_IMODE(file.stat().st_mode) for state in states for file in state.iterdir()} == {0o600}


def test_a_time_may_be_given_instead_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("fedqsn_cli.training.steps.states.time", SimpleNamespace(monotonic=lambda: clock.now))
    folder = StateFolder(tmp_path / "out", {}, "5m")
    clock.now = 299.0
    assert not folder.due(1)
    clock.now = 300.0
    assert folder.due(1)
    for text in ("0", "1.5", "10 minutes", "-3", "m"):
        with pytest.raises(InputError, match="neither a number of steps nor a time"):
            StateFolder(tmp_path / "out", {}, text)


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    with StateFolder(tmp_path / "out", {}, "1").opened() as folder:
        with pytest.raises(InputError, match="in use by another"), StateFolder(tmp_path / "out", {}, "1").opened():
            pass
        assert folder.path.is_dir()
    assert not folder.path.exists()  # nothing was saved


# ------------------------------------------------------------------------------------------------ signals


@pytest.fixture
def heeded() -> Iterator[None]:
    """SIGINT as a shell's foreground has it: a background job would inherit it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_a_signal_waits_for_the_end_of_the_block() -> None:
    after = []
    with pytest.raises(KeyboardInterrupt), held_signals() as held:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # an echo
        after.append(held.any)
    assert after == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("heeded")
def test_who_insists_is_heard_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedqsn_cli.training.steps.interrupts.ECHO_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt), held_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it was not heard")


def test_nothing_is_raised_where_no_signal_came() -> None:
    with held_signals() as held:
        pass
    assert not held.any


# ------------------------------------------------------------------------------------------------ client-train


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a proxy, data.jsonl, and the update of a training that nobody ended; not to be changed."""
    here = tmp_path_factory.mktemp("job")
    make_proxy(small_model(here / "model"), here / "proxy")
    labelled(here / "data.jsonl")
    client_train(here / "proxy", here / "update", **options(here))
    return here


def options(job: Path, **more: Any) -> dict[str, Any]:
    """Options of all trainings here: 24 steps."""
    return {"data": job / "data.jsonl", "eval_data": job / "data.jsonl", "epochs": 4, "batch_size": 4, "lr": 1e-3} | (
        CPU | more
    )


def update_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of an update."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class KilledAfter(Silent):
    """Ends the training after a step, before a state of it is written."""

    def __init__(self, step: int) -> None:
        self.left = step

    def advance(self, amount: int, **figures: float) -> None:
        """Count steps, and nothing else."""
        self.left -= "lr" in figures
        if not self.left:
            raise Killed


def test_the_update_is_byte_equal_and_no_state_is_left(job: Path, tmp_path: Path) -> None:
    given = options(job, save_every="5", log=tmp_path / "log")
    with pytest.raises(Killed):
        client_train(job / "proxy", tmp_path / "update", progress=KilledAfter(13), **given)
    assert [path.name for path in tmp_path.iterdir() if path.name != "log"] == [".update.fedqsn-states"]
    client_train(job / "proxy", tmp_path / "update", **given | {"save_every": "7"})
    assert update_bytes(tmp_path / "update") == update_bytes(job / "update")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "update"]
    steps = [line.split(",")[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert steps == [f'{{"step": {step}' for step in range(1, 25)]


@pytest.mark.parametrize(
    ("more", "named"), [({"lr": 2e-3}, "--lr"), ({"seed": 1, "epochs": 5}, "--epochs, --seed"), ({}, "--data")]
)
def test_a_state_of_another_training_is_refused(job: Path, tmp_path: Path, more: dict[str, Any], named: str) -> None:
    with pytest.raises(Killed):
        client_train(job / "proxy", tmp_path / "update", save_every="2", progress=KilledAfter(3), **options(job))
    if not more:
        more = {"data": labelled(tmp_path / "other.jsonl", rows=23)}
    with pytest.raises(InputError, match=f"holds a training with other {named};"):
        client_train(job / "proxy", tmp_path / "update", save_every="2", **options(job, **more))
    assert not (tmp_path / "update").exists()


def words(job: Path, out: Path, *more: str) -> list[str]:
    """The command whose training is that of `options`."""
    data = str(job / "data.jsonl")
    given = ["--data", data, "--eval-data", data, "--epochs", "4", "--batch-size", "4", "--lr", "1e-3", *more]
    return ["client-train", str(job / "proxy"), "--out", str(out), "--device", "cpu", "--precision", "fp32", *given]


def test_kills_at_any_instant_and_a_polite_end_change_no_byte(job: Path, tmp_path: Path) -> None:
    rng = random.Random(5)
    states, update, polite = tmp_path / ".update.fedqsn-states", tmp_path / "update", tmp_path / "polite" / "update"
    with (tmp_path / "told").open("w") as told:
        for _ in range(2):
            child = fork_command(*words(job, update, "--save-every", "1"), told=told)
            wait_for_a_state(states, child.pid)
            time.sleep(rng.uniform(0, 0.03))
            child.kill()
            assert child.wait() == -signal.SIGKILL
        polite.parent.mkdir()
        log = tmp_path / "log"
        child = fork_command(*words(job, polite, "--save-every", "100", "--log", str(log)), told=told)
        while not log.exists() or not log.read_text():
            time.sleep(0.001)
        child.kill(signal.SIGTERM)
        assert child.wait() == 130
        assert len(list((polite.parent / ".update.fedqsn-states").glob("step-*"))) == 1
        for out in (tmp_path / "whole", update, polite):  # "whole" there too: other numbers of threads round otherwise
            if not out.exists():
                assert fork_command(*words(job, out, "--save-every", "100"), told=told).wait() == 0
            assert update_bytes(out) == update_bytes(tmp_path / "whole")
    text = (tmp_path / "told").read_text()
    assert "fedqsn: going on after step" in text
    assert "fedqsn: interrupted" in text
    assert not states.exists()


def wait_for_a_state(states: Path, child: int) -> None:
    """Until there is one that was not there before, or the training has ended."""
    before = set(states.glob("step-*")) if states.is_dir() else set()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if not Path(f"/proc/{child}/cmdline").read_bytes() or not set(states.glob("step-*")) <= before:
            return
        time.sleep(0.001)


def test_a_dry_run_writes_nothing(job: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    outcome = run(*words(job, tmp_path / "update", "--save-every", "1", "--dry-run", "--log", str(tmp_path / "l")))
    assert (outcome.code, outcome.err) == (0, "")
    assert "bytes per parameter" in outcome.out
    assert sorted(tmp_path.iterdir()) == before


def test_states_that_a_kill_left_beside_their_update_are_deleted_when_it_is_found(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: StateFolder) -> None:
        raise Killed

    update, states = tmp_path / "update", tmp_path / ".update.fedqsn-states"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(StateFolder, "remove", killed)
        client_train(job / "proxy", update, data=job / "data.jsonl", max_steps=2, save_every="1", **CPU)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/update.json").write_text("{}")

    remove_finished(update, tmp_path / "other")
    assert list(states.glob("step-*"))
    ended = run(*words(job, update, "--save-every", "1"))

    assert (ended.code, states.exists()) == (2, False)
    assert "already exists" in ended.err


def test_leftovers_of_a_kill_are_swept(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "out", {}, "1")
    folder.path.mkdir()
    leftover = files.staging_path(folder.path / "step-00000007")
    leftover.mkdir()
    with folder.opened():
        assert not leftover.exists()
