"""What an attacker gets: the audit's function recovery, and the same with nothing of the owner's (the floor)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.training import Trainee
from benchmarks.study.worlds import World

LEARNING_RATES = (1e-4, 3e-4, 1e-3)  # this, and the steps below, as the audit has them
LEAST_STEPS, MOST_STEPS, BATCH = 40, 600, 16
Curve = list[dict[str, Any]]


def audited(
    place: World, key: Path, ledger: Path, proxies: Sequence[Path], sizes: Sequence[int], floor: Mapping[int, float]
) -> dict[str, Any]:
    """What the audit says of one round's proxies, all clients colluding.

    Args:
        floor: losses of the public base after so many public examples, which the audit then need not repeat.

    Returns:
        attack: which weights it starts from. curve: loss and accuracy on A after so many public examples. weights:
        share of the secret difference to the base that is recovered.

    Raises:
        RuntimeError: the audit could not measure it.
    """
    from fedqsn_cli.auditing.completeness import Collector
    from fedqsn_cli.auditing.inputs import open_inputs
    from fedqsn_cli.auditing.recovery.function import FunctionOptions, recover_function
    from fedqsn_cli.auditing.truth_pass import recover_weights
    from fedqsn_cli.options import AuditOptions

    collector = Collector()
    inputs = open_inputs(
        proxies, collector, AuditOptions(truth=place.owner, key=key, ledger=ledger, public_base=place.base)
    )
    options = FunctionOptions(
        public_data=place.data("public"),
        public_examples=tuple(sizes),
        max_length=place.task.max_length,
        device="cpu",
        base_losses=floor,
    )
    found = recover_function(inputs, collector, place.data("test_a"), options)
    if found is None:
        raise RuntimeError("; ".join(one.message for one in collector.findings) or "the audit found no function")
    start = next(score for score in found.scores if score.model == "attacked")
    curve = [{"n": 0, "loss": start.loss, "accuracy": start.accuracy}]
    curve += [{"n": one.public_examples, "loss": one.loss, "accuracy": one.accuracy} for one in found.curve]
    weights = recover_weights(inputs, collector)
    return {"attack": found.attack, "curve": curve, "weights": weights[-1].peak.delta_recovered if weights else None}


def fine_tuned(
    place: World, source: Path, states: Mapping[str, Mapping[str, Any] | None], sizes: Sequence[int]
) -> dict[str, Any]:
    """The same attack on models that the audit does not know: the best of them, then that one fine-tuned.

    Args:
        source: gives architecture and tokenizer. states: weights by the name of the attack; None for the source's own.
    """
    scores = {
        name: Trainee.open(source, place.task, state).score(place.data("test_a")) for name, state in states.items()
    }
    best = min(scores, key=lambda name: scores[name]["loss"] or 0.0)
    curve: Curve = [{"n": 0, **scores[best]}]
    for count in [size for size in sizes if size <= place.task.public]:
        tried = [_attempt(place, source, states[best], count, lr) for lr in LEARNING_RATES]
        curve.append({"n": count, **min(tried, key=lambda score: score["loss"])})
    return {"attack": best, "curve": curve, "weights": None}


def _attempt(place: World, source: Path, state: Mapping[str, Any] | None, count: int, lr: float) -> dict[str, Any]:
    """Fine-tune with so many public examples: three times through them, and some steps at least."""
    trainee = Trainee.open(source, place.task, state)
    batches = -(-min(count, place.task.public) // BATCH)
    steps = min(MOST_STEPS, batches * max(3, -(-LEAST_STEPS // batches)))
    trainee.train(place.data("public"), steps=steps, lr=lr, seed=0, batch_size=BATCH, most=count)
    return {**trainee.score(place.data("test_a")), "lr": lr}
