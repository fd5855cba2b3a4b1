"""The proxies of a round, found in a folder by the ledger: what is there, and what is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedqsn_cli.artifacts import ledger as ledgers
from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.manifests import PROXY_MANIFEST, ProxyManifest, read_manifest
from fedqsn_cli.auditing.completeness import UNREADABLE, Collector
from fedqsn_cli.errors import FedqsnError, InputError
from fedqsn_cli.options import AuditOptions


def proxies_of_round(given: Sequence[str | Path], options: AuditOptions, collector: Collector) -> list[str | Path]:
    """The folders in an outbox that are not of another round; a finding for each proxy of the round that is missing.

    Args:
        given: proxies that were named; there must be none.

    Raises:
        InputError: the options do not fit together, or there is no such folder. FormatError: the ledger is malformed.
    """
    if options.outbox is None or options.round is None:
        raise InputError("--outbox and --round belong together", where="--round", hint="give both, or PROXY...")
    if given:
        raise InputError("proxies were named, too", where="--outbox", hint="give PROXY... or --outbox, not both")
    if options.ledger is None:
        raise InputError("which proxies are of a round is in the ledger", where="--outbox", hint="give --ledger")
    outbox = Path(options.outbox)
    if not outbox.is_dir():
        raise InputError("no such folder", where=outbox, hint="give the folder that export-proxy wrote into")
    releases = ledgers.read(Path(options.ledger))
    wanted = {release.proxy_id: release for release in releases if release.round == options.round}
    if not wanted:
        raise InputError(f"the ledger has no release of round {options.round}", where=options.ledger)
    return list(_chosen(outbox, releases, wanted, collector))


def _chosen(
    outbox: Path, releases: Sequence[Release], wanted: dict[str, Release], collector: Collector
) -> Iterator[str | Path]:
    """Every folder but those of other rounds' proxies: whatever else is there may be sent, too."""
    others = {release.proxy_id for release in releases} - set(wanted)
    found = set()
    folders = sorted(path for path in outbox.iterdir() if path.is_dir())
    if folders and not any(os.path.lexists(folder / PROXY_MANIFEST) for folder in folders):
        hint = "give the folder that export-proxy wrote into"
        raise InputError(f"none of the {len(folders)} folders in it is a proxy", where=outbox, hint=hint)
    for folder in folders:
        proxy_id = _proxy_id(folder)
        if proxy_id not in others:
            found.add(proxy_id)
            yield folder
    for proxy_id in sorted(set(wanted) - found):
        release = wanted[proxy_id]
        message = f"the proxy of client {release.client} is not in the outbox"
        collector.add([UNREADABLE.finding(f"round {release.round}", message)])


def _proxy_id(folder: Path) -> str | None:
    """Of a folder; None where its manifest cannot be read, which the audit itself reports."""
    try:
        return read_manifest(folder, ProxyManifest).proxy_id
    except (FedqsnError, OSError):
        return None
