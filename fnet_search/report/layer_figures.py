"""Figures of networks layer by layer: the paper's Figures 5 and 6."""

import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation, LayerStats
from fnet_search.policy.ranking import ranking
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

SHOWN = 6
"""The most networks of a search in a figure of layers."""
Slot = tuple[str, bool]
"""A position on the axis of layers: a layer of the space, and whether it is the layer's pointwise part."""
NAMES, LONGEST = 64, 26
"""The most names of layers side by side, and the most characters of a name."""
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
    """At most `limit` networks to compare layer by layer: the best one, the extremes (most MACs, fewest, largest drop),
    then the next best. Ordered by MACs, most first."""
    ranked = [evaluation for evaluation in ranking(tuple(evaluations), constraints) if evaluation.layers]
    if not ranked:
        return []
    by_macs = sorted(ranked, key=lambda evaluation: evaluation.cost.conv_macs)
    worst = max(ranked, key=lambda evaluation: evaluation.scores(constraints.metric).relative_drop or 0.0)
    chosen = list(dict.fromkeys([ranked[0], by_macs[-1], by_macs[0], worst, *ranked]))[:limit]
    return sorted(chosen, key=lambda evaluation: (-evaluation.cost.conv_macs, evaluation.number))


def slot_of(plan: FactorizationPlan, layer: str) -> Slot:
    """The slot of a layer of a plan's network. A grouped convolution has that of the layer it replaces."""
    for name, rate in plan.rates:
        if rate > 1 and layer in (f"{name}.grouped", f"{name}.pointwise"):
            return name, layer.endswith(".pointwise")
    return layer, False


def _slots(evaluation: Evaluation) -> list[tuple[Slot, LayerStats]]:
    """Every layer of an evaluation with its slot."""
    return [(slot_of(evaluation.plan, stats.layer), stats) for stats in evaluation.layers]


def layer_axis(space: Macroarchitecture, evaluations: Sequence[Evaluation]) -> list[Slot]:
    """The slots, in network order, that any of the networks fills, so that networks of different plans line up."""
    filled = {slot for evaluation in evaluations for slot, _ in _slots(evaluation)}
    return [slot for node in space.order for slot in ((node.name, False), (node.name, True)) if slot in filled]


def _layer_ticks(slots: Sequence[Slot]) -> dict[int, str]:
    """Names of ticks by position: all if they fit side by side, otherwise those of evenly spaced layers. Long names
    lose their beginning."""
    ticks = {place: "pointwise" if pointwise else name for place, (name, pointwise) in enumerate(slots)}
    if len(ticks) > NAMES:
        ticks = {place: name for place, name in ticks.items() if not slots[place][1]}
    chosen = list(ticks.items())[:: math.ceil(len(ticks) / NAMES)]
    return {place: name if len(name) <= LONGEST else "…" + name[1 - LONGEST :] for place, name in chosen}


def layer_panels(figure: Figure, slots: Sequence[Slot], rows: int) -> list[Axes]:
    """`rows` axes one above the other that share the axis of layers. Pointwise slots are shaded."""
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
        plan_name(space, evaluation)
        + (f" ({best_name(constraints, best)})" if best is not None and evaluation is best else "")
        for evaluation in shown
    ]
    return layers_figure(space, list(zip(names, shown, strict=True)), title, values, best)


def layers_figure(
    space: Macroarchitecture,
    networks: Sequence[tuple[str, Evaluation]],
    title: str,
    values: Values,
    best: Evaluation | None = None,
) -> Figure:
    """A line for each network through its KxK convolutions and dense layers; pointwise convolutions are hollow markers.

    `networks` (name, evaluation) are at most as many as there are COLOURS. The line of `best` is thick.
    """
    figure = new_figure(8.2)
    heading(figure, f"{title} of every layer: {space.name}")
    slots = layer_axis(space, [evaluation for _, evaluation in networks])
    if not slots:
        return nothing(figure)
    panels = layer_panels(figure, slots, len(values))
    for axes, (name, value) in zip(panels, values.items(), strict=True):
        axes.set_ylabel(name, fontsize=8.5)
        for index, (network, evaluation) in enumerate(networks):
            for pointwise in (False, True):
                points = [
                    (slots.index(slot), finite(value(stats)))
                    for slot, stats in _slots(evaluation)
                    if slot[1] == pointwise
                ]
                axes.plot(
                    [x for x, _ in sorted(points)],
                    [y for _, y in sorted(points)],
                    marker=MARKERS[index],
                    color=COLOURS[index],
                    markerfacecolor="white" if pointwise else COLOURS[index],
                    linestyle="none" if pointwise else "-",
                    linewidth=2.2 if evaluation is best else 1.1,
                    markersize=4.5,
                    label="_pointwise" if pointwise else network,
                )
        if not name.endswith("(%)"):
            log_if_wide(axes, [finite(value(stats)) for _, evaluation in networks for stats in evaluation.layers])
        if axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0)
    if any(pointwise for _, pointwise in slots):
        panels[0].plot([], [], "o", color=GREY, markerfacecolor="white", markersize=4.5, label="hollow: pointwise")
    legend(panels[0])
    return figure


def ranges_figure(space: Macroarchitecture, constraints: Constraints, evaluations: Sequence[Evaluation]) -> Figure:
    """The paper's Figure 5: max - min of weights, folded weights and clipped activations, a line for each network."""
    return _layers_figure(space, constraints, evaluations, "Ranges", RANGES)


def precisions_figure(space: Macroarchitecture, constraints: Constraints, evaluations: Sequence[Evaluation]) -> Figure:
    """The right of the paper's Figure 6: average channel precisions (equation 3), a line for each network."""
    return _layers_figure(space, constraints, evaluations, "Average channel precisions", PRECISIONS)


def candidate_figure(space: Macroarchitecture, evaluation: Evaluation) -> Figure:
    """One network layer by layer: the ranges of weights and activations, precisions, SQNR."""
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
