"""What an audit works on: proxies opened without trust, and the owner's truth, key, ledger and public base.

Which units a proxy shows comes from its own visible.safetensors; whether that is true is what the checks find out. What
cannot be read, or does not belong together, becomes a finding and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedqsn_cli.artifacts import ledger as ledgers
from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.manifests import unit_table
from fedqsn_cli.auditing.findings import Check, Finding
from fedqsn_cli.auditing.opened_proxy import OpenedProxy, open_proxy
from fedqsn_cli.auditing.rules import finding
from fedqsn_cli.checkpoint import resolve
from fedqsn_cli.errors import FedqsnError
from fedqsn_cli.masks import job_key
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.models.model import OpenModel, open_model, open_source
from fedqsn_cli.models.public_base import IncompatibleBase, PublicBase, open_base
from fedqsn_cli.options import AuditOptions
from fedqsn_cli.planning.tensor_plan import MASK_AXES

__all__ = ["Inputs", "OpenedProxy", "ProxyFolder", "Report", "open_inputs", "open_proxy"]


@dataclass(frozen=True, slots=True)
class ProxyFolder:
    """A proxy as it was named: its folder and, if its files can be read, what is in it."""

    scope: str
    folder: Path
    opened: OpenedProxy | None


@dataclass(frozen=True)
class Inputs:
    """Everything that an audit was given.

    Args:
        truth: the global model that the proxies were exported from. after: the global model of the next round.
        server: the server model that they were exported from, in jobs whose clients train the public base in its holes.
        releases: the ledger. base: a public base checkpoint, under the truth's names; without a truth it has no use.
    """

    folders: tuple[ProxyFolder, ...] = ()
    truth: OpenModel | None = None
    after: OpenModel | None = None
    job: JobKey | None = None
    releases: tuple[Release, ...] | None = None
    base: PublicBase | None = None
    server: OpenModel | None = None

    @property
    def origin(self) -> OpenModel | None:
        """The model whose visible weights, and holes, the proxies show."""
        return self.server or self.truth

    @property
    def proxies(self) -> tuple[OpenedProxy, ...]:
        """The proxies that can be read."""
        return tuple(folder.opened for folder in self.folders if folder.opened is not None)

    def release(self, proxy: OpenedProxy) -> Release | None:
        """The ledger line of a proxy, by its id."""
        return next((one for one in self.releases or () if one.proxy_id == proxy.manifest.proxy_id), None)


@dataclass
class Report:
    """Findings and checks as they come in."""

    findings: list[Finding] = field(default_factory=list)
    checked: list[Check] = field(default_factory=list)

    def add(self, rule: str, scope: str, why: str, found: Sequence[Finding]) -> None:
        """A check that ran: it passed if it found nothing."""
        self.findings += found
        self.checked.append(Check(rule, scope, "fail" if found else "pass", why))

    def skip(self, rule: str, scope: str, why: str) -> None:
        """A check that could not run."""
        self.checked.append(Check(rule, scope, "not-run", why))


NO_OPTIONS = AuditOptions()


def open_inputs(proxies: Sequence[str | Path], report: Report, options: AuditOptions = NO_OPTIONS) -> Inputs:
    """Open everything; what cannot be read or does not belong becomes an FQ903 or FQ904 finding, and is left out."""
    key, ledger, truth = options.key, options.ledger, options.truth
    job = _tried("key", report, lambda: job_key.load(key) if key is not None else None)
    releases = _tried("ledger", report, lambda: tuple(ledgers.read(Path(ledger))) if ledger is not None else None)
    folders = tuple(_open_folder(scope, place, report) for scope, place in _named(proxies))
    axis = job.axis if job is not None else _axis_of(truth, folders)
    overrides = job.overrides if job is not None else None

    def model(reference: str | Path | None, wanted: str) -> OpenModel | None:
        opened = open_model(str(reference), axis=axis, overrides=overrides) if reference is not None else None
        return None if opened is None else _belonging(opened, wanted, job, folders, report)

    whole = _tried("truth", report, lambda: model(truth, "truth"))
    return Inputs(
        tuple(_fitting(folder, whole, report) for folder in folders),
        whole,
        _tried("after", report, lambda: model(options.after, "after")),
        job,
        releases,
        _tried("base", report, lambda: _matched(options.public_base, whole, folders, report)),
        _tried("server", report, lambda: model(options.server, "server")),
    )


def _named(proxies: Sequence[str | Path]) -> list[tuple[str, str]]:
    """(scope, reference) of each proxy; scopes are the directories' names, told apart by a number where equal."""
    seen: dict[str, int] = {}
    named = []
    for place in map(str, proxies):
        name = place.rstrip("/").rsplit("/", 1)[-1] or place
        seen[name] = seen.get(name, 0) + 1
        named.append((f"proxy {name}" + (f" #{seen[name]}" if seen[name] > 1 else ""), place))
    return named


