"""The options of keys, signatures and sealed folders."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from fedqsn_cli import validate
from fedqsn_cli.errors import InputError
from fedqsn_cli.options.declare import Option, Options
from fedqsn_cli.options.groups import FORCE, OUT, OUTPUT, SIGNATURES

OPENING_KEY = Option("Your private key, from 'fedqsn keygen'.", SIGNATURES, metavar="PRIVATE")


@dataclass(frozen=True, kw_only=True)
class KeygenOptions(Options):
    """`keygen`."""

    public: Annotated[
        str | Path | None, Option("Where to write the public key.", OUTPUT, shown="KEY with the ending .pub")
    ] = None

    def public_file(self, private: str | Path) -> Path:
        """Where the public key goes.

        Raises:
            InputError: it would be in the place of the private one, or that is `/` or `.`, which no file can be.
        """
        if not Path(private).name:
            raise InputError("is a directory", where=private, hint="name a file")
        public = Path(self.public) if self.public is not None else Path(private).with_suffix(".pub")
        if public == Path(private):
            raise InputError("would be the private key, too", where=public, hint="choose another name, such as a.key")
        return public


@dataclass(frozen=True)
class SealOptions(Options):
    """`seal`."""

    out: Annotated[str | Path, Option("File to write.", OUTPUT, check=validate.here)]
    _: KW_ONLY
    to: Annotated[str | Path, Option("Public key of the recipient.", SIGNATURES, metavar="PUBLIC")]


@dataclass(frozen=True)
class UnsealOptions(Options):
    """`unseal`."""

    out: Annotated[str | Path, OUT]
    _: KW_ONLY
    key: Annotated[str | Path, OPENING_KEY]
    verify_key: Annotated[
        str | Path | None,
        Option("Refuse what the owner of this public key did not sign.", SIGNATURES, metavar="PUBLIC"),
    ] = None
    force: Annotated[bool, FORCE] = False


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options):
    """`verify`."""

    key: Annotated[str | Path, Option("Public key of who should have signed it.", SIGNATURES, metavar="PUBLIC")]
