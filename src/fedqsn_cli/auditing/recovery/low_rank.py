"""Low-rank completion: a fine-tune often differs from its public base by a matrix of low rank, a LoRA product say.

    D = W' - B where it is shown, 0 elsewhere;   Y = D Ω;   Q R = Y;   D_r = the best rank-r part of Q Qᵀ D
    W'' = B + D_r, moved into the intervals that the proxies' rounded values leave

Randomised range finder after Halko, Martinsson and Tropp (arXiv 0909.4061). D is never held: its rows go by three
times. The rank is the one with the least error, so what is reported is the best that any choice of rank can do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.inputs import Inputs, OpenedProxy
from fedqsn_cli.auditing.recovery.attacks import Evidence
from fedqsn_cli.auditing.recovery.intervals import intervals, read_values
from fedqsn_cli.auditing.recovery.metrics import DD, Sums
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.quantization.layout import row_chunks

Floats = NDArray[np.float32]

RANKS = (1, 2, 4, 8, 16)
_OVERSAMPLING = 8
_CHUNK = 1 << 19


def complete(inputs: Inputs, proxies: Sequence[OpenedProxy], task: TensorTask) -> Sums | None:
    """Sums over shown elements for the best rank; None where nothing differs from the base."""
    width = RANKS[-1] + _OVERSAMPLING
    lead, rows, cols = task.layout.view
    noise = np.random.Generator(np.random.Philox(5)).standard_normal((cols, width)).astype(np.float32)
    images = np.concatenate([difference @ noise for _, _, difference, _ in _differences(inputs, proxies, task)])
    if not images.any() or not np.isfinite(images).all():
        return None
    span, _ = np.linalg.qr(images.astype(np.float64))
    left = span.astype(np.float32)
    inner = np.zeros((left.shape[1], cols), np.float32)
    for first, _, difference, _ in _differences(inputs, proxies, task):
        inner += left[first : first + len(difference)].T @ difference
    u, s, vt = np.linalg.svd(inner.astype(np.float64), full_matrices=False)
    return _best_rank(inputs, proxies, task, (left @ u).astype(np.float32), (s[:, None] * vt).astype(np.float32))


def _best_rank(inputs: Inputs, proxies: Sequence[OpenedProxy], task: TensorTask, left: Floats, right: Floats) -> Sums:
    from fedqsn_cli.auditing.rows import model_rows

    assert inputs.truth is not None and inputs.base is not None
    sums = {rank: Sums() for rank in RANKS}
    for first, base, _, evidence in _differences(inputs, proxies, task):
        w = model_rows(inputs.truth, task, first, len(base))
        shown = evidence.count > 0
        for rank in RANKS:
            guess = base + left[first : first + len(base), :rank] @ right[:rank]
            sums[rank].add(
                w, evidence.clamped(guess).astype(np.float32), np.asarray(shown.any(axis=1)), shown.astype(np.float32)
            )
    return min(sums.values(), key=lambda one: one[DD])


def _differences(
    inputs: Inputs, proxies: Sequence[OpenedProxy], task: TensorTask
) -> Iterator[tuple[int, Floats, Floats, Evidence]]:
    """(first row, base, difference to it where it is shown, evidence), in runs of rows."""
    from fedqsn_cli.auditing.rows import model_rows, shown_flags

    assert inputs.base is not None
    how: Any = proxies[0].manifest.quantization
    for first, rows in row_chunks(task.layout, how.block_size if how else 1, _CHUNK):
        base = model_rows(inputs.base, task, first, rows)
        evidence = Evidence.none(base.shape)
        for proxy in proxies:
            sent = read_values(proxy, task, first, rows)
            row_flags, flags = shown_flags(proxy, task, first, rows)
            low, high = intervals(proxy, task, first, rows, sent)
            values = sent / proxy.factor(task.name)
            evidence.add(values, low, high, row_flags[:, None] & (flags > 0), values)
        difference = np.where(evidence.count > 0, evidence.first - base, np.float32(0))
        yield first, base, difference, evidence
