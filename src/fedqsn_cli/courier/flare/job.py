"""The two classes of a job, and its files: one job for each client and round.

    server                                  site
    offers the sealed proxy       ────▶     fetches it, opens it, trains, seals the update
    fetches the sealed update     ◀────     offers it

No code travels: a job holds JSON, and both sides have these classes installed. Each app goes to its own side only; by
default FLARE would send the server's paths to every site.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedqsn_cli.courier.flare.depot import Depot
from fedqsn_cli.courier.flare.transfer import fetch_parts, offer_parts, settle
from fedqsn_cli.courier.layout import Site
from fedqsn_cli.courier.outbox import Consignment
from fedqsn_cli.courier.parts import PART, Parts
from fedqsn_cli.courier.work import NoUpdate, SiteRound, log
from fedqsn_cli.errors import FedqsnError, FormatError
from fedqsn_cli.text import clean

TASK, SERVER = "round", "server"
ORDER, PARTS, REFERENCES, PROBLEM = "fedqsn_order", "fedqsn_parts", "fedqsn_references", "fedqsn_problem"
_LONGEST = 200  # characters of a site's problem that the server keeps
_TIMES, _MORE = 16, 64 << 20  # an update is at most so many times as large as its proxy, and so much larger


class CourierController(Controller):  # type: ignore[misc]
    """At the server: sees to it that one sealed proxy goes out and one sealed update comes in.

    Args:
        client: the site. proxy: the sealed file. update: where the answer goes.
        parts: of the sealed file. order: signed.
    """

    _depot: Depot

    def __init__(self, client: str, proxy: str, update: str, parts: list[Any], order: str) -> None:
        super().__init__()
        self._client = client
        self._proxy = Path(proxy)
        self._update = Path(update)
        self._parts = Parts.from_document(parts)
        self._order = order
        self._problem: str | None = "the site sent nothing"
        self._abort: Signal | None = None

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Keep torch out of the server's worker: a job's end would import it, to end transfers of tensors."""
        self._depot = Depot(Path(fl_ctx.get_workspace().get_root_dir()))
        sys.modules["nvflare.app_opt.pt"] = None  # type: ignore[assignment]  # as where torch is not installed

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Withdraw the proxy; parts that have come are kept."""
        self._depot.close()

    def process_result_of_unknown_task(self, *_: Any, **__: Any) -> None:
        """Answers to what was not asked are dropped."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Offer the proxy, and wait for the answer."""
        self._abort = abort_signal
        data = Shareable()
        data[REFERENCES] = self._depot.offer(self._proxy, self._parts)
        data[ORDER] = self._order
        task = Task(name=TASK, data=data, timeout=0, result_received_cb=self._received)
        self.broadcast_and_wait(task, fl_ctx, targets=[self._client], min_responses=1, abort_signal=abort_signal)
        if self._problem is not None:
            self.system_panic(self._problem, fl_ctx)

    def _received(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        try:
            self._problem = self._take(client_task, fl_ctx)
        except (FedqsnError, OSError) as error:
            self._problem = f"the update did not arrive: {error}"

    def _take(self, client_task: ClientTask, fl_ctx: FLContext) -> str | None:
        """Fetch the update; returns what went wrong, if anything did."""
        result = client_task.result
        if client_task.client.name != self._client:
            return f"site {client_task.client.name!r} answered for {self._client!r}"
        if result.get_return_code() != ReturnCode.OK or PROBLEM in result:
            return f"no update: {clean(str(result.get(PROBLEM, result.get_return_code()))[:_LONGEST])}"
        if not self._update.exists():
            parts = Parts.from_document(result.get(PARTS))
            if parts.size > _TIMES * self._parts.size + _MORE:
                raise FormatError("is far larger than any update of this proxy", where=self._client)
            if len(parts.parts) != -(-parts.size // PART):  # each part costs the server a request and a sync
                raise FormatError("is in more parts than a site cuts it into", where=self._client)
            sender = f"{self._client}.{fl_ctx.get_job_id()}"
            self._depot.fetch(parts, result.get(REFERENCES), sender, self._update, self._abort)
        return None


class CourierExecutor(Executor):  # type: ignore[misc]
    """At a site: everything that it does is decided by its own folder, beside FLARE's kit."""

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Answer a round: an offer of the sealed update, or why there is none."""
        site = Site(Path(fl_ctx.get_workspace().get_root_dir()).parent)
        reply = make_reply(ReturnCode.OK)
        cell = fl_ctx.get_engine().get_cell()
        settle()

        def ended() -> bool:
            return bool(abort_signal.triggered)

        def fetch(parts: Parts, target: Path) -> None:
            fetch_parts(parts, shareable.get(REFERENCES), SERVER, target, cell, abort_signal)

        try:
            round = SiteRound.of(site, str(shareable.get(ORDER)))
            with round.alone(ended) as held:
                parts = round.answer(fetch, held, ended)
            reply[PARTS] = parts.to_document()
            _, reply[REFERENCES] = offer_parts(round.sealed_update, parts, cell)
        except NoUpdate as error:
            reply[PROBLEM] = error.reason
        except (FedqsnError, OSError) as error:  # no word of it leaves the site: it may name files
            with suppress(OSError):  # the disk may be full
                log(site, f"refused: {error}")
            reply[PROBLEM] = "the site refused the proxy or what was asked for; its log says why"
        return reply


def write_job(folder: Path, sent: Consignment, update: Path) -> Path:
    """Write the files of a job: what the site gets names only itself. Returns the folder.

    Args:
        update: where the answer goes.
    """
    here, client = f"{__name__}.", sent.order.client
    paths = {"proxy": str(sent.sealed.absolute()), "update": str(update.absolute())}  # the server works elsewhere
    arguments: dict[str, Any] = {"client": client, **paths}
    arguments |= {"parts": sent.order.sealed.to_document(), "order": sent.text}
    workflow = {"id": "courier", "path": here + "CourierController", "args": arguments}
    executor = {"tasks": [TASK], "executor": {"path": here + "CourierExecutor", "args": {}}}
    nothing: dict[str, list[Any]] = {"task_data_filters": [], "task_result_filters": [], "components": []}
    files = {
        "meta.json": {
            "name": sent.name,
            "resource_spec": {},
            "min_clients": 1,
            "mandatory_clients": [client],
            "deploy_map": {"app_server": ["server"], "app_client": [client]},
        },
        "app_server/config/config_fed_server.json": {"format_version": 2, "workflows": [workflow], **nothing},
        "app_client/config/config_fed_client.json": {"format_version": 2, "executors": [executor], **nothing},
    }
    for name, document in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
    return folder
