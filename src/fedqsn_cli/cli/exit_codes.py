"""From an exception to the one line that a user reads and the exit code that a script checks.

wrong use (unknown option, missing argument ...)   2     FedqsnError   its own exit code
OSError (no such file, disk full, no permission)   2     interrupted   130
anything else is a bug                             70
"""

from __future__ import annotations

import difflib
import errno
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import typer

from fedqsn_cli import COMMANDS, validate
from fedqsn_cli.cli.interrupts import EXIT_INTERRUPTED
from fedqsn_cli.errors import FedqsnError, InputError

EXIT_USAGE = 2
EXIT_BUG = 70

_HINTS = {  # what to do next, and the rest of it for commands that have the option
    errno.ENOSPC: ("free some space", " or choose another --out"),
    errno.EDQUOT: ("free some space", " or choose another --out"),
    errno.EACCES: ("check the permissions", ""),
    errno.EPERM: ("check the permissions", ""),
    errno.EROFS: ("choose another path", ""),
    errno.EMFILE: ("raise the limit with 'ulimit -n'", ""),
    errno.ENOMEM: ("close other programs", ", or lower --batch-size"),
}
_NUMBER_PROBLEMS = {
    "int_parsing": "is not a whole number",
    "int_from_float": "is not a whole number",
    "int_parsing_size": "is too large a number",
    "float_parsing": "is not a number",
}


def error_to_exit(error: BaseException, command: str) -> tuple[str, int]:
    """The line to print (without a line feed) and the exit code; `command` is what was run, as in `fedqsn mask`."""
    if isinstance(error, KeyboardInterrupt):
        return "fedqsn: interrupted", EXIT_INTERRUPTED
    if isinstance(error, FedqsnError):
        return f"fedqsn: error: {error}", error.exit_code
    if isinstance(error, typer.TyperException):
        return f"fedqsn: error: {_wrong_use(error, command)}", EXIT_USAGE
    if isinstance(error, OSError):
        return f"fedqsn: error: {_from_system(error, command)}", EXIT_USAGE
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch has its own class
        return f"fedqsn: error: not enough memory; {_hint(errno.ENOMEM, command)}", EXIT_USAGE
    line = " ".join("".join(traceback.format_exception_only(error)).split())
    return f"fedqsn: internal error: {line} (set FEDQSN_DEBUG=1 for the traceback)", EXIT_BUG


def refuse_command(name: str, commands: Sequence[str], family: str = "") -> NoReturn:
    """Raise InputError for an unknown or missing command, with the nearest name; a family is its first word, if any."""
    near = difflib.get_close_matches(name, commands, n=1)
    hint = f"did you mean '{f'{family} {near[0]}'.strip()}'?" if near else f"choose from {', '.join(commands)}"
    if name:
        raise InputError(f"no such command '{f'{family} {name}'.strip()}'", hint=hint)
    raise InputError("a command is missing" + (f" after '{family}'" if family else ""), hint=hint)


def _from_system(error: OSError, command: str) -> str:
    paths = [str(path) for path in (error.filename, error.filename2) if path not in (None, "")]
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    hint = _hint(error.errno or 0, command)
    return ": ".join([*paths, reason]) + (f"; {hint}" if hint else "")


def _hint(number: int, command: str) -> str:
    """What to do about an error of the system; names no option that the command does not have."""
    from fedqsn_cli import options

    first, rest = _HINTS.get(number, ("", ""))
    _, options_class = COMMANDS.get(command.removeprefix("fedqsn ").strip(), ("", "Options"))
    known = {declared.flag for declared in options.options_of(getattr(options, options_class))}
    return first + rest if set(rest.split()) & known else first


def _wrong_use(error: Any, command: str) -> str:
    """One clause for an error of the option parser, told apart by its attributes (its classes are private)."""
    help_hint = f"see '{command} --help'"
    if hasattr(error, "possibilities"):
        former = getattr(error.ctx.command, "former", {})
        near = [former.get(name, name) for name in error.possibilities or () if name.startswith("--")]
        return f"no such option {error.option_name}; {f'did you mean {near[0]}?' if near else help_hint}"
    if hasattr(error, "option_name"):
        return f"{error.option_name}: {_value_problem(error.message)}; {help_hint}"
    if hasattr(error, "param_type"):
        return f"missing {_name(error.param)}{_or_variable(error.param)}; {help_hint}"
    if getattr(error, "param", None) is not None:
        return f"{_name(error.param)}: {_invalid_value(error)}; {help_hint}"
    message = str(error.message).rstrip(".")
    extra = message.removeprefix("Got unexpected extra argument(s) (")
    return f"unexpected argument {extra.removesuffix(')')}; {help_hint}" if extra != message else message


def _value_problem(message: str) -> str:
    return "takes no value" if "not take" in message else "needs a value"


def _name(param: Any) -> str:
    """`--key` for an option, the placeholder in capitals for an argument."""
    return str(param.opts[0] if param.param_type_name == "option" else param.display_name_raw)


def _or_variable(param: Any) -> str:
    """The other way to give it, if there is one."""
    return f" (or set {param.envvar})" if param.envvar else ""


def _invalid_value(error: Any) -> str:
    details: list[Any] = getattr(error.__cause__, "errors", list)()
    first = details[0] if details else {}
    value = first.get("input")
    choices = error.param.type_descriptor.choices
    if choices is not None:
        return _not_a_choice(str(value), [str(choice) for choice in choices])
    if first.get("type") in _NUMBER_PROBLEMS:
        return f"{value!r} {_NUMBER_PROBLEMS[first['type']]}"
    return str(error.message)


def _not_a_choice(value: str, choices: list[str]) -> str:
    try:
        return validate.choice(value, choices, "")
    except InputError as error:
        return str(error)
