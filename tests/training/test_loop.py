"""The training loop against a plain one, and what it promises about hidden units."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedqsn_cli.errors import InputError
from fedqsn_cli.options import RecipeOptions
from fedqsn_cli.progress import SILENT, Silent
from fedqsn_cli.training.steps import loop
from fedqsn_cli.training.steps.batching import IGNORED, Examples, Padding, collate, loss_sum, shuffled
from fedqsn_cli.training.steps.compact import VisibleParameters
from fedqsn_cli.training.steps.loop import TrainingSummary
from fedqsn_cli.training.steps.memory import MemoryPlan
from fedqsn_cli.training.steps.optimizers import Optimizers, make_optimizer
from fedqsn_cli.training.steps.precision import choose_precision
from fedqsn_cli.training.steps.schedule import learning_rate, step_count
from support.families import make_config

PADDING = Padding(0)


def new_model(name: str = "bert", **options: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = make_config(name, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options)
    return getattr(transformers, config.architectures[0])(config)


def some_examples(count: int = 12) -> Examples:
    features = [{"input_ids": [5 + row] * (2 + row % 3), "attention_mask": [1] * (2 + row % 3)} for row in range(count)]
    return Examples("classification", features, [row % 5 for row in range(count)])


def some_masks(model: Any) -> dict[str, Tensor]:
    """Hidden rows of linear layers, hidden columns of embeddings, hidden elements of the pooler."""
    generator = torch.Generator().manual_seed(3)
    masks = {}
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name or parameter.ndim != 2:
            continue
        sizes = parameter.shape if "pooler" in name else (1, parameter.shape[1])
        sizes = sizes if "embeddings" in name or "pooler" in name else (parameter.shape[0], 1)
        masks[name] = (torch.rand(sizes, generator=generator) < 0.7).expand(parameter.shape)
    return masks


def train(
    model: Any,
    examples: Examples,
    masks: dict[str, Tensor],
    recipe: RecipeOptions,
    padding: Padding = PADDING,
    progress: Any = SILENT,
) -> TrainingSummary:
    """Train the visible elements of a model's parameters."""
    return loop.train(model, examples, VisibleParameters(model, masks), recipe, padding, progress)


def train_plainly(model: Any, examples: Examples, masks: dict[str, Tensor], recipe: RecipeOptions) -> None:
    """The same, with whole tensors: gradients of hidden elements are zeroed, their values put back after each step."""
    named = dict(model.named_parameters())
    flat = [p for name, p in named.items() if p.ndim < 2]
    deep = [p for name, p in named.items() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": deep, "weight_decay": recipe.weight_decay}, {"params": flat, "weight_decay": 0.0}]
    )
    before = {name: p.detach().clone() for name, p in named.items()}
    steps = step_count(recipe, len(examples))
    batches = [
        rows
        for epoch in range(5)
        for rows in shuffled(examples.lengths, recipe.batch_size, seed=recipe.seed, epoch=epoch)
    ]
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, steps)
        batch = collate(examples, batches[step], PADDING)
        optimizer.zero_grad()
        (loss_sum("classification", model(**batch.inputs).logits, batch.targets) / batch.count).backward()
        for name, mask in masks.items():
            named[name].grad *= mask
        torch.nn.utils.clip_grad_norm_(named.values(), recipe.max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                named[name].copy_(torch.where(mask, named[name], before[name]))


def test_it_trains_as_a_plain_loop_would_that_undoes_what_happens_to_hidden_units() -> None:
    recipe = RecipeOptions(epochs=2, batch_size=4, lr=1e-2, weight_decay=0.1, max_grad_norm=0.5)
    compact, plain = new_model(), new_model()
    masks = some_masks(plain)
    train(compact, some_examples(), masks, recipe)
    train_plainly(plain, some_examples(), masks, recipe)
    for a, b in zip(compact.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)  # steps are of size 1e-2


def test_hidden_units_stay_bit_equal_and_visible_ones_do_not() -> None:
    model = new_model()
    masks = some_masks(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, some_examples(), masks, RecipeOptions(epochs=3, batch_size=4, lr=1e-2))
    for name, parameter in model.named_parameters():
        mask = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter[~mask], before[name][~mask]), name
        assert not torch.equal(parameter[mask], before[name][mask]), name


