"""Choosing plans under the ceilings that need no training: conv MACs and parameters, which are sums over layers. A
ceiling of another kind is a test that whole plans must pass. No torch and no Optuna.

A plan's cost is a sum over layers (`plan.cost_table`). So the best plan under ceilings, by a score that is a sum over
layers too, is a multiple-choice knapsack, and can be found exactly without looking at every plan.
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

Scores = Mapping[str, Sequence[float] | npt.NDArray[np.float64]]
"""A number per layer and legal rate, in the order of `legal_rates`."""

Values = npt.NDArray[np.float64]
"""A layer's scores."""

_STEPS = 4096
"""Most steps that a bound keeps: deep networks would have millions."""

_PRICES = 16
"""Most prices tried for a bound; a handful are needed."""

_DRAWS, _BATCHES = 4096, 16
"""Plans drawn at once, and how often, before `sample_plan` leaves off drawing: 10 ms in all."""


@dataclass(frozen=True)
class _Ceiling:
    """What the factorizable layers may cost together, and what each costs at each legal rate."""

    limit: int
    costs: tuple[tuple[int, ...], ...]

    def cost(self, plan: tuple[int, ...]) -> int:
        return sum(costs[index] for costs, index in zip(self.costs, plan, strict=True))


def _ceilings(space: Macroarchitecture, constraints: Constraints) -> list[_Ceiling]:
    """Of the constraints that are sums over layers."""
    table, ceilings = cost_table(space), []
    for name in ("conv_macs", "params"):
        limit = getattr(constraints, name)
        if limit is not None:
            costs = tuple(tuple(getattr(cost, name) for cost in layer) for layer in table.by_layer.values())
            ceilings.append(_Ceiling(limit - getattr(table.fixed, name), costs))
    return ceilings


def _all_indices(space: Macroarchitecture, plans: Collection[FactorizationPlan]) -> set[tuple[int, ...]]:
    """`indices` of many plans, in a tenth of the time."""
    places = [{rate: index for index, rate in enumerate(rates)} for rates in legal_rates(space).values()]
    return {tuple([place[rate] for place, (_, rate) in zip(places, plan.rates, strict=True)]) for plan in plans}


@dataclass(frozen=True)
class _Steps:
    """The most that some layers can score, as a step function of what they may cost. Both lists ascend."""

    costs: list[int]
    scores: list[float]

    def at(self, allowed: int) -> float:
        steps = bisect_right(self.costs, allowed)
        return self.scores[steps - 1] if steps else -inf


def _steps(values: list[Values], ceiling: _Ceiling) -> list[_Steps]:
    """For each layer, the steps of it and all layers after it; last, those of no layer.

    From the back, a layer at a time: all sums of its costs with the steps so far, less those that another beats.
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
        if len(cost) > _STEPS:  # coarser but never lower: of each run of steps, its lowest cost and its highest score
            ends = np.linspace(0, len(cost), _STEPS + 1, dtype=np.int64)
            cost, score = cost[ends[:-1]], score[ends[1:] - 1]
        steps.append(_Steps(cost.tolist(), score.tolist()))
    return steps[::-1]


@dataclass(frozen=True)
class _Bound:
    """The most that the layers from a depth on can score under ceiling `kept`, with a price on the `other` one.

    Lagrange: what is used of the other is paid for, all that may be used is given back, so no plan under it loses.
    `best` has the indices of the plan that comes out best after paying.
    """

    kept: int
    other: int
    price: float
    steps: list[_Steps]
    best: tuple[int, ...]

    def at(self, depth: int, allowed: list[int]) -> float:
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
    """The bound of ``alone.kept`` with that price on the other ceiling at which it bounds whole plans lowest.

    Drawn as score against price, each plan is a line that falls if the plan is over the other ceiling and rises if it
    is under it; the bound is the highest of them. So its lowest point is where two such lines cross with none above.
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
    scores: Scores,
    exclude: Collection[FactorizationPlan] = (),
) -> FactorizationPlan | None:
    """The plan under the ceilings, not in `exclude`, with the highest sum of ``scores[layer][rate index]``, or None.

    Exact, by A* search: of the beginnings of plans, the one that could still reach most is extended by a layer. Under
    one ceiling that bound is met, so whole plans come up best first. Costs are integers, so a ceiling holds to the MAC.
    Whole plans that another constraint refuses are passed over, one by one: where it refuses most, that takes long.
    Raises ValueError unless there is one finite score per legal rate.
    """
    legal, values = legal_rates(space), _values(space, scores)
    free = _Ceiling(0, tuple((0,) * len(rates) for rates in legal.values()))
    ceilings = _ceilings(space, constraints) or [free]
    bounds = [_bound(values, ceilings, kept) for kept in range(len(ceilings))]
    spare: list[_Bound] = []  # how much of the other ceiling can be left: less than none where both cannot be met
    if len(ceilings) == 2:
        nothing = [np.zeros_like(value) for value in values]
        spare = [_bound(nothing, ceilings, kept, price=1.0) for kept in (0, 1)]
        bounds += [_at_best_price(values, ceilings, *pair) for pair in zip(bounds, spare, strict=True)]
    excluded = _all_indices(space, exclude)
    # Minus the bound, minus the depth, the indices so far, their score, and what the other layers may cost. At equal
    # bounds the longest beginning comes first, then the lowest indices: the answer never hangs on the order of a set.
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
    """A plan that no other of fewer or equal conv MACs scores above, nor any of fewer scores as high as."""

    plan: FactorizationPlan
    conv_macs: int
    score: float


def pareto_front(space: Macroarchitecture, scores: Scores) -> list[FrontPoint]:
    """The best plan at every budget: all that are on the Pareto front of conv MACs and the sum of `scores`, by MACs.

    Exact, by dynamic programming: of the plans of the layers so far only those stay that none beats in both. Of plans
    that are equal in both, one. Raises ValueError as `best_plan`.
    """
    values, table = _values(space, scores), cost_table(space)
    cost, score = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []  # for each layer: rate index, place before
    for value, costs in zip(values, table.by_layer.values(), strict=True):
        added = np.array([one.conv_macs for one in costs], dtype=np.int64)
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


def _values(space: Macroarchitecture, scores: Scores) -> list[Values]:
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
    """A plan under the ceilings and not in `exclude`, drawn uniformly; None if there is no such plan.

    Where such plans are too rare for that (fewer than about one in 65,536), `best_plan` by random scores.
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
