"""The search: a policy proposes plans, refused ones are recorded, the others trained, until nothing is left to do.

This is the file to read first. Around it: `policy` (what a policy sees), `evaluate` (from a plan to an Evaluation),
`workers` (who trains), `study` (where it is recorded), `leases` (which process trains what), `run` (who calls).
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
    """A plan that a worker trains now; `again`: it was lost by another."""

    job: Job
    again: bool = False


@dataclass(frozen=True)
class Dropped:
    """A candidate that was taken over by another process, since this one was taken for dead; or never got started."""

    number: int


@dataclass(frozen=True)
class ProbesProgressed:
    """So many of the rates to be probed, over all layers, are measured."""

    done: int
    total: int


Event = Refused | Started | Progressed | Finished | Dropped | ProbesProgressed


class SearchRecord(asktell.SuggestionRecord, Protocol):
    """Where a search is recorded; other processes may work on it too."""

    def lost(self) -> Claim | None:
        """A candidate whose worker is gone, to be taken over."""
        ...

    def wait(self) -> None:
        """Waits a moment for what other processes do."""
        ...

    def start(self, plan: FactorizationPlan, role: Role, number: int | None = None) -> Job | None:
        """Records that a plan is being trained, and what it starts from; `number` is that of a lost candidate.

        None where another process was faster, or too many workers were lost over it.
        """
        ...

    def progress(self, number: int, progress: TrainingProgress) -> bool:
        """Takes note of how far a training is; whether it is to stop, as hopeless, at the end of an epoch."""
        ...

    def finish(self, evaluation: Evaluation, seconds: float) -> bool:
        """Records an evaluation: complete, pruned or failed; whether it counts: not if it was taken over."""
        ...

    def to_probe(self, fisher: bool) -> list[ProbeTask]:
        """What is still to be measured of the probes: of the regular network, or if that failed of the least factorized
        one that was trained. Raises FnetError where there is none."""
        ...

    def probed(self, task: ProbeTask, probes: tuple[Probe, ...]) -> None:
        """Records what a task measured."""
        ...

    def to_finish(self) -> Evaluation | None:
        """The best candidate, where its final training is still to come."""
        ...


def search(
    policy: Policy, record: SearchRecord, pool: Pool, trials: int, deadline: Deadline | None = None
) -> Iterator[Event]:
    """Runs until `trials` candidates are trained (failed and pruned ones count) or the policy is done; yields what
    happens.

    Other processes may share the record: none trains what another does, and all go on until everything is done. Where
    candidates start from others, or the policy requires probes, the regular network is trained first, above the
    ceilings too, and probed. The best candidate may be trained on at the end (`Fidelity`). Raises FnetError for a
    policy that fails or suggests a plan that is not of the space, and TimeUp at the deadline.
    """
    host, required = _Host(record, pool, deadline or Deadline()), requirements(policy)
    if pool.setup.fidelity.warm_start or required:
        yield from host.until_done(host.reference)
    if required and trained(record.history().evaluations) < trials:
        yield from host.probes(FISHER in required)
    yield from host.until_done(partial(host.fill, policy, trials))
    yield from host.until_done(host.final)


Phase = Generator[Event, None, bool]
"""Begins what there is to be begun; whether all of it is done, by other processes too."""


@dataclass(frozen=True)
class _Host:
    """Gives work to the workers, and records what comes of it."""

    record: SearchRecord
    pool: Pool
    deadline: Deadline

    def until_done(self, begin: Callable[[], Phase]) -> Iterator[Event]:
        """Takes over what others lost, begins what there is, and waits for news, until all is done."""
        while True:
            while self.pool.busy < self.pool.count and (lost := self.record.lost()) is not None:
                yield from self.train(lost.plan, "candidate", lost.number)
            done = yield from begin()
            if self.pool.busy:
                yield from self.events()
            elif done:
                return
            else:
                self.deadline.check(idle=True)
                self.record.wait()

    def reference(self) -> Phase:
        """The regular network, once. Within the ceilings it is a candidate like others, and may win."""
        history = self.record.history()
        plan = regular(history.space)
        if any(evaluation.plan == plan and evaluation.state != "refused" for evaluation in history.evaluations):
            return True
        if plan not in history.running:
            above = history.constraints.refusal(plan_cost(history.space, plan))
            yield from self.train(plan, "reference" if above else "candidate")
        return False

    def probes(self, fisher: bool) -> Iterator[Event]:
        """What each rate of each layer does to a trained network: a layer a task, shared between the workers."""
        tasks = self.record.to_probe(fisher)
        done, total = dict.fromkeys(tasks, 0), sum(len(task.rates) for task in tasks)
        if tasks:
            yield ProbesProgressed(0, total)
        given = set[ProbeTask]()
        while True:
            waiting = [task for task in self.record.to_probe(fisher) if task not in given]
            for task in waiting[: self.pool.count - self.pool.busy] if not self.deadline.over else []:
                self.pool.submit(task)
                given.add(task)
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
        """Asks for plans until every worker is busy, all trials are out, the policy has none for now, or time is up."""

        def enough(history: History) -> bool:
            return trained(history.evaluations) + len(history.running) >= trials

        while self.pool.busy < self.pool.count and not (self.pool.busy and self.deadline.over):
            before = self.record.history()
            plan = yield from propose(policy, self.record, enough)
            if plan is None:  # for good, if nothing was running, and nothing was begun meanwhile
                return not before.running and self.record.history().number == before.number
            yield from self.train(plan, "candidate")
        return False

    def final(self) -> Phase:
        """The best candidate is trained on, while nothing else is to be done."""
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
        """What happens next in the trainings. Raises TimeUp where all of them wait."""
        if self.pool.held == self.pool.busy:
            raise TimeUp

        def judge(number: int, progress: TrainingProgress) -> bool | None:
            stop = self.record.progress(number, progress)
            return None if progress.ended and self.deadline.holds(number, progress) and not stop else stop

        for event in self.pool.events(judge):
            assert isinstance(event, Progressed | Finished)
            if isinstance(event, Finished) and not self.record.finish(event.evaluation, event.seconds):
                yield Dropped(event.evaluation.number)
            else:
                yield event


def trained(evaluations: Iterable[Evaluation]) -> int:
    """How many candidates were trained, wholly or in part."""
    return sum(evaluation.state != "refused" and evaluation.role == "candidate" for evaluation in evaluations)
