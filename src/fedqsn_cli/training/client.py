"""`fedqsn client-train`: one round of a client, from a proxy and private data to an update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedqsn_cli.artifacts.manifests import (
    PROXY_MANIFEST,
    UPDATE_MANIFEST,
    PrivacyRecord,
    ProxyManifest,
    TrainingPrivacy,
    file_digest,
)
from fedqsn_cli.artifacts.proxy_folder import verify_proxy
from fedqsn_cli.checkpoint import ArtifactWriter, Checkpoint, resolve
from fedqsn_cli.checkpoint.files import keep_outside
from fedqsn_cli.crypto.optional import signer, verify_signed
from fedqsn_cli.errors import InputError
from fedqsn_cli.kernels.digests import Algorithm
from fedqsn_cli.models.architecture import Task
from fedqsn_cli.models.messages import quiet
from fedqsn_cli.models.torch_model import Loaded, choose_device, memory_errors
from fedqsn_cli.options import TrainOptions
from fedqsn_cli.progress import SILENT, Progress
from fedqsn_cli.text import size
from fedqsn_cli.training.data.data_files import DataFile, open_data
from fedqsn_cli.training.data.encoder import Encoder
from fedqsn_cli.training.methods.full import FullMethod
from fedqsn_cli.training.methods.method import Method
from fedqsn_cli.training.scoring.scoring import Evaluation, score
from fedqsn_cli.training.steps.batching import Examples
from fedqsn_cli.training.steps.compact import Trainable
from fedqsn_cli.training.steps.estimate import Estimate, measured
from fedqsn_cli.training.steps.journal import journals
from fedqsn_cli.training.steps.loop import Surroundings, TrainingSummary, train
from fedqsn_cli.training.steps.memory import MemoryPlan
from fedqsn_cli.training.steps.packing import check_separation, packed
from fedqsn_cli.training.steps.precision import ChosenPrecision, choose_precision
from fedqsn_cli.training.steps.private_loop import plan_privacy, require_opacus, train_privately
from fedqsn_cli.training.steps.processes import Processes, joined, launched, own_device
from fedqsn_cli.training.steps.shared_examples import shared
from fedqsn_cli.training.steps.states import StateFolder, facts_of, remove_finished
from fedqsn_cli.training.updates import update
from fedqsn_cli.training.updates.error_feedback import settle_published
from fedqsn_cli.training.updates.privacy import privacy_record, reported_losses
from fedqsn_cli.version import VERSION

__all__ = ["Estimate", "TrainResult", "client_train", "estimate_training"]

NOT_BINDING = frozenset(
    {"out", "data", "eval_data", "device", "save_every", "log", "tensorboard", "force"}
    | {"sign", "verify_key"}
    | {"update_format", "residual", "clip_norm", "noise_multiplier"}
)
"""Options that a training may be continued with other values of; `data` counts by its content."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of `client_train`.

    Args:
        path: the update's folder, to send back. proxy_id: the proxy it belongs to.
        task: what the model is for.
        examples: different examples trained on. skipped: rows with nothing to learn from. cut: rows that were too long
            and lost a part. unused_columns: columns of the data that nothing was made of.
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
    cut: int
    unused_columns: tuple[str, ...]
    steps: int
    parameters: int
    first_loss: float
    last_loss: float
    before: Evaluation | None
    after: Evaluation | None
    precision: ChosenPrecision
    privacy: PrivacyRecord | None
    seconds: float


def client_train(proxy: str | Path, options: TrainOptions, *, progress: Progress = SILENT) -> TrainResult:
    """Train a proxy on private data and write the update, U = T − P.

    Only visible units change, unless the owner asked for the fill to be trained, too (`export_proxy`, train all).

    Args:
        proxy: a path or hf:// reference; every file must be what its proxy.json lists.
        options: see `TrainOptions`; `training.data` lists the columns of data files.
        progress: receives the number of steps done, with loss, lr, tokens_per_s and memory_gib (peak), and notes.

    Raises:
        InputError: the proxy or an option cannot be used. FormatError: a file of the proxy is malformed or was changed.
        DataError: the data cannot be used. OutputExists: `out` exists.

    Example:
        >>> client_train("proxy/", "update/", data="train.jsonl", epochs=3).last_loss
    """
    beside = {name: getattr(options, name) for name in ("sign", "residual", "log", "tensorboard")}
    keep_outside(Path(options.out), **beside)
    sign = signer(options.sign)
    with _writer(options) as writer, quiet(), memory_errors(), _prepared(proxy, options, progress) as ready:
        ready.tell_plan(progress)
        before = ready.measure(progress)
        trained = ready.train(progress)
        after = ready.measure(progress)
        path = str(Path(options.out).absolute())
        if writer is not None:
            _write_update(writer, ready, trained, before, after)
            sign([writer])
            ready.method.prepare(Path(path), writer.digests[UPDATE_MANIFEST])
            if ready.states is not None:
                ready.states.finish(UPDATE_MANIFEST, writer.digests[UPDATE_MANIFEST])
            path = str(writer.publish())
            ready.method.sent()
            if ready.states is not None:
                ready.states.remove()
        return TrainResult(
            path=path,
            proxy_id=ready.manifest.proxy_id,
            task=ready.method.loaded.task,
            examples=trained.examples,
            skipped=ready.examples.skipped,
            cut=ready.examples.cut,
            unused_columns=ready.examples.unused,
            steps=trained.steps,
            parameters=ready.method.numbers_sent,
            first_loss=trained.first_loss,
            last_loss=trained.last_loss,
            before=before,
            after=after,
            precision=ready.precision,
            privacy=privacy_record(ready.options, ready.private),
            seconds=trained.seconds,
        )


