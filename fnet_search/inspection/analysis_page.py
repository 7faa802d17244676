"""The page of an analysis, ``RUN/analysis/analysis.html``, and ``layers.csv`` beside it."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import pandas as pd

from fnet_search.base.files import write_text
from fnet_search.base.units import millions
from fnet_search.inspection.analysis import NetworkAnalysis, accuracies_text, analysis_frame, verdict
from fnet_search.inspection.analysis_figures import boxes_figure, costs_figure, heat_figure, network_caption
from fnet_search.report.html_page import NONE, figure_html, plain_table, write_page
from fnet_search.report.layer_figures import PRECISIONS, RANGES, SHOWN, layers_figure
from fnet_search.report.style import COLOURS, GREY
from fnet_search.rundir.recorded_run import RecordedRun

EXPLAINED = """<p class="soft">A layer is quantized with its weights, its bias and its output (after the ReLU that
follows it); the input, sums, concats, average pools and other activations have rows of their own. Partly quantized
networks are computed in float on quantized values; the accuracy of the integer network is given beside them. All
networks saw the same images. Differences are in percentage points of accuracy, &plusmn; one standard error of paired
images. A difference below two standard errors may be noise; so may one below three if it is the largest of many
layers.</p>"""

CAPTIONS = {
    "costs": "Left, the accuracy lost when only this layer is quantized; right, the accuracy regained when only this "
    "layer is left in float. A layer with a long bar on both sides is the one to improve. Grey lines extend one "
    "standard error to each side; shaded rows are pointwise convolutions.",
    "ranges": "As in the paper's Figures 5 and 6, one colour for each network: the wider a range, the coarser its 255 "
    "steps.",
    "precisions": "As in the paper's Figure 6: the share of the tensor's range that an average channel uses.",
    "boxes": "Where a box lies far below the dash, most channels use few of the 256 codes, because a few channels, or "
    "offsets between channels, set the tensor's range. Dead channels are left out. Activations are clipped to the "
    "quantized range.",
    "heat": "Each column is shaded from its best tenth (white) to its worst value in this network (dark), ranges and "
    "growth on a log scale, accuracies from 0 to no less than two standard errors. The column of zeros is not shaded. "
    "Empty cells: the value does not apply.",
}


def write_analysis(opened: RecordedRun, analyses: Sequence[NetworkAnalysis]) -> Path:
    """Writes ``layers.csv`` and ``analysis.html`` to the run's folder ``analysis``; returns the path of the page."""
    folder = opened.run.path / "analysis"
    folder.mkdir(exist_ok=True)
    frame = analysis_frame(opened, analyses)
    write_text(folder / "layers.csv", frame.to_csv(index=False, lineterminator="\n"))
    space, shown = opened.space, analyses[:SHOWN]
    sections = [
        ("", _head(analyses) + figure_html(costs_figure(space, shown), CAPTIONS["costs"], "cost of each layer"))
    ]
    lines = [(analysis.name, analysis.evaluation) for analysis in shown]
    figures = [
        figure_html(layers_figure(space, lines, "Ranges", RANGES), CAPTIONS["ranges"], "ranges"),
        figure_html(
            layers_figure(space, lines, "Average channel precisions", PRECISIONS), CAPTIONS["precisions"], "precisions"
        ),
    ]
    sections.append(("Networks side by side", f'<div class="pair">{"".join(figures)}</div>'))
    for index, analysis in enumerate(analyses):
        rows = frame[frame["network"] == analysis.id]
        colour = COLOURS[index] if index < SHOWN else GREY
        body = (
            f"<p>{escape(verdict(analysis))}</p>"
            + figure_html(heat_figure(space, analysis, rows), CAPTIONS["heat"], f"heat map of {analysis.name}")
            + figure_html(
                boxes_figure(space, analyses, index, colour), CAPTIONS["boxes"], f"channels of {analysis.name}"
            )
            + _table(analysis, rows)
        )
        summary = f"<summary>{escape(network_caption(analysis))}</summary>"
        sections.append(
            (
                "" if index else "Each network",
                f'<details class="layers" id="network-{index}"{"" if index else " open"}>{summary}{body}</details>',
            )
        )
    path = folder / "analysis.html"
    write_page(path, f"{opened.config.get('study') or space.name}: analysis of its layers", sections)
    return path


def _head(analyses: Sequence[NetworkAnalysis]) -> str:
    """The verdicts, one line for each network, and the explanation of the page."""
    if len(analyses) == 1:
        text = f'<p class="verdict">{escape(verdict(analyses[0]))}</p><p>{escape(accuracies_text(analyses[0]))}.</p>'
    else:
        lines = [
            f'<li><a href="#network-{index}">{escape(analysis.name)}</a>: {escape(verdict(analysis))} '
            f'<span class="soft">{escape(accuracies_text(analysis))}</span></li>'
            for index, analysis in enumerate(analyses)
        ]
        text = f"<ul>{''.join(lines)}</ul>"
    limit = f'<p class="soft">The figures of several networks show the first {SHOWN} of {len(analyses)}.</p>'
    return text + EXPLAINED + (limit if len(analyses) > SHOWN else "")


def _table(analysis: NetworkAnalysis, frame: pd.DataFrame) -> str:
    statistics = ("MMAC", "trained weights, range", "folded, range", "growth", "activations, range", "zero %")
    costs = ("only it, quint8 %", "lost, points", "all but it %", "regained, points", "KL alone, mnats")
    rows = []
    for layer, row in zip(analysis.layers, frame.to_dict("records"), strict=True):
        values, part = layer.statistics, layer.sensitivity
        cells = [
            NONE if values["macs"] is None else millions(values["macs"]),
            *(_interval(values[f"{name}_min"], values[f"{name}_max"]) for name in ("weight", "folded")),
            NONE if layer.fold_growth is None else f"x{layer.fold_growth:.2g}",
            _interval(values["activation_min"], values["activation_max"]),
            f"{100 * row['sparsity']:.1f}",
            f"{100 * part.only_accuracy:.1f}",
            f"{100 * part.cost:.1f} \N{PLUS-MINUS SIGN} {100 * part.cost_error:.1f}",
            f"{100 * part.all_but_accuracy:.1f}",
            f"{100 * part.gain:.1f} \N{PLUS-MINUS SIGN} {100 * part.gain_error:.1f}",
            f"{1000 * part.only_kl:.2f}",
        ]
        rows.append(((layer.name, values["kind"]), cells))
    return plain_table(("layer", "kind"), (*statistics, *costs), rows, analysis.costliest.name)


def _interval(low: float | None, high: float | None) -> str:
    return NONE if low is None or high is None else f"{low:.3g} to {high:.3g}"
