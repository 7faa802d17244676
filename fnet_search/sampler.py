"""A policy as an Optuna sampler: in anybody's study, with any storage. No torch.

study = optuna.create_study(direction="maximize", sampler=PolicySampler(ReversePyramid(), space))
study.optimize(lambda trial: train(suggest_plan(trial, space)))
"""

import copy
import random
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from fnet_search.asktell import REFUSALS_IN_A_ROW, lowest_free, suggestion
from fnet_search.errors import FnetError
from fnet_search.macro import Macroarchitecture
from fnet_search.plan import FactorizationPlan, legal_rates, make_plan, parse_plan, plan_cost
from fnet_search.policy import Constraints, Evaluation, History, Policy, Probes, probes_of, requirements
from fnet_search.trials import (
    EVALUATION,
    NUMBER,
    PLAN,
    REASON,
    describe,
    distributions,
    outcome,
    parameters,
    plan_of,
    recorded,
    suggested,
)

FAILURES = 3
"""A plan whose trial failed is suggested again, since its worker may have died; after so many it counts as failed."""

_POLL, _TOLD = 0.2, 60.0
"""Seconds between looks at the storage while a worker waits for others, and until it says so."""


class PolicyDone(FnetError, optuna.TrialPruned):  # noqa: N818 (as TrialPruned)
    """The policy has no plan for a trial: for now, while `running` plans are still out; for good, when none is.

    Under ``study.optimize`` nobody sees it: the trial counts as pruned, and the study stops. Under ask-and-tell tell
    the trial as ``TrialState.PRUNED``, and ask again when a running one is told, or stop.
    """

    def __init__(self, running: int) -> None:
        waits = f"until one of {running} running ones is told"
        super().__init__(f"the policy has no plan {waits}" if running else "the policy is done")
        self.running = running


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
        if requirements(policy):
            probes_of(History(space, probes=probes), policy)
        self._independent = independent_sampler or RandomSampler(seed=seed)
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        """Caches: by trial what its evaluation is, of the study that was asked for last; and the last suggestion."""
        self._study: tuple[BaseStorage, int] | None = None
        self._known: dict[int, Evaluation | None] = {}
        self._asked: tuple[History, FactorizationPlan | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        cached = ("_lock", "_study", "_known", "_asked")
        return {name: value for name, value in self.__dict__.items() if name not in cached}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
        self._forget()

    def reseed_rng(self) -> None:
        """Of the parameters that are not ours: a policy's random numbers come from seed and number alone."""
        self._independent.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Numbers a trial all of whose rates are fixed, as by ``enqueue_trial``: it is never sampled."""
        self._independent.before_trial(study, trial)
        if (plan := plan_of(self.space, _fixed(trial))) is not None:
            with self._lock:
                while not self._claim(study, trial, plan, self._others(study, trial)):
                    _pause()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The rates of all layers that have a choice."""
        return {name: one for name, one in distributions(self.space).items() if not one.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The policy's next plan, as the indices of its rates; parameters that are not ours are left to others.

        Raises PolicyDone, and FnetError for a policy that fails.
        """
        ours = search_space.keys() & distributions(self.space).keys()
        sampled = {
            name: self._independent.sample_independent(study, trial, name, one)
            for name, one in search_space.items()
            if name not in ours
        }
        if not ours:
            return sampled
        with self._lock:  # threads of one study ask one after the other
            plan = self._suggest(study, trial)
        return sampled | {layer: index for layer, index in parameters(self.space, plan).items() if layer in ours}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A parameter that is none of ours."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Stops the study where the policy has nothing more."""
        self._independent.after_trial(study, trial, state, values)
        if _optimizing(study) and self._over(study, _ended(trial, state, values)):
            study.stop()

    def history(self, study: Study) -> History:
        """The past of a study, as the policy sees it now.

        Raises ValueError for a trial with several values whose evaluation was not reported.
        """
        return self._history(study, _trials(study))

    def _over(self, study: Study, ended: FrozenTrial) -> bool:
        trials = [*self._others(study, ended), ended]
        if any(one.state is TrialState.WAITING for one in trials):
            return False
        history = self._history(study, trials)
        self._known.pop(ended._trial_id, None)  # it is not stored yet, and may not be
        return not history.running and self._next(history) is None

    def _suggest(self, study: Study, trial: FrozenTrial) -> FactorizationPlan:
        begun = said = time.monotonic()
        while True:
            others = self._others(study, trial)
            history = self._history(study, others)
            plan = self._next(history)
            if plan is not None:
                rates = legal_rates(self.space)
                fixed = {name: rates[name][index] for name, index in _fixed(trial).items() if name in rates}
                plan = make_plan(self.space, {**plan.by_layer, **fixed})
                if self._claim(study, trial, plan, others):
                    return plan
                _pause()
                continue
            running = len(history.running)
            if not running or not _optimizing(study):
                done = PolicyDone(running)
                _set(study, trial, REASON, str(done))
                raise done
            with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
                optuna.storages.fail_stale_trials(study)  # of workers that died, where the storage has heartbeats
            if time.monotonic() - said > _TOLD:
                said = time.monotonic()
                optuna.logging.get_logger(__name__).warning(
                    f"trial {trial.number} has waited {said - begun:.0f} s for one of {running} running trials to end; "
                    "tell those of dead workers as failed: study.tell(number, state=TrialState.FAIL)"
                )
            time.sleep(_POLL)

    def _next(self, history: History) -> FactorizationPlan | None:
        if self._asked is None or self._asked[0] != history:
            last = history.evaluations[-REFUSALS_IN_A_ROW:]
            if len(last) == REFUSALS_IN_A_ROW and all(one.state == "refused" for one in last):
                raise FnetError(f"{REFUSALS_IN_A_ROW} plans in a row had to be refused, lastly: {last[-1].reason}")
            self._asked = history, suggestion(self.policy, history)
        return self._asked[1]

    def _claim(self, study: Study, trial: FrozenTrial, plan: FactorizationPlan, others: list[FrozenTrial]) -> bool:
        """Writes that this trial has this plan, and looks whether a worker wrote the same since `others` were read.

        Of two that write and then look, one at least sees the other and gives way: no plan is out twice.
        """
        history = self._history(study, (one for one in others if one.state is not TrialState.WAITING))
        for name, value in suggested(self.space, history.number, plan).items():
            _set(study, trial, name, value)
        before = {one.number: _claimed(one) for one in others}
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

    def _history(self, study: Study, trials: Iterable[FrozenTrial]) -> History:
        if self._study != (study._storage, study._study_id):
            self._forget()
            self._study = study._storage, study._study_id
        evaluations, running = dict[int, Evaluation](), dict[int, FactorizationPlan]()
        unnumbered, waiting = list[Evaluation](), list[FactorizationPlan]()
        failures = Counter[FactorizationPlan]()
        for trial in trials:
            number = trial.user_attrs.get(NUMBER)
            if trial.state.is_finished():
                one = self._evaluation(study, trial, failures)
                if one is None:
                    continue
                if number is None or number in evaluations:
                    unnumbered.append(one)
                else:
                    evaluations[number] = one
            elif (plan := self._plan(trial)) is not None:
                if number is None or trial.state is TrialState.WAITING:
                    waiting.append(plan)
                else:
                    running[number] = plan
        for one in unnumbered:  # added by other means than suggestions
            number = lowest_free(evaluations.keys() | running.keys())
            evaluations[number] = replace(one, number=number)
        return History(
            self.space,
            self.constraints,
            tuple(evaluations[number] for number in sorted(evaluations)),
            (*(running[number] for number in sorted(running)), *waiting),
            lowest_free(evaluations.keys() | running.keys()),
            self.seed,
            self.probes,
        )

    def _plan(self, trial: FrozenTrial) -> FactorizationPlan | None:
        """Of an unfinished trial: of its parameters, or before they are sampled of what it has fixed or claimed."""
        plan = plan_of(self.space, trial.params) or plan_of(self.space, _fixed(trial))
        text = trial.user_attrs.get(PLAN)
        return parse_plan(self.space, text) if plan is None and text else plan

    def _evaluation(self, study: Study, trial: FrozenTrial, failures: Counter[FactorizationPlan]) -> Evaluation | None:
        """Of a finished trial. None for one that never had a plan, and for failed ones, until their plan failed too
        often."""
        if trial._trial_id in self._known:
            return self._known[trial._trial_id]
        plan = plan_of(self.space, trial.params)
        if plan is not None and trial.state is TrialState.FAIL and EVALUATION not in trial.system_attrs:
            failures[plan] += 1
            if failures[plan] != FAILURES:
                return None
            reason = f"{FAILURES} trials failed"
            failed = Evaluation.of(self.space, plan, state="failed", reason=reason)
            return replace(failed, number=trial.user_attrs.get(NUMBER, 0))
        self._known[trial._trial_id] = one = None if plan is None else self._measured(study, trial, plan)
        return one

    def _measured(self, study: Study, trial: FrozenTrial, plan: FactorizationPlan) -> Evaluation:
        attributes = trial.user_attrs
        if (reported := recorded(trial)) is not None:
            return reported
        reason = attributes.get(REASON, "")
        known: dict[str, Any] = {"number": attributes.get(NUMBER, 0)}
        if trial.state is TrialState.PRUNED:
            known["state"], known["reason"] = ("refused", reason) if reason else ("pruned", "stopped by a pruner")
            steps = sorted(trial.intermediate_values.items())
            known["accuracies"] = tuple(_accuracy(study, value) for _, value in steps)
        elif len(trial.values) == 1:
            known["quint8_accuracy"] = _accuracy(study, trial.values[0])
        else:
            raise ValueError(
                f"trial {trial.number} has {len(trial.values)} values; a policy needs the whole evaluation: end the "
                "objective with report_evaluation(trial, evaluation)"
            )
        return Evaluation.of(self.space, plan, **known)


def suggest_plan(trial: Trial, space: Macroarchitecture, constraints: Constraints | None = None) -> FactorizationPlan:
    """The plan that a trial is to train: for each factorizable layer the index of its rate, as an integer parameter.

    For any sampler. `constraints` are those of the study's `PolicySampler`, where it has one. Raises
    ``optuna.TrialPruned``, with the reason, for a plan that they refuse or that repeats another; PolicyDone, which is
    a ``TrialPruned`` too, where the policy has none.
    """
    limits = _limits(trial, constraints)
    layers = legal_rates(space).items()
    plan = plan_of(space, {layer: trial.suggest_int(layer, 0, len(rates) - 1) for layer, rates in layers})
    assert plan is not None
    known = _attributes(trial)
    reason = known.get(REASON, "")
    if known.get(PLAN) != str(plan):  # another sampler, or one that fixes some rates
        for name, value in suggested(space, known.get(NUMBER, trial.number), plan).items():
            trial.set_user_attr(name, value)
        reason = limits.refusal(plan_cost(space, plan))
    if reason:
        refused = Evaluation.of(space, plan, number=known.get(NUMBER, trial.number), state="refused", reason=reason)
        describe(trial, limits, refused)
        raise optuna.TrialPruned(reason)
    return plan


def report_evaluation(trial: Trial, evaluation: Evaluation, constraints: Constraints | None = None) -> float:
    """Hands a whole evaluation back to the study, and returns the objective's value: its quint8 accuracy, a fraction
    of 1, or one less it where the study minimises.

    Everything is written to the trial's attributes, layer statistics included, and constraint violations with
    ``Trial.set_constraint``. `constraints` as for `suggest_plan`. Raises ``optuna.TrialPruned`` for an evaluation that
    was pruned or refused, and FnetError for a failed one or one of another plan than the trial's.
    """
    known = _attributes(trial)
    if known.get(PLAN) != str(evaluation.plan):
        raise FnetError(f"trial {trial.number} has plan {known.get(PLAN)}, the evaluation {evaluation.plan}")
    numbered = replace(evaluation, number=known[NUMBER])
    describe(trial, _limits(trial, constraints), numbered)
    value, state = outcome(numbered)
    if state is TrialState.PRUNED:
        raise optuna.TrialPruned(evaluation.reason)
    if state is TrialState.FAIL or value is None:
        raise FnetError(f"plan {evaluation.plan} failed: {evaluation.reason or 'it has no quint8 accuracy'}")
    return _accuracy(trial.study, value)


def _limits(trial: Trial, constraints: Constraints | None) -> Constraints:
    return constraints or getattr(trial.study.sampler, "constraints", None) or Constraints()


def _accuracy(study: Study, value: float) -> float:
    """Of an objective's value, and the value of an accuracy."""
    return 1 - value if study.directions[0] is StudyDirection.MINIMIZE else value


def _trials(study: Study) -> list[FrozenTrial]:
    """All of them: a pruner may show a sampler only its own part."""
    return study._storage.get_all_trials(study._study_id, deepcopy=False)


def _optimizing(study: Study) -> bool:
    """Whether this thread is in ``study.optimize``; a pruner may put a study of its own before a sampler."""
    loop: bool = getattr(study, "_study", study)._thread_local.in_optimize_loop
    return loop


def _attributes(trial: Trial) -> dict[str, Any]:
    """User attributes with those that a sampler wrote, which a running trial does not see."""
    return trial.study._storage.get_trial(trial._trial_id).user_attrs


def _set(study: Study, trial: FrozenTrial, name: str, value: Any) -> None:
    study._storage.set_trial_user_attr(trial._trial_id, name, value)


def _fixed(trial: FrozenTrial) -> dict[str, Any]:
    fixed: dict[str, Any] = trial.system_attrs.get("fixed_params", {})
    return fixed


def _claimed(trial: FrozenTrial) -> tuple[int | None, str | None]:
    return trial.user_attrs.get(NUMBER), trial.user_attrs.get(PLAN)


def _pause() -> None:
    """Of two workers that give way to each other, one is first next time."""
    time.sleep(random.uniform(0, _POLL))


def _ended(trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> FrozenTrial:
    """As it is about to be stored."""
    ended = copy.copy(trial)
    ended.state = state
    ended.values = None if values is None else list(values)
    return ended
