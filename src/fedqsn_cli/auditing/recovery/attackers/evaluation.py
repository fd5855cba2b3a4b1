"""The owner's examples, and how good a model is on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fedqsn_cli.auditing.findings import ModelScore
from fedqsn_cli.models.torch_model import Loaded, choose_device
from fedqsn_cli.progress import Progress
from fedqsn_cli.training.data.data_files import open_data
from fedqsn_cli.training.data.encoder import Encoder
from fedqsn_cli.training.data.tasks import TASKS
from fedqsn_cli.training.scoring.scoring import score
from fedqsn_cli.training.steps.batching import Examples


@dataclass(frozen=True)
class Evaluation:
    """The owner's examples, and where models are measured on them."""

    encoder: Encoder
    examples: Examples
    device: torch.device
    progress: Progress

    @classmethod
    def of(cls, data: str | Path, loaded: Loaded, *, max_length: int, device: str, progress: Progress) -> Evaluation:
        """Read the data with the tokenizer of a model."""
        encoder = Encoder.of(loaded, max_length)
        return cls(encoder, encoder.encode(open_data(data), progress), choose_device(device), progress)

    def score(self, name: str, loaded: Loaded) -> ModelScore:
        """Loss and accuracy of a model."""
        model, padding = loaded.model.to(self.device), self.encoder.padding
        result = score(model, self.examples, batch_size=32, padding=padding, progress=self.progress)
        return ModelScore(name, result.loss, result.accuracy)

    def averages(self) -> float:
        """Loss of a model that answers with how often each label, or each token, is right."""
        return TASKS[self.examples.task].constant_loss(self.examples.targets)


def rho(floor: float, attack: float, whole: float) -> float | None:
    """(L_floor - L_attack) / (L_floor - L_global); None where the global model is no better than the floor."""
    return (floor - attack) / (floor - whole) if floor > whole else None
