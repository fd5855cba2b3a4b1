"""Data files as one table."""

from __future__ import annotations

from pathlib import Path

from fedqsn_cli.training.data.data_files import open_data
from fedqsn_cli.training.data.tables import Table


def read_table(path: str | Path) -> Table:
    """A data file, whole and in memory. Raises DataError, as `open_data`."""
    return open_data(path).table()
