"""The help: quick, light, complete, and the same as in docs/commands/."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedqsn_cli.cli.app import COMMANDS, build, function_of, help_of
from support.processes import environment, process, run

LIGHT = {
    "fedqsn_cli",
    "typer",
    "shellingham",
    "annotated_doc",
    "typing_extensions",
}  # and what starts the interpreter; OWN: of fedqsn
OWN = {"cli", "console", "errors", "linux", "options", "planning", "progress", "text", "validate", "version"}
ROOT = Path(__file__).parents[2]


def context(command: str, arguments: list[str]) -> object:
    return build(command).make_context(f"fedqsn {command}", arguments)


@pytest.mark.parametrize("arguments", [["--help"], ["export-proxy", "--help"], ["client-train", "-h"], ["--version"]])
def test_help_imports_nothing_but_the_parser_of_options(arguments: list[str]) -> None:
    """So it appears at once; how soon is measured by `make bench ARGS="--only help"`."""
    script = (
        "import sys; before = set(sys.modules); from fedqsn_cli.cli.app import main; "
        f"main({arguments}); print(*(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    modules = done.stdout.splitlines()[-1].split()
    assert {name.split(".")[0] for name in modules} - sys.stdlib_module_names <= LIGHT
    assert {name.split(".")[1] for name in modules if name.startswith("fedqsn_cli.")} <= OWN
    files = {name.removeprefix("fedqsn_cli.cli.") for name in modules if name.startswith("fedqsn_cli.cli.")}
    asked = set(COMMANDS if arguments == ["--help"] else arguments[:1]) & set(COMMANDS)
    assert {name.replace("_", "-") for name in files} & set(COMMANDS) == asked


def test_the_program_lists_every_command() -> None:
    outcome = run("--help")
    assert outcome.code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in outcome.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained_and_in_a_group(command: str) -> None:
    text = help_of(command)
    built = build(command)
    for param in built.params:
        assert param.help, param.name
        if param.param_type_name == "option":
            assert param.rich_help_panel, param.name
            assert f"\n{param.rich_help_panel}:\n" in text
            assert param.opts[0] in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_is_one_that_the_command_accepts(command: str) -> None:
    examples = str(function_of(command).__doc__).split("Examples:")[1].replace("\\\n", " ").strip().splitlines()
    assert examples
    for example in examples:
        words = shlex.split(example)
        assert words[:2] == ["fedqsn", command]
        context(command, words[2:])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_json_and_quiet(command: str) -> None:
    options = {name for param in build(command).params for name in param.opts}
    assert {"--json", "--quiet", "-q"} <= options


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_of_100_columns(command: str) -> None:
    too_long = [line for line in help_of(command).splitlines() if len(line) > 100]
    assert [line for line in too_long if not line.startswith("  fedqsn")] == []


def test_the_documentation_says_what_the_help_says() -> None:
    script = ROOT / "docs" / "generate.py"
    done = subprocess.run([sys.executable, script, "--check"], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_shells_can_complete_commands_and_options() -> None:
    words = {"_FEDQSN_COMPLETE": "complete_bash", "COMP_WORDS": "fedqsn export-proxy --dou", "COMP_CWORD": "2"}
    assert process(**words).out.split() == ["--double-quant"]


def test_a_terminal_gets_no_colour_when_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[1mUsage:" in help_of("mask")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in help_of("mask")


def test_help_is_a_command_too() -> None:
    assert run("help") == run("--help")
    assert run("help", "mask") == run("mask", "--help")
    assert (run("help", "maks").code, run("help", "maks").err) == (
        2,
        "fedqsn: error: no such command 'maks'; did you mean 'mask'?\n",
    )
    assert run("help", "mask", "merge").code == 2


def test_the_commands_of_a_courier_have_a_help_of_their_own() -> None:
    listed = run("courier", "--help")
    assert listed == run("help", "courier") == run("courier", "-h")
    assert listed.code == 0
    assert set(re.findall(r"^  ([a-z-]+)", listed.out, re.M)) == {name for name in COMMANDS if "courier" in name}
    assert run("help", "courier", "send") == run("courier-send", "--help")
