"""`client-train --method lora`: what is trained, what is sent, and that peft opens it."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from blake3 import blake3
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from fedqsn_cli import client_train, merge
from fedqsn_cli.artifacts.manifests import ProxyManifest, UpdateManifest, read_manifest
from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.errors import FormatError, InputError
from fedqsn_cli.models.dense import DenseTensors
from fedqsn_cli.models.stored_model import load_stored
from fedqsn_cli.models.tokenizer import load_tokenizer
from fedqsn_cli.models.torch_model import Loaded, task_of
from fedqsn_cli.options import TrainOptions
from fedqsn_cli.options.lora import LoraOptions
from fedqsn_cli.progress import Silent
from fedqsn_cli.training.client import estimate_training
from fedqsn_cli.training.data.encoder import Encoder
from fedqsn_cli.training.methods.lora_modules import choose_modules
from fedqsn_cli.training.scoring.scoring import score
from fedqsn_cli.training.steps.batching import collate, loss_sum
from fedqsn_cli.training.steps.schedule import learning_rate, step_count, windows
from fedqsn_cli.training.steps.visible import expanded
from support.helpers import HOST, USER, contents, set_host_names
from support.tables import read_table
from support.training_jobs import data_for, dense_tensors, make_proxy, small_model, visible_units
from training.test_tasks import CASES as TASKS
from training.test_tasks import make_job

FAST: dict[str, Any] = {
    "method": "lora",
    "lora_r": 4,
    "lora_alpha": 6.0,
    "max_steps": 6,
    "batch_size": 4,
    "lr": 2e-2,
    "precision": "fp32",
}


@dataclass(frozen=True)
class Case:
    """A model family, how its proxy is made, and what is trained beside the adapters."""

    family: str
    head: str = ""
    proxy: tuple[tuple[str, Any], ...] = ()
    saved: tuple[str, ...] = ()

    @property
    def classifies(self) -> bool:
        return "Classification" in self.head


NF4, DENSE = ("format", "nf4"), ("layout", "dense")
LLAMA = Case("llama", proxy=(NF4,))
CASES = [
    Case("llama", proxy=(NF4,), saved=("lm_head",)),
    Case("llama", proxy=(NF4, DENSE, ("axis", "input"))),
    Case("gpt2", proxy=(NF4,)),
    Case("gpt2", proxy=(NF4, DENSE, ("axis", "input"))),
    Case("gpt2", "GPT2ForSequenceClassification", (("format", "int8"),)),
    Case("roberta", "RobertaForSequenceClassification", (NF4, ("axis", "input"))),
    Case("roberta", "RobertaForSequenceClassification", (NF4, DENSE)),
    Case("qwen3", proxy=(NF4, ("double_quant", True))),
    Case("t5", "T5ForSequenceClassification", (NF4,)),
    Case("deepseek_v3", proxy=(NF4,)),
]


def world(folder: Path, case: Case, **options: Any) -> tuple[Path, Path]:
    """A proxy and data for it."""
    model = small_model(folder / "model", case.family, head=case.head or None)
    if options.get("fill") == "base":
        options["public_base"] = small_model(folder / "base", case.family, head=case.head or None, seed=1)
    return make_proxy(model, folder / "proxy", **dict(case.proxy) | options), data_for(case.head, folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A packed proxy of a small Llama, and data for it; not to be changed."""
    return world(tmp_path_factory.mktemp("llama"), LLAMA)


def train(folder: Path, case: Case, proxy: Path, data: Path, **options: Any) -> Any:
    given = FAST | ({"modules_to_save": list(case.saved)} if case.saved else {}) | options
    return client_train(proxy, folder / "update", data=data, **given)


def products(update: Path) -> dict[str, Tensor]:
    """U of every adapted tensor, from the files alone."""
    manifest = read_manifest(update, UpdateManifest)
    factors = load_file(update / "adapter_model.safetensors")
    found = {}
    for name, adapter in (manifest.adapters or {}).items():
        a, b = (factors[f"{adapter.module}.lora_{factor}.weight"] for factor in "AB")
        assert (len(a), b.shape[1]) == (adapter.rank, adapter.rank)
        product = adapter.scaling * (b.double() @ a.double())
        found[name] = product.T if adapter.transposed else product
    return found


