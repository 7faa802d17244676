"""The interface through which a run reports its progress."""

from typing import Protocol

from fnet_search.candidates.job import Setup
from fnet_search.engine.search_loop import Event
from fnet_search.rundir.run_folder import RunFolder


class Display(Protocol):
    """Shows the progress of a run. `progress.TerminalDisplay` is the one that the command line uses."""

    def status(self, text: str) -> None:
        """Shows what the run does now, as in ``reading digits``; a later call replaces it."""
        ...

    def say(self, text: str) -> None:
        """Shows a line that stays."""
        ...

    def advance(self, what: str, done: int, total: int) -> None:
        """Shows that `done` of `total` images or rates have gone through `what`, as in ``reading images``."""
        ...

    def begin(self, run: RunFolder, setup: Setup, trials: int, done: int) -> None:
        """Called before the search loop: it will train up to `trials` candidates, of which `done` were trained by
        earlier runs."""
        ...

    def show(self, event: Event) -> None:
        """Shows an event of the search loop."""
        ...
