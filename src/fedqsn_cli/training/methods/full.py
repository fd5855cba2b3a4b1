"""`--method full`: the visible weights themselves, in fp32 or bf16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedqsn_cli.artifacts.manifests import ProxyManifest
from fedqsn_cli.checkpoint import ArtifactWriter, Checkpoint
from fedqsn_cli.linux import return_freed_memory
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.dense import DenseTensors
from fedqsn_cli.models.torch_model import Loaded, load_model
from fedqsn_cli.options import TrainOptions
from fedqsn_cli.training.steps.compact import VisibleParameters
from fedqsn_cli.training.steps.precision import weights_dtype
from fedqsn_cli.training.steps.visible import check_round_trip, parameter_masks, read_visible, rescale_factors
from fedqsn_cli.training.updates import update
from fedqsn_cli.training.updates.error_feedback import ErrorFeedback, read_errors, require_place
from fedqsn_cli.training.updates.privacy import update_noise

_NUMBERS_AT_ONCE = 256 * 768  # of a hidden state: fewer make matrix products slow, more take memory


@dataclass(slots=True)
class FullMethod:
    """A `Method`.

    Args:
        received: the proxy's tensors. visible: its visible units, empty where all are trained. scales: s by tensor.
        feedback: what earlier rounds left over.
        masks: which elements of the model's parameters are visible; given up by `trainable`.
        dtype, device: of the weights while they are trained.
    """

    loaded: Loaded
    received: DenseTensors
    visible: dict[str, UnitMask]
    scales: dict[str, float]
    feedback: ErrorFeedback | None
    masks: dict[str, torch.Tensor]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, manifest: ProxyManifest, options: TrainOptions, device: torch.device
    ) -> FullMethod:
        """Load a verified proxy, whose checkpoint stays open. Raises InputError, FormatError."""
        folder = checkpoint.path
        dense = dict(DenseTensors(checkpoint))
        loaded = load_model(checkpoint, dense=dense)
        visible = read_visible(folder, manifest, {name: tuple(tensor.shape) for name, tensor in dense.items()})
        check_round_trip(loaded.model, dense, visible, folder)
        scales = rescale_factors(manifest, visible)
        if manifest.train == "all":
            visible = {}  # every unit moves and goes back
        masks = parameter_masks(loaded.model, dense, visible, folder)
        received = DenseTensors(checkpoint)
        feedback = _feedback(options, manifest, received, visible, scales)
        return cls(loaded, received, visible, scales, feedback, masks, weights_dtype(options.precision), device)

    def trainable(self) -> VisibleParameters:
        """The visible parameters. Nothing else may hold the model's tensors: they would stay in memory."""
        model = self.loaded.model
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.dtype)
        trainable = VisibleParameters(model.to(self.device), self.masks)
        self.masks.clear()
        return_freed_memory()
        return trainable

    @property
    def tokens_at_once(self) -> int | None:
        """On a CPU, so many that a hidden state of them has as many numbers in models of any width."""
        width = int(self.loaded.model.get_input_embeddings().weight.shape[1])
        return max(1, _NUMBERS_AT_ONCE // width) if self.device.type == "cpu" else None

    @property
    def numbers_sent(self) -> int:
        """Numbers in the update."""
        return update.parameters(self.received.layout, self.visible)

    def bytes_sent(self, options: TrainOptions) -> int:
        """Bytes of the update's tensors."""
        _, specs = update.stored_as(self.received.layout, self.visible, options.update_format)
        return sum(spec.nbytes for spec in specs)

    def write(self, writer: ArtifactWriter, options: TrainOptions) -> dict[str, Any]:
        """Write update.safetensors."""
        return_freed_memory()  # of gradients and the optimizer
        differences = update.Differences.of(self.loaded.model, self.received, self.visible)
        noise = update_noise(options, differences, self.scales)
        update.write_tensors(writer, differences, options.update_format, noise, self.feedback)
        return {}

    def prepare(self, out: Path, digest: str) -> None:
        """Write down what the format lost."""
        if self.feedback is not None:
            self.feedback.prepare(out, digest)

    def sent(self) -> None:
        """Keep what the format lost."""
        if self.feedback is not None:
            self.feedback.replace()


def _feedback(
    options: TrainOptions,
    manifest: ProxyManifest,
    received: DenseTensors,
    visible: Mapping[str, UnitMask],
    scales: Mapping[str, float],
) -> ErrorFeedback | None:
    """What earlier rounds left over; None where nothing is kept. Raises InputError, FormatError."""
    if options.residual is None:
        return None
    path = Path(options.residual)
    require_place(path)
    layout = received.layout
    shapes = {name: tuple(layout[name].shape) for name in update.floats(layout)}
    errors = read_errors(path, manifest.job, manifest.proxy_id, shapes)
    return ErrorFeedback(path, manifest.job, manifest.proxy_id, errors, visible, scales)
