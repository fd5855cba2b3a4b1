"""Numbers, sizes and names as text for people, and values as JSON; nothing here prints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any


def size(count: float) -> str:
    """Bytes for people: `87.3 MB` (decimal, as disks and networks count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def percent(share: float) -> str:
    """A share from 0 to 1 for people: `9.97 %`."""
    return f"{100 * share:.3g} %" if 0 < share < 0.995 else f"{100 * share:.4g} %"


def number(count: int) -> str:
    """A count for people: `22,713,216`."""
    return f"{count:,}"


def real(value: float | None) -> str:
    """A measured value for people: `0.6931`, a dash for none."""
    return "-" if value is None else f"{value:.4g}"


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names that a file gives, of which there may be any number: `a, b, c and 7 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def plain(value: Any) -> Any:
    """The value as JSON can hold it: records become objects, paths become text, NaN and infinities null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(mode="json"))
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, PurePath) else value


def clean(dirty: str) -> str:
    """The text without control characters: names in files of others must not steer the terminal."""
    if dirty.isprintable():
        return dirty
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in dirty)
