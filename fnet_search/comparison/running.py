"""Runs a comparison: each part is a run in a subfolder of the comparison's folder; then the results are compared."""

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from fnet_search.arch.plan import parse_plan
from fnet_search.base.errors import FnetError
from fnet_search.comparison.definition import Comparison, Part
from fnet_search.comparison.result_page import write_results
from fnet_search.comparison.results import compared_networks
from fnet_search.engine.display import Display
from fnet_search.engine.preparation import check_same_config, recorded_numerics
from fnet_search.engine.reporting import open_record, report_again
from fnet_search.engine.request import Machine, Request
from fnet_search.engine.run import run_study
from fnet_search.inspection.requantize import requantize
from fnet_search.policy.fixed_plans import FixedPlans
from fnet_search.policy.registry import load_policy
from fnet_search.quant.scheme import parse_scheme, parse_schemes
from fnet_search.rundir.recorded_run import RecordedRun, open_run
from fnet_search.rundir.run_folder import RunFolder
from fnet_search.training.deadline import Deadline
from fnet_search.training.recipe import Fidelity


class ComparisonDisplay(Display, Protocol):
    """Shows a user the progress of a comparison."""

    def part(self, name: str, later: float) -> None:
        """The run `name` begins; about `later` epochs remain to be trained in the runs after it."""
        ...


PART = re.compile(r"(?:^|-)seed(\d+)$")
"""Matches the end of the name of a part's folder (`Part.name`); the group is the seed."""


@dataclass(frozen=True)
class ComparisonFolder:
    """The folder of a comparison: a run folder for each part, and the results of all."""

    path: Path

    def run(self, part: Part) -> RunFolder:
        return RunFolder(self.path / part.name)

    def check(self) -> None:
        """Raises FnetError if the path exists and is not the folder of a comparison.

        A folder with a part's subfolder is accepted even without results: its first run may have been killed early.
        """
        names = [path.name for path in self.path.iterdir() if path.name[0] != "."] if self.path.is_dir() else []
        if self.path.is_file() or "config.json" in names or (names and not any(map(PART.search, names))):
            raise FnetError(f"{self.path} exists and is not the folder of a comparison; choose another `out`")

    def whole(self, comparison: Comparison) -> Comparison:
        """The comparison with the seeds added that earlier calls recorded in this folder."""
        recorded_seeds = {int(match[1]) for path in self.path.glob("*seed*") if (match := PART.search(path.name))}
        seeds = (*comparison.seeds, *sorted(recorded_seeds - set(comparison.seeds)))
        return replace(
            comparison,
            seeds=tuple(seed for seed in seeds if seed in comparison.seeds or self._is_recorded(comparison, seed)),
        )

    def _is_recorded(self, comparison: Comparison, seed: int) -> bool:
        """Whether any variant of the comparison was begun with this seed."""
        return any(self.run(Part(variant, seed)).exists for variant in comparison.variants)

    def recorded(self, comparison: Comparison) -> dict[Part, RecordedRun]:
        """The runs of those parts that were begun."""
        return {part: open_run(self.run(part).path) for part in comparison.parts if self.run(part).exists}


def run_parts(
    comparison: Comparison,
    folder: ComparisonFolder,
    machine: Machine,
    display: ComparisonDisplay,
    deadline: Deadline | None = None,
) -> None:
    """Runs each part, resuming parts that an earlier process began.

    The results are written after each part, also if an error or an interrupt ends it. New parts compute with the
    numerics of those recorded before, unless `machine` asks for others.

    Raises FnetError if a recorded part has another configuration (before anything is trained) and as `run_study` does,
    and TimeUp at the deadline.
    """
    folder.check()
    deadline = deadline or Deadline()
    extended = folder.whole(comparison)
    for part in extended.parts:
        if folder.run(part).exists:
            check_same_config(folder.run(part), _request(comparison, part).config())
    for index, part in enumerate(comparison.parts):
        later = sum(
            epochs(comparison, later_part) - _finished_epochs(comparison, folder, later_part)
            for later_part in comparison.parts[index + 1 :]
        )
        display.part(part.name, later)
        try:
            _run_part(
                comparison, part, folder.run(part), _machine_of_part(folder, extended, part, machine), display, deadline
            )
        finally:
            if runs := folder.recorded(extended):
                write_results(extended, runs, folder.path)


def epochs(comparison: Comparison, part: Part) -> float:
    """About how many epochs a part trains. A search trains a reference, its candidates, and the best candidate on."""
    recipe = part.variant.recipe
    if comparison.search is None:
        return len(comparison.plans) * recipe.epochs
    return 2 * recipe.epochs + comparison.search.trials * recipe.warm().epochs


def _finished_epochs(comparison: Comparison, folder: ComparisonFolder, part: Part) -> float:
    """The epochs that the finished networks of a part took; for a search, all or none."""
    if not folder.run(part).exists:
        return 0.0
    plans = {network.plan for network in compared_networks(comparison, {part: open_run(folder.run(part).path)})}
    return epochs(comparison, part) * (len(plans) / len(comparison.plans) if comparison.search is None else len(plans))


def _machine_of_part(folder: ComparisonFolder, extended: Comparison, part: Part, machine: Machine) -> Machine:
    """The machine for a part. A new part gets the numerics of a recorded one, unless the machine asks for others."""
    other_runs = [folder.run(other) for other in extended.parts if other != part]
    recorded = next((run for run in other_runs if run.exists), None)
    if recorded is None or machine.numerics_of is not None or folder.run(part).exists:
        return machine
    return machine.computing_as(recorded.path) if machine.agrees(recorded_numerics(recorded)) else machine


def _run_part(
    comparison: Comparison, part: Part, run: RunFolder, machine: Machine, display: ComparisonDisplay, deadline: Deadline
) -> None:
    run_study(replace(_request(comparison, part), machine=machine), run, display, deadline)
    if comparison.search is None:
        _quantize(comparison, run, machine, display, deadline)


def _request(comparison: Comparison, part: Part) -> Request:
    """The request for the run of a part, on the default machine."""
    space, recipe, search = part.variant.space, part.variant.recipe, comparison.search
    request = Request(space, comparison.dataset, recipe, parse_schemes(comparison.schemes[0]), part.seed)
    if search is None:
        plans = tuple(dict.fromkeys(parse_plan(space, plan) for plan in comparison.plans))
        return replace(request, split="test", audit_all=True, policy=FixedPlans(plans))
    return replace(
        request,
        validation=comparison.validation,
        policy=load_policy(search.policy),
        policy_name=search.policy,
        trials=search.trials,
        constraints=search.constraints(space),
        fidelity=Fidelity(warm_start=True, prune=True, final_epochs=recipe.epochs),
    )


def _quantize(comparison: Comparison, run: RunFolder, machine: Machine, display: Display, deadline: Deadline) -> None:
    """Quantizes the trained networks of a part with each scheme after the first, unless that is recorded already."""
    opened = open_run(run.path)
    recorded = {(network.candidate, network.scheme) for network in opened.networks}
    trained = [network for network in opened.networks if network.folder == network.candidate and network.has_weights]
    schemes = list(map(parse_scheme, comparison.schemes[1:]))
    missing = [
        (network, scheme) for network in trained for scheme in schemes if (network.candidate, scheme) not in recorded
    ]
    if not missing:
        return
    with opened.run.locked():
        data = opened.data(machine.data_dir, partial(display.advance, "reading images"))
        for network, scheme in missing:
            deadline.check()
            requantize(opened, network, (scheme,), data, display.advance)
            deadline.worked = True
        report_again(open_record(opened, None))
