"""Federated learning without giving the model away: mask neurons, quantize, export proxies, train, merge.

Every shell command is one function here, of the same name and with the same options as keywords:

    from fedqsn_cli import mask, quantize, export_proxy, client_train, merge, consolidate, inspect, evaluate, audit

Nothing heavy is imported before one of them is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedqsn_cli.version import VERSION

if TYPE_CHECKING:  # the same as what __getattr__ makes from the table
    from fedqsn_cli import options
    from fedqsn_cli.auditing import run
    from fedqsn_cli.courier import outbox as _outbox
    from fedqsn_cli.courier import send as _send
    from fedqsn_cli.courier import serve as _serve
    from fedqsn_cli.courier import setup as _setup
    from fedqsn_cli.crypto import keys
    from fedqsn_cli.crypto import seal as _sealing
    from fedqsn_cli.crypto import verify as _verifying
    from fedqsn_cli.export import proxy, server_model
    from fedqsn_cli.inspection import inspect as _inspect
    from fedqsn_cli.merging.consolidate import consolidate as _consolidate
    from fedqsn_cli.merging.merge import merge as _merge
    from fedqsn_cli.options.keywords import with_keywords
    from fedqsn_cli.training.client import client_train as _client_train
    from fedqsn_cli.training.evaluate import evaluate as _evaluate

    audit = with_keywords(run.audit, options.AuditOptions)
    client_train = with_keywords(_client_train, options.TrainOptions)
    consolidate = with_keywords(_consolidate, options.ConsolidateOptions)
    courier_approve = with_keywords(_setup.courier_approve, options.CourierApproveOptions)
    courier_init = with_keywords(_setup.courier_init, options.CourierInitOptions)
    courier_join = with_keywords(_setup.courier_join, options.CourierJoinOptions)
    courier_pack = with_keywords(_outbox.courier_pack, options.CourierPackOptions)
    courier_send = with_keywords(_send.courier_send, options.CourierSendOptions)
    courier_serve = with_keywords(_serve.courier_serve, options.CourierServeOptions)
    courier_status = with_keywords(_serve.courier_status, options.CourierStatusOptions)
    courier_stop = with_keywords(_serve.courier_stop, options.CourierStopOptions)
    evaluate = with_keywords(_evaluate, options.EvaluateOptions)
    export_proxy = with_keywords(proxy.export_proxy, options.ExportOptions)
    keygen = with_keywords(keys.keygen, options.KeygenOptions)
    inspect = with_keywords(_inspect, options.InspectOptions)
    mask = with_keywords(server_model.mask, options.MaskOptions)
    merge = with_keywords(_merge, options.MergeOptions)
    quantize = with_keywords(server_model.quantize, options.QuantizeOptions)
    seal = with_keywords(_sealing.seal, options.SealOptions)
    unseal = with_keywords(_sealing.unseal, options.UnsealOptions)
    verify = with_keywords(_verifying.verify, options.VerifyOptions)

__version__ = VERSION

__all__ = [
    "audit",
    "client_train",
    "consolidate",
    "courier_approve",
    "courier_init",
    "courier_join",
    "courier_pack",
    "courier_send",
    "courier_serve",
    "courier_status",
    "courier_stop",
    "evaluate",
    "export_proxy",
    "inspect",
    "keygen",
    "mask",
    "merge",
    "quantize",
    "seal",
    "unseal",
    "verify",
]

COMMANDS = {  # in the order of use: what implements a command, and the class of its options
    "mask": ("fedqsn_cli.export.server_model", "MaskOptions"),
    "quantize": ("fedqsn_cli.export.server_model", "QuantizeOptions"),
    "export-proxy": ("fedqsn_cli.export.proxy", "ExportOptions"),
    "client-train": ("fedqsn_cli.training.client", "TrainOptions"),
    "merge": ("fedqsn_cli.merging.merge", "MergeOptions"),
    "consolidate": ("fedqsn_cli.merging.consolidate", "ConsolidateOptions"),
    "inspect": ("fedqsn_cli.inspection", "InspectOptions"),
    "evaluate": ("fedqsn_cli.training.evaluate", "EvaluateOptions"),
    "audit": ("fedqsn_cli.auditing.run", "AuditOptions"),
    "keygen": ("fedqsn_cli.crypto.keys", "KeygenOptions"),
    "verify": ("fedqsn_cli.crypto.verify", "VerifyOptions"),
    "seal": ("fedqsn_cli.crypto.seal", "SealOptions"),
    "unseal": ("fedqsn_cli.crypto.seal", "UnsealOptions"),
    "courier-init": ("fedqsn_cli.courier.setup", "CourierInitOptions"),
    "courier-join": ("fedqsn_cli.courier.setup", "CourierJoinOptions"),
    "courier-approve": ("fedqsn_cli.courier.setup", "CourierApproveOptions"),
    "courier-serve": ("fedqsn_cli.courier.serve", "CourierServeOptions"),
    "courier-stop": ("fedqsn_cli.courier.serve", "CourierStopOptions"),
    "courier-status": ("fedqsn_cli.courier.serve", "CourierStatusOptions"),
    "courier-pack": ("fedqsn_cli.courier.outbox", "CourierPackOptions"),
    "courier-send": ("fedqsn_cli.courier.send", "CourierSendOptions"),
}


def __getattr__(name: str) -> Any:
    """Make a public function when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedqsn_cli import options
    from fedqsn_cli.options.keywords import with_keywords

    module, options_class = COMMANDS[name.replace("_", "-")]
    function = with_keywords(getattr(import_module(module), name), getattr(options, options_class))
    globals()[name] = function
    return function


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
