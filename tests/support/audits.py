"""Audits made by hand, for tests of what is printed."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

from fedqsn_cli.auditing.findings import (
    AttackScore,
    Audit,
    Check,
    CurvePoint,
    Finding,
    FunctionRecovery,
    ModelScore,
    Recovery,
    TensorRecovery,
)
from fedqsn_cli.auditing.policy import AllLimits, Budget, Clear, Limits, Policy
from fedqsn_cli.auditing.policy_file import summary
from fedqsn_cli.auditing.rules import RULES
from fedqsn_cli.exposure.exposure import exposure
from fedqsn_cli.masks.job_key import JobKey
from support.ledgers import Line

KEY = bytes(range(32))


def job(layers: int = 6, width: int = 384, p1: float = 0.1, vocabulary: int = 30522) -> JobKey:
    """A job on a model like MiniLM."""
    groups = {"bert.embeddings.word_embeddings.weight": (width, width * vocabulary)}
    groups["bert.embeddings.position_embeddings.weight"] = (width, width * 512)
    for layer in range(layers):
        at = f"bert.encoder.layer.{layer}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            groups[f"{at}{name}.weight"] = (width, width * (width + 1))
        groups[f"{at}intermediate.dense.weight"] = (4 * width, 4 * width * (width + 1))
        groups[f"{at}output.dense.weight"] = (width, width * (4 * width + 1))
    groups["classifier.weight"] = (width, 4 * width)
    return JobKey(KEY, p1, "neuron", "0" * 64, {}, groups, 20_000)


def score(attack: str, exact: float, log10: float, cosine: float, delta: float | None) -> AttackScore:
    return AttackScore(attack, exact, log10, cosine, delta, log10 - 1.0)


def recovery(scope: str, model: JobKey, worse: float = 0.0, *, delta: bool = True) -> Recovery:
    """What the attacks got back from one scope."""
    tensors = []
    for number, (name, (_, size)) in enumerate(model.groups.items()):
        log10 = -1.0 - 0.4 * worse - 0.13 * math.sin(number)
        role = "embedding" if "embeddings" in name else "linear"
        tensors.append(
            TensorRecovery(
                name,
                role,
                size,
                0.81 + 0.09 * worse,
                0.016,
                log10,
                0.95,
                0.9 + worse / 20 if delta else None,
                "union, mean fill",
                log10 - 1,
            )
        )
    tensors.append(
        TensorRecovery(
            "bert.embeddings.LayerNorm.weight", "norm", 384, 1, 1, -16, 1, 1 if delta else None, "as sent", -16
        )
    )
    table = (
        score("as sent", 0.005, -0.6, 0.91, 0.80 if delta else None),
        score("union", 0.017, -0.95 - worse / 3, 0.94 + worse / 100, 0.88 if delta else None),
        score("union, mean fill", 0.017, -1.0 - worse / 3, 0.95 + worse / 100, 0.9 + worse / 20 if delta else None),
    )
    return Recovery(scope, table, table[-1], tuple(tensors))


def finding(rule: str, scope: str, message: str, **more: Any) -> Finding:
    """A finding of the rule with this id."""
    return RULES[rule].finding(scope, message, **more)


_FOUND: dict[str, list[tuple[str, str, str, dict[str, Any]]]] = {
    "passed": [],
    "over the limits": [
        ("FQ101", "clients", "what client alice has seen is 0.9, over the limit of 0.8", {"value": 0.9, "limit": 0.8}),
        (
            "FQ203",
            "coalition of 4",
            "cosine between the weights and their reconstruction is 0.9914, over the limit",
            {"tensor": "bert.encoder.layer.0.output.dense.weight", "value": 0.9914, "limit": 0.985},
        ),
    ],
    "incomplete": [("FQ901", "audit", "FQ301 (function-recovery) is required but was not checked", {})],
    "broken": [
        ("FQ003", "proxy alice", "a scale is larger than any code explains", {"tensor": "bert.pooler.dense.weight"}),
    ],
}


@cache
def audit(*, verdict: str = "passed", clients: int = 4, rounds: int = 3) -> Audit:
    """A whole audit that ended like this."""
    model = job()
    lines = [Line(f"client{c}", r, "fresh", 0.1) for r in range(1, rounds + 1) for c in range(clients)]
    names = ("alice", "bob", "carol", "dave")
    lines = [replace(line, client=names[int(line.client[6:])]) if clients <= 4 else line for line in lines]
    findings = tuple(finding(*given[:3], **given[3]) for given in _FOUND[verdict])
    checked = (
        Check("FQ001", "proxy alice", "pass", "every tensor was built again from server-visible weights"),
        Check(
            "FQ003", "proxy alice", "fail" if verdict == "broken" else "pass", "scales were held against their codes"
        ),
        Check(
            "FQ101", "clients", "fail" if verdict == "over the limits" else "pass", "what client alice has seen: 0.9009"
        ),
        Check("FQ008", "after", "not-run", "needs --truth, --after and --key"),
    )
    limits = AllLimits(
        proxy=Limits(exact_share=0.05, cosine=0.985, rho=0.9), coalition=Limits(cosine=0.985), clear=Clear(share=0.02)
    )
    policy = Policy(limits=limits, budget=Budget(client=0.95)).with_digest("d" * 64)
    function = FunctionRecovery(
        "coalition of 4",
        (
            ModelScore("global", 0.41, 0.893),
            ModelScore("server", 0.62, 0.82),
            ModelScore("proxy", 0.97, 0.66),
            ModelScore("attacked", 0.66, 0.80),
            ModelScore("base", 1.39, 0.25),
        ),
        "base",
        1.39,
        0.745,
        "union, mean fill",
        (CurvePoint(100, 0.60, 0.82, 0.806), CurvePoint(1000, 0.52, 0.85, 0.888), CurvePoint(10000, 0.49, 0.86, 0.918)),
    )
    recoveries = (*(recovery(f"proxy {name}", model) for name in names), recovery("coalition of 4", model, 1.0))
    return Audit(
        findings,
        checked,
        recoveries,
        function,
        exposure(model, lines),
        summary(policy),
        {"proxy alice": "a" * 64, "job": "b" * 64, "ledger": "c" * 64},
        "0.1.0",
    )
