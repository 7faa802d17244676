from dataclasses import replace
from itertools import product

import pytest

from fnet_policies import LayerGuided, ProgressiveDoubling, Random, ReversePyramid
from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import FactorizationPlan, from_indices, regular, reverse_pyramid, uniform
from fnet_search.base.errors import FnetError
from fnet_search.importing.spaces import load_space
from fnet_search.policy.asktell import REFUSALS_IN_A_ROW, REFUSALS_OF_ONE_PLAN, AskTell
from fnet_search.policy.conformance import made_up_evaluation, made_up_probes
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.metric import ClassResult
from fnet_search.policy.protocol import History

TINY, SPACE = load_space("tiny"), load_space("factorizenet")
CEILING = Constraints(conv_macs=plan_cost(TINY, reverse_pyramid(TINY, 2)).conv_macs)


def test_asks_until_the_policy_is_done() -> None:
    loop = AskTell(ReversePyramid(), SPACE)
    asked = []
    while (plan := loop.ask()) is not None:
        asked.append(plan)
        loop.tell(made_up_evaluation(SPACE, plan))
    assert asked == [reverse_pyramid(SPACE, initial) for initial in (1, 2, 4, 8, 16, 32, 64)]
    assert [one.number for one in loop.evaluations] == list(range(7))
    assert loop.ask() is None


def test_what_is_refused_is_recorded_and_passed_over() -> None:
    loop = AskTell(ReversePyramid(), TINY, CEILING)
    assert loop.ask() == reverse_pyramid(TINY, 2)
    (refused,) = loop.evaluations
    cost = plan_cost(TINY, reverse_pyramid(TINY, 1))
    assert (refused.number, refused.plan, refused.cost, refused.state) == (0, reverse_pyramid(TINY, 1), cost, "refused")
    assert refused.reason == f"{cost.conv_macs:,} conv MACs exceed the budget of {CEILING.conv_macs:,}"
    assert loop.history().number == 2


def test_several_plans_may_be_out_and_end_in_any_order() -> None:
    loop = AskTell(ProgressiveDoubling(), TINY)
    out = [loop.ask() for _ in range(5)]
    assert out == [uniform(TINY, rate) for rate in (1, 2, 4, 8, 16)]
    assert loop.ask() is None  # until one is told; here for good
    assert loop.history().running == tuple(out)
    for plan in (out[3], out[0]):
        assert plan is not None
        loop.tell(made_up_evaluation(TINY, plan))
    assert [(one.number, one.plan) for one in loop.evaluations] == [(0, out[0]), (3, out[3])]
    assert loop.history().number == 5


def test_goes_on_from_what_was_told() -> None:
    def walk(loop: AskTell, count: int) -> None:
        for _ in range(count):
            plan = loop.ask()
            assert plan is not None
            loop.tell(made_up_evaluation(SPACE, plan))

    limits = Constraints(conv_macs=120_000_000)
    whole = AskTell(Random(), SPACE, limits, seed=4)
    walk(whole, 6)
    first = AskTell(Random(), SPACE, limits, seed=4)
    walk(first, 2)
    first.ask()  # it is lost, and asked for again
    known = tuple(Evaluation.from_json(one.to_json()) for one in first.evaluations)
    second = AskTell(Random(), SPACE, limits, seed=4, evaluations=known)
    walk(second, 4)
    assert second.evaluations == whole.evaluations


def test_plans_of_ones_own_count_too() -> None:
    """As those of an evolution, whose policy makes the first generation only."""
    loop = AskTell(ReversePyramid(), TINY)
    mine = loop.tell(made_up_evaluation(TINY, uniform(TINY, 4)))
    assert mine.number == 0
    first = loop.ask()
    assert first == reverse_pyramid(TINY, 1)
    other = loop.tell(made_up_evaluation(TINY, reverse_pyramid(TINY, 2)))
    assert other.number == 2
    assert loop.tell(made_up_evaluation(TINY, first)).number == 1
    assert loop.ask() == reverse_pyramid(TINY, 4)  # init2 is known


def test_a_plan_is_told_once() -> None:
    loop = AskTell(ReversePyramid(), TINY, CEILING)
    plan = loop.ask()
    assert plan is not None
    loop.tell(made_up_evaluation(TINY, plan))
    with pytest.raises(FnetError, match=r"plan conv_8=2,.* was told before, as candidate 1"):
        loop.tell(made_up_evaluation(TINY, plan))
    assert len(loop.evaluations) == 2


