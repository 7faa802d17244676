import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from networks import CPU, digits

from fnet_search.data import DataSet
from fnet_search.errors import FnetError
from fnet_search.evaluate import CHECKPOINT, QUANTIZED, WEIGHTS, Setup, evaluate
from fnet_search.macro import load_space
from fnet_search.plan import plan_cost, regular, uniform
from fnet_search.policy import Evaluation
from fnet_search.recipe import Recipe
from fnet_search.scheme import Scheme
from fnet_search.workers import DEATHS_ALLOWED, Finished, Job, Progressed, WorkerPool

TINY = load_space("tiny")
REGULAR, F2 = regular(TINY), uniform(TINY, 2)
SETUP = Setup(TINY, Recipe("test", 3, 50, 0.05), Scheme(), CPU, 7, "validation")


@pytest.fixture(scope="module")
def data() -> DataSet:
    return digits(200)


@pytest.fixture(scope="module")
def expected(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Candidate 3, regular, evaluated in this process."""
    return evaluate(SETUP, data, 3, REGULAR, tmp_path_factory.mktemp("expected"), lambda progress: None)


def pids() -> list[int]:
    return sorted(child.pid for child in multiprocessing.active_children() if child.pid is not None)


def results(pool: WorkerPool) -> list[Finished]:
    """Of all candidates in training, waited for."""
    found = []
    while pool.busy:
        found += [event for event in pool.events() if isinstance(event, Finished)]
    return found


def test_workers_evaluate_as_this_process_does(data: DataSet, tmp_path: Path, expected: Evaluation) -> None:
    before = dict(os.environ)
    with WorkerPool(2, SETUP, data, tmp_path) as pool:
        pool.submit(Job(3, REGULAR, tmp_path / "3"))
        pool.submit(Job(4, F2, tmp_path / "4"))
        assert pool.busy == 2
        with pytest.raises(RuntimeError, match="every worker is busy"):
            pool.submit(Job(5, F2, tmp_path / "5"))
        started = pids()
        for pid in started:
            os.kill(pid, signal.SIGINT)  # Ctrl-C is the host's business
        events = []
        while pool.busy:
            events += list(pool.events())
        pool.submit(Job(5, F2, tmp_path / "5"))
        (again,) = results(pool)
        assert pids() == started, "workers are kept"
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()
        pool.submit(Job(6, F2, tmp_path / "6"))
        (replaced,) = results(pool)
    assert pids() == []
    assert list(tmp_path.glob(".*")) == [], "the data set's file is gone"
    assert dict(os.environ) == before
    finished = {event.evaluation.number: event for event in events if isinstance(event, Finished)}
    assert finished[3].evaluation == expected
    assert finished[3].seconds > 0
    assert finished[4].evaluation.plan == F2
    assert again.evaluation == replace(finished[4].evaluation, number=5)
    assert replaced.evaluation == replace(finished[4].evaluation, number=6), "one that died while idle is replaced"
    epochs = [
        event.progress.epoch
        for event in events
        if isinstance(event, Progressed) and event.number == 3 and event.progress.ended
    ]
    assert epochs == [1, 2, 3]
    assert {path.name for path in (tmp_path / "3").iterdir()} == {CHECKPOINT, WEIGHTS, QUANTIZED}


def test_a_candidate_of_a_killed_worker_is_taken_over(data: DataSet, tmp_path: Path, expected: Evaluation) -> None:
    """From its checkpoint, with the same result."""
    epochs: list[int] = []
    with WorkerPool(1, SETUP, data, tmp_path) as pool:
        pool.submit(Job(3, REGULAR, tmp_path / "3"))
        (first,) = pids()
        finished = None
        while pool.busy:
            for event in pool.events():
                if isinstance(event, Finished):
                    finished = event
                elif event.progress.ended:
                    epochs.append(event.progress.epoch)
                    if event.progress.epoch == 2 and pids() == [first]:
                        os.kill(first, signal.SIGKILL)
        assert pids() != [first]
    assert finished is not None
    assert finished.evaluation == expected
    assert epochs[:2] == [1, 2]
    assert 1 not in epochs[2:]


def test_a_candidate_that_kills_its_workers_is_given_up(data: DataSet, tmp_path: Path) -> None:
    with WorkerPool(1, SETUP, data, tmp_path) as pool:
        pool.submit(Job(3, F2, tmp_path / "3"))
        deaths, finished = 0, None
        while pool.busy:
            for pid in pids():
                os.kill(pid, signal.SIGKILL)
                deaths += 1
            for event in pool.events():
                assert isinstance(event, Finished)
                finished = event
    assert deaths == DEATHS_ALLOWED
    assert finished is not None
    one = finished.evaluation
    assert (one.number, one.plan, one.cost, one.state) == (3, F2, plan_cost(TINY, F2), "failed")
    assert one.reason == f"its worker died {DEATHS_ALLOWED} times, the last time with exit code -9"
    assert (one.split, one.scheme, one.seed) == ("validation", "percentile:1", 7)


def test_an_error_of_files_is_no_fault_of_the_candidate(data: DataSet, tmp_path: Path) -> None:
    (tmp_path / "3").write_text("not a folder")
    with WorkerPool(1, SETUP, data, tmp_path) as pool:
        pool.submit(Job(3, F2, tmp_path / "3"))
        with pytest.raises(FnetError, match=r"^candidate 3: (Not a directory|File exists): .*/3"):
            results(pool)
    assert pids() == []


def test_leaving_the_pool_ends_what_is_running(data: DataSet, tmp_path: Path) -> None:
    with WorkerPool(2, SETUP, data, tmp_path) as pool:
        pool.submit(Job(3, F2, tmp_path / "3"))
        assert len(pids()) == 1
    assert pids() == []
    assert not (tmp_path / ".dataset.safetensors").exists()
