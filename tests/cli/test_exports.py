"""Every command is one public function of the same name and options, and importing the package costs nothing."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module

import pytest

import fedqsn_cli
from fedqsn_cli import COMMANDS, options
from fedqsn_cli.cli.app import help_of
from fedqsn_cli.cli.command import build, function_of, options_classes
from fedqsn_cli.errors import InputError
from fedqsn_cli.options import REQUIRED, options_of
from support.processes import environment


def signature(command: str) -> dict[str, inspect.Parameter]:
    """The parameters of the public function of a command."""
    return dict(inspect.signature(getattr(fedqsn_cli, command.replace("-", "_"))).parameters)


def implementation(command: str) -> Callable[..., object]:
    """The function that takes an options object."""
    function: Callable[..., object] = getattr(import_module(COMMANDS[command][0]), command.replace("-", "_"))
    return function


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_and_its_function_have_the_same_options(command: str) -> None:
    shell = options_classes(function_of(command))["options"]
    assert shell is getattr(options, COMMANDS[command][1])
    assert inspect.signature(implementation(command), eval_str=True).parameters["options"].annotation is shell


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_help_and_in_the_signature_with_the_same_default(command: str) -> None:
    python = signature(command)
    typers = {param.name: param for param in build(command).params}
    lines = help_of(command)
    for declared in options_of(getattr(options, COMMANDS[command][1])):
        assert f" {declared.flag}" in lines
        param = typers[declared.name]
        required = declared.default is REQUIRED
        assert param.required == required
        assert param.default == (None if required else declared.default)
        assert python[declared.name].default == (inspect.Parameter.empty if required else declared.default)
        assert python[declared.name].annotation == declared.hint
    arguments = {"request", "source", "trained", "proxy", "path", "updates", "proxies", "outbox", "progress"}
    declared_names = {declared.name for declared in options_of(getattr(options, COMMANDS[command][1]))}
    assert set(python) - declared_names <= arguments and declared_names <= set(python)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_public_function_explains_itself(command: str) -> None:
    function = getattr(fedqsn_cli, command.replace("-", "_"))
    text = inspect.getdoc(function) or ""
    assert (function.__name__, function.__module__) == (command.replace("-", "_"), "fedqsn_cli")
    assert "Raises:" in text
    assert f"Example:\n    >>> {function.__name__}(" in text
    for name in signature(command):
        assert f"{name}: " in text, name
    assert "options: see" not in text


@pytest.mark.parametrize("command", COMMANDS)
def test_no_function_behind_a_command_takes_more_than_five_arguments(command: str) -> None:
    assert len(inspect.signature(implementation(command)).parameters) <= 5


def test_python_takes_an_option_by_its_former_name_too() -> None:
    with pytest.raises(InputError, match="--plan-file: is empty"):
        fedqsn_cli.mask("model", "out", key="job.key", plan="")
    with pytest.raises(InputError, match="--public-base: is empty"):
        fedqsn_cli.audit(base="")
    with pytest.raises(InputError, match="--plan-file: is empty"):
        fedqsn_cli.inspect("model", plan=True, overrides="")


def test_python_takes_an_option_once_and_by_a_name_that_it_has() -> None:
    with pytest.raises(TypeError, match=r"mask\(\) got an option under two names"):
        fedqsn_cli.mask("model", "out", key="job.key", plan="a", plan_file="b")
    with pytest.raises(TypeError, match=r"mask\(\) got an unexpected keyword argument 'pl'"):
        fedqsn_cli.mask("model", "out", key="job.key", pl=0.1)
    with pytest.raises(TypeError, match=r"mask\(\) missing a required argument: 'key'"):
        fedqsn_cli.mask("model", "out")


def test_python_takes_none_for_a_progress_that_is_not_shown() -> None:
    with pytest.raises(InputError, match="nowhere"):
        fedqsn_cli.evaluate("nowhere", data="nowhere.jsonl", progress=None)


def test_python_reads_no_option_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDQSN_KEY", "job.key")
    monkeypatch.setenv("FEDQSN_LEDGER", "ledger.jsonl")
    with pytest.raises(TypeError, match="missing a required argument: 'key'"):
        fedqsn_cli.mask("model", "out", p1=0.1)
    with pytest.raises(InputError, match="--ledger: merging updates needs the ledger"):
        fedqsn_cli.merge("model", ["update"], "out", key="job.key")
    with pytest.raises(InputError, match="nothing to audit"):
        fedqsn_cli.audit()


def test_the_public_functions_are_the_commands() -> None:
    assert sorted(fedqsn_cli.__all__) == sorted(command.replace("-", "_") for command in COMMANDS)
    assert set(fedqsn_cli.__all__) <= set(dir(fedqsn_cli))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'train_client'"):
        fedqsn_cli.train_client  # noqa: B018 - looking it up is what raises


def test_no_module_takes_the_name_of_a_public_function() -> None:
    """Importing `fedqsn_cli.evaluate` would put the module where the function is looked for."""
    modules = {module.name for module in pkgutil.iter_modules(fedqsn_cli.__path__)}
    assert modules.isdisjoint(fedqsn_cli.__all__)


def test_importing_the_package_imports_nothing_else_of_it() -> None:
    script = (
        "import sys, fedqsn_cli; print(*(m for m in sys.modules if m.startswith('fedqsn_cli')), 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["fedqsn_cli.version", "fedqsn_cli", "False"]


@pytest.mark.parametrize("name", ["mask", "quantize", "export_proxy", "merge", "inspect"])
def test_the_owners_functions_need_no_torch(name: str) -> None:
    script = f"import sys; from fedqsn_cli import {name}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "bitsandbytes", "pyarrow", "huggingface_hub"}.isdisjoint(done.stdout.split())
