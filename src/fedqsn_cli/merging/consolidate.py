"""`consolidate`: the end of a job by distillation from the owner's model and from the clients' server model.

    student    the restored model with blend λ
    loss       KL(global ‖ student) on the owner's data + w · KL(server ‖ student) on transfer texts

A language model that is the teacher on texts that are not given writes them itself, from the first tokens of those that
are. Teachers are asked once, whatever number of weights w is tried. No client takes part, and nothing is sent.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from fedqsn_cli.artifacts.manifests import MODEL_MANIFEST, file_digest, manifest_bytes
from fedqsn_cli.checkpoint import ArtifactWriter, Checkpoint, files, write_file_atomically
from fedqsn_cli.errors import InputError
from fedqsn_cli.merging.ending.restore import RestoreInputs, open_restore_inputs
from fedqsn_cli.merging.ending.students import FullStudent, Student
from fedqsn_cli.merging.ending.weight_search import WEIGHTS, WeightSearch, WeightTrial, rank, require_better
from fedqsn_cli.merging.ending.written_texts import written_texts
from fedqsn_cli.merging.job_model import merged_manifest, model_sinks, publish
from fedqsn_cli.models.architecture import task_of
from fedqsn_cli.models.messages import quiet
from fedqsn_cli.models.torch_model import Loaded, choose_device, load_model, memory_errors
from fedqsn_cli.options import ConsolidateOptions, MergeOptions
from fedqsn_cli.progress import SILENT, Progress
from fedqsn_cli.training.data.data_files import DataFile, open_data
from fedqsn_cli.training.data.encoder import Encoder
from fedqsn_cli.training.data.tables import Rows
from fedqsn_cli.training.scoring.scoring import Evaluation, score
from fedqsn_cli.training.scoring.teachers import TAUGHT_TASKS, Distillation, Lesson, Unlabelled, listen
from fedqsn_cli.training.steps.batching import Examples
from fedqsn_cli.training.steps.loop import Surroundings, TrainingSummary, train
from fedqsn_cli.training.steps.states import StateFolder, remove_finished

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
        steps: optimizer steps. first_loss, last_loss: mean loss over the first and the last tenth of them, in nats.
        before: the global model on the evaluation data. restored: the student before training. after: the result. All
            None without evaluation data.
        seconds: wall time of the steps.
        search: how w was found, where it was auto.
    """

    path: str
    blend: float
    transfer_weight: float
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
    for weight in _weights(options):
        remove_finished(_named(options, weight), Path(options.out))
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


def _weights(options: ConsolidateOptions) -> Sequence[float]:
    """The weights of the transfer that are tried."""
    return WEIGHTS if options.transfer_weight == "auto" else (options.transfer_weight,)


def _named(options: ConsolidateOptions, weight: float) -> Path:
    """What the states of the training with one weight are named after."""
    out = Path(os.path.abspath(options.out))
    return out.with_name(f"{out.name}-{weight:g}") if options.transfer_weight == "auto" else out


@dataclass(frozen=True, slots=True)
class _Data:
    """The owner's data and transfer texts, and what is measured on, as far as they are given."""

    own: DataFile | None
    transfer: DataFile | None
    eval: DataFile | None
    own_eval: DataFile | None

    @classmethod
    def of(cls, options: ConsolidateOptions) -> _Data:
        """Look through all of them."""
        paths = (options.own_data, options.transfer_data, options.eval_data, options.own_eval_data)
        return cls(*(open_data(path) if path is not None else None for path in paths))


@dataclass(frozen=True, slots=True)
class _Benchmark:
    """Examples that models are measured on, encoded once: students have the global model's tokenizer.

    Args:
        before: the global model on them.
    """

    examples: Examples
    before: Evaluation


