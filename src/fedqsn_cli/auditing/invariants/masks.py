"""FQ004, FQ005, FQ011: are the masks those of one key, one server mask for the whole job, and unpredictable?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.auditing.checks import Together, check, each_folder, each_proxy, once
from fedqsn_cli.auditing.findings import Entry, Finding
from fedqsn_cli.auditing.inputs import KEY, PROXY, Inputs, ProxyFolder
from fedqsn_cli.auditing.invariants.weak_seeds import SEEDS, longest_runs
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.registry import Rule
from fedqsn_cli.masks.draw import hidden_count
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.masks.job_masks import ClientMasks, ServerMasks

Bools = NDArray[np.bool_]

_LARGEST = 1024  # units of a group that is tried
_RARE = -20.0  # log2 of the probability below which a match cannot be chance


SECOND_HIDDEN_SET = Rule(
    "FQ004",
    "second-hidden-set",
    "hard",
    what="Proxies of one job together show more units than one server mask leaves visible, or releases of one job name "
    "another p1 or plan.",
    why="Each of two server masks hides what the other one shows; together they hide next to nothing.",
    fix="Keep one key for the whole job. What was released counts as shown: start a new job only for a new model.",
    scope="invariants",
    needs=(PROXY,),
)
MASK_NOT_FROM_KEY = Rule(
    "FQ005",
    "mask-not-from-key",
    "hard",
    what="The visible units are not those that the key gives for this job, client and round.",
    why="Only masks derived from the key are unpredictable, and the same in every round.",
    fix="Export with the job's own key. A mask drawn by anything else cannot be trusted.",
    scope="invariants",
    needs=(PROXY, KEY),
)
WEAK_GENERATOR = Rule(
    "FQ011",
    "mask-from-weak-generator",
    "hard",
    what="The hidden units are those that a seeded generator (seeds 0 to 65535 of torch) draws.",
    why="An attacker tries all seeds in seconds and knows every mask of the job.",
    fix="Derive masks from a 256-bit key, as `fedqsn mask` does. Start a new job.",
    needs=(PROXY,),
)


@check(MASK_NOT_FROM_KEY, each_folder)
def listed_units(inputs: Inputs, folder: ProxyFolder) -> Iterator[Entry]:
    """Does a proxy list the units of the plan?"""
    if folder.lists_other_units:
        message = "proxy.json lists other units than the plan of the truth, so its weights were not compared"
        yield MASK_NOT_FROM_KEY.finding(folder.scope, message)


@check(MASK_NOT_FROM_KEY, each_proxy, KEY, more=", which alone tells what must be hidden")
def masks_of_the_key(inputs: Inputs, proxy: OpenedProxy, job: JobKey) -> Iterator[Entry]:
    """Draw the masks again."""
    release = inputs.release(proxy)
    found = list(_against_key(job, release, proxy))
    known = release is not None
    why = "the server mask was drawn again from the key" + (", and the client mask" if known else "")
    yield from MASK_NOT_FROM_KEY.checked(
        proxy.scope, why + ("" if known else "; the client mask needs --ledger"), found
    )
    proxy.masks_proven = not found


def _against_key(job: JobKey, release: Release | None, proxy: OpenedProxy) -> Iterator[Finding]:
    """One finding a kind of fault, with the number of groups it is in."""
    scope = proxy.scope
    if proxy.manifest.job != job.commitment:
        yield MASK_NOT_FROM_KEY.finding(scope, "proxy.json names another key")
    sizes = {name: units for name, (units, _) in job.groups.items()}
    if sizes != {name: group.units for name, group in proxy.manifest.groups.items()}:
        yield MASK_NOT_FROM_KEY.finding(scope, "proxy.json lists other groups of units than the key file")
        return
    server = ServerMasks(job)
    client = None
    if release is not None:
        client = ClientMasks(server, release.client, release.round, release.p2, release.schedule, release.rescale)
    shown = wrong = empty = 0
    for name, units in sizes.items():
        visible = proxy.group(name)
        shown += bool((visible & server.hidden_units(name, units)).any())
        wrong += client is not None and not np.array_equal(visible, client.visible_group(name, units))
        empty += not visible.any() and not server.job.sends_nothing
    if shown:
        message = "units that the key hides for the whole job are shown (groups concerned)"
        yield MASK_NOT_FROM_KEY.finding(scope, message, value=float(shown), limit=0.0)
    elif wrong:
        message = "the client mask is not the one of this key, client and round (groups concerned)"
        yield MASK_NOT_FROM_KEY.finding(scope, message, value=float(wrong), limit=0.0)
    if empty:
        message = f"some of {len(sizes)} groups show no unit at all"
        yield MASK_NOT_FROM_KEY.finding(scope, message, value=float(empty), limit=0.0)


@check(SECOND_HIDDEN_SET, once("job"))
def one_hidden_set(inputs: Inputs, job: Together) -> Iterator[Entry]:
    """All proxies and ledger lines together."""
    proxies, releases = job.proxies, inputs.releases or ()
    if not proxies and not releases:
        yield SECOND_HIDDEN_SET.not_run("job", "needs proxies or --ledger")
        return
    found = list(_ledger_contradictions(inputs))
    if len({proxy.manifest.job for proxy in proxies}) > 1 and _one_model(proxies):
        message = "proxies of one model belong to different jobs: each shows what the other one hides"
        found.append(SECOND_HIDDEN_SET.finding("job", message))
    ratios = _ratios(inputs)
    why = "visible units of all proxies were put together"
    if ratios is None:
        why = "only the ledger's lines were compared: how much the server hides needs --key or --ledger"
    else:
        for name in sorted({proxy.manifest.job for proxy in proxies}):
            found += _union([proxy for proxy in proxies if proxy.manifest.job == name], ratios)
    if ratios is None and not releases and len(proxies) < 2:
        yield SECOND_HIDDEN_SET.not_run("job", why)
    else:
        yield from SECOND_HIDDEN_SET.checked("job", why, found)


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
        yield SECOND_HIDDEN_SET.finding("ledger", "releases of one job name different p1 or plans")
    job = inputs.job
    if job is not None and any((p1, plan) != (job.p1, job.plan_digest) for p1, plan in jobs.get(job.commitment, ())):
        yield SECOND_HIDDEN_SET.finding("ledger", "releases of the job name another p1 or plan than its key")


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
        yield SECOND_HIDDEN_SET.finding(scope, message, value=float(over), limit=0.0)


@check(WEAK_GENERATOR, once("job"))
def weak_generator(inputs: Inputs, job: Together) -> Iterator[Entry]:
    """Try the seeds on the smallest groups of each proxy in which a match cannot be chance."""
    for scope in sorted(proxy.scope for proxy in job.proxies if proxy.masks_proven):
        yield from WEAK_GENERATOR.checked(scope, "the masks follow from the key, so no seed drew them")
    targets = {proxy.scope: _targets(proxy) for proxy in job.proxies if not proxy.masks_proven}
    hits = dict.fromkeys(targets, 0)
    for n in sorted({n for groups in targets.values() for n in groups}):
        owners = [(scope, flags) for scope, groups in targets.items() for flags in groups.get(n, ())]
        runs = longest_runs(np.stack([flags for _, flags in owners]))
        for (scope, flags), run in zip(owners, runs, strict=True):
            hits[scope] += _chance(n, int(flags.sum()), int(run)) < _RARE
    for scope, groups in targets.items():
        if not groups:
            yield WEAK_GENERATOR.not_run(scope, "no group hides enough units to tell a seed from chance")
            continue
        message = "the hidden units are those that a seeded generator draws (groups that match)"
        found = [WEAK_GENERATOR.finding(scope, message, value=float(hits[scope]), limit=0.0)] if hits[scope] else []
        why = f"seeds 0 to {SEEDS - 1} were tried on groups of {' and '.join(map(str, sorted(groups)))} units"
        yield from WEAK_GENERATOR.checked(scope, why, found)


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
    """log2 of the probability that `run` units drawn at random are among `count` given ones of n.

    For any of the seeds, and any of four ways to draw: from either end, by randperm or by rand.
    """
    if run <= 0 or run > count:
        return 0.0
    logs = math.lgamma(count + 1) - math.lgamma(count - run + 1) - math.lgamma(n + 1) + math.lgamma(n - run + 1)
    return float(logs / math.log(2) + math.log2(SEEDS * 4))
