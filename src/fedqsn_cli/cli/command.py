"""From the function of a command to the typer command: its options are the fields of its options classes.

    def quantize(checkpoint: Annotated[str, argument(...)], options: QuantizeOptions, view: ViewOptions) -> None

Whatever is annotated with an options class becomes one option of the command for each of its fields.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from fedqsn_cli import console, validate
from fedqsn_cli.cli import help_text
from fedqsn_cli.errors import InputError

if TYPE_CHECKING:
    from fedqsn_cli.options import Declared, Options

HELP_NAMES = {"help_option_names": ["-h", "--help"]}

MODEL = "a model folder, one .safetensors file, or hf://owner/name[@revision]"


class Command(TyperCommand):
    """A command with our own help text; an option never takes another option's name for its value."""

    former: dict[str, str]
    """Names that options had, which no help shows, and their names now."""

    def format_help(self, ctx: Any, formatter: Any) -> NoReturn:
        """Print the help of the command."""
        console.text(help_text.of_command(self, ctx))
        raise typer.Exit

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse an option in the place of another option's value, then parse."""
        options = {name: param for param in self.get_params(ctx) for name in (*param.opts, *param.secondary_opts)}
        for word, following in zip(args, args[1:], strict=False):
            if word == "--":
                break
            param = options.get(word)
            if word.startswith("-") and following in options and following.startswith("-") and _takes_value(param):
                raise InputError("needs a value", where=word, hint=f"see '{ctx.command_path} --help'")
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Complete options, but not their former names."""
        return [item for item in super().shell_complete(ctx, incomplete) if item.value not in self.former]


def _takes_value(param: Any) -> bool:
    return param is not None and not getattr(param, "is_flag", True)


def function_of(command: str) -> Callable[..., None]:
    """The function of a command, which calls what implements it and shows the result."""
    name = command.replace("-", "_")
    function: Callable[..., None] = getattr(import_module(f"fedqsn_cli.cli.{name}"), name)
    return function


def parameters_of(function: Callable[..., None]) -> list[inspect.Parameter]:
    """The parameters of a command's function; its file need not have imported the options that they stand for."""
    from fedqsn_cli import options
    from fedqsn_cli.cli import views

    names = {**vars(options), **vars(views)}
    return list(inspect.signature(function, locals=names, eval_str=True).parameters.values())


def options_classes(function: Callable[..., None]) -> dict[str, type[Options]]:
    """The parameters of a command's function that stand for many options."""
    annotations = {parameter.name: parameter.annotation for parameter in parameters_of(function)}
    return {name: cls for name, cls in annotations.items() if hasattr(cls, "__dataclass_fields__")}


@cache
def build(command: str) -> Any:
    """The typer command: it keeps nothing of a call, and making it takes 20 ms."""
    from fedqsn_cli.options import options_of

    function = function_of(command)
    classes = options_classes(function)
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(command, cls=Command, context_settings=HELP_NAMES)(_flat(function, classes))
    built: Any = typer.main.get_command(app)
    known = [declared for cls in classes.values() for declared in options_of(cls)]
    built.former = {alias: declared.flag for declared in known for alias in declared.option.aliases}
    return built


def argument(metavar: str, help: str) -> Any:
    """A typer argument that must not be empty."""

    def check(value: Any) -> Any:
        for word in value if isinstance(value, list) else [value]:
            if word is not None:
                validate.not_empty(word, metavar)
        return value

    return typer.Argument(help=help, metavar=metavar, show_default=False, callback=check)


def _flat(function: Callable[..., None], classes: dict[str, type[Options]]) -> Callable[..., None]:
    """The function with a parameter for every option."""
    from fedqsn_cli.options import options_of

    def call(**values: Any) -> None:
        objects = {
            name: cls(**{declared.name: values.pop(declared.name) for declared in options_of(cls)})
            for name, cls in classes.items()
        }
        function(**values, **objects)

    parameters = list(_parameters(function, classes))
    call.__doc__ = function.__doc__
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__dict__["__signature__"] = inspect.Signature(parameters)
    return call


def _parameters(function: Callable[..., None], classes: dict[str, type[Options]]) -> Iterator[inspect.Parameter]:
    from fedqsn_cli.options import options_of

    for parameter in parameters_of(function):
        if parameter.name in classes:
            for declared in options_of(classes[parameter.name]):
                yield _option(declared)
        else:
            yield parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)


def _option(declared: Declared) -> inspect.Parameter:
    """An option as typer declares it."""
    from fedqsn_cli.options import REQUIRED

    option = declared.option
    names = [declared.flags, *([option.short] if option.short else []), *option.aliases]
    declaration = typer.Option(
        *names,
        help=option.help,
        rich_help_panel=option.panel,
        metavar=declared.metavar,
        show_default=option.shown or True,
        envvar=option.env or None,
    )
    default = inspect.Parameter.empty if declared.default is REQUIRED else declared.default
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(
        declared.name, kind, default=default, annotation=Annotated[_typer_type(declared), declaration]
    )


def _typer_type(declared: Declared) -> Any:
    """The type that typer reads a word as: text for paths, and for what the option's own check parses."""
    if declared.is_list:
        return list[str]
    kind: Any = declared.kind if declared.kind in {bool, int, float} or declared.choices else str
    return kind | None if declared.default is None else kind
