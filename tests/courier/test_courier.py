"""The courier with real processes: FLARE's server and sites over mutual TLS on this machine."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedqsn_cli import (
    audit,
    courier_approve,
    courier_init,
    courier_join,
    courier_send,
    courier_status,
    courier_stop,
    export_proxy,
    keygen,
    merge,
)
from fedqsn_cli.cli.command import build
from fedqsn_cli.courier import kits
from fedqsn_cli.courier.layout import Invitation
from fedqsn_cli.courier.send import SendResult
from fedqsn_cli.errors import FormatError, GateFailed, InputError, OutputExists, SignatureError
from support.helpers import nothing_written, search_path
from support.processes import command, environment
from support.training_jobs import labelled, small_model

ROOT = Path(__file__).parents[2]
FAST = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

pytestmark = pytest.mark.timeout(600)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


@dataclass(frozen=True)
class Desk:
    """An owner's folder with a courier, and signed and attested proxies of a round."""

    home: Path

    @property
    def courier(self) -> Path:
        return self.home / "courier"

    @property
    def secrets(self) -> dict[str, Path]:
        return {"key": self.home / "job.key", "ledger": self.home / "ledger.jsonl"}

    def proxies(self, number: int, *clients: str) -> list[Path]:
        """Export, audit and attest."""
        folders = [self.home / f"out-{number}" / client for client in clients]
        model = self.home / "global"
        export_proxy(
            model, self.home / f"out-{number}/{{client}}", client=clients, round=number, p1=0.1, p2=0.1,
            sign=self.home / "owner.key", **self.secrets,
        )  # fmt: skip
        audit(
            folders, truth=model, policy=self.home / "policy.toml", sign=self.home / "owner.key",
            attest=self.home / f"{number}.json", **self.secrets,
        )  # fmt: skip
        return folders

    def send(self, number: int, folders: list[Path], **options: object) -> SendResult:
        given = {"into": self.home / f"in-{number}", "key": self.home / "owner.key", "deadline": "200s"}
        given |= {"attestation": self.home / f"{number}.json", "ledger": self.secrets["ledger"]}
        return courier_send(self.courier, folders, **given | options)


def make_desk(home: Path, *clients: str) -> Desk:
    home.mkdir(parents=True, exist_ok=True)
    small_model(home / "global")
    keygen(home / "owner.key")
    (home / "policy.toml").write_text('[scope]\nrequire = ["invariants"]\n')
    courier_init(home / "courier", key=home / "owner.pub", server=f"localhost:{free_port()}", local=list(clients))
    for client in clients:
        labelled(home / "courier/sites" / client / f"{client}.jsonl")
    return Desk(home)


@contextmanager
def served(folder: Path) -> Iterator[None]:
    process = subprocess.Popen(command("courier", "serve", folder, "-q"), env=environment(**FAST), stdout=-3)
    try:
        yield
    finally:
        courier_stop(folder)
        assert process.wait() == 0


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    made = make_desk(tmp_path_factory.mktemp("courier") / "desk", "alice")
    with served(made.courier):
        yield made


def test_a_round_travels_sealed_and_only_what_is_a_sites_own_reaches_it(desk: Desk) -> None:
    folders = desk.proxies(1, "alice")
    result = desk.send(1, folders, lr=1e-3)
    assert [(client.client, client.state) for client in result.clients] == [("alice", "arrived")]
    merged = merge(
        desk.home / "global", [desk.home / "in-1/alice"], desk.home / "next",
        verify_key=desk.courier / "keys/{client}.pub", **desk.secrets,
    )  # fmt: skip
    assert [client.client for client in merged.clients] == ["alice"]
    status = courier_status(desk.courier)
    assert status.connected == ("alice",) and status.joined == ("alice",) and status.process is not None

    site = desk.courier / "sites/alice"
    texts = {path: path.read_bytes() for path in (site / "kit").rglob("*.json")}
    assert any(path.name == "config_fed_client.json" for path in texts)  # FLARE keeps the jobs that ran
    assert not any(path.name == "config_fed_server.json" for path in texts)
    assert not any(str(desk.courier / "carried").encode() in text for text in texts.values())
    secret = (folders[0] / "visible.safetensors").read_bytes()[-40:]
    assert not any(secret in path.read_bytes() for path in desk.courier.glob("carried/*"))
    assert "asked to train" in (site / "courier.log").read_text()

    started = time.monotonic()  # the same command again: all is there, and nothing is trained or sent
    assert desk.send(1, folders).arrived == 1 and time.monotonic() - started < 10
    assert (site / "courier.log").read_text().count("asked to train") == 1


