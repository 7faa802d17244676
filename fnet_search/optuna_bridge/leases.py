"""Who works on a suggestion: leases on candidates, attributes of their trials in the Optuna storage, whichever it is.

A worker claims a suggestion by creating a running trial with its number. Storages number trials in one order, so that
of all trials of one suggestion the first counts: whoever came later withdraws. A lease beats: its worker rewrites it
every few seconds. Whoever sees one rest for `LEASE_SECONDS` by the own clock takes the suggestion over, in a new trial;
no two clocks are compared. The old trial has failed by then, and takes nothing more: a worker that comes back late is
told so by the storage, and what it did is dropped.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan
from fnet_search.optuna_bridge.storage_url import LEASE_SECONDS
from fnet_search.optuna_bridge.trials import (
    NUMBER,
    ROLE,
    index_distributions,
    index_parameters,
    plan_of_trial,
    rate_distributions,
    read_evaluation,
    state_of,
    suggestion_attributes,
    value_and_state,
)
from fnet_search.policy.evaluation import Evaluation, Role
from fnet_search.policy.metric import MetricName

LEASE = "fnet_search:lease"
"""System attribute of a running trial: its worker, and how often the lease was renewed."""
LEFT = "fnet_search:left"
"""System attribute of a failed trial that has no evaluation: why (`Left`)."""
BEATS = 8
"""So often a lease is renewed in that time."""
TAKEOVERS = 5
"""A suggestion that was taken over so often, and lost again, has failed."""

JITTER = 1.0
"""Seconds that a process waits at most, by chance, that was not the first to claim a suggestion: all others were as
fast, and would be again."""

Left = Literal["expired", "released", "withdrawn"]
"""The worker is gone; it has ended; another one was first."""


@dataclass(frozen=True)
class Claim:
    """A suggestion without an evaluation, and its trial."""

    number: int
    plan: FactorizationPlan
    role: Role | None
    """None where it is only being refused."""
    trial_id: int
    parent: int | None = None
    """Number of the network that its training starts from."""


@dataclass
class Ledger:
    """The suggestions of a study, by number: evaluated, worked on by whichever process, or left by one that is gone.

    `worker` is what this process is called among those that share the study: always the same in one run folder, so that
    what an earlier process left there is taken up at once. None: nobody else works on it.
    """

    study: Study
    space: Macroarchitecture
    taken: Callable[[Evaluation, FrozenTrial], None]
    """Told of each evaluation, of this process or another."""
    metric: MetricName = "accuracy"
    """Of the evaluations, what is the value of their trials."""
    worker: str | None = None
    seconds: float = LEASE_SECONDS
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    trials: dict[int, int] = field(default_factory=dict)
    """Of the evaluations: the ids of their trials."""
    claims: dict[int, Claim] = field(default_factory=dict)
    """Worked on now."""
    left: dict[int, Claim] = field(default_factory=dict)
    """Candidates to be taken over."""
    takeovers: Counter[int] = field(default_factory=Counter)
    """By number: how many workers were lost."""
    indexed: bool = False
    """Whether parameters are indices of rates, as in a study that an earlier version began; else they are rates."""
    _own: set[int] = field(default_factory=set)
    _closed: set[int] = field(default_factory=set)
    _leases: dict[int, tuple[Any, float]] = field(default_factory=dict)
    """By trial: its lease, and since when this process has not seen it renewed."""

    def __post_init__(self) -> None:
        self._heart = None if self.worker is None else Heart(self.study._storage, self.worker, self.seconds)

    @property
    def numbers(self) -> set[int]:
        """Those that no new suggestion may have."""
        return {*self.evaluations, *self.claims, *self.left}

    def refresh(self) -> None:
        """Looks at the study again. Trials whose worker is gone are ended; an evaluation that it left in one counts."""
        self.claims, indices = {}, index_distributions(self.space)
        for trial in self.study.get_trials(deepcopy=False):
            if trial._trial_id in self._closed:
                continue
            self.indexed |= trial.distributions == indices
            if not trial.state.is_finished() and not self._has_worker(trial):
                trial = self._end(trial)
            if trial.state.is_finished():
                self._close(trial)
            elif (claim := self._claim_of(trial)) is not None:
                self.claims.setdefault(claim.number, claim)
        for number in {*self.claims, *self.evaluations}:
            self.left.pop(number, None)

    def _claim_of(self, trial: FrozenTrial) -> Claim | None:
        """None for a trial of somebody else's."""
        plan, facts = plan_of_trial(self.space, trial), trial.user_attrs
        if plan is None or NUMBER not in facts:
            return None
        return Claim(facts[NUMBER], plan, facts.get(ROLE), trial._trial_id, facts.get("parent"))

    def _has_worker(self, trial: FrozenTrial) -> bool:
        if trial._trial_id in self._own or NUMBER not in trial.user_attrs:  # or it is no suggestion of ours
            return True
        lease, now = trial.system_attrs.get(LEASE), time.monotonic()
        if self.worker is None or (lease and lease["worker"] == self.worker):
            return False  # of an earlier process; or the storage created it, and the answer was lost
        before, since = self._leases.setdefault(trial._trial_id, (lease, now))
        if lease != before:
            self._leases[trial._trial_id] = lease, now
            return True
        return now - since <= self.seconds

    def _end(self, trial: FrozenTrial) -> FrozenTrial:
        evaluation, lease = read_evaluation(trial), trial.system_attrs.get(LEASE, {})
        if evaluation is not None:  # cut off between the two last writes
            return self._tell(trial.number, evaluation)
        _leave(self.study._storage, trial._trial_id, "released" if lease.get("worker") == self.worker else "expired")
        return self.study._storage.get_trial(trial._trial_id)

    def _close(self, trial: FrozenTrial) -> None:
        self._closed.add(trial._trial_id)
        self._leases.pop(trial._trial_id, None)
        evaluation, why, claim = read_evaluation(trial), trial.system_attrs.get(LEFT), self._claim_of(trial)
        if evaluation is not None and _counts(trial, evaluation):
            self._take(evaluation, trial)
        elif claim is not None and why in ("expired", "released"):
            self.takeovers[claim.number] += why == "expired"
            if claim.role == "candidate":  # the other trainings follow from what is recorded
                self.left[claim.number] = claim

    def _take(self, evaluation: Evaluation, trial: FrozenTrial) -> None:
        if evaluation.number not in self.evaluations:
            self.evaluations[evaluation.number] = evaluation
            self.trials[evaluation.number] = trial._trial_id
            self.taken(evaluation, trial)

    def claim(self, number: int, plan: FactorizationPlan, facts: Mapping[str, Any] | None = None) -> Trial | None:
        """A running trial of a suggestion, created with its attributes in one step; None where another process was
        faster."""
        lease = {} if self.worker is None else _lease(self.worker, 0)
        template = create_trial(
            state=TrialState.RUNNING,
            params=index_parameters(self.space, plan) if self.indexed else dict(plan.rates),
            distributions=index_distributions(self.space) if self.indexed else rate_distributions(self.space),
            user_attrs={**suggestion_attributes(self.space, number, plan), **(facts or {})},
            system_attrs=lease,
        )
        trial_id = self.study._storage.create_new_trial(self.study._study_id, template)
        self._own.add(trial_id)
        if self._heart is None:
            known = template.user_attrs
            self.claims[number] = Claim(number, plan, known.get(ROLE), trial_id, known.get("parent"))
            self.left.pop(number, None)
            return Trial(self.study, trial_id)
        self._heart.hold(trial_id)
        self.refresh()
        if number in self.evaluations or number not in self.claims or self.claims[number].trial_id != trial_id:
            self.leave(trial_id, "withdrawn")
            time.sleep(random.uniform(0, JITTER))
            return None
        return Trial(self.study, trial_id)

    def tell(self, trial: Trial, evaluation: Evaluation) -> bool:
        """Ends a trial with the evaluation that was described in it; whether it counts: not if it was taken over."""
        told = self._tell(trial.number, evaluation)
        self._dropped(trial._trial_id)
        if not _counts(told, evaluation):
            return False
        self._closed.add(trial._trial_id)
        self.claims.pop(evaluation.number, None)
        self._take(evaluation, told)
        return True

    def _tell(self, number: int, evaluation: Evaluation) -> FrozenTrial:
        """As Optuna numbers trials. One that was ended before stays as it is."""
        try:
            return self.study.tell(number, *value_and_state(evaluation, self.metric), skip_if_finished=True)
        except UpdateFinishedTrialError:  # between two steps, or the answer was lost
            return next(trial for trial in self.study.get_trials(deepcopy=False) if trial.number == number)

    def leave(self, trial_id: int, why: Left) -> None:
        """Ends a trial of this process without an evaluation."""
        self._dropped(trial_id)
        _leave(self.study._storage, trial_id, why)

    def _dropped(self, trial_id: int) -> None:
        self._own.discard(trial_id)
        if self._heart is not None:
            self._heart.drop(trial_id)

    def close(self) -> None:
        """Ends the work of this process: where the study is shared, others may take up its suggestions at once."""
        if self._heart is not None:
            self._heart.stop()
            for trial_id in list(self._own):
                self.leave(trial_id, "released")


