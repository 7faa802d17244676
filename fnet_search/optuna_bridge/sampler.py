"""`PolicySampler`: a policy as an Optuna sampler, for any study and storage. No torch.

    study = optuna.create_study(direction="maximize", sampler=PolicySampler(ReversePyramid(), space))
    study.optimize(lambda trial: train(suggest_plan(trial, space)))

`trial_history` turns a study into the history that a policy sees; `trials` holds the format of a trial.
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

_POLL = 0.2
"""Seconds between two reads of the storage while a worker waits for others."""
_WARN_EVERY = 60.0
"""Seconds between two warnings that a worker waits."""


class PolicyDone(FnetError, optuna.TrialPruned):  # noqa: N818 (as TrialPruned)
    """The policy has no plan for a trial: for now, if `running` plans are being trained; for good, if none is.

    ``study.optimize`` handles it: the trial counts as pruned, and the study stops when no plan is running. With
    ask-and-tell, tell the trial (after ``study.ask(distributions)``, the last of ``study.trials``) as
    ``TrialState.PRUNED``, and ask again once a running trial has been told, or stop.
    """

    def __init__(self, running: int) -> None:
        waits = f"until one of {running} running ones is told"
        super().__init__(f"the policy has no plan {waits}" if running else "the policy is done")
        self.running = running

    def __reduce__(self) -> tuple[type["PolicyDone"], tuple[int]]:
        return PolicyDone, (self.running,)


class PolicySampler(BaseSampler):
    """Lets a policy choose the plans of an Optuna study (``optuna.samplers.BaseSampler``).

    Each factorizable layer of `space` is an integer parameter with the layer's name: the index of its rate.
    `suggest_plan` turns them into a plan. The policy sees the evaluations that `report_evaluation` handed back, with
    their layer statistics. For other trials it sees the objective's value as quint8 accuracy, a fraction of 1 (1 minus
    the value in a study that minimises), and pruned trials as pruned. The plan of a failed trial is suggested again, at
    most twice.

    A plan above the ceilings of `constraints`, or a repeated one, is refused: `suggest_plan` prunes its trial and gives
    the reason. The study stops when the policy is done. Workers on one storage never get the same plan. Other
    parameters of an objective are sampled by `independent_sampler`, by default at random.

    Raises FnetError if `policy` requires `probes` and none are given.
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
        self._asked: tuple[History, FactorizationPlan | None] | None = None  # caches the policy's last answer
        self._lock = threading.Lock()  # held while the policy is asked and a plan is claimed, never while waiting

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_asked": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def reseed_rng(self) -> None:
        """Reseeds the independent sampler. A policy's random numbers depend on seed and suggestion number alone."""
        self._independent.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Claims the plan of a trial with all rates fixed (``enqueue_trial``), which Optuna does not sample."""
        self._independent.before_trial(study, trial)
        plan = plan_from_indices(self.space, fixed_indices(self.space, trial))
        while plan is not None:
            with self._lock:
                if self._claim(study, trial, plan, self._others(study, trial)):
                    return
            _pause()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The rate indices of all layers with more than one legal rate."""
        return {
            name: distribution
            for name, distribution in index_distributions(self.space).items()
            if not distribution.single()
        }

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The rate indices of the policy's next plan. Other parameters go to the independent sampler.

        Raises PolicyDone if the policy has no plan, and FnetError if it fails.
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
        """Samples a parameter that is not a layer's rate."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Stops ``study.optimize`` once the policy is done."""
        self._independent.after_trial(study, trial, state, values)
        if _loop(study) and self._over(study, _as_stored(trial, state, values)):
            study.stop()

    def history(self, study: Study) -> History:
        """The history of a study as the policy sees it now.

        Raises ValueError for a trial with several values whose evaluation was not reported.
        """
        with self._lock:
            return self._past.of(study, _trials(study))

    def _over(self, study: Study, ended: FrozenTrial) -> bool:
        trials = [*self._others(study, ended), ended]
        if any(trial.state is TrialState.WAITING for trial in trials):
            return False
        with self._lock, suppress(FnetError, ValueError):  # raised again when a plan is asked for
            history = self._past.of(study, trials)
            self._past.forget(ended)
            return not history.running and self._next(history) is None
        return False

    def _suggest(self, study: Study, trial: FrozenTrial) -> FactorizationPlan:
        begun = warned = time.monotonic()
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
            loop = _loop(study)  # an enqueued plan waits for the next trial, perhaps of this worker
            if not history.running or loop is None or loop._stop_flag or TrialState.WAITING in states:
                done = PolicyDone(len(history.running))
                _set(study, trial, REASON, str(done))
                raise done
            with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
                optuna.storages.fail_stale_trials(study)  # those of dead workers, in storages with heartbeats
            if time.monotonic() - warned > _WARN_EVERY:
                warned = time.monotonic()
                optuna.logging.get_logger(__name__).warning(
                    f"trial {trial.number} has waited {warned - begun:.0f} s for one of {len(history.running)} running "
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
        """Writes the plan into the trial, then checks whether another worker has written the same since `others` was
        read. Returns whether the claim holds.

        Every worker writes first and reads afterwards, so of two workers with the same plan at least one sees the other
        and withdraws: no plan is trained twice.
        """
        history = self._past.of(study, (trial for trial in others if trial.state is not TrialState.WAITING))
        write_constraints(study._storage, trial, self.constraints)
        for name, value in suggestion_attributes(self.space, history.number, plan).items():
            _set(study, trial, name, value)
        before = {trial.number: _claimed(trial) for trial in others}
        for other in self._others(study, trial):
            number, text = _claimed(other)
            counts = other.state not in (TrialState.WAITING, TrialState.FAIL)
            new = counts and (number, text) != before.get(other.number)
            if new and (number == history.number or text == str(plan)):
                _set(study, trial, NUMBER, None)
                _set(study, trial, PLAN, None)
                return False
        if reason := history.refusal(plan):
            _set(study, trial, REASON, reason)
        return True

    def _others(self, study: Study, trial: FrozenTrial) -> list[FrozenTrial]:
        return [other for other in _trials(study) if other.number != trial.number]


def suggest_plan(trial: Trial, space: Macroarchitecture, constraints: Constraints | None = None) -> FactorizationPlan:
    """The plan that a trial should train, from one integer parameter for each factorizable layer: the index of its
    rate.

    Works with any sampler. `constraints` default to those of the study's `PolicySampler`, if it has one. Raises
    ``optuna.TrialPruned``, with the reason, for a plan that they refuse or that repeats another one, and PolicyDone (a
    ``TrialPruned``) if the policy has no plan. Raises FnetError if `space` is not that of the sampler.
    """
    sampler = trial.study.sampler
    if isinstance(sampler, PolicySampler) and index_distributions(sampler.space) != index_distributions(space):
        raise FnetError(f"the sampler chooses plans of space {sampler.space.name!r}, not of {space.name!r}")
    params = {layer: trial.suggest_int(layer, 0, len(rates) - 1) for layer, rates in legal_rates(space).items()}
    plan, now = plan_from_indices(space, params), _now(trial)
    if plan is None:  # Optuna does not check enqueued values
        reason = f"the parameters {params} stand for no plan of space {space.name!r}"
        trial.set_user_attr(REASON, reason)
        raise optuna.TrialPruned(reason)
    limits, number = _limits(now, constraints), now.user_attrs.get(NUMBER, trial.number)
    reason = now.user_attrs.get(REASON, "")
    if now.user_attrs.get(PLAN) != str(plan):  # from another sampler, or one that wraps ours and fixes rates
        for name, value in suggestion_attributes(space, number, plan).items():
            trial.set_user_attr(name, value)
        reason = limits.refusal(plan_cost(space, plan)) or (_repeats(trial, plan) if read_constraints(now) else "")
    if reason:
        write_evaluation(trial, limits, Evaluation.of(space, plan, number=number, state="refused", reason=reason))
        raise optuna.TrialPruned(reason)
    return plan


def report_evaluation(trial: Trial, evaluation: Evaluation, constraints: Constraints | None = None) -> float:
    """Writes a whole evaluation into the trial and returns the objective's value: the quint8 score under the metric of
    the constraints, a fraction of 1 (1 minus the score in a study that minimises).

    All of it, layer statistics included, becomes trial attributes; constraint violations are set with
    ``Trial.set_constraint``. `constraints` as for `suggest_plan`. Raises ``optuna.TrialPruned`` for a pruned or refused
    evaluation, and FnetError for a failed one or one of another plan.
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
    """A reason that names the trial which has this plan already; empty if none has."""
    for other in _trials(trial.study):
        same = other.user_attrs.get(PLAN) == str(plan)
        if same and other.number != trial.number and other.state is not TrialState.FAIL:
            return f"repeats trial {other.number}"
    return ""


def _trials(study: Study) -> list[FrozenTrial]:
    """All trials of a study, also if a pruner shows the sampler only a part of them."""
    return study._storage.get_all_trials(study._study_id, deepcopy=False)


def _loop(study: Study) -> Study | None:
    """The study if this thread is in its ``optimize``, else None. Unwraps the view that a pruner may pass to
    samplers."""
    own: Study = getattr(study, "_study", study)
    return own if own._thread_local.in_optimize_loop else None


def _now(trial: Trial) -> FrozenTrial:
    """The stored state of a trial, with attributes that the sampler wrote and the `Trial` object does not see."""
    return trial.study._storage.get_trial(trial._trial_id)


def _set(study: Study, trial: FrozenTrial, name: str, value: Any) -> None:
    study._storage.set_trial_user_attr(trial._trial_id, name, value)


def _claimed(trial: FrozenTrial) -> tuple[int | None, str | None]:
    return trial.user_attrs.get(NUMBER), trial.user_attrs.get(PLAN)


def _pause() -> None:
    """Waits a random time, so that two workers which withdrew for each other do not collide again."""
    time.sleep(random.uniform(0, _POLL))


def _as_stored(trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> FrozenTrial:
    """A copy of the trial as Optuna is about to store it."""
    ended = copy.copy(trial)
    ended.state = state
    ended.values = None if values is None else list(values)
    return ended
