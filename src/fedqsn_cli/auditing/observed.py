"""What looks at the truth while it is read once: the search for copies, and the attacks on weights."""

from __future__ import annotations

from dataclasses import dataclass

from fedqsn_cli.artifacts.manifests import Quantization
from fedqsn_cli.auditing.completeness import Collector
from fedqsn_cli.auditing.findings import Recovery
from fedqsn_cli.auditing.inputs import Inputs
from fedqsn_cli.auditing.invariants.truth_index import TruthIndex
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.recovery.weights import WeightAttack
from fedqsn_cli.auditing.truth_pass import Observer, TruthPass
from fedqsn_cli.models.model import OpenModel


@dataclass(frozen=True)
class Observed:
    """The passes over the truth: one for each format of the proxies; the first also sketches what it reads."""

    index: TruthIndex
    passes: dict[str, TruthPass]
    attacks: dict[str, WeightAttack]

    @classmethod
    def of(cls, inputs: Inputs, truth: OpenModel) -> Observed:
        """Nothing was read yet."""
        index = TruthIndex(inputs, truth)
        formats: dict[str, list[OpenedProxy]] = {}
        for proxy in inputs.proxies:
            formats.setdefault(str(proxy.manifest.quantization), []).append(proxy)
        attacks = {name: WeightAttack(truth, inputs.base, proxies) for name, proxies in formats.items()}
        passes: dict[str, TruthPass] = {}
        for name, attack in attacks.items():
            observers: list[Observer] = [attack] if passes else [index, attack]
            passes[name] = TruthPass(truth, attack.quantization, observers, inputs.progress)
        return cls(index, passes or {str(None): TruthPass(truth, None, [index], inputs.progress)}, attacks)


def observed(inputs: Inputs, truth: OpenModel) -> Observed:
    """The passes of this audit."""
    return inputs.shared("observed", lambda: Observed.of(inputs, truth))


def watched(inputs: Inputs, origin: OpenModel, quantization: Quantization | None) -> OpenModel:
    """The model that an export reads; where that is the truth, its pass looks on."""
    passes = observed(inputs, origin).passes if origin is inputs.truth else {}
    found = passes.get(str(quantization))
    return origin if found is None else found.watched


def truth_index(inputs: Inputs, truth: OpenModel) -> TruthIndex:
    """The truth as sketches."""
    found = observed(inputs, truth)
    next(iter(found.passes.values())).finish()
    found.index.settle()
    return found.index


def recover_weights(inputs: Inputs, collector: Collector) -> tuple[Recovery, ...]:
    """Attack each proxy alone, and all proxies of one format together if there are several.

    Proxies of several rounds are put together too: their truth is the model that was given. Findings are only those of
    measures that are not numbers (FQ902) and of proxies that cannot be read (FQ903).
    """
    if inputs.truth is None:
        return ()
    recovered: list[Recovery] = []
    found = observed(inputs, inputs.truth)
    for name, attack in found.attacks.items():
        scopes = [proxy.scope for proxy in attack.proxies]

        def result(of: TruthPass = found.passes[name], attack: WeightAttack = attack) -> list[Recovery]:
            of.finish()
            return attack.result(list(of.tasks.values()), collector)

        recovered += collector.attempt(result, *scopes, problem="its weights cannot be measured") or ()
    return tuple(recovered)
