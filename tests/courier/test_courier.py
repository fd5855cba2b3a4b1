"""The courier with real processes: FLARE's server and sites over mutual TLS on this machine."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fedqsn_cli import (
    audit,
    courier_approve,
    courier_init,
    courier_join,
    courier_pack,
    courier_send,
    courier_serve,
    courier_status,
    courier_stop,
    export_proxy,
    keygen,
    merge,
    unseal,
)
from fedqsn_cli.cli.command import build
from fedqsn_cli.courier import kits, setup
from fedqsn_cli.courier.layout import Host, Invitation
from fedqsn_cli.courier.send import SendResult
from fedqsn_cli.errors import FormatError, GateFailed, InputError, OutputExists
from support.courier import forked_nvflare
from support.helpers import nothing_written, search_path
from support.processes import command, environment, free_port
from support.training_jobs import labelled, small_model

ROOT = Path(__file__).parents[2]
FAST = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]


@dataclass(frozen=True)
class Job:
    """An owner's folder with a courier, and signed and attested proxies of a round."""

    home: Path

    @property
    def courier(self) -> Path:
        return self.home / "courier"

    @property
    def secrets(self) -> dict[str, Path]:
        return {"key": self.home / "job.key", "ledger": self.home / "ledger.jsonl"}

    def pack(self, number: int, *clients: str, **options: object) -> Path:
        """Export, audit, attest and pack a round; returns the outbox."""
        folders = [self.home / f"out-{number}" / client for client in clients]
        model, owner = self.home / "global", self.home / "owner.key"
        export_proxy(
            model, self.home / f"out-{number}/{{client}}", client=clients, round=number, p1=0.1, p2=0.1, sign=owner,
            **self.secrets,
        )  # fmt: skip
        attestation, policy = self.home / f"{number}.json", self.home / "policy.toml"
        audit(folders, truth=model, policy=policy, sign=owner, attest=attestation, **self.secrets)
        given = {"key": owner, "ledger": self.secrets["ledger"], "attestation": attestation, "policy": policy}
        return Path(courier_pack(self.courier, folders, self.home / f"outbox-{number}", **given | options).path)

    def send(self, outbox: Path, **options: object) -> SendResult:
        """Send it, and open what comes back."""
        given = {"into": outbox.with_name(outbox.name.replace("out", "in")), "key": self.home / "owner.key"}
        return courier_send(self.courier, outbox, **given | {"deadline": "250s"} | options)


