"""The figures of a run: the paper's Figure 4 (quality against MACs) and Figures 5 and 6 (layer by layer).

Functions of evaluations that return matplotlib figures; nothing global is touched, so any thread may draw.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan, label, legal_rates
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation, LayerStats, Probes
from fnet_search.policy.explanation import Explanation
from fnet_search.policy.metric import MetricName
from fnet_search.policy.ranking import ranking
from fnet_search.report.outcome import Outcome
from fnet_search.report.plot_labels import Labelled, place_labels
from fnet_search.report.style import (
    COLOURS,
    GREY,
    MARKERS,
    finite,
    heading,
    legend,
    log_if_wide,
    new_figure,
    nothing,
    plan_name,
    save_png,
    style,
)

SHOWN = 6  # networks of a search in a figure of layers
STAR = "#e69f00"


# Quality against MACs: Figure 4


@dataclass(frozen=True)
class Metric:
    """A panel of Figure 4: what is drawn, in which series, and in which unit. Accuracies are those that the search
    compares."""

    title: str
    unit: str
    series: Mapping[str, Callable[[Evaluation, MetricName], float | None]]
    scale: float = 1.0


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric(
        "Accuracy",
        "accuracy (%)",
        {"fp32": lambda one, of: one.scores(of).fp32, "quint8": lambda one, of: one.scores(of).quint8},
        100,
    ),
    "qmse": Metric("QMSE", "squared error of the quint8 logits (QMSE)", {"QMSE": lambda one, of: one.qmse}),
    "qce": Metric("QCE", "cross entropy of the quint8 outputs (QCE, nats)", {"QCE": lambda one, of: one.qce}),
    "drop": Metric(
        "Relative drop",
        "accuracy lost to quint8, relative to fp32 (%)",
        {"relative drop": lambda one, of: one.scores(of).relative_drop},
        100,
    ),
}


def _budget(axes: Axes, constraints: Constraints) -> None:
    """Vertical lines at limits on what lies on the horizontal axis, MMAC."""
    for one in constraints.each:
        if one.axis == "conv_macs":
            axes.axvline(one.limit / 1e6, color=GREY, linestyle="--", linewidth=1, label=one.line)


def _role(constraints: Constraints, best: Evaluation) -> str:
    """What the best candidate is called: given plans measured on the test split have no winner."""
    if best.split == "test":
        return "highest"
    return "winner" if constraints.feasible(best) else "nearest"


def macs_figure(
    space: Macroarchitecture, constraints: Constraints, evaluations: Sequence[Evaluation], panel: str
) -> Figure:
    """A panel of the paper's Figure 4: `panel` (a key of METRICS) of every trained candidate against its conv MACs.

    The best candidate has a star; dashed lines are the constraints. Labels that find no free place are left out.
    """
    chosen = METRICS[panel]
    figure = new_figure(4.2)
    ranked = ranking(tuple(evaluations), constraints)
    metric = constraints.metric
    measured = [[finite(value(one, metric)) * chosen.scale for value in chosen.series.values()] for one in ranked]
    drawn = [(one, values) for one, values in zip(ranked, measured, strict=True) if not all(map(math.isnan, values))]
    splits = " and ".join(sorted({one.split for one, _ in drawn}))
    title = chosen.title.replace("Accuracy", constraints.measured.capitalize())
    heading(figure, f"{title} against MACs: {space.name}" + (f", {splits} split" if splits else ""))
    if not drawn:
        return nothing(figure)
    axes = figure.add_subplot()
    style(axes)
    axes.set_xlabel("multiply-accumulates in convolutions (MMAC)", fontsize=9)
    axes.set_ylabel(chosen.unit.replace("accuracy", constraints.measured), fontsize=9)
    macs = [one.cost.conv_macs / 1e6 for one, _ in drawn]
    known = [[value for value in values if math.isfinite(value)] for _, values in drawn]
    axes.vlines(macs, list(map(min, known)), list(map(max, known)), color="#bbbbbb", linewidth=1)
    for index, name in enumerate(chosen.series):
        axes.plot(
            macs, [values[index] for _, values in drawn], MARKERS[index], color=COLOURS[index], markersize=5, label=name
        )
    best = drawn[0][0]
    title = f"{_role(constraints, best)}: {plan_name(space, best)}"
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
    for (one, _), x, ys in zip(drawn, macs, known, strict=True):
        texts = dict.fromkeys([plan_name(space, one), f"#{one.number}"])
        labels.append(Labelled(tuple(texts), x, ys, size=7.0 if one is best else 4.0))
    place_labels(axes, labels)
    return figure


# Layer by layer: Figures 5 and 6

Slot = tuple[str, bool]
"""A place on the axis of layers: a layer of the space, and whether it is its pointwise part."""
NAMES, LONGEST = 64, 26
"""Names of layers that fit side by side, and the characters of one."""
Values = Mapping[str, Callable[[LayerStats], float | None]]

RANGES: Values = {
    "weight range": lambda layer: layer.weight_max - layer.weight_min,
    "folded weight range": lambda layer: layer.folded_max - layer.folded_min,
    "activation range": lambda layer: layer.activation_max - layer.activation_min,
}
PRECISIONS: Values = {
    "weight precision (%)": lambda layer: 100 * layer.weight_precision,
    "folded precision (%)": lambda layer: 100 * layer.folded_precision,
    "activation precision (%)": lambda layer: 100 * layer.activation_precision,
}
SQNRS: Values = {
    "weights": lambda layer: layer.weight_sqnr_db,
    "activations, only these quantized": lambda layer: layer.activation_sqnr_db,
    "activations, all before quantized too": lambda layer: layer.accumulated_sqnr_db,
}


def selection(constraints: Constraints, evaluations: Sequence[Evaluation], limit: int = SHOWN) -> list[Evaluation]:
    """The networks worth comparing layer by layer: the best one, the extremes (most MACs, fewest, largest drop), then
    the next best. Those with the most MACs first."""
    ranked = [one for one in ranking(tuple(evaluations), constraints) if one.layers]
    if not ranked:
        return []
    by_macs = sorted(ranked, key=lambda one: one.cost.conv_macs)
    worst = max(ranked, key=lambda one: one.scores(constraints.metric).relative_drop or 0.0)
    chosen = list(dict.fromkeys([ranked[0], by_macs[-1], by_macs[0], worst, *ranked]))[:limit]
    return sorted(chosen, key=lambda one: (-one.cost.conv_macs, one.number))


def slot_of(plan: FactorizationPlan, layer: str) -> Slot:
    """Where a layer of a plan's network stands: a grouped convolution where the plain one would."""
    for name, rate in plan.rates:
        if rate > 1 and layer in (f"{name}.grouped", f"{name}.pointwise"):
            return name, layer.endswith(".pointwise")
    return layer, False


