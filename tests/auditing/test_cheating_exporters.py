"""Exporters that cheat: everything is signed anew, as a tool with the key can, and still no release is reproduced."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli import audit as run_audit
from fedqsn_cli import strictjson
from fedqsn_cli.artifacts.ledger_head import write_head
from fedqsn_cli.artifacts.manifests import file_digest
from fedqsn_cli.auditing.findings import Audit
from fedqsn_cli.auditing.invariants.compared_folder import is_sparse
from fedqsn_cli.checkpoint import FILE_MODE, FILE_TIME
from fedqsn_cli.masks import job_key
from support.leaks import AuditedJob, audit, make_job, sign

KINDS: dict[str, dict[str, Any]] = {
    "zero fill": {},
    "zero fill, sharded": {"max_shard_size": "60KB"},
    "base fill": {"fill": "base"},
    "base fill, sharded": {"fill": "base", "max_shard_size": "60KB"},
}
QUICK = ("zero fill", "base fill, sharded")  # each fill and each way to store it; what is checked is not their product
PARAMS = [
    pytest.param(options, id=name, marks=() if name in QUICK else pytest.mark.soak) for name, options in KINDS.items()
]
Cheat = Callable[[AuditedJob], None]


@pytest.fixture(scope="module", params=PARAMS)
def clean(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AuditedJob:
    job = make_job(tmp_path_factory.mktemp("clean") / "job", clients=["alice"], **request.param)
    assert reproduced(audit(job)) == ["pass"]
    return job


def kinds_with(word: str) -> pytest.MarkDecorator:
    """Only the kinds of release that have something in which a cheat can hide."""
    chosen = {name: options for name, options in KINDS.items() if word in name}
    return pytest.mark.parametrize("clean", chosen.values(), ids=chosen, indirect=True)


@pytest.fixture
def job(clean: AuditedJob, tmp_path: Path) -> AuditedJob:
    return clean.copy(tmp_path / "job")


def reproduced(found: Audit) -> list[str]:
    return [check.status for check in found.checked if check.rule == "FQ012"]


def message(job: AuditedJob) -> str:
    """What FQ012 says about the only proxy; it must fail."""
    found = audit(job)
    assert found.exit_code == 4 and reproduced(found) == ["fail"]
    (finding,) = [finding for finding in found.findings if finding.rule == "FQ012"]
    return finding.message


def plain(folder: Path) -> None:
    """Modes and times as an export writes them: they are not what gives a cheat away."""
    for path in folder.iterdir():
        path.chmod(FILE_MODE)
        os.utime(path, (FILE_TIME, FILE_TIME))
    os.utime(folder, (FILE_TIME, FILE_TIME))


def shards(job: AuditedJob) -> list[Path]:
    return sorted(job.proxy().glob("model*.safetensors"))


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], spaces: int = 0) -> None:
    """Change the header of a safetensors file; the data stay."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = json.dumps(change(json.loads(data[8 : 8 + size])), separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8 + spaces)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def header(change: Callable[[dict[str, Any]], dict[str, Any]], spaces: int = 0) -> Cheat:
    return lambda job: rewrite(shards(job)[0], change, spaces)


def swapped(entries: dict[str, Any]) -> dict[str, Any]:
    """Two entries of a header in the other order."""
    names = list(entries)
    names[1], names[2] = names[2], names[1]
    return {name: entries[name] for name in names}


def fields(entries: dict[str, Any]) -> dict[str, Any]:
    """The fields of one entry in the other order."""
    name = list(entries)[1]
    return entries | {name: dict(reversed(entries[name].items()))}


def moved(job: AuditedJob) -> None:
    """Two tensors of a file, and their entries, in the other order."""
    path = shards(job)[0]
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    names = [name for name in entries if name != "__metadata__"]
    names[0], names[1] = names[1], names[0]
    made, body = {"__metadata__": entries["__metadata__"]}, b""
    for name in names:
        begin, end = entries[name]["data_offsets"]
        made[name] = entries[name] | {"data_offsets": [len(body), len(body) + end - begin]}
        body += data[start + begin : start + end]
    text = json.dumps(made, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def document(name: str, change: Callable[[dict[str, Any]], object], spell: Callable[[Any], str] | None = None) -> Cheat:
    """Change a JSON file; it is spelled as exports do unless told otherwise."""

    def cheat(job: AuditedJob) -> None:
        path = job.proxy() / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text((spell or strictjson.pretty)(content))

    return cheat


def compact(content: Any) -> str:
    return json.dumps(content, sort_keys=True)


def reordered(content: Any) -> str:
    return json.dumps(dict(reversed(content.items())), indent=2) + "\n"


CONTENTS: dict[str, Cheat] = {
    "space in a header": header(dict, spaces=8),
    "metadata in a header": header(lambda entries: entries | {"__metadata__": {"format": "pt", "a": "b"}}),
    "order of header entries": header(swapped),
    "order of fields in a header": header(fields),
    "order of tensors": moved,
    "a bit in a config": document("config.json", lambda content: content.update(vocab_size=98)),
    "white space of a config": document("config.json", lambda content: None, compact),
    "order of a config": document("config.json", lambda content: None, reordered),
    "space in the header of the units": lambda job: rewrite(job.proxy() / "visible.safetensors", dict, spaces=64),
    "the last bit of the units": lambda job: flip_last_bit(job.proxy() / "visible.safetensors"),
    "a byte after a tokenizer": lambda job: append(job.proxy() / "tokenizer.json", b"\n"),
}


def flip_last_bit(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 0x80]))


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


