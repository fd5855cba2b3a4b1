"""Batches: every row once, similar lengths together, the same order for the same seed."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedqsn_cli.training.steps.batching import IGNORED, Examples, Padding, collate, in_order, loss_sum, shuffled, within

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=300)


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 9), seed=st.integers(0, 2**70), epoch=st.integers(0, 5))
def test_an_epoch_holds_every_row_once(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    batches = shuffled(lengths, size, seed=seed, epoch=epoch)
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    assert all(1 <= len(rows) <= size for rows in batches)
    assert batches == shuffled(lengths, size, seed=seed, epoch=epoch)


def test_another_seed_or_epoch_gives_another_order() -> None:
    lengths = [3] * 100
    first = shuffled(lengths, 8, seed=1, epoch=0)
    assert shuffled(lengths, 8, seed=2, epoch=0) != first
    assert shuffled(lengths, 8, seed=1, epoch=1) != first


def test_batches_hold_little_padding() -> None:
    lengths = [1 + 7 * row % 100 for row in range(400)]
    batches = shuffled(lengths, 8, seed=0, epoch=0)
    padded = sum(max(lengths[row] for row in rows) * len(rows) for rows in batches)
    assert padded < 1.1 * sum(lengths)


def test_batches_of_few_examples_hold_texts_of_all_lengths() -> None:
    lengths = [5, 9] * 16
    batches = shuffled(lengths, 8, seed=0, epoch=0)
    assert all({lengths[row] for row in rows} == {5, 9} for rows in batches)


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 9))
def test_evaluation_goes_from_long_to_short(lengths: list[int], size: int) -> None:
    rows = [row for batch in in_order(lengths, size) for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)


def test_shorter_examples_are_padded_on_the_right() -> None:
    features = [
        {"input_ids": [5], "attention_mask": [1], "token_type_ids": [1]},
        {"input_ids": [6, 7], "attention_mask": [1, 1], "token_type_ids": [0, 1]},
    ]
    batch = collate(Examples("causal-lm", features, [[IGNORED], [IGNORED, 7]]), [0, 1], Padding(9, 4))
    assert batch.inputs["input_ids"].tolist() == [[5, 9], [6, 7]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch.inputs["token_type_ids"].tolist() == [[1, 4], [0, 1]]
    assert batch.targets.tolist() == [[IGNORED, IGNORED], [IGNORED, 7]]
    assert batch.count == 1


def test_the_loss_counts_the_next_token_where_it_is_not_ignored() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5)
    targets = torch.tensor([[IGNORED, 2, 3], [IGNORED, IGNORED, 4]])
    likelihoods = logits.log_softmax(-1)
    expected = -(likelihoods[0, 0, 2] + likelihoods[0, 1, 3] + likelihoods[1, 1, 4])
    torch.testing.assert_close(loss_sum("causal-lm", logits, targets), expected)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    most=st.integers(1, 200),
)
def test_parts_of_a_batch_are_no_larger_than_asked_and_no_smaller_than_they_can_be(
    lengths: list[int], most: int
) -> None:
    rows = list(range(len(lengths)))
    parts = list(within(rows, lengths, most))
    assert [row for part in parts for row in part] == rows
    tokens = [len(part) * max(lengths[row] for row in part) for part in parts]
    assert all(size <= most or len(part) == 1 for size, part in zip(tokens, parts, strict=True))
    for part, following in itertools.pairwise(parts):
        longer = [*part, following[0]]
        assert len(longer) * max(lengths[row] for row in longer) > most
