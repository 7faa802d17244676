"""The look of all figures: sizes, colours, markers, legends."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import label
from fnet_search.base.files import replacing
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation

DPI = 150
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#000000", "#e69f00", "#999999")
"""The palette of Okabe and Ito, which colour-blind readers can tell apart, without its yellow, too pale on white."""
GREY = "#666666"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LONGEST_NAME = 38
"""Characters, so that a legend has room for two columns."""


def save_png(figure: Figure, path: Path) -> None:
    """Writes a PNG file atomically."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi="figure", metadata={"Software": None})


def plan_name(space: Macroarchitecture, evaluation: Evaluation) -> str:
    """The label of a plan if it is short enough for a figure, else ``#number`` as in the table of candidates."""
    name = label(space, evaluation.plan)
    final = " (final)" if evaluation.role == "final" else ""
    return name + final if len(name) <= 24 else f"#{evaluation.number}"


def best_name(constraints: Constraints, best: Evaluation) -> str:
    """What the best candidate is called: given plans measured on the test split have no winner."""
    if best.split == "test":
        return "highest"
    return "winner" if constraints.feasible(best) else "nearest"


def new_figure(height: float, width: float = 7.2) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def heading(figure: Figure, text: str) -> None:
    lines = textwrap.fill(text, 78)
    figure.suptitle(lines, x=0.01, horizontalalignment="left", fontsize=10.5, fontweight="bold", parse_math=False)


def shorten(name: str) -> str:
    """Cuts a name to LONGEST_NAME for a legend."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def legend_columns(names: Sequence[str], most: int) -> int:
    """The number of columns that fit, at most `most`, each as wide as its longest name."""
    for count in range(min(most, len(names)), 1, -1):
        if sum(max(map(len, column)) + 9 for column in np.array_split(names, count)) <= 112:
            return count
    return 1


def legend(axes: Axes) -> None:
    """Puts the legend above the axes, in as many columns as fit."""
    columns = legend_columns(axes.get_legend_handles_labels()[1], 5)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=8, frameon=False, borderaxespad=0.2)


def nothing(figure: Figure) -> Figure:
    figure.text(0.5, 0.45, "no trained candidate has these values yet", horizontalalignment="center", color=GREY)
    return figure


def finite(value: float | None) -> float:
    """The value, or NaN, which matplotlib leaves out, for one that was not measured."""
    return value if value is not None and math.isfinite(value) else math.nan


def log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """Makes the vertical axis logarithmic where a linear one would squeeze most values into a line."""
    known = [value for value in values if math.isfinite(value)]
    if known and min(known) > 0 and (max(known) > 50 * min(known) or max(known) > 5 * median(known)):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
