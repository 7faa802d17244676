"""Exact choice of plans under the ceilings. No torch, no Optuna.

conv MACs and parameters are sums over layers (`costs.cost_table`). So the best plan under them, by a score that is a
sum over layers too, is a multiple-choice knapsack: it is found exactly without enumerating all plans. Ceilings of other
kinds are tests that whole plans must pass.
"""

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

import numpy as np
import numpy.typing as npt

from fnet_search.arch.costs import cost_table, plan_cost
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan, from_indices, legal_rates
from fnet_search.policy.constraints import Constraints

RateScores = Mapping[str, Sequence[float] | npt.NDArray[np.float64]]
"""A number per layer and legal rate, in the order of `legal_rates`."""

Values = npt.NDArray[np.float64]
"""A layer's scores."""

_STEPS = 4096
"""The most steps that a bound keeps: deep networks would have millions. Coarser bounds only cost time."""

_PRICES = 16
"""The most prices tried for a bound; a handful suffice."""

_DRAWS, _BATCHES = 4096, 16
"""Plans per draw, and draws, before `sample_plan` gives up drawing: 10 ms in all."""


@dataclass(frozen=True)
class _Ceiling:
    """The limit on the summed cost of the factorizable layers, and the cost of each at each legal rate."""

    limit: int
    costs: tuple[tuple[int, ...], ...]

    def cost(self, plan: tuple[int, ...]) -> int:
        return sum(costs[index] for costs, index in zip(self.costs, plan, strict=True))


def _ceilings(space: Macroarchitecture, constraints: Constraints) -> list[_Ceiling]:
    """The ceilings that are sums over layers."""
    table, ceilings = cost_table(space), []
    for name in ("conv_macs", "params"):
        limit = getattr(constraints, name)
        if limit is not None:
            costs = tuple(tuple(getattr(cost, name) for cost in layer) for layer in table.by_layer.values())
            ceilings.append(_Ceiling(limit - getattr(table.fixed, name), costs))
    return ceilings


def _all_indices(space: Macroarchitecture, plans: Collection[FactorizationPlan]) -> set[tuple[int, ...]]:
    """`plan.indices` of many plans, ten times as fast."""
    places = [{rate: index for index, rate in enumerate(rates)} for rates in legal_rates(space).values()]
    return {tuple([place[rate] for place, (_, rate) in zip(places, plan.rates, strict=True)]) for plan in plans}


@dataclass(frozen=True)
class _Steps:
    """The highest score of some layers as a step function of their allowed cost. Both lists ascend."""

    costs: list[int]
    scores: list[float]

    def at(self, allowed: int) -> float:
        """The highest score within the allowed cost; -inf if there is none."""
        steps = bisect_right(self.costs, allowed)
        return self.scores[steps - 1] if steps else -inf


def _steps(values: list[Values], ceiling: _Ceiling) -> list[_Steps]:
    """For each layer, the steps of it and all layers after it; the last entry is that of no layer.

    Built from the last layer: all sums of a layer's costs and the steps so far, without those that another dominates.
    """
    cost, score = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps = [_Steps([0], [0.0])]
    for value, layer_costs in zip(reversed(values), reversed(ceiling.costs), strict=True):
        cost = np.add.outer(np.array(layer_costs, dtype=np.int64), cost).ravel()
        score = np.add.outer(value, score).ravel()
        order = np.lexsort((-score, cost))
        order = order[cost[order] <= ceiling.limit]
        better = np.diff(np.maximum.accumulate(score[order]), prepend=-inf) > 0
        cost, score = cost[order][better], score[order][better]
        if len(cost) > _STEPS:  # coarser, never lower: each run of steps becomes its lowest cost with its highest score
            ends = np.linspace(0, len(cost), _STEPS + 1, dtype=np.int64)
            cost, score = cost[ends[:-1]], score[ends[1:] - 1]
        steps.append(_Steps(cost.tolist(), score.tolist()))
    return steps[::-1]


