"""Plain training of whole models, for those who do it without the product: owner, lone clients, attackers, rivals.

The loop is the product's own (AdamW, linear warm-up and decay), so that methods do not differ in how they train.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.settings import Task
from benchmarks.study.worlds import Score

MANY = 10_000.0  # epochs: the number of steps decides


def rate(task: Task, share: float) -> float:
    """A client's learning rate: the fewer parameters it may move, the farther they go. One rule for all methods.

    Args:
        share: of all parameters that the client trains.
    """
    return task.lr / math.sqrt(max(share, 1e-4))


@dataclass
class Trainee:
    """A model that computes, and how texts become its inputs."""

    model: Any
    tokenizer: Any
    encoder: Any

    @classmethod
    def open(cls, source: Path, task: Task, state: Mapping[str, Any] | None = None) -> Trainee:
        """The model of a checkpoint or proxy, with other weights if they are given."""
        from fedqsn_cli.checkpoint import Checkpoint
        from fedqsn_cli.models.torch_model import load_model
        from fedqsn_cli.training.data.encoder import Encoder

        with Checkpoint.open(source) as checkpoint:
            loaded = load_model(checkpoint, dense=state)
        return cls(loaded.model, loaded.tokenizer, Encoder.of(loaded, task.max_length))

    def examples(self, data: Path, most: int | None = None) -> Any:
        """The first examples of a file, or all."""
        from fedqsn_cli.progress import Silent
        from fedqsn_cli.training.data.data_files import open_data
        from fedqsn_cli.training.steps.batching import Examples

        found = self.encoder.encode(open_data(data), Silent())
        return found if most is None else Examples(found.task, found.features[:most], found.targets[:most])

    def train(
        self, data: Path, *, steps: int, lr: float, seed: int, batch_size: int = 16, most: int | None = None
    ) -> int:
        """Train what is not frozen; returns how many different examples took part."""
        from fedqsn_cli.options import RecipeOptions
        from fedqsn_cli.progress import Silent
        from fedqsn_cli.training.steps.compact import VisibleParameters
        from fedqsn_cli.training.steps.loop import train

        recipe = RecipeOptions(epochs=MANY, max_steps=steps, lr=lr, batch_size=batch_size, seed=seed)
        trainable = VisibleParameters(self.model, {})
        done = train(self.model, self.examples(data, most), trainable, recipe, self.encoder.padding, Silent())
        return done.examples

    def score(self, data: Path) -> Score:
        """Loss and accuracy."""
        from fedqsn_cli.progress import Silent
        from fedqsn_cli.training.scoring.scoring import score

        found = score(self.model, self.examples(data), batch_size=32, padding=self.encoder.padding, progress=Silent())
        return {"loss": found.loss, "accuracy": found.accuracy}


def dense_state(source: Path) -> dict[str, Any]:
    """All tensors of a checkpoint or proxy, under their stored names, in memory of their own."""
    from fedqsn_cli.checkpoint import Checkpoint
    from fedqsn_cli.models.dense import load_dense

    with Checkpoint.open(source) as checkpoint:
        return {name: tensor.clone() for name, tensor in load_dense(checkpoint).items()}


def write_state(out: Path, state: Mapping[str, Any], like: Path, layers: int | None = None) -> None:
    """A checkpoint of these tensors, with configuration and tokenizer of another one.

    Args:
        layers: how many it has, where that is not as many as the other one.
    """
    import json
    import shutil

    from safetensors.torch import save_file

    out.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    for file in sorted(like.iterdir()):
        if file.suffix in {".json", ".txt"} and file.name not in {"fedqsn.json", "config.json"}:
            shutil.copyfile(file, out / file.name)
    config = json.loads((like / "config.json").read_text())
    if layers is not None:
        config["num_hidden_layers"] = layers
        config.pop("layer_types", None)
    (out / "config.json").write_text(json.dumps(config))


def mean_delta(deltas: list[dict[str, Any]], weights: list[int]) -> dict[str, Any]:
    """The average of several sets of differences, by numbers of examples."""
    names = dict.fromkeys(itertools.chain.from_iterable(deltas))
    total = sum(weights)
    return {
        name: sum(delta[name] * (weight / total) for delta, weight in zip(deltas, weights, strict=True))
        for name in names
    }
