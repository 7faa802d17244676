"""Optuna's TPE over the rate indices, kept under the ceilings."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.samplers._tpe.sampler import default_gamma

from fnet_search.choose import best_plan, sample_plan
from fnet_search.plan import FactorizationPlan, from_indices, legal_rates, plan_cost
from fnet_search.policy import History

Values = npt.NDArray[np.float64]

_CANDIDATES = 24
"""Draws per layer, of which a proposal has the best: Optuna's default."""

_PARAMETERS = TPESampler()._parzen_estimator_parameters


@dataclass(frozen=True)
class TPE:
    """Tree-structured Parzen estimator, maximising quint8 accuracy, with the estimators of Optuna's ``TPESampler``.

    The first `startup` plans are uniform under the ceilings. Then the model of the history makes so many `proposals`:
    the first of them that is unseen and under the ceilings is suggested, or else the plan that the model scores best
    among all that are. None if there is none left.

    One estimator per layer (Optuna's ``multivariate=False``), so that the model's score of a plan is a sum over layers
    and its maximum can be found exactly. Running plans count as bad (constant liar), so that workers spread out.
    """

    startup: int = 10
    proposals: int = 32

    def suggest(self, history: History) -> FactorizationPlan | None:
        space, constraints, seen, rng = history.space, history.constraints, history.seen, history.rng
        good, bad = _split(history)
        if len(good) + len(bad) - len(history.running) < self.startup:
            return sample_plan(space, constraints, seen, rng)
        likely, scores = _model(history, good, bad)
        drawn = [_best_of(_CANDIDATES, likely[layer], scores[layer], rng.random(self.proposals)) for layer in scores]
        for chosen in zip(*drawn, strict=True):
            plan = from_indices(space, chosen)
            if plan not in seen and not constraints.refusal(plan_cost(space, plan)):
                return plan
        return best_plan(space, constraints, scores, seen)


def _split(history: History) -> tuple[Values, Values]:
    """Rate indices of the good and of the bad plans, a row a plan, in the history's order: as Optuna splits trials.

    From the best: feasible plans by accuracy; pruned ones, those first that came furthest; infeasible ones by their
    excess. Failed ones tell nothing about accuracy and are left out.
    """
    places = [{rate: index for index, rate in enumerate(rates)} for rates in legal_rates(history.space).values()]
    plans, ranks = [], list[tuple[int, float, float]]()
    for one in history.evaluations:
        if one.state == "failed":
            continue
        excess = sum(value for value in history.constraints.of(one).values() if value > 0)
        if excess > 0:
            ranks.append((2, excess, 0.0))
        elif one.state == "complete" and one.quint8_accuracy is not None:
            ranks.append((0, -one.quint8_accuracy, 0.0))
        else:
            ranks.append((1, -len(one.accuracies), -one.accuracies[-1] if one.accuracies else 0.0))
        plans.append(one.plan)
    best = sorted(range(len(ranks)), key=ranks.__getitem__)[: default_gamma(len(ranks))]
    is_good = np.zeros(len(ranks) + len(history.running), dtype=bool)
    is_good[best] = True
    rows = [
        [place[rate] for place, (_, rate) in zip(places, plan.rates, strict=True)]
        for plan in (*plans, *history.running)
    ]
    every = np.array(rows, dtype=np.float64).reshape(len(rows), len(places))
    return every[is_good], every[~is_good]


def _model(history: History, good: Values, bad: Values) -> tuple[dict[str, Values], dict[str, Values]]:
    """Per layer and rate index: the log density of the good plans, and the score: that less the bad ones'."""
    likely, unlikely = (_log_densities(history, rows) for rows in (good, bad))
    return likely, {layer: likely[layer] - unlikely[layer] for layer in likely}


def _log_densities(history: History, rows: Values) -> dict[str, Values]:
    """Per layer, the log density of each rate index where plans like those of `rows` are likely.

    Optuna has no public way to its estimators; tests hold them against what its sampler does.
    """
    densities = {}
    for (layer, rates), observed in zip(legal_rates(history.space).items(), rows.T, strict=True):
        indexed: dict[str, BaseDistribution] = {layer: IntDistribution(0, len(rates) - 1)}
        estimator = _ParzenEstimator({layer: observed}, indexed, _PARAMETERS)
        densities[layer] = estimator.log_pdf({layer: np.arange(len(rates), dtype=np.float64)})
    return densities


def _best_of(count: int, log_density: Values, scores: Values, uniform: Values) -> list[int]:
    """For each of the `uniform` numbers: of `count` draws from a density, the one with the best score.

    The largest of so many uniform numbers is distributed as u ** (1 / count); the density's quantile there, with the
    indices in the order of their scores, is the draw that scores best.
    """
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum(np.exp(log_density[order]))
    places = np.searchsorted(reached / reached[-1], uniform ** (1 / count), side="right")
    return [int(index) for index in order[np.minimum(places, len(order) - 1)]]
