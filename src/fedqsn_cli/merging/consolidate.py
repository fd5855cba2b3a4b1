"""`consolidate`: the end of a job by distillation from the owner's model and from the clients' server model.

    student    the restored model with blend λ
    loss       KL(global ‖ student) on the owner's data + w · KL(server ‖ student) on transfer texts

A language model that is the teacher on texts that are not given writes them itself, from the first tokens of those that
are. Teachers are asked once, whatever number of learning rates and weights w is tried. No client takes part, and
nothing is sent.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fedqsn_cli.artifacts.manifests import MODEL_MANIFEST, file_digest, manifest_bytes
from fedqsn_cli.checkpoint import ArtifactWriter, Checkpoint, files, write_file_atomically
from fedqsn_cli.errors import Diverged, InputError
from fedqsn_cli.merging.ending.distillation_data import (
    ConsolidationFiles,
    DistillationData,
    EvaluationSet,
    Teachers,
    evaluate,
)
from fedqsn_cli.merging.ending.rate_search import RATES, SHARE, RateSearch
from fedqsn_cli.merging.ending.rate_search import search as search_rates
from fedqsn_cli.merging.ending.restore import RestoreInputs, open_restore_inputs
from fedqsn_cli.merging.ending.students import FullStudent, Student
from fedqsn_cli.merging.ending.weight_search import (
    USUAL_WEIGHT,
    WEIGHTS,
    WeightSearch,
    WeightTrial,
    rank,
    require_better,
)
from fedqsn_cli.merging.job_model import merged_manifest, model_sinks, publish
from fedqsn_cli.models.architecture import task_of
from fedqsn_cli.models.messages import quiet
from fedqsn_cli.models.torch_model import choose_device, memory_errors
from fedqsn_cli.options import ConsolidateOptions, MergeOptions
from fedqsn_cli.progress import SILENT, Progress
from fedqsn_cli.training.data.encoder import Encoder
from fedqsn_cli.training.scoring.scoring import Evaluation
from fedqsn_cli.training.scoring.teachers import TAUGHT_TASKS
from fedqsn_cli.training.steps.loop import Surroundings, TrainingSummary, train
from fedqsn_cli.training.steps.states import StateFolder, facts_of, remove_finished

_MEASURING = frozenset({"eval_data", "own_eval_data", "own_tolerance", "report"})
_NOT_BINDING = _MEASURING | {"out", "force", "max_shard_size", "device", "save_every", "key"}
_FILES = ("own_data", "transfer_data")


@dataclass(frozen=True, slots=True)
class ConsolidateResult:
    """The result of `consolidate`.

    Args:
        path: the final model.
        transfer_weight: w, as it was given or found.
        own_texts, transfer_texts: how many texts each teacher was asked about.
        own_written, transfer_written: whether the teacher wrote them itself.
        lr: the largest learning rate, as it was given or found.
        steps: optimizer steps. first_loss, last_loss: mean loss over the first and the last tenth of them, in nats.
        before: the global model on the evaluation data. restored: the student before training. after: the result. All
            None without evaluation data.
        seconds: wall time of the steps.
        search: how w was found, where it was auto. rates: how the learning rate was.
    """

    path: str
    blend: float
    transfer_weight: float
    lr: float
    own_texts: int
    transfer_texts: int
    own_written: bool
    transfer_written: bool
    steps: int
    first_loss: float
    last_loss: float
    before: Evaluation | None
    restored: Evaluation | None
    after: Evaluation | None
    seconds: float
    search: WeightSearch | None = None
    rates: RateSearch | None = None


def consolidate(
    source: str | Path, trained: str | Path, options: ConsolidateOptions, *, progress: Progress = SILENT
) -> ConsolidateResult:
    """Put the owner's model and what clients taught together, by training the restored model to agree with both.

    Args:
        source: the global model. trained: the server model that the job ended with.
        options: see `ConsolidateOptions`.
        progress: told of each stage.

    Raises:
        InputError: models, key and options do not fit together. DataError: the data cannot be used.
        GateFailed: the weight is auto, and every weight loses too much of the owner's skill, or none makes the model
            better at what clients teach. Nothing was written then.

    Example:
        >>> consolidate("global/", "server-9/", "final/", key="job.key", own_data="own.jsonl").last_loss
    """
    outside = ("key", "eval_data", "own_eval_data", "report", *_FILES)
    files.keep_outside(Path(options.out), **{name.replace("_", "-"): getattr(options, name) for name in outside})
    if options.report is not None:
        files.require_file_target(options.report)
    for setting in [*_trials(options), *_whole(options, RATES[0])]:  # their names do not depend on the rate
        remove_finished(_named(options, setting), Path(options.out))
    with (
        ArtifactWriter(Path(options.out), force=options.force, replaces=[MODEL_MANIFEST], digest=None) as writer,
        quiet(),
        memory_errors(),
    ):
        result = _Consolidation.of(source, trained, options, writer.place("student"), progress).run(writer)
    if options.report is not None and result.search is not None:
        from fedqsn_cli.merging.report.page_weights import render

        write_file_atomically(Path(options.report), render(result.search).encode())
    return result


class _Setting(NamedTuple):
    """What a student is trained with.

    Args:
        weight: of the transfer. lr: the largest learning rate. trial: whether a short training tries the rate.
    """

    weight: float
    lr: float
    trial: bool = False


def _trials(options: ConsolidateOptions) -> list[_Setting]:
    """The short trainings that may try learning rates."""
    weight = USUAL_WEIGHT if options.transfer_weight == "auto" else options.transfer_weight
    return [_Setting(weight, rate, trial=True) for rate in RATES] if options.lr == "auto" else []


def _whole(options: ConsolidateOptions, lr: float) -> list[_Setting]:
    """The other trainings, once the learning rate is known."""
    weights = WEIGHTS if options.transfer_weight == "auto" else (options.transfer_weight,)
    return [_Setting(weight, lr) for weight in weights]


def _named(options: ConsolidateOptions, setting: _Setting) -> Path:
    """What the states of a training are named after."""
    out = Path(os.path.abspath(options.out))
    if setting.trial:
        return out.with_name(f"{out.name}-lr-{setting.lr:g}")
    return out.with_name(f"{out.name}-{setting.weight:g}") if options.transfer_weight == "auto" else out


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A student that was trained with one setting.

    Args:
        restored, after: before and after the training, on the evaluation data. own_after: on that of the owner's skill.
    """

    student: Student
    setting: _Setting
    summary: TrainingSummary
    restored: Evaluation | None
    after: Evaluation | None
    own_after: Evaluation | None


