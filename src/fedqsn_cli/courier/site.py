"""site.toml: what a site trains with, and what it lets the owner ask for. The owner never sees it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedqsn_cli import validate
from fedqsn_cli.checkpoint.files import read_file
from fedqsn_cli.courier.recipe import Bounds
from fedqsn_cli.errors import FormatError, InputError

_LARGEST = 1 << 20  # bytes of site.toml

TEMPLATE = """\
# What this site trains with. The owner of the model cannot change any of it, and never sees it.
data = {data}
{eval_data}device = {device}
max_length = {max_length}
time_limit = "6h"  # a training that takes longer is ended, and no update is sent

# What the owner may ask for, at most. A round that asks for more is refused.
[bounds]
epochs = 10
lr = 0.01
batch_size = 256
update_formats = ["fp32", "bf16", "fp16", "int8", "nf4"]
"""


@dataclass(frozen=True, slots=True)
class SiteSettings:
    """What a site decides.

    Args:
        data, eval_data: its files. time_limit: seconds of a training. bounds: what the owner may ask for.
    """

    data: Path
    eval_data: Path | None
    device: str
    max_length: int
    time_limit: float
    bounds: Bounds

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the settings; paths are relative to the file.

        Raises:
            FormatError: they are malformed, or have a field that is not known. InputError: there is no such file.
        """
        try:
            document = tomllib.loads(read_file(path, _LARGEST).decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise FormatError(f"not valid TOML ({error})", where=path) from None
        try:
            return cls._of(document, path.parent)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"a setting is missing, unknown or of another type ({error})", where=path) from None

    @classmethod
    def _of(cls, document: dict[str, Any], home: Path) -> Self:
        bounds = document.pop("bounds")
        formats = tuple(bounds.pop("update_formats"))
        evaluation = document.pop("eval_data", None)
        _, seconds = validate.interval(document.pop("time_limit"), "time_limit")
        if seconds is None:
            raise InputError("is a time such as 6h", where="time_limit")
        return cls(
            data=home / document.pop("data"),
            eval_data=home / evaluation if evaluation is not None else None,
            time_limit=seconds,
            bounds=Bounds(**bounds, update_formats=formats),
            **document,
        )

    def words(self) -> list[str]:
        """As options of `client-train`."""
        words = ["--data", str(self.data), "--device", self.device, "--max-length", str(self.max_length)]
        return words + (["--eval-data", str(self.eval_data)] if self.eval_data is not None else [])
