"""Low-rank completion: a fine-tune often differs from its public base by a matrix of low rank, a LoRA product say.

    D = W' - B where it is shown, 0 elsewhere;   Y = D Ω;   Q R = Y;   D_r = the best rank-r part of Q Qᵀ D
    W'' = B + D_r, moved into the intervals that the proxies' rounded values leave

Randomised range finder after Halko, Martinsson and Tropp (arXiv 0909.4061). D is never held: its rows are read three
times. The rank is the one with the least error, so what is reported is the best that any choice of rank can do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.recovery.evidence import Evidence, collect
from fedqsn_cli.auditing.recovery.metrics import DD, MOVED, ErrorSums
from fedqsn_cli.auditing.rows import CHUNK, model_rows
from fedqsn_cli.auditing.stored_rows import StoredRows
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.public_base import PublicBase
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.quantization.layout import row_chunks

Floats = NDArray[np.float32]

RANKS = (1, 2, 4, 8, 16)
_OVERSAMPLING = 8


def complete(
    truth: OpenModel, public_base: PublicBase, proxies: Sequence[OpenedProxy], task: TensorTask
) -> ErrorSums | None:
    """Sums over shown elements for the best rank; None where nothing differs from the base."""
    width, cols = RANKS[-1] + _OVERSAMPLING, task.layout.view[2]
    noise = np.random.Generator(np.random.Philox(5)).standard_normal((cols, width)).astype(np.float32)
    images = np.concatenate([rows.difference @ noise for rows in _rows(public_base, proxies, task)])
    if not images.any() or not np.isfinite(images).all():
        return None
    span, _ = np.linalg.qr(images.astype(np.float64))
    left = span.astype(np.float32)
    inner = np.zeros((left.shape[1], cols), np.float32)
    for rows in _rows(public_base, proxies, task):
        inner += left[rows.part].T @ rows.difference
    u, s, vt = np.linalg.svd(inner.astype(np.float64), full_matrices=False)
    left, right = (left @ u).astype(np.float32), (s[:, None] * vt).astype(np.float32)
    sums = {rank: ErrorSums() for rank in RANKS}
    for rows in _rows(public_base, proxies, task):
        w, shown = StoredRows.of(model_rows(truth, task, rows.part.start, len(rows.base))), rows.evidence.count > 0
        flags = np.asarray(shown.any(axis=1)), shown.astype(np.float32)
        for rank in RANKS:
            guess = rows.evidence.clamped(rows.base + left[rows.part, :rank] @ right[:rank])
            sums[rank].add(w, StoredRows.of(guess.astype(np.float32)), flags)
    best = min(sums.values(), key=lambda found: found[DD])
    best.values[MOVED] = math.nan  # not added up
    return best


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a tensor.

    Args:
        part: which rows. base: those of the public base. difference: to it where it is shown, else 0.
    """

    part: slice
    base: Floats
    difference: Floats
    evidence: Evidence


def _rows(public_base: PublicBase, proxies: Sequence[OpenedProxy], task: TensorTask) -> Iterator[_Rows]:
    """All rows of a tensor, a run at a time."""
    quantization = proxies[0].manifest.quantization
    for first, rows in row_chunks(task.layout, quantization.block_size if quantization else 1, CHUNK):
        base = model_rows(public_base, task, first, rows)
        evidence = collect(proxies, task, first, rows)
        difference = np.where(evidence.count > 0, evidence.first - base, np.float32(0))
        yield _Rows(slice(first, first + rows), base, difference, evidence)
