"""How a run ends: one line and an exit code for every kind of trouble, and nothing half-made left behind."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest

from fedqsn_cli import errors
from fedqsn_cli.checkpoint import plan_file
from fedqsn_cli.checkpoint.header import TensorSpec
from fedqsn_cli.cli import app, exit_codes
from support.processes import command, environment, process, run, with_signals


def sparse_model(folder: Path, gigabytes: float) -> Path:
    """A Llama-like checkpoint full of zeros that takes no disk space."""
    rows = int(gigabytes * 1e9 / 4 / 1024)
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"]
    header, starts = plan_file([TensorSpec(name, "F32", (rows // 2, 1024)) for name in names], {"format": "pt"})
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(max(starts.values()) + rows // 2 * 1024 * 4)
    return folder


def mask_slowly(tmp_path: Path, handler: str = "SIG_DFL", gigabytes: float = 1.5) -> subprocess.Popen[str]:
    """Start to mask a large model, and return when its output is being staged."""
    model = sparse_model(tmp_path / "model", gigabytes)
    words = command("mask", model, "--out", tmp_path / "out", "--p1", "0.1", "--key", tmp_path / "job.key")
    child = subprocess.Popen(
        with_signals(words, handler), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob(".out.fedqsn-*/*.safetensors")):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_with_130_and_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    child = mask_slowly(tmp_path)
    child.send_signal(number)
    out, err = child.communicate(timeout=600)
    assert (child.returncode, out, err) == (130, "", "fedqsn: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_same_signal_twice_at_once_still_cleans_up(tmp_path: Path) -> None:
    child = mask_slowly(tmp_path)
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):  # both wait, however busy we are
        child.send_signal(number)
    out, err = child.communicate(timeout=600)
    assert (child.returncode, out, err) == (130, "", "fedqsn: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_run_that_waits_for_the_network_can_be_ended(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(600)
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        words = command("inspect", "hf://owner/name")
        child = subprocess.Popen(
            with_signals(words, "SIG_DFL"),
            env=environment(HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path)),
            stderr=subprocess.PIPE,
            text=True,
        )
        connection, _ = silent.accept()
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=600)
        connection.close()
    assert (child.returncode, err) == (130, "fedqsn: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_goes_on_when_its_caller_ignores_the_signal(number: signal.Signals, tmp_path: Path) -> None:
    """nohup is for that."""
    child = mask_slowly(tmp_path, "SIG_IGN", 0.1)
    child.send_signal(number)
    out, err = child.communicate(timeout=600)
    assert (child.returncode, err) == (0, "")
    assert out.startswith("server model")
    assert (tmp_path / "out" / "fedqsn.json").is_file()


def test_ignored_signals_stay_ignored() -> None:
    script = (
        "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from fedqsn_cli.cli.interrupts import clean_shutdown\n"
        "with clean_shutdown(): os.kill(os.getpid(), signal.SIGHUP); print('alive')"
    )
    done = subprocess.run([command()[0], "-c", script], env=environment(), capture_output=True, text=True)
    assert done.stdout == "alive\n"


def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command("--version"), env=environment(), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    what = "standard output: cannot be written (No space left on device); files that the command wrote are complete"
    assert done.stderr == f"fedqsn: error: {what}\n"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    for words in (["--help"], ["export-proxy", "--help"], ["--version"]):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(command(*words), env=environment(), stdout=writing, stderr=subprocess.PIPE, text=True)
        os.close(writing)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_stdout_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", 'exec "$@" >&-', "bash", *command("--help")],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_malformed_file_is_one_line_and_its_name_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "\033[2Jmodel.safetensors"
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    outcome = run("inspect", path)
    assert outcome.code == 2
    assert "\033" not in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.InputError("is odd", where="x", hint="try y"), 2, "fedqsn: error: x: is odd; try y"),
        (errors.GateFailed("leaks"), 1, "fedqsn: error: leaks"),
        (KeyboardInterrupt(), 130, "fedqsn: interrupted"),
        (MemoryError(), 2, "fedqsn: error: not enough memory; close other programs"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            2,
            "fedqsn: error: /x: Permission denied; check the permissions",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "fedqsn: error: No space left on device; free some space",
        ),
        (
            ZeroDivisionError("division\nby zero"),
            70,
            "fedqsn: internal error: ZeroDivisionError: division by zero (set FEDQSN_DEBUG=1 for the traceback)",
        ),
    ],
)
def test_every_kind_of_trouble_has_its_line_and_exit_code(error: BaseException, code: int, line: str) -> None:
    assert exit_codes.error_to_exit(error, "fedqsn") == (line, code)


@pytest.mark.parametrize(
    ("error", "command", "hint"),
    [
        (MemoryError(), "evaluate", "close other programs, or lower --batch-size"),
        (MemoryError(), "mask", "close other programs"),
        (OSError(errno.ENOSPC, "No space left on device"), "mask", "free some space or choose another --out"),
        (OSError(errno.ENOSPC, "No space left on device"), "audit", "free some space"),
    ],
)
def test_a_hint_names_no_option_that_the_command_does_not_have(error: Exception, command: str, hint: str) -> None:
    line, _ = exit_codes.error_to_exit(error, f"fedqsn {command}")
    assert line.endswith(f"; {hint}")


def test_a_bug_ends_with_70_and_shows_its_traceback_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def buggy(path: str, arguments: list[str]) -> int:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(app, "_invoke", buggy)
    monkeypatch.delenv("FEDQSN_DEBUG", raising=False)
    outcome = run("mask")
    assert (outcome.code, outcome.err.count("\n")) == (70, 1)
    monkeypatch.setenv("FEDQSN_DEBUG", "1")
    assert "Traceback" in run("mask").err


def test_debug_shows_the_traceback_of_errors_too() -> None:
    outcome = process("inspect", "nowhere", FEDQSN_DEBUG="1")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("fedqsn: error: nowhere:")
