"""`fedqsn client-train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console, text
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.artifacts.manifests import UpdatePrivacy
    from fedqsn_cli.cli.views import TrainView
    from fedqsn_cli.options import TrainOptions
    from fedqsn_cli.training import TrainResult
    from fedqsn_cli.training.data.shown import ShownExamples
    from fedqsn_cli.training.steps.estimate import Estimate

_DELTA = 1e-5  # for which ε of a noisy update is told


def client_train(
    proxy: Annotated[str, argument("PROXY", "The proxy: a folder or hf://owner/name[@revision].")],
    options: TrainOptions,
    view: TrainView,
) -> None:
    """Train a proxy on private data and write the update to send back.

    All visible neurons are trained; hidden ones get no gradient, no decay and no optimizer state. The task is read from
    the model's architecture. A line of data holds {"text", "label"} (with "text_pair" for pairs), {"tokens", "tags"},
    {"text"}, {"prompt", "completion"} (the loss counts the completion only), {"messages"} (the assistant's turns count)
    or {"source", "target"}. --show-examples prints what is learnt.

    Examples:

      fedqsn client-train proxy/ --out update/ --data train.jsonl
      fedqsn client-train proxy/ --out update/ --data train.csv --eval-data dev.csv --epochs 3 --lr 2e-5
      fedqsn client-train proxy/ --out update/ --data train.jsonl --show-examples 2
      fedqsn client-train proxy/ --out update/ --data train.jsonl --dry-run
      fedqsn client-train proxy/ --out update/ --data train.jsonl --save-every 10m --log steps.jsonl
      fedqsn client-train proxy/ --out update/ --data train.jsonl --batch-size 4 --gradient-accumulation 8 \\
          --update-format bf16
      fedqsn client-train proxy/ --out update/ --data train.jsonl --update-format nf4 --residual residual.safetensors
      fedqsn client-train proxy/ --out update/ --data train.jsonl --dp-epsilon 8 --dp-delta 1e-5 --dp-clip 1
    """
    from fedqsn_cli.training import client
    from fedqsn_cli.training.steps.processes import launched

    if view.show_examples is not None:
        _show_examples(proxy, options, view, view.show_examples)
        return
    with console.progress(view.mode if launched().is_first else "quiet") as progress:
        if view.dry_run:
            estimate = client.estimate_training(proxy, options, progress=progress)
        else:
            result = client.client_train(proxy, options, progress=progress)
    if not launched().is_first:
        return
    if view.dry_run:
        console.show(view.mode, estimate, essential=[estimate.peak_bytes], parts=[_estimated(estimate)])
    else:
        console.show(view.mode, result, essential=[result.path], parts=_parts(result))


def _show_examples(proxy: str, options: TrainOptions, view: TrainView, count: int) -> None:
    from fedqsn_cli.training.data.shown import show_examples
    from fedqsn_cli.training.steps.processes import launched

    if not launched().is_first:
        return
    with console.progress(view.mode) as progress:
        found = show_examples(proxy, options, count, progress=progress)
    counted = [sum(token.counts for token in example.tokens) for example in found.shown]
    console.show(view.mode, found, essential=counted, parts=_examples(found))


def _examples(found: ShownExamples) -> list[console.Part]:
    """Facts about all examples, then each shown one: a line a token."""
    from fedqsn_cli.cli import tables

    facts: list[tuple[str, object]] = [
        ("task", found.task),
        ("examples", text.number(found.examples)),
        ("maximum length", f"{text.number(found.max_length)} tokens"),
        *tables.rows_left_out(found.skipped, found.cut, found.unused_columns),
    ]
    parts: list[console.Part] = [console.Facts(facts)]
    for number, example in enumerate(found.shown, 1):
        label = "" if example.label is None else f", label {example.label}"
        rows = [
            (place, token.part, token.id, token.token, "counts" if token.counts else "", token.learns or "")
            for place, token in enumerate(example.tokens)
        ]
        columns = ("position", "part", "id", "token", "counts", "to learn")
        parts += [f"example {number}{label}", console.Table(columns, rows, frozenset({"position", "id"}))]
    return parts


def _estimated(estimate: Estimate) -> console.Part:
    held = estimate.weights_bytes + estimate.gradients_bytes + estimate.optimizer_bytes
    return console.Facts(
        [
            ("trained", f"{text.number(estimate.trained)} of {text.number(estimate.parameters)} numbers"),
            ("weights", text.size(estimate.weights_bytes)),
            ("gradients", text.size(estimate.gradients_bytes)),
            ("optimizer", text.size(estimate.optimizer_bytes)),
            ("together", f"{text.size(held)}, {estimate.bytes_per_parameter:.1f} bytes per parameter"),
            ("peak memory", f"{text.size(estimate.peak_bytes)}, measured"),
            ("steps", f"{text.number(estimate.steps)}, {text.number(estimate.tokens)} tokens"),
            ("time", f"{estimate.seconds:.1f} s, {estimate.seconds_per_step:.3f} s a step"),
            ("bytes sent back", text.size(estimate.update_bytes)),
        ]
    )


def _parts(result: TrainResult) -> list[console.Part]:
    from fedqsn_cli.cli import tables

    skipped = f" ({text.number(result.skipped)} rows skipped: nothing to learn from)" if result.skipped else ""
    facts: list[tuple[str, object]] = [
        ("update", result.path),
        ("trained on", f"{text.number(result.examples)} examples{skipped}"),
        ("steps", f"{text.number(result.steps)} in {result.seconds:.1f} s, {result.precision}"),
        ("training loss", f"{text.real(result.first_loss)} -> {text.real(result.last_loss)}"),
        ("numbers sent back", text.number(result.parameters)),
        *tables.rows_left_out(0, result.cut, result.unused_columns),
        *_privacy(result),
    ]
    measured = [(when, e) for when, e in (("before", result.before), ("after", result.after)) if e is not None]
    return [console.Facts(facts), *([tables.evaluations(measured)] if measured else [])]


def _privacy(result: TrainResult) -> list[tuple[str, object]]:
    """What was done for the privacy of the data, and what it gives."""
    record, facts = result.privacy, list[tuple[str, object]]()
    if record is not None and record.training is not None:
        p = record.training
        facts.append(
            ("examples", f"({text.real(p.epsilon)}, {p.delta:g})-private, noise {text.real(p.noise_multiplier)}")
        )
    if record is not None and record.update is not None:
        facts.append(("whole update", _update_privacy(record.update)))
    return facts


def _update_privacy(update: UpdatePrivacy) -> str:
    from fedqsn_cli.training.updates.update_noise import gaussian_epsilon

    if not update.noise_multiplier:
        return f"norm at most {update.clip_norm:g}; without noise, that alone gives no privacy"
    epsilon = gaussian_epsilon(_DELTA, update.noise_multiplier)
    return f"norm at most {update.clip_norm:g}, ({text.real(epsilon)}, {_DELTA:g})-private in this round"
