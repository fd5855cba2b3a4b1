"""What an audit works on: proxies opened without trust, and the owner's truth, key, ledger and public base.

Which units a proxy shows comes from its own visible.safetensors; whether that is true is what the checks find out. What
cannot be read, or does not belong together, becomes a finding and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from fedqsn_cli.artifacts import ledger as ledgers
from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.manifests import unit_table
from fedqsn_cli.auditing.completeness import DOES_NOT_BELONG, Collector
from fedqsn_cli.auditing.opened_proxy import OpenedProxy, open_proxy
from fedqsn_cli.auditing.registry import Need
from fedqsn_cli.checkpoint import resolve
from fedqsn_cli.checkpoint.source import SCHEME
from fedqsn_cli.errors import FedqsnError, FormatError
from fedqsn_cli.masks import job_key
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.models.model import OpenModel, open_model, open_source
from fedqsn_cli.models.public_base import IncompatibleBase, PublicBase, open_base
from fedqsn_cli.options import AuditOptions
from fedqsn_cli.planning.tensor_plan import MASK_AXES
from fedqsn_cli.progress import SILENT, Progress

T = TypeVar("T")
U = TypeVar("U")

NO_OPTIONS = AuditOptions()


@dataclass(frozen=True, slots=True)
class ProxyFolder:
    """A proxy as it was named: its folder and, if it can be compared, what is in it.

    Args:
        opened: None where its files cannot be read, or where it lists other units than the plan of the truth.
        malformed: whether its files could be read, but are not in the format of a proxy.
        downloaded: from a hub, whose cache keeps bytes, but no modes and times.
    """

    scope: str
    folder: Path
    opened: OpenedProxy | None
    malformed: bool = False
    lists_other_units: bool = False
    downloaded: bool = False

    @property
    def scopes(self) -> tuple[str, ...]:
        """As checks take it."""
        return (self.scope,)


@dataclass(frozen=True, slots=True)
class OwnerInputs:
    """What only the owner has and most checks need: the truth, and the key that tells what is hidden of it."""

    truth: OpenModel
    job: JobKey


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything that an audit was given.

    Args:
        folders: the proxies. base: a public base checkpoint, under the truth's names; without a truth it has no use.
        truth: the global model that the proxies were exported from. after: the global model of the next round.
        server: the server model that they were exported from, in jobs whose clients train the public base in its holes.
        releases: the ledger. earlier: proxies of earlier rounds, which attackers use, and which are not judged.
        options: as they were given. progress: told of tensors and steps.
    """

    folders: tuple[ProxyFolder, ...] = ()
    base: PublicBase | None = None
    truth: OpenModel | None = None
    after: OpenModel | None = None
    server: OpenModel | None = None
    job: JobKey | None = None
    releases: tuple[Release, ...] | None = None
    earlier: tuple[OpenedProxy, ...] = ()
    options: AuditOptions = NO_OPTIONS
    progress: Progress = SILENT
    _shared: dict[str, Any] = field(default_factory=dict)

    @property
    def owner(self) -> OwnerInputs | None:
        """Truth and key, where both were given."""
        return None if self.truth is None or self.job is None else OwnerInputs(self.truth, self.job)

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
        return next((line for line in self.releases or () if line.proxy_id == proxy.manifest.proxy_id), None)

    def shared(self, name: str, build: Callable[[], T]) -> T:
        """What several checks use, built by the first of them."""
        if name not in self._shared:
            self._shared[name] = build()
        value: T = self._shared[name]
        return value


def pair(one: T | None, other: U | None) -> tuple[T, U] | None:
    """Both, where both were given."""
    return None if one is None or other is None else (one, other)


PROXY: Need[tuple[OpenedProxy, ...]] = Need(("a readable proxy",), lambda inputs: inputs.proxies or None)
PROXIES: Need[tuple[OpenedProxy, ...]] = Need(
    ("two proxies of one round",), lambda inputs: inputs.proxies if len(inputs.proxies) > 1 else None
)
TRUTH: Need[OpenModel] = Need(("--truth",), lambda inputs: inputs.truth)
KEY: Need[JobKey] = Need(("--key",), lambda inputs: inputs.job)
OWNER: Need[OwnerInputs] = Need(("--truth", "--key"), lambda inputs: inputs.owner)
ORIGIN: Need[tuple[OpenModel, JobKey]] = Need(OWNER.options, lambda inputs: pair(inputs.origin, inputs.job))
BASE: Need[PublicBase] = Need(("--public-base",), lambda inputs: inputs.base)
LEDGER: Need[tuple[Release, ...]] = Need(("--ledger",), lambda inputs: inputs.releases)
RELEASES: Need[tuple[Release, ...]] = Need(("--ledger with releases",), lambda inputs: inputs.releases or None)
EVAL_DATA: Need[str | Path] = Need(("--eval-data",), lambda inputs: inputs.options.eval_data)
PUBLIC_DATA: Need[str | Path] = Need(("--public-data",), lambda inputs: inputs.options.public_data)
BASELINE: Need[str | Path] = Need(("--baseline",), lambda inputs: inputs.options.baseline)


