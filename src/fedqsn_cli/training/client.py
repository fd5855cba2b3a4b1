"""`fedqsn client-train`: one round of a client, from a proxy and private data to an update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from fedqsn_cli.artifacts.manifests import PROXY_MANIFEST, PrivacyRecord, ProxyManifest, file_digest
from fedqsn_cli.artifacts.proxy_folder import verify_proxy
from fedqsn_cli.checkpoint import ArtifactWriter, Checkpoint, resolve
from fedqsn_cli.errors import InputError
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.dense import load_dense
from fedqsn_cli.models.torch_model import Task, choose_device, load_model, memory_errors, quiet
from fedqsn_cli.options import TrainOptions
from fedqsn_cli.progress import SILENT, Progress
from fedqsn_cli.training import update
from fedqsn_cli.training.compact import VisibleParameters
from fedqsn_cli.training.data import Encoder
from fedqsn_cli.training.error_feedback import ErrorFeedback, read_errors
from fedqsn_cli.training.loop import choose_precision, train
from fedqsn_cli.training.privacy import privacy_record, reported_losses, update_noise
from fedqsn_cli.training.private_loop import plan_privacy, require_opacus, train_privately
from fedqsn_cli.training.scoring import Evaluation, score
from fedqsn_cli.training.tables import Table, read_table
from fedqsn_cli.training.visible import check_round_trip, parameter_masks, read_visible, rescale_factors
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
        privacy: how the update was kept from telling about the data, None if it was not.
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
    privacy: PrivacyRecord | None
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
    if options.dp_epsilon is not None:
        require_opacus()
    wanted = "fp32" if options.dp_epsilon is not None else options.precision
    precision = choose_precision(wanted, choose_device(options.device))
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
    scales = rescale_factors(manifest, visible)
    if manifest.train == "all":
        visible = {}  # every unit moves and goes back
    feedback = _feedback(options, manifest, dense, visible, scales)
    masks = parameter_masks(loaded.model, config, dense, visible, folder)
    model = loaded.model.to(choose_device(options.device))
    private = plan_privacy(options, options, len(examples))

    def measure() -> Evaluation | None:
        if held_out is None:
            return None
        return score(model, held_out, batch_size=2 * options.batch_size, padding=encoder.padding, progress=progress)

    before = measure()
    trainable = VisibleParameters(model, masks)
    if private is None:
        trained = train(model, examples, trainable, options, encoder.padding, progress)
    else:
        trained = train_privately(model, examples, trainable, options, private, encoder.padding, progress)
    after = measure()
    differences = update.Differences.of(model, dense, visible)
    noise = update_noise(options, differences, scales)
    update.write_tensors(writer, differences, options.update_format, noise, feedback)
    privacy = privacy_record(options, private)
    update.write_manifest(
        writer,
        proxy_id=manifest.proxy_id,
        proxy_sha256=file_digest(folder / PROXY_MANIFEST),
        num_examples=trained.examples,
        steps=trained.steps,
        losses=reported_losses(options, trained, before, after),
        precision=options.update_format,
        tool=f"fedqsn {VERSION}",
        privacy=privacy,
    )
    path = str(writer.publish())
    if feedback is not None:
        feedback.save()
    return TrainResult(
        path=path,
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
        privacy=privacy,
        seconds=trained.seconds,
    )


def _feedback(
    options: TrainOptions,
    manifest: ProxyManifest,
    dense: Mapping[str, Tensor],
    visible: Mapping[str, UnitMask],
    scales: Mapping[str, float],
) -> ErrorFeedback | None:
    """What earlier rounds left over; None where nothing is kept. Raises InputError, FormatError."""
    if options.residual is None:
        return None
    path, out = Path(options.residual), Path(options.out)
    if path.resolve().is_relative_to(out.resolve()):
        raise InputError("is inside of the output", where="--residual", hint="it is private, and not to be sent")
    shapes = {name: tuple(dense[name].shape) for name in update.floats(dense)}
    errors = read_errors(path, manifest.job, manifest.proxy_id, shapes)
    return ErrorFeedback(path, manifest.job, manifest.proxy_id, errors, visible, scales)
