"""What is printed, where, and how it looks to people and to programs."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedqsn_cli import console, text
from fedqsn_cli.cli.views import ViewOptions
from fedqsn_cli.errors import InputError
from fedqsn_cli.progress import Silent
from support.processes import environment


@dataclass(frozen=True)
class Sample:
    path: Path
    loss: float
    members: tuple[str, ...]


SAMPLE = Sample(Path("out/é"), float("nan"), ("a", "b"))
PARTS: list[console.Part] = [
    console.Facts([("model", "out"), ("key", None), ("hidden", "10 %")]),
    console.Table(("client", "size"), [("alice", "9 B"), ("bob", "10 kB")], numbers=frozenset({"size"})),
    "That is [all].",
]


def test_a_table_is_plain_aligned_text_when_it_is_piped(capsys: pytest.CaptureFixture[str]) -> None:
    console.show("table", SAMPLE, essential=["out"], parts=PARTS)
    expected = "model   out\nhidden  10 %\n\nclient   size\nalice     9 B\nbob     10 kB\n\nThat is [all].\n"
    assert capsys.readouterr().out == expected


WORDS = st.text("ab é界\u0301", max_size=9).map(str.strip)


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), max_size=5), st.sets(st.sampled_from("xyz")))
def test_a_table_that_is_piped_is_what_rich_makes_of_it(
    rows: list[tuple[str, str, str]], numbers: frozenset[str]
) -> None:
    table = console.Table(("x", "y", "z"), [("left", "0", "é"), *rows], numbers=frozenset(numbers))
    screen = Console(file=io.StringIO(), width=200)
    screen.print(console._renderable(table))
    expected = "".join(f"{line.rstrip()}\n" for line in screen.file.getvalue().splitlines())  # type: ignore[attr-defined]
    assert console.as_text([table]) == expected


def test_a_table_that_is_too_wide_for_a_terminal_is_shown_row_by_row() -> None:
    table = console.Table(
        ("client", "norm / model", "largest unit"),
        [("ann", "0.029", "k_proj 8: 0.16"), ("bob", "0.031", "v_proj 3: 0.2")],
        numbers=frozenset({"norm / model"}),
    )
    for columns, expected in (
        (25, "         norm /  largest\nclient    model  unit\nann       0.029  k_proj\n"),
        (
            22,
            "client        ann\nnorm / model  0.029\nlargest unit  k_proj\n              8: 0.16\n\nclient        bob",
        ),
    ):
        assert console._render([table], Console(width=columns)).startswith(expected)


def test_a_table_of_100_000_rows_is_printed_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()
    console.show(
        "table", None, essential=[], parts=[console.Table(("a", "b"), [(str(n), "x") for n in range(100_000)])]
    )
    assert len(capsys.readouterr().out.splitlines()) == 100_001
    assert time.process_time() - began < 5


def test_what_is_piped_is_never_folded_though_colours_are_forced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    path = "/folder/" * 30
    console.show("table", SAMPLE, essential=["out"], parts=[console.Facts([("model", path)])])
    assert f"{path}\n" in capsys.readouterr().out


def test_json_is_one_document_in_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    console.show("json", SAMPLE, essential=["out"], parts=PARTS)
    out = capsys.readouterr().out
    assert json.loads(out) == {"path": "out/é", "loss": None, "members": ["a", "b"]}
    assert out.isascii()


def test_json_that_is_printed_in_parts_is_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # patched: the real one needs a document of ten thousand tokens
    monkeypatch.setattr(console, "_TOKENS", 2)
    console.show("json", SAMPLE, essential=[], parts=[])
    assert capsys.readouterr().out == json.dumps(text.plain(SAMPLE), indent=2) + "\n"


def test_quiet_prints_the_essential_values_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    console.show("quiet", SAMPLE, essential=["a", "b\n"], parts=PARTS)
    assert capsys.readouterr().out == "a\nb\\n\n"


def test_json_and_quiet_exclude_each_other() -> None:
    modes = (ViewOptions().mode, ViewOptions(json=True).mode, ViewOptions(quiet=True).mode)
    assert modes == ("table", "json", "quiet")
    with pytest.raises(InputError, match="--json, --quiet: cannot be given together"):
        ViewOptions(json=True, quiet=True)


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("plain name, é and 神", "plain name, é and 神"),
        ("a\033[31mb", "a\\x1b[31mb"),
        ("two\nlines\r\t\0", "two\\nlines\\r\\t\\x00"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\udc80", "\\udc80"),
    ],
)
def test_names_of_others_cannot_steer_the_terminal(dirty: str, clean: str) -> None:
    assert text.clean(dirty) == clean


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (87_300_000, "87.3 MB"), (3e15, "3000.0 TB")]
)
def test_sizes_are_readable(count: float, shown: str) -> None:
    assert text.size(count) == shown


@pytest.mark.parametrize(
    ("share", "shown"), [(0, "0 %"), (0.0997, "9.97 %"), (0.5, "50 %"), (0.99951, "99.95 %"), (1, "100 %")]
)
def test_shares_are_readable(share: float, shown: str) -> None:
    assert text.percent(share) == shown


def test_there_is_no_progress_bar_when_nobody_looks() -> None:
    with console.progress("table") as progress:
        assert isinstance(progress, Silent)


SHOW_PROGRESS = """
import sys
from fedqsn_cli import console
with console.progress(sys.argv[1]) as progress:
    progress.start("reading", 4_000_000, "bytes")
    progress.advance(1_000_000)
    progress.start("training", None, "steps")
    progress.advance(3, loss=0.51234, examples_per_s=20.0)
    if hasattr(progress, "_rich"):
        progress._rich.refresh()  # now: when it is drawn by itself depends on how busy the machine is
    progress.finish()
    progress.finish()
print("done")
"""


def on_a_terminal(*arguments: str, **environ: str) -> str:
    """What a process writes to a terminal on stderr."""
    leader, follower = pty.openpty()
    env = environment(**{"TERM": "xterm", "COLUMNS": "120"} | environ)
    subprocess.run(
        [sys.executable, "-c", SHOW_PROGRESS, *arguments], env=env, stderr=follower, stdout=subprocess.DEVNULL
    )
    os.close(follower)
    shown = b""
    try:
        while data := os.read(leader, 65536):
            shown += data
    except OSError:  # the other side is closed
        os.close(leader)
    return shown.decode()


def test_a_terminal_sees_progress_with_amounts_and_figures() -> None:
    shown = on_a_terminal("table")
    assert "1.0 MB of 4.0 MB" in shown
    assert "3 steps" in shown
    assert "loss 0.5123  examples/s 20" in shown


def test_quiet_and_dumb_terminals_see_no_progress() -> None:
    assert on_a_terminal("quiet") == ""
    assert on_a_terminal("table", TERM="dumb") == ""


def test_no_color_leaves_no_code_for_style_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for value, styled in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", value)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setattr(sys, "stdout", screen := Terminal())
        console.show("table", SAMPLE, essential=[], parts=PARTS)
        assert ("\x1b[" in screen.getvalue()) == styled
