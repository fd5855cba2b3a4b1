"""`consolidate`: the end of a job by distillation from the owner's model and from the clients' server model.

    student    the restored model with blend λ
    loss       KL(global ‖ student) on the owner's data + w · KL(server ‖ student) on transfer texts

A language model that is the teacher on texts that are not given writes them itself, from the first tokens of those that
are. No client takes part, and nothing is sent.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedqsn_cli.artifacts.manifests import file_digest
from fedqsn_cli.checkpoint import ArtifactWriter, Checkpoint
from fedqsn_cli.dtypes import DTYPES, WEIGHT_DTYPES
from fedqsn_cli.errors import InputError
from fedqsn_cli.export.outputs import tensor_specs
from fedqsn_cli.export.session import keep_outside
from fedqsn_cli.merging.chunks import InMemorySink
from fedqsn_cli.merging.job_model import merged_manifest, model_sinks, publish
from fedqsn_cli.merging.restore import RestoreInputs, open_restore_inputs, restore_into
from fedqsn_cli.models.architecture import task_of
from fedqsn_cli.models.dense import TORCH_DTYPES, from_bytes
from fedqsn_cli.models.torch_model import Loaded, choose_device, load_model, memory_errors, quiet, stored_tensors
from fedqsn_cli.options import ConsolidateOptions, MergeOptions
from fedqsn_cli.progress import SILENT, Progress
from fedqsn_cli.training.batching import IGNORED, Examples
from fedqsn_cli.training.compact import VisibleParameters
from fedqsn_cli.training.data import Encoder
from fedqsn_cli.training.data_files import read_table
from fedqsn_cli.training.loop import Surroundings, TrainingSummary, train
from fedqsn_cli.training.precision import repeatable
from fedqsn_cli.training.scoring import Evaluation, score
from fedqsn_cli.training.states import StateFolder
from fedqsn_cli.training.tables import Table
from fedqsn_cli.training.teachers import TAUGHT_TASKS, Distillation, Lesson, listen

Array = NDArray[Any]

_NOT_BINDING = frozenset({"out", "force", "max_shard_size", "device", "eval_data", "save_every", "key"})
_FILES = ("own_data", "transfer_data")


@dataclass(frozen=True, slots=True)
class ConsolidateResult:
    """The result of `consolidate`.

    Args:
        path: the final model.
        own_texts, transfer_texts: how many texts each teacher was asked about.
        own_written, transfer_written: whether the teacher wrote them itself.
        steps: optimizer steps. first_loss, last_loss: mean loss over the first and the last tenth of them, in nats.
        before: the global model on the evaluation data. restored: the student before training. after: the result. All
            None without evaluation data.
        seconds: wall time of the steps.
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


def consolidate(
    source: str | Path, trained: str | Path, options: ConsolidateOptions, *, progress: Progress = SILENT
) -> ConsolidateResult:
    """Put the owner's model and what clients taught together, by training the restored model to agree with both.

    Args:
        source: the global model. trained: the server model that the job ended with.
        options: see `ConsolidateOptions`.
        progress: told of each stage.

    Raises:
        InputError: models, key and options do not fit together. DataError: the data cannot be used. Nothing was written
            then.

    Example:
        >>> consolidate("global/", "server-9/", "final/", key="job.key", own_data="own.jsonl").last_loss
    """
    given = {name.replace("_", "-"): getattr(options, name) for name in ("key", "eval_data", *_FILES)}
    keep_outside(Path(options.out), **given)
    with ArtifactWriter(Path(options.out), force=options.force, hashed=False) as writer, quiet(), memory_errors():
        work = _Consolidation.of(source, trained, options, progress)
        return work.run(writer)


