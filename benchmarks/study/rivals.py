"""Methods that the product's options cannot express.

local     every client trains the public base on its own data; figures are the mean over clients
fedlpp    FedLPP's idea: a quantized proxy (nf3) of the whole model, LoRA adapters on it, their products averaged
          and added to the owner's model
offsite   offsite tuning's idea: the first and the last layer are trained on an emulator that lacks every other
          layer between them, and are plugged back in
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.study.attack import fine_tuned
from benchmarks.study.jobs import Job, released
from benchmarks.study.settings import Cell, Task
from benchmarks.study.training import Trainee, dense_state, mean_delta, rate, write_state
from benchmarks.study.worlds import World

RANK = 8
State = dict[str, Any]
Floor = Mapping[int, float]
_LAYER = re.compile(r"^(.*\.layers?\.)(\d+)(\..*)$")


def local(cell: Cell, place: World, folder: Path, floor: Floor) -> dict[str, Any]:
    """Nothing is sent: clients train what is public."""
    task, scores = place.task, []
    for index, name in enumerate(place.clients):
        trainee = Trainee.open(place.base, task)
        trainee.train(place.data(name), steps=task.rounds * task.round_steps, lr=task.lr, seed=cell.seed * 1000 + index)
        scores.append({part: trainee.score(place.data(f"test_{part}")) for part in ("a", "b")})
    return {
        "final": {part: _mean([score[part] for score in scores]) for part in ("a", "b")},
        "never_sent": 1.0,
        "bytes_down": 0,
        "bytes_up": 0,
        "rate": task.lr,
    }


def _mean(scores: list[dict[str, float | None]]) -> dict[str, float | None]:
    return {
        key: mean(value for score in scores if (value := score[key]) is not None)
        if scores[0][key] is not None
        else None
        for key in scores[0]
    }


def fedlpp(cell: Cell, place: World, folder: Path, floor: Floor) -> dict[str, Any]:
    """Quantized LoRA: the proxy and its audit by the product, the adapters by peft."""
    job = Job(cell, place, folder, floor)
    with job.clock.part("owner"):
        shutil.rmtree(job.mask())
    current, result, lr = place.owner, dict[str, Any](), 0.0
    for number in range(1, place.task.rounds + 1):
        with job.clock.part("owner"):
            proxies = job.export(current, number)
        if number == 1:
            result = released(job, proxies)
        deltas, counts = [], []
        with job.clock.part("train"):
            for index, name in enumerate(place.clients):
                delta, count, numbers, lr = _adapt(cell, place, proxies / name, name, 10 * number + index)
                deltas.append(delta)
                counts.append(count)
                job.bytes_up += 4 * numbers
        current = _moved(current, mean_delta(deltas, counts), folder / f"model-{number}")
        shutil.rmtree(proxies)
    return result | {
        "final": place.scores(current),
        "never_sent": 0.0,
        "bytes_down": job.bytes_down,
        "bytes_up": job.bytes_up,
        "rate": lr,
        "parts": job.clock.seconds,
    }


def _adapt(cell: Cell, place: World, proxy: Path, name: str, seed: int) -> tuple[State, int, int, float]:
    """One client's adapters: differences of weights, examples, numbers to send, learning rate."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    trainee, task = Trainee.open(proxy, place.task), place.task
    torch.manual_seed(cell.seed * 1000 + seed)
    before = {key: value.clone() for key, value in trainee.model.named_parameters() if key.startswith("classifier")}
    targets = [
        key
        for key, module in trainee.model.named_modules()
        if isinstance(module, torch.nn.Linear) and key not in {"classifier", "lm_head"}
    ]
    total = sum(parameter.numel() for parameter in trainee.model.parameters())
    model = inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets), trainee.model)
    for key, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in key or key.startswith("classifier")
    numbers = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    lr = rate(task, numbers / total)
    count = trainee.train(place.data(name), steps=task.round_steps, lr=lr, seed=cell.seed * 1000 + seed)
    delta = {
        f"{key}.weight": module.get_delta_weight("default").detach()
        for key, module in model.named_modules()
        if isinstance(module, Linear)
    }
    after = dict(model.named_parameters())
    delta |= {key: (after[key] - value).detach() for key, value in before.items()}
    return delta, count, numbers, lr


def _moved(source: Path, delta: Mapping[str, Any], out: Path) -> Path:
    """The model of `source` with differences added, written to `out`."""
    state = dense_state(source)
    missing = delta.keys() - state.keys()
    assert not missing, f"the checkpoint lacks {sorted(missing)[0]}"
    moved = {name: tensor + delta[name] if name in delta else tensor for name, tensor in state.items()}
    write_state(out, moved, source)
    return out