def _tried(scope: str, report: Report, call: Any) -> Any:
    """The result of a call, or None with a finding."""
    try:
        return call()
    except (FedqsnError, OSError) as error:
        report.findings.append(finding("FQ903", scope, _said(error)))
        return None


def _said(error: Exception) -> str:
    """What went wrong, without the path where."""
    return error.what if isinstance(error, FedqsnError) else f"cannot be read ({type(error).__name__})"


def _open_folder(scope: str, place: str, report: Report) -> ProxyFolder:
    folder = Path(place)
    try:
        folder = resolve(place).path
        return ProxyFolder(scope, folder, open_proxy(folder, scope))
    except (FedqsnError, OSError) as error:
        report.findings.append(finding("FQ903", scope, f"the proxy cannot be read: {_said(error)}"))
        return ProxyFolder(scope, folder, None)


def _axis_of(truth: str | Path | None, folders: Sequence[ProxyFolder]) -> str:
    """Without a key, the axis whose plan is the proxies' own."""
    opened = next((folder.opened for folder in folders if folder.opened is not None), None)
    if truth is not None and opened is not None:
        for axis in MASK_AXES:
            try:
                if unit_table(open_model(str(truth), axis=axis).plan.tensors) == opened.manifest.tensors:
                    return axis
            except (FedqsnError, OSError):
                break
    return "neuron"


def _belonging(
    model: OpenModel, wanted: str, job: JobKey | None, folders: Sequence[ProxyFolder], report: Report
) -> OpenModel | None:
    """The model, if it can be compared with; else None with a finding."""
    problem = None
    if model.kind == "masked-model" or model.is_quantized:
        problem = "is on its way to a proxy; give the dense global model"
    elif model.kind == "server-model" and wanted == "truth":
        problem = "is a server model, in which hidden weights are missing; give the global model"
    elif model.kind != "server-model" and wanted == "server":
        problem = "is no server model"
    elif job is not None and model.plan.digest != job.plan_digest:
        problem = "has another plan than the key"
    elif job is None and wanted == "truth":
        table = unit_table(model.plan.tensors)
        odd = [one.scope for one in folders if one.opened is not None and one.opened.manifest.tensors != table]
        if odd:
            problem = f"has other units than {odd[0]} lists; give the key, which knows the plan"
    if problem is None:
        return model
    report.findings.append(finding("FQ904", wanted, f"the {wanted} {problem}"))
    return None


def _matched(
    reference: str | Path | None, truth: OpenModel | None, folders: Sequence[ProxyFolder], report: Report
) -> PublicBase | None:
    """The public base under the names of the truth; for an attack a part of it is enough, for base fill it is not."""
    if reference is None:
        return None
    if truth is None:
        open_source(str(reference))  # of no use, but what cannot be read is to be told
        return None
    filled = any(one.opened is not None and one.opened.manifest.fill == "base" for one in folders)
    try:
        return open_base(str(reference), truth, partial=not filled)
    except IncompatibleBase as error:
        message = f"the base does not go with the truth: {error.what}"
        report.findings.append(finding("FQ904", "base", message, tensor=error.tensor))
        return None


def _fitting(folder: ProxyFolder, truth: OpenModel | None, report: Report) -> ProxyFolder:
    """A proxy whose list of units is not the plan's cannot be compared; its list is a lie, or its key another one."""
    if truth is None or folder.opened is None or folder.opened.manifest.tensors == unit_table(truth.plan.tensors):
        return folder
    message = "proxy.json lists other units than the plan of the truth, so its weights were not compared"
    report.findings.append(finding("FQ005", folder.scope, message))
    return ProxyFolder(folder.scope, folder.folder, None)
