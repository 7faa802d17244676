"""Figures of quality against MACs: the paper's Figure 4, and the policy's front."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.explanation import Explanation
from fnet_search.policy.metric import MetricName
from fnet_search.policy.ranking import ranking
from fnet_search.report.plot_labels import PointLabel, place_labels
from fnet_search.report.style import (
    COLOURS,
    GREY,
    MARKERS,
    best_name,
    finite,
    heading,
    legend,
    log_if_wide,
    new_figure,
    nothing,
    plan_name,
    style,
)

STAR = "#e69f00"


@dataclass(frozen=True)
class Panel:
    """A panel of Figure 4: its series, their unit, and the factor to that unit. Accuracies are those under the run's
    metric."""

    title: str
    unit: str
    series: Mapping[str, Callable[[Evaluation, MetricName], float | None]]
    scale: float = 1.0


PANELS: Mapping[str, Panel] = {
    "accuracy": Panel(
        "Accuracy",
        "accuracy (%)",
        {
            "fp32": lambda evaluation, metric: evaluation.scores(metric).fp32,
            "quint8": lambda evaluation, metric: evaluation.scores(metric).quint8,
        },
        100,
    ),
    "qmse": Panel(
        "QMSE", "squared error of the quint8 logits (QMSE)", {"QMSE": lambda evaluation, metric: evaluation.qmse}
    ),
    "qce": Panel(
        "QCE", "cross entropy of the quint8 outputs (QCE, nats)", {"QCE": lambda evaluation, metric: evaluation.qce}
    ),
    "drop": Panel(
        "Relative drop",
        "accuracy lost to quint8, relative to fp32 (%)",
        {"relative drop": lambda evaluation, metric: evaluation.scores(metric).relative_drop},
        100,
    ),
}


def _budget(axes: Axes, constraints: Constraints) -> None:
    """Vertical lines at limits on conv MACs, in MMAC."""
    for constraint in constraints.each:
        if constraint.axis == "conv_macs":
            axes.axvline(constraint.limit / 1e6, color=GREY, linestyle="--", linewidth=1, label=constraint.line)


def macs_figure(
    space: Macroarchitecture, constraints: Constraints, evaluations: Sequence[Evaluation], panel: str
) -> Figure:
    """A panel of the paper's Figure 4: `panel` (a key of METRICS) of each trained candidate against its conv MACs.

    A star marks the best candidate, dashed lines are the constraints. Labels without a free place are left out.
    """
    chosen = PANELS[panel]
    figure = new_figure(4.2)
    ranked = ranking(tuple(evaluations), constraints)
    metric = constraints.metric
    measured = [
        [finite(value(evaluation, metric)) * chosen.scale for value in chosen.series.values()] for evaluation in ranked
    ]
    drawn = [
        (evaluation, values)
        for evaluation, values in zip(ranked, measured, strict=True)
        if not all(map(math.isnan, values))
    ]
    splits = " and ".join(sorted({evaluation.split for evaluation, _ in drawn}))
    title = chosen.title.replace("Accuracy", constraints.measured.capitalize())
    heading(figure, f"{title} against MACs: {space.name}" + (f", {splits} split" if splits else ""))
    if not drawn:
        return nothing(figure)
    axes = figure.add_subplot()
    style(axes)
    axes.set_xlabel("multiply-accumulates in convolutions (MMAC)", fontsize=9)
    axes.set_ylabel(chosen.unit.replace("accuracy", constraints.measured), fontsize=9)
    macs = [evaluation.cost.conv_macs / 1e6 for evaluation, _ in drawn]
    known = [[value for value in values if math.isfinite(value)] for _, values in drawn]
    axes.vlines(macs, list(map(min, known)), list(map(max, known)), color="#bbbbbb", linewidth=1)
    for index, name in enumerate(chosen.series):
        axes.plot(
            macs, [values[index] for _, values in drawn], MARKERS[index], color=COLOURS[index], markersize=5, label=name
        )
    best = drawn[0][0]
    title = f"{best_name(constraints, best)}: {plan_name(space, best)}"
    axes.plot(
        macs[0], known[0][-1], "*", color=STAR, markeredgecolor="black", markeredgewidth=0.7, markersize=13, label=title
    )
    _budget(axes, constraints)
    for limited in constraints.each:
        if limited.axis == panel:
            axes.axhline(limited.limit * chosen.scale, color=GREY, linestyle=":", linewidth=1.2, label=limited.line)
    log_if_wide(axes, [value for values in known for value in values])
    axes.margins(x=0.08, y=0.1)
    legend(axes)
    labels = []
    for (evaluation, _), x, ys in zip(drawn, macs, known, strict=True):
        texts = dict.fromkeys([plan_name(space, evaluation), f"#{evaluation.number}"])
        labels.append(PointLabel(tuple(texts), x, ys, size=7.0 if evaluation is best else 4.0))
    place_labels(axes, labels)
    return figure


def front_figure(
    space: Macroarchitecture, constraints: Constraints, evaluations: Sequence[Evaluation], explanation: Explanation
) -> Figure:
    """The expected quint8 accuracy of the best plan at every budget, and the measured one of trained candidates."""
    figure = new_figure(4.0)
    heading(figure, f"The best plan at every budget, as expected: {space.name}")
    axes = figure.add_subplot()
    style(axes)
    axes.set_xlabel("multiply-accumulates in convolutions (MMAC)", fontsize=9)
    axes.set_ylabel(f"quint8 {constraints.measured} (%)", fontsize=9)
    macs = [conv_macs / 1e6 for _, conv_macs, _ in explanation.front]
    axes.plot(
        macs, [100 * accuracy for *_, accuracy in explanation.front], color=COLOURS[0], linewidth=1.6, label="expected"
    )
    measured = [
        (evaluation, evaluation.scores(constraints.metric).quint8)
        for evaluation in evaluations
        if evaluation.role == "candidate"
    ]
    points = [(evaluation.cost.conv_macs / 1e6, 100 * quint8) for evaluation, quint8 in measured if quint8 is not None]
    axes.plot(*zip(*points, strict=True), MARKERS[0], color=COLOURS[1], markersize=5, label="measured candidates")
    _budget(axes, constraints)
    legend(axes)
    return figure