def open_inputs(
    proxies: Sequence[str | Path],
    collector: Collector,
    options: AuditOptions = NO_OPTIONS,
    progress: Progress = SILENT,
) -> Inputs:
    """Open everything; what cannot be read or does not belong becomes an FQ903 or FQ904 finding, and is left out."""
    key, ledger = options.key, options.ledger
    job = collector.attempt(lambda: job_key.load(key) if key is not None else None, "key")
    releases = collector.attempt(
        lambda: tuple(ledgers.read(Path(ledger), job)) if ledger is not None else None, "ledger"
    )
    folders = tuple(_open_folder(scope, reference, collector) for scope, reference in _named(proxies))
    axis = job.axis if job is not None else _axis_of(options.truth, folders)
    overrides = job.overrides if job is not None else None

    def model(reference: str | Path | None, wanted: str) -> OpenModel | None:
        def opened() -> OpenModel | None:
            if reference is None:
                return None
            found = open_model(str(reference), axis=axis, overrides=overrides)
            problem = _incompatible_model(found, wanted, job, folders)
            if problem is None:
                return found
            collector.add([DOES_NOT_BELONG.finding(wanted, f"the {wanted} {problem}")])
            return None

        return collector.attempt(opened, wanted)

    truth = model(options.truth, "truth")
    after = model(options.after, "after")
    whole = job is not None and job.sends_nothing
    base = collector.attempt(lambda: _matched_base(options.public_base, truth, folders, collector, whole), "base")
    server = model(options.server, "server")
    folders = tuple(_compatible_proxy(folder, truth) for folder in folders)
    earlier = tuple(_earlier(options.earlier or (), truth, collector))
    return Inputs(folders, base, truth, after, server, job, releases, earlier, options, progress)


def _named(proxies: Sequence[str | Path]) -> list[tuple[str, str]]:
    """(scope, reference) of each proxy; scopes are the directories' names, told apart by a number where equal."""
    seen: dict[str, int] = {}
    named = []
    for reference in map(str, proxies):
        name = reference.rstrip("/").rsplit("/", 1)[-1] or reference
        seen[name] = seen.get(name, 0) + 1
        named.append((f"proxy {name}" + (f" #{seen[name]}" if seen[name] > 1 else ""), reference))
    return named


def _open_folder(scope: str, reference: str, collector: Collector) -> ProxyFolder:
    problem = "the proxy cannot be read"
    folder = collector.attempt(lambda: resolve(reference).path, scope, problem=problem)
    if folder is None:
        return ProxyFolder(scope, Path(reference), None)
    malformed = False

    def opened() -> OpenedProxy:
        nonlocal malformed
        try:
            return open_proxy(folder, scope)
        except FormatError:
            malformed = True
            raise

    proxy = collector.attempt(opened, scope, problem=problem)
    return ProxyFolder(scope, folder, proxy, malformed, downloaded=reference.startswith(SCHEME))


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


def _incompatible_model(
    model: OpenModel, wanted: str, job: JobKey | None, folders: Sequence[ProxyFolder]
) -> str | None:
    """Why a model cannot be compared with the proxies, if it cannot."""
    if model.kind == "masked-model" or model.is_quantized:
        return "is masked for a client or quantized; give the dense global model"
    if model.kind == "server-model" and wanted == "truth":
        return "is a server model, in which hidden weights are missing; give the global model"
    if model.kind != "server-model" and wanted == "server":
        return "is not a server model"
    if job is not None:
        return None if model.plan.digest == job.plan_digest else "has another plan than the key"
    if wanted == "truth":
        other = next((folder.scope for folder in folders if _lists_other_units(folder, model)), None)
        return None if other is None else f"has other units than {other} lists; give the key, which knows the plan"
    return None


def _lists_other_units(folder: ProxyFolder, model: OpenModel) -> bool:
    """Are the units that a proxy lists not those of the model's plan?"""
    return folder.opened is not None and folder.opened.manifest.tensors != unit_table(model.plan.tensors)


def _compatible_proxy(folder: ProxyFolder, truth: OpenModel | None) -> ProxyFolder:
    """A proxy that lists other units than the plan cannot be compared: its list is false, or its key is another one."""
    if truth is None or not _lists_other_units(folder, truth):
        return folder
    return replace(folder, opened=None, lists_other_units=True)


def _earlier(proxies: Sequence[str | Path], truth: OpenModel | None, collector: Collector) -> Iterator[OpenedProxy]:
    """The proxies of earlier rounds that can be compared with the truth; a finding for each that cannot."""
    for scope, reference in _named(proxies):
        found = _compatible_proxy(_open_folder(f"earlier {scope}", reference, collector), truth)
        if found.lists_other_units:
            collector.add([DOES_NOT_BELONG.finding(found.scope, "it lists other units than the truth")])
        elif found.opened is not None:
            yield found.opened


def _matched_base(
    reference: str | Path | None,
    truth: OpenModel | None,
    folders: Sequence[ProxyFolder],
    collector: Collector,
    whole: bool,
) -> PublicBase | None:
    """The public base under the names of the truth: all of it where holes were filled with it, else what fits.

    Args:
        whole: it takes the place of the whole truth (p1 = 1).
    """
    if reference is None:
        return None
    if truth is None:
        open_source(str(reference))  # of no use, but what cannot be read is reported
        return None
    filled = any(folder.opened is not None and folder.opened.manifest.fill == "base" for folder in folders)
    try:
        return open_base(str(reference), truth, partial=not filled, whole=whole)
    except IncompatibleBase as error:
        message = f"the public base does not match the truth: {error.what}"
        collector.add([DOES_NOT_BELONG.finding("base", message, tensor=error.tensor)])
        return None
