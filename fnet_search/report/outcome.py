"""The outcome of a run as data: what its figures and its report show, and what `search` returns."""

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
    """Reasons for caution with the accuracies of a run, given what its validation split is
    (`Evaluation.validation`)."""
    texts = []
    if validation == MAYBE_KNOWN:
        texts.append(
            "the validation images are a part of the training images, which the weights may have been trained on: "
            "accuracies and constraints on them may be too good; put validation images into val/ of the image folder, "
            "or give a folder of validation images"
        )
    if not has_test:
        texts.append(
            "the data set has no test images (test/): the accuracy of the winner on images that chose nothing is not "
            "known"
        )
    return texts


@dataclass(frozen=True)
class Outcome:
    """The result of a search, or of an evaluation of given plans: what `search` and `evaluate` return."""

    folder: Path
    """The run folder."""
    space: Macroarchitecture
    constraints: Constraints
    split: SplitName
    """The split that candidates were measured on."""
    evaluations: tuple[Evaluation, ...]
    """Those of all plans by number, refused plans included."""
    winner: Evaluation | None = None
    """The best candidate or, if none meets the constraints, the nearest; None for given plans and where nothing was
    trained."""
    test: Evaluation | None = None
    """The winner on the test split."""
    probes: Probes | None = None
    explanation: Explanation | None = None
    """The policy's explanation of the winner, where it gives one."""
    has_test: bool = True
    """Whether the data set has test images; `test` is None otherwise."""

    @property
    def validation(self) -> str:
        """What the validation split is (`Evaluation.validation`)."""
        return next((evaluation.validation for evaluation in self.evaluations if evaluation.validation), "")

    @property
    def measured_on(self) -> str:
        """The images that candidates were compared on, as in ``the validation images (val)``."""
        return f"the {self.split} images" + (f" ({self.validation})" if self.validation else "")

    @property
    def cautions(self) -> list[str]:
        """Reasons for caution with the accuracies of this run."""
        return cautions(self.validation, self.has_test or self.winner is None)

    @property
    def feasible(self) -> bool:
        """Whether the winner meets the constraints."""
        return self.winner is not None and self.constraints.feasible(self.winner)

    @property
    def undecided(self) -> list[Evaluation]:
        """The candidates that meet the constraints and cannot be told apart from the winner on the same images, fewest
        conv MACs first (`policy.significance.undecided`)."""
        return [] if self.winner is None else undecided(self.winner, self.evaluations, self.constraints)

    @property
    def report(self) -> Path:
        """One self-contained HTML page."""
        return self.folder / "report.html"

    def evaluation(self, plan: FactorizationPlan | str) -> Evaluation:
        """The evaluation of a plan, given itself or as `parse_plan` reads it. Raises FnetError if it was not
        evaluated."""
        wanted = parse_plan(self.space, plan) if isinstance(plan, str) else plan
        matches = [each for each in self.evaluations if each.plan == wanted and each.role != "final"]
        if not matches:
            raise FnetError(f"plan {label(self.space, wanted)} was not evaluated in {self.folder}")
        return matches[0]

    def headline(self) -> str:
        """One line: the winner, its conv MACs, its accuracies with their intervals, its quantization scheme, the
        cheapest candidate that cannot be told apart from it, and the folder with its files."""
        if self.winner is None:
            trained = sum(
                evaluation.state == "complete" and evaluation.role != "reference" for evaluation in self.evaluations
            )
            measured = f"{counted(trained, 'network')} measured; files in {self.folder}"
            return measured if trained else f"no candidate was trained; see {self.folder}"
        evaluation = self.winner
        trained_on = f", candidate {evaluation.parent} trained on" if evaluation.role == "final" else ""
        which = f"candidate {evaluation.number} ({label(self.space, evaluation.plan)}{trained_on})"
        metric = self.constraints.metric
        summary = f"{which}, {mmac(evaluation.cost.conv_macs)}, {_accuracies(evaluation, metric)}"
        if self.test is not None:
            summary += f"; {_accuracies(self.test, metric)}"
        elif not self.has_test:
            summary += "; no test images"
        if self.constraints.on_images:
            summary += f"; constraints checked on {self.measured_on}"
        summary += f"; quantized with {evaluation.scheme}"
        if self.undecided and (fewer := 1 - self.undecided[0].cost.conv_macs / evaluation.cost.conv_macs) > 0:
            summary += f"; candidate {self.undecided[0].number}: not distinguishable, {100 * fewer:.0f} % fewer MACs"
        missed = ", ".join(self.constraints.missed(evaluation))
        verdict = "winner:" if self.feasible else f"no candidate met the constraints; nearest, missing {missed}:"
        return f"{verdict} {summary}; files in {self.folder / 'best'}"


def _accuracies(evaluation: Evaluation, metric: MetricName) -> str:
    """The accuracies under the metric with their interval; plain accuracy beside another metric; a note where the
    network always predicts the same class."""
    said = f"fp32 {percent(evaluation.fp32_accuracy)} quint8 {percent(evaluation.quint8_accuracy)}"
    sure = f" ({interval(evaluation, metric)})" if evaluation.images else ""
    if metric != "accuracy":
        fp32, quint8 = evaluation.scores(metric)
        said = f"balanced accuracy fp32 {percent(fp32)} quint8 {percent(quint8)}{sure} (accuracy {said})"
    else:
        said += sure
    return f"{evaluation.split} {said}" + (f" ({evaluation.constant})" if evaluation.constant else "")


def interval(evaluation: Evaluation, metric: MetricName) -> str:
    """The 95 % interval of a quint8 accuracy: ``92.0 to 97.1, 287 images``."""
    low, high = score_interval(evaluation, metric)
    return f"{100 * low:.1f} to {100 * high:.1f}, {counted(evaluation.images, 'image')}"
