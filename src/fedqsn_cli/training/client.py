"""`fedqsn client-train`: what a client does in one round. Proxy and private data in, update out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from fedqsn_cli import validate
from fedqsn_cli.artifacts.manifests import PROXY_MANIFEST, Losses, ProxyManifest, file_digest
from fedqsn_cli.checkpoint import ArtifactWriter, Checkpoint, resolve
from fedqsn_cli.models.dense import load_dense
from fedqsn_cli.models.torch_model import Task, choose_device, load_model, memory_errors, quiet
from fedqsn_cli.progress import Progress, Silent
from fedqsn_cli.training import update
from fedqsn_cli.training.data import Encoder
from fedqsn_cli.training.loop import Recipe, Trained, choose_precision, train
from fedqsn_cli.training.proxies import verify_proxy
from fedqsn_cli.training.scoring import Evaluation, score
from fedqsn_cli.training.tables import Table, read_table
from fedqsn_cli.training.visible import check_round_trip, parameter_masks, read_visible
from fedqsn_cli.version import VERSION

__all__ = ["TrainResult", "client_train"]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What one round of training made.

    Args:
        path: the update's folder, to send back. proxy_id: the proxy it belongs to.
        task: classification or causal-lm.
        examples: different examples that took part. skipped: rows with nothing to learn from.
        steps: optimizer steps. parameters: numbers in the update.
        first_loss, last_loss: mean loss in nats over the first and the last tenth of the steps.
        before, after: the model on the evaluation data, None without it.
        precision: of the computation.
        seconds: wall time of the steps.
    """

    path: str
    proxy_id: str
    task: Task
    examples: int
    skipped: int
    steps: int
    parameters: int
    first_loss: float
    last_loss: float
    before: Evaluation | None
    after: Evaluation | None
    precision: Literal["fp32", "bf16"]
    seconds: float


