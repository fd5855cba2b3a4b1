"""What a consolidation trains and measures students on: both teachers' soft targets, and evaluation data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.errors import InputError
from fedqsn_cli.merging.ending.restore import RestoreInputs
from fedqsn_cli.merging.ending.written_texts import written_texts
from fedqsn_cli.models.torch_model import Loaded, load_model
from fedqsn_cli.options import ConsolidateOptions
from fedqsn_cli.progress import SILENT, Progress
from fedqsn_cli.training.data.data_files import DataFile, open_data
from fedqsn_cli.training.data.encoder import Encoder
from fedqsn_cli.training.data.tables import Rows
from fedqsn_cli.training.scoring.scoring import Evaluation, score
from fedqsn_cli.training.scoring.teachers import Distillation, Lesson, Unlabelled, listen
from fedqsn_cli.training.steps.batching import Examples


@dataclass(frozen=True, slots=True)
class ConsolidationFiles:
    """The owner's data and transfer texts, and what is measured on, as far as they are given."""

    own: DataFile | None
    transfer: DataFile | None
    eval: DataFile | None
    own_eval: DataFile | None

    @classmethod
    def of(cls, options: ConsolidateOptions) -> ConsolidationFiles:
        """Look through all of them. Raises DataError, InputError: one cannot be used."""
        paths = (options.own_data, options.transfer_data, options.eval_data, options.own_eval_data)
        return cls(*(open_data(path) if path is not None else None for path in paths))


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Examples that models are measured on, encoded once: students have the global model's tokenizer.

    Args:
        before: the global model on them.
    """

    examples: Examples
    before: Evaluation


@dataclass(frozen=True, slots=True)
class DistillationData:
    """Examples with the soft targets of the owner's model and of the server model, and what is measured on."""

    own: Lesson
    transfer: Lesson
    eval: EvaluationSet | None
    own_eval: EvaluationSet | None

    @property
    def before(self) -> Evaluation | None:
        """The global model on the evaluation data."""
        return self.eval.before if self.eval is not None else None

    def with_weight(self, weight: float) -> Distillation:
        """The loss of a student, for a weight of the transfer."""
        return Distillation([self.own, replace(self.transfer, weight=weight)])

    def divided(self) -> tuple[DistillationData, DistillationData]:
        """What students are trained with, and what is kept out to compare learning rates by."""
        (own, own_out), (transfer, transfer_out) = self.own.divided(), self.transfer.divided()
        return replace(self, own=own, transfer=transfer), replace(self, own=own_out, transfer=transfer_out)


@dataclass(frozen=True, slots=True)
class Teachers:
    """Asks both teachers, of which one is in memory at a time."""

    files: ConsolidationFiles
    options: ConsolidateOptions
    device: torch.device
    progress: Progress

    def ask(self, inputs: RestoreInputs) -> DistillationData:
        """The soft targets of both.

        Raises:
            InputError: texts are missing, and the model writes none.
        """
        files = self.files
        own, evaluation = self._ask(inputs.whole.checkpoint, files.own, (files.eval, files.own_eval))
        transfer, _ = self._ask(inputs.server.checkpoint, files.transfer, ())
        return DistillationData(own, transfer, *evaluation)

    def _ask(
        self, checkpoint: Checkpoint, data: DataFile | None, measured: Sequence[DataFile | None]
    ) -> tuple[Lesson, list[EvaluationSet | None]]:
        """The soft targets of one teacher on its texts, and its evaluation on others."""
        loaded = load_model(checkpoint)
        encoder = Encoder.of(loaded, self.options.max_length)
        loaded.model.to(self.device).eval()
        evaluation = [self._evaluated(loaded, encoder, one) if one is not None else None for one in measured]
        if data is not None:
            texts: Rows = Unlabelled(data) if loaded.task == "classification" else data
            examples = self._sample(encoder.encode(texts, self.progress))
        else:
            examples = self._written(loaded, encoder)
        twice = 2 * self.options.batch_size
        targets = listen(loaded.model, examples, twice, encoder.padding, self.progress)
        return Lesson(examples, targets, 1.0), evaluation

    def _evaluated(self, loaded: Loaded, encoder: Encoder, data: DataFile) -> EvaluationSet:
        """Encode data for the global model, and measure it."""
        examples = encoder.encode(data, SILENT)
        return EvaluationSet(examples, evaluate(loaded, encoder, examples, self.options, self.progress))

    def _sample(self, examples: Examples) -> Examples:
        """As many examples as there may be in all batches; the teacher need not be asked about more."""
        most = self.options.steps * self.options.batch_size
        if len(examples) <= most:
            return examples
        generator = torch.Generator().manual_seed(self.options.seed % 2**63)
        return examples.some(sorted(torch.randperm(len(examples), generator=generator)[:most].tolist()))

    def _written(self, loaded: Loaded, encoder: Encoder) -> Examples:
        """Texts that a language model writes itself, from the first tokens of texts that are given."""
        own, transfer = self.files.own, self.files.transfer
        if loaded.task != "causal-lm":
            flag = "--own-data" if own is None else "--transfer-data"
            raise InputError(f"a {loaded.task} model writes no texts", where=flag, hint="give texts, labels or not")
        return written_texts(loaded, encoder, own or transfer, self.options, self.progress)


def evaluate(
    loaded: Loaded, encoder: Encoder, examples: Examples, options: ConsolidateOptions, progress: Progress
) -> Evaluation:
    """Loss and metrics of a model on examples; without gradients twice as many fit into a batch."""
    twice = 2 * options.batch_size
    return score(loaded.model, examples, batch_size=twice, padding=encoder.padding, progress=progress)
