"""The examples that one process has read and tokenized, in all processes that train on them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from fedqsn_cli.training.data.examples import Examples
from fedqsn_cli.training.data.stored_examples import StoredExamples
from fedqsn_cli.training.steps.processes import Processes

_AT_ONCE = 2000  # examples that are sent together


def shared(examples: Examples | None, processes: Processes, folder: Path) -> Examples:
    """Send the first process's examples to all others, which store them as it does.

    Args:
        examples: as they were encoded; None in all processes but the first. folder: see `StoredExamples`.
    """
    if processes.count == 1 and examples is not None:
        return examples
    facts = b"" if examples is None else _facts(examples)
    count, described = json.loads(processes.from_first(facts))
    stored = StoredExamples(folder)
    for first in range(0, count, _AT_ONCE):
        piece = b"" if examples is None else _piece(examples, range(first, min(count, first + _AT_ONCE)))
        sent = processes.from_first(piece)
        if examples is None:
            for feature, target, length in json.loads(sent):
                stored.add(feature, target, length)
    if examples is not None:
        return examples
    return replace(Examples.from_plain(described), features=stored.features, targets=stored.targets)


def _facts(examples: Examples) -> bytes:
    """How many examples there are, and what else is known of them."""
    return json.dumps([len(examples), replace(examples, features=[], targets=[]).to_plain()]).encode()


def _piece(examples: Examples, rows: range) -> bytes:
    return json.dumps([[examples.features[row], examples.targets[row], examples.lengths[row]] for row in rows]).encode()
