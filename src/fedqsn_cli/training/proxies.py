"""A proxy as its client finds it: every file is what the owner wrote, or nothing is used."""

from __future__ import annotations

from pathlib import Path

from fedqsn_cli.artifacts.manifests import PROXY_MANIFEST, ProxyManifest, file_digest, read_manifest
from fedqsn_cli.checkpoint.reader import COMPANIONS
from fedqsn_cli.errors import FormatError

_USED = (*COMPANIONS, "config.json")
_AGAIN = "fetch the proxy again"


def verify_proxy(folder: Path) -> ProxyManifest:
    """Check every file of a proxy against the digests in its proxy.json, and that nothing else would be loaded.

    Raises:
        InputError: this is not a proxy. FormatError: a file is missing, was changed, or was added.
    """
    manifest = read_manifest(folder, ProxyManifest)
    for name, digest in sorted(manifest.files.items()):
        path = folder / name
        if not path.is_file():
            raise FormatError("is missing, though proxy.json lists it", where=path, hint=_AGAIN)
        if file_digest(path) != digest:
            raise FormatError("is not the file that proxy.json lists (SHA-256 differs)", where=path, hint=_AGAIN)
    for path in sorted(folder.iterdir()):
        used = path.name in _USED or path.name.endswith((".safetensors", ".safetensors.index.json"))
        if used and path.name not in manifest.files and path.name != PROXY_MANIFEST:
            raise FormatError("is not listed in proxy.json", where=path, hint="remove it, or " + _AGAIN)
    return manifest
