"""`fedqsn inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fedqsn_cli import console, text
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.artifacts.ledger import Release
    from fedqsn_cli.cli.views import InspectView
    from fedqsn_cli.inspection import Inspection
    from fedqsn_cli.models.public_base import Match
    from fedqsn_cli.options import InspectOptions
    from fedqsn_cli.planning.tensor_plan import TensorPlan


_SHOWN_RELEASES = 1000  # more than anybody reads; a table of 100,000 takes half a minute


def inspect(
    path: Annotated[
        str, argument("PATH", "A model, proxy, update, key, ledger or .safetensors file; or an hf:// reference.")
    ],
    options: InspectOptions,
    view: InspectView,
) -> None:
    """Show what an artifact is and what is masked in it.

    Works on everything that fedqsn reads or writes: its tensors and bytes, how many parameters are masked and
    quantized, and every tensor that ships in the clear. For a model that was not masked yet, this is what would be
    done. Never shows a secret: of a key it names only the job that it belongs to.

    Examples:

      fedqsn inspect global/ --show-plan
      fedqsn inspect global/ --public-base hf://owner/base
      fedqsn inspect proxy/
      fedqsn inspect ledger.jsonl --json
    """
    from fedqsn_cli.inspection import inspect as run

    inspection = run(path, options)
    console.show(view.mode, inspection, essential=[inspection.kind], parts=_parts(inspection))


def _parts(inspection: Inspection) -> list[console.Part]:
    from fedqsn_cli.cli import tables

    rows: list[tuple[str, object]] = [(inspection.kind, inspection.path), *_facts(inspection.facts)]
    if inspection.contents is not None:
        rows += tables.contents(inspection.contents)
    parts: list[console.Part] = [console.Facts(rows)]
    if inspection.shares is not None:
        presumed = tables.quantization(inspection.presumed) if inspection.presumed else None
        parts.append(console.Facts([("if exported as", presumed), *tables.shares(inspection.shares)]))
    if inspection.clear:
        parts.append(_clear_table(inspection))
    if inspection.releases:
        parts += _release_parts(inspection.releases)
    if inspection.plan is not None:
        parts.append(_plan_table(inspection.plan))
    if inspection.public_base is not None:
        parts += _base_parts(inspection.public_base)
    if inspection.unknown:
        names = ", ".join(inspection.unknown)
        parts.append(f"No rule knows: {names}. Nothing is exported before a plan file (--plan-file) names their role.")
    if inspection.problem is not None:
        parts.append(f"No plan: {inspection.problem}")
    return parts


def _facts(facts: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Facts as people read them: nested ones spelled out, absent ones left out."""
    from fedqsn_cli.artifacts.manifests import Quantization
    from fedqsn_cli.cli import tables

    rows: list[tuple[str, object]] = []
    for name, value in facts.items():
        words = name.replace("_", " ")
        if name.startswith("hidden"):
            rows.append((words, f"{text.percent(value)} of all parameters"))
        elif isinstance(value, Quantization):
            rows.append((words, tables.quantization(value)))
        elif isinstance(value, bool):
            rows.append((words, "yes" if value else "no"))
        elif isinstance(value, float):
            rows.append((words, f"{value:.6g}"))
        elif isinstance(value, Mapping):
            rows += [(f"{words}: {inner}", item) for inner, item in _facts(value)]
        elif isinstance(value, list):
            rows.append((words, ", ".join(str(item) for item in value) or None))
        else:
            rows.append((words, value))
    return rows


def _clear_table(inspection: Inspection) -> console.Table:
    return console.Table(
        ("in the clear", "role", "tensors", "parameters", "share"),
        [
            (
                tensors.name,
                tensors.role,
                tensors.tensors,
                text.number(tensors.parameters),
                text.percent(tensors.share),
            )
            for tensors in inspection.clear
        ],
        numbers=frozenset({"tensors", "parameters", "share"}),
    )


def _release_parts(releases: Sequence[Release]) -> list[console.Part]:
    latest = releases[-_SHOWN_RELEASES:]
    total = text.number(len(releases))
    left_out = [f"The latest {text.number(len(latest))} of {total} releases; --json lists all."]
    return [_release_table(latest), *(left_out if len(latest) < len(releases) else [])]


def _release_table(releases: Sequence[Release]) -> console.Table:
    return console.Table(
        ("round", "client", "p1", "p2", "schedule", "format", "proxy"),
        [
            (
                release.round,
                release.client,
                release.p1,
                release.p2,
                release.schedule,
                release.quantization.format if release.quantization else "none",
                release.proxy_id[:12],
            )
            for release in releases
        ],
        numbers=frozenset({"round", "p1", "p2"}),
    )


def _plan_table(plan: Sequence[TensorPlan]) -> console.Table:
    return console.Table(
        ("tensor", "dtype", "shape", "role", "units", "p1", "along", "mask of", "quantized", "decided by"),
        [
            (
                tensor.name,
                tensor.dtype,
                "x".join(map(str, tensor.shape)),
                tensor.role,
                text.number(tensor.units) if tensor.masked else "-",
                _ratio(tensor),
                tensor.axis or "-",
                _mask_of(tensor),
                ("packed" if tensor.packable else "dense") if tensor.quantized else "-",
                tensor.origin + (", clears it" if tensor.cleared else ""),
            )
            for tensor in plan
        ],
        numbers=frozenset({"units", "p1"}),
    )


_MATCHED = {
    "exact": "as it is",
    "prefix": "as it is, under another prefix",
    "tied": "as it is, under a tied name",
    "converted": "converted to the model's dtype",
    "resized": "resized: missing rows are zeros, others are left out",
    "zeros": "zeros",
}


def _base_parts(matches: Sequence[Match]) -> list[console.Part]:
    from fedqsn_cli.cli import tables
    from fedqsn_cli.models.public_base import counted

    rows = [
        (
            match.name,
            match.source or "-",
            match.dtype or "-",
            "x".join(map(str, match.shape)) if match.shape is not None else "-",
            _MATCHED[match.kind],
        )
        for match in matches
    ]
    return [
        console.Facts([("public base", tables.public_base(counted(matches)))]),
        console.Table(("masked tensor", "public base", "dtype", "shape", "fills it"), rows),
    ]


def _ratio(tensor: TensorPlan) -> str:
    """The share that the server hides: a number once it is known, the job's where the plan sets no other."""
    if not tensor.masked:
        return "-"
    return "the job's" if tensor.p1 is None else f"{tensor.p1:g}"


def _mask_of(tensor: TensorPlan) -> str:
    """Whose mask a tensor has: its own, or that of the tensor it goes with."""
    if not tensor.masked:
        return "-"
    first = tensor.groups[0]
    own = "its own" if first.split("#")[0] == tensor.name else first
    return own if len(tensor.groups) == 1 else f"{own}, one an expert"
