"""A time limit of a search: where it stops, so that nothing is lost and it always gets further."""

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fnet_search.training.train import TrainingProgress


class TimeUp(Exception):  # noqa: N818 (reads as what happened; not an error)
    """The time limit was reached before the work was done; what was done is kept, and the same search goes on."""


class Deadline:
    """No epoch is begun that would end after it, by the time that the last one of the same training took.

    One epoch is done in any case: a limit that is shorter gets further too.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self._end = time.monotonic() + seconds
        self._begun: dict[int, float] = {}
        self.worked = False
        """Whether this process has got any further."""

    def check(self, idle: bool = False) -> None:
        """Raises TimeUp where no other piece of work is to be begun; or where, `idle`, others' is only waited for."""
        if self.over or (idle and time.monotonic() >= self._end):
            raise TimeUp

    def begin(self, number: int) -> None:
        """A training starts or goes on."""
        self._begun[number] = time.monotonic()

    @property
    def over(self) -> bool:
        return self.worked and time.monotonic() >= self._end

    def holds(self, number: int, progress: "TrainingProgress") -> bool:
        """Whether a training is to wait where its epoch ended, until it is cut off there: its checkpoint is written."""
        now = time.monotonic()
        begun, self._begun[number] = self._begun[number], now
        if progress.loss is None:  # from a checkpoint: told again
            return False
        self.worked = True
        return progress.epoch < progress.epochs and now + (now - begun) > self._end
