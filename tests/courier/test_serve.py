"""What stands in the way of serving is told at once, and a folder is served once."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from nvflare.app_common.job_launcher.process_launcher import ProcessJobLauncher

from fedqsn_cli import courier_serve
from fedqsn_cli.courier import daemons, kits, serve
from fedqsn_cli.courier.daemons import Daemon
from fedqsn_cli.courier.flare import launch
from fedqsn_cli.courier.flare.session import Session
from fedqsn_cli.courier.layout import Invitation
from fedqsn_cli.errors import InputError
from support.courier import Desk


def test_a_port_that_another_program_has_is_told(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_FREED", 0.1)
    host = desk.owner.host
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        host.invitation.write_bytes(Invitation("test", "localhost", port, "", "").to_bytes())
        with pytest.raises(InputError, match=f"port {port} of this machine cannot be used .Address already in use"):
            serve._require_port(desk.owner.home, [Daemon(None, host.server)])
        serve._require_port(desk.owner.home, [Daemon("alice", desk.site("alice").kit)])  # a site opens none
    serve._require_port(desk.owner.home, [Daemon(None, host.server)])


def test_a_site_that_the_owner_serves_is_not_served_twice(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of a site would end each other again and again."""
    site, seen = desk.site("alice"), list[object]()

    def kept(served: Sequence[Daemon], ended: Event) -> None:
        seen.append(daemons.server_of(site.home))
        with pytest.raises(InputError, match="alice: is served already; stop it: fedqsn courier-stop"):
            courier_serve(site.home)

    monkeypatch.setattr(serve, "_daemons", lambda home, options: [Daemon("alice", site.kit)])
    monkeypatch.setattr(daemons, "keep_alive", kept)
    monkeypatch.setattr(serve.Owner, "sites", lambda owner: [site])
    courier_serve(desk.owner.home)
    assert seen == [os.getpid()] and daemons.server_of(site.home) is None


@pytest.mark.parametrize("place", [kits.place_server, kits.place_site])
def test_a_kit_of_an_earlier_version_gets_our_launcher(tmp_path: Path, place: Callable[[Path], None]) -> None:
    path = tmp_path / "local/resources.json"
    path.parent.mkdir()
    old = [{"id": "process_launcher", "path": "nvflare.x"}, {"id": "job_manager"}, {"id": "other"}]
    path.write_text(json.dumps({"components": old, "snapshot_persistor": {"args": {"storage": {"args": {}}}}}))
    for _ in range(2):
        place(tmp_path)
        found = {one["id"]: one for one in json.loads(path.read_text())["components"]}
        module, _, name = found["process_launcher"]["path"].rpartition(".")
        assert module == launch.__name__ and issubclass(getattr(launch, name), ProcessJobLauncher) and "other" in found


@pytest.mark.parametrize("launcher", [launch.ServerLauncher, launch.SiteLauncher])
def test_a_worker_gets_each_word_of_its_command_line(launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/my programs/python")
    given = {
        "workspace": ("-m", "/a site, ärgerlich #1/kit"),
        "exe_module": ("-m", "a.module"),
        "job_id": ("-n", "it's 1"),
        "options": ("--set", " secure_train=true print_conf=True"),
    }

    class Context:
        def get_prop(self, name: str) -> object:
            return given

    words = shlex.split(launcher().get_command({}, Context()), True)
    told = ["-m", "a.module", "-m", "/a site, ärgerlich #1/kit", "-n", "it's 1", "--set", "secure_train=true"]
    assert words == ["/my programs/python", *told, "print_conf=True"]


def test_a_session_that_is_interrupted_while_it_connects_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLARE's threads would keep the program alive."""
    from fedqsn_cli.courier.flare import session

    closed = list[bool]()

    class Interrupted:
        def __init__(self, *_: object) -> None:
            pass

        def try_connect(self, timeout: float) -> None:
            raise KeyboardInterrupt

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(session, "require_valid", lambda kit: None)
    monkeypatch.setattr(session.flare_api, "Session", Interrupted)
    made = Session(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        made.sites()
    made.close()
    assert closed == [True]
