"""Leases: which worker trains which suggestion, kept as trial attributes in any Optuna storage (docs/sharing.md).

A worker claims a suggestion by creating a running trial with the suggestion's number and a lease. The states of a
lease:

* *held*: claimed, and renewed since. The worker rewrites the lease BEATS times in `Ledger.seconds`.
* *withdrawn*: another trial of the same number came first. Storages number trials in one order, so all workers agree on
  which one that is.
* *told*: the worker has ended the trial with an evaluation.
* *released*: the worker has ended its work in order.
* *expired*: the lease has not changed for `Ledger.seconds`, by the clock of the process that watches it; clocks of
  different hosts are never compared.

The trial of a lease that is released or expired fails, and its candidate may be claimed again, in a new trial. A worker
that comes back after its lease has expired cannot tell an evaluation: the storage refuses to change a finished trial.
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
"""System attribute of a running trial: its worker, and the number of renewals."""
LEFT = "fnet_search:left"
"""System attribute of a failed trial without an evaluation: the reason (`LeaveReason`)."""
BEATS = 8
"""Renewals of a lease in the time after which it expires: up to seven in a row may be missed."""
TAKEOVERS = 5
"""A suggestion that was taken over this many times, and lost again, counts as failed: it may be what kills its
workers."""
JITTER = 1.0
"""Seconds. A process that was not the first to claim a suggestion waits a random time up to this long, so that those
who collided do not collide again."""

LeaveReason = Literal["expired", "released", "withdrawn"]
"""Its lease expired; its worker ended in order; another worker was first."""


@dataclass(frozen=True)
class Claim:
    """A suggestion without an evaluation, and its trial."""

    number: int
    plan: FactorizationPlan
    role: Role | None
    """None while the suggestion is only being refused."""
    trial_id: int
    parent: int | None = None
    """Number of the candidate that its training starts from."""


@dataclass
class Ledger:
    """The suggestions of a study by number: evaluated, claimed by some process, or lost.

    `worker` is the name of this process among those that share the study. It is the same for every process in one run
    folder, so that what an earlier process left there is taken over at once. None: the study is not shared.
    """

    study: Study
    space: Macroarchitecture
    on_evaluation: Callable[[Evaluation, FrozenTrial], None]
    """Called once with each evaluation, of this process or another, and its trial."""
    metric: MetricName = "accuracy"
    """The value of a trial is the evaluation's quint8 score under this metric."""
    worker: str | None = None
    seconds: float = LEASE_SECONDS
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    trials: dict[int, int] = field(default_factory=dict)
    """The trial ids of the evaluations."""
    claims: dict[int, Claim] = field(default_factory=dict)
    """Suggestions that a worker trains now."""
    lost: dict[int, Claim] = field(default_factory=dict)
    """Candidates to be claimed again."""
    takeovers: Counter[int] = field(default_factory=Counter)
    """How many workers were lost over each suggestion."""
    indexed: bool = False
    """Whether trial parameters are indices of rates, as in studies of earlier versions; otherwise they are rates."""
    _own: set[int] = field(default_factory=set)
    _closed: set[int] = field(default_factory=set)
    _leases: dict[int, tuple[Any, float]] = field(default_factory=dict)
    """For each trial of another worker: its lease, and the time (`time.monotonic`) at which this process saw it
    change."""

    def __post_init__(self) -> None:
        self._heartbeat = None if self.worker is None else Heartbeat(self.study._storage, self.worker, self.seconds)

    @property
    def numbers(self) -> set[int]:
        """The numbers that are taken."""
        return {*self.evaluations, *self.claims, *self.lost}

    def refresh(self) -> None:
        """Reads the study again. Ends the trials of workers that are gone; an evaluation that such a trial holds
        counts."""
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
            self.lost.pop(number, None)

    def _claim_of(self, trial: FrozenTrial) -> Claim | None:
        """The claim that a trial stands for; None for a trial that is not a suggestion of a run."""
        plan, facts = plan_of_trial(self.space, trial), trial.user_attrs
        if plan is None or NUMBER not in facts:
            return None
        return Claim(facts[NUMBER], plan, facts.get(ROLE), trial._trial_id, facts.get("parent"))

    def _has_worker(self, trial: FrozenTrial) -> bool:
        if trial._trial_id in self._own or NUMBER not in trial.user_attrs:  # the latter is no suggestion of a run
            return True
        lease, now = trial.system_attrs.get(LEASE), time.monotonic()
        if self.worker is None or (lease and lease["worker"] == self.worker):
            return False  # left by an earlier process, or created although the storage's answer was lost
        before, since = self._leases.setdefault(trial._trial_id, (lease, now))
        if lease != before:
            self._leases[trial._trial_id] = lease, now
            return True
        return now - since <= self.seconds

    def _end(self, trial: FrozenTrial) -> FrozenTrial:
        evaluation, lease = read_evaluation(trial), trial.system_attrs.get(LEASE, {})
        if evaluation is not None:  # the worker was killed between writing the evaluation and ending the trial
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
            if claim.role == "candidate":  # references and final trainings are begun anew by the search itself
                self.lost[claim.number] = claim

    def _take(self, evaluation: Evaluation, trial: FrozenTrial) -> None:
        if evaluation.number not in self.evaluations:
            self.evaluations[evaluation.number] = evaluation
            self.trials[evaluation.number] = trial._trial_id
            self.on_evaluation(evaluation, trial)

    def claim(self, number: int, plan: FactorizationPlan, facts: Mapping[str, Any] | None = None) -> Trial | None:
        """Claims a suggestion: a running trial, created with its attributes in one step. None if another process was
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
        if self._heartbeat is None:
            attributes = template.user_attrs
            self.claims[number] = Claim(number, plan, attributes.get(ROLE), trial_id, attributes.get("parent"))
            self.lost.pop(number, None)
            return Trial(self.study, trial_id)
        self._heartbeat.hold(trial_id)
        self.refresh()  # only now is it known whether this trial is the suggestion's first
        if number in self.evaluations or number not in self.claims or self.claims[number].trial_id != trial_id:
            self.leave(trial_id, "withdrawn")
            time.sleep(random.uniform(0, JITTER))
            return None
        return Trial(self.study, trial_id)

    def tell(self, trial: Trial, evaluation: Evaluation) -> bool:
        """Ends a trial with an evaluation that `write_evaluation` has written into it. Returns whether it counts; it
        does not if the suggestion was taken over."""
        told = self._tell(trial.number, evaluation)
        self._dropped(trial._trial_id)
        if not _counts(told, evaluation):
            return False
        self._closed.add(trial._trial_id)
        self.claims.pop(evaluation.number, None)
        self._take(evaluation, told)
        return True

    def _tell(self, number: int, evaluation: Evaluation) -> FrozenTrial:
        """Tells the trial with this number, Optuna's own, and returns it. A trial that was ended before stays as it
        is."""
        try:
            return self.study.tell(number, *value_and_state(evaluation, self.metric), skip_if_finished=True)
        except UpdateFinishedTrialError:  # ended by another process meanwhile, or by us and the answer was lost
            return next(trial for trial in self.study.get_trials(deepcopy=False) if trial.number == number)

    def leave(self, trial_id: int, why: LeaveReason) -> None:
        """Ends a trial of this process without an evaluation."""
        self._dropped(trial_id)
        _leave(self.study._storage, trial_id, why)

    def _dropped(self, trial_id: int) -> None:
        self._own.discard(trial_id)
        if self._heartbeat is not None:
            self._heartbeat.drop(trial_id)

    def close(self) -> None:
        """Ends the work of this process. In a shared study, others may claim its suggestions at once."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            for trial_id in list(self._own):
                self.leave(trial_id, "released")


def _lease(worker: str, beat: int) -> dict[str, Any]:
    return {LEASE: {"worker": worker, "beat": beat}}


def _leave(storage: BaseStorage, trial_id: int, why: LeaveReason) -> None:
    try:
        storage.set_trial_system_attr(trial_id, LEFT, why)
        storage.set_trial_state_values(trial_id, state=TrialState.FAIL)
    except UpdateFinishedTrialError:
        pass  # another process has ended it for the same reason, or its worker has


def _counts(trial: FrozenTrial, evaluation: Evaluation) -> bool:
    """Whether the trial was ended by its worker, with this evaluation. One that others ended has failed and has
    LEFT."""
    state = state_of(evaluation)
    return trial.state is state and (state is not TrialState.FAIL or LEFT not in trial.system_attrs)


class Heartbeat:
    """Renews leases in a thread until it is stopped."""

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
            except UpdateFinishedTrialError:  # ended or taken over, which the training worker learns on its own
                self.drop(trial_id)
            except Exception:  # whatever a storage raises: the search will meet the same error and report it
                continue
            else:
                if trial_id in self._beats:
                    self._beats[trial_id] = beat + 1
