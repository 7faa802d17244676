"""The figures of a comparison: accuracy against MACs, and networks layer by layer."""

from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import TypeVar

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fnet_search.comparison.definition import Comparison, Variant
from fnet_search.comparison.results import QUANTITIES, Quantity, ResultRow, published_name
from fnet_search.report.layer_figures import PRECISIONS, RANGES, layers_figure
from fnet_search.report.plot_labels import PointLabel, place_labels
from fnet_search.report.style import (
    COLOURS,
    GREY,
    heading,
    legend_columns,
    log_if_wide,
    new_figure,
    shorten,
    style,
)

T = TypeVar("T")

ACCURACIES, ERROR = {"o": COLOURS[0], "s": COLOURS[1]}, {"D": COLOURS[2]}
"""Markers of the two accuracies, and of a quantity alone in its panel, with their colours if there is one side only.
With several sides, colours stand for the sides."""

Side = tuple[Variant, str]
"""A variant and the text of a scheme; each side has a colour in the tradeoff figure."""


def _sides(listed: Sequence[ResultRow]) -> list[Side]:
    return list(dict.fromkeys((row.variant, row.scheme) for row in listed))


def tradeoff_figure(comparison: Comparison, listed: Sequence[ResultRow]) -> Figure:
    """The paper's Figure 4: panels of accuracies, QMSE, QCE and relative drop against conv MACs.

    Points are means with standard deviations over seeds. Each variant and scheme has its colour, so there may be at
    most as many as COLOURS. Published numbers are hollow. The fp32 accuracy is grey if only the schemes differ, since
    it is the same for all of them.
    """
    figure = new_figure(7.4, 8.4)
    heading(figure, f"Accuracy and quantization error against MACs: {comparison.name}, test split")
    panels: list[Axes] = list(figure.subplots(2, 2, sharex=True).flat)
    fp32, quint8, drop, qmse, qce, _ = QUANTITIES
    sides = _sides(listed)
    same_in_all_sides = (fp32,) if len({variant for variant, _ in sides}) == 1 else ()
    shown = list(zip(panels, ((fp32, quint8), (qmse,), (qce,), (drop,)), strict=True))
    for axes, measures in shown:
        style(axes)
        shapes = ACCURACIES if len(measures) > 1 else ERROR
        drawn: list[float] = []
        for index, side in enumerate(sides):
            side_rows = [row for row in listed if (row.variant, row.scheme) == side]
            for (shape, colour), measure in zip(shapes.items(), measures, strict=True):
                if len(sides) > 1:
                    colour = GREY if measure in same_in_all_sides else COLOURS[index]
                drawn += _points(axes, side_rows, measure, colour, shape)
        for shape, measure in zip(shapes, measures, strict=True):
            drawn += _published(axes, listed, measure, shape)
        unit = f" ({measures[0].unit})" if measures[0].unit else ""
        axes.set_ylabel(("accuracy" if len(measures) > 1 else measures[0].title) + unit, fontsize=9)
        log_if_wide(axes, drawn)
        axes.margins(x=0.1, y=0.12)
    for axes in panels[2:]:
        axes.set_xlabel("conv MACs (MMAC)", fontsize=9)
    _legend(figure, comparison, sides)
    for axes, measures in shown:  # last, since it fixes the layout of the figure
        place_labels(axes, _labels(listed, measures))
    return figure


def _legend(figure: Figure, comparison: Comparison, sides: Sequence[Side]) -> None:
    """Draws the legend below all panels: the markers, then the colours of the sides if there are several."""

    def shape(marker: str, name: str, colour: str, face: str) -> Artist:
        return Line2D(
            [], [], marker=marker, label=name, color=colour, markerfacecolor=face, linestyle="none", markersize=5
        )

    handles = []
    for (marker, marker_colour), name in zip(ACCURACIES.items(), ("fp32 accuracy", "quint8 accuracy"), strict=True):
        colour = GREY if len(sides) > 1 else marker_colour
        handles.append(shape(marker, name, colour, colour))
    if comparison.published:
        handles.append(shape("o", f"hollow: {published_name(comparison)}", GREY, "none"))
    several_schemes = len({scheme for _, scheme in sides}) > 1
    for index, (variant, scheme) in enumerate(sides if len(sides) > 1 else ()):
        name = " ".join(word for word in (variant.name, scheme if several_schemes else "") if word)
        handles.append(Patch(color=COLOURS[index], label=shorten(name)))
    columns = legend_columns([str(handle.get_label()) for handle in handles], 4)
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, fontsize=8, frameon=False)


