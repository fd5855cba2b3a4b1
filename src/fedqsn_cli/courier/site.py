"""site.toml: what a site trains with, and what it lets the owner ask for. The owner never sees it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import Field

from fedqsn_cli import validate
from fedqsn_cli.artifacts.document import Strict
from fedqsn_cli.checkpoint.files import read_file
from fedqsn_cli.courier.orders import Order
from fedqsn_cli.errors import FormatError, InputError
from fedqsn_cli.options import ProposalOptions
from fedqsn_cli.options.groups import UpdateFormat
from fedqsn_cli.options.lora import Method

_LARGEST = 1 << 20  # bytes of site.toml

TEMPLATE = """\
# What this site trains with. The owner of the model cannot change any of it, and never sees it.
data = {data}
{eval_data}device = {device}
max_length = {max_length}
time_limit = "6h"  # a training that takes longer is ended, and no update is sent
max_bytes = "20GB"  # a larger proxy is not fetched
# max_memory = "16GB"  # a training that takes more fails, and no update is sent; the memory of a GPU is not counted

# What the owner may ask for, at most. A round that asks for more is refused.
[bounds]
epochs = 10
lr = 0.01
batch_size = 256
update_formats = ["fp32", "bf16", "fp16", "int8", "nf4"]
methods = ["full", "lora"]
lora_r = 64
"""


class Bounds(Strict):
    """What a site lets the owner ask for, at most.

    Args:
        update_formats: those that it sends. methods: those that it trains with.
    """

    epochs: float = Field(ge=0)
    lr: float = Field(ge=0)
    batch_size: int = Field(ge=0)
    update_formats: tuple[UpdateFormat, ...] = Field(strict=False)
    methods: tuple[Method, ...] = Field(strict=False)
    lora_r: int = Field(ge=0)

    def require(self, asked: ProposalOptions, where: Path) -> None:
        """Refuse a proposal that asks for more. Raises InputError."""
        for name in ("epochs", "lr", "batch_size"):
            _require_at_most(name, getattr(asked, name), getattr(self, name), where)
        if asked.update_format not in self.update_formats:
            raise InputError(f"the site sends no updates in {asked.update_format}", where=where)
        if asked.method not in self.methods:
            raise InputError(f"the site does not train with the method {asked.method}", where=where)
        if asked.method == "lora":
            _require_at_most("lora_r", asked.rank, self.lora_r, where)


def _require_at_most(name: str, asked: float, most: float, where: Path) -> None:
    if not asked <= most:
        raise InputError(f"the owner asks for {name} {asked}, and the site allows {most}", where=where)


class _Document(Strict):
    """site.toml as it is written."""

    data: str
    eval_data: str | None = None
    device: str
    max_length: int = Field(ge=1)
    time_limit: str
    max_bytes: str
    max_memory: str | None = None
    bounds: Bounds


@dataclass(frozen=True, slots=True)
class SiteSettings:
    """What a site decides.

    Args:
        data, eval_data: its files. time_limit: seconds of a training. max_bytes: of a sealed proxy.
        max_memory: bytes of a training's process, None for any. bounds: what the owner may ask for.
    """

    data: Path
    eval_data: Path | None
    device: str
    max_length: int
    time_limit: float
    max_bytes: int
    max_memory: int | None
    bounds: Bounds

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the settings; paths are relative to the file.

        Raises:
            FormatError: they are malformed, or have a field that is not known. InputError: there is no such file.
        """
        try:
            document = tomllib.loads(read_file(path, _LARGEST).decode())
        except (ValueError, RecursionError) as error:
            raise FormatError(f"not valid TOML ({error})", where=path) from None
        return cls._of(_Document.from_document(document, path), path.parent)

    @classmethod
    def _of(cls, document: _Document, home: Path) -> Self:
        _, seconds = validate.interval(document.time_limit, "time_limit")
        if seconds is None:
            raise InputError("is a time such as 6h", where="time_limit")
        memory = document.max_memory
        return cls(
            data=home / document.data,
            eval_data=home / document.eval_data if document.eval_data is not None else None,
            device=document.device,
            max_length=document.max_length,
            time_limit=seconds,
            max_bytes=validate.size_in_bytes(document.max_bytes, "max_bytes"),
            max_memory=validate.size_in_bytes(memory, "max_memory") if memory is not None else None,
            bounds=document.bounds,
        )

    def require(self, order: Order, where: Path) -> None:
        """Refuse an order that asks for more than the site allows. Raises InputError."""
        _require_at_most("bytes", order.sealed.size, self.max_bytes, where)
        self.bounds.require(order.proposal, where)

    def require_data(self, where: Path) -> None:
        """Refuse settings that name files which are not there. Raises InputError."""
        for path in (self.data, self.eval_data):
            if path is not None and not path.exists():
                hint = f"put it there, or correct {where}: its paths start in its folder"
                raise InputError("there is no such file", where=path, hint=hint)

    def words(self) -> list[str]:
        """As options of `client-train`."""
        words = ["--data", str(self.data), "--device", self.device, "--max-length", str(self.max_length)]
        return words + (["--eval-data", str(self.eval_data)] if self.eval_data is not None else [])