@pytest.mark.parametrize("cheat", CONTENTS.values(), ids=CONTENTS)
def test_bytes_that_an_export_does_not_write_are_found(cheat: Cheat, job: AuditedJob) -> None:
    cheat(job)
    sign(job)
    plain(job.proxy())
    assert "differs from what an export writes at byte" in message(job)


def test_a_file_of_tensors_that_goes_on_cannot_be_opened_and_does_not_pass(job: AuditedJob) -> None:
    append(shards(job)[-1], b"\0")
    sign(job)
    plain(job.proxy())
    assert audit(job).exit_code == 4


INDEX: dict[str, Cheat] = {
    "index metadata": document("model.safetensors.index.json", lambda one: one["metadata"].update(note="AAAA")),
    "total size": document("model.safetensors.index.json", lambda one: one["metadata"].update(total_size=7)),
    "white space": document("model.safetensors.index.json", lambda one: None, compact),
    "order": document("model.safetensors.index.json", lambda one: None, reordered),
}


@kinds_with("sharded")
@pytest.mark.parametrize("cheat", INDEX.values(), ids=INDEX)
def test_an_index_carries_nothing(cheat: Cheat, job: AuditedJob) -> None:
    cheat(job)
    sign(job)
    plain(job.proxy())
    assert message(job).startswith("model.safetensors.index.json differs")


def test_names_and_cuts_of_shards_carry_nothing(job: AuditedJob) -> None:
    count = len(shards(job))
    if count == 1:
        shards(job)[0].rename(job.proxy() / "model-00001-of-00001.safetensors")
    else:  # numbered as if there were one more
        index = job.proxy() / "model.safetensors.index.json"
        text = index.read_text()
        for path in shards(job):
            name = path.name.replace(f"of-{count:05d}", f"of-{count + 1:05d}")
            path.rename(job.proxy() / name)
            text = text.replace(path.name, name)
        index.write_text(text)
    sign(job)
    plain(job.proxy())
    assert audit(job).exit_code in {3, 4}


def manifest(job: AuditedJob, change: Callable[[dict[str, Any]], object]) -> None:
    """Change proxy.json, and its ledger line with it."""
    path = job.proxy() / "proxy.json"
    content = json.loads(path.read_text())
    old = content["proxy_id"]
    change(content)
    job.ledger.write_text(job.ledger.read_text().replace(old, content["proxy_id"]))
    path.write_text(strictjson.pretty(content))
    sign(job)
    plain(job.proxy())


def test_a_proxy_id_that_is_the_key_in_disguise_is_found(job: AuditedJob) -> None:
    disguised = bytes(byte ^ 0x5A for byte in job_key.load(job.key).key).hex()
    manifest(job, lambda content: content.update(proxy_id=disguised))
    assert "proxy.json differs" in message(job) and "(/proxy_id)" in message(job)


@kinds_with("base fill")
def test_weights_in_the_reference_of_the_public_base_are_found(job: AuditedJob) -> None:
    weights = next(iter(job.weights().values())).numpy().tobytes()
    manifest(job, lambda one: one["public_base"].update(reference=base64.b64encode(weights).decode()))
    assert "(/public_base/reference)" in message(job)


@kinds_with("base fill")
def test_a_commit_that_nobody_verified_does_not_pass(job: AuditedJob) -> None:
    key = job_key.load(job.key).key.hex()[:40]
    manifest(job, lambda one: one["public_base"].update(reference=f"hf://owner/base@{key}"))
    assert sorted(reproduced(audit(job))) == ["not-run", "pass"]


def test_a_ledger_line_that_no_export_writes_is_found(tmp_path: Path) -> None:
    """A rescale factor in a release of which nothing is visible would divide by zero."""
    job = make_job(tmp_path / "job", clients=["alice"], p1=1.0, fill="base", train="all")
    line = json.loads(job.ledger.read_text())
    job.ledger.write_text(strictjson.dumps(line | {"rescale": True}) + "\n")
    sign(job)
    plain(job.proxy())
    assert "ledger line is not the one" in message(job)