def _slots(evaluation: Evaluation) -> list[tuple[Slot, LayerStats]]:
    """Every measured layer with its slot."""
    return [(slot_of(evaluation.plan, stats.layer), stats) for stats in evaluation.layers]


def layer_axis(space: Macroarchitecture, evaluations: Sequence[Evaluation]) -> list[Slot]:
    """The slots in network order that any of the networks fills, so that networks of different plans line up."""
    filled = {slot for one in evaluations for slot, _ in _slots(one)}
    return [slot for node in space.order for slot in ((node.name, False), (node.name, True)) if slot in filled]


def _layer_ticks(slots: Sequence[Slot]) -> dict[int, str]:
    """Names by place: all where they fit side by side, else those of evenly spread layers, long ones without their
    beginning."""
    ticks = {place: "pointwise" if pointwise else name for place, (name, pointwise) in enumerate(slots)}
    if len(ticks) > NAMES:
        ticks = {place: name for place, name in ticks.items() if not slots[place][1]}
    chosen = list(ticks.items())[:: math.ceil(len(ticks) / NAMES)]
    return {place: name if len(name) <= LONGEST else "…" + name[1 - LONGEST :] for place, name in chosen}


def layer_panels(figure: Figure, slots: Sequence[Slot], rows: int) -> list[Axes]:
    """Axes one above the other that share the axis of layers; pointwise slots are shaded."""
    panels: list[Axes] = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    for axes in panels:
        style(axes)
        for position, (_, pointwise) in enumerate(slots):
            if pointwise:
                axes.axvspan(position - 0.5, position + 0.5, color="#f3f3f3", linewidth=0, zorder=0)
    ticks = _layer_ticks(slots)
    panels[-1].set_xticks(
        list(ticks),
        list(ticks.values()),
        rotation=90 if len(slots) > 30 else 60,
        horizontalalignment="center" if len(slots) > 30 else "right",
        rotation_mode="default" if len(slots) > 30 else "anchor",
        fontsize=6 if len(slots) > 30 else 7.5,
        parse_math=False,
    )
    panels[-1].set_xlim(-0.6, len(slots) - 0.4)
    return panels


