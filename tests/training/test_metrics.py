"""Measures against arithmetic done by hand, and what counts as an answer."""

from __future__ import annotations

import math

import pytest
import torch

from fedqsn_cli.training.data import losses, metrics
from fedqsn_cli.training.data.examples import IGNORED


def test_classes_are_measured_by_accuracy_f1_and_correlation() -> None:
    found = metrics.of_classes([0, 0, 1, 1, 1], [0, 1, 1, 1, 0], ["a", "b"])
    true_positive, true_negative, false_positive, false_negative = 2, 1, 1, 1
    product = (
        (true_positive + false_positive)
        * (true_positive + false_negative)
        * (true_negative + false_positive)
        * (true_negative + false_negative)
    )
    mcc = (true_positive * true_negative - false_positive * false_negative) / math.sqrt(product)
    assert found == pytest.approx({"accuracy": 3 / 5, "macro_f1": (1 / 2 + 2 / 3) / 2, "mcc": mcc})


def test_a_text_with_several_labels_is_right_if_all_of_them_are() -> None:
    found = metrics.of_sets([[1, 0], [1, 1], [0, 0]], [[1, 0], [1, 0], [0, 0]], ["a", "b"])
    assert found == pytest.approx({"accuracy": 2 / 3, "macro_f1": 1 / 2})


def test_numbers_are_measured_by_correlation_over_the_outputs() -> None:
    right = [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0], [3.0, 4.0]]
    given = [[0.0, 4.0], [1.0, 3.0], [8.0, 2.0], [27.0, 1.0]]
    found = metrics.of_numbers(right, given, [])
    assert found["spearman"] == pytest.approx((1 - 1) / 2)
    cubes = torch.corrcoef(torch.tensor([[0.0, 1, 2, 3], [0.0, 1, 8, 27]]))[0, 1].item()
    assert found["pearson"] == pytest.approx((cubes - 1) / 2)


@pytest.mark.parametrize(("right", "given"), [([[1.0]], [[2.0]]), ([[1.0], [1.0]], [[2.0], [3.0]])])
def test_where_nothing_varies_there_is_no_correlation(right: list[list[float]], given: list[list[float]]) -> None:
    assert metrics.of_numbers(right, given, []) == {"pearson": None, "spearman": None}


def test_entities_count_as_a_whole() -> None:
    names = ["O", "B-x", "I-x"]
    found = metrics.of_words([[1, 2, 0, 1]], [[1, 0, 0, 1]], names)
    assert (found["entity_precision"], found["entity_recall"], found["entity_f1"]) == (0.5, 0.5, 0.5)
    assert found["accuracy"] == 0.75
    assert "entity_f1" not in metrics.of_words([[1, 0]], [[1, 0]], ["noun", "verb", "other"])


def test_answers_are_taken_where_targets_count() -> None:
    logits = torch.tensor([[[0.0, 1], [1, 0], [0, 1]], [[1, 0], [1, 0], [1, 0]]])
    targets = torch.tensor([[IGNORED, 1, 0], [0, IGNORED, IGNORED]])
    assert metrics.words(logits, targets) == ([[1, 0], [0]], [[0, 1], [0]])
    assert metrics.likely(torch.tensor([[0.1, -0.1]]), torch.tensor([[1.0, 1.0]])) == ([[1, 1]], [[1, 0]])


def test_the_best_constant_answer_has_the_loss_that_is_told() -> None:
    targets = [0, 0, 0, 1]
    logits = torch.tensor([[math.log(3), 0.0]]).expand(4, 2)
    best = losses.cross_entropy(logits, torch.tensor(targets)).item() / 4
    assert losses.entropy_of_classes(targets) == pytest.approx(best)
    assert losses.entropy_of_tokens([[IGNORED, 0, 0], [0, 1]]) == pytest.approx(best)
    numbers = [[1.0, 0.0], [3.0, 0.0]]
    means = torch.tensor([[2.0, 0.0]]).expand(2, 2)
    assert losses.variance(numbers) == pytest.approx(losses.squared_error(means, torch.tensor(numbers)).item() / 2)
    flags = [[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    quarter = torch.tensor([[50.0, -math.log(3)]]).expand(4, 2)
    expected = losses.binary_cross_entropy(quarter, torch.tensor(flags)).item() / 4
    assert losses.entropy_of_labels(flags) == pytest.approx(expected, rel=1e-5)
