from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from fnet_policies import TPE, Fisher, Greedy, LayerGuided, ProgressiveDoubling, Random
from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import FactorizationPlan, depthwise, make_plan, regular, uniform
from fnet_search.base.errors import FnetError
from fnet_search.candidates.job import Job, Setup, Start
from fnet_search.candidates.pool import Finished, Judge, Probed, Probing, Progressed
from fnet_search.candidates.probes import ProbeTask, probe_tasks, probes_from
from fnet_search.engine.search_loop import ProbesProgressed, Started, search
from fnet_search.engine.search_loop import trained as count_trained
from fnet_search.importing.spaces import load_space
from fnet_search.policy.asktell import REFUSALS_OF_ONE_PLAN, Refused
from fnet_search.policy.conformance import made_up_probes as probes
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation, Probe, Role
from fnet_search.policy.fixed_plans import FixedPlans
from fnet_search.policy.protocol import History, Policy
from fnet_search.policy.ranking import choose_parent, ranking
from fnet_search.quant.scheme import PAPER
from fnet_search.training.deadline import Deadline, TimeUp
from fnet_search.training.numerics import Numerics
from fnet_search.training.recipe import Fidelity, load_recipe
from fnet_search.training.train import TrainingProgress
from tests.support.evaluations import failed, pruned, trained

TINY = load_space("tiny")
REGULAR, F2, F4, DWS = regular(TINY), uniform(TINY, 2), uniform(TINY, 4), depthwise(TINY)
HALF = Constraints(conv_macs=507_904)
"""What f2 has; regular has 811,008."""
HALFWAY = TrainingProgress(1, 2, True, 0.5, 1.0, 0.5, "validation")
COLD, WARM = Fidelity(), Fidelity(warm_start=True)
PROBES = probes(TINY)


@dataclass
class Listed:
    """A search recorded in memory: children start from what `choose_parent` says, the best is trained on once."""

    constraints: Constraints = HALF
    seed: int = 0
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    running: dict[int, FactorizationPlan] = field(default_factory=dict)
    progressed: list[int] = field(default_factory=list)
    stopped: tuple[FactorizationPlan, ...] = ()
    fidelity: Fidelity = COLD
    measured: list[Probe] = field(default_factory=list)
    """Probes of candidate 0."""

    def history(self) -> History:
        past = tuple(one for one in self._in_order if one.role != "final")
        number = self._next() - len(self.evaluations) + len(past)
        whole = len(self.measured) == len(PROBES.changes) + 1
        probes = probes_from(0, REGULAR, self.measured) if whole else None
        return History(TINY, self.constraints, past, tuple(self.running.values()), number, self.seed, probes)

    def to_probe(self, fisher: bool) -> list[ProbeTask]:
        known = {one.layer for one in self.measured}
        return [task for task in probe_tasks(TINY, Start(0, REGULAR, Path(), 1), fisher) if task.layer not in known]

    def probed(self, task: ProbeTask, probes: tuple[Probe, ...]) -> None:
        self.measured += probes

    @property
    def _in_order(self) -> tuple[Evaluation, ...]:
        return tuple(self.evaluations[number] for number in sorted(self.evaluations))

    def _next(self) -> int:
        taken = self.evaluations.keys() | self.running.keys()
        return next(number for number in range(len(taken) + 1) if number not in taken)

    def refuse(self, plan: FactorizationPlan, reason: str) -> Evaluation:
        number = self._next()
        self.evaluations[number] = Evaluation(number, plan, plan_cost(TINY, plan), "refused", reason)
        return self.evaluations[number]

    def lost(self) -> None:
        return None

    def wait(self) -> None:
        raise AssertionError("nobody else is at work")

    def start(self, plan: FactorizationPlan, role: Role, number: int | None = None) -> Job:
        number = self._next()
        parent = (
            self._best if role == "final" else choose_parent(self._in_order, plan) if self.fidelity.warm_start else None
        )
        start = parent and Start(parent.number, parent.plan, Path(f"{parent.number:03d}"), parent.epochs)
        self.running[number] = plan
        return Job(number, plan, Path(f"{number:03d}"), role, start)

    def progress(self, number: int, progress: TrainingProgress) -> bool:
        self.progressed.append(number)
        return self.running[number] in self.stopped

    def finish(self, evaluation: Evaluation, seconds: float) -> bool:
        assert self.running.pop(evaluation.number) == evaluation.plan
        self.evaluations[evaluation.number] = evaluation
        return True

    @property
    def _best(self) -> Evaluation | None:
        ranked = ranking(tuple(one for one in self._in_order if one.role == "candidate"), self.constraints)
        return ranked[0] if ranked else None

    def to_finish(self) -> Evaluation | None:
        assert self.running == {}, "the search is over"
        finals = [one.parent for one in self.evaluations.values() if one.role == "final"]
        return self._best if self.fidelity.final_epochs and self._best and self._best.number not in finals else None

    @property
    def plans(self) -> list[FactorizationPlan]:
        return [self.evaluations[number].plan for number in sorted(self.evaluations)]


