"""The job key: the one secret from which all masks of a job derive.

    {"format": "fedqsn-key/1", "key": 64 hex digits, "p1": ratio, "axis": axis, "plan": sha256, "overrides": {...},
     "groups": {group: [units, parameters]}, "clear": parameters that no mask covers,
     "ratios": {group: p1}, only where some group has another p1, "seal": 64 hex digits}

A key file belongs to one job: one p1, one plan, one axis. It must be a regular file that nobody but its owner can open.
The seal is an HMAC under the key over all other fields: a file in which one of them was edited is refused, because
another p1 in a running job would show what was hidden before.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedqsn_cli import strictjson, validate
from fedqsn_cli.checkpoint.secret_files import read_secret
from fedqsn_cli.errors import FormatError, InputError, KeyFileError, OutputExists, PlanError
from fedqsn_cli.masks.draw import KEY_BYTES, derive, hidden_count
from fedqsn_cli.planning.overrides import canonical
from fedqsn_cli.planning.placement import describe
from fedqsn_cli.planning.plan import Plan
from fedqsn_cli.planning.tensor_plan import MASK_AXES

FORMAT = "fedqsn-key/1"
SEAL_AGAIN = (
    "if nobody but you could write it, run 'fedqsn mask' or 'fedqsn export-proxy' once with --trust-records: it is "
    "then sealed as it is"
)
MAX_BYTES = 16 * 2**20

_FIELDS = {"format", "key", "p1", "axis", "plan", "overrides", "groups", "clear"}
_OPTIONAL = {"ratios", "seal"}
_LEAST_DIFFERENT_BYTES = 9  # of 32: fewer happen to a drawn key with a probability below 2^-100


@dataclass(frozen=True, slots=True)
class JobKey:
    """A job: its key, and what may never change while it runs.

    Args:
        groups: units and parameters of each group. clear: parameters in no group. With them, what clients have seen can
            be computed from the ledger alone. ratios: p1 of the groups that have their own.
    """

    key: bytes = field(repr=False)
    p1: float
    axis: str
    plan_digest: str
    overrides: dict[str, Any]
    groups: dict[str, tuple[int, int]]
    clear: int
    ratios: dict[str, float] = field(default_factory=dict)

    def ratio(self, group: str) -> float:
        """The share of a group's units that the server mask hides."""
        return self.ratios.get(group, self.p1)

    def hides(self, group: str, units: int) -> int:
        """How many of a group's units the server mask hides."""
        return hidden_count(units, self.ratio(group))

    @property
    def sends_nothing(self) -> bool:
        """Whether all of the model is hidden (p1 = 1): proxies hold the public base and what clients taught it."""
        return self.p1 == 1

    @property
    def clear_sent(self) -> int:
        """Parameters in no group that proxies show."""
        return 0 if self.sends_nothing else self.clear

    @property
    def least_ratio(self) -> float | None:
        """The smallest share that is hidden of any group, None if it is p1 for all."""
        return min(map(self.ratio, self.groups)) if self.ratios else None

    @property
    def commitment(self) -> str:
        """Names the key without revealing it: HMAC-SHA256(key, "fedqsn/v1/commitment"), hex."""
        return derive(self.key, ("fedqsn/v1/commitment",)).hex()

    def seal(self, what: str, *fields: str) -> str:
        """Proves that who wrote these fields has the key: HMAC-SHA256(key, "fedqsn/v1/seal", what, fields), hex."""
        return derive(self.key, ("fedqsn/v1/seal", what, *fields)).hex()


def draw(p1: float, axis: str, plan: Plan) -> JobKey:
    """A new job with a key drawn from the operating system's generator; nothing is written yet."""
    groups, clear = plan.sizes()
    return JobKey(
        secrets.token_bytes(KEY_BYTES),
        validate.up_to_one(p1, "--p1"),
        axis,
        plan.digest,
        canonical(plan.overrides),
        groups,
        clear,
        plan.ratios(),
    )


def save(path: str | Path, job: JobKey) -> None:
    """Write a new key file, complete from the first instant, mode 0600.

    Raises:
        OutputExists: something is there already; it is not touched.
    """
    from fedqsn_cli.checkpoint import create_secret

    try:
        create_secret(Path(path), _file_bytes(job))
    except FileExistsError:
        raise OutputExists("a file is already there", where=path) from None


def seal_file(path: str | Path, job: JobKey) -> None:
    """Write the file of a job again, sealed, in place of one that earlier versions wrote without a seal."""
    from fedqsn_cli.checkpoint import write_file_atomically

    write_file_atomically(Path(path), _file_bytes(job), 0o600)


def _file_bytes(job: JobKey) -> bytes:
    document: dict[str, Any] = {
        "format": FORMAT,
        "key": job.key.hex(),
        "p1": job.p1,
        "axis": job.axis,
        "plan": job.plan_digest,
        "overrides": job.overrides,
        "groups": job.groups,
        "clear": job.clear,
    }
    if job.ratios:
        document["ratios"] = job.ratios
    return strictjson.pretty(document | {"seal": _seal_of(job, document)}).encode()


def _seal_of(job: JobKey, document: Mapping[str, Any]) -> str:
    """The seal of a key file with these fields; its own does not count."""
    return job.seal("key file", strictjson.dumps({name: x for name, x in document.items() if name != "seal"}))


