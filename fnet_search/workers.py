"""Worker processes that train candidates: started once, kept warm, replaced when they die."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType

import torch
import torch.multiprocessing

from fnet_search.data import DataSet, read_dataset
from fnet_search.errors import FnetError
from fnet_search.evaluate import Setup, evaluate
from fnet_search.plan import FactorizationPlan, plan_cost
from fnet_search.policy import Evaluation
from fnet_search.train import TrainingProgress

DEATHS_ALLOWED = 5


@dataclass(frozen=True)
class Job:
    """One candidate to train, its files to go to `folder`."""

    number: int
    plan: FactorizationPlan
    folder: Path


@dataclass(frozen=True)
class Progressed:
    """A step further in the training of a candidate."""

    number: int
    progress: TrainingProgress


@dataclass(frozen=True)
class Finished:
    """A candidate's evaluation, complete or failed, and how long it took."""

    evaluation: Evaluation
    seconds: float


@dataclass
class _Worker:
    process: BaseProcess
    pipe: "Connection[object, object]"
    job: Job | None = None


class WorkerPool:
    """`count` processes with `setup.numerics.threads` threads each. Use as a context manager: leaving it ends them.

    The data set travels in one file in `scratch`, so that no process decodes it again.
    """

    def __init__(self, count: int, setup: Setup, data: DataSet, scratch: Path) -> None:
        self.count, self.setup = count, setup
        self._data = scratch / ".dataset.safetensors"
        data.save(self._data)
        self._workers: list[_Worker] = []
        self._deaths: dict[int, int] = {}

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
        self._data.unlink(missing_ok=True)

    @property
    def busy(self) -> int:
        """Candidates in training."""
        return sum(worker.job is not None for worker in self._workers)

    def submit(self, job: Job) -> None:
        """Gives a candidate to an idle worker, starting one if there are fewer than `count`."""
        idle = [worker for worker in self._workers if worker.job is None]
        if not idle:
            if len(self._workers) == self.count:
                raise RuntimeError("every worker is busy; wait for an event first")
            idle = [self._start()]
            self._workers += idle
        idle[0].job = job
        with suppress(OSError):  # it died while idle: `events` sees that and replaces it
            idle[0].pipe.send(job)

    def events(self) -> Iterator[Progressed | Finished]:
        """Waits for the next news and yields it. Raises FnetError when a worker met an error of files (a full disk)."""
        pipes = {worker.pipe: worker for worker in self._workers}
        for pipe in wait(list(pipes)):
            worker = pipes[pipe]  # type: ignore[index]
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                yield from self._replace(worker)
                continue
            if isinstance(message, str):
                raise FnetError(f"candidate {worker.job.number if worker.job else '?'}: {message}")
            if isinstance(message, Finished):
                worker.job = None
            assert isinstance(message, Progressed | Finished)
            yield message

    def _start(self) -> _Worker:
        context = torch.multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.setup, self._data), daemon=True)
        with _environment(self.setup.numerics.threads), _uninterrupted():
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def _replace(self, dead: _Worker) -> Iterator[Finished]:
        """A new worker takes over the candidate of a dead one, from its checkpoint; the fifth death is the last."""
        dead.process.join()
        dead.pipe.close()
        self._workers.remove(dead)
        if dead.job is None:
            return
        deaths = self._deaths[dead.job.number] = self._deaths.get(dead.job.number, 0) + 1
        if deaths < DEATHS_ALLOWED:
            self.submit(dead.job)
            return
        reason = f"its worker died {deaths} times, the last time with exit code {dead.process.exitcode}"
        setup, plan = self.setup, dead.job.plan
        failed = Evaluation(dead.job.number, plan, plan_cost(setup.space, plan), "failed", reason, setup.split)
        yield Finished(replace(failed, scheme=str(setup.scheme), seed=setup.seed), 0.0)


@contextmanager
def _environment(threads: int) -> Iterator[None]:
    """What a worker must find in its environment from the start.

    OpenMP reads its threads when torch is imported. glibc gives every large tensor fresh pages and takes them back,
    which costs a training a quarter of its time in page faults; a heap that is kept avoids that.
    """
    wanted = {"OMP_NUM_THREADS": str(threads), "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C goes to all processes of a terminal, but one that is started here never sees it: the host ends it."""
    resource_tracker.ensure_running()  # its start, else part of that of the first process, would let Ctrl-C in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: "Connection[object, object]", setup: Setup, data_path: Path) -> None:
    """A worker's life: jobs in, news out, until the other end is closed."""
    torch.set_num_threads(setup.numerics.threads)
    torch.backends.cudnn.allow_tf32 = False  # evaluations are in float32 proper, on CUDA too
    try:
        data = read_dataset(data_path).to(setup.numerics.device)
        while True:
            job = pipe.recv()
            assert isinstance(job, Job)
            pipe.send(_run(pipe, setup, data, job))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the host is gone


def _run(pipe: "Connection[object, object]", setup: Setup, data: DataSet, job: Job) -> Finished | str:
    start = time.monotonic()
    last = 0.0

    def report(progress: TrainingProgress) -> None:
        nonlocal last
        if progress.ended or time.monotonic() - last > 0.2:
            last = time.monotonic()
            pipe.send(Progressed(job.number, progress))

    try:
        evaluation = evaluate(setup, data, job.number, job.plan, job.folder, report)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except OSError as error:
        return f"{error.strerror or error}: {error.filename or job.folder}"
    except FnetError as error:
        return str(error)
    return Finished(evaluation, time.monotonic() - start)
