"""Several records of one study, as several processes have them."""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import OperationalError

from fnet_search.arch.plan import FactorizationPlan, depthwise, make_plan, regular, uniform
from fnet_search.base.errors import FnetError
from fnet_search.candidates.job import Job, Setup
from fnet_search.candidates.network_files import QUANTIZED, WEIGHTS
from fnet_search.engine.study_record import Sharing, StudyRecord
from fnet_search.importing.spaces import load_space
from fnet_search.optuna_bridge import storage as storages
from fnet_search.optuna_bridge.leases import LEASE, LEFT, TAKEOVERS, Heartbeat
from fnet_search.optuna_bridge.storage import open_artifacts, open_url
from fnet_search.optuna_bridge.trials import EVALUATION
from fnet_search.policy.conformance import made_up_probes
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation, Role
from fnet_search.quant.scheme import PAPER, schemes_text
from fnet_search.rundir.run_folder import KEPT, RunFolder
from fnet_search.training.numerics import Numerics
from fnet_search.training.recipe import Fidelity, load_recipe
from fnet_search.training.train import TrainingProgress
from tests.support.evaluations import failed, trained
from tests.support.storages import opened_as

TINY = load_space("tiny")
REGULAR, F2, F4, DWS = regular(TINY), uniform(TINY, 2), uniform(TINY, 4), depthwise(TINY)
LEASE_FOR_TESTS = 0.2
SETUP = Setup(TINY, load_recipe("quick"), (PAPER,), Numerics("cpu"), 0, "validation", fidelity=Fidelity(True))

Joined = Callable[..., StudyRecord]
Vanish = Callable[[StudyRecord], None]


