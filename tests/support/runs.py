"""Runs of the tiny space on the digits, each in a folder and in the test's own process."""

from dataclasses import replace
from pathlib import Path

from fnet_policies import Random
from fnet_search.candidates.job import Setup
from fnet_search.engine.reporting import open_record, report_again
from fnet_search.engine.request import Machine, Request
from fnet_search.engine.run import run_study
from fnet_search.engine.search_loop import Event, Started
from fnet_search.importing.spaces import load_space
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.protocol import Policy
from fnet_search.quant.scheme import PAPER
from fnet_search.report.outcome import Outcome
from fnet_search.rundir.recorded_run import open_run
from fnet_search.rundir.run_folder import RunFolder
from fnet_search.training.recipe import Fidelity, load_recipe

TINY = load_space("tiny")
SEARCH = Request(
    space=TINY,
    dataset="digits",
    recipe=load_recipe("quick").with_epochs(1),
    schemes=(PAPER,),
    seed=3,
    policy_name="random",
    constraints=Constraints(conv_macs=600_000),
    machine=Machine("cpu", "float32", 1, False, workers=0),
)
RANDOM = Random()
WARM = replace(SEARCH, fidelity=Fidelity(warm_start=True, warm_epochs=1, prune=True, final_epochs=2))
GIVEN = replace(SEARCH, policy_name="fixed plans", constraints=Constraints(), split="test", audit_all=True)


def reported(folder: Path, storage: str | None = None) -> Outcome:
    opened = open_run(folder)
    with opened.run.locked():
        return report_again(open_record(opened, storage))


class Notes:
    """A display that remembers."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.begun: list[tuple[int, int]] = []
        self.events: list[Event] = []

    def status(self, text: str) -> None:
        self.texts.append(text)

    say = status

    def advance(self, what: str, done: int, total: int) -> None:
        self.texts.append(f"{what}: {done} of {total}")

    def begin(self, run: RunFolder, setup: Setup, trials: int, done: int) -> None:
        self.begun.append((trials, done))

    def show(self, event: Event) -> None:
        self.events.append(event)

    @property
    def started(self) -> list[int]:
        return [event.job.number for event in self.events if isinstance(event, Started)]


def go(
    folder: Path, trials: int = 2, request: Request = SEARCH, policy: Policy = RANDOM, workers: int = 0
) -> tuple[Outcome, Notes]:
    notes = Notes()
    machine = replace(request.machine, workers=workers)
    request = replace(request, policy=policy, trials=trials, machine=machine)
    return run_study(request, RunFolder(folder), notes), notes
