"""FQ006 and FQ010: is a proxy made of the files, tensors and bytes that an export writes, and of nothing else?"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedqsn_cli.artifacts.manifests import PROXY_MANIFEST, VISIBLE_TENSORS
from fedqsn_cli.artifacts.sanitize import public_companion, public_config
from fedqsn_cli.auditing.findings import Finding
from fedqsn_cli.auditing.inputs import Inputs, OpenedProxy, ProxyFolder, Report
from fedqsn_cli.auditing.rules import finding
from fedqsn_cli.auditing.secrets import Needles, complaints, state_complaint
from fedqsn_cli.checkpoint.reader import COMPANIONS
from fedqsn_cli.errors import FedqsnError
from fedqsn_cli.export.outputs import tensor_specs
from fedqsn_cli.models.tensor_task import tensor_tasks
from fedqsn_cli.quantization.bnb_format import quantization_config, state_name

_MODEL_FILE = re.compile(r"model(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_PIECE = 1 << 22


def check_contents(inputs: Inputs, report: Report) -> None:
    """Look at every byte of every folder; works, as far as it can, on proxies that cannot be opened too."""
    needles = Needles(inputs.job)
    for folder in inputs.folders:
        digests: dict[str, str] = {}
        try:
            secrets = list(_secrets(folder, needles, digests))
        except OSError as error:
            report.findings.append(finding("FQ903", folder.scope, f"cannot be read ({type(error).__name__})"))
            continue
        texts = "metadata and texts were searched for paths, names, times and seeds"
        report.add(
            "FQ006", folder.scope, f"every byte was searched for the key; {texts}" if inputs.job else texts, secrets
        )
        if inputs.job is None:
            report.skip("FQ006", f"{folder.scope} key", "needs --key, to search every byte for it and for its seeds")
        if folder.opened is None:
            report.skip("FQ010", folder.scope, "the proxy cannot be opened")
            continue
        found = list(_listing(folder, folder.opened, digests)) + list(_tensors(inputs, folder.opened))
        found += _companions(inputs, folder.opened)
        report.add("FQ010", folder.scope, "files, digests and tensors were compared with proxy.json", found)
        if inputs.truth is None:
            why = "needs --truth, to compare names of tensors, config.json and tokenizer files with it"
            report.skip("FQ010", f"{folder.scope} against the truth", why)
        _check_ledger(inputs, folder.opened, report)


def _secrets(folder: ProxyFolder, needles: Needles, digests: dict[str, str]) -> Iterator[Finding]:
    """FQ006; takes the digests of all files in the same pass."""
    for path in sorted(folder.folder.rglob("*")):
        if not path.is_file():
            continue
        name = str(path.relative_to(folder.folder))
        digests[name], key_inside = _read_through(path, needles)
        said = dict.fromkeys(complaints(path, needles))
        if key_inside and not any("key" in one for one in said):
            said["holds the job's key"] = None
        for complaint in said:
            yield finding("FQ006", folder.scope, f"{_shown(name)} {complaint}")
    proxy = folder.opened
    if proxy is None:
        return
    for name, logical in proxy.tensors.items():
        packing = logical.packing
        if packing is not None and packing.kind == "pack4":
            text = bytes(proxy.checkpoint.read(state_name(name, packing.format)))
            if state_complaint(text, packing, name):
                yield finding("FQ006", proxy.scope, "the JSON of a packed tensor has bytes to spare", tensor=name)
    for group in proxy.manifest.groups:
        if proxy.units.has_spare_bits(group):
            yield finding("FQ006", proxy.scope, "visible.safetensors sets bits behind the last unit of a group")


def _shown(name: str) -> str:
    """A file's name, if it is an ordinary one; a path or a key could be in it."""
    return name if re.fullmatch(r"[A-Za-z0-9._-]{1,60}", name) else "a file"


def _read_through(path: Path, needles: Needles) -> tuple[str, bool]:
    """SHA-256 of a file, and whether the key is in it."""
    sha256, inside, tail = hashlib.sha256(), False, b""
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            sha256.update(piece)
            if needles.raw and not inside:
                inside = needles.in_bytes(tail + piece[: needles.longest]) or needles.in_bytes(piece)
                tail = piece[-needles.longest :]
    return sha256.hexdigest(), inside


