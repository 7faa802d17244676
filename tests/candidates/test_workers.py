import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.layers import Activation, Conv, Dense, Flatten, Pool
from fnet_search.arch.plan import depthwise, regular, uniform
from fnet_search.base.errors import FnetError
from fnet_search.base.units import percent
from fnet_search.candidates.evaluate import evaluate
from fnet_search.candidates.in_process import InProcessPool
from fnet_search.candidates.job import Job, Setup, Start, unfinished
from fnet_search.candidates.network_files import CHECKPOINT, QUANTIZED, WEIGHTS
from fnet_search.candidates.pool import Finished, Probed, Probing, Progressed
from fnet_search.candidates.probes import probe_layer, probe_tasks
from fnet_search.candidates.processes import process_context, starting
from fnet_search.candidates.worker_count import cores, how_many, memory_of
from fnet_search.candidates.workers import MAX_DEATHS, WorkerPool
from fnet_search.importing.spaces import load_space
from fnet_search.policy.evaluation import Evaluation
from fnet_search.quant.scheme import PAPER
from fnet_search.training.datasets import DataSet
from fnet_search.training.recipe import Fidelity, Recipe
from fnet_search.training.train import TrainingProgress
from tests.support.networks import CPU, FAST, compiled, digits, noise, sequence

TINY = load_space("tiny")
REGULAR, F2, DWS = regular(TINY), uniform(TINY, 2), depthwise(TINY)
SETUP = Setup(TINY, Recipe("test", 3, 50, 0.05), (PAPER,), CPU, 7, "validation")


@pytest.fixture(scope="module")
def data() -> DataSet:
    return digits(200)


