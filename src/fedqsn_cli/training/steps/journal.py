"""The figures of every step, for people who watch and for programs that draw: `--log`, `--tensorboard`, progress."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from fedqsn_cli.checkpoint.files import require_file_target
from fedqsn_cli.errors import InputError

_LONGEST_LINE = 1 << 16  # bytes of a log; its lines have 250


@dataclass(frozen=True, slots=True)
class StepFigures:
    """The figures of one step.

    Args:
        step: its number, from 1.
        loss: mean loss of the step in nats. lr: its learning rate. grad_norm: before clipping.
        tokens: tokens in its examples, of all processes. tokens_per_s: of this step.
        seconds: since the training began, without the time between an interruption and its continuation.
        memory_bytes: peak memory so far: of this process, or on the GPU of what torch holds there.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    seconds: float
    memory_bytes: int


class Journal(Protocol):
    """A receiver of the figures of each step."""

    def begin(self, done: int) -> None:
        """The training begins after this many steps, which were made before it was ended."""

    def add(self, figures: StepFigures) -> None:
        """A step was made."""


class LogFile:
    """A JSON line for each step."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[LogFile]:
        """The log at a path, which is made if it is missing.

        Raises:
            InputError: it cannot be written, or something else is there.
        """
        require_file_target(path)
        try:
            with path.open("a+b") as file:
                log = cls(path, file)
                log._end(math.inf)
                yield log
        except OSError as error:
            raise InputError(f"cannot be written ({error.strerror})", where=path) from None

    def _end(self, done: float) -> int:
        """Where the lines of so many steps end; a line that was cut short by a kill does not count."""
        end = self._file.seek(0)
        try:
            while (line := self._file.readline(_LONGEST_LINE)).endswith(b"\n"):
                if int(json.loads(line)["step"]) > done:
                    return end
                end += len(line)
            if len(line) == _LONGEST_LINE:
                raise ValueError
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise InputError("is not a log of client-train", where=self._path, hint="choose another --log") from None
        return end

    def begin(self, done: int) -> None:
        """Keep the lines of these steps, and no other."""
        self._file.truncate(self._end(done))

    def add(self, figures: StepFigures) -> None:
        """Append a line."""
        self._file.write(json.dumps(asdict(figures)).encode() + b"\n")
        self._file.flush()


class TensorBoard:
    """Scalars for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        """Nothing is written yet.

        Raises:
            InputError: TensorBoard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            hint = "pip install 'fedqsn-cli[tensorboard]'"
            raise InputError("needs TensorBoard, which is not installed", where="--tensorboard", hint=hint) from None
        self._make, self._folder = SummaryWriter, folder
        self._writer: Any = None

    def begin(self, done: int) -> None:
        """Hide what an earlier run wrote of later steps."""
        self._writer = self._make(str(self._folder), purge_step=done + 1)

    def add(self, figures: StepFigures) -> None:
        """Add the figures under their names."""
        for name, value in asdict(figures).items():
            if name != "step":
                self._writer.add_scalar(f"train/{name}", value, figures.step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


@contextmanager
def journals(log: Path | None, tensorboard: Path | None) -> Iterator[list[Journal]]:
    """The journals that the options ask for. Raises InputError."""
    board = TensorBoard(tensorboard) if tensorboard is not None else None
    found: list[Journal] = [board] if board is not None else []
    try:
        if log is None:
            yield found
        else:
            with LogFile.opened(log) as file:
                yield [file, *found]
    finally:
        if board is not None:
            board.close()