def test_the_optimizer_holds_two_numbers_for_each_visible_weight_and_none_for_hidden_ones() -> None:
    model = new_model()
    masks = some_masks(model)
    visible = VisibleParameters(model, masks)
    optimizer = make_optimizer(visible.leaves, 0.01, RecipeOptions())
    batch = collate(some_examples(), [0, 1], PADDING)
    loss_sum("classification", model(**batch.inputs).logits, batch.targets).backward()
    with visible.updating(visible.leaves):
        optimizer.step()
    sizes = sum(state[key].numel() for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    shown = sum(int(masks[name].sum()) if name in masks else p.numel() for name, p in model.named_parameters())
    assert sizes == 2 * shown


def test_one_step_is_the_same_however_many_tokens_go_through_the_model_at_once() -> None:
    examples, recipe = some_examples(8), RecipeOptions(epochs=2, lr=1e-2, seed=4, batch_size=8)
    whole, parts = new_model(), new_model()
    masks = some_masks(whole)
    train(whole, examples, masks, recipe)
    few = loop.Surroundings(tokens_at_once=2 * max(examples.lengths))
    loop.train(parts, examples, VisibleParameters(parts, masks), recipe, PADDING, SILENT, few)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_embedding_has_sparse_gradients_only_while_it_is_trained() -> None:
    model = new_model()
    embeddings = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    seen: list[bool] = []
    hook = model.register_forward_hook(lambda *_: seen.append(all(module.sparse for module in embeddings)))
    train(model, some_examples(4), some_masks(model), RecipeOptions(max_steps=1, batch_size=4))
    hook.remove()
    assert seen == [True]
    assert not any(module.sparse for module in embeddings)


def test_a_tied_embedding_has_dense_gradients() -> None:
    model = new_model()
    model.get_input_embeddings().second = torch.nn.Linear(1, 1)
    model.get_input_embeddings().second.weight = model.get_input_embeddings().weight
    masks = {name: mask for name, mask in some_masks(model).items() if "second" not in name}
    trainable = VisibleParameters(model, masks)
    assert trainable.takes_rows(model.get_input_embeddings().weight)
    with loop._rows_of_embeddings(model, trainable):
        assert not model.get_input_embeddings().sparse


def test_one_step_is_the_same_however_it_is_split_into_batches() -> None:
    examples = some_examples(8)
    whole, parts = new_model(), new_model()
    options = {"epochs": 1, "lr": 1e-2, "seed": 4}
    train(whole, examples, {}, RecipeOptions(batch_size=8, **options))  # type: ignore[arg-type]
    train(parts, examples, {}, RecipeOptions(batch_size=3, gradient_accumulation=3, **options))  # type: ignore[arg-type]
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_tokens_count_alike_in_long_and_short_texts() -> None:
    features = [
        {"input_ids": [5, 6], "attention_mask": [1, 1]},
        {"input_ids": [7, 8, 9, 10], "attention_mask": [1] * 4},
    ]
    examples = Examples("causal-lm", features, [[IGNORED, 6], [IGNORED, 8, 9, 10]])
    model = new_model("llama")
    with torch.no_grad():
        losses = [
            loss_sum("causal-lm", model(**batch.inputs).logits, batch.targets).item()
            for batch in (collate(examples, [row], PADDING) for row in (0, 1))
        ]
    done = train(model, examples, {}, RecipeOptions(batch_size=1, gradient_accumulation=2))
    assert math.isclose(done.first_loss, sum(losses) / 4, rel_tol=1e-5)


def test_the_same_seed_gives_the_same_bits_and_the_global_generator_is_left_alone() -> None:
    results = []
    state = torch.get_rng_state()
    for seed in (7, 7, 8):
        torch.manual_seed(0)
        model = new_model()
        model.config.hidden_dropout_prob = 0.1
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        torch.set_rng_state(state)
        train(model, some_examples(), {}, RecipeOptions(epochs=2, batch_size=4, lr=1e-2, seed=seed))
        results.append(torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 7),
        ({"epochs": 2}, 14),
        ({"epochs": 0.5}, 4),
        ({"epochs": 0.001}, 1),
        ({"max_steps": 3}, 3),
        ({"max_steps": 30}, 7),
        ({"gradient_accumulation": 2}, 4),
        ({"gradient_accumulation": 100}, 1),
    ],
)
def test_steps_follow_from_epochs_and_batches(options: dict[str, Any], steps: int) -> None:
    assert step_count(RecipeOptions(batch_size=16, **options), 100) == steps


def test_the_learning_rate_rises_then_falls_and_is_never_zero() -> None:
    recipe = RecipeOptions(lr=1.0, warmup_ratio=0.3)
    assert [learning_rate(recipe, step, 10) for step in range(10)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]
    )
    assert learning_rate(RecipeOptions(lr=1.0, warmup_ratio=1.0), 0, 1) == 0.5
    assert learning_rate(RecipeOptions(lr=1.0, warmup_ratio=0.0), 0, 1) == 1.0


def test_only_examples_that_took_part_are_counted() -> None:
    done = train(new_model(), some_examples(12), {}, RecipeOptions(batch_size=4, max_steps=2))
    assert (done.steps, done.examples) == (2, 8)
    done = train(new_model(), some_examples(12), {}, RecipeOptions(batch_size=4, epochs=3))
    assert (done.steps, done.examples) == (9, 12)


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    model = new_model()
    with torch.no_grad():
        model.classifier.weight[0, 0] = torch.inf
    with pytest.raises(InputError, match="the loss is .* at step 1; lower --lr, or use --precision fp32$"):
        train(model, some_examples(), {}, RecipeOptions(precision="bf16"))
    with pytest.raises(InputError, match="the loss is .* at step 1; lower --lr$"):
        train(model, some_examples(), {}, RecipeOptions(precision="fp32"))