def estimate_training(proxy: str | Path, options: TrainOptions, *, progress: Progress = SILENT) -> Estimate:
    """Find out what a training would take, by a few steps that are thrown away; nothing is written.

    Args:
        proxy, options, progress: as for `client_train`.

    Raises:
        InputError, FormatError, DataError: as from `client_train`.
    """
    if options.dp_epsilon is not None:
        raise InputError("does not know private training", where="--dry-run", hint="leave out --dp-epsilon")
    if launched().count > 1:
        raise InputError("is for one process", where="--dry-run", hint="start it without a launcher")
    unwritten = replace(options, save_every=None, log=None, tensorboard=None)
    with quiet(), memory_errors(), _prepared(proxy, unwritten, progress) as ready:
        work = (ready.model, ready.examples, ready.trainable, ready.options, ready.encoder.padding)
        return measured(*work, ready.method.bytes_sent(options), progress, ready.method.tokens_at_once)


def _writer(options: TrainOptions) -> Any:
    """The writer of the output; None in all processes but the first."""
    if not launched().is_first:
        return nullcontext()
    remove_finished(Path(options.out), Path(options.out))
    if options.residual is not None:  # a run that was killed after its update appeared is at its end, too
        settle_published(Path(options.residual))
    # A signature lists SHA-256, so with one the files are hashed only once.
    digest: Algorithm = "sha256" if options.sign else "blake3"
    return ArtifactWriter(Path(options.out), force=options.force, replaces=[UPDATE_MANIFEST], digest=digest)


@dataclass(slots=True)
class _Ready:
    """Everything that a round needs, loaded and checked."""

    folder: Path
    manifest: ProxyManifest
    method: Method
    trainable: Trainable
    encoder: Encoder
    examples: Examples
    held_out: Examples | None
    options: TrainOptions
    precision: ChosenPrecision
    processes: Processes
    states: StateFolder | None
    private: TrainingPrivacy | None

    @property
    def model(self) -> Any:
        """The model, on its device."""
        return self.method.loaded.model

    def tell_plan(self, progress: Progress) -> None:
        """Say how much memory is held, before any of it is taken."""
        plan = MemoryPlan.of(self.model, self.trainable, self.options)
        if self.processes.is_first:
            progress.note(
                f"training {plan.trained:,} of {plan.parameters:,} numbers: {size(plan.total)} for weights, gradients "
                f"and optimizer ({plan.per_parameter:.1f} bytes per parameter), and activations on top"
            )

    def measure(self, progress: Progress) -> Evaluation | None:
        """The model on the evaluation data, in the first process."""
        if self.held_out is None or not self.processes.is_first:
            return None
        twice = 2 * self.options.batch_size
        return score(self.model, self.held_out, batch_size=twice, padding=self.encoder.padding, progress=progress)

    def train(self, progress: Progress) -> TrainingSummary:
        """Train the model in place."""
        if self.private is not None:
            recipe, padding = self.options, self.encoder.padding
            return train_privately(self.model, self.examples, self.trainable, recipe, self.private, padding, progress)
        log, board = self.options.log, self.options.tensorboard
        first = self.processes.is_first
        with journals(
            Path(log) if log is not None and first else None, Path(board) if board is not None and first else None
        ) as listeners:
            around = Surroundings(
                processes=self.processes,
                states=self.states,
                journals=listeners,
                tokens_at_once=self.method.tokens_at_once,
            )
            return train(
                self.model, self.examples, self.trainable, self.options, self.encoder.padding, progress, around
            )


