"""Python functions that take their options as keywords, made from functions that take an options object.

def merge(source, updates, options: MergeOptions, *, progress)    what implements the command
merge(source, updates, out, *, key, ledger=None, ...)             what `from fedqsn_cli import merge` gives
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, overload

from fedqsn_cli.options.declare import REQUIRED, Declared, Options, options_of
from fedqsn_cli.progress import Progress

_Keywords = ParamSpec("_Keywords")  # the fields of an options class, as type checkers read them
_Source = TypeVar("_Source", contravariant=True)
_Updates = TypeVar("_Updates", contravariant=True)
_Options = TypeVar("_Options", bound=Options, contravariant=True)
_Result = TypeVar("_Result", covariant=True)


class OfOptional(Protocol[_Source, _Keywords, _Result]):
    """A function of at most one thing, and of options."""

    @overload
    def __call__(self, source: _Source = ..., /, *args: _Keywords.args, **options: _Keywords.kwargs) -> _Result: ...
    @overload
    def __call__(self, source: _Source = ..., /, *args: Any, progress: Progress, **options: Any) -> _Result: ...


class OfOne(Protocol[_Source, _Keywords, _Result]):
    """A function of one thing, and of options."""

    @overload
    def __call__(self, source: _Source, /, *args: _Keywords.args, **options: _Keywords.kwargs) -> _Result: ...
    @overload
    def __call__(self, source: _Source, /, *args: Any, progress: Progress, **options: Any) -> _Result: ...


class OfTwo(Protocol[_Source, _Updates, _Keywords, _Result]):
    """A function of two things, and of options."""

    @overload
    def __call__(
        self, source: _Source, updates: _Updates, /, *args: _Keywords.args, **options: _Keywords.kwargs
    ) -> _Result: ...
    @overload
    def __call__(
        self, source: _Source, updates: _Updates, /, *args: Any, progress: Progress, **options: Any
    ) -> _Result: ...


class _Optional(Protocol[_Source, _Options, _Result]):
    def __call__(self, source: _Source = ..., options: _Options = ..., /) -> _Result: ...


@overload
def with_keywords(
    function: _Optional[_Source, _Options, _Result], options: Callable[_Keywords, _Options]
) -> OfOptional[_Source, _Keywords, _Result]: ...
@overload
def with_keywords(
    function: Callable[[_Source, _Options], _Result], options: Callable[_Keywords, _Options]
) -> OfOne[_Source, _Keywords, _Result]: ...
@overload
def with_keywords(
    function: Callable[[_Source, _Updates, _Options], _Result], options: Callable[_Keywords, _Options]
) -> OfTwo[_Source, _Updates, _Keywords, _Result]: ...
def with_keywords(function: Callable[..., Any], options: Any) -> Any:
    """The function with every field of an options class as a keyword, in place of its parameter `options`.

    Former names of options are accepted, too. Signature and documentation show the options.
    """
    known = options_of(options)
    former = {keyword: declared.name for declared in known for keyword in declared.keywords}
    signature = _signature(function, known)

    def call(*values: Any, **keywords: Any) -> Any:
        current = {former.get(name, name): value for name, value in keywords.items()}
        if len(current) < len(keywords):
            raise TypeError(f"{function.__name__}() got an option under two names")
        try:
            given = signature.bind(*values, **current).arguments
        except TypeError as error:
            raise TypeError(f"{function.__name__}() {error}") from None
        if given.get("progress", ...) is None:  # as good as not given
            del given["progress"]
        chosen = options(**{declared.name: given.pop(declared.name) for declared in known if declared.name in given})
        return function(**given, options=chosen)

    call.__name__ = call.__qualname__ = function.__name__
    call.__module__ = "fedqsn_cli"
    call.__doc__ = _documentation(function, known)
    call.__dict__["__signature__"] = signature
    return call


def _signature(function: Callable[..., Any], known: tuple[Declared, ...]) -> inspect.Signature:
    """What comes before `options`, the options themselves, and what comes after."""
    whole = inspect.signature(function, eval_str=True)
    parameters = list(whole.parameters.values())
    at = list(whole.parameters).index("options")
    fields = [_parameter(declared) for declared in known]
    inserted = [*parameters[:at], *fields, *parameters[at + 1 :]]
    return whole.replace(parameters=sorted(inserted, key=lambda parameter: parameter.kind))


def _parameter(declared: Declared) -> inspect.Parameter:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if declared.positional else inspect.Parameter.KEYWORD_ONLY
    default = inspect.Parameter.empty if declared.default is REQUIRED else declared.default
    return inspect.Parameter(declared.name, kind, default=default, annotation=declared.hint)


_OPTIONS = re.compile(r"^    options: .*\n(?:        .*\n)*", re.MULTILINE)


def _documentation(function: Callable[..., Any], known: tuple[Declared, ...]) -> str:
    """The function's own, with a line for each option where it has one for `options`."""
    told = "".join(f"    {declared.name}: {declared.option.help}\n" for declared in known)
    return _OPTIONS.sub(lambda _: told, inspect.getdoc(function) or "")
