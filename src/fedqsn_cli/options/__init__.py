"""Every option of every command, once: name, type, default, help and check. No import of anything heavy.

declare.py      how an option is declared
groups.py       options that several commands have
lora.py         those of adapters
privacy.py      those that limit what an update tells about the data
commands.py     the options of each command
aggregation.py  those of merge about which updates count, and how they are put together
merge.py        the others of merge, and which of them go together
consolidate.py  those of consolidate
courier.py      those of the courier
keys.py         those of keys, signatures and sealed folders
keywords.py     Python functions that take the options as keywords
"""

from __future__ import annotations

from fedqsn_cli.options.commands import (
    AuditOptions,
    EvaluateOptions,
    ExportOptions,
    InspectOptions,
    MaskOptions,
    QuantizeOptions,
    TrainOptions,
)
from fedqsn_cli.options.consolidate import ConsolidateOptions
from fedqsn_cli.options.courier import (
    CourierApproveOptions,
    CourierInitOptions,
    CourierJoinOptions,
    CourierPackOptions,
    CourierSendOptions,
    CourierServeOptions,
    CourierStatusOptions,
    CourierStopOptions,
    ProposalOptions,
)
from fedqsn_cli.options.declare import REQUIRED, Declared, Option, Options, options_of
from fedqsn_cli.options.groups import (
    MaskingOptions,
    OptimizerName,
    QuantizationOptions,
    RecipeOptions,
    Schedule,
    Train,
)
from fedqsn_cli.options.keys import KeygenOptions, SealOptions, UnsealOptions, VerifyOptions
from fedqsn_cli.options.merge import MergeOptions

__all__ = [
    "REQUIRED",
    "AuditOptions",
    "ConsolidateOptions",
    "CourierApproveOptions",
    "CourierInitOptions",
    "CourierJoinOptions",
    "CourierPackOptions",
    "CourierSendOptions",
    "CourierServeOptions",
    "CourierStatusOptions",
    "CourierStopOptions",
    "Declared",
    "EvaluateOptions",
    "ExportOptions",
    "InspectOptions",
    "KeygenOptions",
    "MaskOptions",
    "MaskingOptions",
    "MergeOptions",
    "Option",
    "OptimizerName",
    "Options",
    "QuantizationOptions",
    "QuantizeOptions",
    "ProposalOptions",
    "RecipeOptions",
    "Schedule",
    "SealOptions",
    "Train",
    "TrainOptions",
    "UnsealOptions",
    "VerifyOptions",
    "options_of",
]
