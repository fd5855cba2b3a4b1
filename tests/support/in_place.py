"""Tokenizers that the tests have made themselves are used in the process of the test.

The product uses them in a copy of its process, for they may be a stranger's. A process that has imported everything
takes 30 ms for each copy, and a training makes several. That copies are made, and what they withstand, is tested in
`tests/models`, `tests/attacks` and with whole commands in `tests/cli`, `tests/golden` and `tests/documentation`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from fedqsn_cli.errors import FedqsnError, InputError


def in_place(work: Callable[[], Any], *, what: str, where: object, **_: object) -> Any:
    """What `in_child` returns or raises, without limits."""
    try:
        return json.loads(json.dumps(work()))
    except (FedqsnError, MemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic of Rust code is no Exception
        raise InputError(f"{what} fails ({error})", where=where) from error


@pytest.fixture(autouse=True)
def tokenizers_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each test of a folder whose conftest.py imports this."""
    monkeypatch.setattr("fedqsn_cli.models.tokenizer.in_child", in_place)
    monkeypatch.setattr("fedqsn_cli.training.data.tokenizing.in_child", in_place)
