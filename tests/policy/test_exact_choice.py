import itertools
from collections import Counter

import numpy as np
import pytest

from fnet_search.arch.costs import all_conv_macs, plan_cost, smallest_conv_macs
from fnet_search.arch.layers import BatchNorm, Conv, Dense, Flatten
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.arch.plan import FactorizationPlan, depthwise, from_indices, indices, legal_rates, regular
from fnet_search.importing.spaces import load_space
from fnet_search.policy import exact_choice as choose
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.exact_choice import best_plan, pareto_front, sample_plan
from tests.support.ceilings import WithLarger

TINY = load_space("tiny")
EVERY = [
    from_indices(TINY, chosen)
    for chosen in itertools.product(*(range(len(legal)) for legal in legal_rates(TINY).values()))
]
COST = {plan: plan_cost(TINY, plan) for plan in EVERY}
MACS = sorted(cost.conv_macs for cost in COST.values())
PARAMS = sorted(cost.params for cost in COST.values())
LIMITS = [
    Constraints(),
    Constraints(conv_macs=MACS[50]),
    Constraints(conv_macs=MACS[10]),
    Constraints(params=PARAMS[50]),
    Constraints(conv_macs=MACS[70], params=PARAMS[65]),
    Constraints(conv_macs=MACS[60], params=PARAMS[55]),
]
LARGER = sorted(max(cost.conv_macs, 150 * cost.params) for cost in COST.values())
NO_SUMS = [WithLarger(larger=LARGER[40]), WithLarger(MACS[70], PARAMS[65], larger=LARGER[45])]
"""With a ceiling that only whole plans can be tested by."""

Scores = dict[str, list[float]]