def test_what_was_not_audited_or_changed_since_is_not_sent(desk: Desk) -> None:
    folders = desk.proxies(2, "alice")
    (folders[0] / "notes.txt").write_text("weights")
    with pytest.raises(SignatureError, match="not one of the folders that were audited"):
        desk.send(2, folders)
    (folders[0] / "notes.txt").unlink()
    with pytest.raises(InputError, match="--at-least: there are 1 proxies"):
        desk.send(2, folders, at_least=2)
    (desk.home / "other.toml").write_text("")
    with pytest.raises(InputError, match="another policy"):
        desk.send(2, folders, policy=desk.home / "other.toml")
    keygen(desk.home / "eve.key")
    with pytest.raises(SignatureError, match="another key"):
        desk.send(2, folders, key=desk.home / "eve.key")


def test_what_the_site_does_not_allow_is_no_update_and_a_deadline_ends_it(desk: Desk) -> None:
    folders = desk.proxies(3, "alice")
    with pytest.raises(GateFailed, match="0 of 1 updates came in time"):
        desk.send(3, folders, epochs=1000, deadline="12s")
    log = (desk.courier / "sites/alice/courier.log").read_text()
    assert "refused" in log and "epochs 1000, and the site allows 10" in log


def test_a_set_up_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keygen(tmp_path / "owner.key")

    def fail(*_: object) -> str:
        raise InputError("no room")

    monkeypatch.setattr(kits, "make_authority", fail)
    with nothing_written(tmp_path), pytest.raises(InputError, match="no room"):
        courier_init(tmp_path / "courier", key=tmp_path / "owner.pub")
    (tmp_path / "remark.pub").write_bytes("Schlüssel\n".encode() + (tmp_path / "owner.pub").read_bytes())
    with nothing_written(tmp_path), pytest.raises(FormatError, match="more than keys in PEM"):
        courier_init(tmp_path / "courier", key=tmp_path / "remark.pub")


def test_what_goes_between_owner_and_site_is_read_strictly(desk: Desk, tmp_path: Path) -> None:
    invitation = desk.courier / "invitation.json"
    with pytest.raises(OutputExists):
        courier_init(desk.courier, key=desk.home / "owner.pub")
    (tmp_path / "other.json").write_text("{}")
    with nothing_written(tmp_path), pytest.raises(FormatError, match="no invitation"):
        courier_join(tmp_path / "other.json", tmp_path / "site", name="bob", data="x")
    with pytest.raises(InputError, match="--data: is needed"):
        courier_join(invitation, tmp_path / "site", name="bob")
    made = courier_join(invitation, tmp_path / "site", name="bob", data="x.jsonl")
    with pytest.raises(InputError, match="has not approved this site"):
        from fedqsn_cli import courier_serve

        courier_serve(tmp_path / "site")
    with pytest.raises(FormatError, match="no request or approval"):
        courier_approve(desk.courier, invitation, tmp_path / "approval")
    (tmp_path / "site/alice.request").write_bytes(Path(str(made.next)).read_bytes())  # by another name
    approved = courier_approve(desk.courier, tmp_path / "site/alice.request", tmp_path / "approval")
    assert approved.fingerprint == made.fingerprint and (desk.courier / "keys/bob.pub").exists()
    again = courier_join(invitation, tmp_path / "again", name="bob", data="x.jsonl")
    with pytest.raises(InputError, match="has joined with another key"):
        courier_approve(desk.courier, str(again.next), tmp_path / "second")
    with pytest.raises(InputError):  # of another request: its private key does not belong to it
        courier_join(invitation, tmp_path / "again", name="bob", approval=approved.next)
    courier_join(invitation, tmp_path / "site", name="bob", approval=approved.next)
    settings = json.loads((tmp_path / "site/kit/local/resources.json").read_text())
    assert settings["class_allow_list"] == kits.ALLOWED and settings["allow_log_streaming"] is False
    rights = json.loads((tmp_path / "site/kit/local/authorization.json").read_text())["permissions"]
    assert rights["lead"]["byoc"] == rights["lead"]["shell_commands"] == "none"