@dataclass
class Clocked:
    """Workers that are done after two events each, the last one that began first; accuracy falls with the MACs."""

    count: int = 1
    failing: tuple[FactorizationPlan, ...] = ()
    fidelity: Fidelity = COLD
    jobs: list[list[Any]] = field(default_factory=list)
    submitted: list[Job] = field(default_factory=list)

    @property
    def setup(self) -> Setup:
        recipe = load_recipe("quick")
        return Setup(TINY, recipe, (PAPER,), Numerics("cpu"), 0, "validation", fidelity=self.fidelity)

    @property
    def busy(self) -> int:
        return len(self.jobs)

    @property
    def paused(self) -> int:
        return sum(None in entry for entry in self.jobs)

    def submit(self, job: Any) -> None:
        assert self.busy < self.count
        self.jobs.append([job, 0])
        self.submitted.append(job)

    def events(self, judge: Judge = lambda number, progress: False) -> Iterator[Any]:
        entry = next(entry for entry in reversed(self.jobs) if None not in entry)
        if isinstance(entry[0], ProbeTask):
            self.jobs.remove(entry)
            layer, rates = entry[0].layer, entry[0].rates
            own = [PROBES.unchanged] if rates[0] == 1 else []
            yield Probing(entry[0], len(rates))
            yield Probed(entry[0], (*own, *(one for one in PROBES.changes if one.layer == layer)))
            return
        job, entry[1] = entry[0], entry[1] + 1
        if entry[1] < 2:
            entry.append(judge(job.number, HALFWAY))
            yield Progressed(job.number, HALFWAY)
            return
        self.jobs.remove(entry)
        accuracy = 0.5 + plan_cost(TINY, job.plan).conv_macs / 2_000_000
        done = trained(TINY, job.plan, job.number, accuracy + 0.05, accuracy, layers=False)
        if entry[2]:
            done = pruned(TINY, job.plan, job.number)
        elif job.plan in self.failing:
            done = failed(TINY, job.plan, job.number)
        yield Finished(replace(done, role=job.role, parent=job.start and job.start.number), 1.0)


def warm_search(
    policy: Policy, trials: int, workers: int = 1, constraints: Constraints = HALF, final_epochs: int = 0, **record: Any
) -> tuple[Listed, Clocked]:
    """A search whose candidates start from others, done."""
    fidelity = Fidelity(warm_start=True, final_epochs=final_epochs)
    listed = Listed(constraints, fidelity=fidelity, **record)
    pool = Clocked(workers, fidelity=fidelity)
    list(search(policy, listed, pool, trials))
    return listed, pool


@dataclass
class Scripted:
    """Suggests what it was given, and remembers what it was shown."""

    plans: list[FactorizationPlan | None]
    seen: list[History] = field(default_factory=list)

    def suggest(self, history: History) -> FactorizationPlan | None:
        self.seen.append(history)
        return self.plans.pop(0) if self.plans else None


def test_what_happens_is_told_in_order() -> None:
    record, pool = Listed(), Clocked()
    events = list(search(Scripted([REGULAR, F4]), record, pool, 5))
    assert [type(event) for event in events] == [Refused, Started, Progressed, Finished]
    assert events[0].evaluation.reason == "811,008 conv MACs exceed the budget of 507,904"
    assert pool.submitted == [events[1].job] == [Job(1, F4, Path("001"))]
    assert events[3].evaluation == record.evaluations[1]
    assert record.progressed == [1]


