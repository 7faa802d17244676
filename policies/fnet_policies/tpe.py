"""Optuna's TPE over the rate indices, kept under the ceilings."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.samplers._tpe.sampler import _split_trials, default_gamma
from optuna.trial import TrialState

from fnet_search.arch.plan import FactorizationPlan, from_indices, legal_rates
from fnet_search.optuna_bridge.sampler_policy import SamplerPolicy
from fnet_search.optuna_bridge.trials import index_distributions
from fnet_search.policy.exact_choice import best_plan
from fnet_search.policy.protocol import History

Values = npt.NDArray[np.float64]

_PARAMETERS = TPESampler()._parzen_estimator_parameters


_CANDIDATES = 24
"""Draws per layer, of which a proposal takes the best: Optuna's default."""


@dataclass(frozen=True)
class TPE(SamplerPolicy):
    """Tree-structured Parzen estimator, maximising quint8 accuracy: Optuna's ``TPESampler``.

    One estimator per layer (``multivariate=False``), so that the score of a plan is a sum over layers: if no proposal
    is unseen and under the ceilings, the best-scoring plan that is both is suggested. Running plans count as bad
    (constant liar), so that workers spread out.
    """

    sampler: Callable[..., BaseSampler] = TPESampler
    replay: bool = False

    def proposed(self, history: History, seed: int) -> Iterator[FactorizationPlan]:
        """All proposals at once, from the sampler's own model: asking the sampler for each takes seconds late in a
        search, when most proposals are known."""
        rng, (likely, scores) = np.random.default_rng(seed), self.model(history)
        drawn = [_best_of(_CANDIDATES, likely[layer], scores[layer], rng.random(self.proposals)) for layer in scores]
        return (from_indices(history.space, chosen) for chosen in zip(*drawn, strict=True))

    def otherwise(self, history: History) -> FactorizationPlan | None:
        """The unseen plan under the ceilings with the best score, exactly."""
        _, scores = self.model(history)
        return best_plan(history.space, history.constraints, scores, history.seen)

    def model(self, history: History) -> tuple[dict[str, Values], dict[str, Values]]:
        """Per layer, for each rate index: the log density of good plans, and the score, that minus the log density of
        bad plans.

        Optuna has no public access to them; tests compare them with its sampler.
        """
        with self.study(history, 0) as study:
            states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
            trials = study.get_trials(deepcopy=False, states=states)
            finished = sum(trial.state.is_finished() for trial in trials)
            split = _split_trials(study, trials, default_gamma(finished))
        good, bad = ([list(trial.params.values()) for trial in part] for part in split)
        likely, unlikely = (_log_densities(history, rows) for rows in (good, bad))
        return likely, {layer: likely[layer] - unlikely[layer] for layer in likely}


def _log_densities(history: History, rows: list[list[int]]) -> dict[str, Values]:
    """Per layer, the log density of each rate index in the Parzen estimator of the plans `rows` (rate indices)."""
    observed = np.array(rows, dtype=np.float64).reshape(len(rows), len(legal_rates(history.space)))
    densities = {}
    for (layer, indexed), values in zip(index_distributions(history.space).items(), observed.T, strict=True):
        assert isinstance(indexed, IntDistribution)
        estimator = _ParzenEstimator({layer: values}, {layer: indexed}, _PARAMETERS)
        densities[layer] = estimator.log_pdf({layer: np.arange(indexed.high + 1, dtype=np.float64)})
    return densities


def _best_of(count: int, log_density: Values, scores: Values, uniform: Values) -> list[int]:
    """For each of the `uniform` numbers u, the best-scoring of `count` draws from a density, as a rate index.

    The largest of `count` uniform numbers is distributed as u ** (1 / count). The density's quantile there, with
    indices ordered by score, is the best-scoring draw.
    """
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum(np.exp(log_density[order]))
    places = np.searchsorted(reached / reached[-1], uniform ** (1 / count), side="right")
    return [int(index) for index in order[np.minimum(places, len(order) - 1)]]
