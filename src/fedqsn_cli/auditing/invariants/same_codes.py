"""FQ009: what two proxies of one round both show, they must show alike, up to the scale of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from fedqsn_cli.auditing.checks import Together, check, grouped
from fedqsn_cli.auditing.findings import Entry, Finding
from fedqsn_cli.auditing.inputs import PROXIES, Inputs
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.registry import Rule
from fedqsn_cli.auditing.rows import shown_elements
from fedqsn_cli.export.pipeline import CHUNK_ELEMENTS
from fedqsn_cli.quantization.layout import row_chunks

CODES_DIFFER = Rule(
    "FQ009",
    "codes-differ-between-clients",
    "hard",
    what="Two proxies of one round must hold equal codes, and scales in one proportion, wherever both show a unit.",
    why="Every differing rounding of a weight narrows it down; averaging a few dozen proxies undoes the quantization.",
    fix="Quantize once for all clients and mask afterwards; never round stochastically per client.",
    needs=(PROXIES,),
)

_NEAR = {"F32": 1e-5, "F16": 3e-3, "BF16": 1.6e-2}
"""Relative difference of two values that were scaled and rounded apart from each other."""


def each_round(inputs: Inputs) -> list[Together]:
    """The proxies of each round and format that has several; where none has, a group without proxies."""
    rounds = grouped(
        inputs.proxies, lambda proxy: (proxy.manifest.job, proxy.manifest.round, str(proxy.manifest.quantization))
    )
    several = [one.proxies for one in rounds if len(one.proxies) > 1]
    return [Together((f"coalition of {len(proxies)}",), proxies) for proxies in several] or [Together(("coalition",))]


@check(CODES_DIFFER, each_round, problem="a tensor cannot be read")
def same_codes(inputs: Inputs, group: Together) -> Iterator[Entry]:
    """Compare all proxies of a round with each other; those that were built again from one model are alike."""
    (scope,), proxies = group.scopes, group.proxies
    if not proxies:
        yield CODES_DIFFER.lacks(scope, PROXIES)
    elif all(proxy.mismatched == set() for proxy in proxies):
        yield from CODES_DIFFER.checked(scope, "all were built again from the same codes")
    else:
        found = list(_compare(proxies, scope))
        yield from CODES_DIFFER.checked(scope, "what several proxies show was compared", found)


def _compare(proxies: Sequence[OpenedProxy], scope: str) -> Iterator[Finding]:
    for name, tensor in proxies[0].tensors.items():
        if not all(name in proxy.tensors for proxy in proxies) or not tensor.is_float:
            continue
        share = _differing(proxies, name)
        if share:
            message = "proxies of one round show the same weights differently (share of what both show)"
            yield CODES_DIFFER.finding(scope, message, tensor=name, value=share, limit=0.0)


def _differing(proxies: Sequence[OpenedProxy], name: str) -> float:
    """Share of elements shown by several proxies that differ between them, 0 to 1."""
    layout = proxies[0].layout(name)
    dense = any(proxy.tensors[name].packing is None for proxy in proxies)
    near = _NEAR[proxies[0].tensors[name].dtype] if dense else _NEAR["F32"]
    both = different = 0
    for first, rows in row_chunks(replace(layout, transposed=False), 4096, CHUNK_ELEMENTS):
        reference = np.full((rows, layout.view[2]), np.nan, np.float32)
        for proxy in proxies:
            values = proxy.values(name, layout, first, rows) / proxy.factor(name)
            values = np.where(shown_elements(proxy, name, layout, first, rows), values, np.float32("nan"))
            known = ~np.isnan(reference) & ~np.isnan(values)
            with np.errstate(invalid="ignore"):
                off = np.abs(values - reference) > near * np.maximum(np.abs(values), np.abs(reference))
            both += int(np.count_nonzero(known))
            different += int(np.count_nonzero(off & known))
            reference = np.where(np.isnan(reference), values, reference)
    return different / both if both else 0.0