def _layers_figure(
    space: Macroarchitecture, constraints: Constraints, evaluations: Sequence[Evaluation], title: str, values: Values
) -> Figure:
    shown = selection(constraints, evaluations)
    best = ranking(tuple(shown), constraints)[0] if shown else None
    names = [
        plan_name(space, one) + (f" ({_role(constraints, best)})" if best is not None and one is best else "")
        for one in shown
    ]
    return layers_figure(space, list(zip(names, shown, strict=True)), title, values, best)


def layers_figure(
    space: Macroarchitecture,
    networks: Sequence[tuple[str, Evaluation]],
    title: str,
    values: Values,
    best: Evaluation | None = None,
) -> Figure:
    """A line a network through its KxK convolutions and dense layers; its pointwise convolutions are hollow markers.

    `networks`, at most as many as there are COLOURS, have their names in the legend; the line of `best` is thick.
    """
    figure = new_figure(8.2)
    heading(figure, f"{title} of every layer: {space.name}")
    slots = layer_axis(space, [one for _, one in networks])
    if not slots:
        return nothing(figure)
    panels = layer_panels(figure, slots, len(values))
    for axes, (name, value) in zip(panels, values.items(), strict=True):
        axes.set_ylabel(name, fontsize=8.5)
        for index, (network, one) in enumerate(networks):
            for pointwise in (False, True):
                points = [
                    (slots.index(slot), finite(value(stats))) for slot, stats in _slots(one) if slot[1] == pointwise
                ]
                axes.plot(
                    [x for x, _ in sorted(points)],
                    [y for _, y in sorted(points)],
                    marker=MARKERS[index],
                    color=COLOURS[index],
                    markerfacecolor="white" if pointwise else COLOURS[index],
                    linestyle="none" if pointwise else "-",
                    linewidth=2.2 if one is best else 1.1,
                    markersize=4.5,
                    label="_pointwise" if pointwise else network,
                )
        if not name.endswith("(%)"):
            log_if_wide(axes, [finite(value(stats)) for _, one in networks for stats in one.layers])
        if axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0)
    if any(pointwise for _, pointwise in slots):
        panels[0].plot([], [], "o", color=GREY, markerfacecolor="white", markersize=4.5, label="hollow: pointwise")
    legend(panels[0])
    return figure


def ranges_figure(space: Macroarchitecture, constraints: Constraints, evaluations: Sequence[Evaluation]) -> Figure:
    """The paper's Figure 5: max - min of weights, folded weights and clipped activations, a line a network."""
    return _layers_figure(space, constraints, evaluations, "Ranges", RANGES)


def precisions_figure(space: Macroarchitecture, constraints: Constraints, evaluations: Sequence[Evaluation]) -> Figure:
    """The right of the paper's Figure 6: average channel precisions (equation 3), a line a network."""
    return _layers_figure(space, constraints, evaluations, "Average channel precisions", PRECISIONS)


def candidate_figure(space: Macroarchitecture, evaluation: Evaluation) -> Figure:
    """One network, layer by layer: from where to where weights and activations reach, precisions, SQNR."""
    figure = new_figure(9.6)
    heading(figure, f"Layers of {plan_name(space, evaluation)}: {space.name}")
    slots = layer_axis(space, [evaluation])
    if not slots:
        return nothing(figure)
    layers = [stats for _, stats in sorted(_slots(evaluation), key=lambda pair: slots.index(pair[0]))]
    positions = range(len(layers))
    weights, activations, precisions, noise = panels = layer_panels(figure, slots, 4)

    def bars(axes: Axes, name: str, ends: Sequence[tuple[float, float]], index: int, shift: float = 0.0) -> None:
        axes.use_sticky_edges = False  # room below the bars
        axes.bar(
            [position + shift for position in positions],
            [high - low for low, high in ends],
            bottom=[low for low, _ in ends],
            width=0.36,
            color=COLOURS[index],
            label=name,
        )

    bars(weights, "trained", [(layer.weight_min, layer.weight_max) for layer in layers], 4, -0.19)
    bars(weights, "batch norm folded in", [(layer.folded_min, layer.folded_max) for layer in layers], 0, 0.19)
    bars(activations, "after clipping", [(layer.activation_min, layer.activation_max) for layer in layers], 2)
    weights.set_ylabel("weights, min to max", fontsize=8.5)
    activations.set_ylabel("activations, min to max", fontsize=8.5)
    precisions.set_ylabel("channel precision (%)", fontsize=8.5)
    precisions.set_ylim(0, 103)
    noise.set_ylabel("SQNR (dB)", fontsize=8.5)
    for axes, values in ((precisions, PRECISIONS), (noise, SQNRS)):
        for index, (name, value) in enumerate(values.items()):
            heights = [finite(value(layer)) for layer in layers]
            short = name.removesuffix(" precision (%)")
            axes.plot(positions, heights, marker=MARKERS[index], color=COLOURS[index], markersize=4.5, label=short)
    for axes in panels:
        legend(axes)
    return figure


