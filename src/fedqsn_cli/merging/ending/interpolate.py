"""A model on the straight line between two sets of weights, evaluated at any point of it.

    W(x) = W(0) + x (W(1) − W(0))        in fp32; a 16-bit model is then rounded as its file would be

Both ends go through transformers once. What it renames, fuses or ties is linear in the weights, so that a point of the
line in the model's own layout is the model of that point's checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.dtypes import SHORT_DTYPES, WEIGHT_DTYPES
from fedqsn_cli.errors import InputError
from fedqsn_cli.merging.ending.line_search import Point
from fedqsn_cli.merging.step.chunks import Weights
from fedqsn_cli.models.dense import TORCH_DTYPES, from_bytes, rescale_factors
from fedqsn_cli.models.messages import quiet
from fedqsn_cli.models.torch_model import build_model, choose_device, load_model, memory_errors
from fedqsn_cli.progress import Progress, Silent
from fedqsn_cli.training.data.data_files import DataFile, open_data
from fedqsn_cli.training.data.encoder import Encoder
from fedqsn_cli.training.scoring.scoring import score


@dataclass(frozen=True, slots=True)
class DevelopmentSet:
    """The owner's development data, and how to compute with it."""

    data: DataFile
    batch_size: int
    max_length: int
    device: torch.device

    @classmethod
    def of(cls, data: str | Path, batch_size: int, max_length: int, device: str) -> DevelopmentSet:
        """Read and check everything that needs no model. Raises InputError."""
        return cls(open_data(data), batch_size, max_length, choose_device(device))


class _MovingTensor(NamedTuple):
    """A tensor of the model that differs between the ends: where it goes, and both ends on the CPU."""

    target: Tensor
    start: Tensor
    end: Tensor


class Interpolation:
    """The model between two ends, in memory once as a whole and twice more where the ends differ.

    Args:
        checkpoint: where the model's config, tokenizer and scale come from.
        start, end: W(0) and W(1); their memory is given up on the way.

    Raises:
        InputError: the model cannot be built, or the data does not fit it.
    """

    def __init__(
        self, checkpoint: Checkpoint, start: Weights, end: Weights, development: DevelopmentSet, progress: Progress
    ) -> None:
        kinds = {spec.dtype for spec in start.stored.specs.values() if spec.dtype in WEIGHT_DTYPES}
        short = kinds.pop() if len(kinds) == 1 and kinds <= SHORT_DTYPES else None
        self._stored = None if short is None else TORCH_DTYPES[short]
        self._development = development
        with quiet(), memory_errors():
            factors = rescale_factors(checkpoint)
            loaded = load_model(checkpoint, dense=_dense(start, factors))
            self._encoder = Encoder.of(loaded, development.max_length)
            self._examples = self._encoder.encode(development.data, progress)
            far = build_model(checkpoint.config or {}, _dense(end, factors), where=checkpoint.path)
            starts = _floats(loaded.model)
            pairs = {name: (tensor.clone(), ends) for name, (tensor, ends) in _differing(starts, _floats(far)).items()}
            self._model = loaded.model.to(development.device)
            targets = _floats(self._model)
            self._moves = [_MovingTensor(targets[name], *pair) for name, pair in pairs.items()]

    @property
    def examples(self) -> int:
        """How many examples a loss is measured on."""
        return len(self._examples)

    def measure(self, at: float) -> Point:
        """Go to W(at) and measure the model there."""
        with torch.no_grad():
            for move in self._moves:
                move.target.copy_(self._point(move, at))
        with quiet(), memory_errors():
            try:
                evaluation = score(
                    self._model,
                    self._examples,
                    batch_size=self._development.batch_size,
                    padding=self._encoder.padding,
                    progress=Silent(),
                )
            except InputError:  # its outputs are not numbers: worse than any loss
                return Point(at, math.inf, None, None)
        return Point(at, evaluation.loss, evaluation.accuracy, evaluation.perplexity)

    def _point(self, move: _MovingTensor, at: float) -> Tensor:
        """One tensor at W(at); the ends are exact, and at 0 the other end may even be infinite."""
        value = {0.0: move.start, 1.0: move.end}.get(at)
        if value is None:
            value = torch.lerp(move.start, move.end, at)
        return value if self._stored is None else value.to(self._stored).float()


def _dense(weights: Weights, factors: Mapping[str, np.float32]) -> dict[str, Tensor]:
    """The tensors as a model computes with them: fp32, with their residual, scaled. Empties `weights`."""
    dense = {}
    for name, spec in weights.stored.specs.items():
        tensor = from_bytes(weights.stored.bytes.pop(name), spec.dtype, spec.shape)
        if tensor.is_floating_point():
            tensor = tensor.float()
            if name in weights.residual.bytes:
                tensor += from_bytes(weights.residual.bytes.pop(name), "BF16", spec.shape).float()
            if name in factors:
                tensor *= float(factors[name])
        dense[name] = tensor
    return dense


def _floats(model: torch.nn.Module) -> dict[str, Tensor]:
    """Floating-point tensors of a model, each memory once: tied parameters are one."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            found.setdefault(tensor.data_ptr(), (name, tensor))
    return dict(found.values())


def _differing(starts: Mapping[str, Tensor], ends: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (start, ends[name]) for name, start in starts.items() if not torch.equal(start, ends[name])}
