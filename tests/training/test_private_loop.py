"""DP-SGD: every example is clipped, noise has its variance, ε is the accountant's; what cannot be done is refused."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedqsn_cli import client_train, merge
from fedqsn_cli.artifacts.manifests import TrainingPrivacy, UpdateManifest, read_manifest
from fedqsn_cli.errors import InputError
from fedqsn_cli.options import RecipeOptions, TrainOptions
from fedqsn_cli.options.privacy import PrivacyOptions
from fedqsn_cli.progress import SILENT
from fedqsn_cli.training.steps import private_loop
from fedqsn_cli.training.steps.batching import Examples, Padding, collate, loss_sum
from fedqsn_cli.training.steps.compact import VisibleParameters
from fedqsn_cli.training.steps.private_loop import PerExample, check_supported, plan_privacy, train_privately
from support.families import make_config
from support.training_jobs import labelled, make_proxy, plain_texts, small_model

PADDING = Padding(0)
PRIVATE: dict[str, Any] = {"dp_epsilon": 8.0, "dp_delta": 1e-3, "dp_clip": 0.5}
FAST: dict[str, Any] = {"max_steps": 3, "batch_size": 4, "lr": 1e-2, "device": "cpu"}


def new_model(name: str = "bert", **options: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if name == "bert" else {}
    config = make_config(name, **dropouts, **options)
    return getattr(transformers, config.architectures[0])(config)


def classified(count: int = 9) -> Examples:
    features = [
        {"input_ids": [5 + row, 7 + row] * (1 + row % 3), "attention_mask": [1] * (2 + 2 * (row % 3))}
        for row in range(count)
    ]
    return Examples("classification", features, [row % 5 for row in range(count)])


def texts(count: int = 6) -> Examples:
    ids = [[3 + (row + step) % 40 for step in range(3 + row % 4)] for row in range(count)]
    features = [{"input_ids": each, "attention_mask": [1] * len(each)} for each in ids]
    return Examples("causal-lm", features, [[-100, *each[1:]] for each in ids])


def some_masks(model: Any) -> dict[str, Tensor]:
    """Hidden rows of linear layers, hidden columns of embeddings."""
    generator = torch.Generator().manual_seed(3)
    masks = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "norm" not in name.lower():
            sizes = (1, parameter.shape[1]) if "embeddings" in name else (parameter.shape[0], 1)
            masks[name] = (torch.rand(sizes, generator=generator) < 0.7).expand(parameter.shape)
    return masks


def single_gradients(model: Any, examples: Examples, masks: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The visible gradient of each example's mean loss, from a batch of that example alone."""
    found = []
    for row in range(len(examples)):
        model.zero_grad()
        batch = collate(examples, [row], PADDING)
        (loss_sum(examples.task, model(**batch.inputs).logits, batch.targets) / batch.count).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({name: grad * masks.get(name, torch.ones(())) for name, grad in grads.items()})
    model.zero_grad(set_to_none=True)
    return found


def norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(part.double().pow(2).sum()) for part in gradient.values()))