def _points(axes: Axes, listed: Sequence[ResultRow], measure: Quantity, colour: str, marker: str) -> list[float]:
    """Draws mean and standard deviation of each row. Returns the means."""
    points = [(row.conv_mmac, values) for row in listed if (values := row.values(measure.value, measure.scale))]
    means = [fmean(values) for _, values in points]
    spreads = [stdev(values) if len(values) > 1 else 0.0 for _, values in points]
    axes.errorbar(
        [macs for macs, _ in points],
        means,
        spreads,
        color=colour,
        marker=marker,
        markersize=4.5,
        linestyle="none",
        capsize=2,
    )
    return means


def _published(axes: Axes, listed: Sequence[ResultRow], measure: Quantity, marker: str) -> list[float]:
    """Draws the published numbers, hollow. Returns them."""
    published = {row.conv_mmac: value for row in listed if (value := measure.published(row.published)) is not None}
    values = [measure.scale * value for value in published.values()]
    axes.plot(list(published), values, marker, markerfacecolor="none", color=GREY, markersize=6.5)
    return values


def _labels(listed: Sequence[ResultRow], measures: Sequence[Quantity]) -> list[PointLabel]:
    """One label for all points of a network at the same MACs, since colours tell the sides apart."""
    anchors: dict[tuple[str, float], list[float]] = {}
    for row in listed:
        for measure in measures:
            if values := row.values(measure.value, measure.scale):
                published = measure.published(row.published)
                points = [] if published is None else [measure.scale * published]
                anchors.setdefault((row.network, row.conv_mmac), []).extend([*points, fmean(values)])
    return [PointLabel((name,), macs, points, size=4.0) for (name, macs), points in anchors.items()]


def result_figures(comparison: Comparison, listed: Sequence[ResultRow]) -> dict[str, Figure]:
    """The figures by file name.

    More networks or sides than COLOURS are split into several figures: ``tradeoff.png``, ``tradeoff-2.png``. The layer
    figures show the first seed and the first scheme.
    """
    sides = _sides(listed)
    drawn: dict[str, Figure] = {}
    for name, chosen in _in_colours("tradeoff", sides):
        drawn[name] = tradeoff_figure(comparison, [row for row in listed if (row.variant, row.scheme) in chosen])
    for variant in comparison.variants if comparison.search is None else ():
        variant_rows = [row for row in listed if row.variant == variant and row.scheme == comparison.schemes[0]]
        precision = "folded precision (%)"
        compared = [row for row in variant_rows if row.plan in comparison.compare]
        for kind, shown, title, values in (
            ("ranges", variant_rows, "Ranges", RANGES),
            ("compared", compared, "Ranges and precisions", {**RANGES, precision: PRECISIONS[precision]}),
        ):
            for name, chosen_rows in _in_colours(kind, shown, variant.name):
                networks = [(row.name, row.networks[0].evaluation) for row in chosen_rows]
                drawn[name] = layers_figure(variant.space, networks, title, values)
    return drawn


def _in_colours(kind: str, items: Sequence[T], suffix: str = "") -> Iterator[tuple[str, Sequence[T]]]:
    """Splits `items` into groups of at most len(COLOURS); yields the file name of each group's figure and the group."""
    most = len(COLOURS)
    for number, start in enumerate(range(0, len(items), most), 1):
        words = [kind, suffix, str(number) if number > 1 else ""]
        yield f"{'-'.join(word for word in words if word)}.png", items[start : start + most]
