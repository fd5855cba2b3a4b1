"""The page's plots, each with one sentence that says what to see."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from fedqsn_cli.auditing.findings import Audit, FunctionRecovery, TensorRecovery
from fedqsn_cli.auditing.report.wording import nearly_all_seen, worst_recovery
from fedqsn_cli.exposure.results import ClientExposure, Exposure
from fedqsn_cli.html import charts
from fedqsn_cli.html.charts import Bar, Level, Line, Picture, Plot
from fedqsn_cli.text import clean, percent

MOST_LINES = 12  # clients; more become a band
MOST_ROWS = 32
MOST_COLUMNS = 40
_FILLERS = frozenset({"self", "dense", "linear", "mlp", "self_attn"})
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|block|blocks|transformer)\.(\d+)(?:\.|$)")


def plots(audit: Audit) -> list[list[Picture]]:
    """All that can be drawn, from top to bottom; two in one list go beside each other."""
    groups = (_seen(audit), _heat_map(audit), [*_recovery(audit), *_function(audit)])
    return [group for group in groups if group]


def _seen(audit: Audit) -> list[Picture]:
    """Exposure over the proxies that a client got, and the worst coalitions."""
    seen = audit.exposure
    if seen is None or not seen.clients:
        return []
    limit = audit.policy.get("budget", {}).get("client")
    levels = [Level("ceiling", 1 - seen.hidden_share), *([] if limit is None else [Level("limit", limit)])]
    worst = max(seen.clients, key=lambda client: client.shares[-1])
    plot = Plot("Exposure over rounds", "proxies a client has got", _lines(seen, worst), levels, _band(seen.clients))
    estimate = "" if seen.looked_at >= 1 else f" Estimated from {percent(seen.looked_at)} of all units."
    when = nearly_all_seen(seen)
    nearly_all = "" if when is None else f"; with fresh masks 99 % of what is sent at all is seen {when}"
    lead = (
        f"Client {worst.client} has seen {percent(worst.shares[-1])} of all parameters in {len(worst.rounds)} "
        f"{'proxy' if len(worst.rounds) == 1 else 'proxies'}{nearly_all}.{estimate}"
    )
    many = len(seen.clients) > MOST_LINES
    key = [("#2456c8", "most exposed client")]
    if len(seen.clients) > 1:
        key.append(("#dbe5f9", "all clients") if many else ("#8aa5dd", "other clients"))
    ceiling = f"all that is ever sent ({percent(1 - seen.hidden_share)})"
    dashed = [("#5a6678", "expected with fresh masks"), ("#17693f", ceiling), *_limit_key(limit)]
    picture = Picture("What clients have seen", lead, charts.draw(plot), key, dashed)
    return [picture, _coalitions(seen)] if seen.coalitions else [picture]


def _limit_key(limit: float | None) -> list[tuple[str, str]]:
    return [] if limit is None else [("#b3261e", f"limit ({percent(limit)})")]


def _lines(seen: Exposure, worst: ClientExposure) -> list[Line]:
    """All start at nothing, before the first proxy."""
    longest = max(len(client.shares) for client in seen.clients)
    others = [] if len(seen.clients) > MOST_LINES else [client for client in seen.clients if client is not worst]
    lines = [Line("expected", _from_nothing(seen.analytic[:longest]), "expected")]
    lines += [Line("series", _from_nothing(client.shares), clean(client.client)) for client in others]
    return [*lines, Line("worst", _from_nothing(worst.shares), clean(worst.client))]


def _from_nothing(shares: Iterable[float]) -> list[tuple[float, float]]:
    return [(0.0, 0.0), *((float(k), share) for k, share in enumerate(shares, start=1))]


def _band(clients: Sequence[ClientExposure]) -> tuple[charts.Points, charts.Points] | None:
    if len(clients) <= MOST_LINES:
        return None
    longest = max(len(client.shares) for client in clients)
    steps = [[client.shares[k] for client in clients if len(client.shares) > k] for k in range(longest)]
    return _from_nothing(map(min, steps)), _from_nothing(map(max, steps))


def _coalitions(seen: Exposure) -> Picture:
    single = max(client.shares[-1] for client in seen.clients)
    rows = [Bar("1 client", (("rest", 1 - seen.hidden_share), ("main", single)), percent(single))]
    for coalition in seen.coalitions:
        everyone = " (all)" if coalition.size == len(seen.clients) else ""
        segments = (("rest", 1 - seen.hidden_share), ("main", coalition.share))
        rows.append(Bar(f"{coalition.size} clients{everyone}", segments, percent(coalition.share)))
    sure = all(coalition.method == "exact" for coalition in seen.coalitions)
    how = (
        "Exact: no coalition has seen more."
        if sure
        else "Where not all coalitions could be tried, the best found is shown."
    )
    lead = f"What the worst coalition of each size has seen, if its members put together all they got. {how}"
    key = [("#6f93e0", "seen together"), ("#c9d8f6", "sent to somebody, not to them"), ("#edf1f7", "never sent")]
    return Picture("What clients could see together", lead, charts.bars("Coalitions", rows, 110), key)


def _heat_map(audit: Audit) -> list[Picture]:
    """Client by module."""
    seen = audit.exposure
    if seen is None or not seen.heat_map:
        return []
    shares: dict[str, dict[str, list[float]]] = {}
    modules = list(dict.fromkeys(module for _, module, _ in seen.heat_map))
    by_layer = len(modules) > MOST_COLUMNS
    for client, module, share in seen.heat_map:
        shares.setdefault(client, {}).setdefault(layer_of(module) if by_layer else module, []).append(share)
    clients = list(shares)[:MOST_ROWS]
    columns = list(dict.fromkeys(layer_of(module) if by_layer else module for module in modules))
    columns = columns[:120]
    cells = [[_mean(shares[client].get(column)) for column in columns] for client in clients]
    names = columns if by_layer else [label(column) for column in columns]
    count = len(seen.clients)
    more = f" The {len(clients)} most exposed of {count} clients." if count > len(clients) else ""
    lead = f"Share of each module's parameters that a client has seen, in per cent; the darker, the more.{more}"
    title = "Who has seen what"
    svg = charts.heat(title, [clean(name) for name in clients], [clean(name) for name in names], cells)
    steps = [(charts.shade(share), f"{round(100 * share)} %") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return [Picture(title, lead, svg, steps, scrolls=True)]


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def layer_of(name: str) -> str:
    """`layer 3` for whatever is in layer 3, else the first telling part of the name."""
    found = _LAYER.search(name)
    if found:
        return f"layer {found[1]}"
    lowered = name.lower()
    if "embed" in lowered or "wte" in lowered or "wpe" in lowered:
        return "embeddings"
    if any(word in lowered for word in ("classifier", "lm_head", "score", "pooler", "cls")):
        return "head"
    return "other"


def label(module: str) -> str:
    """A module's name as short as it can be told from the others: `3 attention.query`, `word_embeddings`."""
    found = _LAYER.search(module)
    rest = module[found.end() :] if found else ".".join(module.split(".")[-1:])
    words = [word for word in rest.split(".") if word not in _FILLERS] or rest.split(".")[-1:]
    return f"{found[1]} {'.'.join(words)}" if found else ".".join(words)