CASES = {
    "bert": ("bert", classified, {}),
    "llama": ("llama", texts, {"tie_word_embeddings": False}),
    "gpt2": ("gpt2", texts, {"tie_word_embeddings": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_example_is_clipped_to_the_norm_that_a_batch_of_it_alone_has(case: str) -> None:
    name, data, options = CASES[case]
    model, examples = new_model(name, **options), data()
    masks = some_masks(model)
    singles = single_gradients(model, examples, masks)
    norms = [norm(gradient) for gradient in singles]
    clip = sorted(norms)[len(norms) // 2]  # some are above, some below
    trainable = VisibleParameters(model, masks)
    silent = TrainingPrivacy(
        epsilon=1, delta=0.1, clip=clip, noise_multiplier=1e-12, sampling_rate=0.5, steps=1, accountant="rdp"
    )
    model.train()
    check_supported(model)
    with PerExample(model, trainable, clip) as per_example:
        for rows in ([0, 1, 2, 3], list(range(4, len(examples)))):  # padded and clipped together
            per_example.add(private_loop._losses(model, examples, rows, PADDING))
        assert per_example.norms == pytest.approx(norms, rel=1e-3)
        per_example.finish(silent, len(examples))
        grads = [leaf.grad.clone() for leaf in trainable.leaves]
    expected: dict[str, Tensor] = {}
    for single, size in zip(singles, norms, strict=True):
        for key, part in single.items():
            expected[key] = expected.get(key, 0) + part * min(1.0, clip / size)
    total = math.sqrt(sum(float(grad.double().pow(2).sum()) for grad in grads)) * 0.5 * len(examples)
    assert total == pytest.approx(norm(expected), rel=1e-3)
    assert sum(float(grad.double().sum()) for grad in grads) * 0.5 * len(examples) == pytest.approx(
        sum(float(part.double().sum()) for part in expected.values()), rel=1e-2, abs=1e-4
    )


def test_one_example_moves_the_sum_by_no_more_than_the_limit() -> None:
    model, examples, clip = new_model(), classified(5), 1e-2
    trainable = VisibleParameters(model, some_masks(model))
    silent = TrainingPrivacy(
        epsilon=1, delta=0.1, clip=clip, noise_multiplier=1e-12, sampling_rate=1, steps=1, accountant="rdp"
    )
    sums = []
    with PerExample(model, trainable, clip) as per_example:
        model.train()
        for rows in ([0, 1, 2, 3, 4], [0, 1, 2, 4]):
            per_example.add(private_loop._losses(model, examples, rows, PADDING))
            per_example.finish(silent, len(examples))
            sums.append(torch.cat([leaf.grad.reshape(-1) * 5 for leaf in trainable.leaves]).double())
    assert float((sums[0] - sums[1]).norm()) == pytest.approx(clip, rel=1e-2)


def test_noise_has_its_variance_and_is_not_repeated() -> None:
    model = new_model()
    trainable = VisibleParameters(model, some_masks(model))
    privacy = TrainingPrivacy(
        epsilon=1, delta=0.1, clip=0.25, noise_multiplier=3.0, sampling_rate=0.5, steps=1, accountant="rdp"
    )
    draws = []
    with PerExample(model, trainable, privacy.clip) as per_example:
        for _ in range(2):  # steps for which no example was drawn
            per_example.finish(privacy, 8)
            draws.append(torch.cat([leaf.grad.reshape(-1) for leaf in trainable.leaves]).double())
    deviation, count = 3.0 * 0.25 / (0.5 * 8), draws[0].numel()
    for noise in draws:
        assert float(noise.std()) == pytest.approx(deviation, rel=6 / math.sqrt(2 * count))
        assert abs(float(noise.mean())) < 6 * deviation / math.sqrt(count)
    assert abs(float(torch.corrcoef(torch.stack(draws))[0, 1])) < 6 / math.sqrt(count)


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_epsilon_is_that_of_the_accountant_and_at_most_what_was_asked_for(epsilon: float) -> None:
    from opacus.accountants import RDPAccountant

    recipe = RecipeOptions(epochs=3, batch_size=8, gradient_accumulation=2)
    plan = plan_privacy(PrivacyOptions(dp_epsilon=epsilon, dp_delta=1e-5, dp_clip=1.0), recipe, 800)
    assert plan is not None
    assert (plan.sampling_rate, plan.steps) == (16 / 800, 150)
    accountant = RDPAccountant()
    for _ in range(plan.steps):
        accountant.step(noise_multiplier=plan.noise_multiplier, sample_rate=plan.sampling_rate)
    assert plan.epsilon == pytest.approx(accountant.get_epsilon(delta=1e-5), rel=1e-9)
    assert epsilon - 0.02 <= plan.epsilon <= epsilon


def test_an_epsilon_that_the_accountant_puts_below_zero_is_the_one_that_was_asked_for() -> None:
    recipe = RecipeOptions(max_steps=1, batch_size=4)
    plan = plan_privacy(PrivacyOptions(dp_epsilon=1e-300, dp_delta=0.01, dp_clip=1.0), recipe, 10)
    assert plan is not None
    assert plan.epsilon == 1e-300


def test_every_example_is_drawn_by_itself_with_the_sampling_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples, drawn = new_model(num_hidden_layers=1), classified(240), []
    monkeypatch.setattr(PerExample, "add", lambda self, losses: drawn.append(losses) or 0.0)
    monkeypatch.setattr(private_loop, "_losses", lambda model, examples, rows, padding: rows)
    privacy = TrainingPrivacy(
        epsilon=1, delta=0.01, clip=1, noise_multiplier=1, sampling_rate=0.25, steps=10, accountant="rdp"
    )
    recipe = RecipeOptions(batch_size=10)
    train_privately(model, examples, VisibleParameters(model, {}), recipe, privacy, PADDING, SILENT)
    count = sum(map(len, drawn))
    assert abs(count - 600) < 8 * math.sqrt(600 * 0.75)
    assert max(map(len, drawn)) <= 10
    assert len({len(rows) for rows in drawn}) > 3


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("job")
    make_proxy(small_model(here / "model"), here / "proxy")
    labelled(here / "data.jsonl", rows=60)
    return here


def test_the_update_says_what_protects_it_and_nothing_computed_without_noise(job: Path, tmp_path: Path) -> None:
    data = job / "data.jsonl"
    for name in ("first", "second"):
        result = client_train(job / "proxy", tmp_path / name, data=data, eval_data=data, seed=4, **PRIVATE, **FAST)
    document = json.loads((tmp_path / "first" / "update.json").read_text())
    recorded = document["privacy"]["training"]
    assert recorded.keys() == {"epsilon", "delta", "clip", "noise_multiplier", "sampling_rate", "steps", "accountant"}
    plan = plan_privacy(PrivacyOptions(**PRIVATE), RecipeOptions(**FAST), 60)
    assert plan is not None and recorded == plan.model_dump()
    manifest = read_manifest(tmp_path / "first", UpdateManifest)
    assert set(manifest.losses.model_dump().values()) == {None}
    assert (manifest.num_examples, manifest.steps) == (60, 3)
    assert result.after is not None and result.privacy is not None
    first, second = ((tmp_path / name / "update.safetensors").read_bytes() for name in ("first", "second"))
    assert first != second  # though the seed is the same
    merge(job / "model", [tmp_path / "first"], tmp_path / "next", key=job / "key", ledger=job / "proxy.jsonl")


def test_private_training_learns(job: Path, tmp_path: Path) -> None:
    data, easy = job / "data.jsonl", {"dp_epsilon": 2000.0, "dp_delta": 1e-3, "dp_clip": 10.0}
    result = client_train(
        job / "proxy", tmp_path / "update", data=data, eval_data=data, epochs=12, lr=3e-3, device="cpu", **easy
    )
    assert result.before is not None and result.after is not None
    assert result.after.loss < result.before.loss - 0.2


def test_hidden_units_stay_as_they_are() -> None:
    model, examples = new_model(), classified()
    masks = some_masks(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    recipe = RecipeOptions(batch_size=4, max_steps=2)
    plan = plan_privacy(PrivacyOptions(**PRIVATE), recipe, len(examples))
    assert plan is not None
    train_privately(model, examples, VisibleParameters(model, masks), recipe, plan, PADDING, SILENT)
    for name, mask in masks.items():
        after = dict(model.named_parameters())[name]
        assert torch.equal(after[~mask], before[name][~mask])
        assert not torch.equal(after[mask], before[name][mask])


def test_only_what_requires_gradients_is_trained() -> None:
    model, examples = new_model(), classified()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))

    head = Chosen(model.classifier.weight, model.classifier.bias)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    recipe = RecipeOptions(batch_size=4, max_steps=2)
    plan = plan_privacy(PrivacyOptions(**PRIVATE), recipe, len(examples))
    assert plan is not None
    train_privately(model, examples, head, recipe, plan, PADDING, SILENT)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


class Chosen:
    """Parameters that are trained as they are."""

    def __init__(self, *leaves: Tensor) -> None:
        self.decayed = self.leaves = list(leaves)
        self.undecayed: list[Tensor] = []

    def gather_gradients(self) -> None:
        pass

    def updating(self, leaves: Sequence[Tensor]) -> AbstractContextManager[None]:
        return nullcontext()

    def drop_gradients(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


def test_factors_of_lora_are_clipped_by_the_norm_of_each_example_alone() -> None:
    from peft import LoraConfig, get_peft_model

    plain, examples = new_model(), classified(6)
    config = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"], init_lora_weights=False)
    model = get_peft_model(plain, config).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trained) and any("classifier" in name for name in trained)
    norms = [norm(gradient) for gradient in single_gradients(model, examples, {})]
    check_supported(model)
    with PerExample(model, Chosen(*trained.values()), 1.0) as per_example:
        per_example.add(private_loop._losses(model, examples, list(range(6)), PADDING))
        assert per_example.norms == pytest.approx(norms, rel=1e-3)


# ------------------------------------------------------------------------------------------------ refusals


def test_tied_weights_are_refused(tmp_path: Path) -> None:
    proxy = make_proxy(small_model(tmp_path / "model", "gpt2"), tmp_path / "proxy")
    data = plain_texts(tmp_path / "texts.jsonl")
    with pytest.raises(InputError, match="lm_head.weight is tied to transformer.wte.weight"):
        client_train(proxy, tmp_path / "update", data=data, **(PRIVATE | {"dp_delta": 1e-2}), **FAST)
    assert not (tmp_path / "update").exists()


def test_layers_that_mix_examples_are_refused() -> None:
    with pytest.raises(InputError, match="opacus cannot train this model.*BatchNorm"):
        check_supported(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)))


def test_a_parameter_that_is_used_for_all_examples_at_once_is_refused() -> None:
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = torch.nn.Embedding(4, 3), torch.nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + self.table(torch.arange(4)[None]).sum()

    model = Shared()
    with PerExample(model, VisibleParameters(model, {}), 1.0) as per_example:
        model.train()
        losses = model(torch.randn(5, 3))[:, 0]
        with pytest.raises(InputError, match="does not tell the gradients of examples apart in table.weight"):
            per_example.add(losses)


def test_a_stack_of_experts_is_refused() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = torch.nn.Parameter(torch.zeros(2, 3, 3))

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return torch.einsum("nd,nde->ne", x, self.stack[index])

    model = torch.nn.ModuleDict({"experts": Experts(), "gate": torch.nn.Linear(3, 2)})
    with pytest.raises(InputError, match=r"does not tell the gradients of examples apart in experts\.stack"):
        check_supported(model)
    model["experts"].requires_grad_(False)
    check_supported(model)


def test_gradient_checkpointing_is_refused() -> None:
    model = new_model()
    model.train().gradient_checkpointing_enable()
    with pytest.raises(InputError, match="gradient checkpointing"):
        check_supported(model)


def test_without_opacus_one_line_names_the_extra(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "opacus" else find(name, *rest)
    )
    with pytest.raises(InputError, match=r"--dp-epsilon: needs opacus; install fedqsn-cli\[dp\]"):
        client_train(job / "proxy", tmp_path / "update", data=job / "data.jsonl", **PRIVATE)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dp_epsilon": 1.0}, "--dp-delta: is needed"),
        ({"dp_epsilon": 1.0, "dp_delta": 1e-5}, "--dp-clip: is needed"),
        ({"dp_clip": 1.0}, "--dp-epsilon: is needed"),
        ({**PRIVATE, "dp_delta": 1.0}, "--dp-delta: 1 is not a probability"),
        ({**PRIVATE, "dp_epsilon": 0.0}, "--dp-epsilon"),
        ({**PRIVATE, "precision": "bf16"}, "--dp-epsilon: is computed in fp32"),
        ({**PRIVATE, "max_grad_norm": 0.5}, "--max-grad-norm: every example is clipped by itself"),
        ({**PRIVATE, "packing": True}, "--packing: does not go with --dp-epsilon"),
        ({**PRIVATE, "gradient_checkpointing": True}, "--gradient-checkpointing: does not go with --dp-epsilon"),
        ({**PRIVATE, "save_every": "3"}, "--save-every: does not go with --dp-epsilon"),
        ({**PRIVATE, "log": "steps.jsonl"}, "--log: does not go with --dp-epsilon"),
        ({"noise_multiplier": 1.0}, "--noise-multiplier: needs --clip-norm"),
        ({"residual": "kept"}, "--residual: fp32 loses nothing"),
        ({"lora_r": 4}, "--lora-r: is for adapters; add --method lora"),
        ({"method": "lora", "clip_norm": 1.0}, "--clip-norm: works on weights"),
        ({"method": "lora", "update_format": "nf4"}, "--update-format: adapters are not sent as nf4"),
        ({"method": "lora", "update_format": "bf16", "residual": "kept"}, "--residual: works on weights"),
        ({"method": "lora", "precision": "bf16-weights"}, "--precision: adapters are trained in fp32"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        TrainOptions("out", data="data.jsonl", **options)


def test_a_delta_that_protects_nobody_is_refused(job: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--dp-delta: 0.1 is not less than 1 / 60 examples"):
        client_train(job / "proxy", tmp_path / "update", data=job / "data.jsonl", **(PRIVATE | {"dp_delta": 0.1}))
