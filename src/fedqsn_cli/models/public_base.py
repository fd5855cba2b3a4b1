"""The public base as the model sees it: every masked tensor of the model is matched with one of the base.

    exact       the same name, dtype and shape
    prefix      a name with one more or one less leading part: encoder.layer... and bert.encoder.layer...
    tied        the base keeps the tensor under the name of one that it is tied to
    converted   another float dtype, rounded to the model's (to nearest, ties to even)
    resized     a vocabulary of another length: rows that the base has not are zeros, rows too many are left out
    zeros       a head that the base has not, or has for another number of labels

That is what transformers' from_pretrained takes from the base; what it would start at random is zero here. Anything
else that is missing or has another shape is refused: its holes would be noise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.checkpoint import Checkpoint, Source
from fedqsn_cli.dtypes import DTYPES, WEIGHT_DTYPES
from fedqsn_cli.errors import InputError
from fedqsn_cli.models.model import ModelTensor, OpenModel, array_dtype, model_tensors, open_source
from fedqsn_cli.planning.roles import rules
from fedqsn_cli.planning.tensor_plan import TensorPlan
from fedqsn_cli.planning.tied import model_type, tie_word_embeddings, tied_groups
from fedqsn_cli.quantization.layout import TensorLayout

Array = NDArray[Any]
Kind = Literal["exact", "prefix", "tied", "converted", "resized", "zeros"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_HINT = "give the checkpoint that the model was fine-tuned from"


class IncompatibleBase(InputError):
    """An invalid public base, or one that lacks what the model needs; `tensor` is the first that is wrong."""

    def __init__(self, what: str, *, where: str, hint: str = _HINT, tensor: str | None = None) -> None:
        super().__init__(what, where=where, hint=hint)
        self.tensor = tensor


@dataclass(frozen=True, slots=True)
class Match:
    """What fills one tensor.

    Args:
        name: the model's tensor. kind: see the table above; the last one that holds.
        source, dtype, shape: the base's tensor; None where it has none.
    """

    name: str
    kind: Kind
    source: str | None = None
    dtype: str | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PublicBase:
    """A public base under the names, dtypes and shapes of a model; read like the model itself, chunk by chunk.

    Args:
        matches: of masked tensors, or of all (see `whole`), in the order of the model's plan.
        tensors: all tensors of the model, masked or not, for which the base has values.
        whole: it takes the place of the whole model, not of its hidden units alone.
    """

    source: Source
    matches: tuple[Match, ...]
    tensors: dict[str, ModelTensor]
    whole: bool
    _checkpoint: Checkpoint
    _found: dict[str, tuple[Match, str]]  # with the dtype that is wanted

    def fills(self, tensor: TensorPlan) -> bool:
        """Does it replace units of a tensor, or all of it?"""
        return self.whole or tensor.masked

    def counts(self) -> dict[str, int]:
        """Number of the tensors in `matches` of each kind."""
        return counted(self.matches)

    def read_rows(self, name: str, storage: TensorLayout, first: int, rows: int) -> Array:
        """Rows of a tensor's working view as stored bits of the model's dtype, as `OpenModel.read_rows` gives them.

        Raises:
            InputError: a value of another dtype is not finite, or too large for the model's.
        """
        match, dtype = self._found[name]
        cols = storage.view[2]
        values = self._values(match, dtype, first * cols, rows * cols)
        return values.reshape((cols, rows) if storage.transposed else (rows, cols))

    def expect_rows(self, name: str, storage: TensorLayout, first: int, rows: int) -> None:
        """Begin to read what `read_rows` will be asked for."""
        span = self._span(self._found[name][0], first * storage.view[2], rows * storage.view[2])
        if span is not None:
            self._checkpoint.expect(*span)

    def _span(self, match: Match, start: int, count: int) -> tuple[str, int, int] | None:
        """Where these values are, as far as the base has them: tensor, first byte, bytes; None where it has none."""
        known = 0
        if match.kind != "zeros" and match.shape is not None:
            known = max(0, min(count, math.prod(match.shape) - start))
        if not known:
            return None
        assert match.source is not None and match.dtype is not None
        size = array_dtype(match.dtype).itemsize
        return match.source, start * size, known * size

    def _values(self, match: Match, dtype: str, start: int, count: int) -> Array:
        """`count` values from a flat position on; rows of another number of them only end elsewhere."""
        span = self._span(match, start, count)
        if span is None or match.dtype is None:
            return np.zeros(count, array_dtype(dtype))
        found: Array = self._checkpoint.read_fresh(*span).view(array_dtype(match.dtype))
        if match.dtype != dtype:
            found = _converted(found, match.dtype, dtype, f"{self.source.reference}: {match.source}")
        missing = count - found.size
        return found if not missing else np.concatenate([found, np.zeros(missing, DTYPES[dtype].bits)])


def open_base(reference: str, model: OpenModel, *, partial: bool = False, whole: bool = False) -> PublicBase:
    """Open a public base and match it with a model; headers only, values come with `read_rows`.

    Args:
        reference: a path or hf:// reference.
        partial: leave out what does not match, in place of refusing the base; for those who only compare with it.
        whole: it is to take the place of the whole model, so that tensors without units must match, too.

    Raises:
        IncompatibleBase: it is not a dense checkpoint, or does not have what the model needs.
        InputError: there is no such checkpoint. FormatError: it is malformed.
    """
    source, checkpoint, manifest = open_source(reference)
    if manifest is not None and manifest.kind != "global-model":
        raise IncompatibleBase(f"a {manifest.kind.replace('-', ' ')} is not a public base", where=reference)
    tensors = model_tensors(checkpoint)
    packed = any(tensor.packing is not None for tensor in tensors.values())
    if packed or (checkpoint.config or {}).get("quantization_config") is not None:
        raise IncompatibleBase("the public base is quantized", where=reference, hint="give its dense checkpoint")
    matcher = _Matcher(model, tensors, checkpoint.config or {}, reference)
    found = dict(matcher.matches(partial, whole))
    logical = {tensor.name: ModelTensor(tensor.dtype, tensor.shape, None) for tensor in model.plan.tensors}
    return PublicBase(
        source,
        tuple(found[t.name] for t in model.plan.tensors if (whole or t.masked) and t.name in found),
        {name: logical[name] for name, match in found.items() if match.kind != "zeros"},
        whole,
        checkpoint,
        {name: (match, logical[name].dtype) for name, match in found.items()},
    )


class _Matcher:
    """Finds the tensors of a base that fill a model's."""

    def __init__(
        self, model: OpenModel, base: Mapping[str, ModelTensor], config: Mapping[str, Any], reference: str
    ) -> None:
        self.tensors = [tensor for tensor in model.plan.tensors if tensor.dtype in WEIGHT_DTYPES]
        self.others = [tensor for tensor in model.plan.tensors if tensor.dtype not in WEIGHT_DTYPES]
        self.base, self.reference = base, reference
        self.model_type = model_type(model.config)
        self.strip, self.add = _prefixes([tensor.name for tensor in self.tensors], base)
        self.tied = tied_groups({tensor.name: (tensor.dtype, tensor.shape) for tensor in self.tensors}, model.config)
        self.base_tied = tied_groups({name: (tensor.dtype, tensor.shape) for name, tensor in base.items()}, config)
        self.base_ties = tie_word_embeddings(config) is not False

    def matches(self, partial: bool, whole: bool) -> Iterator[tuple[str, Match]]:
        """All tensors that can be filled. Raises IncompatibleBase for the first that must be, and cannot."""
        for tensor in self.tensors:
            try:
                yield tensor.name, self.match(tensor)
            except IncompatibleBase:
                if (whole or tensor.masked) and not partial:
                    raise
        for tensor in self.others if whole else ():
            yield tensor.name, self.same(tensor)

    def same(self, tensor: TensorPlan) -> Match:
        """The base's tensor of the same name, dtype and shape, for one that holds no weights."""
        source = self.plainly(tensor.name)
        other = self.base.get(source or "")
        if source is None or other is None or (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
            what = f"the public base has no such tensor, {tensor.dtype} {list(tensor.shape)}"
            raise self.unfit(what, tensor, tensor.name)
        return Match(tensor.name, "exact", source, other.dtype, other.shape)

    def match(self, tensor: TensorPlan) -> Match:
        """What fills a tensor. Raises IncompatibleBase."""
        source = self.source(tensor)
        if source is None:
            if self.is_fresh(tensor):
                return Match(tensor.name, "zeros")
            raise self.unfit("the public base has no such tensor", tensor, tensor.name)
        other = self.base[source]
        return Match(tensor.name, self.kind(tensor, source, other), source, other.dtype, other.shape)

    def kind(self, tensor: TensorPlan, source: str, other: ModelTensor) -> Kind:
        """How a tensor of the base fits. Raises IncompatibleBase."""
        same = other.is_float and other.shape == tensor.shape
        if not same and other.is_float and self.has_any_rows(tensor) and other.shape[1:] == tensor.shape[1:]:
            return "resized" if _is_vocabulary(tensor.name) else "zeros"
        if not same:
            found, wanted = f"{other.dtype} {list(other.shape)}", f"{tensor.dtype} {list(tensor.shape)}"
            raise self.unfit(f"the public base has {found}, the model {wanted}", tensor, source)
        if other.dtype != tensor.dtype:
            return "converted"
        if source == tensor.name:
            return "exact"
        return "prefix" if source == self.plainly(tensor.name) else "tied"

    def has_any_rows(self, tensor: TensorPlan) -> bool:
        """May its number of rows be another one: a vocabulary, or labels?"""
        return tensor.role == "head" or (tensor.role == "embedding" and _is_vocabulary(tensor.name))

    def is_fresh(self, tensor: TensorPlan) -> bool:
        """Is it part of a head, which a fine-tuning starts anew?"""
        weight = tensor.name.removesuffix(".bias") + ".weight" if tensor.role == "bias" else tensor.name
        role = rules().role(weight, 2, self.model_type)
        return tensor.role == "head" or (role is not None and (role.fresh or role.name == "head"))

    def source(self, tensor: TensorPlan) -> str | None:
        """The base's tensor for one of the model's; copies of one tensor all get the same."""
        own, lead = self.plainly(tensor.name), self.lead(tensor.name)
        if own is None or (lead is not None and self.base_tied.get(own, own) != self.base_tied.get(lead, lead)):
            return lead or self.twin(tensor)
        return own

    def plainly(self, name: str) -> str | None:
        """The base's tensor of that name, but for the prefix."""
        for candidate in (self.add + name.removeprefix(self.strip), name):
            if candidate in self.base:
                return candidate
        return None

    def lead(self, name: str) -> str | None:
        """The first tensor of a tied group that the base has."""
        group = self.tied.get(name)
        if group is None:
            return None
        members = [group, *(other for other, its in self.tied.items() if its == group)]
        return next((found for member in members if (found := self.plainly(member)) is not None), None)

    def twin(self, tensor: TensorPlan) -> str | None:
        """For embeddings and output layers: the same tensor under another name, where the base ties them."""
        patterns = [rules().tied_inputs]
        if rules().tied_inputs.search(tensor.name):
            patterns += [rules().tied_outputs] if self.base_ties else []
        elif not (self.base_ties and rules().tied_outputs.search(tensor.name)):
            return None
        alike = [
            (rank, len(name), name)
            for name, other in self.base.items()
            for rank, pattern in enumerate(patterns)
            if pattern.search(name) and len(other.shape) == 2 and other.shape[1:] == tensor.shape[1:]
        ]
        return min(alike)[2] if alike else None

    def unfit(self, what: str, tensor: TensorPlan, source: str) -> IncompatibleBase:
        return IncompatibleBase(what, where=f"{self.reference}: {source}", tensor=tensor.name)


def _prefixes(names: Iterable[str], base: Collection[str]) -> tuple[str, str]:
    """What to take from the front of the model's names, or to put there, so that the base has most of them."""
    wanted = set(names)
    counts: Counter[tuple[str, str]] = Counter({("", ""): sum(name in base for name in wanted)})
    for name in wanted:
        counts.update((start, "") for start in _starts(name) if name.removeprefix(start) in base)
    for name in base:
        counts.update(("", start) for start in _starts(name) if name.removeprefix(start) in wanted)
    return min(counts, key=lambda pair: (-counts[pair], len(pair[0]) + len(pair[1]), pair))


def _starts(name: str) -> list[str]:
    """The first part of a name and the first two, dots included: `bert.`, `model.language_model.`."""
    parts = name.split(".")
    return [".".join(parts[:count]) + "." for count in (1, 2) if count < len(parts)]


def _is_vocabulary(name: str) -> bool:
    """Does a tensor have one row a token?"""
    return bool(rules().tied_inputs.search(name) or rules().tied_outputs.search(name))


def _converted(values: Array, dtype: str, wanted: str, where: str) -> Array:
    """Stored bits of a float dtype as those of another one."""
    from fedqsn_cli.quantization import kernels  # numba, which `inspect` can do without

    if not kernels.all_finite(values, dtype):
        raise InputError("the public base holds NaN or infinity", where=where)
    rounded = kernels.narrowed(kernels.widened(values, dtype), wanted)
    if not kernels.all_finite(rounded, wanted):
        raise InputError(f"the public base holds a number that is too large for {wanted}", where=where)
    return rounded


def counted(matches: Iterable[Match]) -> dict[str, int]:
    """Number of matches of each kind."""
    found = Counter(match.kind for match in matches)
    return {kind: found[kind] for kind in KINDS}


def summary(counts: Mapping[str, int]) -> str:
    """Matches in a few words: `96 tensors as they are, 2 resized, 1 without (zeros)`."""
    plain = sum(counts[kind] for kind in ("exact", "prefix", "tied"))
    words = {"as it is" if plain == 1 else "as they are": plain, "converted": counts["converted"]}
    words |= {"resized": counts["resized"], "without (zeros)": counts["zeros"]}
    parts = [(count, word) for word, count in words.items() if count] or [(0, "")]
    (first, word), *others = parts
    lead = f"{first} {'tensor' if first == 1 else 'tensors'} {word}".rstrip()
    return ", ".join([lead, *(f"{count} {word}" for count, word in others)])