def _recovery(audit: Audit) -> list[Picture]:
    """Recovery by layer."""
    worst = worst_recovery(audit)
    if worst is None:
        return []
    layers: dict[str, list[TensorRecovery]] = {}
    for tensor in worst.tensors:
        layers.setdefault(layer_of(tensor.tensor), []).append(tensor)
    order = sorted(layers, key=lambda name: (name != "embeddings", *_number(name)))
    with_base = worst.peak.delta_recovered is not None
    rows = [_layer_bar(name, layers[name], with_base) for name in order][:60]
    what = "the weight difference to the public model" if with_base else "the weights' energy"
    lead = (
        f"How much of {what} the best attack gets back from {worst.scope}, layer by layer; the dark part is known "
        "exactly. A lower bound: better attacks may exist. It says nothing about skill."
    )
    key = [("#6f93e0", "recovered"), ("#2456c8", "known exactly"), ("#edf1f7", "not recovered")]
    return [Picture("What can be recovered", lead, charts.bars("Recovery per layer", rows, 100), key)]


def _number(name: str) -> tuple[int, int]:
    return (0, int(name.split()[1])) if name.startswith("layer ") else (1, 0)


def _layer_bar(name: str, tensors: list[TensorRecovery], with_base: bool) -> Bar:
    size = sum(tensor.parameters for tensor in tensors)

    def mean(values: Iterable[float]) -> float:
        pairs = zip(values, tensors, strict=True)
        return sum(min(max(value, 0.0), 1.0) * tensor.parameters for value, tensor in pairs) / max(size, 1)

    energy = mean(1 - 10**tensor.log10_nmse for tensor in tensors)
    if with_base:
        deltas = [1 - 10**t.log10_nmse if t.delta_recovered is None else t.delta_recovered for t in tensors]
        energy = mean(deltas)
    exact = mean(tensor.exact_share for tensor in tensors)
    return Bar(name, (("main", energy), ("exact", min(exact, energy))), percent(energy))


