"""What the owner asks a site to train: a few numbers, signed together with the proxy that they are for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedqsn_cli import strictjson
from fedqsn_cli.crypto import dsse
from fedqsn_cli.crypto.keys import SigningKey, VerifyKey
from fedqsn_cli.errors import FormatError, InputError

PREDICATE = "fedqsn-recipe/1"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the owner proposes; a site may refuse it.

    Args:
        epochs, lr, batch_size, update_format: as of `client-train`.
    """

    epochs: float
    lr: float
    batch_size: int
    update_format: str

    def signed(self, proxy_sha256: str, key: SigningKey) -> str:
        """As text, for one proxy.

        Args:
            proxy_sha256: of its proxy.json.
        """
        subject = {"name": "proxy.json", "digest": {"sha256": proxy_sha256}}
        payload = dsse.statement([subject], PREDICATE, dataclasses.asdict(self))
        return strictjson.dumps(dsse.envelope(payload, dsse.sign(payload, key)))

    @classmethod
    def opened(cls, text: str, proxy_sha256: str, key: VerifyKey) -> Self:
        """Verify a recipe.

        Raises:
            SignatureError: the owner did not sign it. FormatError: it is malformed, or for another proxy.
        """
        told, _ = dsse.opened(strictjson.loads(text, "recipe"), key, PREDICATE, "recipe")
        try:
            (subject,) = told["subject"]
            if subject["digest"]["sha256"] != proxy_sha256:
                raise FormatError("is for another proxy", where="recipe")
            return cls(**_checked(told["predicate"]))
        except (KeyError, TypeError, ValueError):
            raise FormatError("is malformed", where="recipe") from None

    def words(self) -> list[str]:
        """As options of `client-train`."""
        values = dataclasses.asdict(self)
        return [word for name, x in values.items() for word in (f"--{name.replace('_', '-')}", str(x))]


def _checked(fields: dict[str, Any]) -> dict[str, Any]:
    """Numbers and a word, and nothing else. Raises TypeError."""
    numbers = (fields["epochs"], fields["lr"], fields["batch_size"])
    if any(type(x) not in (int, float) for x in numbers) or type(fields["update_format"]) is not str:
        raise TypeError
    return fields


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a site lets the owner ask for, at most.

    Args:
        update_formats: those that it sends.
    """

    epochs: float
    lr: float
    batch_size: int
    update_formats: tuple[str, ...]

    def require(self, recipe: Recipe, where: Path) -> None:
        """Refuse a recipe that asks for more. Raises InputError."""
        for name in ("epochs", "lr", "batch_size"):
            asked, most = getattr(recipe, name), getattr(self, name)
            if not 0 < asked <= most:
                raise InputError(f"the owner asks for {name} {asked}, and the site allows {most}", where=where)
        if recipe.update_format not in self.update_formats:
            raise InputError(f"the site sends no updates in {recipe.update_format}", where=where)
