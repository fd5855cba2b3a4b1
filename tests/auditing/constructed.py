"""Audits made by hand, number by number, and what each format says of them: golden/NAME.FORMAT.

No value here is computed, so the files are equal on every machine. Write them anew after an intended change of a
report, and read the difference: PYTHONPATH=src:tests python tests/auditing/constructed.py
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from fedqsn_cli.auditing.findings import (
    AttackScore,
    Attempt,
    Audit,
    Check,
    CurvePoint,
    Finding,
    FunctionRecovery,
    ModelScore,
    Recovery,
    TensorRecovery,
)
from fedqsn_cli.auditing.report import FORMATS, render
from fedqsn_cli.exposure.results import ClientExposure, Coalition, Exposure

GOLDEN = Path(__file__).parent / "golden"
ENDINGS = {
    "text": "txt",
    "json": "json",
    "sarif": "sarif",
    "junit": "xml",
    "github": "github",
    "markdown": "md",
    "html": "html",
}
NASTY = 'a"b<c>&d|`e`*f*%0A::error::g\n\r\x1b[31m]]>{h}@i#1\u202e'

NO_POLICY = {
    "sha256": None,
    "require": ["FQ001", "FQ201"],
    "threat": {"colluders": 3, "rounds": None, "public_examples": None},
    "limits": {"proxy": {}, "coalition": {}, "tensor": {}, "clear": None},
    "budget": {"client": None, "coalition": None},
    "regression": {},
    "waivers": [],
}
POLICY = {
    "sha256": "d" * 64,
    "require": ["FQ001", "FQ101", "FQ102", "FQ201", "FQ203", "FQ301"],
    "threat": {"colluders": 3, "rounds": 10, "public_examples": [100, 1000]},
    "limits": {
        "proxy": {"exact_share": 0.05, "log10_nmse": -1.5, "cosine": 0.985, "rho": 0.9},
        "coalition": {"cosine": 0.985},
        "tensor": {"cosine": 0.999},
        "clear": 0.02,
    },
    "budget": {"client": 0.8, "coalition": None},
    "regression": {"cosine": 0.005},
    "waivers": [
        {
            "rule": "FQ203",
            "tensor": "*embeddings*",
            "scope": "*",
            "reason": "the vocabulary of the public base is not secret",
            "owner": "model-security@example.com",
            "expires": "2027-06-30",
        }
    ],
}
INPUTS = {"proxy alice": "a" * 64, "job": "b" * 64, "ledger": "c" * 64}
MODULES = ("bert.embeddings.word_embeddings", "bert.encoder.layer.0.attention.self.query", "classifier")


def client(name: str, *shares: float) -> ClientExposure:
    return ClientExposure(name, tuple(range(1, len(shares) + 1)), shares)


def seen(*clients: ClientExposure, coalitions: tuple[Coalition, ...] = ()) -> Exposure:
    heat = tuple((one.client, module, one.shares[-1]) for one in clients for module in MODULES)
    return Exposure(clients, coalitions, 3, 0.0015, 0.25, heat, tuple(0.75 - 0.2 / 2**k for k in range(10)))


def recovery(scope: str, *, worse: float = 0.0, delta: bool = True) -> Recovery:
    """What the attacks got back from one scope; `worse` raises every measure."""

    def score(attack: str, exact: float, log10: float, cosine: float, secret: float) -> AttackScore:
        return AttackScore(attack, exact, log10, cosine, secret if delta else None, log10 - 1)

    table = (
        score("as sent", 0.0, -0.5, 0.875, -0.25),
        score("union", 0.015625, -1.0 - worse, 0.9375, 0.75),
        score("union, mean fill", 0.015625, -1.25 - worse, 0.953125, 0.875),
    )
    tensors = [
        TensorRecovery(
            f"bert.encoder.layer.{layer}.attention.self.{part}.weight",
            "linear",
            4096 * (layer + 1),
            0.5625,
            0.015625,
            -1.25 - worse,
            0.953125,
            0.875 if delta else None,
            "union, mean fill",
            -2.25,
        )
        for layer in range(4)
        for part in ("query", "key", "value")
    ]
    tensors.append(
        TensorRecovery("bert.embeddings.LayerNorm.weight", "norm", 64, 1.0, 1.0, -16.0, 1.0, None, "as sent", -16.0)
    )
    return Recovery(scope, table, table[-1], tuple(tensors))


def function(rho: float | None, *curve: CurvePoint) -> FunctionRecovery:
    scores = (
        ModelScore("global", 0.5, 0.875),
        ModelScore("server", 0.75, 0.8125),
        ModelScore("proxy", 1.0, 0.625),
        ModelScore("attacked", 0.875, None),
        ModelScore("base", 1.5, 0.25),
    )
    attempts = (
        Attempt("as sent", "none needed", 0, 1.0, 0.625, 0),
        Attempt("union, base fill", "Hu et al. 2021", 0, 0.875, None, 0),
        Attempt("union, base fill, LoRA", "Hu et al. 2021", 100, 0.75, 0.8125, 80),
    )
    left_out = ("union, base fill, healing, 100 examples",)
    if not curve:
        return FunctionRecovery("coalition of 2", scores, "base", 1.5, rho, "union, base fill")
    return FunctionRecovery("coalition of 2", scores, "base", 1.5, rho, "union, base fill", curve, attempts, left_out)


def passed() -> Audit:
    """The proxies of two clients without a policy and without a public base."""
    exposure = seen(
        client("alice", 0.5625, 0.7),
        client("bob", 0.5625),
        coalitions=(Coalition(2, ("alice", "bob"), 0.725, "exact", 1, 0.725),),
    )
    checks = (
        Check("FQ006", "proxy alice", "pass", "every byte was searched for the key"),
        Check("FQ001", "proxy alice", "pass", "every tensor was built again from server-visible weights"),
        Check("FQ008", "after", "not-run", "needs --truth, --after and --key"),
        Check("FQ002", "server", "not-run", "needs --truth, to look for its hidden units everywhere"),
    )
    recoveries = (recovery("proxy alice", delta=False), recovery("coalition of 2", worse=0.25, delta=False))
    return Audit((), checks, recoveries, None, exposure, NO_POLICY, INPUTS, "0.1.0")


def over_the_limits() -> Audit:
    """Limits exceeded by clients, a coalition and a tensor; a waived finding; a fine-tuned attack."""
    limits = (
        Finding("FQ203", "coalition of 2", "bert.pooler.dense.weight", "cosine is 0.9914", 0.9914, 0.985, "gate"),
        Finding(
            "FQ203",
            "proxy alice",
            "bert.embeddings.word_embeddings.weight",
            "cosine is 0.99 (waived)",
            0.99,
            0.985,
            "info",
        ),
        Finding("FQ101", "clients", None, "what client alice has seen is 0.9, over the limit of 0.8", 0.9, 0.8, "gate"),
    )
    checks = (
        Check("FQ101", "clients", "fail", "what client alice has seen is 0.9, over the limit of 0.8"),
        Check("FQ203", "coalition of 2", "fail", "cosine is 0.9914"),
        Check("FQ203", "coalition of 2", "fail", "bert.pooler.dense.weight: cosine is 0.9914"),
        Check("FQ201", "proxy alice", "pass", "share of all parameters recovered exactly: 0.01563; limit 0.05"),
        Check("FQ205", "baseline", "not-run", "this audit measured nothing that the baseline did"),
    )
    names = ("alice", "bob", "carol")
    coalitions = (
        Coalition(2, names[:2], 0.8, "exact", 3, 0.8),
        Coalition(3, names, 0.9, "greedy", 1001, 0.925),
    )
    exposure = seen(
        client("alice", 0.5625, 0.9), client("bob", 0.5), client("carol", 0.25, 0.3, 0.35), coalitions=coalitions
    )
    curve = (
        CurvePoint(100, 0.75, 0.8125, 0.75, 1.25, 0.6875, "union, base fill, LoRA"),
        CurvePoint(1000, 0.625, None, 0.875, 1.0, 0.75),
    )
    recoveries = tuple(recovery(f"proxy {name}") for name in names) + (recovery("coalition of 3", worse=0.25),)
    return Audit(limits, checks, recoveries, function(0.625, *curve), exposure, POLICY, INPUTS, "0.1.0")


def incomplete() -> Audit:
    """Inputs are missing and a waiver has expired; the exposure is an estimate, and rho is not defined."""
    findings = (
        Finding(
            "FQ901",
            "audit",
            None,
            "FQ302 (function-after-tuning) is required but was not checked",
            None,
            None,
            "incomplete",
        ),
        Finding("FQ903", "proxy bob", None, "the proxy cannot be read: no proxy.json here", None, None, "incomplete"),
        Finding("FQ905", "policy", None, "the waiver of FQ203 expired on 2025-01-31", None, None, "incomplete"),
        Finding("FQ905", "policy", None, "the waiver of FQ201 covers nothing", None, None, "info"),
    )
    checks = (
        Check("FQ302", "audit", "not-run", "needs a readable proxy, --truth, --key, --eval-data and --public-data"),
        Check("FQ001", "proxy alice", "not-run", "needs --truth and --key"),
        Check("FQ103", "model", "pass", "share of all parameters in the clear: 0.0015; limit 0.02"),
    )
    exposure = replace(seen(client("alice", 0.5)), looked_at=0.25, proxies_to_99=None)
    found = replace(function(None), floor="averages", scope="proxy alice")
    return Audit(findings, checks, (recovery("proxy alice"),), found, exposure, POLICY, {}, "0.1.0")


def broken() -> Audit:
    """A leak in a proxy whose names try to break every format; nothing was measured."""
    findings = (
        Finding("FQ201", f"proxy {NASTY}", NASTY, NASTY, float("nan"), 0.05, "gate"),
        Finding("FQ002", f"proxy {NASTY}", NASTY, "holds units of the truth that are hidden", 3.0, 0.0, "hard"),
        Finding("FQ010", "proxy alice", None, "notes.txt is not listed in proxy.json", None, None, "hard"),
    )
    checks = (
        Check("FQ002", f"proxy {NASTY}", "fail", NASTY),
        Check("FQ010", "proxy alice", "fail", "files, digests and tensors were compared with proxy.json"),
        Check("FQ004", NASTY, "not-run", NASTY),
    )
    return Audit(findings, checks, policy=NO_POLICY, inputs={f"proxy {NASTY}": "e" * 64}, version="0.1.0")


def large() -> Audit:
    """More clients, proxies, tensors and findings than a report lists."""
    clients = [client(f"client{number:02}", 0.5, 0.5 + number / 100) for number in range(40)]
    names = tuple(one.client for one in clients)
    coalitions = (Coalition(3, names[-3:], 0.9375, "sampled", 1001, 1.0), Coalition(40, names, 1.0, "exact", 1, 1.0))
    exposure = replace(seen(*clients, coalitions=coalitions), hidden_share=0.0)
    findings = tuple(
        Finding("FQ203", f"proxy client{number:03}", f"layer.{number}.weight", f"cosine is {number}", 1.0, 0.5, "gate")
        for number in range(120)
    )
    checks = tuple(Check(one.rule, one.scope, "fail", one.message) for one in findings)
    recoveries = tuple(recovery(f"proxy client{number:02}", worse=number / 64) for number in range(16))
    return Audit(
        findings, checks, recoveries, function(-0.5, CurvePoint(64, 2.0, None, -0.5)), exposure, POLICY, INPUTS, "0.1.0"
    )


AUDITS = {
    "passed": passed,
    "over-the-limits": over_the_limits,
    "incomplete": incomplete,
    "broken": broken,
    "large": large,
}
SHORTENED = ("text", "markdown", "html")  # the formats that leave something out of a large audit
CASES = [
    (name, format_name) for name in AUDITS for format_name in (SHORTENED if name == "large" else (*FORMATS, "html"))
]


def golden(name: str, format_name: str) -> Path:
    """The file that holds what a format says of an audit."""
    return GOLDEN / f"{name}.{ENDINGS[format_name]}"


def rendered(name: str, format_name: str) -> bytes:
    """What it says today."""
    return render(AUDITS[name](), format_name).encode()


def main() -> int:
    """Write all files anew."""
    GOLDEN.mkdir(exist_ok=True)
    for name, format_name in CASES:
        golden(name, format_name).write_bytes(rendered(name, format_name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
