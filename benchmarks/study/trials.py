"""Changes to the preset strong that the product does not offer, because what they bring was measured here first.

largest      hides the units with the largest secret difference, instead of drawing them by the key
replacement  the server takes over what clients hold, quantization error and all, instead of adding differences
layers       one blend for every layer, looked for layer by layer, instead of one for all
rounds       the model is consolidated in every round, and the next proxies are made of the result; beside it, `ending`
             consolidates once, after the last round, as the product's documents propose
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.study.jobs import OWNER, Job, play
from benchmarks.study.settings import Cell
from benchmarks.study.training import Trainee, dense_state, rate
from benchmarks.study.worlds import World

State = dict[str, Any]
Floor = Mapping[int, float]
_PART = re.compile(r"layers?\.\d+\.")
_TRIES = (0.0, 0.25, 0.5, 0.75, 1.0)
_WEIGHT = 0.75  # of the clients' teacher in a consolidation


def largest(cell: Cell, place: World, folder: Path, floor: Floor) -> dict[str, Any]:
    """The whole job with other units hidden."""
    with chosen_by_difference(place):
        return play(cell, place, folder, floor)


@contextmanager
def chosen_by_difference(place: World) -> Iterator[None]:
    """Masks hide the units whose squared difference between owner and base is largest, over all tensors of a group."""
    from fedqsn_cli.masks import job_masks

    moved = group_differences(place)

    def chosen(key: bytes, group: str, units: int, ratio: float) -> Any:
        import numpy as np

        from fedqsn_cli.masks.draw import hidden_count

        found = np.zeros(units, dtype=bool)
        found[np.argsort(-moved[group], kind="stable")[: hidden_count(units, ratio)]] = True
        return found

    drawn = job_masks.hidden_units
    job_masks.hidden_units = chosen
    try:
        yield
    finally:
        job_masks.hidden_units = drawn


def group_differences(place: World) -> dict[str, Any]:
    """[units] of each group: the sum of squares of owner minus base."""
    import numpy as np

    from fedqsn_cli.models.model import open_model

    owner, base = dense_state(place.owner), dense_state(place.base)
    found: dict[str, Any] = {}
    for tensor in open_model(str(place.owner)).plan.tensors:
        if not tensor.masked or tensor.axis is None:
            continue
        lead, rows, cols = tensor.view
        squares = (owner[tensor.name] - base[tensor.name]).double().numpy().reshape(lead, rows, cols) ** 2
        sums = squares.sum(axis=2).reshape(-1) if tensor.axis == "row" else squares.sum(axis=1).reshape(-1)
        for name, part in zip(tensor.groups, np.split(sums, len(tensor.groups)), strict=True):
            found[name] = found.get(name, 0.0) + part
    return found


def replacement(cell: Cell, place: World, folder: Path, floor: Floor) -> dict[str, Any]:
    """The job without an attack: what is sent first is the same."""
    from fedqsn_cli import mask

    job, current = Job(cell, place, folder, floor), folder / "model-0"
    shutil.rmtree(job.mask())
    shutil.copytree(place.owner, current)
    for number in range(1, place.task.rounds + 1):
        job.export(current, number)
        sent = job.export(current, number, clients=[OWNER], p2=0.0)
        lost = _rounded_off(job, sent / OWNER if (sent / OWNER).is_dir() else sent, current)
        current = job.merge(current, number)
        _add(current / "model.safetensors", lost)
    server = folder / "trained"
    mask(str(current), server, key=job.key, **job.hiding())
    final, made = job.restore(server, None)
    return _outcome(job, place.scores(final), made.blend)


def _rounded_off(job: Job, proxy: Path, model: Path) -> State:
    """What quantization took from the visible units of a model: proxy minus model there, nothing in the holes."""
    import torch

    from fedqsn_cli.masks import job_key
    from fedqsn_cli.masks.job_masks import ServerMasks
    from fedqsn_cli.models.model import open_model

    masks, whole, sent = ServerMasks(job_key.load(job.key)), dense_state(model), dense_state(proxy)
    lost = {}
    for tensor in open_model(str(model)).plan.tensors:
        if not tensor.masked:
            continue
        lead, rows, cols = tensor.view
        change = (sent[tensor.name].float() - whole[tensor.name].float()).numpy().reshape(lead * rows, cols)
        hidden = masks.hidden(tensor)
        assert hidden is not None
        for first in range(0, lead * rows, rows):
            hidden.overwrite(change[first : first + rows], first, None)
        lost[tensor.name] = torch.from_numpy(change).reshape(whole[tensor.name].shape)
    return lost


def _add(file: Path, change: State) -> None:
    """Add to the tensors of a file."""
    from safetensors.torch import load, save_file

    state = load(file.read_bytes())
    save_file(
        {name: value + change[name] if name in change else value for name, value in state.items()},
        file,
        {"format": "pt"},
    )


def layers(cell: Cell, place: World, folder: Path, floor: Floor) -> dict[str, Any]:
    """The job without an attack, and the blend of one part of the model after the other."""
    job = Job(cell, place, folder, floor)
    server = job.trained()
    start, end = (dense_state(job.restore(server, blend)[0]) for blend in (0.0, 1.0))
    parts = list(dict.fromkeys(map(_part, start)))

    def trainee(blends: Mapping[str, float]) -> Trainee:
        state = {
            name: value + blends[_part(name)] * (end[name] - value) if value.is_floating_point() else value
            for name, value in start.items()
        }
        return Trainee.open(place.owner, place.task, state)

    def loss(blends: Mapping[str, float]) -> float:
        return trainee(blends).score(place.data("dev"))["loss"] or 0.0

    found = min((dict.fromkeys(parts, i / 8) for i in range(9)), key=loss)
    for part in parts:
        found = min((found | {part: value} for value in sorted({*_TRIES, found[part]})), key=loss)
    best = trainee(found)
    scores = {part: best.score(place.data(f"test_{part}")) for part in ("a", "b")}
    return _outcome(job, scores, None) | {"layers": found}


def _part(name: str) -> str:
    """The layer that a tensor belongs to, or what stands for all that belongs to none."""
    found = _PART.search(name)
    return found.group() if found else "rest"


def ending(cell: Cell, place: World, folder: Path, floor: Floor) -> dict[str, Any]:
    """The job without an attack, ended by one consolidation."""
    job = Job(cell, place, folder, floor)
    return _outcome(job, place.scores(job.consolidate(job.trained(), _WEIGHT)), None)


def rounds(cell: Cell, place: World, folder: Path, floor: Floor) -> dict[str, Any]:
    """The same with a consolidation after each round, whose result is masked again for the next one."""
    job, number = Job(cell, place, folder, floor), 1
    server = job.mask()
    job.export(server, number)
    final = job.consolidate(job.merge(server, number), _WEIGHT)
    while number < place.task.rounds:
        number += 1
        server = job.mask_with_key(final, folder / "masked")
        shutil.rmtree(final)
        job.export(server, number)
        final = job.consolidate(job.merge(server, number), _WEIGHT)
    return _outcome(job, place.scores(final), None)


def _outcome(job: Job, scores: dict[str, Any], blend: float | None) -> dict[str, Any]:
    return {
        "final": scores,
        "blend": blend,
        "rate": rate(job.place.task, job.share),
        "never_sent": job.never_sent,
        "bytes_down": job.bytes_down,
        "bytes_up": job.bytes_up,
        "parts": job.clock.seconds,
    }
