"""Federated learning without giving the model away: mask neurons, quantize, export proxies, train, merge.

Every shell command is one function here, of the same name and with the same options:

    from fedqsn_cli import mask, quantize, export_proxy, client_train, merge, inspect, evaluate, audit

Nothing heavy is imported before one of them is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedqsn_cli.version import VERSION

if TYPE_CHECKING:
    from fedqsn_cli.auditing.run import audit as audit
    from fedqsn_cli.export.proxy import export_proxy as export_proxy
    from fedqsn_cli.export.server_model import mask as mask
    from fedqsn_cli.export.server_model import quantize as quantize
    from fedqsn_cli.inspection import inspect as inspect
    from fedqsn_cli.merging.merge import merge as merge
    from fedqsn_cli.training import client_train as client_train
    from fedqsn_cli.training.evaluate import evaluate as evaluate


__version__ = VERSION

__all__ = ["audit", "client_train", "evaluate", "export_proxy", "inspect", "mask", "merge", "quantize"]

_HOMES = {
    "audit": "fedqsn_cli.auditing.run",
    "client_train": "fedqsn_cli.training.client",
    "evaluate": "fedqsn_cli.training.evaluate",
    "export_proxy": "fedqsn_cli.export.proxy",
    "inspect": "fedqsn_cli.inspection",
    "mask": "fedqsn_cli.export.server_model",
    "merge": "fedqsn_cli.merging.merge",
    "quantize": "fedqsn_cli.export.server_model",
}


def __getattr__(name: str) -> Any:
    """Import a public function when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(import_module(_HOMES[name]), name)
    globals()[name] = function
    return function


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
