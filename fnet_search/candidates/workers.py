"""Worker processes that train candidates and probe layers: started once, reused, replaced when they die."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from fnet_search.base.errors import FnetError
from fnet_search.candidates.evaluate import evaluate
from fnet_search.candidates.job import Job, Setup, unfinished
from fnet_search.candidates.pool import Finished, Judge, Probed, Probing, Progressed, Task
from fnet_search.candidates.probes import ProbeTask, probe_layer
from fnet_search.candidates.processes import process_context, starting
from fnet_search.training.datasets import DataSet, read_dataset
from fnet_search.training.train import TrainingProgress

MAX_DEATHS = 5
"""A task whose workers died this often has failed: it may be what kills them."""


@dataclass(frozen=True)
class _Fault:
    """A worker's last message: the error that ends it, in one line."""

    reason: str


class Running(Protocol):
    """The part of `multiprocessing.Process` that a pool uses."""

    @property
    def exitcode(self) -> int | None: ...

    def kill(self) -> None: ...

    def join(self) -> None: ...


@dataclass
class Worker:
    """A worker process and its current task."""

    process: "Running"
    pipe: "Connection[object, object]"
    task: Task | None = None
    paused: bool = False
    fault: str = ""


class WorkerPool:
    """Up to `count` worker processes, with `setup.threads_of` threads each. A context manager, which ends them on exit.

    The data set is passed in a file in `scratch`, so that no process has to decode it again.
    """

    def __init__(self, count: int, setup: Setup, data: DataSet, scratch: Path) -> None:
        self.count, self.setup = count, setup
        self.data_file = scratch / ".dataset.safetensors"
        data.save(self.data_file)
        self._workers: list[Worker] = []
        self._deaths: dict[Task, int] = {}

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.pipe.close()
            worker.process.join()
        self.data_file.unlink(missing_ok=True)

    @property
    def busy(self) -> int:
        """The number of workers with a task."""
        return sum(worker.task is not None for worker in self._workers)

    @property
    def paused(self) -> int:
        """The number of workers whose training waits at the end of an epoch, to be continued by a later run."""
        return sum(worker.paused for worker in self._workers)

    def submit(self, task: Task) -> None:
        """Gives a task to an idle worker; starts a worker if none is idle and there are fewer than `count`. Raises
        RuntimeError if all are busy."""
        idle = [worker for worker in self._workers if worker.task is None]
        if not idle:
            if len(self._workers) == self.count:
                raise RuntimeError("every worker is busy; wait for an event first")
            idle = [self.start()]
            self._workers += idle
        idle[0].task = task
        with suppress(OSError):  # a worker that died while idle is replaced by `events`
            idle[0].pipe.send(task)

    def events(
        self, judge: Judge = lambda number, progress: False
    ) -> Iterator[Progressed | Finished | Probing | Probed]:
        """Waits for the next events and yields them (`pool.Pool.events`)."""
        pipes = {worker.pipe: worker for worker in self._workers}
        for pipe in wait(list(pipes)):
            worker = pipes[pipe]  # type: ignore[index]
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                yield from self._replace(worker)
                continue
            if isinstance(message, str):
                raise FnetError(f"{_named(worker.task)}: {message}")
            if isinstance(message, _Fault):
                worker.fault = f", of {message.reason}"
                continue
            if isinstance(message, Finished | Probed):
                worker.task = None
            if isinstance(message, Progressed):
                stop = judge(message.number, message.progress)
                worker.paused = message.progress.ended and stop is None
                if message.progress.ended and not worker.paused:
                    with suppress(OSError):  # it died meanwhile
                        worker.pipe.send(stop)
            assert isinstance(message, Progressed | Finished | Probing | Probed)
            yield message

    def start(self) -> Worker:
        context = process_context()
        ours, theirs = context.Pipe()
        with starting(self.setup.numerics.threads):
            given = dict(os.environ), theirs, self.setup, self.data_file
            process = context.Process(target=_process, args=given, daemon=True)
            process.start()
        theirs.close()
        return Worker(process, ours)

    def _replace(self, dead: Worker) -> Iterator[Finished]:
        """Replaces a dead worker. A new one takes over its task, a training from its checkpoint. After MAX_DEATHS a
        candidate has failed, and a probe raises FnetError."""
        dead.process.join()
        dead.pipe.close()
        self._workers.remove(dead)
        if dead.task is None:
            return
        deaths = self._deaths[dead.task] = self._deaths.get(dead.task, 0) + 1
        if deaths < MAX_DEATHS:
            self.submit(dead.task)
            return
        reason = f"its worker died {deaths} times, lastly with exit code {dead.process.exitcode}{dead.fault}"
        if isinstance(dead.task, ProbeTask):
            raise FnetError(f"{_named(dead.task)}: {reason}")
        yield Finished(unfinished(self.setup, dead.task, "failed", reason), 0.0)


def _named(task: Task | None) -> str:
    if isinstance(task, ProbeTask):
        return f"probing layer {task.layer!r}"
    return "a worker" if task is None else f"candidate {task.number}"


def _process(environment: dict[str, str], pipe: "Connection[object, object]", setup: Setup, data_path: Path) -> None:
    """Runs `work` with the host's current environment rather than that of the fork server's start."""
    os.environ.clear()
    os.environ.update(environment)
    work(pipe, setup, data_path)


def work(pipe: "Connection[object, object]", setup: Setup, data_path: Path) -> None:
    """The loop of a worker: receives tasks and sends events until the host closes the pipe."""
    torch.backends.cudnn.allow_tf32 = False  # full float32 precision, on CUDA too
    try:
        data = read_dataset(data_path).to(setup.numerics.device)
        while True:
            task = pipe.recv()
            assert isinstance(task, Job | ProbeTask)
            torch.set_num_threads(setup.numerics.threads if isinstance(task, ProbeTask) else setup.threads_of(task))
            pipe.send(_run(pipe, setup, data, task))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the host is gone
    except FnetError as error:
        with suppress(OSError):
            pipe.send(str(error))
    except Exception as error:  # after an unknown error the process is in an unknown state: end it
        line = next(iter(str(error).splitlines()), "")
        with suppress(OSError):
            pipe.send(_Fault(f"{type(error).__name__}: {line}".removesuffix(": ")))
        sys.exit(1)


def _run(pipe: "Connection[object, object]", setup: Setup, data: DataSet, task: Task) -> Finished | Probed | str:
    start, last = time.monotonic(), 0.0
    number = task.number if isinstance(task, Job) else 0

    def report(progress: TrainingProgress) -> bool:
        nonlocal last
        if progress.ended or time.monotonic() - last > 0.2:
            last = time.monotonic()
            pipe.send(Progressed(number, progress))
        return progress.ended and bool(pipe.recv())

    try:
        if isinstance(task, ProbeTask):
            return Probed(task, probe_layer(setup, data, task, lambda done: pipe.send(Probing(task, done))))
        evaluation = evaluate(setup, data, task, report)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except OSError as error:
        folder = task.start.folder if isinstance(task, ProbeTask) else task.folder
        return f"{error.strerror or error}: {error.filename or folder}"
    except FnetError as error:
        return str(error)
    return Finished(evaluation, time.monotonic() - start)
