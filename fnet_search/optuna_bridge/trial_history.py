"""The trials of a study that anybody made, as a policy sees them. No torch."""

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
"""A plan whose trial failed is suggested again, since its worker may have died; after so many it counts as failed."""


@dataclass
class TrialHistory:
    """Makes a `History` of trials: of what was reported, else of an objective's values; keeps what has ended.

    Trials whose parameters stand for no plan of the space are left out, with one warning.
    """

    space: Macroarchitecture
    constraints: Constraints
    seed: int
    probes: Probes | None
    _study: tuple[BaseStorage, int] | None = field(default=None, init=False, repr=False)
    _ended: dict[int, Evaluation | None] = field(default_factory=dict, init=False, repr=False)
    """A cache of that study: by trial its evaluation. Trials that ended do not change any more."""
    _warned: bool = field(default=False, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_study": None, "_ended": {}}

    def of(self, study: Study, trials: Iterable[FrozenTrial]) -> History:
        """Running are the plans of running trials, and last those of enqueued ones, which have no number yet.

        Raises ValueError for a trial whose evaluation was not reported, and that has several values, or whose value
        cannot be taken for what the constraints' metric compares.
        """
        if self._study != (study._storage, study._study_id):
            self._study, self._ended = (study._storage, study._study_id), {}
        evaluations, running = dict[int, Evaluation](), dict[int, FactorizationPlan]()
        unnumbered, waiting, strange = list[Evaluation](), list[FactorizationPlan](), list[FrozenTrial]()
        failures = Counter[FactorizationPlan]()
        for trial in trials:
            number = trial.user_attrs.get(NUMBER)
            if trial.state.is_finished():
                evaluation = self._evaluation(study, trial, failures)
                if evaluation is None:
                    strange += [trial] if _unread(trial) else []
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
        self._warn(strange)
        for evaluation in unnumbered:  # added by other means than suggestions
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
        """What was read of a trial that is not stored as ended yet, and may not be."""
        self._ended.pop(trial._trial_id, None)

    def _plan(self, trial: FrozenTrial) -> FactorizationPlan | None:
        """Of an unfinished trial: of its parameters, or before they are sampled of what it has fixed or claimed."""
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
        """None for one that never had a plan, and for failed ones, until their plan failed too often."""
        if trial._trial_id in self._ended:
            return self._ended[trial._trial_id]
        plan, reported = plan_of_trial(self.space, trial), read_evaluation(trial)
        if reported is not None and written_plan(self.space, str(reported.plan)) is None:
            plan = None  # of another space, whose parameters have the same names
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
        """What an objective that reports no evaluation tells."""
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
    """Whether a trial that ended, and gave no evaluation, might have given one: nobody said why not."""
    return bool(trial.params) and trial.state is not TrialState.FAIL and REASON not in trial.user_attrs


def accuracy_of(study: Study, value: float) -> float:
    """Of an objective's value, and the value of an accuracy: where a study minimises, errors are meant."""
    return 1 - value if study.directions[0] is StudyDirection.MINIMIZE else value
