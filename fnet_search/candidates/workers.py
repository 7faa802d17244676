"""Worker processes that train candidates: started once, kept warm, replaced when they die."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType

import psutil
import torch
import torch.multiprocessing

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.factorize import factorize
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import regular
from fnet_search.base.errors import FnetError
from fnet_search.candidates.evaluate import evaluate
from fnet_search.candidates.job import Job, Setup, unfinished
from fnet_search.candidates.probes import ProbeTask, probe_layer
from fnet_search.policy.evaluation import Evaluation, Probe
from fnet_search.training.datasets import DataSet, read_dataset
from fnet_search.training.recipe import Recipe
from fnet_search.training.train import TrainingProgress

DEATHS_ALLOWED = 5
ON_CUDA = 2
"""Workers that share a CUDA device: small networks do not fill one."""


def cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_of(space: Macroarchitecture, recipe: Recipe, data: DataSet) -> int:
    """Bytes that a worker needs on its device for the regular network, about: torch itself, the data set, three numbers
    a parameter and the copies of one step, and each activation with its gradient for a batch."""
    plan = regular(space)
    network = factorize(space, plan)
    activations = sum(math.prod(network.shapes[node.name]) for node in network.order)
    images = sum(split.images.numel() for split in (data.train, data.evaluation, data.test))
    return 600 * 2**20 + images + 24 * plan_cost(space, plan).params + 8 * activations * max(recipe.batch_size, 250)


def how_many(
    wanted: int | None, device: str, threads: int, space: Macroarchitecture, recipe: Recipe, data: DataSet
) -> int:
    """Workers: those that are wanted, or as many as there is room for: one for `threads` cores, or `ON_CUDA`.

    Raises FnetError for more than the memory holds that is free now, of the CUDA device where there is one.
    """
    on_cuda = device.startswith("cuda")
    free: int = torch.cuda.mem_get_info(device)[0] if on_cuda else psutil.virtual_memory().available
    each = memory_of(space, recipe, data)
    fitting = max(1, free // each)
    if wanted is None:
        return min(fitting, ON_CUDA if on_cuda else max(1, cores() // threads))
    if wanted > fitting:
        raise FnetError(
            f"{wanted} workers need about {wanted * each / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free; use "
            f"`workers` {fitting} or a smaller batch"
        )
    return wanted


Task = Job | ProbeTask
"""What a worker does: train a candidate, or probe a layer."""

Judge = Callable[[int, TrainingProgress], bool | None]
"""Told of each step of a candidate; whether its training is to stop, where an epoch ended; None lets it wait there."""


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


@dataclass(frozen=True)
class Probing:
    """So many of a task's rates are measured."""

    task: ProbeTask
    done: int


@dataclass(frozen=True)
class Probed:
    """All rates of a task are measured."""

    task: ProbeTask
    probes: tuple[Probe, ...]


@dataclass(frozen=True)
class _Fault:
    """What a worker is about to die of, in a line."""

    reason: str


@dataclass
class _Worker:
    process: BaseProcess
    pipe: "Connection[object, object]"
    task: Task | None = None
    held: bool = False
    fault: str = ""


class WorkerPool:
    """`count` processes that train and probe, with `setup.threads_of` threads each. Use as a context manager: leaving
    it ends them.

    The data set travels in one file in `scratch`, so that no process decodes it again.
    """

    def __init__(self, count: int, setup: Setup, data: DataSet, scratch: Path) -> None:
        self.count, self.setup = count, setup
        self._data = scratch / ".dataset.safetensors"
        data.save(self._data)
        self._workers: list[_Worker] = []
        self._deaths: dict[Task, int] = {}

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
        """Workers that have a task."""
        return sum(worker.task is not None for worker in self._workers)

    @property
    def held(self) -> int:
        """Workers whose training waits at the end of an epoch, for good."""
        return sum(worker.held for worker in self._workers)

    def submit(self, task: Task) -> None:
        """Gives a task to an idle worker, starting one if there are fewer than `count`."""
        idle = [worker for worker in self._workers if worker.task is None]
        if not idle:
            if len(self._workers) == self.count:
                raise RuntimeError("every worker is busy; wait for an event first")
            idle = [self._start()]
            self._workers += idle
        idle[0].task = task
        with suppress(OSError):  # it died while idle: `events` sees that and replaces it
            idle[0].pipe.send(task)

    def events(
        self, judge: Judge = lambda number, progress: False
    ) -> Iterator[Progressed | Finished | Probing | Probed]:
        """Waits for the next news and yields it. Raises FnetError when a worker met an error of files (a full disk).

        A worker whose epoch ended waits for what `judge` says of it. Not to be called when all that are busy are held.
        """
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
                worker.held = message.progress.ended and stop is None
                if message.progress.ended and not worker.held:
                    with suppress(OSError):  # it died meanwhile
                        worker.pipe.send(stop)
            assert isinstance(message, Progressed | Finished | Probing | Probed)
            yield message

    def _start(self) -> _Worker:
        context = torch.multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.setup, self._data), daemon=True)
        with environment(self.setup.numerics.threads), _uninterrupted(), _without_main():
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def _replace(self, dead: _Worker) -> Iterator[Finished]:
        """A new worker takes over the task of a dead one, a training from its checkpoint; the fifth death is the last:
        a candidate has failed, a probe raises FnetError."""
        dead.process.join()
        dead.pipe.close()
        self._workers.remove(dead)
        if dead.task is None:
            return
        deaths = self._deaths[dead.task] = self._deaths.get(dead.task, 0) + 1
        if deaths < DEATHS_ALLOWED:
            self.submit(dead.task)
            return
        reason = f"its worker died {deaths} times, lastly with exit code {dead.process.exitcode}{dead.fault}"
        if isinstance(dead.task, ProbeTask):
            raise FnetError(f"{_named(dead.task)}: {reason}")
        yield Finished(unfinished(self.setup, dead.task, "failed", reason), 0.0)


@contextmanager
def _without_main() -> Iterator[None]:
    """Workers need nothing of the script that called; multiprocessing would run it again in each of them."""
    main = vars(sys.modules["__main__"])
    hidden = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update({"__spec__": None} | hidden)


def _named(task: Task | None) -> str:
    if isinstance(task, ProbeTask):
        return f"probing layer {task.layer!r}"
    return "a worker" if task is None else f"candidate {task.number}"


@contextmanager
def environment(threads: int) -> Iterator[None]:
    """What a worker must find in its environment from the start.

    OpenMP reads its threads when torch is imported. glibc gives every large tensor fresh pages and takes them back,
    which costs a training a quarter of its time in page faults; a heap that is kept, in huge pages, avoids that.
    """
    wanted = {
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
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
    """A worker's life: tasks in, news out, until the other end is closed."""
    torch.backends.cudnn.allow_tf32 = False  # evaluations are in float32 proper, on CUDA too
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
    except Exception as error:  # a process that met what it does not know is not used again
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
