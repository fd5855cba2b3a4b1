"""Where the server mask hides, and how much: `--where`, `--layers`, `--p1-schedule`, as a part of the plan's overrides.

    where = "outputs"              # of every layer: its outputs and the embeddings; or mlp, or attention
    layers = "embeddings,0-3"      # nothing outside of these
    p1 = {"0-2" = 0.9, "head" = 0.5}   # other ratios than the job's

A place is a numbered layer, `embeddings`, or `head`: everything after the layers. A tied head goes with the embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fedqsn_cli import validate
from fedqsn_cli.errors import InputError, PlanError
from fedqsn_cli.planning.roles import LINEAR_ROLES, rules
from fedqsn_cli.planning.tensor_plan import Where

Location = int | Literal["embeddings", "head"]

WHERE: tuple[str, ...] = get_args(Where)
FIELDS = ("where", "layers", "p1")
OPTIONS = {"where": "--where", "layers": "--layers", "p1": "--p1-schedule"}

_WORDS: dict[str, Location] = {"embeddings": "embeddings", "head": "head"}
_RANGE = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")
_LAYERS_HINT = "list layers as in embeddings,0-3,5,head"


@dataclass(frozen=True, slots=True)
class Placement:
    """What the options say, ready to be asked about tensors.

    Args:
        where: the parts of layers that are hidden. layers: the only places where anything is; None for everywhere.
        ratios: p1 of places that have their own. strict: refuse to guess which part of a layer a matrix is.
    """

    where: str = "all"
    layers: frozenset[Location] | None = None
    ratios: Mapping[Location, float] = field(default_factory=dict)
    strict: bool = True

    @classmethod
    def of(cls, overrides: Mapping[str, Any]) -> Placement:
        """Of overrides in canonical form."""
        layers = parse_layers(overrides["layers"]) if "layers" in overrides else None
        ratios = {place: ratio for text, ratio in overrides.get("p1", {}).items() for place in parse_layers(text)}
        return cls(overrides.get("where", "all"), layers, ratios)

    def excludes(self, name: str, role: str, place: Location, *, embedding: bool) -> str | None:
        """The option that leaves a weight visible, None if it is hidden.

        Args:
            embedding: it is an embedding, or tied to one.

        Raises:
            PlanError: nothing tells which part of a layer it is.
        """
        if self.layers is not None and place not in self.layers:
            return OPTIONS["layers"]
        return None if self.where == "all" or self._is_there(name, role, embedding) else OPTIONS["where"]

    def _is_there(self, name: str, role: str, embedding: bool) -> bool:
        if embedding or role not in LINEAR_ROLES:
            return embedding and self.where == "outputs"
        part = rules().part(name)
        if part is None and not self.strict:
            return True
        if part is None:
            raise PlanError(
                f"no rule knows which part of a layer this is, so where = {self.where} says nothing about it",
                where=name,
                hint="set masked = true or false for it in a plan file given with --plan-file",
            )
        return part.output if self.where == "outputs" else part.name == self.where

    def check(self, locations: set[Location]) -> None:
        """Refuse places that the model does not have.

        Raises:
            PlanError: there is one.
        """
        for option, asked in ((OPTIONS["layers"], self.layers or ()), (OPTIONS["p1"], self.ratios)):
            for place in sorted(set(asked) - locations, key=str):
                what = f"no layer {place}" if isinstance(place, int) else f"no {place} of its own"
                hint = f"it has {layers_text(locations)}" if locations else None
                if place == "head":
                    hint = "a head that is tied to the embeddings goes with them"
                raise PlanError(f"the model has {what}", where=option, hint=hint)


def location_of(name: str, *, embedding: bool) -> Location:
    """The place of a weight: its layer, else embeddings or head."""
    layer = rules().layer(name)
    if layer is not None:
        return layer
    return "embeddings" if embedding or rules().before_layers.search(name) else "head"


def parse_layers(text: str) -> frozenset[Location]:
    """The places that a list such as "embeddings,0-3,5" names.

    Raises:
        InputError: an item is not a layer, a range of layers, embeddings or head.
    """
    locations: set[Location] = set()
    for item in text.split(","):
        word = item.strip()
        if word in _WORDS:
            locations.add(_WORDS[word])
            continue
        found = _RANGE.fullmatch(word)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if first > last:
            raise InputError(f"{word!r} is neither a layer nor a range of layers", hint=_LAYERS_HINT)
        locations.update(range(first, last + 1))
    return frozenset(locations)


def layers_text(locations: Iterable[Location]) -> str:
    """The shortest list that names these places; equal sets give equal text."""
    locations = set(locations)
    numbers = sorted(place for place in locations if isinstance(place, int))
    words = sorted(place for place in locations if not isinstance(place, int))
    starts = [number for number in numbers if number - 1 not in locations]
    ends = [number for number in numbers if number + 1 not in locations]
    ranges = (str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
    return ",".join([*words, *ranges])


def parse_schedule(text: str) -> dict[str, float]:
    """A schedule such as "0-2=0.9,head=0.5" in canonical form.

    Raises:
        InputError: it is not a valid schedule: an item or a ratio is invalid, or a layer is given two ratios.
    """
    pairs = []
    for item in text.split(","):
        locations, equals, ratio = item.partition("=")
        try:
            pairs.append((locations, float(ratio)))
        except ValueError:
            what = f"{ratio.strip()!r} is not a ratio" if equals else f"{item.strip()!r} has no ratio"
            raise InputError(what, hint="write a schedule as in 0-2=0.9,embeddings=0.2") from None
    return _schedule(pairs)


def schedule_text(schedule: Mapping[str, float]) -> str:
    """A schedule as `--p1-schedule` takes it."""
    return ",".join(f"{part}={ratio!r}" for text, ratio in schedule.items() for part in text.split(","))


def canonical_placement(document: Mapping[str, Any], place: object) -> dict[str, Any]:
    """The fields where, layers and p1 of overrides, checked, as far as they say anything.

    Raises:
        PlanError: one of them is malformed.
    """
    found: dict[str, Any] = {}
    try:
        if document.get("where", "all") != "all":
            found["where"] = check_where(document["where"])
        if "layers" in document:
            found["layers"] = layers_text(parse_layers(_text(document["layers"], "layers")))
        if document.get("p1", {}) != {}:
            found["p1"] = _schedule(_pairs(document["p1"]))
    except InputError as error:
        raise PlanError(error.what, where=place, hint=error.hint) from None
    return found


def check_where(where: object) -> str:
    """Check a value of `--where`. Raises InputError when it is invalid."""
    if not isinstance(where, str) or where not in WHERE:
        raise InputError(f"where = {where!r}: no such place", hint=f"choose one of {', '.join(WHERE)}")
    return where


def parse_placement(where: str | None, layers: str | None, schedule: str | None) -> dict[str, Any]:
    """What the three options say, in canonical form, "all" included.

    Raises:
        InputError: one of them is malformed; `where` names the option.
    """
    asked: dict[str, Any] = {}
    for name, value, parse in (
        ("where", where, check_where),
        ("layers", layers, lambda text: layers_text(parse_layers(text))),
        ("p1", schedule, parse_schedule),
    ):
        try:
            if value is not None:
                asked[name] = parse(value)
        except InputError as error:
            raise InputError(error.what, where=OPTIONS[name], hint=error.hint) from None
    return asked


def describe(name: str, value: Any) -> str:
    """A field of overrides as people read it; None stands for not given."""
    if name == "p1":
        return f"p1 schedule {schedule_text(value)}" if value else "no p1 schedule"
    return f"{name} {value or ('all' if name == 'where' else 'unlimited')}"


def _schedule(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Layers -> ratio, layers of one ratio together: a schedule gives the same text, however it was written."""
    ratios: dict[Location, float] = {}
    for text, ratio in pairs:
        for place in parse_layers(text):
            if place in ratios:
                raise InputError(f"{'layer ' if isinstance(place, int) else ''}{place} is given two ratios")
            ratios[place] = validate.ratio(ratio)
    alike: dict[float, set[Location]] = {}
    for place, ratio in ratios.items():
        alike.setdefault(ratio, set()).add(place)
    return dict(sorted((layers_text(locations), ratio) for ratio, locations in alike.items()))


def _pairs(table: object) -> list[tuple[str, float]]:
    if not isinstance(table, Mapping):
        raise InputError("p1 must be a table of layers and ratios", hint='write [p1] and "0-2" = 0.9')
    return [(text, checked_ratio(ratio)) for text, ratio in table.items()]


def checked_ratio(value: object) -> float:
    """A ratio as TOML or JSON writes it. Raises InputError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"p1 must be a number, not {value!r}")
    return validate.ratio(value)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} must be text, not {value!r}", hint=_LAYERS_HINT)
    return value
