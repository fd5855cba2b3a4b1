"""`fedqsn courier-approve`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import ViewOptions
    from fedqsn_cli.options import CourierApproveOptions


def courier_approve(
    path: Annotated[str, argument("COURIER", "The owner's folder.")],
    request: Annotated[str, argument("REQUEST", "From the site.")],
    options: CourierApproveOptions,
    view: ViewOptions,
) -> None:
    """Approve a site's request: it may connect, and its key counts as the client's from now on.

    Compare the fingerprint that is printed with the one that the site saw, by another way than the request came.

    Examples:

      fedqsn courier-approve courier alice.request --out alice.approval
    """
    from fedqsn_cli.courier.setup import courier_approve as run

    result = run(path, request, options)
    facts: list[tuple[str, object]] = [
        ("approval", f"{result.next}: give it to the site"),
        ("the site's key", result.fingerprint),
    ]
    console.show(view.mode, result, essential=[result.next], parts=[console.Facts(facts)])