SPELLINGS: dict[str, tuple[str, str]] = {
    "a number with a point": ('"round": 1,', '"round": 1.0,'),
    "a number with an exponent": ('"round": 1,', '"round": 1e0,'),
    "an escaped letter": ('"round"', '"\\u0072ound"'),
    "a field twice": ('"round": 1,', '"round": 7, "round": 1,'),
    "line ends": ("\n", "\r\n"),
    "a mark of byte order": ("{", "\ufeff{"),
}


@pytest.mark.parametrize(("usual", "other"), SPELLINGS.values(), ids=SPELLINGS)
def test_another_spelling_of_a_manifest_is_found(usual: str, other: str, job: AuditedJob) -> None:
    path, old = job.proxy() / "proxy.json", file_digest(job.proxy() / "proxy.json")
    path.write_text(path.read_text().replace(usual, other, 1))
    line = job.ledger.read_text().replace(old, file_digest(path))
    job.ledger.write_text(line)
    write_head(job.ledger, None, job_key.load(job.key), ["0" * 64, hashlib.sha256(line.strip().encode()).hexdigest()])
    plain(job.proxy())
    assert audit(job).exit_code == 4


def test_white_space_of_a_manifest_is_found(job: AuditedJob) -> None:
    manifest(job, lambda content: None)
    path = job.proxy() / "proxy.json"
    path.write_text(path.read_text() + " ")
    plain(job.proxy())
    assert audit(job).exit_code == 4


# ---------------------------------------------------------------- what is not in any file


def _attribute(job: AuditedJob) -> None:
    try:
        os.setxattr(job.proxy() / "config.json", "user.note", b"secret")
    except OSError:
        pytest.skip("no extended attributes here")


def _label(job: AuditedJob) -> None:
    try:
        os.setxattr(job.proxy() / "config.json", "security.selinux", b"c2VjcmV0")
    except OSError:
        pytest.skip("needs root")


def _given_away(job: AuditedJob) -> None:
    try:
        for path in (*job.proxy().iterdir(), job.proxy()):
            os.chown(path, 0x5EC2E7, 0x5EC2E7)
    except OSError:
        pytest.skip("needs root")


def _flagged(job: AuditedJob) -> None:
    """Set FS_NODUMP_FL, which needs no privilege."""
    descriptor = os.open(job.proxy() / "config.json", os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, 0x40086602, (0x40).to_bytes(8, sys.byteorder))
    except OSError:
        pytest.skip("a file system without flags")
    finally:
        os.close(descriptor)


def _elsewhere(job: AuditedJob) -> None:
    shutil.move(job.proxy(), job.home / "d2VpZ2h0cw==")
    job.proxy().symlink_to("d2VpZ2h0cw==")


def _linked(job: AuditedJob) -> None:
    shutil.move(job.proxy() / "config.json", job.home / "config.json")
    (job.proxy() / "config.json").symlink_to(job.home / "config.json")


