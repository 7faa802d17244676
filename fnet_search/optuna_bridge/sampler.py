"""A policy as an Optuna sampler: in anybody's study, with any storage. No torch.

    study = optuna.create_study(direction="maximize", sampler=PolicySampler(ReversePyramid(), space))
    study.optimize(lambda trial: train(suggest_plan(trial, space)))

`trial_history` has what a policy sees of a study, `trials` what a candidate is as a trial.
"""

import copy
import random
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan, legal_rates
from fnet_search.base.errors import FnetError
from fnet_search.optuna_bridge.trial_history import TrialHistory, accuracy_of
from fnet_search.optuna_bridge.trials import (
    NUMBER,
    PLAN,
    REASON,
    fixed_indices,
    index_distributions,
    index_parameters,
    plan_from_indices,
    read_constraints,
    suggestion_attributes,
    value_and_state,
    write_constraints,
    write_evaluation,
)
from fnet_search.policy.asktell import check_refusal, suggestion
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation, Probes
from fnet_search.policy.protocol import History, Policy, probes_of, requirements
from fnet_search.policy.registry import check_policy

_POLL, _TOLD = 0.2, 60.0
"""Seconds between looks at the storage while a worker waits for others, and until it says so."""


class PolicyDone(FnetError, optuna.TrialPruned):  # noqa: N818 (as TrialPruned)
    """The policy has no plan for a trial: for now, while `running` plans are still out; for good, when none is.

    Under ``study.optimize`` nobody sees it: the trial counts as pruned, and the study stops when none is out. Under
    ask-and-tell tell the trial (of ``study.ask(distributions)`` the last of ``study.trials``) as
    ``TrialState.PRUNED``, and ask again when a running one is told, or stop.
    """

    def __init__(self, running: int) -> None:
        waits = f"until one of {running} running ones is told"
        super().__init__(f"the policy has no plan {waits}" if running else "the policy is done")
        self.running = running

    def __reduce__(self) -> tuple[type["PolicyDone"], tuple[int]]:
        return PolicyDone, (self.running,)