def test_the_best_is_feasible() -> None:
    loop = AskTell(ReversePyramid(), TINY, Constraints(min_quint8=0.8))
    assert loop.best is None
    for initial, accuracy in ((1, 0.7), (2, 0.85), (4, 0.81)):
        loop.tell(Evaluation.of(TINY, reverse_pyramid(TINY, initial), quint8_accuracy=accuracy))
    assert loop.best is not None
    assert loop.best.plan == reverse_pyramid(TINY, 2)
    strict = replace(loop, constraints=Constraints(min_quint8=0.9))
    assert strict.best is None


def test_an_evaluation_of_ones_own_counts_the_costs() -> None:
    plan = uniform(TINY, 2)
    one = Evaluation.of(TINY, plan, quint8_accuracy=0.5, seed=3)
    assert one == Evaluation(0, plan, plan_cost(TINY, plan), quint8_accuracy=0.5, seed=3)
    with pytest.raises(FnetError, match=r"cannot be factorized|unknown layer"):
        AskTell(Random(), TINY).tell(Evaluation.of(SPACE, regular(SPACE), quint8_accuracy=0.5))
    with pytest.raises(FnetError, match=r"plan .* has no quint8_accuracy; give it, or state='failed'"):
        AskTell(Random(), TINY).tell(replace(one, quint8_accuracy=None))


def test_balanced_accuracy_wants_results_by_class() -> None:
    loop = AskTell(Random(), TINY, Constraints(metric="balanced-accuracy"))
    plan = loop.ask()
    assert plan is not None
    with pytest.raises(FnetError, match=r"^balanced accuracy needs results by class; give the evaluation classes"):
        loop.tell(Evaluation.of(TINY, plan, quint8_accuracy=0.5))
    loop.tell(Evaluation.of(TINY, plan, state="failed", reason="no luck"))
    other = loop.ask()
    assert other is not None
    told = loop.tell(Evaluation.of(TINY, other, classes=(ClassResult(9, 8, 6), ClassResult(4, 3, 1))))
    assert loop.best == told


def test_probes_reach_the_policy_or_are_asked_for() -> None:
    with pytest.raises(FnetError, match=r"LayerGuided needs probes .*\.probes_for"):
        AskTell(LayerGuided(), TINY)
    assert AskTell(LayerGuided(), TINY, probes=made_up_probes(TINY)).ask() is not None


def test_what_is_no_policy_and_what_is_no_plan_is_said() -> None:
    class Named:
        def suggest(self, history: History) -> str:
            return "init2"

    with pytest.raises(FnetError, match=r"Random is a class; give a policy, as in Random\(\)"):
        AskTell(Random, TINY)  # type: ignore[arg-type] (the mistake)
    with pytest.raises(FnetError, match=r"policy Named failed .*: 'init2' is neither a FactorizationPlan nor None"):
        AskTell(Named(), TINY).ask()  # type: ignore[arg-type] (the mistake)


def test_a_policy_of_nothing_but_refused_plans_comes_to_an_end() -> None:
    class Stubborn:
        def suggest(self, history: History) -> FactorizationPlan:
            return regular(TINY)

    loop = AskTell(Stubborn(), TINY, CEILING)
    message = "keeps suggesting plan regular, refused 10 times since a plan was last accepted: repeats candidate 0"
    for _ in range(2):  # asked once more it is refused at once
        with pytest.raises(FnetError, match=message):
            loop.ask()
        assert len(loop.evaluations) == REFUSALS_OF_ONE_PLAN
    mended = AskTell(ReversePyramid(), TINY, CEILING, evaluations=loop.evaluations)
    assert mended.ask() is not None


def test_a_policy_may_pass_many_plans_above_the_ceilings() -> None:
    """Not a thousand in a row."""
    plans = [from_indices(SPACE, (*chosen, 0, 0, 0, 0)) for chosen in product(range(7), range(7), range(7), range(8))]

    class Walking:
        def suggest(self, history: History) -> FactorizationPlan:
            return plans[history.number]

    loop = AskTell(Walking(), SPACE, Constraints(conv_macs=40_000_000))
    with pytest.raises(FnetError, match=r"suggested 1000 refused plans in a row; the last: .* exceed the"):
        loop.ask()
    assert len(loop.evaluations) == REFUSALS_IN_A_ROW