def client_train(
    proxy: str | Path,
    out: str | Path,
    *,
    data: str | Path,
    eval_data: str | Path | None = None,
    epochs: float = 1.0,
    lr: float = 5e-5,
    batch_size: int = 16,
    max_length: int = 256,
    seed: int = 0,
    device: str = "auto",
    weight_decay: float = 0.01,
    warmup_ratio: float = 0.1,
    max_grad_norm: float = 1.0,
    gradient_accumulation: int = 1,
    precision: str = "auto",
    max_steps: int | None = None,
    update_format: str = "fp32",
    force: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a proxy on private data and write the update, U = T − P.

    Only visible units move, unless the owner had the fill trained, too (`export_proxy`, train all).

    Args:
        proxy: a path or hf:// reference; every file must be what its proxy.json lists.
        out: the update's folder; appears when it is complete, or not at all.
        data: a JSONL, CSV or Parquet file; its columns are told in `training.data`.
        eval_data: the same, measured before and after training in fp32.
        epochs: passes over the data. max_steps: most optimizer steps.
        lr, warmup_ratio, weight_decay, max_grad_norm: AdamW with linear warm-up and decay.
        batch_size: examples a batch. gradient_accumulation: batches a step.
        max_length: longer texts are cut to this many tokens.
        seed: decides the order of examples and dropout; never what is hidden.
        device: auto, cpu, cuda or cuda:N. precision: auto, fp32 or bf16 (mixed).
        update_format: precision of the update: fp32, bf16 or fp16.
        force: replace an artifact that stands at `out`.
        progress: told of steps, with the loss and examples_per_s.

    Raises:
        InputError: the proxy or an option cannot be used. DataError: the data cannot be used.
        OutputExists: `out` is taken.
    """
    recipe = _recipe(
        epochs=epochs,
        max_steps=max_steps,
        lr=lr,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        seed=seed,
        precision=precision,
        device=device,
    )
    validate.at_least(1, max_length, "--max-length")
    validate.choice(update_format, ("fp32", "bf16", "fp16"), "--update-format")
    with ArtifactWriter(Path(out), force=force) as writer, quiet(), memory_errors():
        tables = read_table(data), read_table(eval_data) if eval_data is not None else None
        folder = resolve(str(proxy)).path
        manifest = verify_proxy(folder)
        form = cast(update.UpdateFormat, update_format)
        return _round(writer, folder, manifest, tables, recipe, device, max_length, form, progress or Silent())


def _recipe(*, precision: str, device: str, **options: float | int | None) -> Recipe:
    """Check the options of training."""
    for name in ("epochs", "lr", "max_grad_norm"):
        validate.more_than_zero(cast(float, options[name]), _option(name))
    for name in ("batch_size", "gradient_accumulation"):
        validate.at_least(1, cast(int, options[name]), _option(name))
    for name in ("weight_decay", "seed"):
        validate.at_least(0, cast(float, options[name]), _option(name))
    validate.up_to_one(cast(float, options["warmup_ratio"]), "--warmup-ratio")
    if options["max_steps"] is not None:
        validate.at_least(1, options["max_steps"], "--max-steps")
    validate.choice(precision, ("auto", "fp32", "bf16"), "--precision")
    return Recipe(**options, precision=choose_precision(precision, choose_device(device)))  # type: ignore[arg-type]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _round(
    writer: ArtifactWriter,
    folder: Path,
    manifest: ProxyManifest,
    tables: tuple[Table, Table | None],
    recipe: Recipe,
    device: str,
    max_length: int,
    form: update.UpdateFormat,
    progress: Progress,
) -> TrainResult:
    """Load, measure, train, measure, write."""
    with Checkpoint.open(folder) as checkpoint:
        config, dense = checkpoint.config or {}, load_dense(checkpoint)
        loaded = load_model(checkpoint, dense=dense)
    encoder = Encoder.of(loaded, max_length)
    examples = encoder.encode(tables[0], progress)
    held_out = encoder.encode(tables[1], progress) if tables[1] is not None else None
    visible = read_visible(folder, manifest, {name: tuple(tensor.shape) for name, tensor in dense.items()})
    check_round_trip(loaded.model, dense, visible, folder)
    if manifest.train == "all":
        visible = {}  # every unit moves and goes back
    masks = parameter_masks(loaded.model, config, dense, visible, folder)
    model = loaded.model.to(choose_device(device))

    def measure() -> Evaluation | None:
        if held_out is None:
            return None
        return score(model, held_out, batch_size=2 * recipe.batch_size, padding=encoder.padding, progress=progress)

    before = measure()
    trained = train(model, examples, masks, recipe, encoder.padding, progress)
    after = measure()
    update.write_tensors(writer, model, dense, visible, form)
    _write_manifest(writer, folder, manifest, trained, before, after, form)
    return TrainResult(
        path=str(writer.publish()),
        proxy_id=manifest.proxy_id,
        task=loaded.task,
        examples=trained.examples,
        skipped=examples.skipped,
        steps=trained.steps,
        parameters=update.parameters(dense, visible),
        first_loss=trained.first_loss,
        last_loss=trained.last_loss,
        before=before,
        after=after,
        precision=recipe.precision,
        seconds=trained.seconds,
    )


def _write_manifest(
    writer: ArtifactWriter,
    folder: Path,
    manifest: ProxyManifest,
    trained: Trained,
    before: Evaluation | None,
    after: Evaluation | None,
    form: update.UpdateFormat,
) -> None:
    update.write_manifest(
        writer,
        proxy_id=manifest.proxy_id,
        proxy_sha256=file_digest(folder / PROXY_MANIFEST),
        num_examples=trained.examples,
        steps=trained.steps,
        losses=Losses(
            first=trained.first_loss,
            last=trained.last_loss,
            eval_before=before.loss if before else None,
            eval_after=after.loss if after else None,
        ),
        precision=form,
        tool=f"fedqsn {VERSION}",
    )
