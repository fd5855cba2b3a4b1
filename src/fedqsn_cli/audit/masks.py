"""FQ004, FQ005, FQ011: are the masks those of one key, one server mask for the whole job, and unpredictable?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.audit.findings import Finding
from fedqsn_cli.audit.opened import Inputs, OpenedProxy, Report
from fedqsn_cli.audit.rules import finding
from fedqsn_cli.jobmasks import ClientMasks, ServerMasks
from fedqsn_cli.masking import hidden_count

Bools = NDArray[np.bool_]

SEEDS = 65536
_ELEMENTS = 4096  # numbers drawn for one seed, over all group sizes that are tried
_CHANCE = 2.0**-40  # a match that is less likely than this by chance is no chance


def check_masks(inputs: Inputs, report: Report) -> None:
    """All three rules, for every proxy and for every job."""
    clean = set()
    for proxy in inputs.proxies:
        if inputs.job is None:
            report.skip("FQ005", proxy.scope, "needs --key")
            continue
        found = list(_against_key(inputs, proxy))
        known = inputs.release(proxy) is not None
        why = "the server mask was drawn again from the key" + (", and the client mask" if known else "")
        report.add("FQ005", proxy.scope, why + ("" if known else "; the client mask needs --ledger"), found)
        if not found:
            clean.add(proxy.scope)
    _check_jobs(inputs, report)
    for proxy in inputs.proxies:
        if proxy.scope in clean:
            report.add("FQ011", proxy.scope, "the masks follow from the key, so no seed drew them", [])
        else:
            _check_seeds(inputs, proxy, report)


def _against_key(inputs: Inputs, proxy: OpenedProxy) -> Iterator[Finding]:
    """FQ005: one finding a kind of fault, with the number of groups it is in."""
    assert inputs.job is not None
    job, release = inputs.job, inputs.release(proxy)
    if proxy.manifest.job != job.commitment:
        yield finding("FQ005", proxy.scope, "proxy.json names another key")
    sizes = {name: units for name, (units, _) in job.groups.items()}
    if sizes != {name: group.units for name, group in proxy.manifest.groups.items()}:
        yield finding("FQ005", proxy.scope, "proxy.json lists other groups of units than the key file")
        return
    server = ServerMasks(job)
    client = None
    if release is not None:
        client = ClientMasks(server, release.client, release.round, release.p2, release.schedule, release.rescale)
    shown = wrong = odd = 0
    for name, units in sizes.items():
        visible = proxy.group(name)
        shown += bool((visible & server.group(name, units)).any())
        wrong += client is not None and not np.array_equal(visible, client.visible_group(name, units))
        odd += not visible.any()
    total = len(sizes)
    if shown:
        message = "units that the key hides for the whole job are shown (groups concerned)"
        yield finding("FQ005", proxy.scope, message, value=float(shown), limit=0.0)
    elif wrong:
        message = "the client mask is not the one of this key, client and round (groups concerned)"
        yield finding("FQ005", proxy.scope, message, value=float(wrong), limit=0.0)
    if odd:
        yield finding("FQ005", proxy.scope, f"some of {total} groups show no unit at all", value=float(odd), limit=0.0)


def _check_jobs(inputs: Inputs, report: Report) -> None:
    """FQ004, over all proxies and ledger lines together."""
    proxies, releases = inputs.proxies, inputs.releases or ()
    if not proxies and not releases:
        report.skip("FQ004", "job", "needs proxies or --ledger")
        return
    found = list(_ledger_contradictions(inputs))
    if len({proxy.manifest.job for proxy in proxies}) > 1 and _one_model(proxies):
        message = "proxies of one model belong to different jobs: each shows what the other one hides"
        found.append(finding("FQ004", "job", message))
    ratio = _p1(inputs)
    why = "visible units of all proxies were put together"
    if ratio is None:
        why = "only the ledger's lines were compared: how much the server hides needs --key or --ledger"
    else:
        for job in sorted({proxy.manifest.job for proxy in proxies}):
            found += _union([proxy for proxy in proxies if proxy.manifest.job == job], ratio)
    if ratio is None and not releases and len(proxies) < 2:
        report.skip("FQ004", "job", why)
        return
    report.add("FQ004", "job", why, found)


def _one_model(proxies: Sequence[OpenedProxy]) -> bool:
    """Do proxies have the same groups of units?"""
    return len({tuple(sorted((n, g.units) for n, g in proxy.manifest.groups.items())) for proxy in proxies}) < len(
        proxies
    )


def _ledger_contradictions(inputs: Inputs) -> Iterator[Finding]:
    jobs: dict[str, set[tuple[float, str]]] = {}
    for release in inputs.releases or ():
        jobs.setdefault(release.job, set()).add((release.p1, release.plan))
    if any(len(kinds) > 1 for kinds in jobs.values()):
        yield finding("FQ004", "ledger", "releases of one job name different p1 or plans")
    job = inputs.job
    if job is not None and any((p1, plan) != (job.p1, job.plan_digest) for p1, plan in jobs.get(job.commitment, ())):
        yield finding("FQ004", "ledger", "releases of the job name another p1 or plan than its key")
    if job is not None and any(name != job.commitment for name in jobs):
        yield finding("FQ004", "ledger", "the ledger holds releases of another job than the key's")


def _p1(inputs: Inputs) -> float | None:
    if inputs.job is not None:
        return inputs.job.p1
    ratios = {release.p1 for release in inputs.releases or ()}
    return ratios.pop() if len(ratios) == 1 else None


def _union(proxies: Sequence[OpenedProxy], p1: float) -> Iterator[Finding]:
    """Units shown by any of the proxies may not be more than one server mask leaves."""
    over = 0
    for name, group in proxies[0].manifest.groups.items():
        union = np.zeros(group.units, np.bool_)
        for proxy in proxies:
            other = proxy.manifest.groups.get(name)
            if other is not None and other.units == group.units:
                union |= proxy.group(name)
        over += int(np.count_nonzero(union)) > group.units - hidden_count(group.units, p1)
    if over:
        scope = proxies[0].scope if len(proxies) == 1 else f"coalition of {len(proxies)}"
        message = "more units are shown than one server mask leaves visible (groups concerned)"
        yield finding("FQ004", scope, message, value=float(over), limit=0.0)


def _check_seeds(inputs: Inputs, proxy: OpenedProxy, report: Report) -> None:
    """FQ011: try the seeds on the smallest groups in which a match cannot be chance."""
    sets = _targets(inputs, proxy)
    if not sets:
        report.skip("FQ011", proxy.scope, "no group hides enough units to tell chance from a seed")
        return
    hits = seeded(sets)
    message = "the hidden units are those of a seeded generator"
    found = [finding("FQ011", proxy.scope, message, value=float(hits), limit=0.0)] if hits else []
    report.add("FQ011", proxy.scope, f"seeds 0 to {SEEDS - 1} were tried on groups of {sorted(sets)} units", found)


def _targets(inputs: Inputs, proxy: OpenedProxy) -> dict[int, list[tuple[Bools, tuple[int, ...]]]]:
    """units -> (hidden units of a group, sizes that a drawn subset of them may have)."""
    p1 = _p1(inputs)
    p2 = getattr(inputs.release(proxy), "p2", None)
    targets: dict[int, list[tuple[Bools, tuple[int, ...]]]] = {}
    drawn = 0
    for name, group in sorted(proxy.manifest.groups.items(), key=lambda item: item[1].units):
        n = group.units
        if n not in targets and drawn + n > _ELEMENTS:
            break
        hidden = ~proxy.group(name)
        count = int(np.count_nonzero(hidden))
        guesses = {count}
        if p1 is not None:
            guesses |= {hidden_count(n, p1), int(p1 * n), math.ceil(p1 * n)}
        if p2 is not None:
            guesses |= {int(p2 * n), round(p2 * n)}
        sizes = tuple(size for size in sorted(guesses) if 0 < size <= count and _chance(n, count, size) < _CHANCE)
        if sizes:
            drawn += n if n not in targets else 0
            targets.setdefault(n, []).append((hidden, sizes))
    return targets


def _chance(n: int, count: int, size: int) -> float:
    """That a random set of `size` of n units lies within a given set of `count`, for any of the seeds."""
    logs = math.lgamma(count + 1) - math.lgamma(count - size + 1) - math.lgamma(n + 1) + math.lgamma(n - size + 1)
    within = logs / math.log(2) + 16
    if size == count:
        return 2.0 ** max(-1000.0, within)
    return 2.0 ** max(-1000.0, within)


def seeded(targets: dict[int, list[tuple[Bools, tuple[int, ...]]]]) -> int:
    """How many of the groups a seed of torch explains: randperm(n)[:k], or rand(n) < ratio."""
    import torch

    state, hit = torch.get_rng_state(), set()
    try:
        for n, groups in targets.items():
            for number in range(SEEDS):
                torch.manual_seed(number)
                order = torch.randperm(n).numpy()
                torch.manual_seed(number)
                rank = torch.rand(n).numpy()
                for index, (hidden, sizes) in enumerate(groups):
                    if (n, index) not in hit and _drawn(hidden, sizes, order, rank):
                        hit.add((n, index))
    finally:
        torch.set_rng_state(state)
    return len(hit)


def _drawn(hidden: Bools, sizes: tuple[int, ...], order: NDArray[Any], rank: NDArray[Any]) -> bool:
    """Is a beginning or an end of the order, or what lies below or above a threshold, all hidden?"""
    least = sizes[0]
    if hidden[order[:least]].all() or hidden[order[-least:]].all():
        return True
    by_rank = np.argsort(rank)
    return bool(hidden[by_rank[:least]].all() or hidden[by_rank[-least:]].all())