def _base_alone(function: FunctionRecovery) -> list[tuple[float, float]]:
    """rho of the public base with the same examples: what an attacker gets without any proxy."""
    whole = next(score.loss for score in function.scores if score.model == "global")
    span = function.floor_loss - whole
    return [
        (math.log10(point.public_examples + 1), (function.floor_loss - point.base_loss) / span)
        for point in function.curve
        if point.base_loss is not None and span > 0
    ]


def _function(audit: Audit) -> list[Picture]:
    """rho over public examples, or the losses as bars where nobody fine-tuned."""
    function = audit.function
    if function is None:
        return []
    title, rho = "What the recovered model can do", function.rho
    way = (
        "cannot be determined: the model is no better than nothing"
        if rho is None
        else f"{percent(max(rho, 0))} of the way"
    )
    lead = f"From nothing ({function.floor}) to the owner's model, the best attacked proxy gets {way} in loss."
    if rho is None or not any(point.rho is not None for point in function.curve):
        most = max((score.loss for score in function.scores), default=1.0) or 1.0
        rows = [Bar(score.model, (("main", score.loss / most),), f"{score.loss:.3g}") for score in function.scores]
        return [Picture(title, f"{lead} Bars show losses.", charts.bars("Losses", rows, 100))]
    limit = audit.policy.get("limits", {}).get("proxy", {}).get("rho")
    dashed = [("#17693f", "the owner's model"), *_limit_key(limit)]
    return [Picture(title, lead, charts.draw(_curve(function, rho, limit)), (), dashed)]


def _curve(function: FunctionRecovery, rho: float, limit: float | None) -> Plot:
    """rho after fine-tuning, from what it is without it."""
    points = [(point.public_examples, point.rho) for point in function.curve if point.rho is not None]
    if all(count for count, _ in points):
        points.insert(0, (0, rho))
    line = [(math.log10(count + 1), value) for count, value in points]
    alone = _base_alone(function)
    return Plot(
        "Recovered function",
        "public examples that the attacker fine-tunes with",
        [*([Line("expected", alone, "base alone")] if alone else []), Line("worst", line, "rho")],
        [Level("ceiling", 1.0), *([] if limit is None else [Level("limit", limit)])],
        ticks=[(math.log10(count + 1), f"{count:,}") for count, _ in points],
        low=math.floor(min(0.0, *(value for _, value in points)) * 10) / 10,
        high=math.ceil(max(1.0, *(value for _, value in points)) * 10) / 10,
    )
