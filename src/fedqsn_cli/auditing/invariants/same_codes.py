"""FQ009: what two proxies of one round both show, they must show alike, up to the scale of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.findings import Finding
from fedqsn_cli.auditing.inputs import Inputs, OpenedProxy, Report
from fedqsn_cli.auditing.rules import finding
from fedqsn_cli.errors import FedqsnError
from fedqsn_cli.export.pipeline import CHUNK_ELEMENTS
from fedqsn_cli.quantization.layout import TensorLayout, row_chunks

RULE = "FQ009"

_NEAR = {"F32": 1e-5, "F16": 3e-3, "BF16": 1.6e-2}
"""Relative difference of two values that were scaled and rounded apart from each other."""


def check_between(inputs: Inputs, report: Report, odd: dict[str, set[str]]) -> None:
    """Compare all proxies of each round with each other.

    Args:
        odd: as for `check_holes`; proxies that were built again from one model are alike.
    """
    rounds: dict[tuple[str, int, str], list[OpenedProxy]] = {}
    for proxy in inputs.proxies:
        manifest = proxy.manifest
        rounds.setdefault((manifest.job, manifest.round, str(manifest.quantization)), []).append(proxy)
    pairs = {key: proxies for key, proxies in rounds.items() if len(proxies) > 1}
    if not pairs:
        report.skip(RULE, "coalition", "needs two proxies of one round")
        return
    for proxies in pairs.values():
        scope = f"coalition of {len(proxies)}"
        if all(odd.get(proxy.scope) == set() for proxy in proxies):
            report.add(RULE, scope, "all were built again from the same codes", [])
            continue
        try:
            found = _compare(proxies, scope)
        except FedqsnError as error:
            report.findings.append(finding("FQ903", scope, f"a tensor cannot be read: {error.what}"))
            continue
        report.add(RULE, scope, "what several proxies show was compared", found)


def _compare(proxies: Sequence[OpenedProxy], scope: str) -> list[Finding]:
    found = []
    for name in proxies[0].tensors:
        if not all(name in proxy.tensors for proxy in proxies) or not proxies[0].tensors[name].is_float:
            continue
        share = _differing(proxies, name)
        if share:
            message = "proxies of one round show the same weights differently (share of what both show)"
            found.append(finding(RULE, scope, message, tensor=name, value=share, limit=0.0))
    return found


def _differing(proxies: Sequence[OpenedProxy], name: str) -> float:
    """Share of elements shown by several proxies that differ between them, 0 to 1."""
    storage = proxies[0].layout(name)
    plain = TensorLayout(storage.kind, "flat", False, storage.view, storage.axis)
    dense = any(proxy.tensors[name].packing is None for proxy in proxies)
    near = _NEAR[proxies[0].tensors[name].dtype] if dense else _NEAR["F32"]
    both = different = 0
    for first, rows in row_chunks(plain, 4096, CHUNK_ELEMENTS):
        reference = np.full((rows, storage.view[2]), np.nan, np.float32)
        for proxy in proxies:
            values = proxy.values(name, storage, first, rows) / proxy.factor(name)
            shown = shown_in(proxy, name, storage, first, rows)
            values = np.where(shown, values, np.float32("nan"))
            known = ~np.isnan(reference) & ~np.isnan(values)
            with np.errstate(invalid="ignore"):
                off = np.abs(values - reference) > near * np.maximum(np.abs(values), np.abs(reference))
            both += int(np.count_nonzero(known))
            different += int(np.count_nonzero(off & known))
            reference = np.where(np.isnan(reference), values, reference)
    return different / both if both else 0.0


def shown_in(proxy: OpenedProxy, name: str, storage: TensorLayout, first: int, rows: int) -> NDArray[Any]:
    """Which elements of rows of the working view a proxy shows; broadcasts to [rows, cols]."""
    visible = proxy.visible(name)
    if visible is None:
        return np.ones((1, 1), np.bool_)
    return storage.working(visible).element_flags(first, rows)