@dataclass(frozen=True)
class _Bound:
    """An upper bound on the score of the layers from a depth on: ceiling `kept` holds, `other` has a price.

    Lagrangian relaxation: cost under `other` is paid for and its whole limit paid back, so that no plan within the
    limit scores less. `best` has the rate indices of the plan with the best score after paying.
    """

    kept: int
    other: int
    price: float
    steps: list[_Steps]
    best: tuple[int, ...]

    def at(self, depth: int, allowed: list[int]) -> float:
        """The bound from layer `depth` on, with `allowed` left of each ceiling."""
        return self.steps[depth].at(allowed[self.kept]) + self.price * allowed[self.other]


def _bound(values: list[Values], ceilings: list[_Ceiling], kept: int, price: float = 0.0) -> _Bound:
    other = len(ceilings) - 1 - kept
    paid = [value - price * np.array(costs) for value, costs in zip(values, ceilings[other].costs, strict=True)]
    steps = _steps(paid, ceilings[kept])
    left, best = ceilings[kept].limit, []
    for value, costs, rest in zip(paid, ceilings[kept].costs, steps[1:], strict=True):
        best.append(int(np.argmax(value + [rest.at(left - cost) for cost in costs])))
        left -= costs[best[-1]]
    return _Bound(kept, other, price, steps, tuple(best))


def _at_best_price(values: list[Values], ceilings: list[_Ceiling], alone: _Bound, sparing: _Bound) -> _Bound:
    """The bound that keeps ``alone.kept``, at the price of the other ceiling where it is lowest for whole plans.

    Plotted over the price, each plan's score is a line: falling if the plan exceeds the other ceiling, rising if not.
    The bound is their upper envelope. Its lowest point is where a falling and a rising line cross with none above.
    """

    def score(plan: tuple[int, ...]) -> float:
        return float(sum(value[index] for value, index in zip(values, plan, strict=True)))

    other = ceilings[alone.other]
    bound, over, under = alone, alone.best, sparing.best
    for _ in range(_PRICES):
        if not (other.cost(over) > other.limit >= other.cost(under) and score(over) > score(under)):
            break
        price = (score(over) - score(under)) / (other.cost(over) - other.cost(under))
        bound = _bound(values, ceilings, alone.kept, price)
        if bound.best in (over, under):
            break
        over, under = (bound.best, under) if other.cost(bound.best) > other.limit else (over, bound.best)
    return bound


def best_plan(
    space: Macroarchitecture,
    constraints: Constraints,
    scores: RateScores,
    exclude: Collection[FactorizationPlan] = (),
) -> FactorizationPlan | None:
    """The plan under the ceilings, not in `exclude`, with the highest sum of ``scores[layer][rate index]``; None if
    there is no such plan.

    Exact, by A* search: the partial plan with the highest bound is extended by a layer. Under one ceiling the bound is
    tight, so whole plans appear best first. Costs are integers, so a ceiling holds to the MAC. Whole plans that another
    constraint refuses are skipped one by one, which takes long if it refuses most. Raises ValueError unless each legal
    rate has one finite score.
    """
    legal, values = legal_rates(space), _values(space, scores)
    free = _Ceiling(0, tuple((0,) * len(rates) for rates in legal.values()))
    ceilings = _ceilings(space, constraints) or [free]
    bounds = [_bound(values, ceilings, kept) for kept in range(len(ceilings))]
    spare: list[_Bound] = []  # bounds on what is left of the other ceiling: below 0 where both cannot be met
    if len(ceilings) == 2:
        nothing = [np.zeros_like(value) for value in values]
        spare = [_bound(nothing, ceilings, kept, price=1.0) for kept in (0, 1)]
        bounds += [_at_best_price(values, ceilings, *pair) for pair in zip(bounds, spare, strict=True)]
    excluded = _all_indices(space, exclude)
    # (-bound, -depth, indices so far, their score, what the other layers may cost). At equal bounds the longest partial
    # plan comes first, then the lowest indices, so the answer does not depend on the order of a set.
    heap: list[tuple[float, int, tuple[int, ...], float, list[int]]]
    heap = [(-inf, 0, (), 0.0, [ceiling.limit for ceiling in ceilings])]
    while heap:
        _, _, chosen, score, allowed = heappop(heap)
        depth = len(chosen)
        if depth == len(values):
            if chosen not in excluded and min(allowed) >= 0:
                plan = from_indices(space, chosen)
                if not constraints.refusal(plan_cost(space, plan)):
                    return plan
            continue
        for index, value in enumerate(values[depth].tolist()):
            left = [limit - ceiling.costs[depth][index] for limit, ceiling in zip(allowed, ceilings, strict=True)]
            reach = score + value + min(bound.at(depth + 1, left) for bound in bounds)
            if reach > -inf and all(bound.at(depth + 1, left) >= 0 for bound in spare):
                heappush(heap, (-reach, -depth - 1, (*chosen, index), score + value, left))
    return None


