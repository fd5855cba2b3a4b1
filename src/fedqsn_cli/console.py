"""The only place that prints: tables, JSON documents, essential values, progress bars, error lines.

Data goes to stdout, everything else to stderr. A pipe that its reader closes early is not an error.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TextIO

from fedqsn_cli.errors import InputError
from fedqsn_cli.progress import Progress, Silent
from fedqsn_cli.text import clean, plain, size

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID
    from rich.table import Table as RichTable

View = Literal["table", "json", "quiet"]

_UNLIMITED = 100_000  # columns: what is piped into another program is never folded
_FOLDED_ROWS = 1000  # of a table on a terminal; rich takes a millisecond for a row
_FOLDED_TEXT = 8  # columns of a terminal that a text in a table is folded to at most
_TOKENS = 10_000  # of JSON that are printed at a time


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """Names and values, one per line; a row whose value is None is left out."""

    rows: Sequence[tuple[str, object]]


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """Rows under column names; the columns in `numbers` are right-aligned."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    numbers: frozenset[str] = frozenset()


Part = Facts | Table | str


def show(view: View, document: object, *, essential: Sequence[object], parts: Sequence[Part]) -> None:
    """Print a result on stdout.

    Args:
        view: a table for people, one JSON document, or the essential values only.
        document: what --json prints: a dataclass, mapping or sequence of plain values.
        essential: what --quiet prints, one a line.
        parts: what people see, from top to bottom.
    """
    if view == "json":
        for piece in _json_pieces(document):
            _write(sys.stdout, piece)
    elif view == "quiet":
        _write(sys.stdout, "".join(f"{clean(str(value))}\n" for value in essential))
    else:
        _write(sys.stdout, _render_for_stdout(parts))


def as_text(parts: Sequence[Part]) -> str:
    """The parts as plain text for files: not folded, without style."""
    from rich.console import Console

    return _render(parts, Console(file=io.StringIO(), width=_UNLIMITED, highlight=False, markup=False, emoji=False))


def text(line: str) -> None:
    """Print finished text on stdout."""
    _write(sys.stdout, line + "\n")


def print_error(line: str) -> None:
    """Print one line about an error on stderr; a failing stderr is ignored."""
    try:
        _write(sys.stderr, _shortened(clean(line)) + "\n")
    except InputError:
        return


def finish() -> None:
    """Flush stdout, while errors can still be reported."""
    _write(sys.stdout, "")


def wants_style(stream: TextIO | None) -> bool:
    """Whether to use bold and colours: on a terminal, unless NO_COLOR is set."""
    return _is_terminal(stream) and not os.environ.get("NO_COLOR")


@contextmanager
def progress(view: View) -> Iterator[Progress]:
    """A bar on stderr if that is a terminal, else notes for people who read tables; nothing with --quiet."""
    if view == "quiet" or not _is_terminal(sys.stderr):
        yield Notes() if view == "table" else Silent()
        return
    bar = Bar()
    try:
        yield bar
    finally:
        bar.stop()


class Notes(Silent):
    """A receiver of progress that shows notes only, on stderr."""

    def note(self, text: str) -> None:
        """Print a line."""
        print_error(f"fedqsn: {text}")


@dataclasses.dataclass(slots=True)
class _Task:
    """A task that a bar shows."""

    task: TaskID
    total: int | None
    unit: str
    done: int = 0


class Bar:
    """Progress as a bar that disappears when the task is done. Implements `progress.Progress`."""

    def __init__(self) -> None:
        self._rich: RichProgress | None = None
        self._tasks: list[_Task] = []

    def start(self, label: str, total: int | None, unit: str) -> None:
        """Show another bar."""
        if self._rich is None:
            self._rich = _rich_progress()
            self._rich.start()
        task = self._rich.add_task(clean(label), total=total, amount="", figures="")
        self._tasks.append(_Task(task, total, unit))

    def advance(self, amount: int, **figures: float) -> None:
        """Move the latest bar."""
        if self._rich is None or not self._tasks:
            return
        current = self._tasks[-1]
        current.done += amount
        shown = _amount(current.done, current.total, current.unit)
        self._rich.update(current.task, advance=amount, amount=shown)
        if figures:
            self._rich.update(current.task, figures="  ".join(f"{_words(k)} {v:.4g}" for k, v in figures.items()))

    def finish(self) -> None:
        """Remove the latest bar."""
        if self._rich is not None and self._tasks:
            self._rich.remove_task(self._tasks.pop().task)

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        if self._rich is None:
            print_error(f"fedqsn: {text}")
        else:
            self._rich.console.print(_shortened(clean(f"fedqsn: {text}")), markup=False, highlight=False)

    def stop(self) -> None:
        """Remove the bar from the screen."""
        if self._rich is not None:
            self._rich.stop()


