"""A desk that is made once, and copied for each test that changes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedqsn_cli.courier import send, work
from support.courier import CLIENTS, Carrier, Clock, Desk, make_desk, train


@pytest.fixture(scope="session")
def made_desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return make_desk(tmp_path_factory.mktemp("desk"))


@pytest.fixture
def desk(made_desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """An owner, two sites, and proxies of round 1; nothing is really trained."""
    shutil.copytree(made_desk.home.parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(work.SiteRound, "_train", train)
    return Desk(tmp_path / "strongroom")


@pytest.fixture
def carrier(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Carrier:
    """In place of FLARE."""
    from fedqsn_cli.courier.flare import session

    made = Carrier({name: desk.site(name) for name in CLIENTS})
    monkeypatch.setattr(session, "Session", made)
    monkeypatch.setattr(send, "time", Clock())
    monkeypatch.setattr(send, "_RETRY", (0.0, 0.0))
    return made
