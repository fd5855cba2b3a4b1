"""What `.pre-commit-hooks.yaml` runs: `python -m fedqsn_cli.cli.commit_hooks policy|secrets FILE...`.

Files are told by what is in them, not by their names.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fedqsn_cli import console
from fedqsn_cli.errors import InputError

_BEGINNING = 1 << 20  # bytes of a file that are looked at
_PRIVATE = {
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----": "holds a private key",
    rb'"format": ?"fedqsn-key/': "is a job's key",
    rb'"format": ?"fedqsn-ledger(-head)?/': "is a ledger, or its head",
    rb'"format": ?"fedqsn-model/': "is the manifest of a model that stays with its owner",
}


def check_policy(path: Path) -> None:
    """Read a policy. Raises InputError, FormatError."""
    from fedqsn_cli.auditing.policy_file import load

    load(path)


def check_secrets(path: Path) -> None:
    """Refuse a file that no repository should hold. Raises InputError."""
    with path.open("rb") as file:
        data = file.read(_BEGINNING)
    for pattern, problem in _PRIVATE.items():
        if re.search(pattern, data):
            raise InputError(problem, where=path, hint="take it out of the commit with git rm or git restore")


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
