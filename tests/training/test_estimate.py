"""What `--dry-run` says: the memory is counted in tensors that are alive, the time by steps of known duration."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli.errors import InputError
from fedqsn_cli.options import RecipeOptions, TrainOptions
from fedqsn_cli.training.client import estimate_training
from fedqsn_cli.training.steps.estimate import Estimate, Sizes
from fedqsn_cli.training.steps.optimizers import Optimizers
from fedqsn_cli.training.steps.schedule import windows
from support.training_jobs import make_proxy, plain_texts, small_model

SHORT_AND_ONE_LONG = [5] * 40 + [90] + [7] * 40
LARGER = {"hidden_size": 256, "intermediate_size": 512}  # small tensors, such as a batch, are not estimated


def held_now() -> int:
    """Bytes of all tensors that are alive, gradients included."""
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    tensors += [one.grad for one in tensors if one.is_leaf and one.grad is not None]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


@pytest.mark.parametrize(
    ("proxy", "options"),
    [
        ({}, {}),
        ({}, {"optimizer": "sgd"}),
        ({}, {"precision": "bf16-weights"}),
        ({"format": "nf4"}, {"method": "lora", "lora_r": 4}),
        ({"format": "nf4", "double_quant": True}, {"method": "lora", "lora_r": 4}),
    ],
    ids=["full", "sgd", "bf16-weights", "lora", "lora-double"],
)
def test_the_memory_that_is_held_is_what_the_tensors_of_a_step_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: dict[str, Any], options: dict[str, Any]
) -> None:
    model = make_proxy(small_model(tmp_path / "model", "llama", **LARGER), tmp_path / "proxy", **proxy)
    held, step = list[int](), Optimizers.step

    def counting(self: Optimizers, rate: float) -> None:
        held.append(held_now() - before)
        step(self, rate)

    monkeypatch.setattr(Optimizers, "step", counting)
    gc.collect()
    before = held_now()
    estimate = estimate_of(model, plain_texts(tmp_path / "data.jsonl"), **options)
    expected = estimate.weights_bytes + estimate.gradients_bytes + estimate.optimizer_bytes
    assert held[-1] == pytest.approx(expected, rel=0.04)


def estimate_of(proxy: Path, data: Path, **options: Any) -> Estimate:
    given = {"precision": "fp32", "device": "cpu", "batch_size": 4} | options
    return estimate_training(proxy, TrainOptions(out=proxy.parent / "none", data=data, **given))


def test_several_processes_are_not_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--dry-run: is for one process; start it without a launcher"):
        estimate_of(tmp_path / "proxy", tmp_path / "data.jsonl")


def test_the_batch_that_takes_most_memory_is_tried_once_the_optimizer_has_its_state() -> None:
    recipe = RecipeOptions(batch_size=4, epochs=2.0)
    tried = Sizes.of(recipe, SHORT_AND_ONE_LONG).tried()
    steps = list(windows(recipe, SHORT_AND_ONE_LONG))
    assert [40 in steps[number][0] for number in tried] == [False, True, False, False]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    accumulation=st.integers(1, 3),
    fixed=st.floats(0, 1),
    rate=st.floats(0, 1),
)
def test_time_that_grows_evenly_with_the_size_of_a_step_is_estimated_exactly(
    lengths: list[int], accumulation: int, fixed: float, rate: float
) -> None:
    recipe = RecipeOptions(batch_size=3, epochs=2.0, gradient_accumulation=accumulation)
    sizes = Sizes.of(recipe, lengths)
    tried = sizes.tried()
    expected = sum(fixed + rate * size for size in sizes.steps)
    assert sizes.tokens == 2 * sum(lengths) or accumulation > 1
    assert sizes.seconds(tried, [fixed + rate * sizes.steps[step] for step in tried]) == pytest.approx(expected)