def test_the_courier_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "nvflare", None)
    with nothing_written(tmp_path), pytest.raises(InputError, match=r"fedqsn-cli\[flare\]"):
        courier_init(tmp_path / "courier", key=tmp_path / "owner.pub")


def test_nothing_else_imports_flare() -> None:
    script = "import sys; import fedqsn_cli.courier.send, fedqsn_cli.courier.serve, fedqsn_cli.courier.work; "
    script += "print('nvflare' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_command_of_the_page_is_one_that_fedqsn_accepts() -> None:
    """The example runs them; here their options are parsed."""
    text = (ROOT / "docs/courier.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("fedqsn")]
    assert len(lines) >= 12
    for line in lines:
        words = shlex.split(line.removesuffix("&"))[1:]
        name = "-".join(words[:2]) if words[0] == "courier" else words[0]
        build(name).make_context(name, words[2:] if words[0] == "courier" else words[1:])


# ------------------------------------------------------------------------------------------------ long ones


@pytest.mark.soak
def test_the_example_runs(tmp_path: Path) -> None:
    """Two rounds; one site is killed in the middle, and one never answers."""
    environ = environment(**FAST, WORK=str(tmp_path / "work"), PORT=str(free_port()), DEADLINE="300s")
    environ["PATH"] = search_path(tmp_path)
    done = subprocess.run(
        [str(ROOT / "examples/courier/run.sh")], env=environ, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bob's site is killed" in done.stdout and "the site has lost its job" in done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("carol ")].count("waiting") == 2
    ledger = (tmp_path / "work/ledger.jsonl").read_text().splitlines()
    assert len(ledger) == 6  # three proxies in each round, each once


@pytest.mark.soak
def test_a_site_with_the_certificate_of_another_authority_cannot_connect(desk: Desk, tmp_path: Path) -> None:
    other = make_desk(tmp_path / "other", "alice")
    mine = Invitation.read(desk.courier / "invitation.json")
    config = other.courier / "sites/alice/kit/startup/fed_client.json"
    theirs = Invitation.read(other.courier / "invitation.json")
    config.write_text(config.read_text().replace(f":{theirs.port}", f":{mine.port}"))
    with served(other.courier / "sites/alice"):
        time.sleep(20)
        log = (other.courier / "sites/alice/kit/daemon.log").read_text()
    assert "Successfully registered" not in log


@pytest.mark.soak
def test_kills_at_random_instants_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    """kill -9 of the server's and the site's processes, again and again, while two rounds are on their way."""
    desk, draw = make_desk(tmp_path / "desk", "alice"), random.Random(0)
    ended = threading.Event()

    def kill() -> None:
        while not ended.wait(draw.uniform(4, 14)):
            found = subprocess.run(["pgrep", "-f", str(desk.courier)], capture_output=True, text=True).stdout.split()
            served_by = courier_status(desk.courier).process
            victims = [int(number) for number in found if int(number) not in (os.getpid(), served_by)]
            if victims:
                with suppress(ProcessLookupError):
                    os.kill(draw.choice(victims), signal.SIGKILL)

    with served(desk.courier):
        killer = threading.Thread(target=kill)
        killer.start()
        threading.Timer(90, ended.set).start()
        for number in (1, 2):
            folders = desk.proxies(number, "alice")
            assert desk.send(number, folders, deadline="280s", lr=1e-3).arrived == 1
        ended.set()
        killer.join()
    log = (desk.courier / "sites/alice/courier.log").read_text()
    assert len(desk.secrets["ledger"].read_text().splitlines()) == 2
    assert log.count("is ready") == 2  # each round was trained to its end once
