"""Every error that fedqsn raises on purpose, and the exit code that it ends with.

    FedqsnError
    ├── InputError                exit 2   bad usage or bad input; nothing was written
    │   ├── FormatError                    a file is malformed (safetensors header, JSON, TOML, ledger line)
    │   ├── PlanError                      a tensor has no rule, or a plan file asks for the impossible
    │   ├── KeyFileError                   a key is missing, readable by others, or belongs to another job
    │   ├── SignatureError                 a signature is missing, false, or of another key
    │   ├── RefusedUpdate                  an update is stale, foreign, duplicate, non-finite or too large
    │   ├── OutputExists                   an output path is taken and --force was not given
    │   ├── DataError                      a training or evaluation file cannot be used
    │   ├── Diverged                       a training left the finite numbers
    │   └── HubError                       a hf:// reference cannot be resolved, fetched or pushed
    └── GateFailed                exit 1   more leakage than a policy allows, or a merge that only makes the model worse

An audit ends without an exception; its verdict is the exit code: 0 passed, 1 over a limit, 3 not complete, 4 a hard
invariant is broken. An exception of any other class is a bug in fedqsn and ends with exit code 70.
"""

from __future__ import annotations

from typing import Any


class FedqsnError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: what is wrong, without a full stop.
        where: the file, tensor or option that it is about, if any.
        hint: what to do next, if anything can be done.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: object = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = hint

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        hint = f"; {self.hint}" if self.hint else ""
        return " ".join(f"{where}{self.what}{hint}".split())

    def to_plain(self) -> dict[str, str | None]:
        """As JSON can hold it, for another process."""
        return {"kind": type(self).__name__, "what": self.what, "where": self.where, "hint": self.hint}


class InputError(FedqsnError):
    """Bad usage or bad input. Nothing was written."""


class FormatError(InputError):
    """A file does not follow its format."""


class PlanError(InputError):
    """A tensor has no rule, or a plan file asks for something impossible."""


class KeyFileError(InputError):
    """A key is missing, readable by others, malformed, or belongs to another job."""


class SignatureError(InputError):
    """A signature is missing, does not verify, or is that of another key."""


class RefusedUpdate(InputError):
    """An update is stale, foreign, duplicate, non-finite or too large."""


class OutputExists(InputError):
    """An output path is already taken."""


class DataError(InputError):
    """A training or evaluation file cannot be used."""


class Diverged(InputError):
    """A training left the finite numbers."""


class HubError(InputError):
    """A hf:// reference cannot be resolved, fetched or pushed."""


class GateFailed(FedqsnError):
    """A gate measured more leakage than its policy allows, or a model that got worse."""

    exit_code = 1


def from_plain(document: dict[str, Any]) -> FedqsnError:
    """The error that `FedqsnError.to_plain` described."""
    kind: type[FedqsnError] = globals().get(document["kind"], InputError)
    return kind(document["what"], where=document["where"], hint=document["hint"])
