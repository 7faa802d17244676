"""The interface between the search loop and its workers: tasks and events."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from fnet_search.candidates.job import Job, Setup
from fnet_search.candidates.probes import ProbeTask
from fnet_search.policy.evaluation import Evaluation, Probe
from fnet_search.training.train import TrainingProgress

Task = Job | ProbeTask
"""A task of a worker: train a candidate, or probe a layer."""

Judge = Callable[[int, TrainingProgress], bool | None]
"""Called with the progress of each training. At the end of an epoch, returns True to stop the training, False to
continue it, None to let it wait."""


@dataclass(frozen=True)
class Progressed:
    """The training of a candidate has progressed."""

    number: int
    progress: TrainingProgress


@dataclass(frozen=True)
class Finished:
    """The evaluation of a candidate, and the seconds that it took."""

    evaluation: Evaluation
    seconds: float


@dataclass(frozen=True)
class Probing:
    """`done` rates of a task are measured."""

    task: ProbeTask
    done: int


@dataclass(frozen=True)
class Probed:
    """All rates of a task are measured."""

    task: ProbeTask
    probes: tuple[Probe, ...]


class Pool(Protocol):
    """Workers that train candidates and probe layers, each with one task at a time."""

    @property
    def setup(self) -> Setup:
        """What all candidates have in common."""
        ...

    @property
    def count(self) -> int:
        """The most workers."""
        ...

    @property
    def busy(self) -> int:
        """Workers that have a task."""
        ...

    @property
    def paused(self) -> int:
        """Workers whose training waits at the end of an epoch, to be continued by a later run."""
        ...

    def submit(self, task: Task) -> None:
        """Gives a task to an idle worker. Raises RuntimeError if there is none."""
        ...

    def events(self, judge: Judge = ...) -> Iterator[Progressed | Finished | Probing | Probed]:
        """Waits for the next events and yields them.

        `judge` decides on each training whose epoch has ended. Must not be called when every busy worker is paused.
        Raises FnetError if a worker cannot read or write a file (a full disk).
        """
        ...