def load(path: str | Path, *, unsealed: bool = False) -> JobKey:
    """Read a key file.

    Args:
        unsealed: take a file without a seal, too. One whose seal is wrong is never taken.

    Raises:
        KeyFileError: it is missing, no regular file, another user's, open to others, malformed, or was edited.
    """
    document = _document(path)
    job = _parse(document, path)
    if "seal" not in document and not unsealed:
        what = "the key file has no seal: an earlier version wrote it, or somebody removed the seal"
        raise KeyFileError(what, where=path, hint=SEAL_AGAIN)
    if "seal" in document and not hmac.compare_digest(_seal_of(job, document), _hex(document["seal"], path)):
        what = "the key file was edited: its p1, plan, groups or counts are not those of the job"
        raise KeyFileError(what, where=path, hint="restore it from a backup")
    return job


def _parse(document: Any, path: str | Path) -> JobKey:
    if not isinstance(document, dict) or set(document) - _OPTIONAL != _FIELDS or document["format"] != FORMAT:
        raise KeyFileError(f"not a key file of format {FORMAT}", where=path)
    try:
        return JobKey(
            _key(document["key"], path),
            _ratio(document["p1"], "p1", path, validate.up_to_one),
            _one_of(document["axis"], MASK_AXES, path),
            _hex(document["plan"], path),
            canonical(document["overrides"]),
            _groups(document["groups"], path),
            _count(document["clear"], path),
            _ratios(document.get("ratios", {}), document["groups"], path),
        )
    except PlanError as error:
        raise KeyFileError(f"the key file's overrides are malformed: {error}", where=path) from None


def open_or_draw(
    path: str | Path, *, p1: float | None, axis: str, plan: Plan, unsealed: bool = False
) -> tuple[JobKey, bool]:
    """The job at a path, or a new one where there is none, which the caller saves once its work has succeeded.

    Args:
        p1: server mask ratio; None takes the key's, and does not start a job. unsealed: see `load`.

    Returns:
        The job, and whether it is new.

    Raises:
        KeyFileError: the key belongs to a job with another p1, axis or plan, or there is none and p1 is None.
    """
    if os.path.lexists(path):
        job = load(path, unsealed=unsealed)
        check_same(job, p1, axis, plan, path)
        return job, False
    if p1 is None:
        raise KeyFileError("there is no key", where=path, hint="give --p1 to start a new job")
    return draw(p1, axis, plan), True


def check_same(job: JobKey, p1: float | None, axis: str, plan: Plan, path: str | Path) -> None:
    """Refuse another p1, axis or plan than the job has: its hidden set never changes.

    Raises:
        KeyFileError: one of them differs.
    """
    if p1 is not None and validate.up_to_one(p1, "--p1") != job.p1:
        raise _another_job(f"p1 = {job.p1!r}", f"p1 = {float(p1)!r} was asked for", path)
    if axis != job.axis:
        raise _another_job(f"axis {job.axis}", f"axis {axis} was asked for", path)
    if plan.digest != job.plan_digest:
        why = "its tensors, shapes or roles differ" if plan.overrides == job.overrides else "its plan file differs"
        raise _another_job(f"plan {job.plan_digest[:12]}", f"this checkpoint has plan {plan.digest[:12]}: {why}", path)
    if plan.ratios() != job.ratios:
        raise KeyFileError("ratios in the key are not those of its plan", where=path, hint="restore it from a backup")


def check_placement(job: JobKey, asked: Mapping[str, Any], path: str | Path) -> None:
    """Refuse another where, layers or p1 schedule than the job has.

    Args:
        asked: those of them that were asked for, in canonical form.

    Raises:
        KeyFileError: one of them differs.
    """
    for name, value in asked.items():
        held = job.overrides.get(name)
        if value != (held or ("all" if name == "where" else None)):
            raise _another_job(describe(name, held), f"{describe(name, value)} was asked for", path)


def _another_job(held: str, asked: str, path: str | Path) -> KeyFileError:
    hint = "a job has one of each: use the key's, or start a new job with a new key file"
    return KeyFileError(f"the key belongs to a job with {held}, but {asked}", where=path, hint=hint)


def _document(path: str | Path) -> Any:
    data = read_secret(path, MAX_BYTES, b"fedqsn-key/")
    try:
        return strictjson.loads(data, path)
    except FormatError as error:
        raise KeyFileError(error.what, where=path) from None


def _key(value: object, path: str | Path) -> bytes:
    key = bytes.fromhex(_hex(value, path))
    if len(set(key)) < _LEAST_DIFFERENT_BYTES:
        raise KeyFileError("this is not a key that was drawn: its bytes repeat", where=path, hint="start a new job")
    return key


def _hex(value: object, path: str | Path) -> str:
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise KeyFileError("a field of the key file is not 64 hexadecimal digits", where=path)
    return value


def _ratio(value: object, name: str, path: str | Path, check: Callable[[float, str], float] = validate.ratio) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise KeyFileError(f"{name} in the key file is not a number", where=path)
    try:
        return check(value, name)
    except InputError as error:
        raise KeyFileError(f"{name} in the key file: {error.what}", where=path) from None


def _ratios(value: object, groups: dict[str, Any], path: str | Path) -> dict[str, float]:
    if not isinstance(value, dict) or not value.keys() <= groups.keys():
        raise KeyFileError("ratios in the key file are not those of its groups", where=path)
    return {name: _ratio(ratio, f"the ratio of {name}", path) for name, ratio in value.items()}


def _one_of(value: object, allowed: tuple[str, ...], path: str | Path) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise KeyFileError(f"axis in the key file is not one of {', '.join(allowed)}", where=path)
    return value


def _groups(value: object, path: str | Path) -> dict[str, tuple[int, int]]:
    if not isinstance(value, dict) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value.values()):
        raise KeyFileError("groups in the key file are not pairs of counts", where=path)
    return {name: (_count(units, path), _count(size, path)) for name, (units, size) in value.items()}


def _count(value: object, path: str | Path) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise KeyFileError("a field of the key file is not a count", where=path)
    return value