def _listing(folder: ProxyFolder, proxy: OpenedProxy, digests: Mapping[str, str]) -> Iterator[Finding]:
    """Files against proxy.json."""
    listed, scope = proxy.manifest.files, proxy.scope
    for name, digest in sorted(listed.items()):
        if name not in digests:
            yield finding("FQ010", scope, f"{_shown(name)} is listed in proxy.json, but missing")
        elif digests[name] != digest:
            yield finding("FQ010", scope, f"{_shown(name)} is not the file that proxy.json lists")
        if name not in (*COMPANIONS, "config.json", VISIBLE_TENSORS) and not _MODEL_FILE.fullmatch(name):
            yield finding("FQ010", scope, f"{_shown(name)} is no file that a proxy consists of")
    for name in digests:
        if name not in listed and name != PROXY_MANIFEST:
            yield finding("FQ010", scope, f"{_shown(name)} is not listed in proxy.json")
    for path in folder.folder.iterdir():
        if path.is_dir() or not path.exists():
            yield finding("FQ010", scope, "holds a folder or a broken link")
    if proxy.units.unknown_tensors():
        yield finding("FQ010", scope, "visible.safetensors holds a tensor that is no group")


def _tensors(inputs: Inputs, proxy: OpenedProxy) -> Iterator[Finding]:
    """Tensors that the truth does not have, in either direction."""
    if inputs.truth is None:
        return
    specs = {
        spec.name
        for spec in tensor_specs(tensor_tasks(inputs.truth, proxy.manifest.quantization, lambda _: None), None)
    }
    for name in sorted(set(proxy.tensors) - specs):
        yield finding("FQ010", proxy.scope, "a tensor that the model does not have", tensor=name)
    for name in sorted(specs - set(proxy.tensors)):
        yield finding("FQ010", proxy.scope, "a tensor of the model is missing", tensor=name)


def _companions(inputs: Inputs, proxy: OpenedProxy) -> list[Finding]:
    """config.json, tokenizer and generation files are what an export makes of those of the truth."""
    truth = inputs.truth
    if truth is None or truth.checkpoint.config is None:
        return []
    how, packed = proxy.manifest.quantization, None
    if how is not None and how.layout == "bnb":
        skip = truth.plan.skip_modules(truth.checkpoint.config)
        packed = quantization_config(how.format, how.block_size, how.double_quant, skip, truth.config_dtype)
    expected = {"config.json": public_config(truth.checkpoint.config, packed)}
    for path in truth.checkpoint.companions:
        try:
            expected[path.name] = public_companion(path)
        except FedqsnError:
            continue
    found = []
    for name in ("config.json", *COMPANIONS):
        path = proxy.folder / name
        if path.is_file() and expected.get(name) != path.read_bytes():
            message = (
                f"{name} is not what an export makes of the truth's" if name in expected else f"the truth has no {name}"
            )
            found.append(finding("FQ010", proxy.scope, message))
    return found


def _check_ledger(inputs: Inputs, proxy: OpenedProxy, report: Report) -> None:
    """Is the proxy in the ledger, as it is?"""
    scope = f"{proxy.scope} in the ledger"
    if inputs.releases is None:
        why = "needs --ledger; without it client, round and the mask of this client only are taken on trust"
        report.skip("FQ010", scope, why)
        return
    release, manifest, found = inputs.release(proxy), proxy.manifest, []
    if release is None:
        found.append(finding("FQ010", scope, "the ledger does not know this proxy"))
    elif release.proxy_sha256 != proxy.sha256:
        found.append(finding("FQ010", scope, "proxy.json is not the one that was released under its id"))
    elif (release.job, release.round, release.quantization, release.fill, release.train, release.rescale) != (
        manifest.job,
        manifest.round,
        manifest.quantization,
        manifest.fill,
        manifest.train,
        manifest.rescale,
    ):
        found.append(finding("FQ010", scope, "proxy.json and the ledger tell different things about this release"))
    report.add("FQ010", scope, "proxy.json was compared with its ledger line", found)
