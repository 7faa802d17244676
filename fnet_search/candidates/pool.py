"""What the search loop asks of workers, and what it hears from them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from fnet_search.candidates.job import Job, Setup
from fnet_search.candidates.probes import ProbeTask
from fnet_search.policy.evaluation import Evaluation, Probe
from fnet_search.training.train import TrainingProgress

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


class Pool(Protocol):
    """Workers that train candidates and probe layers, each one task at a time."""

    @property
    def setup(self) -> Setup:
        """What all candidates have in common."""
        ...

    @property
    def count(self) -> int:
        """Workers, at most."""
        ...

    @property
    def busy(self) -> int:
        """Workers that have a task."""
        ...

    @property
    def held(self) -> int:
        """Workers whose training waits at the end of an epoch, for good."""
        ...

    def submit(self, task: Task) -> None:
        """Gives a task to an idle worker. Raises RuntimeError where there is none."""
        ...

    def events(self, judge: Judge = ...) -> Iterator[Progressed | Finished | Probing | Probed]:
        """Waits for the next news and yields it. Raises FnetError when a worker met an error of files (a full disk).

        A worker whose epoch ended waits for what `judge` says of it. Not to be called when all that are busy are held.
        """
        ...
