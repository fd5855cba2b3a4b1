"""FQ012: the release is made again by the export itself, and the whole folder must be the same.

Truth, key, ledger line and public base decide every byte of a proxy. So whatever a folder holds beyond that is found
here, however it is encoded. The other hard rules say what it may be, and are all that is left without one of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import starmap
from pathlib import Path

from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.manifests import SIGNATURE
from fedqsn_cli.auditing.checks import Together, check, grouped
from fedqsn_cli.auditing.completeness import DOES_NOT_BELONG
from fedqsn_cli.auditing.digests import digests_of, taken_of
from fedqsn_cli.auditing.findings import Entry, Finding
from fedqsn_cli.auditing.inputs import BASE, LEDGER, ORIGIN, OWNER, PROXY, Inputs
from fedqsn_cli.auditing.invariants.compared_folder import (
    ComparedFolder,
    Owners,
    wrong_entries,
    wrong_properties,
)
from fedqsn_cli.auditing.invariants.secrets import ordinary
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.registry import EXPORT_AGAIN, Rule
from fedqsn_cli.auditing.truth_pass import watched
from fedqsn_cli.export.proxy import ProxyExport
from fedqsn_cli.export.session import MaskingSession
from fedqsn_cli.kernels.digests import algorithm_of
from fedqsn_cli.kernels.hash_threads import HashThreads
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.masks.job_masks import ClientMasks, ServerMasks
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.public_base import PublicBase
from fedqsn_cli.options.groups import USUAL_SHARD_BYTES

NOT_REPRODUCED = Rule(
    "FQ012",
    "not-reproduced",
    "hard",
    what="The release is made again from truth, key, ledger line and public base; names, kinds, modes, owners and "
    "times of the folder and all files in it, and every byte in them, must be the same; of a signature, FQ013 checks "
    "the bytes.",
    why="An export has nothing to choose. What it does not explain can carry anything, in any encoding.",
    fix=EXPORT_AGAIN + " If it happens again, do not trust the tool that exported it.",
    scope="invariants",
    needs=(PROXY, OWNER, LEDGER),
)

_TRAINED = (
    "its holes are those of --server, which hold what earlier updates made of the public base; whether they hold "
    "anything else cannot be known from these inputs, but attacks read them"
)
Place = tuple[str, str | None]
"""What differs there, and in which tensor."""

_COMMIT = re.compile(r"hf://[\w.-]+/[\w.-]+@[0-9a-f]{40}", re.ASCII)


def each_release(inputs: Inputs) -> list[Together]:
    """Proxies that one pass over the truth makes again; those that are not in the ledger are left alone."""

    def kind(proxy: OpenedProxy) -> object:
        line = inputs.release(proxy)
        common = line and (str(line.quantization), line.fill, line.train, line.rescale, line.max_shard_bytes)
        return (common, _reference(proxy), algorithm_of(line.model_digest)) if line else None

    return grouped(inputs.proxies, kind)


@check(
    NOT_REPRODUCED,
    each_release,
    ORIGIN,
    more="; without them what proxies hold beyond weights is taken on trust",
    problem="cannot be exported again",
    failed="the truth cannot be exported as the ledger says",
)
def reproduce(inputs: Inputs, group: Together, given: tuple[OpenModel, JobKey]) -> Iterator[Entry]:
    """Export the proxies of one kind again, into folders that only compare."""
    (origin, job), line = given, inputs.release(group.proxies[0])
    if line is None or (line.fill == "base" and inputs.base is None):
        for scope in group.scopes:
            yield (
                NOT_REPRODUCED.lacks(scope, LEDGER, more=" with the proxy's line")
                if line is None
                else (NOT_REPRODUCED.lacks(scope, BASE, more=": its holes are filled with the public base"))
            )
        return
    with HashThreads() as hashing:
        folders = [
            ComparedFolder(
                *(proxy.folder, proxy.checkpoint.files, hashing.queue(), taken_of(inputs, proxy)),
                partial(digests_of, inputs, proxy),
            )
            for proxy in group.proxies
        ]
        made = _export(inputs, group.proxies, origin, job, folders)
    for proxy, folder, release in zip(group.proxies, folders, made, strict=True):
        yield from _judge(inputs, proxy, folder, release)


def _line(inputs: Inputs, proxy: OpenedProxy) -> Release:
    line = inputs.release(proxy)
    assert line is not None  # `each_release` keeps those without one apart
    return line


def _export(
    inputs: Inputs, proxies: Sequence[OpenedProxy], origin: OpenModel, job: JobKey, folders: Sequence[ComparedFolder]
) -> list[Release]:
    """Make the releases of these ledger lines again, and return the lines that an export writes."""
    lines = [_line(inputs, proxy) for proxy in proxies]
    first, server = lines[0], ServerMasks(job)
    base = _referenced(inputs.base, proxies) if first.fill == "base" else None
    scaled = first.rescale and first.fill == "zero"  # whatever the line says, no other release is
    model = watched(inputs, origin, first.quantization)
    session = MaskingSession(model, job, Path(), False, server, first.fill, base, scaled)
    export = ProxyExport.of(session, first.quantization, first.train, first.max_shard_bytes or USUAL_SHARD_BYTES)
    masks = [ClientMasks(server, line.client, line.round, line.p2, line.schedule, scaled) for line in lines]
    return export.write(folders, masks, algorithm_of(first.model_digest), inputs.progress)


def _reference(proxy: OpenedProxy) -> str | None:
    """Where the proxy says that its public base is from, if that is the commit of a repository."""
    base = proxy.manifest.public_base
    reference = base.reference if base is not None else None
    return reference if reference is not None and _COMMIT.fullmatch(reference) else None


def _referenced(base: PublicBase | None, proxies: Sequence[OpenedProxy]) -> PublicBase | None:
    """The public base, named as the proxies name it: its content counts, and a folder does not tell its origin."""
    reference = _reference(proxies[0])
    if base is None or (reference is not None and base.source.revision is not None):
        return base
    revision = reference.split("@")[1] if reference is not None else None
    return replace(base, source=replace(base.source, reference=reference or "", revision=revision))


def _judge(inputs: Inputs, proxy: OpenedProxy, folder: ComparedFolder, made: Release) -> Iterator[Entry]:
    scope, line = proxy.scope, _line(inputs, proxy)
    if line.model_digest != made.model_digest:
        message = "the ledger says that this proxy was exported from another model than the truth"
        yield DOES_NOT_BELONG.finding(scope, message)
        yield NOT_REPRODUCED.not_run(scope, "the truth is not the model of this release")
        return
    found = list(_first(scope, list(_places(inputs, proxy, folder))))
    if not found and not line.same_as(made):
        found = [NOT_REPRODUCED.finding(scope, "its ledger line is not the one that an export writes")]
    if inputs.base is not None and inputs.base.source.revision is None and _reference(proxy) is not None:
        why = "the proxy names the commit that its public base is from; give that as --public-base to verify it"
        yield NOT_REPRODUCED.not_run(f"{scope} public base", why)
    if inputs.server is not None and inputs.server.has_trained_fill:
        yield replace(NOT_REPRODUCED.finding(scope, _TRAINED), severity="info")
    proxy.reproduced = not found
    proxy.mismatched = set() if not found else None
    yield from NOT_REPRODUCED.checked(scope, "the release was made again, and every byte and entry compared", found)


def _places(inputs: Inputs, proxy: OpenedProxy, folder: ComparedFolder) -> Iterator[Place]:
    """Where a folder is not what an export writes.

    Entries come before bytes: proxy.json lists the files, so that it differs where one is too many.
    """
    names = folder.names | {SIGNATURE} if (proxy.folder / SIGNATURE).exists() else folder.names
    yield from starmap(_of_entry, wrong_entries(proxy.folder, names))
    for one in folder.differences():
        yield f"{one.file} differs from what an export writes at byte {one.offset} ({one.place})", one.tensor
    downloaded = next(one.downloaded for one in inputs.folders if one.scope == proxy.scope)
    if not downloaded:  # a cache of the hub keeps links, and no modes, times and owners
        owners = Owners.of(Path(str(inputs.options.ledger)))
        yield from starmap(_of_entry, wrong_properties(proxy.folder, names, owners))


def _of_entry(name: str, problem: str) -> Place:
    return f"{'the folder' if name == '.' else ordinary(name, 'an entry')} {problem}", None


def _first(scope: str, places: Sequence[Place]) -> Iterator[Finding]:
    """One finding: what differs first, and in how many places more."""
    rest = len(places) - 1
    for message, tensor in places[:1]:
        more = f"; {rest} more such place{'s' * (rest > 1)}" if rest else ""
        yield NOT_REPRODUCED.finding(scope, message + more, tensor=tensor)