def make_job(home: Path, *clients: str, server: str | None = None) -> Job:
    home.mkdir(parents=True, exist_ok=True)
    small_model(home / "global")
    keygen(home / "owner.key")
    (home / "policy.toml").write_text('[scope]\nrequire = ["invariants"]\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kits, "_nvflare", forked_nvflare)
        address = server or f"localhost:{free_port()}"
        courier_init(home / "courier", key=home / "owner.pub", server=address, local=list(clients))
    for client in clients:
        labelled(home / "courier/sites" / client / f"{client}.jsonl", rows=8)
    return Job(home)


@contextmanager
def served(*folders: Path, within: tuple[str, ...] = ()) -> Iterator[None]:
    """Serve folders, each by a process of its own that another one may run."""
    words = [[*within, *command("courier", "serve", folder, "-q")] for folder in folders]
    processes = [subprocess.Popen(each, env=environment(**FAST), stdout=subprocess.DEVNULL) for each in words]
    try:
        yield
    finally:
        for folder in folders:
            courier_stop(folder)
        assert [process.wait() for process in processes] == [0] * len(folders)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """In a folder whose name FLARE's own command lines would take apart."""
    return make_job(tmp_path_factory.mktemp("courier") / "a job, ärgerlich #1", "alice")


def test_a_round_over_a_host_and_a_site_that_are_machines_of_their_own(job: Job, tmp_path: Path) -> None:
    """Owner, host and site have nothing in common: folders are moved apart, as to other machines."""
    host = shutil.copytree(job.courier / "host", tmp_path / "host")
    site = shutil.move(job.courier / "sites/alice", tmp_path / "alice")
    outbox = shutil.move(job.pack(1, "alice", lr=1e-3, method="lora", lora_r=2), tmp_path / "usb")
    strongroom = job.home.rename(job.home.with_name("hidden"))
    try:
        with served(host, site):
            sent = courier_send(
                host, os.path.relpath(outbox), into=os.path.relpath(tmp_path / "inbox"), deadline="250s"
            )
            status = courier_status(host)
    finally:
        strongroom.rename(job.home)
    assert [(one.client, one.state) for one in sent.clients] == [("alice", "arrived")]
    assert status.role == "host" and status.connected == ("alice",) and status.process is not None
    owner = {"key": job.home / "owner.key", "verify_key": job.courier / "keys/alice.pub"}
    unseal(tmp_path / "inbox/alice.update", tmp_path / "update", **owner)
    merged = merge(job.home / "global", [tmp_path / "update"], job.home / "next", **job.secrets)
    assert [one.client for one in merged.clients] == ["alice"]
    assert "--method=lora --lora-r=2" in (site / "courier.log").read_text()
    (log,) = site.rglob("training.log")  # all that a process says: libraries warn of nothing
    labels = ["fedqsn: training", "update", "trained on", "steps", "training loss", "numbers sent back"]
    assert all(line.startswith(label) for line, label in zip(log.read_text().splitlines(), labels, strict=True))

    texts = {path: path.read_bytes() for path in (site / "kit").rglob("*.json")}
    assert any(path.name == "config_fed_client.json" for path in texts)  # FLARE keeps the jobs that ran
    assert not any(path.name == "config_fed_server.json" for path in texts)
    paths = [bytes(path) for path in (host, outbox, tmp_path / "inbox")]
    assert not any(path in text for text in texts.values() for path in paths)
    weights = (job.home / "out-1/alice/visible.safetensors").read_bytes()[-40:]
    assert not any(weights in path.read_bytes() for path in host.rglob("*") if path.is_file())
    shutil.move(site, job.courier / "sites/alice")


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


def test_what_the_tool_of_flare_says_is_told(tmp_path: Path) -> None:
    """Its own process, as users run it."""
    with nothing_written(tmp_path), pytest.raises(InputError, match=r"nvflare cert approve"):
        kits.approve(tmp_path / "ca", Invitation("x", "localhost", 1, "", ""), tmp_path / "no.zip", tmp_path / "signed")


@pytest.mark.parametrize(
    "wrong",
    [
        {"project": "../../x"},
        {"project": "/tmp/x"},
        {"project": ""},
        {"project": 7},
        {"port": 0},
        {"port": 70000},
        {"port": True},
        {"host": None},
        {"host": ""},
        {"host": "\x1b[2J"},
        {"host": "a b"},
        {"host": "h" * 300},
        {"owner": None},
        {"more": 1},
    ],
)
def test_an_invitation_names_no_place_and_has_no_other_types(tmp_path: Path, wrong: dict[str, object]) -> None:
    good = {"format": "fedqsn-courier/1", "project": "x", "host": "localhost", "port": 1, "root": "", "owner": ""}
    (tmp_path / "invitation.json").write_text(json.dumps(good))
    assert Invitation.read(tmp_path / "invitation.json").project == "x"
    (tmp_path / "invitation.json").write_text(json.dumps(good | wrong))
    with pytest.raises(FormatError, match="not an invitation"):
        Invitation.read(tmp_path / "invitation.json")


@pytest.mark.parametrize(
    "wrong", [{"owner": ""}, {"owner": "\x1b"}, {"owner": "é"}, {"root": ""}, {"root": "SHA256:aa"}]
)
def test_an_invitation_without_keys_or_certificate_is_not_followed(tmp_path: Path, wrong: dict[str, str]) -> None:
    keygen(tmp_path / "owner.key")
    public, root = (tmp_path / "owner.pub").read_text(), "SHA256:" + ":".join(["AB"] * 32)
    invitation = replace(Invitation("x", "localhost", 1, root, public), **wrong)
    (tmp_path / "invitation.json").write_bytes(invitation.to_bytes())
    with nothing_written(tmp_path), pytest.raises(FormatError, match=r"invitation.json: (owner in it|names no)"):
        courier_join(tmp_path / "invitation.json", tmp_path / "site", name="alice", data="a.jsonl")


def test_a_request_that_inflates_is_not_read(tmp_path: Path) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("request.json", b" " * (64 << 20))
    assert len(data.getvalue()) < 1 << 20
    with pytest.raises(FormatError, match="not a request of a site"):
        setup._named(data.getvalue(), tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_request_is_refused_wherever_the_damage_is(method: int) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as file:
        file.writestr("request.json", '{"name": "alice", "cert_type": "client"}')
    whole = data.getvalue()
    assert setup._named(whole, Path("request")) == "alice"
    for place in range(len(whole)):
        for changed in (whole[:place], whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]):
            assert len(setup._entries(changed)) <= 1


@pytest.mark.parametrize("told", ["[" * 100_000, "[]", '{"name": "alice"}', '{"name": "alice", "cert_type": NaN}'])
def test_a_request_that_names_no_site_is_refused(told: str) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("request.json", told)
    with pytest.raises(FormatError, match="not a request of a site"):
        setup._named(data.getvalue(), Path("request"))


def test_a_request_for_a_name_that_no_site_can_have_is_refused() -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("request.json", '{"name": "server", "cert_type": "client"}')
    with pytest.raises(InputError, match="asked.*'server' cannot be the name of a site"):
        setup._named(data.getvalue(), Path("asked"))


def test_what_goes_between_owner_and_site_is_read_strictly(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kits, "_nvflare", forked_nvflare)
    invitation = job.courier / "invitation.json"
    with pytest.raises(OutputExists):
        courier_init(job.courier, key=job.home / "owner.pub")
    (tmp_path / "other.json").write_text("{}")
    with nothing_written(tmp_path), pytest.raises(FormatError, match="not an invitation"):
        courier_join(tmp_path / "other.json", tmp_path / "site", name="bob", data="x")
    with pytest.raises(InputError, match="--data: is needed"):
        courier_join(invitation, tmp_path / "site", name="bob")
    with nothing_written(tmp_path), pytest.raises(InputError, match="--name: 'localhost' is the name of the server"):
        courier_join(invitation, tmp_path / "site", name="localhost", data="x")
    made = courier_join(invitation, tmp_path / "site", name="bob", data="x.jsonl")
    with pytest.raises(InputError, match="has not approved this site"):
        courier_serve(tmp_path / "site")
    with pytest.raises(FormatError, match="not a request or approval"):
        courier_approve(job.courier, invitation, tmp_path / "approval")
    parts = setup._unpacked(Path(str(made.next)), {"request.zip", "site.pub"})
    setup._pack(tmp_path / "keyless", parts | {"site.pub": b"no key"})
    with nothing_written(job.courier), pytest.raises(FormatError, match="site.pub in it holds no public P-256 key"):
        courier_approve(job.courier, tmp_path / "keyless", tmp_path / "approval")
    (tmp_path / "site/alice.request").write_bytes(Path(str(made.next)).read_bytes())  # by another name
    approved = courier_approve(job.courier, tmp_path / "site/alice.request", tmp_path / "approval")
    assert approved.fingerprint == made.fingerprint and (job.courier / "keys/bob.pub").exists()
    again = courier_join(invitation, tmp_path / "again", name="bob", data="x.jsonl")
    with pytest.raises(InputError, match="has joined with another key"):
        courier_approve(job.courier, str(again.next), tmp_path / "second")
    with pytest.raises(InputError, match="answers another request; ask the owner for the approval of .*again/bob"):
        courier_join(invitation, tmp_path / "again", name="bob", approval=approved.next)
    with pytest.raises(InputError, match="has not asked to join as 'carol'"):
        courier_join(invitation, tmp_path / "site", name="carol", approval=approved.next)
    (tmp_path / "other.json").write_bytes(replace(Invitation.read(invitation), port=1).to_bytes())
    with pytest.raises(InputError, match="asked to join by another invitation"):
        courier_join(tmp_path / "other.json", tmp_path / "site", name="bob", approval=approved.next)
    with pytest.raises(FormatError, match="not a request or approval"):
        courier_join(invitation, tmp_path / "site", name="bob", approval=made.next)
    courier_join(invitation, tmp_path / "site", name="bob", approval=approved.next)
    with pytest.raises(OutputExists, match="has joined already"):
        courier_join(invitation, tmp_path / "site", name="bob", approval=approved.next)
    with pytest.raises(InputError, match=r"site/x.jsonl: there is no such file; put it there, or correct .*site.toml"):
        courier_serve(tmp_path / "site")
    (tmp_path / "again/x.jsonl").touch()
    shutil.copytree(job.courier / "sites/alice/kit", tmp_path / "again/kit")
    with pytest.raises(InputError, match="is the kit of client 'alice', as which this site never asked to join"):
        courier_serve(tmp_path / "again")
    settings = json.loads((tmp_path / "site/kit/local/resources.json").read_text())
    assert settings["class_allow_list"] == kits.ALLOWED and settings["allow_log_streaming"] is False
    rights = json.loads((tmp_path / "site/kit/local/authorization.json").read_text())["permissions"]
    assert rights["lead"]["byoc"] == rights["lead"]["shell_commands"] == "none"


def test_a_host_holds_no_key_of_the_strongroom(job: Job) -> None:
    """FLARE's own keys for its connections are there; what signs, opens, and makes sites is not."""
    keys = {path for path in job.courier.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()}
    assert job.courier / "ca/rootCA.key" in keys
    secret = {path.read_bytes() for path in keys if "requests" not in path.parts and "host" not in path.parts}
    held = {path for path in keys if path.is_relative_to(Host.open(job.courier).home)}
    assert {path.parent.name for path in held} == {"startup"} and not {path.read_bytes() for path in held} & secret


def test_the_courier_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "nvflare", None)
    with nothing_written(tmp_path), pytest.raises(InputError, match=r"fedqsn-cli\[flare\]"):
        courier_init(tmp_path / "courier", key=tmp_path / "owner.pub")


