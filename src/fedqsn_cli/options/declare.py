"""How an option is declared: an annotated field of a frozen dataclass, which also tells its help, names and check.

    p1: Annotated[float | None, Option("Share of all neurons to hide.", "Masking", check=validate.ratio)] = None

The command line and the Python functions are both made from such fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from fedqsn_cli import validate

Check = Callable[[Any, str], Any]

REQUIRED: Any = dataclasses.MISSING


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """What an option is, besides its name, type and default.

    Args:
        help: one sentence. panel: the title that it is listed under.
        metavar: placeholder of its value; "" for the usual one of its type.
        shown: what the help shows as its default; "" for the default itself.
        check: takes the value and the option's flag; returns the value, or raises InputError. It may parse text.
        flag: its name on the command line; "" for the field's name. short: one more, such as -q.
        aliases: former flags; the command line, and Python as keywords, still take them, and no help shows them.
        env: the environment variable that the command line reads when the option is not given. Python never does.
    """

    help: str
    panel: str
    metavar: str = ""
    shown: str = ""
    check: Check | None = None
    flag: str = ""
    short: str = ""
    aliases: tuple[str, ...] = ()
    env: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base of all classes of options: every value is checked once, whoever gives it.

    Raises:
        InputError: a value cannot be used; its option is named.
    """

    FIRST: ClassVar[tuple[str, ...]] = ()
    """Options that the help shows before the others."""

    def __post_init__(self) -> None:
        for declared in options_of(type(self)):
            value = getattr(self, declared.name)
            if value is not None:
                object.__setattr__(self, declared.name, declared.checked(value))


@dataclasses.dataclass(frozen=True, slots=True)
class Declared:
    """A field of an options class.

    Args:
        hint: its type. kind: the same without None, which stands for "not given".
        default: REQUIRED if there is none. positional: Python takes it by position, too.
    """

    name: str
    hint: Any
    default: Any
    positional: bool
    option: Option

    @property
    def kind(self) -> Any:
        """Its type without None."""
        kinds = [kind for kind in get_args(self.hint) if kind is not NoneType]
        return kinds[0] if len(kinds) == 1 and NoneType in get_args(self.hint) else self.hint

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it may be; () if it is not one of a few."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def is_list(self) -> bool:
        """Whether it may be given more than once."""
        return get_origin(self.kind) is Sequence

    @property
    def flags(self) -> str:
        """`--block-size`, or both names of a switch: `--rescale/--no-rescale`."""
        return self.option.flag or "--" + self.name.replace("_", "-")

    @property
    def flag(self) -> str:
        """The name that messages use."""
        return self.flags.split("/")[0]

    @property
    def metavar(self) -> str | None:
        """Placeholder of its value; None for switches and choices, which need none."""
        if self.option.metavar or self.choices or self.kind is bool:
            return self.option.metavar or None
        return {int: "N", float: "X"}.get(self.kind, "FILE")

    @property
    def keywords(self) -> tuple[str, ...]:
        """Former names that Python still takes for it."""
        return tuple(alias.removeprefix("--").replace("-", "_") for alias in self.option.aliases)

    def checked(self, value: Any) -> Any:
        """The value, if it can be used. Raises InputError."""
        if self.choices:
            validate.choice(value, self.choices, self.flag)
        if self.option.check is not None:
            return self.option.check(value, self.flag)
        if isinstance(value, str | Path):
            validate.not_empty(str(value), self.flag)
        return value


_KNOWN: dict[type[Options], tuple[Declared, ...]] = {}  # reading annotations takes a millisecond


def options_of(cls: type[Options]) -> tuple[Declared, ...]:
    """The options of a class, in the order of its help."""
    if cls not in _KNOWN:
        _KNOWN[cls] = _declared(cls)
    return _KNOWN[cls]


def _declared(cls: type[Options]) -> tuple[Declared, ...]:
    hints = get_type_hints(cls, include_extras=True)
    found = []
    for field in dataclasses.fields(cls):
        hint, option = get_args(hints[field.name])
        found.append(Declared(field.name, hint, field.default, not field.kw_only, option))
    order = {name: position for position, name in enumerate(cls.FIRST)}
    return tuple(sorted(found, key=lambda declared: order.get(declared.name, len(order))))
