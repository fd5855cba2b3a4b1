"""The client's side: read data, train the visible units of a proxy, write the update; and evaluate a model.

data/        from data files to what a model takes, and what each task learns of it
steps/       training, step by step
methods/     what is trained of a proxy: the visible weights, or adapters
updates/     what is sent back
scoring/     what a model says about data
client.py    client-train: all of it, in this order
evaluate.py  evaluate: a model on data
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedqsn_cli.training.client import TrainResult as TrainResult
    from fedqsn_cli.training.client import client_train as client_train

__all__ = ["TrainResult", "client_train"]


def __getattr__(name: str) -> Any:
    """Import the command when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedqsn_cli.training import client

    return getattr(client, name)
