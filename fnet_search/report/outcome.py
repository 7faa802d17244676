"""What a run came to, as data: what its figures and its report show, and what a caller of `search` is given."""

from dataclasses import dataclass
from pathlib import Path

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan, label, parse_plan
from fnet_search.base.errors import FnetError
from fnet_search.base.units import counted, mmac, percent
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import MAYBE_KNOWN, Evaluation, Probes, SplitName
from fnet_search.policy.explanation import Explanation
from fnet_search.policy.metric import MetricName
from fnet_search.policy.significance import score_interval, undecided


def cautions(validation: str, has_test: bool) -> list[str]:
    """What to know before accuracies are believed, by what the validation split is (`Evaluation.validation`)."""
    found = []
    if validation == MAYBE_KNOWN:
        found.append(
            "the validation images are a part of the training images, which the weights may have been trained on: "
            "accuracies and constraints on them may be too good; put validation images into val/ of the image folder, "
            "or give a folder of validation images"
        )
    if not has_test:
        found.append(
            "the data set has no test images (test/): what the winner reaches on images that chose nothing is not known"
        )
    return found


@dataclass(frozen=True)
class Outcome:
    """What a search, or an evaluation of given plans, came to; `search` and `evaluate` return it."""

    folder: Path
    """The run folder."""
    space: Macroarchitecture
    constraints: Constraints
    split: SplitName
    """What the candidates were measured on."""
    evaluations: tuple[Evaluation, ...]
    """Of all plans in order of their numbers, refused ones too."""
    winner: Evaluation | None = None
    """The best one, or if none meets the constraints the nearest; None in a study of fixed plans and where nothing was
    trained."""
    test: Evaluation | None = None
    """The winner on the test split."""
    probes: Probes | None = None
    explanation: Explanation | None = None
    """Why the winner, where the policy says so."""
    has_test: bool = True
    """Whether the data set has test images; else `test` is None."""

    @property
    def validation(self) -> str:
        """What the validation split is (`Evaluation.validation`)."""
        return next((one.validation for one in self.evaluations if one.validation), "")

    @property
    def measured_on(self) -> str:
        """The images that candidates were compared on, as in ``the validation images (val)``."""
        return f"the {self.split} images" + (f" ({self.validation})" if self.validation else "")

    @property
    def cautions(self) -> list[str]:
        """What to know before the accuracies are believed."""
        return cautions(self.validation, self.has_test or self.winner is None)

    @property
    def feasible(self) -> bool:
        """Whether the winner meets the constraints."""
        return self.winner is not None and self.constraints.feasible(self.winner)

    @property
    def undecided(self) -> list[Evaluation]:
        """The candidates that meet the constraints and cannot be told apart from the winner on the images that they
        were measured on, fewest conv MACs first (`paired.undecided`)."""
        return [] if self.winner is None else undecided(self.winner, self.evaluations, self.constraints)

    @property
    def report(self) -> Path:
        """One self-contained HTML page."""
        return self.folder / "report.html"

    def evaluation(self, plan: FactorizationPlan | str) -> Evaluation:
        """What a plan, or one of that name, came to. Raises FnetError for one that was not evaluated."""
        wanted = parse_plan(self.space, plan) if isinstance(plan, str) else plan
        found = [one for one in self.evaluations if one.plan == wanted and one.role != "final"]
        if not found:
            raise FnetError(f"plan {label(self.space, wanted)} was not evaluated in {self.folder}")
        return found[0]

    def headline(self) -> str:
        """One line: which network won, its conv MACs, its accuracies with their intervals, how it is quantized, the
        cheapest candidate that cannot be told apart from it, and where its files are."""
        if self.winner is None:
            trained = sum(one.state == "complete" and one.role != "reference" for one in self.evaluations)
            measured = f"{counted(trained, 'network')} measured; files in {self.folder}"
            return measured if trained else f"no candidate was trained; see {self.folder}"
        one = self.winner
        trained_on = f", candidate {one.parent} trained on" if one.role == "final" else ""
        which = f"candidate {one.number} ({label(self.space, one.plan)}{trained_on})"
        metric = self.constraints.metric
        found = f"{which}, {mmac(one.cost.conv_macs)}, {_accuracies(one, metric)}"
        if self.test is not None:
            found += f"; {_accuracies(self.test, metric)}"
        elif not self.has_test:
            found += "; no test images"
        if self.constraints.on_images:
            found += f"; constraints checked on {self.measured_on}"
        found += f"; quantized with {one.scheme}"
        if self.undecided and (fewer := 1 - self.undecided[0].cost.conv_macs / one.cost.conv_macs) > 0:
            found += f"; candidate {self.undecided[0].number}: not distinguishable, {100 * fewer:.0f} % fewer MACs"
        missed = ", ".join(self.constraints.missed(one))
        verdict = "winner:" if self.feasible else f"no candidate met the constraints; nearest, missing {missed}:"
        return f"{verdict} {found}; files in {self.folder / 'best'}"


def _accuracies(one: Evaluation, metric: MetricName) -> str:
    """Under the metric, beside it the accuracy; how sure it is; and whether it answers always the same."""
    said = f"fp32 {percent(one.fp32_accuracy)} quint8 {percent(one.quint8_accuracy)}"
    sure = f" ({span(one, metric)})" if one.images else ""
    if metric != "accuracy":
        fp32, quint8 = one.scores(metric)
        said = f"balanced accuracy fp32 {percent(fp32)} quint8 {percent(quint8)}{sure} (accuracy {said})"
    else:
        said += sure
    return f"{one.split} {said}" + (f" ({one.constant})" if one.constant else "")


def span(one: Evaluation, metric: MetricName) -> str:
    """How sure a quint8 accuracy is, for people: ``92.0 to 97.1, 287 images``."""
    low, high = score_interval(one, metric)
    return f"{100 * low:.1f} to {100 * high:.1f}, {counted(one.images, 'image')}"