# What was probed, and what is expected


def probes_figure(space: Macroarchitecture, probes: Probes) -> Figure:
    """Heat maps of what each rate of each layer does to the probed network, layers by rates: the noise that it adds to
    the float and to the quantized logits, and the loss in quint8; in each cell also the number. Empty: no legal rate,
    or none that can start from the probed network."""
    panels = {
        "noise of the fp32 logits (%)": probes.increase(space, lambda one: 100 * one.logit_noise),
        "more noise of the quint8 logits (%)": probes.increase(space, lambda one: 100 * one.quint8_logit_noise),
        "more quint8 loss (0.001 nats)": probes.increase(space, lambda one: 1000 * one.quint8_loss),
    }
    legal = legal_rates(space)
    rates = sorted({rate for of in legal.values() for rate in of})
    figure = new_figure(0.9 + len(panels) * (0.75 + 0.2 * len(legal)), 7.2)
    heading(figure, f"One layer changed, nothing trained: {space.name}, from {label(space, probes.plan)}")
    for axes, (title, increases) in zip(
        figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True
    ):
        cells = np.full((len(legal), len(rates)), np.nan)
        for row, (layer, of) in enumerate(legal.items()):
            for rate, value in zip(of, increases[layer], strict=True):
                if rate % probes.plan[layer] == 0:
                    cells[row, rates.index(rate)] = value
        top = max(float(np.nanquantile(np.abs(cells), 0.97)), 1e-12)  # a single outlier leaves the others their colour
        axes.imshow(cells, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
        for row, column in zip(*np.nonzero(np.isfinite(cells)), strict=True):
            value = cells[row, column]
            colour = "white" if abs(value) > 0.65 * top else "black"
            axes.text(column, row, f"{value:.2g}", color=colour, fontsize=6.5, ha="center", va="center")
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xticks(range(len(rates)), [str(rate) for rate in rates], fontsize=7.5)
        axes.set_yticks(range(len(legal)), list(legal), fontsize=7.5, parse_math=False)
        axes.spines[:].set_visible(False)
    axes.set_xlabel("rate f", fontsize=9)
    return figure


def front_figure(
    space: Macroarchitecture, constraints: Constraints, evaluations: Sequence[Evaluation], explanation: Explanation
) -> Figure:
    """The expected quint8 accuracy of the best plan at every budget, and what was measured of trained candidates."""
    figure = new_figure(4.0)
    heading(figure, f"The best plan at every budget, as expected: {space.name}")
    axes = figure.add_subplot()
    style(axes)
    axes.set_xlabel("multiply-accumulates in convolutions (MMAC)", fontsize=9)
    axes.set_ylabel(f"quint8 {constraints.measured} (%)", fontsize=9)
    macs = [conv_macs / 1e6 for _, conv_macs, _ in explanation.front]
    axes.plot(macs, [100 * one for *_, one in explanation.front], color=COLOURS[0], linewidth=1.6, label="expected")
    measured = [(one, one.scores(constraints.metric).quint8) for one in evaluations if one.role == "candidate"]
    points = [(one.cost.conv_macs / 1e6, 100 * quint8) for one, quint8 in measured if quint8 is not None]
    axes.plot(*zip(*points, strict=True), MARKERS[0], color=COLOURS[1], markersize=5, label="measured candidates")
    _budget(axes, constraints)
    legend(axes)
    return figure


# All of them


@dataclass(frozen=True)
class RunFigure:
    """A figure of a run's report. Its `name` is that of its file; the `caption` says what to look for in it."""

    name: str
    caption: str
    draw: Callable[[Outcome], Figure | None]
    """None where it would show nothing."""


def _against_macs(panel: str) -> Callable[[Outcome], Figure | None]:
    def draw(outcome: Outcome) -> Figure | None:
        values, metric = METRICS[panel].series.values(), outcome.constraints.metric
        known = any(math.isfinite(finite(value(one, metric))) for value in values for one in _trained(outcome))
        return macs_figure(outcome.space, outcome.constraints, _trained(outcome), panel) if known else None

    return draw


def _of_profiled(
    figure: Callable[[Macroarchitecture, Constraints, Sequence[Evaluation]], Figure],
) -> Callable[[Outcome], Figure | None]:
    def draw(outcome: Outcome) -> Figure | None:
        profiled = [one for one in _trained(outcome) if one.layers]
        return figure(outcome.space, outcome.constraints, profiled) if profiled else None

    return draw


def _best_layers(outcome: Outcome) -> Figure | None:
    best = next(iter(_trained(outcome)), None)
    return None if best is None or not best.layers else candidate_figure(outcome.space, best)


def _probes(outcome: Outcome) -> Figure | None:
    return None if outcome.probes is None else probes_figure(outcome.space, outcome.probes)


def _front(outcome: Outcome) -> Figure | None:
    explanation = outcome.explanation
    if explanation is None or not explanation.front:
        return None
    return front_figure(outcome.space, outcome.constraints, outcome.evaluations, explanation)


def _trained(outcome: Outcome) -> list[Evaluation]:
    """Best first."""
    return ranking(outcome.evaluations, outcome.constraints)


FIGURES: tuple[RunFigure, ...] = (
    RunFigure(
        "accuracy_vs_macs",
        "High and far to the left is good. The line between a candidate's two markers is what quint8 costs it: "
        "look for long ones, and for quint8 markers that change the order of the fp32 ones.",
        _against_macs("accuracy"),
    ),
    RunFigure(
        "qmse_vs_macs",
        "How far the 8-bit logits are from the float ones. A candidate far above its neighbours is hurt by "
        "quantization, not by having few MACs.",
        _against_macs("qmse"),
    ),
    RunFigure(
        "qce_vs_macs",
        "How much the 8-bit network disagrees with the float one about the classes. Low is good; the floor is the "
        "float network's own uncertainty, so look at KL in the table too.",
        _against_macs("qce"),
    ),
    RunFigure(
        "drop_vs_macs",
        "The share of the float accuracy that quint8 takes away. Flat is good: a jump between neighbours is worth "
        "a look at their layers below.",
        _against_macs("drop"),
    ),
    RunFigure(
        "layer_ranges",
        "The wider a range, the coarser its 255 steps. Look for layers where the folded range is much wider than "
        "the trained one, above all early in the network: their errors pass through everything after.",
        _of_profiled(ranges_figure),
    ),
    RunFigure(
        "layer_precisions",
        "The share of the tensor's range that an average channel uses. A wide range and a low precision in one "
        "layer mean that most channels have only a few of the 256 codes.",
        _of_profiled(precisions_figure),
    ),
    RunFigure(
        "best_layers",
        "The same for one network, with signal to quantization noise. Where the accumulated SQNR falls well below "
        "the local one, the noise comes from before that layer; about 6 dB is one bit.",
        _best_layers,
    ),
    RunFigure(
        "probes",
        "What each rate of each layer does alone, in the trained network that candidates start from. Rows that "
        "stay pale can be factorized far at little cost; dark cells are where to keep the rate low.",
        _probes,
    ),
    RunFigure(
        "front",
        "What the policy expects of the best plan at every budget, after all it has seen: look where the line "
        "bends before you fix a budget. front.csv has the plans.",
        _front,
    ),
)
"""In the order of the report."""


def figures(outcome: Outcome) -> dict[str, Figure]:
    """The figures of a run by name: those of FIGURES that show something."""
    drawn = {one.name: one.draw(outcome) for one in FIGURES}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def caption(name: str) -> str:
    """Of the figure of that name."""
    return next(one.caption for one in FIGURES if one.name == name)


def save_figures(drawn: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Writes each as a PNG called after its name; returns the files."""
    paths = {folder / f"{name}.png": figure for name, figure in drawn.items()}
    for path, figure in paths.items():
        save_png(figure, path)
    return list(paths)
