"""A whole study: each of its parts is a run of its own, in a folder of the study's; then all are compared."""

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from fnet_search.arch.plan import parse_plan
from fnet_search.base.errors import FnetError
from fnet_search.comparison.definition import Comparison, Part
from fnet_search.comparison.results import compared_networks, write_results
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
    """Shows a user what goes on in a study of several runs."""

    def part(self, name: str, later: float) -> None:
        """The next run is begun; after it about so many epochs are to be trained in others."""
        ...


PART = re.compile(r"(?:^|-)seed(\d+)$")
"""How the folder of a part ends (`Part.name`)."""


@dataclass(frozen=True)
class ComparisonFolder:
    """Where a study is kept: a run folder for each part, and the results of all."""

    path: Path

    def run(self, part: Part) -> RunFolder:
        return RunFolder(self.path / part.name)

    def check(self) -> None:
        """Raises FnetError for a folder of something else; one whose first part was killed at once is a study's."""
        inside = [path.name for path in self.path.iterdir() if path.name[0] != "."] if self.path.is_dir() else []
        if self.path.is_file() or "config.json" in inside or (inside and not any(map(PART.search, inside))):
            raise FnetError(f"{self.path} exists and is not the folder of a study; choose another `out`")

    def whole(self, comparison: Comparison) -> Comparison:
        """With the seeds too that were recorded here before."""
        recorded_seeds = {int(match[1]) for path in self.path.glob("*seed*") if (match := PART.search(path.name))}
        seeds = (*comparison.seeds, *sorted(recorded_seeds - set(comparison.seeds)))
        return replace(
            comparison, seeds=tuple(seed for seed in seeds if seed in comparison.seeds or self._has(comparison, seed))
        )

    def _has(self, comparison: Comparison, seed: int) -> bool:
        return any(self.run(Part(variant, seed)).exists for variant in comparison.variants)

    def recorded(self, comparison: Comparison) -> dict[Part, RecordedRun]:
        """The runs of its parts, as far as they were begun."""
        return {part: open_run(self.run(part).path) for part in comparison.parts if self.run(part).exists}


def run_parts(
    comparison: Comparison,
    folder: ComparisonFolder,
    machine: Machine,
    display: ComparisonDisplay,
    deadline: Deadline | None = None,
) -> None:
    """Runs each part, going on where an earlier process stopped, and writes the results after each, whatever ends it.

    All compute as the first one did. Raises FnetError as `run_study` does, of a part that was recorded otherwise before
    anything is trained, and TimeUp at the deadline.
    """
    folder.check()
    deadline = deadline or Deadline()
    whole = folder.whole(comparison)
    for part in whole.parts:
        if folder.run(part).exists:
            check_same_config(folder.run(part), _asked(comparison, part).config())
    for place, part in enumerate(comparison.parts):
        later = sum(
            epochs(comparison, part) - _done(comparison, folder, part) for part in comparison.parts[place + 1 :]
        )
        display.part(part.name, later)
        try:
            _run_part(comparison, part, folder.run(part), _like(folder, whole, part, machine), display, deadline)
        finally:
            if runs := folder.recorded(whole):
                write_results(whole, runs, folder.path)


def epochs(comparison: Comparison, part: Part) -> float:
    """Of a part, about; searches train a reference, their candidates, and the best one on."""
    recipe = part.variant.recipe
    if comparison.search is None:
        return len(comparison.plans) * recipe.epochs
    return 2 * recipe.epochs + comparison.search.trials * recipe.warm().epochs


def _done(comparison: Comparison, folder: ComparisonFolder, part: Part) -> float:
    """Of its epochs, those of finished networks; of a search all or none."""
    if not folder.run(part).exists:
        return 0.0
    plans = {network.plan for network in compared_networks(comparison, {part: open_run(folder.run(part).path)})}
    return epochs(comparison, part) * (len(plans) / len(comparison.plans) if comparison.search is None else len(plans))


def _like(folder: ComparisonFolder, whole: Comparison, part: Part, machine: Machine) -> Machine:
    """The machine, computing as another part did where this one is new and nothing else is asked for."""
    others = [folder.run(one) for one in whole.parts if one != part]
    known = next((run for run in others if run.exists), None)
    if known is None or machine.numerics_of is not None or folder.run(part).exists:
        return machine
    return machine.computing_as(known.path) if machine.agrees(recorded_numerics(known)) else machine


def _run_part(
    comparison: Comparison, part: Part, run: RunFolder, machine: Machine, display: ComparisonDisplay, deadline: Deadline
) -> None:
    run_study(replace(_asked(comparison, part), machine=machine), run, display, deadline)
    if comparison.search is None:
        _quantize(comparison, run, machine, display, deadline)


def _asked(comparison: Comparison, part: Part) -> Request:
    """What a part asks of a run."""
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
    """The trained networks of a part, quantized as each further scheme says too, where they are not yet."""
    opened = open_run(run.path)
    known = {(network.candidate, network.scheme) for network in opened.networks}
    own = [network for network in opened.networks if network.folder == network.candidate and network.has_weights]
    further = list(map(parse_scheme, comparison.schemes[1:]))
    missing = [(network, scheme) for network in own for scheme in further if (network.candidate, scheme) not in known]
    if not missing:
        return
    with opened.run.locked():
        data = opened.data(machine.data_dir, partial(display.advance, "reading images"))
        for network, scheme in missing:
            deadline.check()
            requantize(opened, network, (scheme,), data, display.advance)
            deadline.worked = True
        report_again(open_record(opened, None))
