"""Every hard invariant of a proxy, in the order in which a failed one explains the next."""

from __future__ import annotations

from fedqsn_cli.auditing.inputs import Inputs, Report
from fedqsn_cli.auditing.invariants.contents import check_contents
from fedqsn_cli.auditing.invariants.copied_units import check_presence
from fedqsn_cli.auditing.invariants.holes import check_holes
from fedqsn_cli.auditing.invariants.masks import check_masks
from fedqsn_cli.auditing.invariants.merge_integrity import check_merged
from fedqsn_cli.auditing.invariants.rebuild import check_rebuild
from fedqsn_cli.auditing.invariants.same_codes import check_between
from fedqsn_cli.auditing.invariants.server_holes import check_served
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