def test_nothing_over_a_ceiling_and_nothing_twice_is_trained() -> None:
    flat = make_plan(TINY, {"conv_8": 8, "conv_16_1": 4})  # within the MACs, but 3,882 parameters
    record, pool = Listed(Constraints(conv_macs=507_904, params=3_000)), Clocked()
    list(search(Scripted([F4, REGULAR, F4, F2, flat, REGULAR, DWS]), record, pool, 10))
    assert [job.plan for job in pool.submitted] == [F4, DWS]
    assert [evaluation.reason for evaluation in record.evaluations.values()] == [
        "",
        "811,008 conv MACs exceed the budget of 507,904; 6,258 parameters exceed the limit of 3,000",
        "repeats candidate 0",
        "3,810 parameters exceed the limit of 3,000",
        "3,882 parameters exceed the limit of 3,000",
        "repeats candidate 1",
        "",
    ]


def test_trials_are_candidates_trained() -> None:
    """Failed ones count, refused ones do not."""
    record, pool = Listed(), Clocked(failing=(F4,))
    policy = Scripted([REGULAR, F4, F2, DWS])
    list(search(policy, record, pool, 2))
    assert [evaluation.state for evaluation in record.evaluations.values()] == ["refused", "failed", "complete"]
    assert policy.plans == [DWS], "the policy is not asked for more than is trained"
    list(search(policy, record, pool, 3))
    assert record.plans == [REGULAR, F4, F2, DWS]
    before = dict(record.evaluations)
    assert list(search(Random(), record, pool, 3)) == []
    assert record.evaluations == before


def test_what_is_stopped_early_counts_as_a_candidate() -> None:
    record, pool = Listed(Constraints(), stopped=(F2, DWS)), Clocked(2)
    list(search(Scripted([F4, F2, DWS, REGULAR]), record, pool, 3))
    assert [(one.plan, one.state) for one in record.history().evaluations] == [
        *((F4, "complete"), (F2, "pruned"), (DWS, "pruned"))
    ]


def test_workers_are_kept_busy_and_trials_are_not_exceeded() -> None:
    record, pool = Listed(Constraints()), Clocked(3)
    most = 0
    for event in search(Random(), record, pool, 7):
        most = max(most, pool.busy)
        if isinstance(event, Started) and event.job.number < 3:
            assert pool.busy == event.job.number
    assert most == 3
    assert len(record.evaluations) == 7
    assert len(set(record.plans)) == 7
    assert record.running == {}


def test_a_policy_sees_what_is_running_and_what_is_done() -> None:
    record, policy = Listed(Constraints()), Scripted([F4, F2, DWS, None])
    list(search(policy, record, Clocked(2), 10))
    shown = [(one.number, [plan.number for plan in one.evaluations], one.running) for one in policy.seen]
    assert shown[:3] == [(0, [], ()), (1, [], (F4,)), (2, [1], (F4,))]
    assert all(one.seed == 0 and one.space is TINY for one in policy.seen)


def test_none_means_later_while_something_is_running_else_done() -> None:
    record, pool = Listed(Constraints()), Clocked(2)
    list(search(Scripted([F4, None, F2, None, None]), record, pool, 10))
    assert record.plans == [F4, F2]
    assert list(search(Scripted([None, DWS]), record, pool, 10)) == []


def test_a_repeat_of_a_running_plan_is_refused() -> None:
    record, pool = Listed(Constraints()), Clocked(2)
    list(search(Scripted([F4, F4, F2]), record, pool, 10))
    assert [job.plan for job in pool.submitted] == [F4, F2]
    assert record.evaluations[1].reason == "repeats a plan that is being trained"


@pytest.mark.parametrize("plan", [F4, REGULAR])
def test_why_a_plan_is_refused(plan: FactorizationPlan) -> None:
    history = History(TINY, HALF, (trained(TINY, F2, 3, 0.9, 0.8),))
    assert bool(history.refusal(plan)) == (plan == REGULAR)
    assert history.refusal(F2) == "repeats candidate 3"