@pytest.fixture(params=["journal", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a storage; PostgreSQL and gRPC are in engine/test_shared_study.py, since they take seconds to start."""
    return {"journal": f"journal:{tmp_path}/study.log", "sqlite": f"sqlite:///{tmp_path}/study.db"}[request.param]


@pytest.fixture
def hearts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Heartbeat]]]:
    """What renews the leases of each worker."""
    found = defaultdict[str, list[Heartbeat]](list)

    class Known(Heartbeat):
        def __init__(self, storage: BaseStorage, worker: str, seconds: float) -> None:
            super().__init__(storage, worker, seconds)
            found[worker].append(self)

    monkeypatch.setattr("fnet_search.optuna_bridge.leases.Heartbeat", Known)
    yield found
    for heart in chain.from_iterable(found.values()):
        heart.stop()


@pytest.fixture
def vanish(hearts: dict[str, list[Heartbeat]]) -> Vanish:
    """As a process that is killed: its leases are not renewed any more, and nothing is told."""

    def gone(record: StudyRecord) -> None:
        for heart in hearts[record.run.worker]:
            heart.stop()

    return gone


@pytest.fixture
def joined(url: str, tmp_path: Path, hearts: dict[str, list[Heartbeat]], monkeypatch: pytest.MonkeyPatch) -> Joined:
    """Opens the study as the process that works in a folder does."""
    monkeypatch.setattr("fnet_search.engine.study_record.POLL", 0.0)
    monkeypatch.setattr("fnet_search.optuna_bridge.leases.JITTER", 0.0)

    def join(host: str, lease: float = 60.0, storage: BaseStorage | None = None) -> StudyRecord:
        run = RunFolder(tmp_path / host / "study")
        run.path.mkdir(parents=True, exist_ok=True)
        sharing = Sharing(run.worker, open_artifacts(str(tmp_path / "artifacts")), lease)
        place = storage or open_url(url)
        return StudyRecord(place, run, TINY, Constraints(), 0, "validation", SETUP, sharing=sharing)

    return join


def start(record: StudyRecord, plan: FactorizationPlan, role: Role = "candidate", number: int | None = None) -> Job:
    job = record.start(plan, role, number)
    assert job is not None
    return job


def end(record: StudyRecord, job: Job, accuracy: float = 0.8) -> Evaluation:
    """As a worker does, which leaves weights."""
    evaluation = replace(trained(TINY, job.plan, job.number, accuracy, accuracy), role=job.role)
    if job.start is not None:
        evaluation = replace(evaluation, parent=job.start.number)
    job.folder.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, QUANTIZED):
        (job.folder / name).write_text(f"{record.run.path} {job.number}")
    assert record.finish(evaluation, 1.0)
    return evaluation


def states(record: StudyRecord) -> list[tuple[int, TrialState, str | None]]:
    found = record.study.get_trials()
    return [(one.user_attrs["number"], one.state, one.system_attrs.get(LEFT)) for one in found]


def waiting(found: Callable[[], Any]) -> Any:
    """What is found at last."""
    until = time.monotonic() + 20
    while (result := found()) is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    return result


def test_of_two_that_ask_at_the_same_moment_one_gets_the_number(joined: Joined) -> None:
    a, b = joined("a"), joined("b")
    assert a.history().number == b.history().number == 0
    assert start(a, REGULAR).number == 0
    assert b.start(REGULAR, "candidate") is None, "the same plan"
    c = joined("c")
    assert start(b, F2).number == 1
    assert c.history().number == 2
    assert b.start(F4, "candidate") is not None
    assert c.start(DWS, "candidate") is None, "the number, with another plan"
    assert c.history().running == (REGULAR, F2, F4)
    assert states(c) == [
        *((0, TrialState.RUNNING, None), (0, TrialState.FAIL, "withdrawn"), (1, TrialState.RUNNING, None)),
        *((2, TrialState.RUNNING, None), (2, TrialState.FAIL, "withdrawn")),
    ]


def test_a_refused_plan_is_recorded_once(joined: Joined) -> None:
    a, b = joined("a"), joined("b")
    assert a.history().number == b.history().number == 0
    refused = a.refuse(REGULAR, "too much")
    assert refused is not None
    assert b.refuse(REGULAR, "too much") is None
    assert b.history().evaluations == (refused,)
    assert b.history().number == 1


def test_what_one_finishes_all_have(joined: Joined) -> None:
    a, b = joined("a"), joined("b")
    job = start(a, F4)
    assert b.history().running == (F4,)
    evaluation = end(a, job)
    assert b.history() == a.history()
    assert b.history().evaluations == (evaluation,)
    for record in (a, b):
        assert (record.run.candidate(0) / "layers.csv").is_file()
    tables = [(record.run.path / name).read_text() for record in (a, b) for name in ("candidates.csv", "timings.csv")]
    assert tables[:2] == tables[2:]


def test_weights_come_from_the_artifact_store(joined: Joined) -> None:
    a, b = joined("a"), joined("b")
    end(a, start(a, REGULAR))
    b.history()
    assert not (b.run.candidate(0) / WEIGHTS).exists()
    job = start(b, F2)
    assert job.start is not None
    assert job.start.folder == b.run.candidate(0)
    for name in (WEIGHTS, QUANTIZED):
        assert (b.run.candidate(0) / name).read_text() == f"{a.run.path} 0"


def test_weights_that_nobody_needs_any_more_leave_the_store(joined: Joined, tmp_path: Path) -> None:
    a = joined("a")
    plans = [make_plan(TINY, {"conv_8": 2, "conv_16_1": rate}) for rate in (1, 2, 4, 8, 16)]
    end(a, start(a, REGULAR), 0.9)
    for number, plan in enumerate(plans, 1):
        end(a, start(a, plan), 0.5 + 0.01 * number)
    assert len(plans) > KEPT
    kept = {path.parent.name for path in a.run.path.glob(f"candidates/*/{WEIGHTS}")}
    texts = {path.read_text() for path in (tmp_path / "artifacts").iterdir() if path.stat().st_size < 200}
    assert {f"{a.run.path} {int(name)}" for name in kept} == {
        text for text in texts if text.startswith(str(a.run.path))
    }


def test_a_parent_whose_weights_are_gone_is_not_started_from(joined: Joined, tmp_path: Path) -> None:
    a, b = joined("a"), joined("b")
    end(a, start(a, REGULAR))
    for path in (tmp_path / "artifacts").iterdir():
        path.unlink()
    b.history()
    with pytest.raises(FnetError, match=r"^the weights of candidate 0 are not in the artifact store; name "):
        b.start(F2, "candidate")
    assert b.history().running == (F2,), "to be taken over by one that has them"
    assert start(a, F2, number=1).start is not None


def test_a_candidate_of_a_worker_that_is_gone_is_taken_over(joined: Joined, vanish: Vanish) -> None:
    a, b = joined("a", LEASE_FOR_TESTS), joined("b", LEASE_FOR_TESTS)
    job = start(a, F4)
    time.sleep(2 * LEASE_FOR_TESTS)
    assert b.lost() is None, "it is renewed"
    vanish(a)
    lost = waiting(b.lost)
    assert (lost.number, lost.plan) == (0, F4)
    again = start(b, lost.plan, number=lost.number)
    assert (again.number, again.plan) == (job.number, F4)
    # The one that was taken for dead comes back: it is told to stop, and what it did does not count.
    assert a.progress(0, TrainingProgress(1, 6, True, 0.1, 1.0, 0.5, "validation"))
    late = trained(TINY, F4, 0, 0.99, 0.99)
    job.folder.mkdir(parents=True)
    (job.folder / WEIGHTS).write_text("late")
    (job.folder / QUANTIZED).write_text("late")
    assert not a.finish(late, 1.0)
    assert not (job.folder / WEIGHTS).exists()
    evaluation = end(b, again, 0.7)
    for record in (a, b):
        assert record.history().evaluations == (evaluation,)
        assert record.history().running == ()
        assert json.loads((record.run.candidate(0) / "evaluation.json").read_text())["quint8_accuracy"] == 0.7
    assert states(b) == [(0, TrialState.FAIL, "expired"), (0, TrialState.COMPLETE, None)]


@pytest.mark.parametrize(
    "ended", [trained(TINY, F4, 0, 0.9, 0.8), failed(TINY, F4, 0, "loss is NaN")], ids=["complete", "failed"]
)
def test_an_evaluation_that_comes_while_its_candidate_is_taken_away_does_not_count(
    joined: Joined, ended: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has seen the trial without it, and ends the trial between the worker's two last writes."""
    a, b = joined("a"), joined("b")
    job = start(a, F4)
    job.folder.mkdir(parents=True)
    for name in (WEIGHTS, QUANTIZED):
        (job.folder / name).write_text("weights")
    (trial,), tell = a.study.get_trials(), a.study.tell

    def later(*arguments: Any, **options: Any) -> FrozenTrial:
        b.storage.set_trial_system_attr(trial._trial_id, LEFT, "expired")
        b.storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
        return tell(*arguments, **options)

    monkeypatch.setattr(a.study, "tell", later)
    assert not a.finish(ended, 1.0)
    for record in (a, b):
        assert record.history().evaluations == ()
        assert record.history().running == (F4,)
        lost = record.lost()
        assert lost is not None
        assert (lost.number, lost.plan) == (0, F4)


def test_of_two_that_take_over_one_does(joined: Joined, vanish: Vanish) -> None:
    a, b, c = (joined(name, LEASE_FOR_TESTS) for name in "abc")
    start(a, F4)
    vanish(a)
    found = waiting(b.lost), waiting(c.lost)
    assert [(one.number, one.plan) for one in found] == [(0, F4)] * 2
    assert start(b, F4, number=0).number == 0
    assert c.start(F4, "candidate", 0) is None
    assert c.lost() is None


def test_what_was_measured_before_the_worker_was_lost_counts(
    joined: Joined, monkeypatch: pytest.MonkeyPatch, vanish: Vanish
) -> None:
    a, b = joined("a", LEASE_FOR_TESTS), joined("b", LEASE_FOR_TESTS)
    job = start(a, F4)

    def cut_off(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(a.study, "tell", cut_off)
        with pytest.raises(KeyboardInterrupt):
            end(a, job)
    vanish(a)
    waiting(lambda: b.history().evaluations or None)
    assert b.history().evaluations == (trained(TINY, F4, 0, 0.8, 0.8),)
    assert b.lost() is None


def test_one_that_is_lost_too_often_has_failed(joined: Joined, vanish: Vanish) -> None:
    for turn in range(TAKEOVERS + 1):
        record = joined(f"host{turn}", 0.2)
        lost = waiting(record.lost) if turn else None
        start(record, F4, number=lost and lost.number)
        vanish(record)
    last = joined("last", 0.2)
    lost = waiting(last.lost)
    assert last.start(F4, "candidate", lost.number) is None
    (evaluation,) = last.history().evaluations
    assert evaluation == replace(
        failed(TINY, F4, 0, f"its worker was lost {TAKEOVERS + 1} times"), epochs=0, scheme=schemes_text(SETUP.schemes)
    )
    assert last.lost() is None


def test_a_process_that_ends_hands_over_at_once(joined: Joined) -> None:
    a, b = joined("a", 1000.0), joined("b", 1000.0)
    start(a, F4)
    a.close()
    lost = b.lost()
    assert lost is not None
    assert start(b, F4, number=lost.number).number == 0
    assert states(b)[0] == (0, TrialState.FAIL, "released")


def test_a_process_takes_up_at_once_what_was_begun_in_its_folder(joined: Joined, vanish: Vanish) -> None:
    a = joined("a", 1000.0)
    start(a, F4)
    vanish(a)
    again = joined("a", 1000.0)
    lost = again.lost()
    assert lost is not None
    assert (lost.number, lost.plan) == (0, F4)
    assert states(again) == [(0, TrialState.FAIL, "released")], "and it does not count as lost"


def test_a_copy_of_a_run_folder_is_another_worker(tmp_path: Path) -> None:
    one, other = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "other")
    name = one.worker
    assert one.worker == name
    other.path.mkdir()
    (other.path / ".worker").write_text((one.path / ".worker").read_text())
    assert other.worker != name


def test_a_final_training_that_is_lost_follows_from_the_record(joined: Joined, vanish: Vanish) -> None:
    a, b = joined("a", LEASE_FOR_TESTS), joined("b", LEASE_FOR_TESTS)
    end(a, start(a, REGULAR, "reference"))
    end(a, start(a, F4))
    assert start(a, F4, "final").number == 2
    assert b.history().running == (F4,)
    assert b.history().number == 2, "a final training takes no number of a suggestion"
    vanish(a)
    waiting(lambda: True if b.history().running == () else None)
    assert b.lost() is None
    assert start(b, F4, "final").number == 2


def test_probes_are_shared(joined: Joined) -> None:
    a, b = joined("a"), joined("b")
    end(a, start(a, REGULAR, "reference"))
    tasks, others = a.to_probe(False), b.to_probe(False)
    assert {task.layer for task in tasks} == {task.layer for task in others}
    assert all(task.start.folder == b.run.candidate(0) for task in others)
    made_up = made_up_probes(TINY)
    for task in tasks:
        changes = [one for one in made_up.changes if one.layer == task.layer]
        a.probed(task, (*([made_up.unchanged] if task.rates[0] == 1 else []), *changes))
    assert b.to_probe(False) == []
    assert b.probes == a.probes == made_up


class Lossy:
    """A storage whose answer is lost at times, after it did what it was asked."""

    def __init__(self, inner: BaseStorage, method: str, times: int = 1) -> None:
        self.inner, self.method, self.times = inner, method, times

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if name != self.method or not self.times:
            return found

        def lost(*arguments: Any, **options: Any) -> Any:
            found(*arguments, **options)
            self.times -= 1
            error = StorageInternalError("lost")
            error.__cause__ = OperationalError("", None, Exception("connection lost"))
            raise error

        return lost


@pytest.mark.parametrize(
    "method",
    ["create_new_trial", "set_trial_state_values", "set_trial_system_attr", "set_trial_user_attr", "get_all_trials"],
)
def test_an_answer_that_is_lost_changes_nothing(
    joined: Joined, url: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storages, "PAUSE", 0.01)
    a = joined("a")
    told: list[str] = []
    lossy = opened_as(Lossy(open_url(url), method), monkeypatch)
    storages.telling(lossy, told.append)
    b = joined("b", storage=lossy)
    job = b.start(F4, "candidate")
    if job is None:  # it has seen its own first trial, whose creation was reported as failed
        lost = b.lost()
        assert lost is not None
        job = start(b, F4, number=lost.number)
    evaluation = end(b, job)
    assert told
    assert a.history().evaluations == b.history().evaluations == (evaluation,)
    assert a.history().running == b.history().running == ()
    assert Counter(state for _, state, _ in states(a))[TrialState.COMPLETE] == 1


def test_a_lease_says_who_has_it(joined: Joined) -> None:
    a = joined("a")
    start(a, F4)
    (trial,) = a.study.get_trials()
    assert trial.system_attrs[LEASE] == {"worker": a.run.worker, "beat": 0}
    assert EVALUATION not in trial.system_attrs
