"""The tables of README.md, as Markdown: medians over seeds, the range behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import exp
from typing import Any

from benchmarks.study.figures import Results, Row, Spread, best_so_far, curve_of, ended, keeps_a, spread, spread_at
from benchmarks.study.settings import (
    ABLATIONS,
    BLENDS_ENDING,
    CHOICES,
    CONSOLIDATED,
    ENDED,
    ENDING_BLENDS,
    LONG,
    MANY_BLENDS,
    METHODS,
    NAMED,
    NEWS,
    PLAYED,
    SIZES,
    STRONG,
    TASKS,
    TOPICS,
    WEIGHTS,
    Method,
    Task,
    plays,
)

Written = Callable[[float], str]
NONE = "–"


def all_tables(results: Results, rows: Sequence[Row]) -> dict[str, str]:
    """Every generated part by its name."""
    return {
        "machine": machine(results),
        "rates": rates(),
        "worlds": worlds(results),
        **{task.name: methods(rows, task) for task in TASKS},
        **{f"endings-{task.name}": endings(results, task.name) for task in TASKS},
        "traffic": traffic(rows),
        "summit": summit(results, rows),
        "curves": curves(results, rows),
        "ablations": ablations(rows),
        "blends": blends(results),
        "choices": choices(results, rows),
    }


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def whole_percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def two(value: float) -> str:
    return f"{value:.2f}"


def perplexity(loss: float) -> str:
    return f"{exp(loss):.1f}"


def written(found: Spread | None, number: Written) -> str:
    """Median, and the range where seeds differ."""
    if found is None:
        return NONE
    middle, low, high = map(number, found)
    return middle if low == high else f"{middle} ({low}–{high})"


def quality(task: str) -> tuple[str, Written, str]:
    """How a task's skills are written: the ending of the figure's name, the number, the heading."""
    return ("", percent, "%") if task == TOPICS.name else ("_loss", perplexity, "ppl")


def methods(rows: Sequence[Row], played: Task) -> str:
    """The main table of a task."""
    task, (ending, number, unit) = played.name, quality(played.name)
    head = [
        "method",
        f"A after, {unit}",
        f"B after, {unit}",
        "A left",
        "share of FedAvg's gain on B",
        f"proxy A / B, {unit}",
        "ρ(0)",
        *[f"ρ'({n})" for n in played.sizes],
        f"attacker's A at 64, {unit}",
        "secret weights recovered",
    ]
    body = []
    for method in [*METHODS, *ENDED]:
        name = method.name
        if spread(rows, task, name, "final_b_loss") is None:
            continue
        proxy = [written(spread(rows, task, name, f"proxy_{part}{ending}"), number) for part in "ab"]
        attacker = "attack_a_64" if not ending else "attack_a_loss_64"
        body.append(
            [
                method.title,
                _marked(rows, task, name, written(spread(rows, task, name, f"final_a{ending}"), number)),
                written(spread(rows, task, name, f"final_b{ending}"), number),
                written(spread(rows, task, name, "a_left"), two),
                written(spread(rows, task, name, "gain"), two),
                " / ".join(proxy),
                written(spread_at(rows, task, name, 0, added=False), two),
                *[written(spread_at(rows, task, name, n, added=True), two) for n in played.sizes],
                written(spread(rows, task, name, attacker), number),
                written(spread(rows, task, name, "weights"), two),
            ]
        )
    return markdown(head, body)


def _marked(rows: Sequence[Row], task: str, method: str, text: str) -> str:
    return text if keeps_a(rows, task, method) else f"{text} ↓"


def traffic(rows: Sequence[Row]) -> str:
    """What is never sent, what travels, how long it takes."""
    head = ["method"]
    for task in (TOPICS.name, NEWS.name):
        head += [f"{task}: never sent", "MB down", "MB up", "λ", "seconds"]
    body = []
    for method in [one for one in METHODS if one.name in PLAYED[NEWS.name]]:
        line = [method.title]
        for task in (TOPICS.name, NEWS.name):
            for figure, number in (
                ("never_sent", whole_percent),
                ("mb_down", _short),
                ("mb_up", _short),
                ("blend", two),
                ("seconds", _short),
            ):
                found = spread(rows, task, method.name, figure)
                middle = number(found.middle) if found is not None else NONE
                line.append(middle if figure != "blend" or method.hides else NONE)
        body.append(line)
    return markdown(head, body)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def rates() -> str:
    """How owner and clients train, as the settings have it."""
    head = [
        "task",
        "the owner's lr",
        "lr of a client",
        "rounds",
        "steps a round",
        "consolidation: steps",
        "batch",
        "lr",
    ]
    body = [
        [
            task.name,
            *[f"{lr:g}" for lr in (task.owner_lr, task.lr)],
            *[str(count) for count in (task.rounds, task.round_steps, task.consolidate_steps, task.consolidate_batch)],
            f"{task.consolidate_lr:g}",
        ]
        for task in TASKS
    ]
    return markdown(head, body)


def worlds(results: Results) -> str:
    """Base and owner before the job, and what public examples teach the base."""
    head = ["task, seed", "base A / B", "owner A / B", "base after 64 examples: A", "after 256: A"]
    body = []
    for (task, seed, method), result in results.items():
        if method == "world":
            pick = _picked(task)
            curve = curve_of(results, task, seed, "floor")
            best = best_so_far(curve, "accuracy" if task == TOPICS.name else "loss")
            number = quality(task)[1]
            before = [f"{pick(result[who]['a'])} / {pick(result[who]['b'])}" for who in ("base", "owner")]
            body.append(
                [
                    f"{task}, {seed}",
                    *before,
                    *[number(best[n]) if n in best else NONE for n in SIZES],
                ]
            )
    return markdown(head, body)


def _picked(task: str) -> Callable[[Mapping[str, Any]], str]:
    """A score as a table writes it."""
    if task == TOPICS.name:
        return lambda score: f"{100 * score['accuracy']:.1f} %"
    return lambda score: f"{exp(score['loss']):.1f} ppl"


def summit(results: Results, rows: Sequence[Row]) -> str:
    """Three questions with numbers for each, for every task; the last one where many blends were measured."""
    head = ["task", "method", "share of FedAvg's gain on B", "ρ(64)", "ρ'(64)", "of A's secret gain left"]
    body = []
    for task in (one.name for one in TASKS):
        for title, best in (
            ("least ρ'(64) with A kept and 90 % of the gain", _least_leak(rows, task)),
            ("most gain with A kept and ρ'(64) below one half", _most_gain(rows, task)),
        ):
            if best is None:
                body.append([f"{task}: {title}", "none of those measured", NONE, NONE, NONE, NONE])
                continue
            gain, left = spread(rows, task, best.name, "gain"), spread(rows, task, best.name, "a_left")
            body.append(
                [f"{task}: {title}", best.title, written(gain, two), *_leaks(rows, task, best.name), written(left, two)]
            )
    return markdown(head, [*body, *_most_of_a(results, rows)])


def _leaks(rows: Sequence[Row], task: str, method: str) -> list[str]:
    """ρ(64) and ρ'(64)."""
    return [written(spread_at(rows, task, method, 64, added=added), two) for added in (False, True)]