@dataclass(frozen=True)
class FrontPoint:
    """A Pareto-optimal plan: none with at most its conv MACs scores higher, and none with fewer scores as high."""

    plan: FactorizationPlan
    conv_macs: int
    score: float


def pareto_front(space: Macroarchitecture, scores: RateScores) -> list[FrontPoint]:
    """The Pareto front of conv MACs and the sum of `scores`, ascending: the best plan at every budget.

    Exact, by dynamic programming over layers: dominated partial plans are dropped. Of plans that are equal in both, one
    is kept. Raises ValueError as `best_plan`.
    """
    values, table = _values(space, scores), cost_table(space)
    cost, score = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[
        tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    ] = []  # for each layer: rate index, and index into the front before it
    for value, costs in zip(values, table.by_layer.values(), strict=True):
        added = np.array([cost_at_rate.conv_macs for cost_at_rate in costs], dtype=np.int64)
        sums, totals = np.add.outer(added, cost).ravel(), np.add.outer(value, score).ravel()
        order = np.lexsort((np.arange(len(sums)), -totals, sums))
        better = np.maximum.accumulate(totals[order])
        front = order[np.concatenate([[True], better[1:] > better[:-1]])]
        steps.append((front // len(cost), front % len(cost)))
        cost, score = sums[front], totals[front]
    places, chosen = np.arange(len(cost)), []
    for rate, before in reversed(steps):
        chosen.append(rate[places])
        places = before[places]
    rows = zip(*(column.tolist() for column in reversed(chosen)), strict=True)
    macs: list[int] = (cost + table.fixed.conv_macs).tolist()
    points = zip(rows, macs, score.tolist(), strict=True)
    return [FrontPoint(from_indices(space, row), conv_macs, total) for row, conv_macs, total in points]


def _values(space: Macroarchitecture, scores: RateScores) -> list[Values]:
    legal = legal_rates(space)
    values = [np.asarray(scores[layer], dtype=np.float64) for layer in legal]
    for (layer, rates), value in zip(legal.items(), values, strict=True):
        if value.shape != (len(rates),) or not np.isfinite(value).all():
            raise ValueError(f"layer {layer!r} needs {len(rates)} finite scores, got {value.tolist()}")
    return values


def sample_plan(
    space: Macroarchitecture,
    constraints: Constraints,
    exclude: Collection[FactorizationPlan],
    rng: np.random.Generator,
) -> FactorizationPlan | None:
    """A plan under the ceilings, not in `exclude`, drawn uniformly; None if there is no such plan.

    Draws plans until one fits. If they are too rare (about one in 65,536), takes `best_plan` of random scores instead.
    """
    legal = legal_rates(space)
    sizes = [len(rates) for rates in legal.values()]
    layers = np.arange(len(sizes))
    ceilings = []
    for ceiling in _ceilings(space, constraints):
        costs = np.zeros((len(sizes), max(sizes, default=0)), dtype=np.int64)
        for layer, layer_costs in enumerate(ceiling.costs):
            costs[layer, : len(layer_costs)] = layer_costs
        ceilings.append((costs, ceiling.limit))
    excluded = _all_indices(space, exclude)
    for _ in range(_BATCHES):
        drawn = rng.integers(np.array(sizes, dtype=np.int64), size=(_DRAWS, len(sizes)))
        admitted = np.ones(_DRAWS, dtype=bool)
        for costs, limit in ceilings:
            admitted &= costs[layers, drawn].sum(axis=1) <= limit
        for chosen in map(tuple, drawn[admitted].tolist()):
            if chosen not in excluded:
                plan = from_indices(space, chosen)
                if not constraints.refusal(plan_cost(space, plan)):
                    return plan
    return best_plan(space, constraints, {layer: rng.random(len(rates)) for layer, rates in legal.items()}, exclude)
