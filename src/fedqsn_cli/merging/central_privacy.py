"""Central differential privacy: a merge tells little about any one client, whoever sees the merged model.

    S     Σ_k Δ_k min(1, C / ‖Δ_k‖)              all clients count the same; one of them changes S by C at most
    Δ     (S + N(0, (z C)²)) / clients           for each unit, over the clients that saw it

(McMahan et al. 2018, arXiv 1710.06963, with all clients of a round.) Two rounds are neighbours if one client's update
is zero in one of them. Every such merge is one Gaussian mechanism. The ledger records it before the model appears, and
opacus' accountant adds up all merges of the job (Rényi differential privacy, without any amplification by sampling).

The noise comes from the job's key and from everything that S depends on. So a merge that is made again has the same
noise, and is recorded once; other updates, another C or z have other noise.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from fedqsn_cli.artifacts import ledger as ledgers
from fedqsn_cli.artifacts.ledger import PrivateMerge
from fedqsn_cli.errors import InputError
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.merging.results import MergePrivacy
from fedqsn_cli.merging.step.noise import Noise
from fedqsn_cli.merging.updates.read_update import ClientUpdate
from fedqsn_cli.options import MergeOptions


class CentralPrivacy:
    """The noise of one merge, and its account.

    Raises:
        InputError: opacus is missing, δ is too large for so few clients, or the merge would exceed the budget, which
            `record` decides again.
    """

    def __init__(self, job: JobKey, updates: Sequence[ClientUpdate], options: MergeOptions) -> None:
        if importlib.util.find_spec("opacus") is None:
            raise InputError("needs opacus", where="--noise-multiplier", hint="install fedqsn-cli[dp]")
        assert isinstance(options.clip_norm, float) and options.noise_multiplier and options.delta
        if options.delta * len(updates) >= 1:
            what = f"{options.delta:g} is not less than 1 / {len(updates)}, the share of one client"
            raise InputError(what, where="--delta", hint="give a much smaller number")
        self._job, self._ledger = job, options.required_ledger()
        self._delta, self._budget = options.delta, options.epsilon
        facts = _facts(updates, options)
        self._entry = PrivateMerge(
            merge_id=job.seal("private merge", *facts),
            job=job.commitment,
            round=max(update.release.round for update in updates),
            model_digest=updates[0].release.model_digest,
            clients=len(updates),
            clip_norm=options.clip_norm,
            noise_multiplier=options.noise_multiplier,
        )
        self.noise = Noise(
            bytes.fromhex(job.seal("noise of a merge", *facts)), options.clip_norm * options.noise_multiplier
        )
        before = ledgers.read_merges(self._ledger, job)
        self._check(before if self._is_known(before) else [*before, self._entry])

    def record(self) -> MergePrivacy:
        """Write the merge into the ledger; call it before the model appears. Raises InputError: over the budget."""
        ledgers.record_merge(self._ledger, self._job, self._entry, check=self._check)
        merges = ledgers.read_merges(self._ledger, self._job)
        return MergePrivacy(
            clip_norm=self._entry.clip_norm,
            noise_multiplier=self._entry.noise_multiplier,
            merges=len(merges),
            epsilon=epsilon_of(merges, self._delta),
            delta=self._delta,
        )

    def _is_known(self, merges: Sequence[PrivateMerge]) -> bool:
        return any(merge.merge_id == self._entry.merge_id for merge in merges)

    def _check(self, merges: Sequence[PrivateMerge]) -> None:
        """Hold merges against the budget. Raises InputError."""
        epsilon = epsilon_of(merges, self._delta)
        spent = f"after {len(merges)} merges ε is {epsilon:.4g} at δ = {self._delta:g}"
        if not math.isfinite(epsilon):
            raise InputError(spent, where="--noise-multiplier", hint="so little noise hides nothing; give more")
        if self._budget is not None and epsilon > self._budget:
            raise InputError(
                f"{spent}, over --epsilon {self._budget:g}",
                where=Path(self._ledger),
                hint="the budget of this job is spent, or --noise-multiplier is too small",
            )


def epsilon_of(merges: Sequence[PrivateMerge], delta: float) -> float:
    """ε of all merges together, by the RDP accountant of opacus; infinite if one of them had next to no noise."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(merge.noise_multiplier, 1.0, 1) for merge in merges]
    try:
        return max(float(accountant.get_epsilon(delta)), 0.0)  # its bound falls below 0 where noise is huge
    except ZeroDivisionError:  # the square of the noise is 0
        return math.inf


def _facts(updates: Sequence[ClientUpdate], options: MergeOptions) -> list[str]:
    """Everything that the clipped sum depends on."""
    facts = [f"{options.clip_norm!r}", f"{options.noise_multiplier!r}", updates[0].release.model_digest]
    for update in updates:
        files = update.manifest.files
        facts += [update.release.proxy_id, str(len(files)), *(f"{name} {files[name]}" for name in sorted(files))]
    return facts