class PolicySampler(BaseSampler):
    """Lets a policy choose the plans of an Optuna study (``optuna.samplers.BaseSampler``).

    Each factorizable layer of `space` is an integer parameter of its name, the index of its rate; `suggest_plan` makes
    a plan of them. The policy sees what was handed back with `report_evaluation`, layer statistics included; of other
    trials the objective's value, as quint8 accuracy (a fraction of 1; one less it where the study minimises), and
    pruned trials as such. A failed trial's plan is suggested again, twice at most.

    A plan above the ceilings of `constraints`, and a repeat, are refused: `suggest_plan` prunes their trial, with the
    reason. The study stops when the policy is done. Workers of one storage never get the same plan. All other
    parameters of an objective are sampled by `independent_sampler`, at random if none is given.

    Raises FnetError where `policy` requires `probes`, and none are given.
    """

    def __init__(
        self,
        policy: Policy,
        space: Macroarchitecture,
        *,
        constraints: Constraints | None = None,
        seed: int = 0,
        probes: Probes | None = None,
        independent_sampler: BaseSampler | None = None,
    ) -> None:
        self.policy, self.space, self.seed, self.probes = policy, space, seed, probes
        self.constraints = constraints or Constraints()
        check_policy(policy, type(policy).__name__)
        if requirements(policy):
            probes_of(History(space, probes=probes), policy)
        self._independent = independent_sampler or RandomSampler(seed=seed)
        self._past = TrialHistory(space, self.constraints, seed, probes)
        self._asked: tuple[History, FactorizationPlan | None] | None = None  # a cache
        self._lock = threading.Lock()  # held while the policy is asked and a plan is claimed, never while waiting

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_asked": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def reseed_rng(self) -> None:
        """Of the parameters that are not ours: a policy's random numbers come from seed and number alone."""
        self._independent.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Numbers a trial all of whose rates are fixed, as by ``enqueue_trial``: it is never sampled."""
        self._independent.before_trial(study, trial)
        plan = plan_from_indices(self.space, fixed_indices(self.space, trial))
        while plan is not None:
            with self._lock:
                if self._claim(study, trial, plan, self._others(study, trial)):
                    return
            _pause()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The rates of all layers that have a choice."""
        return {
            name: distribution
            for name, distribution in index_distributions(self.space).items()
            if not distribution.single()
        }

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The policy's next plan, as the indices of its rates; parameters that are not ours are left to others.

        Raises PolicyDone, and FnetError for a policy that fails.
        """
        ours = search_space.keys() & index_distributions(self.space).keys()
        sampled = {
            name: self._independent.sample_independent(study, trial, name, distribution)
            for name, distribution in search_space.items()
            if name not in ours
        }
        if not ours:
            return sampled
        plan = self._suggest(study, trial)
        return sampled | {layer: index for layer, index in index_parameters(self.space, plan).items() if layer in ours}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A parameter that is none of ours."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Stops the study where the policy has nothing more."""
        self._independent.after_trial(study, trial, state, values)
        if _loop(study) and self._over(study, _as_stored(trial, state, values)):
            study.stop()

    def history(self, study: Study) -> History:
        """The past of a study, as the policy sees it now.

        Raises ValueError for a trial with several values whose evaluation was not reported.
        """
        with self._lock:
            return self._past.of(study, _trials(study))

    def _over(self, study: Study, ended: FrozenTrial) -> bool:
        trials = [*self._others(study, ended), ended]
        if any(trial.state is TrialState.WAITING for trial in trials):
            return False
        with self._lock, suppress(FnetError, ValueError):  # what is wrong is said when a plan is needed
            history = self._past.of(study, trials)
            self._past.forget(ended)
            return not history.running and self._next(history) is None
        return False

    def _suggest(self, study: Study, trial: FrozenTrial) -> FactorizationPlan:
        begun = said = time.monotonic()
        while True:
            others = self._others(study, trial)
            with self._lock:
                history = self._past.of(study, others)
                plan = self._next(history)
                if plan is not None:
                    indices = index_parameters(self.space, plan) | fixed_indices(self.space, trial)
                    plan = plan_from_indices(self.space, indices)
                    assert plan is not None
                    if self._claim(study, trial, plan, others):
                        return plan
            if plan is not None:
                _pause()
                continue
            states = {trial.state for trial in others}
            loop = _loop(study)  # an enqueued plan is for whoever comes next: perhaps this worker
            if not history.running or loop is None or loop._stop_flag or TrialState.WAITING in states:
                done = PolicyDone(len(history.running))
                _set(study, trial, REASON, str(done))
                raise done
            with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
                optuna.storages.fail_stale_trials(study)  # of workers that died, where the storage has heartbeats
            if time.monotonic() - said > _TOLD:
                said = time.monotonic()
                optuna.logging.get_logger(__name__).warning(
                    f"trial {trial.number} has waited {said - begun:.0f} s for one of {len(history.running)} running "
                    "trials to end; tell those of dead workers as failed: study.tell(number, state=TrialState.FAIL)"
                )
            time.sleep(_POLL)

    def _next(self, history: History) -> FactorizationPlan | None:
        if self._asked is not None and self._asked[0] == history:
            return self._asked[1]
        plan = suggestion(self.policy, history)
        if plan is not None and (reason := history.refusal(plan)):
            check_refusal(history, plan, reason)
        self._asked = history, plan
        return plan

    def _claim(self, study: Study, trial: FrozenTrial, plan: FactorizationPlan, others: list[FrozenTrial]) -> bool:
        """Writes that this trial has this plan, and looks whether a worker wrote the same since `others` were read.

        Of two that write and then look, one at least sees the other and gives way: no plan is out twice.
        """
        history = self._past.of(study, (trial for trial in others if trial.state is not TrialState.WAITING))
        write_constraints(study._storage, trial, self.constraints)
        for name, value in suggestion_attributes(self.space, history.number, plan).items():
            _set(study, trial, name, value)
        before = {trial.number: _claimed(trial) for trial in others}
        for one in self._others(study, trial):
            number, text = _claimed(one)
            new = one.state not in (TrialState.WAITING, TrialState.FAIL) and (number, text) != before.get(one.number)
            if new and (number == history.number or text == str(plan)):
                _set(study, trial, NUMBER, None)
                _set(study, trial, PLAN, None)
                return False
        if reason := history.refusal(plan):
            _set(study, trial, REASON, reason)
        return True

    def _others(self, study: Study, trial: FrozenTrial) -> list[FrozenTrial]:
        return [one for one in _trials(study) if one.number != trial.number]


