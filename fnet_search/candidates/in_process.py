"""A pool with one worker, a thread of this process: for debuggers and tests.

No process is started and nothing is imported again. On the other hand a crash ends the host too, and training is
slower, since freed memory is returned to the system (see `processes.environment`).
"""

from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

from fnet_search.candidates.job import Setup
from fnet_search.candidates.workers import Worker, WorkerPool, work
from fnet_search.training.datasets import DataSet


class InProcessPool(WorkerPool):
    """A `pool.Pool` with one worker, which computes bit for bit what a worker process does."""

    def __init__(self, setup: Setup, data: DataSet, scratch: Path) -> None:
        super().__init__(1, setup, data, scratch)

    def start(self) -> Worker:
        ours, theirs = Pipe()
        thread = _WorkerThread(theirs, self.setup, self.data_file)
        thread.start()
        return Worker(thread, ours)


class _WorkerThread(Thread):
    """Ends when its pipe is closed, at the next message to the host."""

    exitcode = None

    def __init__(self, pipe: "Connection[object, object]", setup: Setup, data_file: Path) -> None:
        super().__init__(daemon=True)
        self._pipe, self._setup, self._data_file = pipe, setup, data_file

    def run(self) -> None:
        with self._pipe:
            work(self._pipe, self._setup, self._data_file)

    def kill(self) -> None:
        """Does nothing: the host closes the pipe."""
