"""Equal weights under two names must not be masked apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedqsn_cli import mask
from fedqsn_cli.errors import PlanError
from support.families import build


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return Path(build("llama", tmp_path / "llama"))


def rewrite(folder: Path, change: dict[str, np.ndarray]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | change, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_untied_head_equal_to_the_embedding_is_refused_and_nothing_written(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    rewrite(llama, {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    with pytest.raises(PlanError, match="same weights"):
        mask(str(llama), tmp_path / "server", key=tmp_path / "job.key", p1=0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_a_head_that_differs_in_one_weight_in_the_middle_of_nowhere_is_no_twin(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    rewrite(llama, {"lm_head.weight": head})
    mask(str(llama), tmp_path / "server", key=tmp_path / "job.key", p1=0.1)


def test_two_layers_of_zeros_are_no_twins(llama: Path, tmp_path: Path) -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    tensors = load_file(llama / "model.safetensors")
    rewrite(llama, {name: np.zeros_like(tensors[name]) for name in names})
    mask(str(llama), tmp_path / "server", key=tmp_path / "job.key", p1=0.1)


def test_a_copy_of_one_layer_in_another_is_refused(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    rewrite(llama, {"model.layers.1.mlp.up_proj.weight": tensors["model.layers.0.mlp.up_proj.weight"]})
    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.up_proj"):
        mask(str(llama), tmp_path / "server", key=tmp_path / "job.key", p1=0.1)