@pytest.fixture(scope="module")
def expected(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Candidate 3, regular, evaluated in this process."""
    return evaluate(SETUP, data, Job(3, REGULAR, tmp_path_factory.mktemp("expected")), lambda progress: None)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def test_a_pool_within_this_process(data: DataSet, tmp_path: Path, expected: Evaluation) -> None:
    """News come while it trains; a training waits for what is said at the end of an epoch, and may be left there."""
    epochs: list[int] = []

    def judge(number: int, progress: TrainingProgress) -> bool | None:
        epochs.append(progress.epoch) if progress.ended else None
        return None if number == 5 and progress.ended else False

    before = torch.get_num_threads()
    with InProcessPool(SETUP, data, tmp_path) as pool:
        pool.submit(Job(3, REGULAR, tmp_path / "3"))
        with pytest.raises(RuntimeError, match="every worker is busy"):
            pool.submit(Job(4, F2, tmp_path / "4"))
        (finished,) = results(pool)
        pool.submit(Job(5, F2, tmp_path / "5"))
        while not pool.paused:
            list(pool.events(judge))
        assert pids() == []
    assert finished.evaluation == expected
    assert epochs == [1]
    assert list(tmp_path.glob(".*")) == [], "the data set's file is gone"
    assert torch.get_num_threads() == before


def test_layers_are_probed_as_in_this_process(data: DataSet, tmp_path: Path) -> None:
    """Beside a candidate; a killed worker's layer is probed again."""
    assert evaluate(SETUP, data, Job(0, REGULAR, tmp_path / "0"), lambda progress: None).state == "complete"
    first, second, _ = probe_tasks(TINY, Start(0, REGULAR, tmp_path / "0", 3))
    events = []
    with WorkerPool(2, SETUP, data, tmp_path) as pool:
        pool.submit(first)
        pool.submit(Job(4, F2, tmp_path / "4"))
        while pool.busy:
            events += list(pool.events())
        pool.submit(second)
        for pid in pids():
            os.kill(pid, signal.SIGKILL)
        while pool.busy:
            events += list(pool.events())
    probed = {event.task: event.probes for event in events if isinstance(event, Probed)}
    assert probed == {task: probe_layer(SETUP, data, task) for task in (first, second)}
    steps = [event.done for event in events if isinstance(event, Probing) and event.task == first]
    assert steps == [*range(1, len(first.rates) + 1)]
    assert [event.evaluation.number for event in events if isinstance(event, Finished)] == [4]


def test_a_probe_that_cannot_be_made_is_an_error(data: DataSet, tmp_path: Path) -> None:
    task = probe_tasks(TINY, Start(0, REGULAR, tmp_path / "nowhere", 3))[0]
    with WorkerPool(1, SETUP, data, tmp_path) as pool:
        pool.submit(task)
        with pytest.raises(FnetError, match=r"^probing layer 'conv_8': .*nowhere.weights\.safetensors"):
            results(pool)


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
    assert epochs[-3:] == [1, 2, 3], "what was reached is reported again"


@pytest.mark.slow
@compiled
def test_what_a_worker_did_before_changes_nothing(data: DataSet, tmp_path: Path) -> None:
    """Nor do kernels that it compiled for another network and another number of threads."""
    numerics, fidelity = replace(FAST, alone_threads=2), Fidelity(final_epochs=1)
    setup = replace(SETUP, recipe=SETUP.recipe.with_epochs(1), numerics=numerics, fidelity=fidelity)
    jobs = [Job(4, F2, tmp_path / "4", "final"), Job(3, REGULAR, tmp_path / "3"), Job(5, F2, tmp_path / "5")]
    found = []
    with WorkerPool(1, setup, data, tmp_path) as pool:
        for job in jobs:
            pool.submit(job)
            found += results(pool)
    assert len(pids()) == 0
    expected = []
    for job in reversed(jobs):
        with threads(2 if job.role == "final" else 1):
            expected.append(evaluate(setup, data, replace(job, folder=job.folder / "here"), lambda progress: None))
    assert [one.evaluation for one in found] == expected[::-1]
    assert found[0].evaluation.layers != found[2].evaluation.layers, "more threads round otherwise"


def test_hopeless_candidates_are_stopped(data: DataSet, tmp_path: Path, expected: Evaluation) -> None:
    """At the end of an epoch, by the judge; the worker goes on with others."""
    asked: list[tuple[int, int, bool]] = []

    def judge(number: int, progress: TrainingProgress) -> bool:
        asked.append((number, progress.epoch, progress.ended))
        return number == 3 and (not progress.ended or progress.epoch == 2)

    found: dict[int, Evaluation] = {}
    with WorkerPool(1, SETUP, data, tmp_path) as pool:
        for number in (3, 4):
            pool.submit(Job(number, REGULAR, tmp_path / str(number)))
            events = []
            while pool.busy:
                events += list(pool.events(judge))
            steps = [one.progress for one in events if isinstance(one, Progressed) and one.number == number]
            assert [(number, one.epoch, one.ended) for one in steps] == [one for one in asked if one[0] == number]
            found |= {one.evaluation.number: one.evaluation for one in events if isinstance(one, Finished)}
    assert [(number, epoch) for number, epoch, ended in asked if ended] == [(3, 1), (3, 2), (4, 1), (4, 2), (4, 3)]
    reason = f"behind the others after epoch 2 of 3 ({percent(expected.accuracies[1], 1)})"
    stopped = unfinished(SETUP, Job(3, REGULAR, tmp_path), "pruned", reason)
    assert found[3] == replace(stopped, epochs=2, trained_images=2 * 200, accuracies=expected.accuracies[:2])
    assert found[4] == replace(expected, number=4)


def test_a_candidate_that_kills_its_workers_is_given_up(data: DataSet, tmp_path: Path) -> None:
    with WorkerPool(1, SETUP, data, tmp_path) as pool:
        pool.submit(Job(3, F2, tmp_path / "3", start=Start(1, REGULAR, tmp_path / "1", 5)))
        deaths, finished = 0, None
        while pool.busy:
            for pid in pids():
                os.kill(pid, signal.SIGKILL)
                deaths += 1
            for event in pool.events():
                assert isinstance(event, Finished)
                finished = event
    assert deaths == MAX_DEATHS
    assert finished is not None
    one = finished.evaluation
    assert (one.number, one.plan, one.cost, one.state) == (3, F2, plan_cost(TINY, F2), "failed")
    assert one.reason == f"its worker died {MAX_DEATHS} times, lastly with exit code -9"
    assert (one.split, one.scheme, one.seed) == ("validation", "percentile:1", 7)
    assert (one.role, one.parent, one.inherited_epochs, one.epochs) == ("candidate", 1, 5, 0)


def test_what_a_worker_died_of_is_said(data: DataSet, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In the reason, not in a traceback."""
    setup = replace(SETUP, numerics=replace(CPU, group_widths=("sixteen",)))
    with WorkerPool(1, setup, data, tmp_path) as pool:
        pool.submit(Job(3, DWS, tmp_path / "3"))
        (finished,) = results(pool)
    cause = "of TypeError: '>' not supported between instances of 'int' and 'str'"
    died = f"its worker died {MAX_DEATHS} times, lastly with exit code 1"
    assert (finished.evaluation.state, finished.evaluation.reason) == ("failed", f"{died}, {cause}")
    assert capfd.readouterr() == ("", "")


def test_an_error_of_files_is_no_fault_of_the_candidate(data: DataSet, tmp_path: Path) -> None:
    (tmp_path / "3").write_text("not a folder")
    with WorkerPool(1, SETUP, data, tmp_path) as pool:
        pool.submit(Job(3, F2, tmp_path / "3"))
        with pytest.raises(FnetError, match=r"^candidate 3: (Not a directory|File exists): .*/3"):
            results(pool)
    assert pids() == []


def _send_whether_compiling_is_imported(pipe: Connection) -> None:
    pipe.send("torch._inductor.compile_fx" in sys.modules)


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="there is no fork server")
def test_what_compiles_is_imported_before_workers_are_forked() -> None:
    context = process_context()
    ours, theirs = context.Pipe()
    with starting(1):
        process = context.Process(target=_send_whether_compiling_is_imported, args=(theirs,))
        process.start()
    theirs.close()
    assert ours.recv()
    process.join()


def test_leaving_the_pool_ends_what_is_running(data: DataSet, tmp_path: Path) -> None:
    with WorkerPool(2, SETUP, data, tmp_path) as pool:
        pool.submit(Job(3, F2, tmp_path / "3"))
        assert len(pids()) == 1
    assert pids() == []
    assert not (tmp_path / ".dataset.safetensors").exists()


def test_memory_of_a_worker_by_hand() -> None:
    """A data set, weights with gradients, momenta and copies, and activations with gradients, beyond what all need."""
    space = sequence((3, 8, 8), c=Conv(4, (1, 1)), a=Activation(), p=Pool(), f=Flatten(), d=Dense(2))
    data = noise(space, 100)  # the same in every split
    images = 3 * 100 * 3 * 8 * 8
    params = 3 * 4 + 4 * 4 * 4 * 2 + 2
    activations = 2 * 4 * 8 * 8 + 2 * 4 * 4 * 4 + 2
    fixed = memory_of(space, Recipe("r", 1, 64, 0.1), data) - images - 24 * params - 8 * activations * 250
    assert 300e6 < fixed < 1.5e9
    for batch, rows in ((2, 250), (250, 250), (251, 251), (1000, 1000)):
        found = memory_of(space, Recipe("r", 1, batch, 0.1), data)
        assert found == fixed + images + 24 * params + 8 * activations * rows


@pytest.mark.slow
def test_memory_of_a_worker_as_measured(tmp_path: Path) -> None:
    """Of one that has trained and measured the regular network; its heap is kept."""
    space, recipe, data = load_space("factorizenet"), Recipe("r", 1, 64, 0.01), digits(128)
    data = replace(data, evaluation=data.evaluation.take(torch.arange(250)))
    with WorkerPool(1, Setup(space, recipe, (PAPER,), CPU, 0, "validation"), data, tmp_path) as pool:
        pool.submit(Job(0, regular(space), tmp_path / "0"))
        assert results(pool)[0].evaluation.state == "complete"
        (pid,) = pids()
        measured = psutil.Process(pid).memory_info().rss
    assert 0.7 < memory_of(space, recipe, data) / measured < 2


def test_how_many_workers_there_is_room_for(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    each = memory_of(TINY, SETUP.recipe, data)

    def found(wanted: int | None, threads: int = 1, device: str = "cpu") -> int:
        return how_many(wanted, device, threads, TINY, SETUP.recipe, data)

    monkeypatch.setattr("fnet_search.candidates.worker_count.cores", lambda: 12)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * each + 1000))
    assert [found(None, threads) for threads in (1, 4, 5, 6, 12, 13)] == [3, 3, 2, 2, 1, 1]
    assert [found(wanted) for wanted in (1, 2, 3)] == [1, 2, 3]
    free = f"of which {3 * each / 1e9:.1f} GB are free; use `workers` 3 or a smaller batch"
    with pytest.raises(FnetError) as caught:
        found(4)
    assert str(caught.value) == f"4 workers need about {4 * each / 1e9:.1f} GB, {free}"

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * each + 1000, 80 * each))
    assert (found(None, device="cuda:1"), found(5, device="cuda:1")) == (2, 5)
    with pytest.raises(FnetError, match=f" of which {5 * each / 1e9:.1f} GB are free; use `workers` 5 or a smaller"):
        found(6, device="cuda:1")

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=each // 2))
    assert (found(None), found(1)) == (1, 1), "it may still fit: an estimate must not keep anyone from trying"
    with pytest.raises(FnetError, match=r"use `workers` 1 or a smaller batch$"):
        found(2)


def test_far_more_workers_than_memory_holds(data: DataSet) -> None:
    """Of this machine."""
    with pytest.raises(FnetError, match=r"^1000000 workers need about \d{6}\.\d GB, of which \d+\.\d GB are free; use"):
        how_many(1_000_000, "cpu", 1, TINY, SETUP.recipe, data)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not bind processes to cores")
def test_cores_are_those_that_may_be_used() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from fnet_search.candidates.worker_count import cores\n"
    child = subprocess.run([sys.executable, "-c", code + "print(cores())"], capture_output=True, text=True, check=True)
    assert child.stdout == "1\n"
    assert 1 <= cores() <= (os.cpu_count() or 1)
