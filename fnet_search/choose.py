"""Choosing plans under the ceilings that need no training: conv MACs and parameters. No torch and no Optuna.

A plan's cost is a sum over layers (`plan.cost_table`). So the best plan under ceilings, by a score that is a sum over
layers too, is a multiple-choice knapsack: small enough to be solved exactly, on spaces of any size.
"""

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

import numpy as np
import numpy.typing as npt

from fnet_search.macro import Macroarchitecture
from fnet_search.plan import FactorizationPlan, cost_table, from_indices, indices, legal_rates
from fnet_search.policy import Constraints

Scores = Mapping[str, Sequence[float] | npt.NDArray[np.float64]]
"""A number per layer and legal rate, in the order of `legal_rates`."""

_DRAWS, _BATCHES = 4096, 16
"""Plans drawn at once, and how often, before `sample_plan` leaves off drawing: 65,536 in about 10 ms."""

_STEPS = 4096
"""Steps of a bound as a function of cost, at most."""


@dataclass(frozen=True)
class _Ceiling:
    """What the factorizable layers may cost together, and what each costs at each legal rate."""

    limit: int
    costs: tuple[tuple[int, ...], ...]


def _ceilings(space: Macroarchitecture, constraints: Constraints) -> list[_Ceiling]:
    table, ceilings = cost_table(space), []
    for name in ("conv_macs", "params"):
        limit = getattr(constraints, name)
        if limit is not None:
            costs = tuple(tuple(getattr(cost, name) for cost in layer) for layer in table.by_layer.values())
            ceilings.append(_Ceiling(limit - getattr(table.fixed, name), costs))
    return ceilings


@dataclass(frozen=True)
class _Front:
    """The most that some layers can score, as a step function of what they may cost: both lists ascend."""

    costs: list[int]
    scores: list[float]

    def best(self, allowed: int) -> float:
        step = bisect_right(self.costs, allowed)
        return self.scores[step - 1] if step else -inf


def _fronts(values: list[npt.NDArray[np.float64]], ceiling: _Ceiling) -> list[_Front]:
    """For each layer the front of it and all layers after it; last, that of no layer."""
    cost, score = np.zeros(1, dtype=np.int64), np.zeros(1)
    fronts = [_Front([0], [0.0])]
    for value, layer_costs in zip(reversed(values), reversed(ceiling.costs), strict=True):
        cost = np.add.outer(np.array(layer_costs, dtype=np.int64), cost).ravel()
        score = np.add.outer(value, score).ravel()
        order = np.lexsort((-score, cost))
        order = order[cost[order] <= ceiling.limit]
        better = np.diff(np.maximum.accumulate(score[order]), prepend=-inf) > 0
        cost, score = cost[order][better], score[order][better]
        if len(cost) > _STEPS:  # coarser, but never lower: each run of steps becomes its cheapest cost and best score
            ends = np.linspace(0, len(cost), _STEPS + 1, dtype=np.int64)
            cost, score = cost[ends[:-1]], score[ends[1:] - 1]
        fronts.append(_Front(cost.tolist(), score.tolist()))
    return fronts[::-1]


def best_plan(
    space: Macroarchitecture,
    constraints: Constraints,
    scores: Scores,
    exclude: Collection[FactorizationPlan] = (),
) -> FactorizationPlan | None:
    """The plan under the ceilings, not in `exclude`, whose summed scores are highest; None if there is no such plan.

    Exact (A*): beginnings of plans are extended layer by layer, always the one that could still reach most. That bound
    is itself exact under a single ceiling, so whole plans come up in order of their scores; costs are integers.
    Raises ValueError unless there is one finite score per layer and legal rate.
    """
    legal = legal_rates(space)
    values = [np.asarray(scores[layer], dtype=np.float64) for layer in legal]
    for (layer, rates), value in zip(legal.items(), values, strict=True):
        if value.shape != (len(rates),) or not np.isfinite(value).all():
            raise ValueError(f"layer {layer!r} needs {len(rates)} finite scores, got {value.tolist()}")
    free = _Ceiling(0, tuple((0,) * len(rates) for rates in legal.values()))
    ceilings = _ceilings(space, constraints) or [free]
    fronts = [_fronts(values, ceiling) for ceiling in ceilings]
    seen = {indices(space, plan) for plan in exclude}
    start = min(front[0].best(ceiling.limit) for front, ceiling in zip(fronts, ceilings, strict=True))
    # Highest bound first, then the longest beginning; equals by their indices, so that the answer is always the same.
    heap: list[tuple[float, int, tuple[int, ...], float, tuple[int, ...]]] = []
    if start > -inf:
        heap.append((-start, 0, (), 0.0, tuple(ceiling.limit for ceiling in ceilings)))
    global POPS
    POPS = 0
    while heap:
        _, _, chosen, score, left = heappop(heap)
        POPS += 1
        depth = len(chosen)
        if depth == len(values):
            if chosen not in seen:
                return from_indices(space, chosen)
            continue
        for index, value in enumerate(values[depth].tolist()):
            after = tuple(have - ceiling.costs[depth][index] for have, ceiling in zip(left, ceilings, strict=True))
            rest = min(front[depth + 1].best(have) for front, have in zip(fronts, after, strict=True))
            if rest > -inf:
                reached = score + value
                heappush(heap, (-(reached + rest), -depth - 1, (*chosen, index), reached, after))
    return None


def sample_plan(
    space: Macroarchitecture,
    constraints: Constraints,
    exclude: Collection[FactorizationPlan],
    rng: np.random.Generator,
) -> FactorizationPlan | None:
    """A plan under the ceilings and not in `exclude`, drawn uniformly; None if there is no such plan.

    Where such plans are too rare to be drawn (far under one in 65,536), the best plan by random scores.
    """
    legal = legal_rates(space)
    sizes = np.array([len(rates) for rates in legal.values()], dtype=np.int64)
    layers = np.arange(len(sizes))
    tables = []
    for ceiling in _ceilings(space, constraints):
        table = np.zeros((len(sizes), max(sizes, default=0)), dtype=np.int64)
        for layer, costs in enumerate(ceiling.costs):
            table[layer, : len(costs)] = costs
        tables.append((table, ceiling.limit))
    seen = {indices(space, plan) for plan in exclude}
    for _ in range(_BATCHES):
        drawn = rng.integers(sizes, size=(_DRAWS, len(sizes)))
        admitted = np.ones(_DRAWS, dtype=bool)
        for table, limit in tables:
            admitted &= table[layers, drawn].sum(axis=1) <= limit
        for row in map(tuple, drawn[admitted].tolist()):
            if row not in seen:
                return from_indices(space, row)
    return best_plan(space, constraints, {layer: rng.random(len(rates)) for layer, rates in legal.items()}, exclude)