def _most_of_a(results: Results, rows: Sequence[Row]) -> list[list[str]]:
    """The most of A that any blend leaves with nine tenths of the gain and ρ(64) below one half."""
    title = f"{NEWS.name}: most of A by a restore with 90 % of the gain and ρ(64) below one half"
    found = []
    for method in CHOICES:
        leak = spread_at(rows, NEWS.name, _plain(method), 64, added=False)
        for blend, gain, left in _blended(results, method):
            if leak is not None and leak.middle < 0.5 and gain is not None and gain.middle >= 0.9 and left is not None:
                found.append((left, gain, method, blend))
    if not found:
        return [[title, "none of those measured", NONE, NONE, NONE, NONE]]
    left, gain, method, blend = max(found, key=lambda one: one[0].middle)
    return [
        [
            title,
            f"{method.title}, λ = {blend:g}",
            written(gain, two),
            *_leaks(rows, NEWS.name, _plain(method)),
            written(left, two),
        ]
    ]


def _blended(results: Results, method: Method) -> list[tuple[float, Spread | None, Spread | None]]:
    return ended(results, NEWS.name, method.name, "blends", "blend")


def _plain(method: Method) -> str:
    """The method whose job was restored with many blends."""
    return method.name.removesuffix(BLENDS_ENDING)


def choices(results: Results, rows: Sequence[Row]) -> str:
    """Gain on B and what is left of A for many blends: the owner's choice between his two skills."""
    head = ["p1", "ρ(64)", *[f"λ = {blend:g}" for blend in MANY_BLENDS]]
    body = []
    for method in CHOICES:
        found = {blend: (gain, left) for blend, gain, left in _blended(results, method)}
        pairs = [found.get(blend, (None, None)) for blend in MANY_BLENDS]
        leak = spread_at(rows, NEWS.name, _plain(method), 64, added=False)
        body.append(
            [
                f"{method.p1:g}",
                two(leak.middle) if leak else NONE,
                *[f"{two(gain.middle)} / {two(left.middle)}" if gain and left else NONE for gain, left in pairs],
            ]
        )
    return markdown(head, body)