def test_mixed_precision_trains_too_and_weights_stay_fp32() -> None:
    model = new_model()
    done = train(model, some_examples(), {}, RecipeOptions(batch_size=4, lr=1e-2, precision="bf16"))
    assert math.isfinite(done.last_loss)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_precision_is_what_was_asked_for_and_only_auto_looks_at_the_hardware() -> None:
    cpu = torch.device("cpu")
    assert (choose_precision("fp32", cpu), choose_precision("bf16", cpu)) == ("fp32", "bf16")
    assert choose_precision("auto", cpu) in ("fp32", "bf16")


def test_progress_hears_of_every_step() -> None:
    heard: list[Any] = []

    class Listener(Silent):
        def start(self, label: str, total: int | None, unit: str) -> None:
            heard.append((label, total, unit))

        def advance(self, amount: int, **figures: float) -> None:
            heard.append((amount, sorted(figures)))

    train(new_model(), some_examples(), {}, RecipeOptions(batch_size=4), PADDING, Listener())
    assert heard == [("training", 3, "steps")] + [(1, ["loss", "lr", "memory_gib", "tokens_per_s"])] * 3


def test_checkpointed_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import checkpoint

    recomputed = []
    original = checkpoint.checkpoint
    monkeypatch.setattr(
        "transformers.modeling_utils.checkpoint", lambda *a, **k: recomputed.append(1) or original(*a, **k)
    )
    kept, again = new_model(), new_model()
    train(kept, some_examples(), {}, RecipeOptions(batch_size=4, lr=1e-2))
    assert not recomputed
    train(again, some_examples(), {}, RecipeOptions(batch_size=4, lr=1e-2, gradient_checkpointing=True))
    assert recomputed
    assert not again.is_gradient_checkpointing
    for a, b in zip(kept.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_model_without_checkpointing_is_refused() -> None:
    model = new_model()
    model.supports_gradient_checkpointing = False
    with pytest.raises(InputError, match="--gradient-checkpointing: BertForSequenceClassification .* has no"):
        train(model, some_examples(), {}, RecipeOptions(gradient_checkpointing=True))


def test_weights_may_be_bf16_as_a_whole() -> None:
    model = new_model().to(torch.bfloat16)
    masks = some_masks(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    done = train(model, some_examples(), masks, RecipeOptions(batch_size=4, lr=1e-2, precision="bf16-weights"))
    assert math.isfinite(done.last_loss)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        mask = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter[~mask], before[name][~mask])


@pytest.mark.parametrize(("name", "most"), [("adamw", 8.1), ("adamw-8bit", 2.1), ("sgd", 0)])
def test_optimizers_keep_the_bytes_that_the_plan_says_and_learn(name: Any, most: float) -> None:
    layer = torch.nn.Linear(64, 1024, bias=False)
    layer.device = torch.device("cpu")
    recipe = RecipeOptions(optimizer=name, lr=1e-2)
    visible = VisibleParameters(layer, {"weight": (torch.arange(1024) % 2 == 0)[:, None].expand(1024, 64)})
    optimizers = Optimizers(visible, recipe)
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 64)).sum().backward()
    optimizers.step(1e-2)
    assert bool((layer.weight[::2] < before[::2]).all())
    assert torch.equal(layer.weight[1::2], before[1::2])
    kept = sum(t.numel() * t.element_size() for _, t in optimizers.state() if isinstance(t, Tensor) and t.numel() > 256)
    assert kept <= most * visible.leaves[0].numel()
    assert MemoryPlan.of(layer, visible, recipe).optimizer == pytest.approx(kept, rel=0.02)


def test_an_optimizer_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    def missing(*args: Any, **options: Any) -> Any:
        raise NotImplementedError("no kernel for it")

    monkeypatch.setattr(bitsandbytes.optim, "AdamW8bit", missing)
    with pytest.raises(InputError, match=r"--optimizer: .* 8-bit AdamW on cpu \(no kernel for it\); use --optimizer"):
        train(new_model(), some_examples(), {}, RecipeOptions(optimizer="adamw-8bit"))


def test_a_plain_loop_holds_16_bytes_per_parameter_and_hidden_ones_need_4() -> None:
    model = new_model()
    whole = MemoryPlan.of(model, VisibleParameters(model, {}), RecipeOptions())
    assert (whole.per_parameter, whole.trained) == (16, whole.parameters)
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters() if p.ndim == 2}
    for mask in masks.values():
        mask[0] = True
    hidden = MemoryPlan.of(model, VisibleParameters(model, masks), RecipeOptions())
    assert 4 < hidden.per_parameter < 6
