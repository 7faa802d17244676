"""The time limit of a search: it stops at the end of an epoch, so that nothing is lost, and every attempt advances."""

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fnet_search.training.train import TrainingProgress


class TimeUp(Exception):  # noqa: N818 (reads as what happened; not an error)
    """The time limit was reached before the work was done. The work done is kept, and the search can be resumed."""


class Deadline:
    """A time limit, in seconds from now: no epoch is started that would end after it, judged by the last epoch of the
    same training. One epoch is always done, so that a shorter limit advances too.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self._end = time.monotonic() + seconds
        self._started: dict[int, float] = {}
        self.worked = False
        """Whether this process has done an epoch or other work."""

    def check(self, idle: bool = False) -> None:
        """Raises TimeUp if no further work may be started. If `idle`, this process only waits for others: the limit
        alone counts then."""
        if self.over or (idle and time.monotonic() >= self._end):
            raise TimeUp

    def begin(self, number: int) -> None:
        """Notes that training `number` starts or is resumed."""
        self._started[number] = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether the time is up and this process has done some work."""
        return self.worked and time.monotonic() >= self._end

    def must_pause(self, number: int, progress: "TrainingProgress") -> bool:
        """Whether a training must stop at the end of this epoch, whose checkpoint is written."""
        now = time.monotonic()
        started, self._started[number] = self._started[number], now
        if progress.loss is None:  # an epoch of the checkpoint, reported again
            return False
        self.worked = True
        return progress.epoch < progress.epochs and now + (now - started) > self._end
