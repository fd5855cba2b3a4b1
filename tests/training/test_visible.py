"""Visible units: read from a proxy, and found again in the parameters of every kind of model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedqsn_cli.errors import InputError
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.torch_model import build_model, stored_tensors
from fedqsn_cli.training.steps.compact import VisibleParameters
from fedqsn_cli.training.steps.visible import check_round_trip, expanded, parameter_masks
from support.training_jobs import dense_tensors, make_proxy, small_model, visible_units

# Families whose parameters are not what the checkpoint holds: fused, stacked, turned or tied.
TRANSFORMED = [
    ("mixtral", None),
    ("qwen3_moe", None),
    ("gpt_oss", None),
    ("gpt2", None),
    ("t5", "T5ForSequenceClassification"),
    ("bert", "BertForMaskedLM"),
    ("roberta", "RobertaForMaskedLM"),
    ("gemma", None),
    ("albert", None),
    ("gpt_neox", None),
]


@pytest.mark.parametrize("axis", ["neuron", "element"])
@pytest.mark.parametrize(("name", "head"), TRANSFORMED)
def test_only_visible_units_change_when_all_leaves_do(tmp_path: Path, name: str, head: str | None, axis: str) -> None:
    proxy = make_proxy(small_model(tmp_path / "model", name, head=head), tmp_path / "proxy", axis=axis)
    dense, visible = dense_tensors(proxy), visible_units(proxy)
    config = json.loads((proxy / "config.json").read_text())
    model = build_model(config, dense, where=proxy)
    check_round_trip(model, dense, visible, proxy)
    masks = parameter_masks(model, dense, visible, proxy)
    seen = VisibleParameters(model, masks)
    with torch.no_grad(), seen.updating(seen.leaves):
        for leaf in seen.leaves:
            leaf.add_(1.0)
    changed = 0
    for tensor_name, after in stored_tensors(model, dense).items():
        before = dense[tensor_name]
        mask = torch.ones_like(before, dtype=torch.bool)
        if tensor_name in visible:
            mask = expanded(visible[tensor_name], tuple(before.shape))
        assert torch.equal(after, torch.where(mask, before + 1.0, before)), tensor_name
        changed += int(mask.sum())
    assert changed == sum(leaf.numel() for leaf in seen.leaves)


@pytest.mark.parametrize("axis", ["row", "column", "element"])
def test_a_mask_has_the_shape_of_its_tensor(axis: str) -> None:
    view, shape = (2, 3, 4), (2, 3, 4)
    sizes = {"row": 6, "column": 8, "element": 24}
    flags = np.arange(sizes[axis]) % 3 == 0
    mask = UnitMask(axis, view, flags.reshape(2, 4) if axis == "column" else flags)  # type: ignore[arg-type]
    expected = {
        "row": np.broadcast_to(flags.reshape(-1)[:6].reshape(2, 3, 1) if axis == "row" else False, view),
        "column": np.broadcast_to(flags.reshape(-1)[:8].reshape(2, 1, 4) if axis != "row" else False, view),
        "element": flags.reshape(view) if axis == "element" else None,
    }[axis]
    assert np.array_equal(expanded(mask, shape).numpy(), expected)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    """transformers unties such a head, so masks and weights would no longer lie in the same parameters."""
    proxy = make_proxy(small_model(tmp_path / "model", "gpt2"), tmp_path / "proxy")
    dense, visible = dense_tensors(proxy), visible_units(proxy)
    dense["lm_head.weight"] = dense["transformer.wte.weight"] + 1
    visible["lm_head.weight"] = visible["transformer.wte.weight"]
    config = json.loads((proxy / "config.json").read_text())
    model = build_model(config, dense, where=proxy)
    with pytest.raises(InputError, match="lm_head.weight is tied to a tensor that differs"):
        parameter_masks(model, dense, visible, proxy)


def test_a_model_that_gives_other_weights_back_is_refused(tmp_path: Path) -> None:
    proxy = make_proxy(small_model(tmp_path / "model"), tmp_path / "proxy")
    dense, visible = dense_tensors(proxy), visible_units(proxy)
    model = build_model(json.loads((proxy / "config.json").read_text()), dense, where=proxy)
    check_round_trip(model, dense, visible, proxy)
    dense["classifier.weight"] = dense["classifier.weight"] + 1
    with pytest.raises(InputError, match="transformers changes classifier.weight"):
        check_round_trip(model, dense, visible, proxy)