@dataclass(frozen=True, slots=True)
class _Lessons:
    """What both teachers say, and what students are measured on."""

    own: Lesson
    transfer: Lesson
    eval: _Benchmark | None
    own_eval: _Benchmark | None

    @property
    def before(self) -> Evaluation | None:
        """The global model on the evaluation data."""
        return self.eval.before if self.eval is not None else None

    def with_weight(self, weight: float) -> Distillation:
        """The loss of a student."""
        return Distillation([self.own, replace(self.transfer, weight=weight)])


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A student that was trained with one weight.

    Args:
        restored, after: before and after the training, on the evaluation data. own_after: on that of the owner's skill.
    """

    student: Student
    weight: float
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
    data: _Data
    device: torch.device
    work: Path
    progress: Progress

    @classmethod
    def of(
        cls, source: str | Path, trained: str | Path, options: ConsolidateOptions, work: Path, progress: Progress
    ) -> _Consolidation:
        """Open models and data."""
        device = choose_device(options.device)
        data = _Data.of(options)
        restore = MergeOptions(
            options.out, key=options.key, restore=trained, public_base=options.public_base, blend=options.blend
        )
        inputs = open_restore_inputs(source, trained, restore)
        _check_task(inputs.whole.checkpoint)
        return cls(inputs, options, data, device, work, progress)

    def run(self, writer: ArtifactWriter) -> ConsolidateResult:
        """Ask the teachers, train students, write the best."""
        lessons = self._lessons()
        weight = self.options.transfer_weight
        if weight == "auto":
            best, search = self._searched(lessons)
        else:
            best, search = self._attempt(lessons, weight), None
        states = [found for tried in _weights(self.options) if (found := self._states(tried)) is not None]
        path = self._write(writer, best.student, states)
        for folder in states:
            folder.remove()
        return self._result(path, lessons, best, search)

    def _searched(self, lessons: _Lessons) -> tuple[_Attempt, WeightSearch]:
        """The best student of all weights; two are in memory at a time."""
        assert lessons.own_eval is not None and lessons.eval is not None  # the options require both
        own_before, before, tolerance = lessons.own_eval.before, lessons.eval.before, self.options.tolerance
        best: _Attempt | None = None
        trials: list[WeightTrial] = []
        for weight in WEIGHTS:
            one = self._attempt(lessons, weight)
            trials.append(WeightTrial(weight, _known(one.own_after), _known(one.after)))
            chosen = min(trials, key=lambda trial: rank(trial, own_before.loss + tolerance))
            best = one if best is None or chosen is trials[-1] else best
        assert best is not None
        require_better(chosen, own_before, before, tolerance)
        return best, WeightSearch(best.weight, own_before, before, tolerance, tuple(trials))

    def _lessons(self) -> _Lessons:
        """What both teachers say; one of them is in memory at a time."""
        data = self.data
        own, benchmarks = self._lesson(self.inputs.whole.checkpoint, data.own, (data.eval, data.own_eval))
        transfer, _ = self._lesson(self.inputs.server.checkpoint, data.transfer, ())
        return _Lessons(own, transfer, *benchmarks)

    def _lesson(
        self, checkpoint: Checkpoint, data: DataFile | None, measured: Sequence[DataFile | None]
    ) -> tuple[Lesson, list[_Benchmark | None]]:
        """What one teacher says about its texts, and how good it is on others."""
        loaded = load_model(checkpoint)
        encoder = Encoder.of(loaded, self.options.max_length)
        loaded.model.to(self.device).eval()
        found = [self._benchmark(loaded, encoder, one) if one is not None else None for one in measured]
        if data is not None:
            texts: Rows = Unlabelled(data) if loaded.task == "classification" else data
            examples = self._sample(encoder.encode(texts, self.progress))
        else:
            examples = self._written(loaded, encoder)
        twice = 2 * self.options.batch_size
        return Lesson(examples, listen(loaded.model, examples, twice, encoder.padding, self.progress), 1.0), found

    def _sample(self, examples: Examples) -> Examples:
        """As many examples as there may be in all batches; the teacher need not be asked about more."""
        most = self.options.steps * self.options.batch_size
        if len(examples) <= most:
            return examples
        generator = torch.Generator().manual_seed(self.options.seed % 2**63)
        rows = sorted(torch.randperm(len(examples), generator=generator)[:most].tolist())
        targets: list[Any] = [examples.targets[row] for row in rows]
        return replace(examples, features=[examples.features[row] for row in rows], targets=targets)

    def _written(self, loaded: Loaded, encoder: Encoder) -> Examples:
        """Texts that a language model writes itself, from the first tokens of texts that are given."""
        own, transfer = self.data.own, self.data.transfer
        if loaded.task != "causal-lm":
            flag = "--own-data" if own is None else "--transfer-data"
            raise InputError(f"a {loaded.task} model writes no texts", where=flag, hint="give texts, labels or not")
        return written_texts(loaded, encoder, own or transfer, self.options, self.progress)

    def _attempt(self, lessons: _Lessons, weight: float) -> _Attempt:
        """Train a student with one weight, and measure it."""
        lesson, states = lessons.with_weight(weight), self._states(weight)
        with states.opened() if states is not None else nullcontext():
            student = self._student()
            encoder = Encoder.of(student.loaded, self.options.max_length)
            restored = self._measure(student, encoder, lessons.eval)
            around = Surroundings(backward=lesson.backward, states=states)
            summary = train(
                student.loaded.model,
                lesson.examples,
                student.trainable(),
                self.options.recipe,
                encoder.padding,
                self.progress,
                around,
            )
            after = self._measure(student, encoder, lessons.eval)
            own_after = self._measure(student, encoder, lessons.own_eval)
        return _Attempt(student, weight, summary, restored, after, own_after)

    def _student(self) -> Student:
        """The restored model, ready to be trained."""
        if self.options.method == "full":
            return FullStudent.of(self.inputs, self.options.blend, self.device, self.progress)
        from fedqsn_cli.merging.ending.lora_student import LoraStudent  # imports peft, which takes long

        return LoraStudent.of(self.work, self.inputs, self.options, self.device, self.progress)

    def _benchmark(self, loaded: Loaded, encoder: Encoder, data: DataFile) -> _Benchmark:
        """Encode data for the global model, and measure it."""
        examples = encoder.encode(data, SILENT)
        return _Benchmark(examples, self._score(loaded, encoder, examples))

    def _measure(self, student: Student, encoder: Encoder, benchmark: _Benchmark | None) -> Evaluation | None:
        return self._score(student.loaded, encoder, benchmark.examples) if benchmark is not None else None

    def _score(self, loaded: Loaded, encoder: Encoder, examples: Examples) -> Evaluation:
        twice = 2 * self.options.batch_size
        return score(loaded.model, examples, batch_size=twice, padding=encoder.padding, progress=self.progress)

    def _states(self, weight: float) -> StateFolder | None:
        """Where the states of the training with one weight are kept."""
        options = self.options
        if options.save_every is None:
            return None
        facts: dict[str, Any] = {
            "--" + field.name.replace("_", "-"): _listed(getattr(options, field.name))
            for field in fields(options)
            if field.name not in _NOT_BINDING | {*_FILES, "public_base"}
        }
        facts["--transfer-weight"] = weight
        for name in _FILES:
            path = getattr(options, name)
            facts["--" + name.replace("_", "-")] = file_digest(Path(path)) if path is not None else None
        for name, model in (("GLOBAL", self.inputs.whole), ("SERVER", self.inputs.server)):
            paths = {Path(entry.file) for entry in model.checkpoint.entries.values()}
            facts[name] = {path.name: file_digest(path) for path in sorted(paths)}
        return StateFolder(_named(options, weight), facts, options.save_every)

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

    def _result(self, path: str, lessons: _Lessons, best: _Attempt, search: WeightSearch | None) -> ConsolidateResult:
        return ConsolidateResult(
            path=path,
            blend=self.options.blend,
            transfer_weight=best.weight,
            own_texts=len(lessons.own.said),
            transfer_texts=len(lessons.transfer.said),
            own_written=self.data.own is None,
            transfer_written=self.data.transfer is None,
            steps=best.summary.steps,
            first_loss=best.summary.first_loss,
            last_loss=best.summary.last_loss,
            before=lessons.before,
            restored=best.restored,
            after=best.after,
            seconds=best.summary.seconds,
            search=search,
        )


def _check_task(checkpoint: Checkpoint) -> None:
    """Refuse a model whose answers are not probabilities of classes or next tokens. Raises InputError."""
    task, architecture = task_of(checkpoint.config, checkpoint.path)
    if task not in TAUGHT_TASKS:
        what = f"{architecture} is a model for {task}, which cannot be consolidated"
        raise InputError(what, where=checkpoint.path, hint="use fedqsn merge --restore")


def _known(evaluation: Evaluation | None) -> Evaluation:
    """A measurement whose data the options require."""
    assert evaluation is not None
    return evaluation


def _listed(value: Any) -> Any:
    """A value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
