"""The owner's session at the server: jobs are submitted, looked at and ended. A lost connection is made anew."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

from nvflare.fuel.flare_api import flare_api

from fedqsn_cli.courier.kits import ADMIN, require_valid
from fedqsn_cli.courier.rounds import Unreachable

T = TypeVar("T")
_CONNECT = 10.0  # seconds


class Session:
    """A session that lasts as long as the owner waits.

    Args:
        kit: of the owner's session.

    Raises:
        InputError: its certificates cannot be used.
    """

    def __init__(self, kit: Path) -> None:
        require_valid(kit)
        logging.getLogger("nvflare").setLevel(logging.CRITICAL)
        self._kit = kit
        self._session: Any = None

    def submit(self, job: Path) -> str:
        """Submit a job; returns its id. Raises Unreachable."""
        return self._try(lambda session: str(session.submit_job(str(job))))

    def status(self, job: str) -> str:
        """What has become of a job. Raises Unreachable."""
        return self._try(lambda session: str(session.get_job_meta(job).get("status")))

    def abort(self, job: str) -> None:
        """End a job. Raises Unreachable."""
        self._try(lambda session: session.abort_job(job))

    def unfinished(self, name: str) -> list[str]:
        """The jobs of a name that have not ended. Raises Unreachable."""
        told = self._try(lambda session: session.list_jobs(name_prefix=name)) or []
        return [str(one["job_id"]) for one in told if not str(one.get("status")).startswith("FINISHED")]

    def sites(self) -> list[str]:
        """The sites that are connected. Raises Unreachable."""
        return self._try(lambda session: sorted(client.name for client in session.get_system_info().client_info))

    def at_work(self) -> dict[str, set[str]]:
        """The jobs that each connected site is working on. Raises Unreachable."""
        told = self._try(lambda session: session.get_client_job_status()) or []
        found: dict[str, set[str]] = {one["client_name"]: set() for one in told if "client_name" in one}
        for one in told:
            if one.get("job_id") is not None:
                found[one["client_name"]].add(str(one["job_id"]))
        return found

    def close(self) -> None:
        """End the session, also one that is being made: FLARE's threads would go on."""
        self._forget()

    def _try(self, call: Callable[[Any], T]) -> T:
        try:
            with redirect_stdout(io.StringIO()):  # FLARE prints there, and that is for results
                if self._session is None:
                    self._session = flare_api.Session(ADMIN, str(self._kit))
                    self._session.try_connect(_CONNECT)
                return call(self._session)
        except Exception as error:  # FLARE's errors have no common base; all of them mean: not now
            self._forget()
            raise Unreachable(str(error)) from error

    def _forget(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            try:
                session.close()
            except Exception as error:
                logging.getLogger(__name__).debug("a lost session did not close: %s", error)
