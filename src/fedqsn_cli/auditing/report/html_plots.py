"""The page's plots, each in its section with one sentence that says what to see."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from fedqsn_cli.auditing.findings import Audit, FunctionRecovery, Recovery, TensorRecovery
from fedqsn_cli.auditing.report.wording import proxies_to_99
from fedqsn_cli.exposure.results import ClientExposure, Exposure
from fedqsn_cli.html import charts
from fedqsn_cli.html.charts import Bar, Level, Line, Plot
from fedqsn_cli.html.parts import legend, section
from fedqsn_cli.text import clean, percent

MOST_LINES = 12  # clients; more become a band
MOST_ROWS = 32
MOST_COLUMNS = 40
_FILLERS = frozenset({"self", "dense", "linear", "mlp", "self_attn"})
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|block|blocks|transformer)\.(\d+)(?:\.|$)")


def worst_recovery(audit: Audit) -> Recovery | None:
    """The recovery with the least error: what all proxies together give away, most often."""
    return min(audit.recovery, key=lambda one: one.peak.log10_nmse, default=None)


def exposure(audit: Audit) -> str:
    """Exposure over the proxies that a client got, and the worst coalitions."""
    seen = audit.exposure
    if seen is None or not seen.clients:
        return ""
    limit = audit.policy.get("budget", {}).get("client")
    levels = [Level("ceiling", 1 - seen.hidden_share), *([] if limit is None else [Level("limit", limit)])]
    worst = max(seen.clients, key=lambda client: client.shares[-1])
    plot = Plot("Exposure over rounds", "proxies a client has got", _lines(seen, worst), levels, _band(seen.clients))
    estimate = "" if seen.looked_at >= 1 else f" Estimated from {percent(seen.looked_at)} of all units."
    lead = (
        f"Client {worst.client} has seen {percent(worst.shares[-1])} of all parameters in {len(worst.rounds)} "
        f"{'proxy' if len(worst.rounds) == 1 else 'proxies'}; with fresh masks 99 % of what is sent at all is seen "
        f"after {proxies_to_99(seen.proxies_to_99)}.{estimate}"
    )
    left = section("What clients have seen", lead, charts.draw(plot) + _key(seen, limit))
    return f'<div class="pair">{left}{_coalitions(audit, seen)}</div>' if seen.coalitions else left


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


def _key(seen: Exposure, limit: float | None) -> str:
    many = len(seen.clients) > MOST_LINES
    entries = [("#2456c8", "most exposed client")]
    if len(seen.clients) > 1:
        entries.append(("#dbe5f9", "all clients") if many else ("#8aa5dd", "other clients"))
    dashed = [
        ("#5a6678", "expected with fresh masks"),
        ("#17693f", f"all that is ever sent ({percent(1 - seen.hidden_share)})"),
    ]
    dashed += [] if limit is None else [("#b3261e", f"limit ({percent(limit)})")]
    return legend(entries, dashed)


def _coalitions(audit: Audit, seen: Exposure) -> str:
    single = max(client.shares[-1] for client in seen.clients)
    rows = [Bar("1 client", (("rest", 1 - seen.hidden_share), ("main", single)), percent(single))]
    for one in seen.coalitions:
        everyone = " (all)" if one.size == len(seen.clients) else ""
        segments = (("rest", 1 - seen.hidden_share), ("main", one.share))
        rows.append(Bar(f"{one.size} clients{everyone}", segments, percent(one.share)))
    sure = all(one.method == "exact" for one in seen.coalitions)
    how = (
        "Exact: no coalition has seen more."
        if sure
        else "Where not all coalitions could be tried, the best found is shown."
    )
    lead = f"What the worst coalition of each size has seen, if its members put together all they got. {how}"
    key = legend(
        [("#6f93e0", "seen together"), ("#c9d8f6", "sent to somebody, not to them"), ("#edf1f7", "never sent")]
    )
    return section("What clients could see together", lead, charts.bars("Coalitions", rows, 110) + key)


def heat_map(audit: Audit) -> str:
    """Client by module."""
    seen = audit.exposure
    if seen is None or not seen.heat_map:
        return ""
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
    more = (
        f" The {len(clients)} most exposed of {len(seen.clients)} clients." if len(seen.clients) > len(clients) else ""
    )
    lead = f"Share of each module's parameters that a client has seen, in per cent; the darker, the more.{more}"
    picture = charts.heat(
        "Who has seen what", [clean(name) for name in clients], [clean(name) for name in names], cells
    )
    steps = [(charts.shade(share), f"{round(100 * share)} %") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return section("Who has seen what", lead, f'<div class="scroll">{picture}</div>{legend(steps)}')


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def layer_of(name: str) -> str:
    """`layer 3` for whatever lies in layer 3, else the first telling part of the name."""
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


def recovery_and_function(audit: Audit) -> str:
    """Recovery by layer, beside the recovered function if that was measured."""
    made = [part for part in (_recovery(audit), _function(audit.function, audit) if audit.function else "") if part]
    return f'<div class="pair">{made[0]}{made[1]}</div>' if len(made) == 2 else "".join(made)


def _recovery(audit: Audit) -> str:
    worst = worst_recovery(audit)
    if worst is None:
        return ""
    layers: dict[str, list[TensorRecovery]] = {}
    for tensor in worst.tensors:
        layers.setdefault(layer_of(tensor.tensor), []).append(tensor)
    order = sorted(layers, key=lambda name: (name != "embeddings", *_number(name)))
    with_base = worst.peak.delta_recovered is not None
    rows = [_layer_bar(name, layers[name], with_base) for name in order][:60]
    what = "the secret difference to the public model" if with_base else "the weights' energy"
    lead = (
        f"How much of {what} the best attack gets back from {worst.scope}, layer by layer; the dark part is known "
        "exactly. A lower bound: better attacks may exist."
    )
    key = legend([("#6f93e0", "recovered"), ("#2456c8", "known exactly"), ("#edf1f7", "not recovered")])
    return section("What can be recovered", lead, charts.bars("Recovery per layer", rows, 100) + key)


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
        (math.log10(one.public_examples + 1), (function.floor_loss - one.base_loss) / span)
        for one in function.curve
        if one.base_loss is not None and span > 0
    ]


def _function(function: FunctionRecovery, audit: Audit) -> str:
    """rho over public examples, or the losses as bars where nobody fine-tuned."""
    rho = function.rho
    said = (
        "cannot be told: the model is no better than nothing" if rho is None else f"{percent(max(rho, 0))} of the way"
    )
    lead = f"From nothing ({function.floor}) to the owner's model, the best attacked proxy gets {said} in loss."
    limit = audit.policy.get("limits", {}).get("proxy", {}).get("rho")
    points = [
        (math.log10(one.public_examples + 1), one.rho, one.public_examples)
        for one in function.curve
        if one.rho is not None
    ]
    if rho is not None and points:
        start = [(0.0, rho, 0)] if all(count for _, _, count in points) else []
        line = [(x, y) for x, y, _ in [*start, *points]]
        ticks = [(x, f"{count:,}") for x, _, count in [*start, *points]]
        highest = max(1.0, *(y for _, y in line))
        lowest = min(0.0, *(y for _, y in line))
        levels = [Level("ceiling", 1.0), *([] if limit is None else [Level("limit", limit)])]
        alone = _base_alone(function)
        dashed = [
            ("#17693f", "the owner's model"),
            *([] if limit is None else [("#b3261e", f"limit ({percent(limit)})")]),
        ]
        lines = [*([Line("expected", alone, "base alone")] if alone else []), Line("worst", line, "rho")]
        plot = Plot(
            "Recovered function",
            "public examples that the attacker fine-tunes with",
            lines,
            levels,
            ticks=ticks,
            low=math.floor(lowest * 10) / 10,
            high=math.ceil(highest * 10) / 10,
        )
        return section("What the recovered model can do", lead, charts.draw(plot) + legend([], dashed))
    most = max((score.loss for score in function.scores), default=1.0) or 1.0
    rows = [Bar(score.model, (("main", score.loss / most),), f"{score.loss:.3g}") for score in function.scores]
    return section("What the recovered model can do", f"{lead} Bars show losses.", charts.bars("Losses", rows, 100))
