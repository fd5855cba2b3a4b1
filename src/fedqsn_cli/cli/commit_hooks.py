"""What `.pre-commit-hooks.yaml` runs: `python -m fedqsn_cli.cli.commit_hooks policy|secrets FILE...`.

Files are told by what is in them, not by their names.
"""

from __future__ import annotations

import mmap
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fedqsn_cli import console
from fedqsn_cli.errors import InputError

_PRIVATE = {
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----": "holds a private key",
    rb'"format"\s*:\s*"fedqsn-key/': "is a job's key",
    rb'"format"\s*:\s*"fedqsn-ledger(-head)?/': "is a ledger, or its head",
    rb'"format"\s*:\s*"fedqsn-model/': "is the manifest of a model that stays with its owner",
    rb'"format"\s*:\s*"fedqsn-proxy/': "is that of a proxy, which is for one client alone",
    rb'"format"\s*:\s*"fedqsn-update/': "is that of an update, which is for the owner alone",
}


def check_policy(path: Path) -> None:
    """Read a policy. Raises InputError, FormatError."""
    from fedqsn_cli.auditing.policy_file import load

    load(path)


def check_secrets(path: Path) -> None:
    """Refuse a file that no repository should hold. Raises InputError."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = next((problem for pattern, problem in _PRIVATE.items() if re.search(pattern, data)), None)
    if found is not None:
        raise InputError(found, where=path, hint="take it out of the commit, with git reset for example")


HOOKS: dict[str, Callable[[Path], None]] = {"policy": check_policy, "secrets": check_secrets}


def main(arguments: Sequence[str]) -> int:
    """Check files; returns 1 if one of them is refused, after a line for each."""
    if not arguments or arguments[0] not in HOOKS:
        console.print_error(f"usage: commit_hooks {'|'.join(HOOKS)} FILE...")
        return 2
    refused = 0
    for name in arguments[1:]:
        try:
            HOOKS[arguments[0]](Path(name))
        except InputError as error:
            console.print_error(str(error))
            refused = 1
    return refused


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
