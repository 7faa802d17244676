"""The search: a policy proposes plans, refused ones are recorded, the others trained, until nothing is left to do.

This is the file to read first. The files around it:

    policy/protocol.py        what a policy sees and returns
    policy/asktell.py         asks a policy for the next plan that may be trained
    candidates/evaluate.py    from a plan to its evaluation
    candidates/workers.py     the processes that train
    engine/study_record.py    the Optuna study and run folder that a search is recorded in
    optuna_bridge/leases.py   which process trains which candidate
    engine/run.py             a whole run, which calls `search`
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import FactorizationPlan, regular
from fnet_search.candidates.job import Job
from fnet_search.candidates.pool import Finished, Pool, Probed, Probing, Progressed
from fnet_search.candidates.probes import ProbeTask
from fnet_search.optuna_bridge.leases import Claim
from fnet_search.policy import asktell
from fnet_search.policy.asktell import Refused, propose
from fnet_search.policy.evaluation import Evaluation, Probe, Role
from fnet_search.policy.protocol import FISHER, History, Policy, requirements
from fnet_search.training.deadline import Deadline, TimeUp
from fnet_search.training.train import TrainingProgress


@dataclass(frozen=True)
class Started:
    """A worker has started to train a candidate; `again` if the candidate was lost by another process and taken
    over."""

    job: Job
    again: bool = False


@dataclass(frozen=True)
class Dropped:
    """A candidate whose evaluation does not count, because another process has taken it over from this one."""

    number: int


@dataclass(frozen=True)
class ProbesProgressed:
    """`done` of the `total` rates to be probed, of all layers together, are measured."""

    done: int
    total: int


Event = Refused | Started | Progressed | Finished | Dropped | ProbesProgressed


class SearchRecord(asktell.SuggestionRecord, Protocol):
    """The record of a search, which other processes may share."""

    def lost(self) -> Claim | None:
        """The lost candidate with the lowest number, to be taken over; None if there is none."""
        ...

    def wait(self) -> None:
        """Waits a moment for other processes, if there are any, and reads what they have recorded."""
        ...

    def start(self, plan: FactorizationPlan, role: Role, number: int | None = None) -> Job | None:
        """Records that a plan is trained now, and what it starts from. Returns the job.

        None if another process was faster, or if too many workers were lost over the candidate.

        Args:
            number: that of a lost candidate; None: the next free one.
        """
        ...

    def progress(self, number: int, progress: TrainingProgress) -> bool:
        """Records the progress of a training. Returns whether it must stop at the end of this epoch: it is hopeless, or
        another process has taken it over."""
        ...

    def finish(self, evaluation: Evaluation, seconds: float) -> bool:
        """Records an evaluation that is complete, pruned or failed. Returns whether it counts: not if another process
        has taken the candidate over."""
        ...

    def to_probe(self, fisher: bool) -> list[ProbeTask]:
        """The probes still to be measured, on the regular network, or if that failed on the least factorized trained
        one. Raises FnetError if no network was trained."""
        ...

    def probed(self, task: ProbeTask, probes: tuple[Probe, ...]) -> None:
        """Records the probes of a task."""
        ...

    def to_finish(self) -> Evaluation | None:
        """The best candidate, if its final training is still to come; else None."""
        ...


def search(
    policy: Policy, record: SearchRecord, pool: Pool, trials: int, deadline: Deadline | None = None
) -> Iterator[Event]:
    """Searches until `trials` candidates are trained (failed and pruned ones count) or the policy is done. Yields an
    event for whatever happens.

    The phases, each of which ends when all processes that share the record are done with it:

    1. If candidates start from others, or the policy requires probes, the regular network is trained, even above the
       ceilings.
    2. If the policy requires probes, and candidates are still to be trained, the regular network is probed.
    3. The policy's plans are trained. No process trains what another does.
    4. If the fidelity asks for it, the best candidate is trained on (`Fidelity.final_epochs`).

    Raises FnetError for a policy that fails or suggests a plan that does not belong to the space, and TimeUp at the
    deadline.
    """
    host, required = _Host(record, pool, deadline or Deadline()), requirements(policy)
    if pool.setup.fidelity.warm_start or required:
        yield from host.until_done(host.reference)
    if required and trained(record.history().evaluations) < trials:
        yield from host.probes(FISHER in required)
    yield from host.until_done(partial(host.fill, policy, trials))
    yield from host.until_done(host.final)


Phase = Generator[Event, None, bool]
"""Starts the work of a phase that can be started now. Returns whether the phase is done, in other processes too."""


@dataclass(frozen=True)
class _Host:
    """Gives work to the workers, and records the results."""

    record: SearchRecord
    pool: Pool
    deadline: Deadline

    def until_done(self, phase: Callable[[], Phase]) -> Iterator[Event]:
        """Carries a phase out: takes over lost candidates, starts work, and waits for workers and other processes,
        until the phase is done."""
        while True:
            while self.pool.busy < self.pool.count and (lost := self.record.lost()) is not None:
                yield from self.train(lost.plan, "candidate", lost.number)
            done = yield from phase()
            if self.pool.busy:
                yield from self.events()
            elif done:
                return
            else:
                self.deadline.check(idle=True)
                self.record.wait()

    def reference(self) -> Phase:
        """Trains the regular network, once. Within the ceilings it is a candidate like others, and may win; above them
        it is the reference."""
        history = self.record.history()
        plan = regular(history.space)
        if any(evaluation.plan == plan and evaluation.state != "refused" for evaluation in history.evaluations):
            return True
        if plan not in history.running:
            refusal = history.constraints.refusal(plan_cost(history.space, plan))
            yield from self.train(plan, "reference" if refusal else "candidate")
        return False

    def probes(self, fisher: bool) -> Iterator[Event]:
        """Probes each rate of each layer of a trained network. Each layer is a task, given to any worker that is
        idle."""
        tasks = self.record.to_probe(fisher)
        done, total = dict.fromkeys(tasks, 0), sum(len(task.rates) for task in tasks)
        if tasks:
            yield ProbesProgressed(0, total)
        submitted = set[ProbeTask]()
        while True:
            waiting = [task for task in self.record.to_probe(fisher) if task not in submitted]
            for task in waiting[: self.pool.count - self.pool.busy] if not self.deadline.over else []:
                self.pool.submit(task)
                submitted.add(task)
            if not self.pool.busy:
                if waiting:
                    raise TimeUp
                return
            for event in self.pool.events():
                if isinstance(event, Probing):
                    done[event.task] = event.done
                    yield ProbesProgressed(sum(done.values()), total)
                if isinstance(event, Probed):
                    self.record.probed(event.task, event.probes)
                    self.deadline.worked = True

    def fill(self, policy: Policy, trials: int) -> Phase:
        """Asks the policy for plans and has them trained, until every worker is busy, `trials` candidates are trained
        or running, the policy has no plan for now, or the time is up."""

        def enough(history: History) -> bool:
            return trained(history.evaluations) + len(history.running) >= trials

        while self.pool.busy < self.pool.count and not (self.pool.busy and self.deadline.over):
            before = self.record.history()
            plan = yield from propose(policy, self.record, enough)
            if plan is None:  # final only if nothing was running, and no other process has started anything meanwhile
                return not before.running and self.record.history().number == before.number
            yield from self.train(plan, "candidate")
        return False

    def final(self) -> Phase:
        """Trains the best candidate on, once nothing else is running: until then another may become the best."""
        running = self.record.history().running
        best = None if running else self.record.to_finish()
        if best is not None:
            yield from self.train(best.plan, "final")
        return not running and best is None

    def train(self, plan: FactorizationPlan, role: Role, number: int | None = None) -> Iterator[Event]:
        """Gives a plan to an idle worker, unless another process was faster."""
        self.deadline.check()
        job = self.record.start(plan, role, number)
        if job is not None:
            self.deadline.begin(job.number)
            yield Started(job, again=number is not None)
            self.pool.submit(job)

    def events(self) -> Iterator[Event]:
        """Waits for the next events of the trainings, and records them. Raises TimeUp if the deadline holds all of
        them at the end of an epoch."""
        if self.pool.paused == self.pool.busy:
            raise TimeUp

        def judge(number: int, progress: TrainingProgress) -> bool | None:  # None: wait (`pool.Judge`)
            stop = self.record.progress(number, progress)
            return None if progress.ended and self.deadline.must_pause(number, progress) and not stop else stop

        for event in self.pool.events(judge):
            assert isinstance(event, Progressed | Finished)
            if isinstance(event, Finished) and not self.record.finish(event.evaluation, event.seconds):
                yield Dropped(event.evaluation.number)
            else:
                yield event


def trained(evaluations: Iterable[Evaluation]) -> int:
    """The number of candidates that were trained, wholly or in part: references and final trainings do not count."""
    return sum(evaluation.state != "refused" and evaluation.role == "candidate" for evaluation in evaluations)
