"""The client's side: read data, train the visible units of a proxy, write the update; and evaluate a model.

tables.py          the columns of a data file
data_files.py      a JSONL, JSON, CSV or Parquet file -> columns
parquet.py         the columns of a Parquet file
stored_examples.py  examples in memory or in a file, read one at a time
examples.py        what a model takes, and what the loss counts
tokenizing.py      texts -> token ids
labelled.py        rows with labels -> examples
chat.py            conversations -> token ids
language.py        rows for language models -> examples
losses.py          the loss of each task
metrics.py         the measures of each task
tasks.py           the table of tasks: columns, targets, loss, measures
data.py            rows -> examples, for one model
shown.py           examples for people to look at
batching.py        examples -> batches; their loss
packing.py         several texts in one row
visible.py         which elements of a model's parameters are visible
compact.py         the visible part of the parameters, for the optimizer
schedule.py        the examples and the learning rate of every step
precision.py       number formats; what makes a training repeatable
optimizers.py      AdamW, 8-bit AdamW and SGD, a part of the model at a time
memory.py          how much memory a training takes
processes.py       several processes that share the work
shared_examples.py  the examples of the first of them, in all
states.py          states on disk, to go on from
interrupts.py      signals wait until a state is saved
journal.py         the figures of every step
loop.py            step by step
secure_random.py   random numbers that nobody can repeat
private_loop.py    the same with differential privacy of the examples (DP-SGD, opacus)
teachers.py        what models say about texts, and a student's distance from it
estimate.py        what a training would take
one_by_one.py      batches that give what each example alone would
scoring.py         loss and measures of a model
generation.py      texts that a model writes, and their measures
update_noise.py    clipping of the whole update, and noise on it
error_feedback.py  what encoding loses, kept for the next round
update.py          U = T − P on disk
privacy.py         what the options of privacy mean for an update
method.py          what both methods of training have in common
full.py            the visible weights themselves
lora_modules.py    which modules get adapters
lora.py            adapters on the proxy as it is stored
client.py          client-train: all of it, in this order
evaluate.py        evaluate: a model on data
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedqsn_cli.training.client import TrainResult as TrainResult
    from fedqsn_cli.training.client import client_train as client_train

__all__ = ["TrainResult", "client_train"]


def __getattr__(name: str) -> Any:
    """Import the command when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedqsn_cli.training import client

    return getattr(client, name)