def test_nothing_else_imports_flare() -> None:
    modules = ("outbox", "send", "serve", "setup", "work")
    script = (
        f"import sys, {', '.join(f'fedqsn_cli.courier.{name}' for name in modules)}; print('nvflare' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_command_of_the_page_is_one_that_fedqsn_accepts() -> None:
    """The example runs them; here their options are parsed."""
    text = (ROOT / "docs/courier.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line.startswith("fedqsn")]
    assert len(lines) >= 15
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
def test_what_a_site_refuses_is_no_update_and_the_same_command_goes_on(job: Job) -> None:
    with served(job.courier):
        outbox = job.pack(2, "alice", epochs=1000)
        with pytest.raises(GateFailed, match="0 of 1 updates came in time"):
            job.send(outbox, deadline="30s")
        log = job.courier / "sites/alice/courier.log"
        assert "epochs 1000, and the site allows 10" in log.read_text()
        outbox = job.pack(3, "alice")
        assert job.send(outbox).arrived == 1
        started = time.monotonic()  # all is there: nothing is trained or sent
        assert job.send(outbox).arrived == 1 and time.monotonic() - started < 10
        assert log.read_text().count("is ready") == 1


@pytest.mark.soak
def test_a_site_with_the_certificate_of_another_authority_cannot_connect(job: Job, tmp_path: Path) -> None:
    other = make_job(tmp_path / "other", "alice")
    mine = Invitation.read(job.courier / "invitation.json")
    config = other.courier / "sites/alice/kit/startup/fed_client.json"
    theirs = Invitation.read(other.courier / "invitation.json")
    config.write_text(config.read_text().replace(f":{theirs.port}", f":{mine.port}"))
    with served(job.courier, other.courier / "sites/alice"):
        time.sleep(20)
        log = (other.courier / "sites/alice/kit/daemon.log").read_text()
        assert courier_status(job.courier).connected == ("alice",)
    assert "Successfully registered" not in log


AGAIN = ("bash", "-c", 'until "$@"; do sleep 1; done', "bash")
"""Starts a process again when it fails, as a service manager does."""


def processes_of(folder: Path) -> dict[str, list[int]]:
    """The processes that serve a folder, by what they are."""
    kinds = {"server_train": "server", "client_train": "site", "runner_process": "server's worker"}
    found: dict[str, list[int]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().decode().split("\0")
            if words[0] != AGAIN[0] and any(word.startswith(str(folder)) for word in words):
                kind = next((known for part, known in kinds.items() if any(part in word for word in words)), "worker")
                kind = "courier serve" if "serve" in words else kind
                found.setdefault(kind, []).append(int(process.name))
    return found


@pytest.mark.soak
def test_kills_at_random_instants_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    """kill -9 of servers, sites, workers and `courier serve`, until there were KILLS of them (by default 12).

    In each round for KILL_SECONDS (by default 60); then it must end, whatever was killed before. SEED draws others.
    """
    wanted, kills = int(os.environ.get("KILLS", "12")), Counter[str]()
    draw = random.Random(int(os.environ.get("SEED", "0")))
    seconds = float(os.environ.get("KILL_SECONDS", "60"))
    job, ended = make_job(tmp_path / "job", "alice"), threading.Event()

    def kill() -> None:
        while not ended.wait(draw.uniform(1, 9)):
            found = processes_of(job.courier)
            if found:
                kind = draw.choice(sorted(found))
                with suppress(ProcessLookupError):
                    os.kill(draw.choice(found[kind]), signal.SIGKILL)
                    kills[kind] += 1

    number = 0
    with served(job.courier, within=AGAIN):
        while kills.total() < wanted:
            number, killer = number + 1, threading.Thread(target=kill)
            outbox = job.pack(number, "alice", lr=1e-3)
            ended.clear()
            killer.start()
            threading.Timer(seconds, ended.set).start()
            assert job.send(outbox, deadline="280s").arrived == 1
            ended.set()
            killer.join()
            print(f"round {number}: {kills.total()} kills so far ({dict(kills)})", flush=True)
    log = (job.courier / "sites/alice/courier.log").read_text()
    assert len(job.secrets["ledger"].read_text().splitlines()) == number
    assert log.count("is ready") == number  # each round was trained to its end once
    assert not processes_of(job.courier)  # and no worker whose parent was killed is left


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def two_machines(name: str, addresses: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Two network namespaces with a line between them, as on two machines; skips where that is not allowed."""
    spaces = f"{name}-host", f"{name}-site"
    try:
        for space in spaces:
            ip("netns", "add", space)
        ip(
            "link",
            "add",
            f"{name}0",
            "netns",
            spaces[0],
            "type",
            "veth",
            "peer",
            "name",
            f"{name}1",
            "netns",
            spaces[1],
        )
        for number, (space, address) in enumerate(zip(spaces, addresses, strict=True)):
            ip("-n", space, "address", "add", f"{address}/24", "dev", f"{name}{number}")
            for device in ("lo", f"{name}{number}"):
                ip("-n", space, "link", "set", device, "up")
        yield spaces
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: they need root and iproute2 ({error})")
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


@pytest.mark.soak
def test_a_round_between_two_network_namespaces(tmp_path: Path) -> None:
    """The site reaches the host by one address and port, and nothing else: there is no route to anywhere."""
    host, port = "10.203.77.1", free_port()
    with two_machines(f"fq{os.getpid()}", (host, "10.203.77.2")) as (here, there):
        job = make_job(tmp_path / "job", "alice", server=f"{host}:{port}")
        outbox, site = job.pack(1, "alice"), job.courier / "sites/alice"
        served = [("courier", "serve", job.courier, "--server-only", "-q"), ("courier", "serve", site, "-q")]
        running = [
            subprocess.Popen(["ip", "netns", "exec", space, *command(*words)], env=environment(**FAST), stdout=-3)
            for space, words in zip((here, there), served, strict=True)
        ]
        try:
            words = command("courier", "send", job.courier, outbox, "--into", tmp_path / "inbox", "--deadline", "250s")
            done = subprocess.run(
                ["ip", "netns", "exec", here, *words], env=environment(**FAST), capture_output=True, text=True
            )
        finally:
            for folder in (job.courier, site):
                courier_stop(folder)
            for process in running:
                process.wait()
    assert done.returncode == 0 and (tmp_path / "inbox/alice.update").exists(), done.stderr


@pytest.mark.soak
def test_twenty_sites_on_one_machine(tmp_path: Path) -> None:
    clients = [f"site-{number:02}" for number in range(int(os.environ.get("SITES", "20")))]
    job = make_job(tmp_path / "job", *clients)
    started = time.monotonic()
    with served(job.courier):
        sent = job.send(job.pack(1, *clients), deadline="540s")
    assert sent.arrived == len(clients)
    print(f"{len(clients)} sites: {time.monotonic() - started:.0f} s", flush=True)
    merged = merge(job.home / "global", sorted((job.home / "inbox-1").iterdir()), job.home / "next", **job.secrets)
    assert len(merged.clients) == len(clients)
