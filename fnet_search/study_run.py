"""A whole study: each of its parts is a run of its own, in a folder of the study's; then all are compared."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from fnet_search.deadline import Deadline
from fnet_search.plan import parse_plan
from fnet_search.policy import FIXED_PLANS, Constraints, Policy, load_policy, parse_constraints
from fnet_search.recipe import Fidelity
from fnet_search.recorded import RecordedRun, open_run
from fnet_search.requantize import requantize
from fnet_search.request import Machine, Request
from fnet_search.run import Display, open_study, report_again, run_study
from fnet_search.runfolder import RunFolder
from fnet_search.search import FixedPlans
from fnet_search.studies import Part, Study


class StudyDisplay(Display, Protocol):
    """Shows a user what goes on in a study of several runs."""

    def part(self, name: str, later: float) -> None:
        """The next run is begun; after it about so many epochs are to be trained in others."""
        ...


@dataclass(frozen=True)
class StudyFolder:
    """Where a study is kept: a run folder for each part, and the results of all."""

    path: Path

    def run(self, part: Part) -> RunFolder:
        return RunFolder(self.path / part.name)


def run_parts(
    study: Study,
    folder: StudyFolder,
    machine: Machine,
    display: StudyDisplay,
    deadline: Deadline | None = None,
) -> None:
    """Runs each part, going on where an earlier process stopped.

    All compute as the first one does. Raises FnetError as `run_study` does, and TimeUp at the deadline.
    """
    deadline = deadline or Deadline()
    for place, part in enumerate(study.parts):
        display.part(part.name, sum(epochs(study, one) for one in study.parts[place + 1 :]))
        run = folder.run(part)
        first = folder.run(study.parts[0])
        computing = replace(machine, numerics_of=machine.numerics_of or first.path) if place else machine
        request, policy, trials = _asked(study, part)
        run_study(replace(request, machine=computing), policy, run, trials, display, deadline)
        _quantize(study, run, machine, display, deadline)


def recorded(study: Study, folder: StudyFolder) -> dict[Part, RecordedRun]:
    """The runs of its parts, as far as they were begun."""
    return {part: open_run(folder.run(part).path) for part in study.parts if folder.run(part).exists}


def epochs(study: Study, part: Part) -> float:
    """Of a part, about; searches train a reference, their candidates, and the best one on."""
    recipe = part.variant.recipe
    if study.search is None:
        return len(study.plans) * recipe.epochs
    return 2 * recipe.epochs + study.search.trials * recipe.warm().epochs


def _asked(study: Study, part: Part) -> tuple[Request, Policy, int]:
    """What a part asks of a run: the request, its policy, and how many trials."""
    space, recipe = part.variant.space, part.variant.recipe
    request = Request(
        space=space,
        dataset=study.dataset,
        recipe=recipe,
        fidelity=Fidelity(),
        policy_name=FIXED_PLANS,
        constraints=Constraints(),
        scheme=study.schemes[0],
        seed=part.seed,
        split="test",
        audit_all=True,
    )
    if study.search is None:
        plans = tuple(dict.fromkeys(parse_plan(space, plan) for plan in study.plans))
        return request, FixedPlans(plans), len(plans)
    searching = Fidelity(warm_start=True, prune=True, final_epochs=recipe.epochs)
    name = study.search.policy
    options = study.search
    limits = parse_constraints(space, options.budget, options.max_params, options.min_quint8, options.max_drop)
    request = replace(
        request, fidelity=searching, policy_name=name, constraints=limits, split="validation", audit_all=False
    )
    return request, load_policy(name), study.search.trials


def _quantize(study: Study, run: RunFolder, machine: Machine, display: Display, deadline: Deadline) -> None:
    """The trained networks of a part, quantized as each further scheme says too, where they are not yet."""
    opened = open_run(run.path)
    known = {(one.candidate, one.scheme) for one in opened.networks}
    own = [one for one in opened.networks if one.folder == one.candidate and one.has_weights]
    missing = [(one, scheme) for one in own for scheme in study.schemes if (one.candidate, scheme) not in known]
    if not missing:
        return
    with opened.run.locked():
        data = opened.data(machine.data_dir, partial(display.advance, "reading images"))
        for network, scheme in missing:
            deadline.check()
            what = f"quantizing candidate {network.id} with {scheme}"
            requantize(opened, network, scheme, data, partial(display.advance, what, total=len(data.evaluation)))
            deadline.worked = True
        report_again(open_study(opened, None))
