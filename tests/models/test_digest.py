"""The content digest of a model: its definition, and that it depends on nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from fedqsn_cli.kernels.digests import Algorithm, algorithm_of
from fedqsn_cli.kernels.hash_threads import HashThreads
from fedqsn_cli.models.digest import ModelHash
from fedqsn_cli.models.model import open_model
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from support.models import make_model


@pytest.fixture(scope="module")
def tasks(module_folder: Path) -> list[TensorTask]:
    return tensor_tasks(open_model(str(make_model(module_folder / "model", "llama"))), None, lambda tensor: None)


def values(task: TensorTask) -> np.ndarray[Any, Any]:
    return np.full(task.tensor.shape, len(task.name), np.float32)


def digest(tasks: list[TensorTask], algorithm: Algorithm, pieces: int = 1) -> str:
    with HashThreads() as hashing:
        model = ModelHash(hashing.queue(), algorithm)
        for task in tasks:
            for piece in np.array_split(values(task).reshape(-1), pieces):
                model.update(task.name, piece)
        return model.digest(tasks)


@pytest.mark.parametrize(
    ("algorithm", "make", "prefix"), [("blake3", blake3, "blake3:"), ("sha256", hashlib.sha256, "")]
)
def test_it_is_the_digest_of_names_types_shapes_and_digests(
    algorithm: Algorithm, make: Callable[[bytes], Any], prefix: str, tasks: list[TensorTask]
) -> None:
    lines = [
        json.dumps(
            [task.name, task.tensor.dtype, list(task.tensor.shape), make(values(task).tobytes()).hexdigest()],
            separators=(",", ":"),
        )
        for task in sorted(tasks, key=lambda task: task.name)
    ]
    assert digest(tasks, algorithm) == prefix + make("\n".join(lines).encode()).hexdigest()


def test_pieces_and_order_of_tensors_do_not_matter(tasks: list[TensorTask]) -> None:
    assert digest(tasks, "blake3") == digest(tasks[::-1], "blake3", pieces=7)


def test_a_digest_tells_its_algorithm() -> None:
    assert algorithm_of("blake3:" + 64 * "0") == "blake3"
    assert algorithm_of(64 * "0") == "sha256"
    assert algorithm_of(None) == "blake3"
