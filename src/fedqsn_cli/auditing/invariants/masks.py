"""FQ004, FQ005, FQ011: are the masks those of one key, one server mask for the whole job, and unpredictable?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.findings import Finding
from fedqsn_cli.auditing.inputs import Inputs, OpenedProxy, Report
from fedqsn_cli.auditing.invariants.weak_seeds import SEEDS, longest_runs
from fedqsn_cli.auditing.rules import finding
from fedqsn_cli.masks.draw import hidden_count
from fedqsn_cli.masks.job_masks import ClientMasks, ServerMasks

Bools = NDArray[np.bool_]

_LARGEST = 1024  # units of a group that is tried
_RARE = -20.0  # log2 of the chance below which a match is none


def check_masks(inputs: Inputs, report: Report) -> None:
    """All three rules, for every proxy and for every job."""
    clean = set()
    for proxy in inputs.proxies:
        if inputs.job is None:
            report.skip("FQ005", proxy.scope, "needs --key, which alone tells what must be hidden")
            continue
        found = list(_against_key(inputs, proxy))
        known = inputs.release(proxy) is not None
        why = "the server mask was drawn again from the key" + (", and the client mask" if known else "")
        report.add("FQ005", proxy.scope, why + ("" if known else "; the client mask needs --ledger"), found)
        if not found:
            clean.add(proxy.scope)
    _check_jobs(inputs, report)
    for scope in sorted(clean):
        report.add("FQ011", scope, "the masks follow from the key, so no seed drew them", [])
    _check_seeds([proxy for proxy in inputs.proxies if proxy.scope not in clean], report)


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
        shown += bool((visible & server.hidden_units(name, units)).any())
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
    ratios = _ratios(inputs)
    why = "visible units of all proxies were put together"
    if ratios is None:
        why = "only the ledger's lines were compared: how much the server hides needs --key or --ledger"
    else:
        for job in sorted({proxy.manifest.job for proxy in proxies}):
            found += _union([proxy for proxy in proxies if proxy.manifest.job == job], ratios)
    if ratios is None and not releases and len(proxies) < 2:
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


def _ratios(inputs: Inputs) -> Callable[[str], float] | None:
    """The least share that the server hides of each group: the ledger alone knows only that of all groups."""
    if inputs.job is not None:
        return inputs.job.ratio
    least = {release.p1 if release.p1_least is None else release.p1_least for release in inputs.releases or ()}
    if len(least) != 1:
        return None
    ratio = least.pop()
    return lambda group: ratio


def _union(proxies: Sequence[OpenedProxy], ratios: Callable[[str], float]) -> Iterator[Finding]:
    """Units shown by any of the proxies may not be more than one server mask leaves."""
    over = 0
    for name, group in proxies[0].manifest.groups.items():
        union = np.zeros(group.units, np.bool_)
        for proxy in proxies:
            other = proxy.manifest.groups.get(name)
            if other is not None and other.units == group.units:
                union |= proxy.group(name)
        over += int(np.count_nonzero(union)) > group.units - hidden_count(group.units, ratios(name))
    if over:
        scope = proxies[0].scope if len(proxies) == 1 else f"coalition of {len(proxies)}"
        message = "more units are shown than one server mask leaves visible (groups concerned)"
        yield finding("FQ004", scope, message, value=float(over), limit=0.0)


def _check_seeds(proxies: Sequence[OpenedProxy], report: Report) -> None:
    """FQ011: try the seeds on the smallest groups of each proxy in which a match cannot be chance."""
    targets = {proxy.scope: _targets(proxy) for proxy in proxies}
    hits = dict.fromkeys(targets, 0)
    for n in sorted({n for groups in targets.values() for n in groups}):
        owners = [(scope, flags) for scope, groups in targets.items() for flags in groups.get(n, ())]
        runs = longest_runs(np.stack([flags for _, flags in owners]))
        for (scope, flags), run in zip(owners, runs, strict=True):
            hits[scope] += _chance(n, int(flags.sum()), int(run)) < _RARE
    for scope, groups in targets.items():
        if not groups:
            report.skip("FQ011", scope, "no group hides enough units to tell a seed from chance")
            continue
        message = "the hidden units are those that a seeded generator draws (groups that match)"
        found = [finding("FQ011", scope, message, value=float(hits[scope]), limit=0.0)] if hits[scope] else []
        why = f"seeds 0 to {SEEDS - 1} were tried on groups of {' and '.join(map(str, sorted(groups)))} units"
        report.add("FQ011", scope, why, found)


def _targets(proxy: OpenedProxy) -> dict[int, list[Bools]]:
    """units -> hidden units of each group of that size, and those that all of these groups hide.

    A generator that is seeded for every group anew gives equal masks; what client masks add falls away there.
    """
    targets: dict[int, list[Bools]] = {}
    for name, group in sorted(proxy.manifest.groups.items(), key=lambda item: item[1].units):
        if group.units > _LARGEST or (len(targets) == 2 and group.units not in targets):
            break
        hidden = ~proxy.group(name)
        if _chance(hidden.size, int(hidden.sum()), int(hidden.sum())) < _RARE:
            targets.setdefault(group.units, []).append(hidden)
    for groups in targets.values():
        groups.append(np.logical_and.reduce(groups))
    return targets


def _chance(n: int, count: int, run: int) -> float:
    """log2 of the chance that `run` units drawn at random are among `count` given ones of n, for any seed and way."""
    if run <= 0 or run > count:
        return 0.0
    logs = math.lgamma(count + 1) - math.lgamma(count - run + 1) - math.lgamma(n + 1) + math.lgamma(n - run + 1)
    return float(logs / math.log(2) + math.log2(SEEDS * 4))
