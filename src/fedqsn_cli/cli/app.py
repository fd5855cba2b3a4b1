"""The program: finds the command, runs it, and turns whatever happens into one line and an exit code."""

from __future__ import annotations

import gc
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from fedqsn_cli import COMMANDS, console
from fedqsn_cli.cli import exit_codes, help_text
from fedqsn_cli.cli.command import HELP_NAMES, build, function_of
from fedqsn_cli.cli.interrupts import clean_shutdown
from fedqsn_cli.errors import InputError
from fedqsn_cli.linux import keep_freed_memory
from fedqsn_cli.version import VERSION

# Libraries that talk on stderr by themselves, or look for plugins of others; who wants that sets these before.
_QUIET = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYDANTIC_DISABLE_PLUGINS": "__all__",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


class Group(TyperGroup):
    """All commands; the file of each is imported when it is asked for."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Build a command, or None for an unknown name."""
        return build(cmd_name) if cmd_name in COMMANDS else None

    def list_commands(self, ctx: Any) -> list[str]:
        """All commands, in the order of use."""
        return list(COMMANDS)

    def format_help(self, ctx: Any, formatter: Any) -> NoReturn:
        """Print the help of the whole program."""
        console.text(_help_of_all(self, ctx))
        raise typer.Exit


def program() -> Any:
    """The typer group of all commands."""
    app = typer.Typer(cls=Group, rich_markup_mode=None, context_settings=HELP_NAMES)
    app.callback()(fedqsn)
    return typer.main.get_command(app)


def help_of(command: str | None) -> str:
    """The help text of a command, or of the whole program."""
    if command is None:
        group = program()
        return _help_of_all(group, group.make_context("fedqsn", [], resilient_parsing=True))
    built = build(command)
    return help_text.of_command(built, built.make_context(f"fedqsn {command}", [], resilient_parsing=True))


def _family(word: str) -> list[str]:
    """The commands that begin with a word, as those of a courier do; none where it is the first word of just one."""
    members = [name for name in COMMANDS if name.startswith(f"{word}-")]
    return members if len(members) > 1 else []


def _help_of_all(group: Any, context: Any) -> str:
    return help_text.of_group(group, context, {name: function_of(name) for name in COMMANDS})


def _show_version(asked: bool) -> None:
    if asked:
        console.text(f"fedqsn {VERSION}")
        raise typer.Exit


def fedqsn(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Federated learning without giving the model away.

    The owner hides neurons of a model and quantizes the rest; clients train what they get and send updates back; the
    owner merges them. Every step is a command that reads files and writes files.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fedqsn` with these arguments (those of the process by default). Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _quieten_libraries(arguments)
    gc.set_threshold(100_000, 20, 20)  # what imports make stays: looking at it again and again takes 0.2 seconds
    keep_freed_memory()
    with clean_shutdown():
        return run(arguments)


def run(arguments: Sequence[str]) -> int:
    """Run a command in this process, without touching its signals or environment. Returns the exit code."""
    arguments = _joined(arguments)
    path = f"fedqsn {arguments[0]}" if arguments and arguments[0] in COMMANDS else "fedqsn"
    try:
        code = _invoke(path, list(arguments))
        console.finish()
        return code
    except SystemExit:
        raise
    except BaseException as error:
        if _debugging():
            traceback.print_exc()
        line, code = exit_codes.error_to_exit(error, path)
        console.print_error(line)
        return code


def _joined(arguments: Sequence[str]) -> Sequence[str]:
    """Commands of two words: `courier send` is `courier-send`, also after `help`."""
    if arguments[:1] == ["help"]:
        return ["help", *_joined(arguments[1:])]
    name = "-".join(arguments[:2])
    return [name, *arguments[2:]] if len(arguments) > 1 and name in COMMANDS else arguments


def _invoke(path: str, arguments: list[str]) -> int:
    if "_FEDQSN_COMPLETE" in os.environ:
        program().main(arguments, prog_name="fedqsn")  # a shell asks for completions; exits
    if arguments[:1] == ["help"]:
        return _help(arguments[1:])
    if path == "fedqsn":
        if arguments[1:2] and arguments[1] in HELP_NAMES["help_option_names"] and _family(arguments[0]):
            return _help(arguments[:1])
        if not arguments or not arguments[0].startswith("-"):
            _refuse(arguments)
        command = program()
    else:  # past the group, which would import pydantic to parse its own options
        command, arguments = build(arguments[0]), arguments[1:]
    try:
        with command.make_context(path, arguments) as context:
            command.invoke(context)
        return 0
    except typer.Exit as leaving:
        return int(leaving.exit_code)


def _help(names: list[str]) -> int:
    """`fedqsn help [COMMAND]`: what --help shows."""
    if len(names) > 1:
        if _family(names[0]):
            _refuse(names)
        raise InputError(f"unexpected argument {names[1]}", hint="see 'fedqsn help'")
    if names and (members := _family(names[0])):
        console.text(help_text.of_family(f"fedqsn {names[0]}", {name: function_of(name) for name in members}))
        return 0
    if names and names[0] not in COMMANDS:
        _refuse(names)
    console.text(help_of(names[0] if names else None))
    return 0


def _refuse(arguments: list[str]) -> NoReturn:
    """Say which command is missing or unknown; of a family, such as `courier`, it is the second word."""
    first, second = [*arguments, "", ""][:2]
    if _family(first):
        exit_codes.refuse_command(second, [name.removeprefix(f"{first}-") for name in _family(first)], first)
    exit_codes.refuse_command(first, list(COMMANDS))


def _quieten_libraries(arguments: Sequence[str]) -> None:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if {"-q", "--quiet"} & set(arguments):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions and not _debugging():
        warnings.simplefilter("ignore")


def _debugging() -> bool:
    return os.environ.get("FEDQSN_DEBUG", "") not in ("", "0")
