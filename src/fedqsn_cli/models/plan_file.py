"""A user's plan file on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedqsn_cli.checkpoint.files import read_file
from fedqsn_cli.planning.overrides import parse_overrides

_LARGEST = 4 << 20  # bytes


def load_overrides(path: str | Path) -> dict[str, Any]:
    """Read a TOML plan file; see `parse_overrides` for what it gives and raises.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    return parse_overrides(read_file(Path(path), _LARGEST), path)
