"""Every command is one public function of the same name and options, and importing the package costs nothing."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys

import pytest

import fedqsn_cli
from fedqsn_cli.cli.app import COMMANDS, function_of
from support.processes import environment

# Python words or built-ins that would be shadowed, and what only the shell or only Python needs.
RENAMED = {"number_format": "format", "round_number": "round", "checkpoint": "source"}
SHELL_ONLY = {"as_json", "quiet", "form", "output", "report", "init_policy"}  # the last four: what `audit` prints
PYTHON_ONLY = {"progress"}


def signature(function: object) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_and_its_function_have_the_same_options(command: str) -> None:
    python = set(signature(getattr(fedqsn_cli, command.replace("-", "_")))) - PYTHON_ONLY
    shell = {RENAMED.get(name, name) for name in signature(function_of(command))} - (SHELL_ONLY - python)
    assert shell == python


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_and_its_function_have_the_same_defaults(command: str) -> None:
    python = signature(getattr(fedqsn_cli, command.replace("-", "_")))
    for name, param in signature(function_of(command)).items():
        if name not in SHELL_ONLY or name in python:
            theirs = python[RENAMED.get(name, name)].default
            assert param.default == theirs or (param.default, theirs) in {
                (False, None),
                (None, inspect.Parameter.empty),
            }


def test_the_public_functions_are_the_commands() -> None:
    assert sorted(fedqsn_cli.__all__) == sorted(command.replace("-", "_") for command in COMMANDS)
    assert set(fedqsn_cli.__all__) <= set(dir(fedqsn_cli))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'train_client'"):
        fedqsn_cli.train_client  # noqa: B018


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
    assert {"torch", "transformers", "bitsandbytes", "datasets", "huggingface_hub"}.isdisjoint(done.stdout.split())