def _lease(worker: str, beat: int) -> dict[str, Any]:
    return {LEASE: {"worker": worker, "beat": beat}}


def _leave(storage: BaseStorage, trial_id: int, why: Left) -> None:
    try:
        storage.set_trial_system_attr(trial_id, LEFT, why)
        storage.set_trial_state_values(trial_id, state=TrialState.FAIL)
    except UpdateFinishedTrialError:
        pass  # another process saw it too, or its worker has ended it


def _counts(trial: FrozenTrial, evaluation: Evaluation) -> bool:
    """Whether its worker ended the trial: one that was ended by others, meanwhile, has failed."""
    state = state_of(evaluation)
    return trial.state is state and (state is not TrialState.FAIL or LEFT not in trial.system_attrs)


class Heart:
    """Renews leases, in a thread of its own, until it is stopped."""

    def __init__(self, storage: BaseStorage, worker: str, seconds: float) -> None:
        self._storage, self._worker, self._pause = storage, worker, seconds / BEATS
        self._beats: dict[int, int] = {}
        self._stop = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def hold(self, trial_id: int) -> None:
        self._beats[trial_id] = 0

    def drop(self, trial_id: int) -> None:
        self._beats.pop(trial_id, None)

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._pause):
            self._beat(list(self._beats.items()))

    def _beat(self, beats: Iterable[tuple[int, int]]) -> None:
        for trial_id, beat in beats:
            try:
                self._storage.set_trial_system_attr(trial_id, LEASE, _lease(self._worker, beat + 1)[LEASE])
            except UpdateFinishedTrialError:  # finished, or taken over: who trains will be told too
                self.drop(trial_id)
            except Exception:  # whatever a storage raises: the search meets it as well, and says so
                continue
            else:
                if trial_id in self._beats:
                    self._beats[trial_id] = beat + 1