@contextmanager
def _prepared(proxy: str | Path, options: TrainOptions, progress: Progress) -> Iterator[_Ready]:
    """Load the proxy and the data; the proxy's files stay open within this block."""
    if options.dp_epsilon is not None:
        require_opacus()
    device = own_device(choose_device(options.device))
    precision = choose_precision("fp32" if options.dp_epsilon is not None else options.precision, device)
    options = replace(options, precision=precision)
    if options.dp_epsilon is not None and launched().count > 1:
        raise InputError("is for one process", where="--dp-epsilon", hint="start it without a launcher")
    with ExitStack() as stack:
        processes = stack.enter_context(joined(device))
        data = processes.in_first(lambda: _Data.of(options))
        folder = resolve(str(proxy)).path
        manifest = verify_proxy(folder)
        if options.verify_key is not None:
            known = manifest.files | {PROXY_MANIFEST: file_digest(folder / PROXY_MANIFEST)}
            verify_signed(folder, options.verify_key, known)
        checkpoint = stack.enter_context(Checkpoint.open(folder))
        states = _states(options, folder, processes)
        if states is not None and processes.is_first:
            stack.enter_context(states.opened())
        method = _method(checkpoint, manifest, options, device)
        if options.packing:
            _check_packing(method.loaded)
        encoder = Encoder.of(method.loaded, options.max_length)
        examples, held_out = _encode(encoder, data, options, processes, progress)
        del data  # short texts would stay in memory
        yield _Ready(
            folder=folder,
            manifest=manifest,
            method=method,
            trainable=method.trainable(),
            encoder=encoder,
            examples=examples,
            held_out=held_out,
            options=options,
            precision=precision,
            processes=processes,
            states=states,
            private=plan_privacy(options, options, len(examples)),
        )


def _method(checkpoint: Checkpoint, manifest: ProxyManifest, options: TrainOptions, device: torch.device) -> Method:
    """The proxy, loaded for the method that the options name. Raises InputError, FormatError."""
    if options.method == "lora":
        from fedqsn_cli.training.methods.lora import LoraMethod  # imports peft, which takes long

        return LoraMethod.load(checkpoint, manifest, options, device)
    return FullMethod.load(checkpoint, manifest, options, device)


def _check_packing(loaded: Loaded) -> None:
    """Refuse a model that cannot keep the texts of a row apart. Raises InputError."""
    if loaded.task != "causal-lm":
        raise InputError("is for causal language models", where="--packing", hint="train without it")
    check_separation(loaded.model)


@dataclass(frozen=True, slots=True)
class _Data:
    """The files to train and to measure on; both can be read."""

    train: DataFile
    held_out: DataFile | None

    @classmethod
    def of(cls, options: TrainOptions) -> _Data:
        """Look through both. Raises DataError."""
        return cls(open_data(options.data), open_data(options.eval_data) if options.eval_data is not None else None)


def _encode(
    encoder: Encoder, data: _Data | None, options: TrainOptions, processes: Processes, progress: Progress
) -> tuple[Examples, Examples | None]:
    """The data as token ids: what is trained on in all processes, and in the first what is measured on."""
    folder = Path(options.out).absolute().parent

    def encode() -> tuple[Examples, Examples | None]:
        assert data is not None
        train = replace(encoder, seed=options.seed).encode(data.train, progress, folder=folder)
        return train, encoder.encode(data.held_out, progress, folder=folder) if data.held_out is not None else None

    own, held_out = processes.in_first(encode) or (None, None)
    examples = shared(own, processes, folder)
    if options.packing:
        examples = packed(examples, max(encoder.max_length, max(examples.lengths)))
    return examples, held_out


def _states(options: TrainOptions, folder: Path, processes: Processes) -> StateFolder | None:
    """Where the states of this training are kept."""
    if options.save_every is None:
        return None
    facts = facts_of(options, NOT_BINDING)
    digest = processes.in_first(lambda: file_digest(Path(options.data)))
    facts |= {"PROXY": file_digest(folder / PROXY_MANIFEST)}
    facts["--data"] = processes.from_first((digest or "").encode()).decode()
    facts["number of processes"] = processes.count
    return StateFolder(Path(options.out), facts, options.save_every)


def _write_update(
    writer: ArtifactWriter,
    ready: _Ready,
    trained: TrainingSummary,
    before: Evaluation | None,
    after: Evaluation | None,
) -> None:
    """Write the update's tensors and update.json."""
    options = ready.options
    facts = ready.method.write(writer, options)
    update.write_manifest(
        writer,
        **facts,
        proxy_id=ready.manifest.proxy_id,
        proxy_sha256=file_digest(ready.folder / PROXY_MANIFEST),
        num_examples=trained.examples,
        steps=trained.steps,
        losses=reported_losses(options, trained, before, after),
        precision=options.update_format,
        tool=f"fedqsn {VERSION}",
        privacy=privacy_record(options, ready.private),
    )
