"""Two attackers among ten clients that learn a small task: with a robust rule the model is as good as without them."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.poisoning import ATTACKS, DATA_ATTACKS, RULES, Round, prepare

from fedqsn_cli import merge
from fedqsn_cli.errors import RefusedUpdate

pytestmark = pytest.mark.soak  # it trains a dozen models; make test looks at single merges in test_rules.py


@pytest.fixture(scope="module")
def played(module_folder: Path) -> Round:
    (module_folder / "round").mkdir()
    return prepare(module_folder / "round")


@pytest.fixture(scope="module")
def without(played: Round) -> float:
    """Accuracy of plain averaging where nobody attacks."""
    accuracy = played.accuracy(played.updates(None))
    assert accuracy > 0.9
    return accuracy


@pytest.mark.parametrize("attack", [*ATTACKS, *DATA_ATTACKS])
def test_with_a_robust_rule_attackers_cost_less_than_three_points(attack: str, played: Round, without: float) -> None:
    assert played.accuracy(played.updates(attack), **RULES["multi-krum"]) >= without - 0.03


@pytest.mark.parametrize("rule", [name for name in RULES if name not in {"fedavg", "krum"}])
@pytest.mark.parametrize("attack", [*ATTACKS, *DATA_ATTACKS])
def test_so_they_do_with_the_other_rules(attack: str, rule: str, played: Round, without: float) -> None:
    if (rule, attack) == ("geometric-median", "one unit"):
        pytest.skip("it limits how far all units move together, and all of that may be one unit")
    assert played.accuracy(played.updates(attack), **RULES[rule]) >= without - 0.04


@pytest.mark.parametrize("attack", ["x100", "one unit"])
def test_the_default_limits_refuse_what_is_far_too_large(attack: str, played: Round) -> None:
    with pytest.raises(RefusedUpdate, match="'c0'|its norm"):
        merge(str(played.folder / "global"), played.updates(attack), played.folder / "refused", **played.job)


@pytest.mark.parametrize("attack", ["x100", "noise", "one unit"])
def test_an_average_follows_the_attackers(attack: str, played: Round, without: float) -> None:
    assert played.accuracy(played.updates(attack)) < without - 0.05


def test_a_backdoor_gets_into_an_average_and_not_past_a_rule(played: Round) -> None:
    success = [played.accuracy(played.updates("backdoor"), "trigger", **RULES[r]) for r in ("fedavg", "multi-krum")]
    assert success[0] > 0.5 and success[1] < 0.1
