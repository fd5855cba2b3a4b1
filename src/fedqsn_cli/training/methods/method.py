"""What the two methods of `client-train` have in common: weights (`full.py`), or adapters (`lora.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from fedqsn_cli.checkpoint import ArtifactWriter
from fedqsn_cli.models.torch_model import Loaded
from fedqsn_cli.options import TrainOptions
from fedqsn_cli.training.steps.compact import Trainable


class Method(Protocol):
    """A loaded proxy, what is trained of it, and how that is sent back."""

    loaded: Loaded

    def trainable(self) -> Trainable:
        """Bring the model to where and how it is trained; called once, before anything is computed."""

    @property
    def tokens_at_once(self) -> int | None:
        """How many tokens of a batch go through the model together; None for all."""

    @property
    def numbers_sent(self) -> int:
        """Numbers in the update."""

    def bytes_sent(self, options: TrainOptions) -> int:
        """Bytes of these numbers."""

    def write(self, writer: ArtifactWriter, options: TrainOptions) -> dict[str, Any]:
        """Write the update's tensors. Returns fields of update.json that only this method has."""

    def prepare(self, out: Path, digest: str) -> None:
        """Write down what the next round needs of this one, before the update is there: a kill may come between.

        Args:
            out: where the update will be. digest: SHA-256 of its update.json.
        """

    def sent(self) -> None:
        """Remember, once the update is there, what the next round needs of this one."""