@dataclass(frozen=True, slots=True)
class _Consolidation:
    """Everything that is open while a model is consolidated.

    Args:
        work: a folder for models that a student is made of; it goes with the output that is not finished.
    """

    inputs: RestoreInputs
    options: ConsolidateOptions
    teachers: Teachers
    device: torch.device
    work: Path
    progress: Progress

    @classmethod
    def of(
        cls, source: str | Path, trained: str | Path, options: ConsolidateOptions, work: Path, progress: Progress
    ) -> _Consolidation:
        """Open models and data."""
        device = choose_device(options.device)
        teachers = Teachers(ConsolidationFiles.of(options), options, device, progress)
        restore = MergeOptions(
            options.out, key=options.key, restore=trained, public_base=options.public_base, blend=options.blend
        )
        inputs = open_restore_inputs(source, trained, restore)
        _check_task(inputs.whole.checkpoint)
        return cls(inputs, options, teachers, device, work, progress)

    def run(self, writer: ArtifactWriter) -> ConsolidateResult:
        """Ask the teachers, train students, write the best."""
        data = self.teachers.ask(self.inputs)
        rates, lr, weight = None, self.options.lr, self.options.transfer_weight
        if lr == "auto":
            rates = self._rates(data)
            lr = rates.chosen
        if weight == "auto":
            best, weights = self._best_weight(data, lr)
        else:
            best, weights = self._attempt(data, _Setting(weight, lr)), None
        states = [
            found
            for tried in [*_trials(self.options), *_whole(self.options, lr)]
            if (found := self._states(tried)) is not None
        ]
        path = self._write(writer, best.student, states)
        for folder in states:
            folder.remove()
        return self._result(path, data, best, rates, weights)

    def _rates(self, data: DistillationData) -> RateSearch:
        """The best learning rate."""
        trained, kept_out = data.divided()
        trials = {setting.lr: setting for setting in _trials(self.options)}
        return search_rates(lambda rate: self._divergence(trained, kept_out, trials[rate]))

    def _divergence(self, data: DistillationData, kept_out: DistillationData, setting: _Setting) -> float:
        """How far a student of a short training is from its teachers, on texts that were kept out of it."""
        states = self._states(setting)
        with states.opened() if states is not None else nullcontext():
            student = self._student()
            encoder = Encoder.of(student.loaded, self.options.max_length)
            self._train(student, encoder, data, setting, states)
        loss = kept_out.with_weight(setting.weight)
        found = loss.mean(student.loaded.model, 2 * self.options.batch_size, encoder.padding)
        if not math.isfinite(found):
            raise Diverged(f"the divergence is {found} after training", where=f"--lr {setting.lr:g}")
        return found

    def _best_weight(self, data: DistillationData, lr: float) -> tuple[_Attempt, WeightSearch]:
        """The best student of all weights; two are in memory at a time."""
        assert data.own_eval is not None and data.eval is not None  # the options require both
        own_before, before, tolerance = data.own_eval.before, data.eval.before, self.options.tolerance
        best: _Attempt | None = None
        trials: list[WeightTrial] = []
        for weight in WEIGHTS:
            one = self._attempt(data, _Setting(weight, lr))
            trials.append(WeightTrial(weight, _known(one.own_after), _known(one.after)))
            chosen = min(trials, key=lambda trial: rank(trial, own_before.loss + tolerance))
            best = one if best is None or chosen is trials[-1] else best
        assert best is not None
        require_better(chosen, own_before, before, tolerance)
        return best, WeightSearch(best.setting.weight, own_before, before, tolerance, tuple(trials))

    def _attempt(self, data: DistillationData, setting: _Setting) -> _Attempt:
        """Train a student with one setting, and measure it."""
        states = self._states(setting)
        with states.opened() if states is not None else nullcontext():
            student = self._student()
            encoder = Encoder.of(student.loaded, self.options.max_length)
            restored = self._measure(student, encoder, data.eval)
            summary = self._train(student, encoder, data, setting, states)
            after = self._measure(student, encoder, data.eval)
            own_after = self._measure(student, encoder, data.own_eval)
        return _Attempt(student, setting, summary, restored, after, own_after)

    def _train(
        self,
        student: Student,
        encoder: Encoder,
        data: DistillationData,
        setting: _Setting,
        states: StateFolder | None,
    ) -> TrainingSummary:
        loss = data.with_weight(setting.weight)
        return train(
            student.loaded.model,
            loss.examples,
            student.trainable(),
            self.options.recipe(setting.lr, _steps(self.options, setting)),
            encoder.padding,
            self.progress,
            Surroundings(backward=loss.backward, states=states),
        )

    def _student(self) -> Student:
        """The restored model, ready to be trained."""
        if self.options.method == "full":
            return FullStudent.of(self.inputs, self.options.blend, self.device, self.progress)
        from fedqsn_cli.merging.ending.lora_student import LoraStudent  # imports peft, which takes long

        return LoraStudent.of(self.work, self.inputs, self.options, self.device, self.progress)

    def _measure(self, student: Student, encoder: Encoder, measured: EvaluationSet | None) -> Evaluation | None:
        if measured is None:
            return None
        return evaluate(student.loaded, encoder, measured.examples, self.options, self.progress)

    def _states(self, setting: _Setting) -> StateFolder | None:
        """Where the states of the training with one setting are kept."""
        options = self.options
        if options.save_every is None:
            return None
        facts = facts_of(options, _NOT_BINDING | {*_FILES, "public_base"})
        facts |= {"--transfer-weight": setting.weight, "--lr": setting.lr, "--steps": _steps(options, setting)}
        for name in _FILES:
            path = getattr(options, name)
            facts["--" + name.replace("_", "-")] = file_digest(Path(path)) if path is not None else None
        for name, model in (("GLOBAL", self.inputs.whole), ("SERVER", self.inputs.server)):
            paths = {Path(entry.file) for entry in model.checkpoint.entries.values()}
            facts[name] = {path.name: file_digest(path) for path in sorted(paths)}
        return StateFolder(_named(options, setting), facts, options.save_every)

    def _write(self, writer: ArtifactWriter, student: Student, states: Sequence[StateFolder]) -> str:
        """Write the student in the dtypes of the global model."""
        inputs, whole = self.inputs, self.inputs.whole
        limit = self.options.max_shard_bytes
        with model_sinks(writer, whole, inputs.tasks, limit, with_residual=False) as (sink, _):
            student.write(sink)
        files.remove_tree(self.work)
        manifest = merged_manifest(whole, inputs.job, added=inputs.merged)
        for folder in states:
            folder.finish(MODEL_MANIFEST, hashlib.sha256(manifest_bytes(manifest)).hexdigest())
        return publish(writer, whole, manifest)

    def _result(
        self,
        path: str,
        data: DistillationData,
        best: _Attempt,
        rates: RateSearch | None,
        weights: WeightSearch | None,
    ) -> ConsolidateResult:
        return ConsolidateResult(
            path=path,
            blend=self.options.blend,
            transfer_weight=best.setting.weight,
            lr=best.setting.lr,
            own_texts=len(data.own.examples),
            transfer_texts=len(data.transfer.examples),
            own_written=self.teachers.files.own is None,
            transfer_written=self.teachers.files.transfer is None,
            steps=best.summary.steps,
            first_loss=best.summary.first_loss,
            last_loss=best.summary.last_loss,
            before=data.before,
            restored=best.restored,
            after=best.after,
            seconds=best.summary.seconds,
            search=weights,
            rates=rates,
        )


def _check_task(checkpoint: Checkpoint) -> None:
    """Refuse a model whose answers are not probabilities of classes or next tokens. Raises InputError."""
    task, architecture = task_of(checkpoint.config, checkpoint.path)
    if task not in TAUGHT_TASKS:
        what = f"{architecture} is a model for {task}, which cannot be consolidated"
        raise InputError(what, where=checkpoint.path, hint="use fedqsn merge --restore")


def _steps(options: ConsolidateOptions, setting: _Setting) -> int:
    """The optimizer steps of a training."""
    return max(1, options.steps // SHARE) if setting.trial else options.steps


def _known(evaluation: Evaluation | None) -> Evaluation:
    """A measurement whose data the options require."""
    assert evaluation is not None
    return evaluation