def suggest_plan(trial: Trial, space: Macroarchitecture, constraints: Constraints | None = None) -> FactorizationPlan:
    """The plan that a trial is to train: for each factorizable layer the index of its rate, as an integer parameter.

    For any sampler. `constraints` are those of the study's `PolicySampler`, where it has one. Raises
    ``optuna.TrialPruned``, with the reason, for a plan that they refuse or that repeats another; PolicyDone, which is
    a ``TrialPruned`` too, where the policy has none. Raises FnetError for another space than the sampler's.
    """
    sampler = trial.study.sampler
    if isinstance(sampler, PolicySampler) and index_distributions(sampler.space) != index_distributions(space):
        raise FnetError(f"the sampler chooses plans of space {sampler.space.name!r}, not of {space.name!r}")
    params = {layer: trial.suggest_int(layer, 0, len(rates) - 1) for layer, rates in legal_rates(space).items()}
    plan, now = plan_from_indices(space, params), _now(trial)
    if plan is None:  # Optuna takes enqueued values as they are
        reason = f"the parameters {params} stand for no plan of space {space.name!r}"
        trial.set_user_attr(REASON, reason)
        raise optuna.TrialPruned(reason)
    limits, number = _limits(now, constraints), now.user_attrs.get(NUMBER, trial.number)
    reason = now.user_attrs.get(REASON, "")
    if now.user_attrs.get(PLAN) != str(plan):  # of another sampler, or one that was put before ours and fixes rates
        for name, value in suggestion_attributes(space, number, plan).items():
            trial.set_user_attr(name, value)
        reason = limits.refusal(plan_cost(space, plan)) or (_repeats(trial, plan) if read_constraints(now) else "")
    if reason:
        write_evaluation(trial, limits, Evaluation.of(space, plan, number=number, state="refused", reason=reason))
        raise optuna.TrialPruned(reason)
    return plan


def report_evaluation(trial: Trial, evaluation: Evaluation, constraints: Constraints | None = None) -> float:
    """Hands a whole evaluation back to the study, and returns the objective's value: its quint8 accuracy (or what
    the constraints' metric says), a fraction of 1, or one less it where the study minimises.

    Everything is written to the trial's attributes, layer statistics included, and constraint violations with
    ``Trial.set_constraint``. `constraints` as for `suggest_plan`. Raises ``optuna.TrialPruned`` for an evaluation that
    was pruned or refused, and FnetError for a failed one or one of another plan than the trial's.
    """
    now = _now(trial)
    if (text := now.user_attrs.get(PLAN)) != str(evaluation.plan):
        raise FnetError(f"trial {trial.number} has plan {text}, the evaluation {evaluation.plan}")
    numbered = replace(evaluation, number=now.user_attrs[NUMBER])
    limits = _limits(now, constraints)
    write_evaluation(trial, limits, numbered)
    value, state = value_and_state(numbered, limits.metric)
    if state is TrialState.PRUNED:
        raise optuna.TrialPruned(evaluation.reason)
    if state is TrialState.FAIL or value is None:
        reason = evaluation.reason or f"it has no quint8 {limits.measured}"
        raise FnetError(f"plan {evaluation.plan} failed: {reason}")
    return accuracy_of(trial.study, value)


def _limits(now: FrozenTrial, constraints: Constraints | None) -> Constraints:
    return constraints or read_constraints(now) or Constraints()


def _repeats(trial: Trial, plan: FactorizationPlan) -> str:
    """Which trial has this plan already, in words; empty if none has."""
    for one in _trials(trial.study):
        if one.number != trial.number and one.state is not TrialState.FAIL and one.user_attrs.get(PLAN) == str(plan):
            return f"repeats trial {one.number}"
    return ""


def _trials(study: Study) -> list[FrozenTrial]:
    """All of them: a pruner may show a sampler only its own part."""
    return study._storage.get_all_trials(study._study_id, deepcopy=False)


def _loop(study: Study) -> Study | None:
    """The study whose ``optimize`` this thread is in; a pruner may put one of its own before a sampler."""
    own: Study = getattr(study, "_study", study)
    return own if own._thread_local.in_optimize_loop else None


def _now(trial: Trial) -> FrozenTrial:
    """A trial with the attributes that a sampler wrote, which the running one does not see."""
    return trial.study._storage.get_trial(trial._trial_id)


def _set(study: Study, trial: FrozenTrial, name: str, value: Any) -> None:
    study._storage.set_trial_user_attr(trial._trial_id, name, value)


def _claimed(trial: FrozenTrial) -> tuple[int | None, str | None]:
    return trial.user_attrs.get(NUMBER), trial.user_attrs.get(PLAN)


def _pause() -> None:
    """Of two workers that give way to each other, one is first next time."""
    time.sleep(random.uniform(0, _POLL))


def _as_stored(trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> FrozenTrial:
    """As it is about to be stored."""
    ended = copy.copy(trial)
    ended.state = state
    ended.values = None if values is None else list(values)
    return ended