def endings(results: Results, task: str) -> str:
    """What other endings of a job make of both skills: A left / share of FedAvg's gain on B."""
    head = ["job", "seeds", *[f"λ = {blend:g}" for blend in ENDING_BLENDS], *[f"w = {weight:g}" for weight in WEIGHTS]]
    body = []
    for method in CONSOLIDATED:
        seeds = sum((name, made) == (task, method.name) for name, _, made in results)
        if seeds:
            pairs = {end: (left, gain) for end, gain, left in ended(results, task, method.name, "blends", "blend")}
            both = [_pair(pairs.get(blend)) for blend in ENDING_BLENDS]
            pairs = {
                end: (left, gain) for end, gain, left in ended(results, task, method.name, "consolidated", "weight")
            }
            both += [_pair(pairs.get(weight)) for weight in WEIGHTS]
            body.append([method.title, str(seeds), *both])
    return markdown(head, body)


def _pair(found: tuple[Spread | None, Spread | None] | None) -> str:
    return NONE if found is None else " / ".join(two(one.middle) if one is not None else NONE for one in found)


def _candidates(rows: Sequence[Row], task: str) -> list[tuple[Method, float, float]]:
    """Methods that keep A, with their gain and ρ'(64)."""
    found = []
    for method in (*METHODS, *ENDED):
        gain, leak = spread(rows, task, method.name, "gain"), spread_at(rows, task, method.name, 64, added=True)
        if gain is not None and leak is not None and keeps_a(rows, task, method.name):
            found.append((method, gain.middle, leak.middle))
    return found


def _least_leak(rows: Sequence[Row], task: str) -> Method | None:
    good = [one for one in _candidates(rows, task) if one[1] >= 0.9]
    return min(good, key=lambda one: one[2])[0] if good else None


def _most_gain(rows: Sequence[Row], task: str) -> Method | None:
    good = [one for one in _candidates(rows, task) if one[2] < 0.5]
    return max(good, key=lambda one: one[1])[0] if good else None


def curves(results: Results, rows: Sequence[Row]) -> str:
    """ρ and ρ' over the number of public examples, for the methods that were measured at most sizes."""
    sizes = [0, *sorted({*SIZES, *LONG})]
    head = ["task, method", *[f"{name}({n})" for n in sizes for name in ("ρ", "ρ'")]]
    body = []
    for task in (TOPICS.name, NEWS.name):
        for method in [one for one in METHODS if one.headline]:
            line = [f"{task}, {method.title}"]
            for n in sizes:
                line += [written(spread_at(rows, task, method.name, n, added=added), two) for added in (False, True)]
            body.append(line)
    return markdown(head, body)


def ablations(rows: Sequence[Row]) -> str:
    """What was tried beside the methods, next to the preset that it changes, at the first seed."""
    first = [row for row in rows if row.seed == 0]
    head = ["task, setting", "A after", "B after", "share of FedAvg's gain on B", "ρ'(64)", "λ"]
    body = []
    for task in (TOPICS.name, NEWS.name):
        ending, number, unit = quality(task)
        for method in (STRONG, *(one for one in ABLATIONS if plays(task, one))):
            name = method.name
            body.append(
                [
                    f"{task}, {method.title}",
                    *[written(spread(first, task, name, f"final_{part}{ending}"), number) for part in "ab"],
                    written(spread(first, task, name, "gain"), two),
                    written(spread_at(first, task, name, 64, added=True), two),
                    written(spread(first, task, name, "blend"), two),
                ]
            )
    return markdown(head, body)


def blends(results: Results) -> str:
    """A and B of the same run with other blends; the last column is the one that was looked for."""
    head = ["task, method", "λ = 0: A / B", "0.25", "0.5", "1", "auto"]
    body = []
    for (task, _, method), result in results.items():
        if result.get("blends") and method in NAMED:
            pick = _picked(task)
            title = NAMED[method].title
            found = [f"{pick(one['a'])} / {pick(one['b'])}" for one in result["blends"]]
            auto = f"{pick(result['final']['a'])} / {pick(result['final']['b'])} (λ = {result['blend']:g})"
            body.append([f"{task}, {title}", *found, auto])
    return markdown(head, body)


def machine(results: Results) -> str:
    """What it was measured on, and how long that took."""
    if not results:
        return "Nothing was measured yet."
    last = next(reversed(list(results.values())))
    packages = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
    hours = sum(float(result["seconds"]) for result in results.values()) / 3600
    about = last["machine"]
    return (
        f"{len(results)} cells, {hours:.1f} hours of one core each, on {about['cores']} cores "
        f"({about['processor']}); Python {about['python']}, {packages}."
    )
