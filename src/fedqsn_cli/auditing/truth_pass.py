"""One pass over the truth for all that looks at its weights.

    truth ──read──▶ W ─┬─▶ export, which makes the release again and compares it
                       ├─▶ sketches of all rows and columns
                       └─▶ sums of the attacks on weights

Where a release is made again, what the export reads is handed on, run by run; the rest, or all, is read afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import Quantization
from fedqsn_cli.auditing.checks import grouped
from fedqsn_cli.auditing.completeness import Collector
from fedqsn_cli.auditing.findings import Recovery
from fedqsn_cli.auditing.inputs import Inputs
from fedqsn_cli.auditing.invariants.truth_index import TruthIndex
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.recovery.weights import WeightAttack
from fedqsn_cli.export.pipeline import CHUNK_ELEMENTS
from fedqsn_cli.kernels.read_ahead import announced, compute_ahead
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from fedqsn_cli.progress import Progress
from fedqsn_cli.quantization.layout import TensorLayout, row_chunks

Array = NDArray[Any]


class Observer(Protocol):
    """Something that looks at every weight of the truth."""

    def take(self, task: TensorTask, first: int, stored: Array) -> None:
        """Look at rows from `first` on of a tensor's working view, as they are stored: in any order, in any thread."""


@dataclass
class WatchedModel(OpenModel):
    """A model that hands on what is read of it, and tells what will be."""

    expects: Callable[[str, int, int], None] = field(kw_only=True)
    watch: Callable[[str, int, Array], None] = field(kw_only=True)

    def expect_rows(self, name: str, storage: TensorLayout, first: int, rows: int) -> None:
        """As `OpenModel.expect_rows`."""
        super().expect_rows(name, storage, first, rows)
        self.expects(name, first, rows)

    def read_rows(self, name: str, storage: TensorLayout, first: int, rows: int) -> Array:
        """As `OpenModel.read_rows`."""
        x = super().read_rows(name, storage, first, rows)
        self.watch(name, first, x)
        return x


class TruthPass:
    """The runs of rows of all tensors of weights, as an export with this quantization reads them, each seen once.

    Args:
        beside: proxies that observers read beside the truth, and that what an export makes of it is compared with.
    """

    def __init__(
        self,
        truth: OpenModel,
        quantization: Quantization | None,
        observers: Sequence[Observer],
        progress: Progress,
        beside: Sequence[OpenedProxy] = (),
    ) -> None:
        self._truth, self._observers, self._progress, self._beside = truth, observers, progress, beside
        self._block = quantization.block_size if quantization else 1
        tasks = tensor_tasks(truth, quantization, lambda tensor: None)
        self.tasks = {task.name: task for task in tasks if task.tensor.is_float}
        self._seen: set[tuple[str, int]] = set()

    @property
    def watched(self) -> OpenModel:
        """The truth, for an export: what it reads needs not be read again."""
        truth = self._truth
        parts = truth.source, truth.checkpoint, truth.manifest, truth.tensors, truth.plan
        return WatchedModel(*parts, expects=self._expect, watch=self._hand_on)

    def finish(self) -> None:
        """Read what was not seen yet."""
        left = [task for task in self.tasks.values() if self._unseen(task)]
        if not left:
            return
        self._progress.start("reading", sum(self._truth.stored_bytes(task.name) for task in left), "bytes")
        for size in compute_ahead(self._calls(left)):
            self._progress.advance(size)
        self._progress.finish()

    def _calls(self, tasks: Sequence[TensorTask]) -> Iterator[Callable[[], int] | None]:
        pieces = ((task, *piece) for task in tasks for piece in self._unseen(task))
        current = None
        for task, first, rows in announced(pieces, lambda piece: self._expect_truth(*piece)):
            if task.plan.axis == "element" and task is not current:
                yield None  # element masks are as large as their tensor: hold those of one tensor at a time
            current = task
            yield partial(self._read, task, first, rows)

    def _expect_truth(self, task: TensorTask, first: int, rows: int) -> None:
        self._truth.expect_rows(task.name, task.layout, first, rows)

    def _unseen(self, task: TensorTask) -> list[tuple[int, int]]:
        runs = row_chunks(task.layout, self._block, CHUNK_ELEMENTS)
        return [(first, rows) for first, rows in runs if (task.name, first) not in self._seen]

    def _read(self, task: TensorTask, first: int, rows: int) -> int:
        x = self._truth.read_rows(task.name, task.layout, first, rows)
        self._hand_on(task.name, first, x)
        return x.nbytes

    def _expect(self, name: str, first: int, rows: int) -> None:
        task = self.tasks.get(name)
        if task is not None:
            for proxy in self._beside:
                proxy.expect_rows(name, task.layout, first, rows)

    def _hand_on(self, name: str, first: int, x: Array) -> None:
        task = self.tasks.get(name)
        if task is None or (name, first) in self._seen:
            return
        for observer in self._observers:
            observer.take(task, first, x)
        self._seen.add((name, first))


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
        formats = grouped(inputs.proxies, lambda proxy: str(proxy.manifest.quantization))
        attacks = {
            str(one.proxies[0].manifest.quantization): WeightAttack(truth, inputs.base, one.proxies) for one in formats
        }
        passes: dict[str, TruthPass] = {}
        for name, attack in attacks.items():
            observers: list[Observer] = [attack] if passes else [attack, index]
            beside = attack.proxies if len(attack.proxies) == 1 else ()  # pieces of many would fill the memory
            passes[name] = TruthPass(truth, attack.quantization, observers, inputs.progress, beside)
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