def _json_pieces(document: object) -> Iterator[str]:
    """A document as JSON, a part at a time: it can be much longer than what it describes."""
    tokens = json.JSONEncoder(indent=2, allow_nan=False).iterencode(plain(document))
    while piece := "".join(islice(tokens, _TOKENS)):
        yield piece
    yield "\n"


def _render_for_stdout(parts: Sequence[Part]) -> str:
    from rich.console import Console

    screen = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, **_style(sys.stdout))
    if sys.stdout is None or not sys.stdout.isatty():  # rich would believe FORCE_COLOR, which CI systems set
        screen.width = _UNLIMITED
    return _render(parts, screen)


def _render(parts: Sequence[Part], screen: Console) -> str:
    with screen.capture() as capture:
        for position, part in enumerate(parts):
            if position:
                screen.print()
            if isinstance(part, Table) and (screen.width == _UNLIMITED or len(part.rows) > _FOLDED_ROWS):
                screen.out(_aligned(part), highlight=False)
            elif isinstance(part, str):
                screen.print(clean(part), soft_wrap=True)
            elif isinstance(part, Table) and _least_width(part) > screen.width:
                _print_rows(part, screen)
            else:
                screen.print(_renderable(part))
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def _print_rows(table: Table, screen: Console) -> None:
    """Print a table row by row, a cell a line."""
    for number, row in enumerate(table.rows):
        if number:
            screen.print()
        screen.print(_renderable(Facts(tuple(zip(table.columns, row, strict=True)))))


def _least_width(table: Table) -> int:
    """How wide a terminal must be to show a table with whole numbers, and some of each longer text in a line."""
    from rich.cells import cell_len

    least = 2 * (len(table.columns) - 1)
    for name, *cells in zip(table.columns, *table.rows, strict=True):
        longest = max((cell_len(clean(str(cell))) for cell in cells), default=0)
        word = max(map(cell_len, name.split()), default=0)
        least += max(word, longest if name in table.numbers else min(longest, _FOLDED_TEXT))
    return least


def _aligned(table: Table) -> str:
    """A table as rich sets it where no line is too long, in a thousandth of the time: it may have 100,000 rows."""
    from rich.cells import cell_len

    rows = [tuple(table.columns), *(tuple(clean(str(cell)) for cell in row) for row in table.rows)]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]

    def padded(cell: str, name: str, width: int) -> str:
        space = " " * (width - cell_len(cell))
        return space + cell if name in table.numbers else cell + space

    return "\n".join("  ".join(map(padded, row, table.columns, widths)).rstrip() for row in rows)


def _style(stream: TextIO | None) -> dict[str, Any]:
    """What rich is told where nothing may be bold, dim or coloured: by itself it only drops colours for NO_COLOR."""
    return {} if wants_style(stream) else {"color_system": None}


def _renderable(part: Facts | Table) -> RenderableType:
    from rich.table import Table as RichTable

    table = RichTable(box=None, pad_edge=False, show_header=isinstance(part, Table), header_style="bold")
    if isinstance(part, Facts):
        _add_facts(table, part)
        return table
    for name in part.columns:
        table.add_column(name, justify="right" if name in part.numbers else "left", overflow="fold")
    for row in part.rows:
        table.add_row(*(clean(str(cell)) for cell in row))
    return table


def _add_facts(table: RichTable, facts: Facts) -> None:
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.rows:
        if value is not None:
            table.add_row(name, clean(str(value)))


def _rich_progress() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TextColumn("{task.fields[amount]}", markup=False),
        TextColumn("{task.fields[figures]}", style="dim", markup=False),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True, **_style(sys.stderr)),
        transient=True,
    )


def _amount(done: float, total: float | None, unit: str) -> str:
    if unit == "bytes":
        return size(done) if total is None else f"{size(done)} of {size(total)}"
    return f"{done:,.0f} {unit}" if total is None else f"{done:,.0f} of {total:,.0f} {unit}"


def _words(name: str) -> str:
    return name.replace("_per_s", "/s").replace("_", " ")


def _shortened(line: str, longest: int = 2000) -> str:
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def _write(stream: TextIO | None, data: str) -> None:
    """Write and flush. A closed pipe is not an error. Raises InputError for a full disk and the like."""
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(data.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        _abandon(stream)
    except OSError as error:
        _abandon(stream)
        hint = "files that the command wrote are complete"  # results are shown at the end
        raise InputError(f"cannot be written ({error.strerror})", where="standard output", hint=hint) from None


def _abandon(stream: TextIO) -> None:
    """Discard what the stream still buffers, so that the interpreter's own flush at exit cannot fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