class Stubborn:
    def suggest(self, history: History) -> FactorizationPlan | None:
        return REGULAR


class Raising:
    def suggest(self, history: History) -> FactorizationPlan | None:
        raise KeyError("layer")


def test_a_policy_that_has_no_other_plan_is_stopped() -> None:
    record = Listed()
    with pytest.raises(
        FnetError, match=r"keeps suggesting plan \S+, refused 10 times since a plan was last accepted: repeats"
    ):
        list(search(Stubborn(), record, Clocked(), 5))
    assert len(record.evaluations) == REFUSALS_OF_ONE_PLAN


def test_a_policy_that_fails_is_named() -> None:
    with pytest.raises(
        FnetError,
        match=r"^policy Raising failed at suggestion 0: KeyError: 'layer' \(\S*test_search_loop.py, line \d+\)$",
    ):
        list(search(Raising(), Listed(), Clocked(), 5))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (FactorizationPlan((("conv_8", 3), ("conv_16_1", 1), ("conv_16_2", 1))), "illegal rate 3 for layer 'conv_8'"),
        (FactorizationPlan((("conv_9", 1), ("conv_16_1", 1), ("conv_16_2", 1))), "unknown layer 'conv_9'"),
        (FactorizationPlan((("conv_8", 1),)), "does not name the layers of space 'tiny' in order"),
        (FactorizationPlan(tuple(reversed(F2.rates))), "does not name the layers of space 'tiny' in order"),
        ("f2", "'f2' is neither a FactorizationPlan nor None"),
    ],
)
def test_a_plan_that_is_not_of_the_space_is_never_built(plan: Any, message: str) -> None:
    record, pool = Listed(), Clocked()
    with pytest.raises(FnetError, match=f"^policy Scripted failed at suggestion 0: .*{message}"):
        list(search(Scripted([plan]), record, pool, 5))
    assert (record.evaluations, pool.submitted) == ({}, [])


