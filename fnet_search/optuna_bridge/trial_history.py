"""The history that a policy sees of any Optuna study. No torch."""

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan
from fnet_search.base.units import counted
from fnet_search.optuna_bridge.trials import (
    NUMBER,
    PLAN,
    REASON,
    fixed_indices,
    plan_from_indices,
    plan_of_trial,
    read_evaluation,
    written_plan,
)
from fnet_search.policy.asktell import lowest_free
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation, Probes
from fnet_search.policy.protocol import History

FAILURES = 3
"""A plan whose trial failed is suggested again, since its worker may have died; after this many failures it counts as
failed."""


@dataclass
class TrialHistory:
    """Turns the trials of a study into a `History`: from reported evaluations, or else from the objective's values.

    Evaluations of trials that have ended are cached. Trials whose parameters are not a plan of the space are left out,
    with one warning.
    """

    space: Macroarchitecture
    constraints: Constraints
    seed: int
    probes: Probes | None
    _study: tuple[BaseStorage, int] | None = field(default=None, init=False, repr=False)
    _ended: dict[int, Evaluation | None] = field(default_factory=dict, init=False, repr=False)
    """A cache for that study: the evaluation of each trial that has ended, which never changes."""
    _warned: bool = field(default=False, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_study": None, "_ended": {}}

    def of(self, study: Study, trials: Iterable[FrozenTrial]) -> History:
        """The history of `trials`. Its running plans are those of running trials, then those of enqueued ones, which
        have no number yet.

        Raises ValueError for a trial without a reported evaluation that has several values, or a value that is not the
        score under the constraints' metric.
        """
        if self._study != (study._storage, study._study_id):
            self._study, self._ended = (study._storage, study._study_id), {}
        evaluations, running = dict[int, Evaluation](), dict[int, FactorizationPlan]()
        unnumbered, waiting, unreadable = list[Evaluation](), list[FactorizationPlan](), list[FrozenTrial]()
        failures = Counter[FactorizationPlan]()
        for trial in trials:
            number = trial.user_attrs.get(NUMBER)
            if trial.state.is_finished():
                evaluation = self._evaluation(study, trial, failures)
                if evaluation is None:
                    unreadable += [trial] if _unread(trial) else []
                    continue
                if number is None or number in evaluations:
                    unnumbered.append(evaluation)
                else:
                    evaluations[number] = evaluation
            elif (plan := self._plan(trial)) is not None:
                if number is None or number in running or trial.state is TrialState.WAITING:
                    waiting.append(plan)
                else:
                    running[number] = plan
        self._warn(unreadable)
        for evaluation in unnumbered:  # of trials that were added without a suggestion
            number = lowest_free(evaluations.keys() | running.keys())
            evaluations[number] = replace(evaluation, number=number)
        return History(
            self.space,
            self.constraints,
            tuple(evaluations[number] for number in sorted(evaluations)),
            (*(running[number] for number in sorted(running)), *waiting),
            lowest_free(evaluations.keys() | running.keys()),
            self.seed,
            self.probes,
        )

    def forget(self, trial: FrozenTrial) -> None:
        """Drops the cached evaluation of a trial that was read as ended before Optuna has stored it as such."""
        self._ended.pop(trial._trial_id, None)

    def _plan(self, trial: FrozenTrial) -> FactorizationPlan | None:
        """The plan of an unfinished trial: from its parameters or, before they are sampled, from what is fixed or
        claimed."""
        plan = plan_of_trial(self.space, trial) or plan_from_indices(self.space, fixed_indices(self.space, trial))
        return plan or written_plan(self.space, str(trial.user_attrs.get(PLAN, "")))

    def _warn(self, trials: list[FrozenTrial]) -> None:
        if trials and not self._warned:
            self._warned = True
            few = ", ".join(str(trial.number) for trial in trials[:5]) + (", ..." if len(trials) > 5 else "")
            warnings.warn(
                f"left out of the policy's history: {counted(len(trials), 'trial')} of the study ({few}), whose "
                f"parameters stand for no plan of space {self.space.name!r}; for each layer there must be the index of "
                "its rate, or rates to choose from",
                stacklevel=2,
            )

    def _evaluation(self, study: Study, trial: FrozenTrial, failures: Counter[FactorizationPlan]) -> Evaluation | None:
        """The evaluation of a finished trial. None for a trial without a plan, and for a failed one whose plan has
        failed fewer than FAILURES times."""
        if trial._trial_id in self._ended:
            return self._ended[trial._trial_id]
        plan, reported = plan_of_trial(self.space, trial), read_evaluation(trial)
        if reported is not None and written_plan(self.space, str(reported.plan)) is None:
            plan = None  # of another space with the same layer names
        if plan is not None and reported is None and trial.state is TrialState.FAIL:
            failures[plan] += 1
            if failures[plan] != FAILURES:
                return None
            number, reason = trial.user_attrs.get(NUMBER, 0), f"{FAILURES} trials failed"
            return Evaluation.of(self.space, plan, number=number, state="failed", reason=reason)
        evaluation = None if plan is None else reported or self._measured(study, trial, plan)
        self._ended[trial._trial_id] = evaluation
        return evaluation

    def _measured(self, study: Study, trial: FrozenTrial, plan: FactorizationPlan) -> Evaluation:
        """The evaluation of a trial whose objective reported none, from its values."""
        reason = trial.user_attrs.get(REASON, "")
        known: dict[str, Any] = {"number": trial.user_attrs.get(NUMBER, 0)}
        if trial.state is TrialState.PRUNED:
            known["state"], known["reason"] = ("refused", reason) if reason else ("pruned", "stopped by a pruner")
            steps = sorted(trial.intermediate_values.items())
            known["accuracies"] = tuple(accuracy_of(study, value) for _, value in steps)
        elif self.constraints.metric != "accuracy":
            raise ValueError(
                f"trial {trial.number} has no results by class, which {self.constraints.measured} is taken from: end "
                "the objective with report_evaluation(trial, evaluation)"
            )
        elif len(trial.values) == 1:
            known["quint8_accuracy"] = accuracy_of(study, trial.values[0])
        else:
            raise ValueError(
                f"trial {trial.number} has {len(trial.values)} values; a policy needs the whole evaluation: end the "
                "objective with report_evaluation(trial, evaluation)"
            )
        return Evaluation.of(self.space, plan, **known)


def _unread(trial: FrozenTrial) -> bool:
    """Whether a finished trial without an evaluation was expected to have one: it did not fail and gives no reason."""
    return bool(trial.params) and trial.state is not TrialState.FAIL and REASON not in trial.user_attrs


def accuracy_of(study: Study, value: float) -> float:
    """The accuracy that an objective's value stands for, and the inverse: a study that minimises has errors, 1 -
    accuracy."""
    return 1 - value if study.directions[0] is StudyDirection.MINIMIZE else value
