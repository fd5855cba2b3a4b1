"""Every rule of the audit, as data. Ids are stable: a rule that goes away leaves its number unused.

FQ00x, FQ01x   hard invariants: never waivable, exit code 4
FQ1xx          exposure, from ledger and key
FQ2xx          recovered weights
FQ3xx          recovered function
FQ9xx          the audit could not be completed: exit code 3, never a pass
"""

from __future__ import annotations

from dataclasses import dataclass

from fedqsn_cli.auditing.findings import Finding, Severity


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: what it looks at, why that matters, how to mend what it finds."""

    id: str
    name: str
    severity: Severity
    what: str
    why: str
    mend: str

    @property
    def anchor(self) -> str:
        """Where the documentation explains it: docs/rules.md#..."""
        return f"{self.id.lower()}-{self.name}"


_EXPORT_AGAIN = "Do not send this proxy. Export it again with `fedqsn export-proxy`, in a new round."
_LESS = "Hide more (a new job with a larger --p1), use a coarser format, release fewer proxies, or raise the limit."

_RULES = (
    Rule(
        "FQ001",
        "hidden-influence",
        "hard",
        "The proxy is built again from server-visible weights of the truth; every byte of every tensor must be equal.",
        "A byte that server-visible weights do not explain may carry hidden ones.",
        _EXPORT_AGAIN + " If it happens again, the exporting tool computes with hidden weights.",
    ),
    Rule(
        "FQ002",
        "hidden-unit-present",
        "hard",
        "A hidden unit of the truth stands in the proxy: in its own place, or under any other name, transposed, in a "
        "tied twin, negated, scaled, or in another precision.",
        "A unit that is sent is not hidden, whatever it is called.",
        "Remove the copy from the model, or give it the mask of its twin (tie_word_embeddings, or a plan file); then "
        "export again in a new job.",
    ),
    Rule(
        "FQ003",
        "scale-from-hidden",
        "hard",
        "A block scale that none of the codes it belongs to attains, or that equals the magnitude of a hidden weight.",
        "A scale taken before the server mask tells the magnitude of one weight in every block, also of hidden ones.",
        "Take absmax after the server mask: quantize the server model, not the global model. " + _EXPORT_AGAIN,
    ),
    Rule(
        "FQ004",
        "second-hidden-set",
        "hard",
        "Proxies of one job together show more units than one server mask leaves visible, or releases of one job name "
        "another p1 or plan.",
        "Each of two server masks hides what the other one shows; together they hide next to nothing.",
        "Keep one key for the whole job. What was released counts as shown: start a new job only for a new model.",
    ),
    Rule(
        "FQ005",
        "mask-not-from-key",
        "hard",
        "The visible units are not those that the key gives for this job, client and round.",
        "Only masks derived from the key are unpredictable, and the same in every round.",
        "Export with the job's own key. A mask drawn by anything else cannot be trusted.",
    ),
    Rule(
        "FQ006",
        "secret-in-bytes",
        "hard",
        "Key material, seeds, absolute paths, host or user names, clock times, or bytes that no format has a use for.",
        "Metadata travels with the proxy; a seed or a key in it gives every mask away.",
        "Export with fedqsn, which writes none of these; clean the tokenizer and configuration files of the source.",
    ),
    Rule(
        "FQ007",
        "clear-copy",
        "hard",
        "A hidden bias is not zero, or visible weights are there once more, or finer than the proxy says.",
        "A bias leaks its neuron; a second, finer copy makes the quantization of the first one pointless.",
        _EXPORT_AGAIN,
    ),
    Rule(
        "FQ008",
        "merge-changed-hidden",
        "hard",
        "Hidden units of the global model before and after a merge must be equal, bit for bit.",
        "No client saw them, so a change is a fault or somebody's doing.",
        "Merge again with `fedqsn merge` from the model before.",
    ),
    Rule(
        "FQ009",
        "codes-differ-between-clients",
        "hard",
        "Two proxies of one round must hold equal codes, and scales in one proportion, wherever both show a unit.",
        "Every differing rounding of a weight narrows it down; averaging a few dozen proxies undoes the quantization.",
        "Quantize once for all clients and mask afterwards; never round stochastically per client.",
    ),
    Rule(
        "FQ010",
        "unlisted-content",
        "hard",
        "A file or tensor that a proxy does not consist of, a file that is not the one listed in proxy.json, or a "
        "proxy that the ledger does not know.",
        "What is not in the ledger was not counted, and what is not in the format may be anything.",
        _EXPORT_AGAIN,
    ),
    Rule(
        "FQ011",
        "mask-from-weak-generator",
        "hard",
        "The hidden units are those that a seeded generator (seeds 0 to 65535 of torch) draws.",
        "An attacker tries all seeds in seconds and knows every mask of the job.",
        "Derive masks from a 256-bit key, as `fedqsn mask` does. Start a new job.",
    ),
    Rule(
        "FQ101",
        "client-exposure",
        "gate",
        "Share of all parameters that one client has seen over all its rounds.",
        "Fresh masks show a client another part in every round, until it has seen all that the server mask leaves.",
        "Use --schedule sticky, fewer rounds a client, or a larger p1.",
    ),
    Rule(
        "FQ102",
        "coalition-exposure",
        "gate",
        "Share of all parameters that the worst coalition of clients has seen together, or can have seen as far as is "
        "known: what is not ruled out counts.",
        "Clients can talk to each other.",
        "Use --schedule sticky, fewer clients, or a larger p1: p2 only delays it.",
    ),
    Rule(
        "FQ103",
        "clear-parameters",
        "gate",
        "Share of all parameters that are sent neither masked nor quantized.",
        "They are the owner's weights, as they are.",
        "Mask or quantize them (plan file), or raise the limit: norms and biases are small.",
    ),
    Rule(
        "FQ201",
        "exact-recovery",
        "gate",
        "Share of all parameters that an attacker holds exactly.",
        "Exact weights are the model itself.",
        _LESS,
    ),
    Rule(
        "FQ202",
        "recovery-error",
        "gate",
        "Normalised squared error of the best reconstruction, over all parameters.",
        "The smaller it is, the nearer the attacker's copy.",
        _LESS,
    ),
    Rule(
        "FQ203",
        "recovery-cosine",
        "gate",
        "Cosine between the weights and their best reconstruction.",
        "The nearer to 1, the nearer the attacker's copy.",
        _LESS,
    ),
    Rule(
        "FQ204",
        "difference-recovered",
        "gate",
        "Share of the secret difference to the public base that the best reconstruction recovers.",
        "Of a fine-tuned model the difference is the secret; everything else is public.",
        _LESS,
    ),
    Rule(
        "FQ205",
        "worse-than-baseline",
        "gate",
        "A measure is worse than in the baseline, by more than the policy allows.",
        "Leakage that creeps up is seen here before it reaches a limit.",
        "See what changed since the baseline; accept it by saving this audit as the new one.",
    ),
    Rule(
        "FQ301",
        "function-recovery",
        "gate",
        "rho: how far the best attacked proxy gets from the floor to the global model, in loss.",
        "A client must be able to train, so a proxy works; it must not work as well as the model.",
        _LESS,
    ),
    Rule(
        "FQ302",
        "function-after-tuning",
        "gate",
        "rho after the attacker has fine-tuned the proxy with public examples.",
        "Masked models can be healed with data.",
        _LESS,
    ),
    Rule(
        "FQ901",
        "missing-input",
        "incomplete",
        "A check that the policy requires could not run, because an input was not given.",
        "What was not looked at has not passed.",
        "Give the input that the message names, or take the check out of the policy's scope.",
    ),
    Rule(
        "FQ902",
        "not-a-number",
        "incomplete",
        "A measure is NaN or infinite.",
        "A comparison with NaN is always false, so it would pass every limit.",
        "Look for NaN or infinite weights in the truth and in the proxy.",
    ),
    Rule(
        "FQ903",
        "unreadable",
        "incomplete",
        "An artifact cannot be read: missing, malformed, truncated.",
        "What cannot be read has not been checked.",
        "Fetch or export it again.",
    ),
    Rule(
        "FQ904",
        "does-not-belong",
        "incomplete",
        "Two inputs do not belong together: another model, another job, another plan.",
        "Comparing them would measure nothing.",
        "Give the model that the proxy was exported from, its key and its ledger.",
    ),
    Rule(
        "FQ905",
        "waiver-expired",
        "incomplete",
        "A waiver of the policy has expired. One that covers nothing is only noted.",
        "A waiver is a decision with a date; after it somebody must decide again.",
        "Remove it, or renew it with a new date.",
    ),
)

RULES: dict[str, Rule] = {rule.id: rule for rule in _RULES}
"""All rules by id, in the order of ids."""


def finding(
    rule: str,
    scope: str,
    message: str,
    *,
    tensor: str | None = None,
    value: float | None = None,
    limit: float | None = None,
) -> Finding:
    """A finding with its rule's own severity."""
    return Finding(rule, scope, tensor, message, value, limit, RULES[rule].severity)
