"""FQ101 to FQ103: what clients and coalitions have seen of all parameters."""

from __future__ import annotations

from collections.abc import Iterator

from fedqsn_cli.auditing.findings import Entry
from fedqsn_cli.auditing.inputs import KEY, LEDGER, RELEASES
from fedqsn_cli.auditing.limits.measured import TOLERANCE, LimitCheck, Measured, check_limit
from fedqsn_cli.auditing.policy import Policy
from fedqsn_cli.auditing.registry import Rule
from fedqsn_cli.exposure.results import Exposure

CLIENT_EXPOSURE = Rule(
    "FQ101",
    "client-exposure",
    "gate",
    what="Share of all parameters that one client has seen over all its rounds.",
    why="Fresh masks show a client another part in every round, until it has seen all that the server mask leaves.",
    fix="Use --schedule sticky, fewer rounds a client, or a larger p1.",
    scope="exposure",
    needs=(RELEASES, KEY),
    limited=lambda policy: policy.budget.client is not None,
)
COALITION_EXPOSURE = Rule(
    "FQ102",
    "coalition-exposure",
    "gate",
    what="Share of all parameters that the worst coalition of clients has seen together, or can have seen as far as is "
    "known: what is not ruled out counts.",
    why="Clients can talk to each other.",
    fix="Use --schedule sticky, fewer clients, or a larger p1: p2 only delays it.",
    scope="exposure",
    needs=(RELEASES, KEY),
    limited=lambda policy: policy.budget.coalition is not None,
)
CLEAR_PARAMETERS = Rule(
    "FQ103",
    "clear-parameters",
    "gate",
    what="Share of all parameters that are sent neither masked nor quantized.",
    why="They are the owner's weights, unchanged.",
    fix="Mask or quantize them (plan file), or raise the limit: norms and biases are small.",
    scope="exposure",
    needs=(LEDGER, KEY),
    limited=lambda policy: policy.limits.clear.share is not None,
)


@LimitCheck
def exposure(policy: Policy, measured: Measured) -> Iterator[Entry]:
    """Clients, planned rounds, the worst coalition, and what is in the clear."""
    seen = measured.exposure
    if seen is None:
        return
    worst = max(seen.clients, key=lambda client: client.shares[-1], default=None)
    if worst is not None:
        what = f"what client {worst.client} has seen of all parameters"
        yield from check_limit(CLIENT_EXPOSURE, "clients", what, worst.shares[-1], policy.budget.client)
    if measured.expected is not None and policy.threat.rounds is not None:
        what = f"what a client sees of all parameters in {policy.threat.rounds} fresh proxies (expected)"
        yield from check_limit(CLIENT_EXPOSURE, "planned rounds", what, measured.expected, policy.budget.client)
    yield from _coalition(policy, seen)
    what = "share of all parameters in the clear"
    yield from check_limit(CLEAR_PARAMETERS, "model", what, seen.clear_share, policy.limits.clear.share)


def _coalition(policy: Policy, seen: Exposure) -> Iterator[Entry]:
    """A coalition that may exist counts like one that was found: what is not ruled out has not passed."""
    if not seen.clients:
        return
    size, limit = min(policy.threat.colluders, len(seen.clients)), policy.budget.coalition
    coalition = next((coalition for coalition in seen.coalitions if coalition.size == size), None)
    if coalition is None:  # one client is the only coalition
        what = "what the only client has seen of all parameters"
        value = max(client.shares[-1] for client in seen.clients)
    else:
        unsure = coalition.at_most > coalition.share + TOLERANCE and limit is not None and coalition.share <= limit
        what = f"what {size} clients together have seen of all parameters" + (" at most" if unsure else "")
        value = coalition.at_most if unsure else coalition.share
    yield from check_limit(COALITION_EXPOSURE, f"coalition of {policy.threat.colluders}", what, value, limit)
