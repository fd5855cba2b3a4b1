"""Presets: options that go together, by one name. What is given beside a preset wins over it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from fedqsn_cli.errors import InputError

Schedule = Literal["fresh", "sticky"]
Train = Literal["visible", "all"]


@dataclass(frozen=True, slots=True)
class Choices:
    """The options that a preset may set, as `mask` and `export_proxy` take them; None is not set."""

    fill: Literal["zero", "base"] | None = None
    where: str | None = None
    p1: float | None = None
    schedule: Schedule | None = None
    train: Train | None = None


PRESETS: dict[str, Choices] = {
    "paper": Choices(fill="zero", where="outputs", schedule="fresh"),
    "strong": Choices(fill="base", where="all", p1=0.5, schedule="sticky", train="all"),
}


def chosen(preset: str | None, given: Choices, *, public_base: str | None) -> Choices:
    """What was given, filled up from a preset.

    Raises:
        InputError: there is no such preset, or it needs a public base and none was given.
    """
    if preset is None:
        return given
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}", where="--preset", hint=" or ".join(PRESETS))
    both = {field.name: (getattr(given, field.name), getattr(PRESETS[preset], field.name)) for field in fields(Choices)}
    made = Choices(**{name: ours if own is None else own for name, (own, ours) in both.items()})
    if made.fill == "zero" and given.train is None:
        made = replace(made, train=None)  # there is nothing in the holes to train
    if made.fill == "base" and public_base is None:
        hint = f"preset {preset} fills the holes with a public model's neurons; give --public-base, or --fill zero"
        raise InputError("--fill base needs the public base", where="--public-base", hint=hint)
    return made
