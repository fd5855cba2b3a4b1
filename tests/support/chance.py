"""Chance that is the same in every run: the keys of jobs, the noise of private training, and seeded generators.

The product draws keys and noise from the operating system. Here each test, and each fixture that tests share, draws
them from its own name, whichever process it runs in and whatever ran before. `--chance 7` draws others, and
`--chance new` those of a number that the end of the report tells. Processes that a test starts are not concerned.
"""

from __future__ import annotations

import hashlib
import random
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from fedqsn_cli.masks.job_key import KEY_BYTES
from fedqsn_cli.training.steps import secure_random

by_chance = secrets.token_bytes


class Chance:
    """What is drawn now."""

    def __init__(self) -> None:
        self.number = 0
        self._owner, self._drawn = "", 0

    def install(self, number: int) -> None:
        """Draw keys and noise from here, from now on."""
        self.number = number
        secrets.token_bytes = self._token_bytes  # type: ignore[assignment]
        secure_random.os = SimpleNamespace(urandom=self.bytes)  # type: ignore[attr-defined]

    @contextmanager
    def of(self, owner: str) -> Iterator[None]:
        """A block that draws what this owner draws in every run; afterwards all goes on as before."""
        before, generators = (self._owner, self._drawn), _states()
        self._owner, self._drawn = owner, 0
        _seed(int.from_bytes(self._digest("generators", 4)))
        try:
            yield
        finally:
            self._owner, self._drawn = before
            _restore(generators)

    def bytes(self, count: int) -> bytes:
        """The next bytes of the owner."""
        self._drawn += 1
        return self._digest(str(self._drawn), count)

    def _token_bytes(self, count: int | None = None) -> bytes:
        return self.bytes(KEY_BYTES) if count == KEY_BYTES else by_chance(count)  # names of staging files differ

    def _digest(self, what: str, count: int) -> bytes:
        return hashlib.shake_256(f"{self.number}\n{self._owner}\n{what}".encode()).digest(count)


def _states() -> tuple[Any, Any]:
    torch = sys.modules.get("torch")
    return random.getstate(), torch and torch.default_generator.get_state()


def _restore(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    if states[1] is not None:
        sys.modules["torch"].default_generator.set_state(states[1])


def _seed(number: int) -> None:
    random.seed(number)
    if torch := sys.modules.get("torch"):
        torch.default_generator.manual_seed(number)  # torch.manual_seed would also note it for all devices


CHANCE = Chance()