@dataclass(frozen=True, slots=True)
class _Consolidation:
    """Everything that is open while a model is consolidated.

    Args:
        tables: the owner's data, transfer texts and evaluation data, as far as they are given.
    """

    inputs: RestoreInputs
    options: ConsolidateOptions
    tables: tuple[Table | None, Table | None, Table | None]
    device: torch.device
    progress: Progress

    @classmethod
    def of(
        cls, source: str | Path, trained: str | Path, options: ConsolidateOptions, progress: Progress
    ) -> _Consolidation:
        """Open models and data."""
        device = choose_device(options.device)
        own, transfer, dev = (
            read_table(path) if path is not None else None
            for path in (options.own_data, options.transfer_data, options.eval_data)
        )
        restore = MergeOptions(
            options.out, key=options.key, restore=trained, public_base=options.public_base, blend=options.blend
        )
        inputs = open_restore_inputs(source, trained, restore)
        _check_task(inputs.whole.checkpoint)
        return cls(inputs, options, (own, transfer, dev), device, progress)

    def run(self, writer: ArtifactWriter) -> ConsolidateResult:
        """Ask the teachers, train the student, write it."""
        own, transfer, dev = self.tables
        before, first = self._lesson(self.inputs.whole.checkpoint, own, 1.0, dev)
        _, second = self._lesson(self.inputs.server.checkpoint, transfer, self.options.transfer_weight, None)
        lessons = Distillation([first, second])
        states = self._states()
        with states.opened() if states is not None else nullcontext():
            student = self._student()
            encoder = Encoder.of(student, self.options.max_length)
            restored = self._measure(student, encoder, dev)
            around = Surroundings(backward=lessons.backward, states=states)
            trainable = VisibleParameters(student.model, {})
            trained = train(
                student.model, lessons.examples, trainable, self.options.recipe, encoder.padding, self.progress, around
            )
            after = self._measure(student, encoder, dev)
            path = self._write(writer, student.model)
            if states is not None:
                states.remove()
        return self._result(path, (first, second), trained, (before, restored, after))

    def _result(
        self,
        path: str,
        lessons: tuple[Lesson, Lesson],
        trained: TrainingSummary,
        measured: tuple[Evaluation | None, Evaluation | None, Evaluation | None],
    ) -> ConsolidateResult:
        own, transfer, _ = self.tables
        return ConsolidateResult(
            path=path,
            blend=self.options.blend,
            transfer_weight=self.options.transfer_weight,
            own_texts=len(lessons[0].said),
            transfer_texts=len(lessons[1].said),
            own_written=own is None,
            transfer_written=transfer is None,
            steps=trained.steps,
            first_loss=trained.first_loss,
            last_loss=trained.last_loss,
            before=measured[0],
            restored=measured[1],
            after=measured[2],
            seconds=trained.seconds,
        )

    def _lesson(
        self, checkpoint: Any, table: Table | None, weight: float, dev: Table | None
    ) -> tuple[Evaluation | None, Lesson]:
        """What one teacher says about its texts; it is in memory only as long as this takes."""
        loaded = load_model(checkpoint)
        encoder = Encoder.of(loaded, self.options.max_length)
        loaded.model.to(self.device).eval()
        measured = self._measure(loaded, encoder, dev)
        if table is not None:
            examples = self._sample(encoder.encode(_unlabelled(table, loaded), self.progress))
        else:
            examples = self._written(loaded, encoder)
        twice = 2 * self.options.batch_size
        return measured, Lesson(examples, listen(loaded.model, examples, twice, encoder.padding, self.progress), weight)

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
        if loaded.task != "causal-lm":
            flag = "--own-data" if self.tables[0] is None else "--transfer-data"
            raise InputError(f"a {loaded.task} model writes no texts", where=flag, hint="give texts, labels or not")
        starts = self._starts(loaded, encoder)
        length = min(self.options.written_length, encoder.max_length)
        rows: list[list[int]] = []
        self.progress.start("writing texts", self.options.written_examples, "texts")
        with repeatable(self.device, self.options.seed), torch.inference_mode():
            for first in range(0, self.options.written_examples, self.options.batch_size):
                count = min(self.options.batch_size, self.options.written_examples - first)
                begun = torch.tensor([starts[(first + n) % len(starts)] for n in range(count)], device=self.device)
                rows += _continued(loaded.model, begun, length).tolist()
                self.progress.advance(count)
        self.progress.finish()
        features = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
        kept = [{name: value for name, value in one.items() if name in loaded.inputs} for one in features]
        return Examples("causal-lm", kept, [[IGNORED, *row[1:]] for row in rows])

    def _starts(self, loaded: Loaded, encoder: Encoder) -> list[list[int]]:
        """The first tokens of the given texts, a special one and the next; without texts any tokens."""
        table = self.tables[0] or self.tables[1]
        special = set(loaded.tokenizer.all_special_ids)
        if table is None:
            generator = torch.Generator().manual_seed(self.options.seed % 2**63)
            ids = torch.randint(loaded.vocabulary, (self.options.written_examples,), generator=generator).tolist()
            return [[token] for token in ids if token not in special] or [[0]]
        texts = [feature["input_ids"] for feature in encoder.encode(table, SILENT).features]
        leads = sum(ids[0] in special for ids in texts) * 2 > len(texts)
        return [ids[: 2 if leads else 1] for ids in texts if len(ids) > 1 and (ids[0] in special) == leads]

    def _student(self) -> Loaded:
        """The restored model, in fp32."""
        sink = InMemorySink(tensor_specs(self.inputs.tasks, None))
        restore_into(sink, None, self.inputs, self.options.blend, self.progress)
        dense = {}
        for name, spec in sink.specs.items():
            tensor = from_bytes(sink.bytes.pop(name), spec.dtype, spec.shape)
            dense[name] = tensor.float() if tensor.is_floating_point() else tensor
        loaded = load_model(self.inputs.whole.checkpoint, dense=dense)
        loaded.model.to(self.device)
        return loaded

    def _measure(self, loaded: Loaded, encoder: Encoder, table: Table | None) -> Evaluation | None:
        if table is None:
            return None
        examples, twice = encoder.encode(table, SILENT), 2 * self.options.batch_size
        return score(loaded.model, examples, batch_size=twice, padding=encoder.padding, progress=self.progress)

    def _states(self) -> StateFolder | None:
        """Where the states of the training are kept."""
        options = self.options
        if options.save_every is None:
            return None
        facts: dict[str, Any] = {
            "--" + field.name.replace("_", "-"): getattr(options, field.name)
            for field in fields(options)
            if field.name not in _NOT_BINDING | {*_FILES, "public_base"}
        }
        for name in _FILES:
            path = getattr(options, name)
            facts["--" + name.replace("_", "-")] = file_digest(Path(path)) if path is not None else None
        for name, model in (("GLOBAL", self.inputs.whole), ("SERVER", self.inputs.server)):
            files = {Path(entry.file) for entry in model.checkpoint.entries.values()}
            facts[name] = {file.name: file_digest(file) for file in sorted(files)}
        return StateFolder(Path(options.out), facts, options.save_every)

    def _write(self, writer: ArtifactWriter, model: Any) -> str:
        """Write the student in the dtypes of the global model."""
        inputs, whole = self.inputs, self.inputs.whole
        trained = stored_tensors(model, whole.tensors)
        limit = self.options.max_shard_bytes
        with model_sinks(writer, whole, inputs.tasks, limit, with_residual=False) as (sink, _):
            for task in inputs.tasks:
                if task.tensor.dtype in WEIGHT_DTYPES and task.name in trained:
                    sink.write(task.name, 0, _bits(task.name, trained[task.name], task.tensor.dtype))
                else:  # positions, or a buffer that the architecture does not use
                    sink.write(task.name, 0, whole.checkpoint.read(task.name).reshape(-1).view(np.uint8))
        return publish(writer, whole, merged_manifest(whole, inputs.job))


