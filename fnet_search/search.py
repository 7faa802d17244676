"""The search: a policy proposes plans, refused ones are recorded, the others trained, until nothing is left to do.

This is the file to read first. Around it: `policy` (what a policy sees), `evaluate` (from a plan to an Evaluation),
`workers` (who trains), `study` (where it is recorded), `cli` (who calls).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from fnet_search import asktell
from fnet_search.asktell import Refused, propose
from fnet_search.deadline import Deadline, TimeUp
from fnet_search.evaluate import Job
from fnet_search.plan import FactorizationPlan, plan_cost, regular
from fnet_search.policy import FISHER, Evaluation, History, Policy, Probe, Role, requirements
from fnet_search.probes import ProbeTask
from fnet_search.train import TrainingProgress
from fnet_search.workers import Finished, Probed, Probing, Progressed, WorkerPool


@dataclass(frozen=True)
class Started:
    """A plan that a worker trains now."""

    job: Job


@dataclass(frozen=True)
class ProbesProgressed:
    """So many of the rates to be probed, over all layers, are measured."""

    done: int
    total: int


Event = Refused | Started | Progressed | Finished | ProbesProgressed


class Record(asktell.Record, Protocol):
    """Where a search is recorded."""

    def start(self, plan: FactorizationPlan, role: Role) -> Job:
        """Records that a plan is being trained, and what it starts from."""
        ...

    def progress(self, number: int, progress: TrainingProgress) -> bool:
        """Takes note of how far a training is; whether it is to stop, as hopeless, at the end of an epoch."""
        ...

    def finish(self, evaluation: Evaluation, seconds: float) -> None:
        """Records an evaluation: complete, pruned or failed."""
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
    policy: Policy, record: Record, pool: WorkerPool, trials: int, deadline: Deadline | None = None
) -> Iterator[Event]:
    """Runs until `trials` candidates are trained (failed and pruned ones count) or the policy is done; yields what
    happens.

    Where candidates start from others, or the policy requires probes, the regular network is trained first, above the
    ceilings too, and probed. The best candidate may be trained on at the end (`Fidelity`). Raises FnetError for a
    policy that fails or suggests a plan that is not of the space, and TimeUp at the deadline.
    """
    deadline = deadline or Deadline()
    required = requirements(policy)
    if pool.setup.fidelity.warm_start or required:
        yield from _reference(record, pool, deadline)
    if required and trained(record.history().evaluations) < trials:
        yield from _probes(record, pool, FISHER in required, deadline)
    while True:
        yield from _fill(policy, record, pool, trials, deadline)
        if not pool.busy:
            break
        yield from _events(record, pool, deadline)
    if best := record.to_finish():
        yield from _alone(record, pool, best.plan, "final", deadline)


def _reference(record: Record, pool: WorkerPool, deadline: Deadline) -> Iterator[Event]:
    """The regular network, once. Within the ceilings it is a candidate like others, and may win."""
    history = record.history()
    plan = regular(history.space)
    if all(evaluation.plan != plan or evaluation.state == "refused" for evaluation in history.evaluations):
        above = history.constraints.refusal(plan_cost(history.space, plan))
        yield from _alone(record, pool, plan, "reference" if above else "candidate", deadline)


def _probes(record: Record, pool: WorkerPool, fisher: bool, deadline: Deadline) -> Iterator[Event]:
    """What each rate of each layer does to a trained network: a layer a task, shared between the workers."""
    waiting = record.to_probe(fisher)
    done, total = dict.fromkeys(waiting, 0), sum(len(task.rates) for task in waiting)
    if waiting:
        yield ProbesProgressed(0, total)
    while waiting or pool.busy:
        while waiting and pool.busy < pool.count and not deadline.over:
            pool.submit(waiting.pop(0))
        if not pool.busy:
            raise TimeUp
        for event in pool.events():
            if isinstance(event, Probing):
                done[event.task] = event.done
                yield ProbesProgressed(sum(done.values()), total)
            if isinstance(event, Probed):
                record.probed(event.task, event.probes)
                deadline.worked = True


def _alone(
    record: Record, pool: WorkerPool, plan: FactorizationPlan, role: Role, deadline: Deadline
) -> Iterator[Event]:
    """Trains a plan while nothing else is to be done."""
    yield from _train(record, pool, plan, role, deadline)
    while pool.busy:
        yield from _events(record, pool, deadline)


def _train(
    record: Record, pool: WorkerPool, plan: FactorizationPlan, role: Role, deadline: Deadline
) -> Iterator[Event]:
    """Gives a plan to an idle worker."""
    deadline.check()
    job = record.start(plan, role)
    deadline.begin(job.number)
    yield Started(job)
    pool.submit(job)


def _events(record: Record, pool: WorkerPool, deadline: Deadline) -> Iterator[Event]:
    if pool.held == pool.busy:
        raise TimeUp

    def judge(number: int, progress: TrainingProgress) -> bool | None:
        stop = record.progress(number, progress)
        return None if progress.ended and deadline.holds(number, progress) and not stop else stop

    for event in pool.events(judge):
        assert isinstance(event, Progressed | Finished)
        if isinstance(event, Finished):
            record.finish(event.evaluation, event.seconds)
        yield event


def _fill(policy: Policy, record: Record, pool: WorkerPool, trials: int, deadline: Deadline) -> Iterator[Event]:
    """Asks for plans until every worker is busy, all trials are out, the policy has none for now, or time is up."""
    while pool.busy < pool.count and not (pool.busy and deadline.over):
        history = record.history()
        if trained(history.evaluations) + len(history.running) >= trials:
            return
        plan = yield from propose(policy, record)
        if plan is None:
            return
        yield from _train(record, pool, plan, "candidate", deadline)


def trained(evaluations: Iterable[Evaluation]) -> int:
    """How many candidates were trained, wholly or in part."""
    return sum(evaluation.state != "refused" and evaluation.role == "candidate" for evaluation in evaluations)


@dataclass(frozen=True)
class FixedPlans:
    """The policy of a study of given plans: each once, in order."""

    plans: tuple[FactorizationPlan, ...]

    def suggest(self, history: History) -> FactorizationPlan | None:
        seen = history.seen
        return next((plan for plan in self.plans if plan not in seen), None)
