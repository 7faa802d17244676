"""The figures of a run's report. FIGURES lists them; `layer_figures`, `macs_figures` and `probe_figures` draw them.

Each is a function of an outcome that returns a matplotlib figure; no global state is touched, so any thread may draw.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.ranking import ranking
from fnet_search.report.layer_figures import candidate_figure, precisions_figure, ranges_figure
from fnet_search.report.macs_figures import PANELS, front_figure, macs_figure
from fnet_search.report.outcome import Outcome
from fnet_search.report.probe_figures import probes_figure
from fnet_search.report.style import (
    finite,
    save_png,
)


@dataclass(frozen=True)
class RunFigure:
    """A figure of a run's report: the name of its file, and a caption that says what to look for."""

    name: str
    caption: str
    draw: Callable[[Outcome], Figure | None]
    """Returns None if there is nothing to show."""


def _against_macs(panel: str) -> Callable[[Outcome], Figure | None]:
    def draw(outcome: Outcome) -> Figure | None:
        values, metric = PANELS[panel].series.values(), outcome.constraints.metric
        known = any(
            math.isfinite(finite(value(evaluation, metric))) for value in values for evaluation in _trained(outcome)
        )
        return macs_figure(outcome.space, outcome.constraints, _trained(outcome), panel) if known else None

    return draw


def _of_profiled(
    figure: Callable[[Macroarchitecture, Constraints, Sequence[Evaluation]], Figure],
) -> Callable[[Outcome], Figure | None]:
    def draw(outcome: Outcome) -> Figure | None:
        profiled = [evaluation for evaluation in _trained(outcome) if evaluation.layers]
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
    """The trained candidates, best first."""
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
        "What the policy expects of the best plan at every budget, given all measurements so far: look where the line "
        "bends before you fix a budget. front.csv has the plans.",
        _front,
    ),
)
"""In the order of the report."""


def run_figures(outcome: Outcome) -> dict[str, Figure]:
    """The figures of a run by name, without those that have nothing to show."""
    drawn = {figure.name: figure.draw(outcome) for figure in FIGURES}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def caption(name: str) -> str:
    """The caption of the figure called `name`."""
    return next(figure.caption for figure in FIGURES if figure.name == name)


def save_figures(drawn: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Writes each figure as a PNG file named after it. Returns the paths."""
    paths = {folder / f"{name}.png": figure for name, figure in drawn.items()}
    for path, figure in paths.items():
        save_png(figure, path)
    return list(paths)
