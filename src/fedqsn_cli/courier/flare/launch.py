"""Workers of jobs are started with every word of their command line as it is.

FLARE joins these words with spaces and splits them again, so that a worker in a folder such as `my site` never starts.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
from nvflare.app_common.job_launcher.server_process_launcher import ServerProcessJobLauncher
from nvflare.utils.job_launcher_utils import JobProcessArgs, get_client_job_args, get_server_job_args


class ServerLauncher(ServerProcessJobLauncher):  # type: ignore[misc]
    """Starts the server's worker of a job."""

    def get_command(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> str:
        """The command line, which FLARE splits as a shell would."""
        return _command(fl_ctx, get_server_job_args())


class SiteLauncher(ClientProcessJobLauncher):  # type: ignore[misc]
    """Starts a site's worker of a job."""

    def get_command(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> str:
        """The command line, which FLARE splits as a shell would."""
        return _command(fl_ctx, get_client_job_args())


def _command(fl_ctx: FLContext, names: Sequence[str]) -> str:
    told = fl_ctx.get_prop(FLContextKey.JOB_PROCESS_ARGS)
    words = [sys.executable]
    for name in names:
        if name in told:
            flag, value = told[name]
            words += [flag, *(value.split() if name == JobProcessArgs.OPTIONS else [str(value)])]
    return shlex.join(words)
