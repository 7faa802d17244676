"""The conformance suite passes ours, and finds what is wrong with others."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from fnet_policies import NSGA2, TPE, Fisher, Greedy, LayerGuided, ProgressiveDoubling, Random, ReversePyramid
from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import FactorizationPlan, from_indices, regular, uniform
from fnet_search.base.errors import FnetError
from fnet_search.policy.conformance import PolicyConformance
from fnet_search.policy.protocol import History, Policy


class TestRandom(PolicyConformance):
    policy = Random


class TestReversePyramid(PolicyConformance):
    policy = ReversePyramid


class TestProgressiveDoubling(PolicyConformance):
    policy = ProgressiveDoubling


class TestTPE(PolicyConformance):
    policy = TPE


class TestNSGA2(PolicyConformance):
    policy = NSGA2


class TestGreedy(PolicyConformance):
    policy = Greedy


class TestFisher(PolicyConformance):
    policy = Fisher


class TestLayerGuided(PolicyConformance):
    policy = LayerGuided


def plans(history: History) -> list[FactorizationPlan]:
    return [uniform(history.space, rate) for rate in (1, 2, 4, 8, 16)]


class Forgetful:
    """Random numbers of its own."""

    def suggest(self, history: History) -> FactorizationPlan | None:
        left = [plan for plan in plans(history) if plan not in history.seen]
        return random.choice(left) if left else None


@dataclass
class Counting:
    """State."""

    asked: list[int] = field(default_factory=list)

    def suggest(self, history: History) -> FactorizationPlan | None:
        self.asked.append(history.number)
        walked = plans(history)
        return walked[len(self.asked) - 1] if len(self.asked) <= len(walked) else None


class Hashing:
    """The order of a set of strings."""

    def suggest(self, history: History) -> FactorizationPlan | None:
        order = {str(plan): plan for plan in plans(history) if plan not in history.seen}
        return order[next(iter(set(order)))] if order else None


class Blind:
    """Does not look at what is running."""

    def suggest(self, history: History) -> FactorizationPlan | None:
        seen = {one.plan for one in history.evaluations}
        return next((plan for plan in plans(history) if plan not in seen), None)


class Wasteful:
    """Never leaves off suggesting what is above the ceilings, or known."""

    def suggest(self, history: History) -> FactorizationPlan | None:
        return regular(history.space)


class Misled:
    """Looks at accuracies, whatever the search compares."""

    def suggest(self, history: History) -> FactorizationPlan | None:
        left = [plan for plan in plans(history) if not history.refusal(plan)]
        good = all((one.quint8_accuracy or 0.0) > 0.5 for one in history.evaluations)
        return left[0 if good else -1] if left else None


class Foreign:
    """Plans of another space."""

    def suggest(self, history: History) -> FactorizationPlan | None:
        return FactorizationPlan((("conv_1", 3),))


class Trusting:
    """Takes every evaluation for a complete one."""

    def suggest(self, history: History) -> FactorizationPlan | None:
        sum(one.quint8_accuracy for one in history.evaluations)  # type: ignore[misc]
        return next((plan for plan in plans(history) if plan not in history.seen), None)


class Endless:
    """Begins again from its first plan, under the ceilings, when all are known."""

    def suggest(self, history: History) -> FactorizationPlan | None:
        every = [from_indices(history.space, (i, j, 0)) for i in range(4) for j in range(4)]
        cheap = [plan for plan in every if not history.constraints.refusal(plan_cost(history.space, plan))]
        left = [plan for plan in cheap if plan not in history.seen] or cheap
        return left[0] if left else None


@pytest.mark.parametrize(
    ("made", "test", "error"),
    [
        (Forgetful, "test_it_is_a_function_of_the_history", AssertionError),
        (Counting, "test_it_keeps_no_state", AssertionError),
        (Blind, "test_workers_get_different_plans", AssertionError),
        (Wasteful, "test_nothing_above_the_ceilings_is_trained", FnetError),
        (Wasteful, "test_it_ends", FnetError),
        (Foreign, "test_every_suggestion_is_a_plan_of_the_space", FnetError),
        (Trusting, "test_it_can_do_with_what_went_wrong", TypeError),
        (Endless, "test_it_ends", FnetError),
        (Misled, "test_it_searches_by_the_metric", AssertionError),
    ],
)
def test_what_is_wrong_is_found(made: Callable[[], Policy], test: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        getattr(suite(made), test)()


def noticed(made: Callable[[], Policy]) -> bool:
    try:
        suite(made).test_it_resumes_in_another_process()
    except AssertionError as error:
        return "in another process" in str(error)
    return False


def test_what_another_process_says_otherwise_is_noticed() -> None:
    """Another order of five strings than here, but for one time in 120 by chance: not three times in a row."""
    assert any(noticed(Hashing) for _ in range(3))


def test_a_policy_must_be_a_class_that_can_be_imported() -> None:
    class Local(Random):
        pass

    with pytest.raises(
        AssertionError, match="must be a class that can be imported from test_conformance, as a plug-in is"
    ):
        suite(Local).test_it_resumes_in_another_process()
    with pytest.raises(FnetError, match="policy Strange requires horoscopes"):
        suite(Strange).test_it_ends()


def suite(made: Callable[[], Policy]) -> PolicyConformance:
    class Suite(PolicyConformance):
        policy: ClassVar[Callable[[], Policy]] = made

    return Suite()


class Strange(Random):
    requires = frozenset({"horoscopes"})
