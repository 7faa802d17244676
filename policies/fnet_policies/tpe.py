"""Optuna's TPE over the rate indices, kept under the ceilings."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import IntDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe.sampler import _split_trials, default_gamma
from optuna.trial import FrozenTrial, TrialState, create_trial

from fnet_search.choose import best_plan
from fnet_search.plan import FactorizationPlan, from_indices, indices, legal_rates, plan_cost
from fnet_search.policy import History

Space = Mapping[str, IntDistribution]
"""Per layer, the index of its rate."""

_STUDY = "fnet_policies.tpe"
# Optuna announces every new study. Ours are thrown away after a call: only they are kept quiet, nobody else's.
logging.getLogger("optuna.storages._in_memory").addFilter(lambda record: _STUDY not in record.getMessage())


@dataclass(frozen=True)
class TPE:
    """Tree-structured Parzen estimator (``optuna.samplers.TPESampler``), maximising quint8 accuracy.

    The study is made anew from the history in each call. A proposal over a ceiling or already seen is not suggested:
    the study learns that it is infeasible, and is asked again. When `proposals` of them failed in one call, the plan
    that the model scores best among all unseen ones under the ceilings. None if there is none left.

    One estimator per layer (``multivariate=False``), so that the model's score of a plan is a sum over layers and its
    maximum can be found exactly. Running plans count as bad ones (constant liar), so that workers spread out.
    """

    proposals: int = 8

    def suggest(self, history: History) -> FactorizationPlan | None:
        space, constraints, seen = history.space, history.constraints, history.seen
        indexed = {layer: IntDistribution(0, len(rates) - 1) for layer, rates in legal_rates(space).items()}
        sampler = TPESampler(multivariate=False, constant_liar=True, seed=int(history.rng.integers(2**31)))
        study = optuna.create_study(study_name=_STUDY, direction="maximize", sampler=sampler)
        study.add_trials(_past(history, indexed))
        for _ in range(self.proposals):
            trial = study.ask(dict(indexed))
            plan = from_indices(space, tuple(trial.params[layer] for layer in indexed))
            cost = plan_cost(space, plan)
            if plan not in seen and not constraints.refusal(cost):
                return plan
            for name, violation in constraints.of_cost(cost).items():
                trial.set_constraint(name, violation)
            trial.set_constraint("seen", float(plan in seen))
            study.tell(trial, state=TrialState.PRUNED)
        return best_plan(space, constraints, _scores(study, sampler, indexed), seen)


def _past(history: History, indexed: Space) -> Iterator[FrozenTrial]:
    """The history as trials. Failed evaluations tell nothing about accuracy and are left out."""

    def trial(
        plan: FactorizationPlan, state: TrialState, value: float | None, violations: Mapping[str, float]
    ) -> FrozenTrial:
        params = dict(zip(indexed, indices(history.space, plan), strict=True))
        return create_trial(
            state=state, value=value, params=params, distributions=dict(indexed), constraints=dict(violations)
        )

    for evaluation in history.evaluations:
        violations = history.constraints.of(evaluation)
        if evaluation.state == "complete" and evaluation.quint8_accuracy is not None:
            yield trial(evaluation.plan, TrialState.COMPLETE, evaluation.quint8_accuracy, violations)
        elif evaluation.state == "refused":
            yield trial(evaluation.plan, TrialState.PRUNED, None, violations)
    for plan in history.running:
        yield trial(plan, TrialState.RUNNING, None, {})


def _scores(study: optuna.Study, sampler: TPESampler, indexed: Space) -> dict[str, npt.NDArray[np.float64]]:
    """log l(x) - log g(x) at each layer's indices: what ``TPESampler._sample`` of Optuna 5.0 maximises by sampling.

    Optuna has no public way to its estimators. The lines below are those of `_sample`, but for the candidates.
    """
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING))
    finished = sum(trial.state != TrialState.RUNNING for trial in trials)
    below, above = _split_trials(study, trials, default_gamma(finished))
    scores = {}
    for layer, distribution in indexed.items():
        good = sampler._build_parzen_estimator(study, {layer: distribution}, below, handle_below=True)
        bad = sampler._build_parzen_estimator(study, {layer: distribution}, above, handle_below=False)
        every = {layer: np.arange(distribution.high + 1, dtype=np.float64)}
        scores[layer] = sampler._compute_acquisition_func(every, good, bad)
    return scores
