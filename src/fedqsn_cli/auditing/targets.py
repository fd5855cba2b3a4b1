"""Where an audit may write: decided before it begins, since its attacks take minutes."""

from __future__ import annotations

import os
from pathlib import Path

from fedqsn_cli.artifacts.manifests import PROXY_MANIFEST
from fedqsn_cli.checkpoint.files import require_file_target
from fedqsn_cli.errors import InputError


def check_targets(**files: str | Path | None) -> None:
    """Refuse files that could not be written, or that would be sent with a proxy.

    Args:
        files: paths by the option that gives them, with underscores; None where it was not given.

    Raises:
        InputError: one of them is such a file.
    """
    for name, path in files.items():
        if path is None:
            continue
        proxy = next((one for one in Path(os.path.realpath(path)).parents if (one / PROXY_MANIFEST).is_file()), None)
        if proxy is not None:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"is inside of the proxy {proxy}", where=flag, hint="keep it elsewhere")
        require_file_target(path)  # writes for a moment, which would change the time of a proxy's folder