def opened_by_peft(proxy: Path, update: Path | None) -> Any:
    """The proxy as transformers opens it, with the update; packed weights are not packed anew for inference."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    config = json.loads((proxy / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(proxy)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if model.config.get_text_config().pad_token_id is None:
        model.config.pad_token_id = 0
    if update is not None:
        PeftModel.from_pretrained(model, str(update))
    return model.eval()


def loss_of(model: Any, proxy: Path, data: Path) -> float:
    with Checkpoint.open(proxy) as checkpoint:
        loaded = Loaded(model, load_tokenizer(checkpoint), task_of(checkpoint.config, proxy)[0])
    encoder = Encoder.of(loaded, 256)
    examples = encoder.encode(read_table(data), Silent())
    return score(model, examples, batch_size=8, padding=encoder.padding, progress=Silent()).loss


def train_plainly(model: Any, recipe: TrainOptions, proxy: Path, data: Path) -> None:
    """The plainest loop around a model of peft: gradients of hidden rows of B are zeroed."""
    with Checkpoint.open(proxy) as checkpoint:
        loaded = Loaded(model, load_tokenizer(checkpoint), task_of(checkpoint.config, proxy)[0])
    encoder = Encoder.of(loaded, 256)
    examples = encoder.encode(read_table(data), Silent())
    visible = {name.removesuffix(".weight"): mask for name, mask in visible_units(proxy).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=recipe.weight_decay)
    model.train()
    steps = step_count(recipe, len(examples))
    for step, (rows,) in enumerate(windows(recipe, examples.lengths)):
        batch = collate(examples, rows, encoder.padding)
        optimizer.zero_grad()
        (loss_sum(loaded.task, model(**batch.inputs).logits, batch.targets) / batch.count).backward()
        for name, module in model.named_modules():
            if hasattr(module, "lora_B"):
                module.lora_B["default"].weight.grad[~torch.from_numpy(visible[name].flags.reshape(-1))] = 0
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step, steps)
        optimizer.step()


def test_a_plain_loop_of_peft_on_the_same_data_gives_the_same_factors(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    train(tmp_path, LLAMA, *llama)
    model = opened_by_peft(llama[0], None)
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    torch.manual_seed(0)
    targets = [name for name in layers if name != "lm_head"]
    get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    train_plainly(model, TrainOptions(**FAST, out="unused", data=llama[1]), *llama)
    sent = load_file(tmp_path / "update" / "adapter_model.safetensors")
    assert len(sent) == 2 * len(targets)
    for name, factor in sent.items():
        plain = model.get_parameter(name.removeprefix("base_model.model.").replace(".weight", ".default.weight"))
        torch.testing.assert_close(factor, plain.detach(), rtol=1e-3, atol=1e-4)  # steps are of size 2e-2


def test_an_estimate_counts_the_bytes_of_the_factors(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    train(tmp_path, LLAMA, *llama)
    proxy, data = llama
    estimate = estimate_training(proxy, TrainOptions(**FAST, out=tmp_path / "no", data=data))
    factors = load_file(tmp_path / "update" / "adapter_model.safetensors")
    assert estimate.update_bytes == sum(4 * factor.numel() for factor in factors.values())
    assert not (tmp_path / "no").exists()


IN_SOAK = {1, 2, 5, 7, 9}  # one of each format, layout, axis and head is left


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.soak] * (number in IN_SOAK)) for number, case in enumerate(CASES)],
    ids=lambda case: "-".join([case.family, *map(str, dict(case.proxy).values())]),
)
def test_the_loss_falls_and_peft_computes_the_same_and_hidden_units_stay(tmp_path: Path, case: Case) -> None:
    proxy, data = world(tmp_path, case)
    result = train(tmp_path, case, proxy, data, eval_data=data, epochs=4, max_steps=24)
    update = tmp_path / "update"
    assert result.before.loss == pytest.approx(loss_of(opened_by_peft(proxy, None), proxy, data), abs=1e-5)
    assert result.after.loss == pytest.approx(loss_of(opened_by_peft(proxy, update), proxy, data), abs=1e-5)
    assert result.after.loss < result.before.loss - 1e-3
    visible, found = visible_units(proxy), products(update)
    assert found
    for name, product in found.items():
        shown = expanded(visible[name], tuple(product.shape)) if name in visible else torch.ones_like(product).bool()
        assert not product[~shown].any()
        assert product[shown].any()
    manifest = read_manifest(update, UpdateManifest)
    assert result.parameters == sum(
        tensor.numel() for path in update.glob("*.safetensors") for tensor in load_file(path).values()
    )
    assert set(manifest.files) == {path.name for path in update.iterdir()} - {"update.json"}
    for name, digest in manifest.files.items():
        content = (update / name).read_bytes()
        assert digest in (hashlib.sha256(content).hexdigest(), f"blake3:{blake3(content).hexdigest()}")
    assert bool(manifest.saved) == (case.classifies or bool(case.saved))


def test_what_is_trained_in_full_is_sent_as_an_update_of_visible_units_too(tmp_path: Path) -> None:
    case = Case("roberta", "RobertaForSequenceClassification", (NF4,))
    proxy, data = world(tmp_path, case)
    train(tmp_path, case, proxy, data)
    manifest = read_manifest(tmp_path / "update", UpdateManifest)
    stored = load_file(tmp_path / "update" / "update.safetensors")
    whole = load_file(tmp_path / "update" / "adapter_model.safetensors")
    dense, visible = dense_tensors(proxy), visible_units(proxy)
    assert manifest.saved is not None
    assert set(manifest.saved) == set(stored) == {"classifier.out_proj.weight", "classifier.out_proj.bias"}
    for name, inside in manifest.saved.items():
        change = whole[inside] - dense[name].float()
        shown = expanded(visible[name], tuple(change.shape)) if name in visible else torch.ones_like(change).bool()
        torch.testing.assert_close(change[shown], stored[name].reshape(-1), rtol=0, atol=0)
        assert not change[~shown].any()
        assert stored[name].any()


@pytest.mark.parametrize("options", [{"train": "all", "fill": "base", "schedule": "sticky"}, {"p1": 1.0, "p2": 0.0}])
def test_where_clients_train_all_units_the_adapters_move_all_of_them(tmp_path: Path, options: dict[str, Any]) -> None:
    case = Case("gpt2", proxy=(NF4, ("axis", "element")))
    given = {"fill": "base", "train": "all", "schedule": "sticky"} | options
    proxy, data = world(tmp_path, case, **given)
    train(tmp_path, case, proxy, data)
    assert read_manifest(proxy, ProxyManifest).train == "all"
    for product in products(tmp_path / "update").values():
        assert (product != 0).all()


def test_the_base_keeps_its_number_format_and_its_bytes(tmp_path: Path) -> None:
    case = Case("llama", proxy=(NF4,))
    proxy, _ = world(tmp_path, case)
    manifest = read_manifest(proxy, ProxyManifest)
    with Checkpoint.open(proxy) as checkpoint:
        model = load_stored(checkpoint, manifest.quantization, torch.float32).model
        packed = {name: parameter for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}
        assert len(packed) == 14
        for name, parameter in packed.items():
            assert type(parameter).__name__ == "Params4bit"
            assert (parameter.numpy().reshape(-1) == checkpoint.read(name).reshape(-1)).all()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_16_bit_proxy_is_trained_in_its_format_with_a_head_in_fp32(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model", "llama", dtype="bfloat16")
    proxy, data = make_proxy(model, tmp_path / "proxy"), data_for("", tmp_path)
    case = Case("llama", saved=("lm_head",))
    result = train(tmp_path, case, proxy, data, eval_data=data)
    assert result.after.loss < result.before.loss
    assert result.after.loss == pytest.approx(
        loss_of(opened_by_peft(proxy, tmp_path / "update"), proxy, data), abs=2e-2
    )
    stored = load_file(tmp_path / "update" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_the_same_seed_gives_the_same_bytes_and_nothing_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_host_names(monkeypatch)
    case = Case("gpt2", proxy=(NF4,))
    proxy, data = world(tmp_path, case)
    train(tmp_path, case, proxy, data, lora_dropout=0.2)
    first = contents(tmp_path / "update")
    train(tmp_path, case, proxy, data, lora_dropout=0.2, force=True)
    assert contents(tmp_path / "update") == first
    text = b"".join(first.values())
    for secret in (str(tmp_path), HOST, USER, tmp_path.name):
        assert secret.encode() not in text
    assert json.loads(first["adapter_config.json"])["base_model_name_or_path"] is None


def test_it_goes_on_where_it_was_interrupted_with_the_same_bytes(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    case = Case("roberta", "RobertaForSequenceClassification", (NF4,))
    proxy, data = world(tmp_path, case)
    train(tmp_path, case, proxy, data, lora_dropout=0.1)
    whole = contents(tmp_path / "update")
    steps = 0

    def advance(_: Any, __: int, **figures: Any) -> None:
        nonlocal steps
        steps += "lr" in figures
        if steps == 4:
            raise Stop

    again = dict(data=data, **FAST | {"lora_dropout": 0.1, "save_every": "1"})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr("fedqsn_cli.progress.Silent.advance", advance)
        client_train(proxy, tmp_path / "again", **again)
    assert not (tmp_path / "again").exists()
    client_train(proxy, tmp_path / "again", **again)
    assert contents(tmp_path / "again") == whole


def test_gradient_checkpointing_and_rank_stabilised_scaling_and_16_bit_factors(
    tmp_path: Path, llama: tuple[Path, Path]
) -> None:
    train(tmp_path, LLAMA, *llama)
    plain = products(tmp_path / "update")
    train(tmp_path, LLAMA, *llama, gradient_checkpointing=True, force=True)
    for name, product in products(tmp_path / "update").items():
        torch.testing.assert_close(product, plain[name], rtol=1e-3, atol=1e-5)
    train(tmp_path, LLAMA, *llama, use_rslora=True, update_format="bf16", force=True)
    manifest = read_manifest(tmp_path / "update", UpdateManifest)
    assert {adapter.scaling for adapter in (manifest.adapters or {}).values()} == {6.0 / 2}
    assert {t.dtype for t in load_file(tmp_path / "update" / "adapter_model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "name",
    [
        "words",
        "sources",
        pytest.param("multi-label", marks=pytest.mark.soak),
        pytest.param("masked", marks=pytest.mark.soak),
    ],
)
def test_every_task_is_learnt_with_adapters_and_merged(tmp_path: Path, name: str) -> None:
    job = make_job(tmp_path, replace(TASKS[name], export={"format": "nf4"}))
    data, options = job / "data.jsonl", {"epochs": 10, "lr": 2e-2, "batch_size": 16, "precision": "fp32"}
    result = client_train(job / "proxy", job / "update", data=data, eval_data=data, method="lora", lora_r=4, **options)
    assert result.before is not None and result.after is not None
    assert result.after.loss < 0.97 * result.before.loss
    merged = merge(job / "model", [job / "update"], job / "next", key=job / "key", ledger=job / "proxy.jsonl")
    assert merged.clients[0].relative_norm > 0
    assert all(
        not product[~expanded(visible_units(job / "proxy")[tensor], tuple(product.shape))].any()
        for tensor, product in products(job / "update").items()
    )


@pytest.mark.parametrize("options", [{"packing": True}, {"optimizer": "adamw-8bit"}, {"optimizer": "sgd", "lr": 1.0}])
def test_packed_rows_and_other_optimizers(tmp_path: Path, llama: tuple[Path, Path], options: dict[str, Any]) -> None:
    result = train(tmp_path, LLAMA, *llama, eval_data=llama[1], **options)
    assert result.after.loss < result.before.loss
    assert result.after.loss == pytest.approx(loss_of(opened_by_peft(llama[0], tmp_path / "update"), *llama), abs=1e-5)


def test_named_layers_only(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    train(tmp_path, LLAMA, *llama, target_modules=["q_proj", "model.layers.1.mlp.down_proj"])
    assert set(products(tmp_path / "update")) == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["nothing"]}, "--target-modules: no module is called nothing"),
        ({"target_modules": ["embed_tokens"]}, "model.embed_tokens is not a linear layer but Embedding"),
        ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, "lm_head is trained in full already"),
        ({"modules_to_save": ["q_proj"]}, "is packed, so it cannot be trained in full"),
        ({"lora_r": 65}, "has no more than 64 dimensions"),
        ({"update_format": "nf4"}, "--update-format: adapters are not sent as nf4"),
        ({"clip_norm": 1.0}, "--clip-norm: works on weights"),
        ({"update_format": "bf16", "residual": "r"}, "--residual: works on weights"),
        ({"precision": "bf16-weights"}, "--precision: adapters are trained in fp32"),
        ({"method": "full"}, "--lora-r: is for adapters; add --method lora"),
    ],
)
def test_what_cannot_be_trained_or_sent_is_refused(
    tmp_path: Path, llama: tuple[Path, Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(tmp_path, LLAMA, *llama, **options)
    assert not (tmp_path / "update").exists()


def test_layers_that_peft_takes_for_experts_get_no_adapter(tmp_path: Path) -> None:
    case = Case("deepseek_v3", proxy=(NF4,))
    proxy, _ = world(tmp_path, case)

    def targets(*names: str) -> list[str]:
        with Checkpoint.open(proxy) as checkpoint:
            model = load_stored(checkpoint, read_manifest(proxy, ProxyManifest).quantization, torch.float32).model
            layout = DenseTensors(checkpoint).layout
            chosen = choose_modules(model, layout, checkpoint.config, LoraOptions(method="lora", target_modules=names))
        return [target.name for target in chosen.targets]

    assert {name.rpartition(".")[2] for name in targets()} == {
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    }
    with pytest.raises(InputError, match=r"peft takes model.layers.0.mlp.gate_proj for one of the experts"):
        targets("gate_proj")


def test_a_packed_module_whose_weight_is_dense_is_refused(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    proxy = shutil.copytree(llama[0], tmp_path / "proxy")
    config = json.loads((proxy / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["score"]
    config["tie_word_embeddings"] = True
    (proxy / "config.json").write_text(json.dumps(config))
    with Checkpoint.open(proxy) as checkpoint, pytest.raises(FormatError, match=r"lm_head is not packed"):
        load_stored(checkpoint, read_manifest(proxy, ProxyManifest).quantization, torch.float32)


def test_a_packed_layer_follows_autocast_as_any_other_linear_layer_does(llama: tuple[Path, Path]) -> None:
    with Checkpoint.open(llama[0]) as checkpoint:
        manifest = read_manifest(llama[0], ProxyManifest)
        layer = load_stored(checkpoint, manifest.quantization, torch.bfloat16).model.model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == "Linear4bit"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(2, 64)).dtype == torch.nn.Linear(64, 64)(torch.ones(2, 64)).dtype == torch.bfloat16
    assert layer(torch.ones(2, 64)).dtype == torch.float32


def test_tied_heads_and_masks_of_single_weights_are_refused(tmp_path: Path) -> None:
    case = Case("gpt2", proxy=(NF4,))
    proxy, data = world(tmp_path, case)
    with pytest.raises(InputError, match=r"lm_head.weight is tied to another weight"):
        train(tmp_path, case, proxy, data, modules_to_save=["lm_head"])
    other = make_proxy(tmp_path / "model", tmp_path / "elements", format="nf4", axis="element", key=tmp_path / "key2")
    with pytest.raises(InputError, match="hides single weights"):
        train(tmp_path, case, other, data)


@pytest.mark.parametrize(
    "proxy_options", [pytest.param((NF4, DENSE), marks=pytest.mark.soak), (NF4,)], ids=["dense", "packed"]
)
def test_private_training_of_adapters(tmp_path: Path, proxy_options: tuple[tuple[str, str], ...]) -> None:
    case = Case("roberta", "RobertaForSequenceClassification", proxy_options)
    proxy, data = world(tmp_path, case)
    result = train(tmp_path, case, proxy, data, dp_epsilon=8.0, dp_delta=1e-3, dp_clip=1.0)
    assert result.privacy is not None
    assert result.privacy.training is not None
    visible = visible_units(proxy)
    for name, product in products(tmp_path / "update").items():
        if name in visible:
            assert not product[~expanded(visible[name], tuple(product.shape))].any()
