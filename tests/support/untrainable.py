"""Most models of the tests have no tokenizer, and need none: here mask and export_proxy accept them by default."""

from __future__ import annotations

import os

import pytest

from fedqsn_cli.options import ExportOptions, MaskOptions

FIELD, VARIABLE = "allow_untrainable", "FEDQSN_ALLOW_UNTRAINABLE"


def accept_untrainable_models() -> None:
    """For Python functions of this process, and for commands that it runs or starts."""
    os.environ[VARIABLE] = "1"
    for options in (MaskOptions, ExportOptions):
        options.__init__.__kwdefaults__[FIELD] = True  # type: ignore[misc,index]


def refuse_untrainable_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is for everybody else, for one test."""
    monkeypatch.delenv(VARIABLE)
    for options in (MaskOptions, ExportOptions):
        monkeypatch.setitem(options.__init__.__kwdefaults__, FIELD, False)  # type: ignore[misc,arg-type]
