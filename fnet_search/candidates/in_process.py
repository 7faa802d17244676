"""A pool whose one worker is a thread of this process: for debuggers and tests.

Nothing is started and nothing imported again. What a process buys is lost: a crash takes the host with it, and memory
is not kept between steps (`workers.environment`), so that training is slower.
"""

from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

from fnet_search.candidates.job import Setup
from fnet_search.candidates.workers import Worker, WorkerPool, work
from fnet_search.training.datasets import DataSet


class InProcessPool(WorkerPool):
    """`pool.Pool` with one worker, which trains bit for bit as a process would."""

    def __init__(self, setup: Setup, data: DataSet, scratch: Path) -> None:
        super().__init__(1, setup, data, scratch)

    def start(self) -> Worker:
        ours, theirs = Pipe()
        thread = _WorkerThread(theirs, self.setup, self.data_file)
        thread.start()
        return Worker(thread, ours)


class _WorkerThread(Thread):
    """Ends where its pipe does: at its next word to the host."""

    exitcode = None

    def __init__(self, pipe: "Connection[object, object]", setup: Setup, data_file: Path) -> None:
        super().__init__(daemon=True)
        self._pipe, self._setup, self._data_file = pipe, setup, data_file

    def run(self) -> None:
        with self._pipe:
            work(self._pipe, self._setup, self._data_file)

    def kill(self) -> None:
        """Nothing to do: the host closes the pipe."""