def _socket(job: AuditedJob) -> None:
    place = os.open(job.proxy(), os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(f"/proc/self/fd/{place}/s")
    finally:
        os.close(place)


def _device(job: AuditedJob) -> None:
    try:
        os.mknod(job.proxy() / "zero", stat.S_IFCHR | 0o644, os.makedev(1, 5))
    except OSError:
        pytest.skip("devices need root")


ENTRIES: dict[str, tuple[Cheat, str]] = {
    "time": (lambda w: os.utime(w.proxy() / "config.json", ns=(0, FILE_TIME * 10**9 + 7)), "time of modification"),
    "mode": (lambda w: (w.proxy() / "config.json").chmod(0o640), "mode 0640"),
    "attribute": (_attribute, "extended attributes"),
    "flags": (_flagged, "config.json has flags"),
    "hard link": (lambda w: os.link(w.proxy() / "config.json", w.home / "other"), "second name"),
    "link": (_linked, "not a regular file"),
    "fifo": (lambda w: os.mkfifo(w.proxy() / "pipe"), "pipe is not a file of this release"),
    "socket": (_socket, "s is not a file of this release"),
    "device": (_device, "zero is not a file of this release"),
    "folder": (lambda w: (w.proxy() / "empty").mkdir(), "empty is not a file of this release"),
    "dangling link": (lambda w: (w.proxy() / "gone").symlink_to("/nowhere"), "gone is not a file of this release"),
    "hidden file": (lambda w: (w.proxy() / ".x").write_bytes(b""), ".x is not a file of this release"),
    "special mode": (lambda w: w.proxy().chmod(0o1755), "the folder has mode 1755"),
    "mode of the folder": (lambda w: w.proxy().chmod(0o711), "the folder has mode 0711"),
    "time of the folder": (lambda w: os.utime(w.proxy(), ns=(0, 7)), "the folder has another time"),
    "label": (_label, "config.json has extended attributes"),
    "owner": (_given_away, "belongs to another user or group"),
    "folder elsewhere": (_elsewhere, "the folder is a link"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("cheat", "expected"), ENTRIES.values(), ids=ENTRIES)
def test_entries_that_are_no_plain_files_of_the_release_are_found(cheat: Cheat, expected: str, job: AuditedJob) -> None:
    cheat(job)
    assert expected in message(job)


def test_a_file_too_many_that_proxy_json_lists_is_named_before_proxy_json(job: AuditedJob) -> None:
    (job.proxy() / "extra.bin").write_bytes(b"more")
    sign(job)
    plain(job.proxy())
    assert message(job) == "extra.bin is not a file of this release; 1 more such place"


@kinds_with("zero fill, sharded")
def test_an_attribute_that_cannot_be_read_is_found(job: AuditedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(os, "listxattr", lambda *_, **__: ["user.note"])
    monkeypatch.setattr(os, "getxattr", refuse)
    assert "has extended attributes" in message(job)


def test_a_file_whose_zeros_are_left_out_is_told_from_one_that_holds_them(tmp_path: Path) -> None:
    (tmp_path / "full").write_bytes(bytes(1 << 16))
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 16)
    (tmp_path / "empty").touch()
    assert [is_sparse(tmp_path / name) for name in ("full", "empty")] == [False, False]
    if not os.stat(tmp_path / "sparse").st_blocks:
        assert is_sparse(tmp_path / "sparse")


# ---------------------------------------------------------------- what cannot be checked


@pytest.mark.parametrize("missing", ["truth", "key", "ledger"])
def test_an_order_that_an_export_does_not_write_never_passes_for_want_of_an_input(
    missing: str, job: AuditedJob
) -> None:
    header(swapped)(job)
    sign(job)
    plain(job.proxy())
    given = {"truth": job.truth, "key": job.key, "ledger": job.ledger} | {missing: None}
    assert run_audit(job.proxy(), public_base=job.base, **given).exit_code == 3


# ---------------------------------------------------------------- what the owner's own folder smuggles


def _template(text: str) -> Callable[[Path], None]:
    return lambda home: (home / "truth" / "chat_template.jinja").write_text(text) and None


@pytest.mark.parametrize("spell", [lambda data: base64.b64encode(data).decode(), bytes.hex], ids=["base64", "hex"])
def test_weights_in_the_owners_own_template_are_found_and_can_be_waived(
    spell: Callable[[bytes], str], tmp_path: Path
) -> None:
    text = spell(hashlib.shake_256(b"weights").digest(3000))
    job = make_job(tmp_path / "job", clients=["alice"], prepare=_template("{# " + text + " #}"))
    found = audit(job)
    assert reproduced(found) == ["pass"], "it is the owner's own file"
    (finding,) = found.findings
    assert (finding.rule, finding.severity) == ("FQ104", "gate")
    assert "chat_template.jinja" in finding.message and text[:20] not in finding.message


def _config(**fields: Any) -> Callable[[Path], None]:
    def change(home: Path) -> None:
        path = home / "truth" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def _file(name: str, text: str) -> Callable[[Path], None]:
    return lambda home: (home / "truth" / name).write_text(text) and None


NOISE = hashlib.shake_256(b"weights").digest(40_000)
LABELS = {str(number): NOISE[40 * number : 40 * number + 40].hex() for number in range(1000)}
SPACES = "".join(" \t"[byte >> bit & 1] for byte in NOISE[:8000] for bit in range(8))
WORDS = [base64.b64encode(NOISE[start : start + 30]).decode() for start in range(0, len(NOISE), 30)]
SMUGGLED: dict[str, Callable[[Path], None]] = {
    "numbers in a config": _config(scales=[int.from_bytes(NOISE[i : i + 4]) / 2**32 for i in range(0, 40_000, 4)]),
    "names of labels": _config(id2label=LABELS),
    "words in a template": _template("{# " + " ".join(WORDS) + " #}"),
    "white space in a template": _template("{{ messages }}" + SPACES),
    "words that are never made": _file("generation_config.json", json.dumps({"bad_words_ids": [[*NOISE]]})),
    "a vocabulary of nothing": _file("vocab.txt", "\n".join(WORDS * 12)),
}


@pytest.mark.parametrize("prepare", SMUGGLED.values(), ids=SMUGGLED)
def test_what_the_owners_own_files_say_too_much_is_found(prepare: Callable[[Path], None], tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", clients=["alice"], prepare=prepare)
    assert [finding.rule for finding in audit(job).findings] == ["FQ104"]


def test_a_template_of_the_usual_kind_is_no_finding(tmp_path: Path) -> None:
    loop = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}" + "-" * 500
    job = make_job(tmp_path / "job", clients=["alice"], prepare=_template(loop))
    assert audit(job).findings == ()
