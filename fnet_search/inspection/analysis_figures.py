"""The figures of an analysis: what each layer costs, the ranges of its channels, its statistics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure

from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture
from fnet_search.inspection.analysis import TENSORS, LayerAnalysis, NetworkAnalysis
from fnet_search.report.layer_figures import Slot, layer_panels, slot_of
from fnet_search.report.style import COLOURS, GREY, heading, legend, legend_columns, log_if_wide, new_figure, style

SHADES = LinearSegmentedColormap.from_list("worse", ["#ffffff", "#fdd9b5", "#d55e00", "#6b2400"]).with_extremes(
    bad="#ffffff"
)
"""Colours of the heat map, from the best values to the worst; white where there is no value."""


def analysis_slots(space: Macroarchitecture, analyses: Sequence[NetworkAnalysis]) -> list[Slot]:
    """The rows or columns of a figure, in network order: all layers, and the input, that any network quantizes."""
    filled = {slot_of(analysis.evaluation.plan, layer.name) for analysis in analyses for layer in analysis.layers}
    order = [INPUT, *(node.name for node in space.order)]
    return [slot for name in order for slot in ((name, False), (name, True)) if slot in filled]


# What costs the accuracy


def costs_figure(space: Macroarchitecture, analyses: Sequence[NetworkAnalysis]) -> Figure:
    """Bar charts of what each layer costs, one colour for each network, in percentage points with standard errors.

    Left, the accuracy lost with only this layer quantized; right, the accuracy regained with only this layer left in
    float. On each side the bar of each network's costliest or most gaining layer is labelled with its value.
    """
    rows, count = analysis_slots(space, analyses), len(analyses)
    inches = max(0.19, 0.075 * count + 0.07)  # height of a row
    figure = new_figure(1.5 + inches * len(rows), 9.6)
    images, split = analyses[0].sensitivity.images, analyses[0].evaluation.split
    heading(figure, f"Which layer costs the accuracy: {space.name}, {images:,} {split} images")
    left, right = figure.subplots(1, 2, sharey=True)
    height = 0.84 / count
    for axes, title, name, longest in (
        (left, "lost when only this layer is quantized (points)", "cost", "costliest"),
        (right, "regained when only this layer is left in float (points)", "gain", "most_gained"),
    ):
        style(axes)
        axes.set_xlabel(title, fontsize=9)
        axes.axvline(0, color=GREY, linewidth=0.8)
        for position, (_, pointwise) in enumerate(rows):
            if pointwise:
                axes.axhspan(position - 0.5, position + 0.5, color="#f3f3f3", linewidth=0, zorder=0)
        for index, analysis in enumerate(analyses):
            places = [rows.index(slot_of(analysis.evaluation.plan, layer.name)) for layer in analysis.layers]
            ys = [place + (index - (count - 1) / 2) * height for place in places]
            values = [100 * getattr(layer.sensitivity, name) for layer in analysis.layers]
            errors = [100 * getattr(layer.sensitivity, f"{name}_error") for layer in analysis.layers]
            axes.barh(ys, values, height * 0.9, color=COLOURS[index], label=network_caption(analysis))
            axes.errorbar(values, ys, xerr=errors, fmt="none", ecolor="#888888", elinewidth=0.7)
            most = analysis.sensitivity.parts.index(getattr(analysis.sensitivity, longest))
            axes.annotate(
                f"{values[most]:.1f}",
                (max(0, values[most] + errors[most]), ys[most]),
                (3, 0),
                textcoords="offset points",
                verticalalignment="center",
                fontsize=8 if count == 1 else 6,
                fontweight="bold",
                color=COLOURS[index],
            )
        axes.margins(x=0.1)
    names = ["pointwise" if pointwise else name for name, pointwise in rows]
    left.set_yticks(range(len(rows)), names, fontsize=7.5, parse_math=False)
    left.set_ylim(len(rows) - 0.4, -0.6)
    right.tick_params(labelleft=False)
    handles, names = left.get_legend_handles_labels()
    columns = legend_columns(names, 4)
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure


def network_caption(analysis: NetworkAnalysis) -> str:
    """The name of a network with its accuracies, for legends."""
    costs = analysis.sensitivity
    return f"{analysis.name}: fp32 {100 * costs.fp32_accuracy:.1f} %, quint8 {100 * costs.fake_accuracy:.1f} %"


# Channels


def boxes_figure(
    space: Macroarchitecture, analyses: Sequence[NetworkAnalysis], index: int, colour: str = COLOURS[0]
) -> Figure:
    """Box plots of the channel ranges of ``analyses[index]``: one box for each layer, without dead channels.

    The whiskers extend to the smallest and the largest range. The axes fit all of `analyses`, so that the figures of
    several networks can be compared.
    """
    analysis, slots = analyses[index], analysis_slots(space, [analyses[index]])
    places = [slots.index(slot_of(analysis.evaluation.plan, layer.name)) for layer in analysis.layers]
    figure = new_figure(8.2, 9.6)
    heading(figure, f"Ranges of the channels of {analysis.name}: {space.name}")
    panels = layer_panels(figure, slots, len(TENSORS))
    titles = ("raw weights, range", "folded weights, range", "clipped activations, range")
    for axes, title, tensor in zip(panels, titles, TENSORS, strict=True):
        axes.set_ylabel(title, fontsize=8.5)
        alive = {place: _alive(layer, tensor) for place, layer in zip(places, analysis.layers, strict=True)}
        boxes = axes.boxplot(
            [channels for channels in alive.values() if channels],
            positions=[place for place, channels in alive.items() if channels],
            widths=0.6,
            whis=(0, 100),
            patch_artist=True,
            manage_ticks=False,
            boxprops={"edgecolor": colour, "facecolor": to_rgba(colour, 0.3)},
            medianprops={"color": colour},
            whiskerprops={"color": colour},
            capprops={"color": colour},
        )
        for box in boxes["boxes"][:1]:
            box.set_label("channels: median, quartiles, and all between the whiskers")
        tensor_ranges = [layer.range(tensor) or math.nan for layer in analysis.layers]
        axes.plot(places, tensor_ranges, "_", color="black", markersize=9, label="the whole tensor")
        layers = [layer for analysis in analyses for layer in analysis.layers]
        ranges = [value for layer in layers for value in _alive(layer, tensor)]
        ranges += [layer.range(tensor) or math.nan for layer in layers]
        ranges = [value for value in ranges if math.isfinite(value)]
        if not ranges:
            continue
        log_if_wide(axes, ranges)
        low, high = min(ranges), max(ranges)
        axes.set_ylim(*(low / 1.3, high * 1.3) if axes.get_yscale() == "log" else (0, high * 1.06))
    legend(panels[0])
    return figure


def _alive(layer: LayerAnalysis, tensor: str) -> list[float]:
    """The ranges of the channels that are not dead."""
    return [value for value in layer.channels[tensor] if value > 0]


# Statistics


@dataclass(frozen=True)
class Statistic:
    """A column of the heat map."""

    title: str
    column: str
    """Its column in `analysis_frame`."""
    worse: int
    """1 if high values are bad, -1 if low ones are, 0 if neither."""
    form: str = ".3g"
    """Format of the printed values, after they are multiplied by `scale`."""
    scale: float = 1.0
    logarithmic: bool = False
    """Whether colours follow the logarithm."""


STATISTICS = (
    Statistic("lost alone (points)", "cost_points", 1, ".1f"),
    Statistic("regained (points)", "gain_points", 1, ".1f"),
    Statistic("KL alone (mnats)", "only_kl", 1, ".1f", 1000),
    Statistic("weight range", "weight_range", 1, logarithmic=True),
    Statistic("folded range", "folded_range", 1, logarithmic=True),
    Statistic("growth by folding (x)", "fold_growth", 1, ".2g", logarithmic=True),
    Statistic("activation range", "activation_range", 1, logarithmic=True),
    Statistic("weight precision (%)", "weight_precision", -1, ".0f", 100),
    Statistic("folded precision (%)", "folded_precision", -1, ".0f", 100),
    Statistic("activation precision (%)", "activation_precision", -1, ".0f", 100),
    Statistic("SQNR, weights (dB)", "weight_sqnr_db", -1, ".1f"),
    Statistic("SQNR, activations alone (dB)", "activation_sqnr_db", -1, ".1f"),
    Statistic("SQNR, all before too (dB)", "accumulated_sqnr_db", -1, ".1f"),
    Statistic("dead weight channels", "dead_weight_channels", 1, ".0f"),
    Statistic("dead activation channels", "dead_activation_channels", 1, ".0f"),
    Statistic("zero activations (%)", "sparsity", 0, ".0f", 100),
)


def badness(values: Sequence[float], statistic: Statistic, noise: float = 0.0) -> list[float]:
    """How bad each value of a column is, for its colour.

    From 0 for the best tenth to 1 for the worst value; 0 if all are the same, NaN for missing values and for statistics
    without a bad end. Differences of accuracies start at 0 points instead, and reach 1 at no less than twice `noise`,
    so that a column of nothing but noise stays pale.

    Args:
        noise: the largest standard error in the column, in points.
    """
    column = statistic.worse * np.array(values, dtype=float)
    if statistic.logarithmic:
        column = np.log(np.where(column > 0, column, math.nan))
    if statistic.worse == 0 or np.isnan(column).all():
        return [math.nan] * len(column)
    best, worst = np.nanquantile(column, 0.1), np.nanmax(column)
    if statistic.column in ("cost_points", "gain_points"):
        best, worst = 0.0, max(worst, 2 * noise)
    span = worst - best if worst > best else math.inf
    return [float(value) for value in np.clip((column - best) / span, 0, 1)]


def heat_figure(space: Macroarchitecture, analysis: NetworkAnalysis, frame: pd.DataFrame) -> Figure:
    """Heat map of a network's layers by `STATISTICS`: the worse a value in its column, the darker.

    Args:
        frame: the rows of this network in `analysis_frame`.
    """
    rows = len(frame)
    figure = new_figure(2.6 + 0.2 * rows, 10.4)
    heading(figure, f"Layers of {analysis.name} by statistics: {space.name}")
    axes = figure.add_subplot()
    columns = []
    for statistic in STATISTICS:
        values = frame[statistic.column].astype(float).tolist()
        errors = f"{statistic.column.removesuffix('_points')}_error_points"
        columns.append(badness(values, statistic, float(frame[errors].max()) if errors in frame else 0.0))
        for row, (value, bad) in enumerate(zip(values, columns[-1], strict=True)):
            text = "" if math.isnan(value) else f"{statistic.scale * value:{statistic.form}}"
            axes.text(
                len(columns) - 1,
                row,
                text,
                horizontalalignment="center",
                verticalalignment="center",
                fontsize=7.5,
                color="white" if bad > 0.6 else "black",
            )
    axes.imshow(np.array(columns).T, aspect="auto", cmap=SHADES, vmin=0, vmax=1, interpolation="none")
    axes.set_xticks(
        range(len(STATISTICS)),
        [statistic.title for statistic in STATISTICS],
        rotation=50,
        horizontalalignment="left",
        rotation_mode="anchor",
        fontsize=7.5,
    )
    axes.set_yticks(range(rows), frame["layer"].tolist(), fontsize=7.5, parse_math=False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for edge in range(1, max(rows, len(STATISTICS))):
        if edge < rows:
            axes.axhline(edge - 0.5, color="white", linewidth=1)
        if edge < len(STATISTICS):
            axes.axvline(edge - 0.5, color="white", linewidth=1)
    return figure