def random_scores(space: Macroarchitecture, seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    return {layer: rng.normal(size=len(legal)).tolist() for layer, legal in legal_rates(space).items()}


def score(space: Macroarchitecture, scores: Scores, plan: FactorizationPlan) -> float:
    return sum(layer[index] for layer, index in zip(scores.values(), indices(space, plan), strict=True))


def allowed(constraints: Constraints) -> list[FactorizationPlan]:
    return [plan for plan in EVERY if not constraints.refusal(COST[plan])]


@pytest.mark.parametrize("seed", range(20))
def test_the_front_has_the_best_plan_of_every_budget(seed: int) -> None:
    """Held against all plans: what is on it no plan beats, and every plan off it is beaten or equalled by one on it."""
    scores = random_scores(TINY, seed)
    if seed % 2:  # with ties
        scores = {layer: [round(value) for value in values] for layer, values in scores.items()}
    front = pareto_front(TINY, scores)
    for point in front:
        assert point.conv_macs == COST[point.plan].conv_macs
        assert point.score == pytest.approx(score(TINY, scores, point.plan))
    macs, totals = [point.conv_macs for point in front], [point.score for point in front]
    assert all(a < b for a, b in itertools.pairwise(macs))
    assert all(a < b for a, b in itertools.pairwise(totals))
    for budget in MACS:
        best = max(score(TINY, scores, plan) for plan in EVERY if COST[plan].conv_macs <= budget)
        assert max(point.score for point in front if point.conv_macs <= budget) == pytest.approx(best)


def test_the_front_of_a_large_space_is_what_single_budgets_give() -> None:
    space = load_space("factorizenet")
    scores = {layer: (-np.cumsum(np.abs(values))).tolist() for layer, values in random_scores(space, 3).items()}
    front = pareto_front(space, scores)
    assert len(front) > 100
    for share in (0.2, 0.3, 0.45, 0.7, 1.0):
        budget = int(share * plan_cost(space, regular(space)).conv_macs)
        plan = best_plan(space, Constraints(conv_macs=budget), scores)
        assert plan is not None
        at_most = [point for point in front if point.conv_macs <= budget]
        assert at_most[-1].score == pytest.approx(score(space, scores, plan))


def test_a_front_needs_a_score_for_every_rate() -> None:
    with pytest.raises(ValueError, match="layer 'conv_8' needs 4 finite scores"):
        pareto_front(TINY, {**random_scores(TINY, 0), "conv_8": [1.0]})


def test_these_limits_bind() -> None:
    assert all(0 < len(allowed(constraints)) < len(EVERY) for constraints in LIMITS[1:])
    for both in LIMITS[4:]:
        alone = [len(allowed(Constraints(conv_macs=both.conv_macs))), len(allowed(Constraints(params=both.params)))]
        assert len(allowed(both)) < min(alone)
    for limits in NO_SUMS:
        sums = Constraints(limits.conv_macs, limits.params)
        assert 0 < len(allowed(limits)) < len(allowed(sums))


@pytest.mark.parametrize("constraints", [*LIMITS, *NO_SUMS], ids=str)
def test_best_plan_agrees_with_trying_every_plan(constraints: Constraints) -> None:
    for seed in range(20):
        scores = random_scores(TINY, seed)
        best = best_plan(TINY, constraints, scores)
        assert best == max(allowed(constraints), key=lambda plan: score(TINY, scores, plan))


@pytest.mark.parametrize("steps", [2, 4096])
@pytest.mark.parametrize("constraints", [*LIMITS, *NO_SUMS], ids=str)
def test_plans_come_best_first_and_end(constraints: Constraints, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_STEPS", steps)  # deep networks meet the coarse bounds of 2 steps
    scores, found = random_scores(TINY, 1), list[FactorizationPlan]()
    while (plan := best_plan(TINY, constraints, scores, found)) is not None:
        found.append(plan)
    assert found == sorted(allowed(constraints), key=lambda plan: -score(TINY, scores, plan))


def test_best_plan_agrees_with_all_of_factorizenet() -> None:
    space = load_space("factorizenet-gap")
    scores = random_scores(space, 0)
    total = np.zeros(())
    for layer in scores.values():
        total = np.add.outer(total, np.array(layer))
    total[all_conv_macs(space) > 60_000_000] = -np.inf
    best = np.unravel_index(int(total.argmax()), total.shape)
    plan = best_plan(space, Constraints(conv_macs=60_000_000), scores)
    assert plan is not None
    assert indices(space, plan) == best


def test_a_ceiling_holds_to_the_mac() -> None:
    space = load_space("factorizenet")
    greedy = {layer: [-float(index) for index in range(len(legal))] for layer, legal in legal_rates(space).items()}
    whole = plan_cost(space, regular(space))
    for at in (Constraints(conv_macs=whole.conv_macs), Constraints(params=whole.params)):
        assert best_plan(space, at, greedy) == regular(space)
    for below in (Constraints(conv_macs=whole.conv_macs - 1), Constraints(params=whole.params - 1)):
        plan = best_plan(space, below, greedy)
        assert plan is not None
        assert not below.refusal(plan_cost(space, plan))
        assert score(space, greedy, plan) == -1
    least = smallest_conv_macs(space)
    smallest = best_plan(space, Constraints(conv_macs=least), greedy)
    assert smallest is not None
    assert plan_cost(space, smallest).conv_macs == least
    assert best_plan(space, Constraints(conv_macs=least - 1), greedy) is None


def test_ceilings_that_cannot_both_be_met() -> None:
    """c1 is cheapest at rate 1 in MACs and at rate 8 in parameters: 9 * 8 * 2 against 9 * 8 + 8 * 2, plus norms."""
    nodes = [Node("c1", Conv(3, (1, 1), factorize=True), (INPUT,)), Node("n1", BatchNorm(), ("c1",))]
    nodes += [Node("f", Flatten(), ("n1",)), Node("d", Dense(2), ("f",))]
    space = Macroarchitecture("pair", (2, 4, 4), tuple(nodes))
    costs = [plan_cost(space, plan) for plan in (regular(space), depthwise(space))]
    assert costs[0].conv_macs < costs[1].conv_macs
    scores = {"c1": [0.0, 1.0]}
    assert best_plan(space, Constraints(costs[0].conv_macs, costs[0].params), scores) == regular(space)
    assert best_plan(space, Constraints(costs[0].conv_macs, costs[0].params - 1), scores) is None
    tight = Constraints(conv_macs=MACS[0], params=PARAMS[0])
    assert best_plan(TINY, tight, random_scores(TINY, 0)) == next(iter(allowed(tight)), None)


def test_prices_change_how_long_the_search_takes_and_not_what_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide layers hold the parameters and large maps the MACs, so that both ceilings bind."""
    nodes = [Node("stem", Conv(16, padding=(1, 1)), (INPUT,))]
    for number in range(18):
        width, stride = 16 << number // 6, (2, 2) if number in (6, 12) else (1, 1)
        conv = Conv(width, stride=stride, padding=(1, 1), factorize=True)
        nodes += [Node(f"c{number}", conv, (nodes[-1].name,)), Node(f"n{number}", BatchNorm(), (f"c{number}",))]
    nodes += [Node("f", Flatten(), (nodes[-1].name,)), Node("d", Dense(10), ("f",))]
    space = Macroarchitecture("deep", (3, 32, 32), tuple(nodes))
    most, least = plan_cost(space, regular(space)), plan_cost(space, depthwise(space))
    both = Constraints(
        least.conv_macs + (most.conv_macs - least.conv_macs) // 3, least.params + (most.params - least.params) // 4
    )
    rng = np.random.default_rng(0)
    scores = {
        layer: (-rng.gamma(1.0) * np.arange(len(legal)) ** rng.uniform(0.5, 2.0)).tolist()
        for layer, legal in legal_rates(space).items()
    }
    priced = best_plan(space, both, scores)
    assert priced is not None
    assert not both.refusal(plan_cost(space, priced))
    for one in (Constraints(conv_macs=both.conv_macs), Constraints(params=both.params)):
        assert best_plan(space, one, scores) != priced
    monkeypatch.setattr(choose, "_at_best_price", lambda values, ceilings, alone, sparing: alone)
    assert best_plan(space, both, scores) == priced


def test_excluded_plans_that_are_over_a_ceiling_change_nothing() -> None:
    constraints, scores = LIMITS[2], random_scores(TINY, 3)
    rest = set(EVERY) - set(allowed(constraints))
    assert best_plan(TINY, constraints, scores, rest) == best_plan(TINY, constraints, scores)


def test_equal_scores_have_one_answer() -> None:
    flat = {layer: [0.0] * len(legal) for layer, legal in legal_rates(TINY).items()}
    orders = itertools.permutations(allowed(LIMITS[1])[:4])
    assert len({best_plan(TINY, LIMITS[1], flat, order) for order in orders}) == 1


@pytest.mark.parametrize("bad", [[0.0], [0.0] * 5, [0.0, 1.0, 2.0, float("nan")], [0.0, 1.0, 2.0, float("inf")]])
def test_scores_must_be_finite_and_complete(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="layer 'conv_8' needs 4 finite scores"):
        best_plan(TINY, Constraints(), {**random_scores(TINY, 0), "conv_8": bad})


def test_nothing_to_choose() -> None:
    nodes = (Node("f", Flatten(), (INPUT,)), Node("d", Dense(2), ("f",)))
    space, empty = Macroarchitecture("fixed", (1, 2, 2), nodes), FactorizationPlan(())
    rng = np.random.default_rng(0)
    for constraints in (Constraints(), Constraints(conv_macs=1)):
        assert best_plan(space, constraints, {}) == sample_plan(space, constraints, (), rng) == empty
        assert best_plan(space, constraints, {}, [empty]) is sample_plan(space, constraints, [empty], rng) is None
    assert best_plan(space, Constraints(params=4 * 2 + 1), {}) is None


@pytest.mark.parametrize("constraints", [*LIMITS[1:4:2], NO_SUMS[0]], ids=str)
def test_sampling_is_uniform(constraints: Constraints) -> None:
    excluded = allowed(constraints)[::3]
    wanted = set(allowed(constraints)) - set(excluded)
    draws = 40 * len(wanted)
    counts = Counter(sample_plan(TINY, constraints, excluded, np.random.default_rng((5, n))) for n in range(draws))
    assert set(counts) == wanted
    chi_square = sum((count - 40) ** 2 / 40 for count in counts.values())
    freedom = len(wanted) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5  # four standard deviations


@pytest.mark.parametrize("constraints", [LIMITS[2], *NO_SUMS], ids=str)
def test_sampling_ends_when_nothing_is_left(constraints: Constraints) -> None:
    found, rng = list[FactorizationPlan](), np.random.default_rng(0)
    while (plan := sample_plan(TINY, constraints, found, rng)) is not None:
        found.append(plan)
    assert len(found) == len(set(found))
    assert set(found) == set(allowed(constraints))


def test_sampling_finds_what_is_too_rare_to_draw() -> None:
    space = load_space("factorizenet-gap")
    macs = all_conv_macs(space)
    ceiling = int(np.partition(macs, 20, axis=None)[20])
    assert 20 < int((macs <= ceiling).sum()) < 100
    tight = Constraints(conv_macs=ceiling)
    found = {sample_plan(space, tight, (), np.random.default_rng(seed)) for seed in range(10)}
    assert len(found) > 3
    assert all(plan is not None and not tight.refusal(plan_cost(space, plan)) for plan in found)
    assert sample_plan(space, Constraints(conv_macs=int(macs.min()) - 1), (), np.random.default_rng(0)) is None


def test_sampling_follows_the_generator() -> None:
    space = load_space("factorizenet")
    constraints = Constraints(conv_macs=60_000_000)
    drawn = [sample_plan(space, constraints, (), np.random.default_rng(seed)) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3