@pytest.mark.parametrize("policy", [Random(), TPE(), ProgressiveDoubling()], ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("stop", [1, 4, 8])
def test_a_stopped_search_suggests_what_an_uninterrupted_one_would_have(policy: Policy, stop: int) -> None:
    """Stopped after so many events; what was running then is asked for again."""
    whole = Listed(seed=5)
    list(search(policy, whole, Clocked(), 6))
    record = Listed(seed=5)
    running = search(policy, record, Clocked(), 6)
    for _ in range(stop):
        next(running)
    running.close()
    resumed = Listed(seed=5, evaluations=dict(record.evaluations))
    list(search(policy, resumed, Clocked(), 6))
    assert len(resumed.plans) > 2
    assert resumed.evaluations == whole.evaluations


def test_given_plans_are_each_trained_once_in_their_order() -> None:
    record = Listed(Constraints())
    list(search(FixedPlans((DWS, REGULAR)), record, Clocked(), 2))
    assert record.plans == [DWS, REGULAR]
    list(search(FixedPlans((F2, DWS, F4)), record, Clocked(2), 4))
    assert record.plans == [DWS, REGULAR, F2, F4]


# Candidates that start from others


def test_the_regular_network_comes_first_above_the_ceilings_too() -> None:
    """As a reference: it is no trial, and wins nothing. The policy sees it."""
    policy = Scripted([F4, REGULAR, DWS])
    record, pool = warm_search(policy, 2)
    assert [(job.plan, job.role, job.start and job.start.number) for job in pool.submitted] == [
        *((REGULAR, "reference", None), (F4, "candidate", 0), (DWS, "candidate", 0))
    ]
    assert [(one.number, len(one.evaluations)) for one in policy.seen] == [(1, 1), (2, 2), (3, 3)]
    assert record.evaluations[2].reason == "repeats candidate 0"
    assert count_trained(record.evaluations.values()) == 2
    before = dict(record.evaluations)
    list(search(Scripted([F2]), record, pool, 2))
    assert record.evaluations == before, "it is trained once"
    list(search(Scripted([F2]), record, pool, 3))
    assert [job.plan for job in pool.submitted[3:]] == [F2]


def test_within_the_ceilings_the_regular_network_is_a_candidate() -> None:
    record, pool = warm_search(Scripted([F4]), 2, constraints=Constraints(conv_macs=811_008))
    assert [(job.plan, job.role) for job in pool.submitted] == [(REGULAR, "candidate"), (F4, "candidate")]
    assert count_trained(record.evaluations.values()) == 2
    assert ranking(tuple(record.evaluations.values()), record.constraints)[0].plan == REGULAR


@pytest.mark.parametrize("state", ["complete", "failed", "pruned"])
def test_a_reference_that_was_tried_is_not_trained_again(state: Any) -> None:
    before = replace(trained(TINY, REGULAR, 0, 0.9, 0.8), state=state, role="reference")
    _, pool = warm_search(Scripted([F4]), 1, evaluations={0: before})
    (job,) = pool.submitted
    assert (job.plan, job.start is None) == (F4, state != "complete")


def test_a_regular_network_that_was_refused_is_trained_as_a_reference() -> None:
    refused = Evaluation(0, REGULAR, plan_cost(TINY, REGULAR), "refused", "over budget")
    record, _ = warm_search(Scripted([F4]), 1, evaluations={0: refused})
    assert [(one.plan, one.role, one.state) for one in record.evaluations.values()] == [
        *((REGULAR, "candidate", "refused"), (REGULAR, "reference", "complete"), (F4, "candidate", "complete"))
    ]


def test_the_reference_and_the_final_one_are_trained_alone() -> None:
    record, pool = Listed(fidelity=Fidelity(True, final_epochs=8)), Clocked(3, fidelity=WARM)
    alone = []
    for event in search(Scripted([F4, F2, DWS]), record, pool, 3):
        if isinstance(event, Progressed) and event.number in (0, 4):
            alone.append((event.number, pool.busy))
    assert alone == [(0, 1), (4, 1)]
    assert [job.role for job in pool.submitted] == ["reference", "candidate", "candidate", "candidate", "final"]


def test_the_best_candidate_is_trained_on_at_the_end() -> None:
    record, pool = warm_search(Scripted([F4, F2, DWS]), 3, final_epochs=8)
    job = pool.submitted[-1]
    assert (job.number, job.plan, job.role, job.start) == (4, F2, "final", Start(2, F2, Path("002"), 3))
    final = record.evaluations[4]
    assert (final.role, final.parent) == ("final", 2)
    assert count_trained(record.evaluations.values()) == 3


@pytest.mark.parametrize(("policy", "seed"), [(Random(), 5), (TPE(startup=3), 7)], ids=["random", "tpe"])
def test_a_search_that_goes_on_after_a_final_training_suggests_the_same(policy: Policy, seed: int) -> None:
    """With these seeds it finds a better one then, which is trained on too."""
    whole, _ = warm_search(policy, 9, seed=seed)
    record, pool = warm_search(policy, 5, seed=seed, final_epochs=8)
    list(search(policy, record, pool, 9))
    assert [number for number, one in record.evaluations.items() if one.role == "final"] == [6, 11]
    assert [one.plan for one in record.history().evaluations] == whole.plans


@pytest.mark.parametrize("stop", range(1, 12, 2))
def test_a_warm_search_that_was_stopped_ends_the_same(stop: int) -> None:
    whole, _ = warm_search(Random(), 3, seed=1, final_epochs=8)
    record = Listed(seed=1, fidelity=whole.fidelity)
    running = search(Random(), record, Clocked(fidelity=WARM), 3)
    for _ in range(stop):
        next(running)
    running.close()
    resumed, _ = warm_search(Random(), 3, seed=1, final_epochs=8, evaluations=dict(record.evaluations))
    assert resumed.evaluations == whole.evaluations
    assert [one.role for one in whole.evaluations.values()] == ["reference", *["candidate"] * 3, "final"]


# Policies that require probes


@pytest.mark.parametrize("fidelity", [COLD, WARM], ids=["cold", "warm"])
def test_what_a_policy_requires_is_measured_before_its_first_suggestion(fidelity: Fidelity) -> None:
    """On the regular network, which is trained for it where candidates start from scratch too."""
    record, pool = Listed(fidelity=fidelity), Clocked(2, fidelity=fidelity)
    events = list(search(Greedy(), record, pool, 2))
    kinds = [type(one) for one in pool.submitted]
    assert kinds == [Job] + [ProbeTask] * 3 + [Job] * 2
    assert pool.submitted[0].role == "reference"
    total = len(PROBES.changes) + 1
    progressed = [(event.done, event.total) for event in events if isinstance(event, ProbesProgressed)]
    assert progressed[0] == (0, total)
    assert progressed[-1] == (total, total)
    assert [done for done, _ in progressed] == sorted(done for done, _ in progressed)
    assert record.plans[1:] == [Greedy().suggest(replace(record.history(), evaluations=())), record.plans[2]]
    assert [task.fisher for task in pool.submitted[1:4]] == [False] * 3
    list(search(Fisher(), other := Listed(), pool := Clocked(), 1))
    assert [task.fisher for task in pool.submitted[1:4]] == [True] * 3
    assert other.history().probes is not None


@pytest.mark.parametrize("stop", range(1, 14, 2))
def test_probes_are_not_measured_twice(stop: int) -> None:
    """A search that was stopped anywhere ends the same; what it had recorded is not done again."""

    def go(record: Listed, pool: Clocked) -> Iterator[Any]:
        return search(LayerGuided(), record, pool, 3)

    whole = Listed(fidelity=WARM)
    list(go(whole, Clocked(fidelity=WARM)))
    record, pool = Listed(fidelity=WARM), Clocked(fidelity=WARM)
    running = go(record, pool)
    for _ in range(stop):
        next(running, None)
    done = {one.layer for one in record.measured}
    record = Listed(fidelity=WARM, evaluations=dict(record.evaluations), measured=list(record.measured))
    list(go(record, pool := Clocked(fidelity=WARM)))
    assert {task.layer for task in pool.submitted if isinstance(task, ProbeTask)} == {
        layer for layer, _ in REGULAR.rates
    } - {layer for layer in done if layer} - ({"conv_16_2"} if "" in done else set())
    assert record.evaluations == whole.evaluations


def test_at_the_deadline_trainings_wait_and_nothing_is_begun() -> None:
    """The last of three workers is paused, then the others; of what was begun nothing has ended."""
    record, pool = Listed(), Clocked(3)
    with pytest.raises(TimeUp):
        list(search(Scripted([F4, F2, DWS, REGULAR]), record, pool, 4, Deadline(0)))
    assert list(record.running.values()) == [F4, F2, DWS]
    assert (record.evaluations, pool.paused, record.progressed) == ({}, 3, [2, 1, 0])


def test_a_search_that_is_done_at_the_deadline_is_done() -> None:
    """It is only with more to do that time is up."""
    deadline = Deadline(0)
    deadline.worked = True
    record = Listed(evaluations={0: trained(TINY, F4, 0, 0.9, 0.8)})
    assert list(search(Scripted([F2]), record, Clocked(), 1, deadline)) == []
    with pytest.raises(TimeUp):
        list(search(Scripted([F2]), record, Clocked(), 2, deadline))
    assert record.running == {}


def test_at_the_deadline_the_hopeless_still_stop() -> None:
    record = Listed(stopped=(F2,))
    list(search(Scripted([F2]), record, Clocked(), 1, Deadline(0)))
    assert [one.state for one in record.evaluations.values()] == ["pruned"]


# Beside other processes


@dataclass
class Shared(Listed):
    """Another process begins the last trial between two looks, and ends it while this one waits."""

    looks: int = 0

    def history(self) -> History:
        self.looks += 1
        if self.looks == 2:
            self.running[self._next()] = F2
        return super().history()

    def wait(self) -> None:
        (number,) = self.running
        self.finish(trained(TINY, F2, number, 0.9, 0.8, layers=False), 1.0)


def test_the_last_trial_is_begun_by_one_process() -> None:
    shared, pool = Shared(), Clocked()
    assert list(search(FixedPlans((F4, DWS)), shared, pool, 1)) == []
    assert pool.submitted == []
    assert shared.plans == [F2]


def test_a_policy_that_has_none_for_now_is_asked_again_when_others_are_done() -> None:
    shared, pool = Shared(), Clocked()
    list(search(Scripted([None, F4]), shared, pool, 2))
    assert shared.plans == [F2, F4]