def offsite(cell: Cell, place: World, folder: Path, floor: Floor) -> dict[str, Any]:
    """An emulator with some layers left out, its first and last layer trained and plugged back in."""
    task, whole = place.task, dense_state(place.owner)
    kept = kept_layers(whole)
    trained = {kept[0], kept[-1]}
    result: dict[str, Any] = {}
    down = up = 0
    for number in range(1, task.rounds + 1):
        emulator = folder / f"emulator-{number}"
        write_state(emulator, _without_layers(whole, kept), place.owner, layers=len(kept))
        down += task.clients * (emulator / "model.safetensors").stat().st_size
        if number == 1:
            result = _attacked(cell, place, emulator, whole, kept)
        deltas, counts = [], []
        for index, name in enumerate(place.clients):
            seed = cell.seed * 1000 + 10 * number + index
            delta, count, lr = _tune_ends(task, emulator, place.data(name), kept, seed)
            deltas.append({_renumbered(key, kept): value for key, value in delta.items()})
            counts.append(count)
            up += 4 * sum(value.numel() for value in delta.values())
        step = mean_delta(deltas, counts)
        assert {layer_of(name) for name in step} - {None} == trained
        whole = {name: tensor + step[name] if name in step else tensor for name, tensor in whole.items()}
        shutil.rmtree(emulator)
    write_state(folder / "final", whole, place.owner)
    sizes = {name: tensor.numel() for name, tensor in whole.items()}
    dropped = sum(size for name, size in sizes.items() if layer_of(name) is not None and layer_of(name) not in kept)
    return result | {
        "final": place.scores(folder / "final"),
        "never_sent": dropped / sum(sizes.values()),
        "bytes_down": down,
        "bytes_up": up,
        "rate": lr,
    }


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to."""
    found = _LAYER.match(name)
    return int(found.group(2)) if found else None


def kept_layers(state: Mapping[str, Any]) -> list[int]:
    """The layers of the emulator: the first, the last, and every other one between them."""
    last = max(number for name in state if (number := layer_of(name)) is not None)
    return [0, *range(2, last, 2), last]


def _without_layers(state: Mapping[str, Any], kept: list[int]) -> State:
    """The tensors of the emulator, its layers numbered without gaps."""
    found = {}
    for name, tensor in state.items():
        number = layer_of(name)
        if number is None:
            found[name] = tensor
        elif number in kept:
            found[_LAYER.sub(rf"\g<1>{kept.index(number)}\g<3>", name)] = tensor
    return found


def _renumbered(name: str, kept: list[int]) -> str:
    """The whole model's name of an emulator's tensor."""
    number = layer_of(name)
    return name if number is None else _LAYER.sub(rf"\g<1>{kept[number]}\g<3>", name)


def _tune_ends(task: Task, emulator: Path, data: Path, kept: list[int], seed: int) -> tuple[State, int, float]:
    """One client: the first and last layer and the classifier are trained, all else is frozen."""
    trainee, ends = Trainee.open(emulator, task), {0, len(kept) - 1}
    before = {}
    for key, parameter in trainee.model.named_parameters():
        parameter.requires_grad = layer_of(key) in ends or key.startswith("classifier")
        if parameter.requires_grad:
            before[key] = parameter.detach().clone()
    total = sum(parameter.numel() for parameter in trainee.model.parameters())
    lr = rate(task, sum(value.numel() for value in before.values()) / total)
    count = trainee.train(data, steps=task.round_steps, lr=lr, seed=seed)
    after = dict(trainee.model.named_parameters())
    return {key: (after[key] - value).detach() for key, value in before.items()}, count, lr


def _attacked(cell: Cell, place: World, emulator: Path, whole: State, kept: list[int]) -> dict[str, Any]:
    """The emulator as it is, or with the public base's layers where some were left out."""
    base = dense_state(place.base)
    filled = {
        name: base[name] if (number := layer_of(name)) is not None and number not in kept else tensor
        for name, tensor in whole.items()
    }
    release = place.scores(emulator)
    attack = fine_tuned(place, place.base, {"layers of the public base": filled}, cell.sizes)
    if (release["a"]["loss"] or 0.0) < attack["curve"][0]["loss"]:
        attack = fine_tuned(place, emulator, {"as sent": None}, cell.sizes)
    return {"release": release, **attack}
