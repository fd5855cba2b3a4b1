"""Every hard invariant of a proxy, in the order in which a failed one explains the next."""

from __future__ import annotations

from fedqsn_cli.auditing.between import check_between
from fedqsn_cli.auditing.contents import check_contents
from fedqsn_cli.auditing.holes import check_holes
from fedqsn_cli.auditing.masks import check_masks
from fedqsn_cli.auditing.merged import check_merged
from fedqsn_cli.auditing.opened import Inputs, Report
from fedqsn_cli.auditing.presence import check_presence
from fedqsn_cli.auditing.rebuild import check_rebuild
from fedqsn_cli.auditing.served import check_served
from fedqsn_cli.progress import Progress


def check_invariants(inputs: Inputs, report: Report, progress: Progress | None = None) -> None:
    """Apply FQ001 to FQ011 to everything that was opened; findings and checks go to the report.

    A check without its inputs is "not-run", with the reason; it never passes.
    """
    check_contents(inputs, report)
    check_masks(inputs, report)
    odd = check_rebuild(inputs, report, progress)
    check_holes(inputs, report, odd)
    check_between(inputs, report, odd)
    check_presence(inputs, report, odd)
    check_merged(inputs, report)
    check_served(inputs, report)
