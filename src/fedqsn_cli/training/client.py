"""`fedqsn client-train`: one round of a client, from a proxy and private data to an update."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fedqsn_cli.artifacts.manifests import PROXY_MANIFEST, Losses, ProxyManifest, file_digest
from fedqsn_cli.artifacts.proxy_folder import verify_proxy
from fedqsn_cli.checkpoint import ArtifactWriter, Checkpoint, resolve
from fedqsn_cli.models.dense import load_dense
from fedqsn_cli.models.torch_model import Task, choose_device, load_model, memory_errors, quiet
from fedqsn_cli.options import TrainOptions
from fedqsn_cli.progress import SILENT, Progress
from fedqsn_cli.training import update
from fedqsn_cli.training.compact import VisibleParameters
from fedqsn_cli.training.data import Encoder
from fedqsn_cli.training.loop import TrainingSummary, choose_precision, train
from fedqsn_cli.training.scoring import Evaluation, score
from fedqsn_cli.training.tables import Table, read_table
from fedqsn_cli.training.visible import check_round_trip, parameter_masks, read_visible
from fedqsn_cli.version import VERSION

__all__ = ["TrainResult", "client_train"]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of `client_train`.

    Args:
        path: the update's folder, to send back. proxy_id: the proxy it belongs to.
        task: classification or causal-lm.
        examples: different examples trained on. skipped: rows with nothing to learn from.
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


def client_train(proxy: str | Path, options: TrainOptions, *, progress: Progress = SILENT) -> TrainResult:
    """Train a proxy on private data and write the update, U = T − P.

    Only visible units change, unless the owner asked for the fill to be trained, too (`export_proxy`, train all).

    Args:
        proxy: a path or hf:// reference; every file must be what its proxy.json lists.
        options: see `TrainOptions`; `training.data` lists the columns of data files.
        progress: receives the number of steps done, with the loss and examples_per_s.

    Raises:
        InputError: the proxy or an option cannot be used. FormatError: a file of the proxy is malformed or was changed.
        DataError: the data cannot be used. OutputExists: `out` exists.

    Example:
        >>> client_train("proxy/", "update/", data="train.jsonl", epochs=3).last_loss
    """
    precision = choose_precision(options.precision, choose_device(options.device))
    with ArtifactWriter(Path(options.out), force=options.force) as writer, quiet(), memory_errors():
        tables = read_table(options.data), read_table(options.eval_data) if options.eval_data is not None else None
        folder = resolve(str(proxy)).path
        manifest = verify_proxy(folder)
        return _round(writer, folder, manifest, tables, replace(options, precision=precision), progress)


def _round(
    writer: ArtifactWriter,
    folder: Path,
    manifest: ProxyManifest,
    tables: tuple[Table, Table | None],
    options: TrainOptions,
    progress: Progress,
) -> TrainResult:
    """Load, measure, train, measure, write."""
    with Checkpoint.open(folder) as checkpoint:
        config, dense = checkpoint.config or {}, load_dense(checkpoint)
        loaded = load_model(checkpoint, dense=dense)
    encoder = Encoder.of(loaded, options.max_length)
    examples = encoder.encode(tables[0], progress)
    held_out = encoder.encode(tables[1], progress) if tables[1] is not None else None
    visible = read_visible(folder, manifest, {name: tuple(tensor.shape) for name, tensor in dense.items()})
    check_round_trip(loaded.model, dense, visible, folder)
    if manifest.train == "all":
        visible = {}  # every unit moves and goes back
    masks = parameter_masks(loaded.model, config, dense, visible, folder)
    model = loaded.model.to(choose_device(options.device))

    def measure() -> Evaluation | None:
        if held_out is None:
            return None
        return score(model, held_out, batch_size=2 * options.batch_size, padding=encoder.padding, progress=progress)

    before = measure()
    trained = train(model, examples, VisibleParameters(model, masks), options, encoder.padding, progress)
    after = measure()
    update.write_tensors(writer, model, dense, visible, options.update_format)
    _write_manifest(writer, folder, manifest, trained, before, after, options.update_format)
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
        precision="bf16" if options.precision == "bf16" else "fp32",
        seconds=trained.seconds,
    )


def _write_manifest(
    writer: ArtifactWriter,
    folder: Path,
    manifest: ProxyManifest,
    trained: TrainingSummary,
    before: Evaluation | None,
    after: Evaluation | None,
    update_format: update.UpdateFormat,
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
        precision=update_format,
        tool=f"fedqsn {VERSION}",
    )
