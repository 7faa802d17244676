"""What a run shows while it works."""

from typing import Protocol

from fnet_search.candidates.job import Setup
from fnet_search.engine.search_loop import Event
from fnet_search.rundir.run_folder import RunFolder


class Display(Protocol):
    """Shows a user what goes on."""

    def status(self, text: str) -> None:
        """What is being done now."""
        ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def advance(self, what: str, done: int, total: int) -> None:
        """How many of the images are through `what`, reading or measuring."""
        ...

    def begin(self, run: RunFolder, setup: Setup, trials: int, done: int) -> None:
        """The search starts, or goes on with `done` candidates trained before."""
        ...

    def show(self, event: Event) -> None:
        """Something happened in the search."""
        ...
