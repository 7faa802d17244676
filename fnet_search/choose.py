"""Choosing plans under the ceilings that need no training: conv MACs and parameters. No torch and no Optuna.

A plan's cost is a sum over layers (`plan.cost_table`). So the best plan under ceilings, by a score that is a sum over
layers too, is a multiple-choice knapsack: small enough to be solved exactly, on spaces of any size.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array

from fnet_search.macro import Macroarchitecture
from fnet_search.plan import FactorizationPlan, cost_table, from_indices, indices, legal_rates
from fnet_search.policy import Constraints

Scores = Mapping[str, Sequence[float] | npt.NDArray[np.float64]]
"""A number per layer and legal rate, in the order of `legal_rates`."""

_DRAWS, _BATCHES = 4096, 16
"""Plans drawn at once, and how often, before `sample_plan` leaves off drawing: 65,536 in about 10 ms."""

_SCALE = 1e4
"""Largest score difference that the solver sees. It stops within 1e-6 of the optimum: 1e-10 of that difference."""


@dataclass(frozen=True)
class _Ceiling:
    """What the factorizable layers may cost together, and what each costs at each legal rate."""

    limit: int
    costs: tuple[tuple[int, ...], ...]

    def admits(self, chosen: tuple[int, ...]) -> bool:
        return sum(costs[index] for costs, index in zip(self.costs, chosen, strict=True)) <= self.limit


def _ceilings(space: Macroarchitecture, constraints: Constraints) -> list[_Ceiling]:
    table, ceilings = cost_table(space), []
    for name in ("conv_macs", "params"):
        limit = getattr(constraints, name)
        if limit is not None:
            costs = tuple(tuple(getattr(cost, name) for cost in layer) for layer in table.by_layer.values())
            ceilings.append(_Ceiling(limit - getattr(table.fixed, name), costs))
    return ceilings


def best_plan(
    space: Macroarchitecture,
    constraints: Constraints,
    scores: Scores,
    exclude: Collection[FactorizationPlan] = (),
) -> FactorizationPlan | None:
    """The plan under the ceilings, not in `exclude`, whose summed scores are highest; None if there is no such plan.

    Exact: an integer program with one binary per layer and rate (``scipy.optimize.milp``, HiGHS), where each excluded
    plan is a cut. Raises ValueError unless there is one finite score per layer and legal rate.
    """
    legal = legal_rates(space)
    values = [np.asarray(scores[layer], dtype=np.float64) for layer in legal]
    for (layer, rates), value in zip(legal.items(), values, strict=True):
        if value.shape != (len(rates),) or not np.isfinite(value).all():
            raise ValueError(f"layer {layer!r} needs {len(rates)} finite scores, got {value.tolist()}")
    ceilings = _ceilings(space, constraints)
    # In a fixed order: which of two equally good plans comes out may depend on it.
    cuts = sorted(indices(space, plan) for plan in exclude)
    while (chosen := _solve(values, ceilings, cuts)) is not None:
        if all(ceiling.admits(chosen) for ceiling in ceilings):
            return from_indices(space, chosen)
        cuts.append(chosen)  # over a ceiling by less than the solver's tolerance
    return None


def _solve(
    values: list[npt.NDArray[np.float64]], ceilings: list[_Ceiling], cuts: list[tuple[int, ...]]
) -> tuple[int, ...] | None:
    """The index of each layer's rate, or None if nothing is left."""
    if not values:
        return None if cuts else ()
    layers = len(values)
    first = np.cumsum([0, *map(len, values)])  # column of each layer's first rate
    gain = np.concatenate([value - value.max() for value in values])
    choice = csr_array((np.ones(first[-1]), np.arange(first[-1]), first))  # one rate a layer
    rules = [LinearConstraint(choice, 1, 1)]
    for ceiling in ceilings:
        unit = max(1, abs(ceiling.limit))
        share = np.concatenate([np.array(costs, dtype=np.float64) / unit for costs in ceiling.costs])
        rules.append(LinearConstraint(share, -np.inf, ceiling.limit / unit))
    if cuts:
        columns = (np.array(cuts) + first[:-1]).ravel()
        rows = np.arange(len(cuts) + 1) * layers
        shape = (len(cuts), int(first[-1]))
        excluded = csr_array((np.ones(columns.size), columns, rows), shape=shape)
        rules.append(LinearConstraint(excluded, -np.inf, layers - 1))
    result = milp(
        -gain * (_SCALE / (-gain.min() or 1.0)),
        integrality=1,
        bounds=(0, 1),
        constraints=rules,
        options={"mip_rel_gap": 0.0},
    )
    if result.status == 2:
        return None
    if result.x is None:
        raise RuntimeError(f"choosing a plan failed: {result.message}")
    return tuple(int(part.argmax()) for part in np.split(result.x, first[1:-1]))


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