def _check_task(checkpoint: Checkpoint) -> None:
    """Refuse a model whose answers are no probabilities of classes or next tokens. Raises InputError."""
    task, architecture = task_of(checkpoint.config, checkpoint.path)
    if task not in TAUGHT_TASKS:
        what = f"{architecture} is a model for {task}, which cannot be consolidated"
        raise InputError(what, where=checkpoint.path, hint="use fedqsn merge --restore")


def _unlabelled(table: Table, loaded: Loaded) -> Table:
    """A table for a classifier whose labels do not count; texts without any are enough."""
    if loaded.task != "classification":
        return table
    return replace(table, columns=table.columns | {"label": [0] * table.rows})


def _continued(model: Any, begun: Tensor, length: int) -> Tensor:
    """Texts of `length` tokens that a model writes, sampled from its own distribution, int64 [texts, length]."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=length - begun.shape[1],
        max_new_tokens=length - begun.shape[1],
        pad_token_id=0,
        eos_token_id=None,
    )
    written: Tensor = model.generate(begun, attention_mask=torch.ones_like(begun), generation_config=config)
    return written


def _bits(name: str, tensor: Tensor, dtype: str) -> Array:
    """A trained tensor as it is stored, rounded once. Raises InputError where it is not finite."""
    rounded = tensor.detach().cpu().to(TORCH_DTYPES[dtype]).contiguous().reshape(-1)
    if not bool(rounded.isfinite().all()):
        raise InputError("the result is not finite", where=name, hint="lower --lr")
    return rounded.numpy() if DTYPES[dtype].nbytes == 4 else rounded.view(torch.int16).numpy().view(np.uint16)
