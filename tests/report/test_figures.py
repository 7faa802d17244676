import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import depthwise, from_indices, legal_rates, make_plan, named_plans, regular
from fnet_search.base.units import millions
from fnet_search.importing.spaces import load_space
from fnet_search.policy.conformance import made_up_probes as probes
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation, LayerStats
from fnet_search.policy.metric import ClassResult
from fnet_search.report.figures import run_figures, save_figures
from fnet_search.report.layer_figures import (
    SHOWN,
    candidate_figure,
    layer_axis,
    precisions_figure,
    ranges_figure,
    selection,
)
from fnet_search.report.macs_figures import PANELS, macs_figure
from fnet_search.report.probe_figures import probes_figure
from fnet_search.report.style import legend_columns, plan_name
from tests.support.evaluations import failed, outcome, paper_evaluations, refused, residual_space, trained
from tests.support.pictures import outside, overlapping, png_size, texts

SPACE = load_space("factorizenet")
PAPER = paper_evaluations(SPACE)
BUDGET = Constraints(conv_macs=120_000_000)
NAMES = [
    "accuracy_vs_macs.png",
    "qmse_vs_macs.png",
    "qce_vs_macs.png",
    "drop_vs_macs.png",
    "layer_ranges.png",
    "layer_precisions.png",
    "best_layers.png",
]


def line(axes: Axes, name: str) -> Line2D:
    (found,) = [one for one in axes.get_lines() if str(one.get_label()) == name]
    return found


def xs(one: Line2D) -> list[float]:
    return [float(x) for x in np.asarray(one.get_xdata())]


def ys(one: Line2D) -> list[float]:
    return [float(y) for y in np.asarray(one.get_ydata())]


def points(axes: Axes, name: str) -> list[tuple[float, float]]:
    return sorted(zip(xs(line(axes, name)), ys(line(axes, name)), strict=True))


def random_search(space: Macroarchitecture, count: int) -> tuple[Evaluation, ...]:
    """Candidates as a search leaves them, some refused, some failed."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        plan = from_indices(space, tuple(int(rng.integers(len(rates))) for rates in legal_rates(space).values()))
        if number % 5 == 3:
            found.append((refused if number % 2 else failed)(space, plan, number))
        else:
            fp32 = 0.85 + rng.normal(0, 0.02)
            found.append(trained(space, plan, number, fp32, fp32 - rng.uniform(0.01, 0.1)))
    return tuple(found)


def test_millions() -> None:
    assert [millions(macs) for macs in (266_010_624, 9_437_184, 811_008, 1_234_567_890)] == [
        "266.0",
        "9.44",
        "0.811",
        "1,234.6",
    ]


@pytest.mark.parametrize(
    ("metric", "name", "values"),
    [
        ("accuracy", "fp32", [100 * (one.fp32_accuracy or 0) for one in PAPER]),
        ("accuracy", "quint8", [100 * (one.quint8_accuracy or 0) for one in PAPER]),
        ("qmse", "QMSE", [one.qmse for one in PAPER]),
        ("qce", "QCE", [one.qce for one in PAPER]),
        ("drop", "relative drop", [100 * (one.relative_drop or 0) for one in PAPER]),
    ],
)
def test_points_of_figure_4_are_the_evaluations(metric: str, name: str, values: Sequence[float]) -> None:
    (axes,) = macs_figure(SPACE, BUDGET, PAPER, metric).axes
    assert points(axes, name) == sorted(zip([one.cost.conv_macs / 1e6 for one in PAPER], values, strict=True))


def test_figure_4_shows_the_winner_the_constraints_and_the_split() -> None:
    constraints = Constraints(conv_macs=120_000_000, min_quint8=0.75, max_drop=0.08)
    (axes,) = macs_figure(SPACE, constraints, PAPER, "accuracy").axes
    assert points(axes, "winner: init2") == [(104.267776, 100 * 0.8031)]
    assert xs(line(axes, "budget 120.0 MMAC")) == [120, 120]
    assert ys(line(axes, "quint8 at least 75 %")) == [75, 75]
    (axes,) = macs_figure(SPACE, constraints, PAPER, "drop").axes
    assert ys(line(axes, "at most 8 %")) == [8, 8]
    assert {note.get_text() for note in axes.texts} == set(named_plans(SPACE)) & {
        "regular", "f2", "f4", "f8", "f16", "init2", "init4", "dws",
    }  # fmt: skip
    tested = [replace(one, split="test") for one in PAPER]
    assert "test split" in [text.get_text() for text in texts(macs_figure(SPACE, BUDGET, tested, "qce"))][-1]


def test_figure_4_shows_the_accuracy_that_the_search_compares() -> None:
    classes = (ClassResult(90, 81, 72), ClassResult(10, 5, 4))
    one = replace(PAPER[0], classes=classes)
    limits = Constraints(min_quint8=0.5, metric="balanced-accuracy")
    (axes,) = macs_figure(SPACE, limits, [one], "accuracy").axes
    assert axes.get_ylabel() == "balanced accuracy (%)"
    assert points(axes, "quint8") == [(one.cost.conv_macs / 1e6, 100 * (0.8 + 0.4) / 2)]
    (axes,) = macs_figure(SPACE, limits, [one], "drop").axes
    assert ys(line(axes, "relative drop")) == pytest.approx([100 * (0.7 - 0.6) / 0.7])


def test_without_a_feasible_candidate_the_nearest_is_marked() -> None:
    (axes,) = macs_figure(SPACE, Constraints(min_quint8=0.99), PAPER, "accuracy").axes
    assert points(axes, "nearest: regular") == [(266.010624, 100 * 0.856)]


def test_only_what_was_measured_is_drawn() -> None:
    odd = [
        trained(SPACE, regular(SPACE), 0, 0.9, 0.8),
        replace(trained(SPACE, depthwise(SPACE), 1, 0.8, 0.7), qmse=None, quint8_accuracy=None),
        replace(trained(SPACE, make_plan(SPACE, {"conv_64_1": 2}), 2, 0.8, 0.7), qmse=math.inf),
        refused(SPACE, make_plan(SPACE, {"conv_64_1": 4}), 3),
        failed(SPACE, make_plan(SPACE, {"conv_64_1": 8}), 4),
    ]
    (axes,) = macs_figure(SPACE, Constraints(), odd, "qmse").axes
    assert points(axes, "QMSE") == [(266.010624, odd[0].qmse)]
    (axes,) = macs_figure(SPACE, Constraints(), odd, "accuracy").axes
    assert len(points(axes, "fp32")) == 3
    assert sum(math.isfinite(y) for _, y in points(axes, "quint8")) == 2


@pytest.mark.parametrize("metric", PANELS)
def test_nothing_trained_gives_a_figure_that_says_so(metric: str) -> None:
    for evaluations in ((), (refused(SPACE, regular(SPACE), 0),)):
        assert "no trained candidate" in str(
            [text.get_text() for text in texts(macs_figure(SPACE, BUDGET, evaluations, metric))]
        )
        assert run_figures(outcome(SPACE, BUDGET, evaluations)) == {}


def test_long_plans_are_named_by_number() -> None:
    space = residual_space()
    plan = make_plan(space, {"block1.conv1": 2})
    assert plan_name(space, trained(space, plan, 17, 0.9, 0.8)) == "#17"
    assert plan_name(space, trained(space, regular(space), 17, 0.9, 0.8)) == "regular"


def test_a_wide_spread_has_a_logarithmic_axis() -> None:
    far = [replace(one, qmse=10.0**index) for index, one in enumerate(PAPER)]
    assert macs_figure(SPACE, BUDGET, far, "qmse").axes[0].get_yscale() == "log"
    assert macs_figure(SPACE, BUDGET, PAPER, "qmse").axes[0].get_yscale() == "linear"


def test_one_value_above_all_others_does_not_squeeze_them() -> None:
    """As the range of the logits, beside those of the layers before."""
    *before, logits = PAPER[0].layers
    wide = [
        *(replace(layer, activation_min=0.0, activation_max=2.0) for layer in before),
        replace(logits, activation_min=-10.0, activation_max=11.0),
    ]
    *weights, activations = ranges_figure(SPACE, BUDGET, [replace(PAPER[0], layers=tuple(wide))]).axes
    assert [axes.get_yscale() for axes in weights] == ["linear", "linear"]
    assert activations.get_yscale() == "log"
    low, high = activations.get_ylim()
    labels = activations.yaxis.get_major_formatter().format_ticks(activations.get_yticks())
    assert [text for text, at in zip(labels, activations.get_yticks(), strict=True) if low < at < high] == [
        "2",
        "5",
        "10",
        "20",
    ]


@pytest.mark.parametrize(
    ("lengths", "most", "columns"),
    [
        ([7, 2, 2, 2, 17], 5, 5),
        ([7, 2, 2, 2, 17], 4, 4),
        ([38] * 4, 4, 2),
        ([38, 2, 2, 2], 4, 4),
        ([120, 3], 4, 1),
        ([3], 4, 1),
    ],
)
def test_a_legend_is_as_wide_as_fits(lengths: Sequence[int], most: int, columns: int) -> None:
    """112 characters, 9 of them for the space and the marker of each column."""
    assert legend_columns(["x" * length for length in lengths], most) == columns


# Layer by layer


def test_networks_of_different_plans_line_up() -> None:
    mixed = trained(SPACE, make_plan(SPACE, {"conv_64_2": 4}), 1, 0.8, 0.7)
    slots = layer_axis(SPACE, [PAPER[0], mixed])
    assert slots[:5] == [
        ("conv_in", False),
        ("conv_64_1", False),
        ("conv_64_2", False),
        ("conv_64_2", True),
        ("conv_128_1", False),
    ]
    assert len(slots) == 1 + 8 + 1 + 3
    assert layer_axis(SPACE, []) == []


def test_a_layer_of_the_space_may_be_called_grouped() -> None:
    space = load_space("tiny")
    renamed = replace(
        space,
        nodes=tuple(
            replace(
                node,
                name=node.name.replace("conv_in", "stem.grouped"),
                inputs=tuple(source.replace("conv_in", "stem.grouped") for source in node.inputs),
            )
            for node in space.nodes
        ),
    )
    plain = trained(renamed, regular(renamed), 0, 0.9, 0.8)
    assert layer_axis(renamed, [plain])[:2] == [("stem.grouped", False), ("conv_8", False)]


@pytest.mark.parametrize(
    ("build", "values"),
    [
        (
            ranges_figure,
            (
                lambda layer: layer.weight_max - layer.weight_min,
                lambda layer: layer.folded_max - layer.folded_min,
                lambda layer: layer.activation_max - layer.activation_min,
            ),
        ),
        (
            precisions_figure,
            (
                lambda layer: 100 * layer.weight_precision,
                lambda layer: 100 * layer.folded_precision,
                lambda layer: 100 * layer.activation_precision,
            ),
        ),
    ],
)
def test_lines_of_figures_5_and_6_are_the_layers(build, values) -> None:  # type: ignore[no-untyped-def]
    shown = {"regular": PAPER[0], "init2 (winner)": PAPER[5]}
    figure: Figure = build(SPACE, BUDGET, tuple(shown.values()))
    slots = layer_axis(SPACE, tuple(shown.values()))
    for axes, value in zip(figure.axes, values, strict=True):
        by_layer: dict[str, LayerStats] = {layer.layer: layer for layer in PAPER[0].layers}
        assert points(axes, "regular") == [
            (x, value(by_layer[name])) for x, (name, pointwise) in enumerate(slots) if not pointwise
        ]
        by_layer = {layer.layer: layer for layer in PAPER[5].layers}
        assert points(axes, "init2 (winner)") == [
            (x, value(by_layer[name if name in by_layer else f"{name}.grouped"]))
            for x, (name, pointwise) in enumerate(slots)
            if not pointwise
        ]
        hollow = [one for one in axes.get_lines() if one.get_label() == "_pointwise" and xs(one)]
        assert [ys(one) for one in hollow] == [
            [value(by_layer[f"{name}.pointwise"]) for name, pointwise in slots if pointwise]
        ]
    labels = [label.get_text() for label in figure.axes[-1].get_xticklabels()]
    assert labels == ["pointwise" if pointwise else name for name, pointwise in slots]


def test_many_candidates_are_reduced_to_those_worth_comparing() -> None:
    found = random_search(SPACE, 50)
    chosen = selection(BUDGET, found)
    complete = [one for one in found if one.state == "complete"]
    assert len(chosen) == len(set(chosen)) == SHOWN
    assert max(complete, key=lambda one: one.cost.conv_macs) in chosen
    assert min(complete, key=lambda one: one.cost.conv_macs) in chosen
    assert max(complete, key=lambda one: one.relative_drop or 0) in chosen
    assert max(
        (one for one in complete if BUDGET.feasible(one)), key=lambda one: one.quint8_accuracy or 0
    ) in chosen  # fmt: skip
    macs = [one.cost.conv_macs for one in chosen]
    assert macs == sorted(macs, reverse=True)
    assert selection(BUDGET, PAPER[:2]) == [*PAPER[:2]]
    assert selection(BUDGET, [replace(PAPER[0], layers=())]) == []


def test_one_candidate_alone_shows_its_ranges_precisions_and_noise() -> None:
    layers = (replace(PAPER[5].layers[0], weight_sqnr_db=None, accumulated_sqnr_db=None), *PAPER[5].layers[1:])
    figure = candidate_figure(SPACE, replace(PAPER[5], layers=layers))
    weights, activations, precisions, noise = figure.axes
    bars = {str(bar.get_label()): bar.patches for bar in weights.containers}  # type: ignore[attr-defined]
    assert [bar.get_y() for bar in bars["trained"]] == [layer.weight_min for layer in layers]
    assert [bar.get_y() + bar.get_height() for bar in bars["trained"]] == pytest.approx(
        [layer.weight_max for layer in layers]
    )
    assert [bar.get_y() for bar in bars["batch norm folded in"]] == [layer.folded_min for layer in layers]
    assert [bar.get_y() for bar in activations.containers[0].patches] == [  # type: ignore[attr-defined]
        layer.activation_min for layer in layers
    ]
    assert [y for _, y in points(precisions, "folded")] == [100 * layer.folded_precision for layer in layers]
    measured = [y for _, y in points(noise, "weights")]
    assert math.isnan(measured[0])
    assert measured[1:] == [layer.weight_sqnr_db for layer in layers[1:]]


def test_a_network_without_noise_or_layers_is_drawn_too() -> None:
    silent = tuple(
        replace(layer, weight_sqnr_db=None, activation_sqnr_db=None, accumulated_sqnr_db=None)
        for layer in PAPER[0].layers
    )
    candidate_figure(SPACE, replace(PAPER[0], layers=silent)).draw_without_rendering()
    candidate_figure(SPACE, replace(PAPER[0], layers=())).draw_without_rendering()
    ranges_figure(SPACE, BUDGET, ()).draw_without_rendering()


# All of them


def readable(figure: Figure) -> None:
    boxes = texts(figure)
    assert overlapping(boxes) == []
    assert outside(figure, boxes) == []
    for axes in figure.axes:
        legend = axes.get_legend()
        window = axes.get_window_extent()
        assert legend is None or legend.get_window_extent().y0 >= window.y1 - 1  # it covers no data


CASES = {
    "paper": (SPACE, Constraints(120_000_000, None, 0.75, 0.08), PAPER),
    "none feasible": (SPACE, Constraints(120_000_000, None, 0.999, 0.001), PAPER),
    "search": (SPACE, BUDGET, random_search(SPACE, 40)),
    "tiny": (load_space("tiny"), Constraints(), paper_evaluations(load_space("tiny"))),
    "one": (SPACE, BUDGET, PAPER[:1]),
    "residual": (residual_space(), Constraints(30_000_000), random_search(residual_space(), 12)),
}


@pytest.mark.parametrize("case", CASES)
def test_no_text_covers_another_or_sticks_out(case: str) -> None:
    space = CASES[case][0]
    for figure in run_figures(outcome(*CASES[case], probes=probes(space))).values():
        readable(figure)


def test_a_heat_map_has_what_each_probe_measured() -> None:
    measured = probes(SPACE)
    figure = probes_figure(SPACE, measured)
    legal = legal_rates(SPACE)
    rates = sorted({rate for of in legal.values() for rate in of})
    assert len(figure.axes) == 3
    of = {
        0: lambda one: 100 * one.logit_noise,
        1: lambda one: 100 * one.quint8_logit_noise,
        2: lambda one: 1000 * one.quint8_loss,
    }
    for place, value in of.items():
        axes = figure.axes[place]
        assert [text.get_text() for text in axes.get_yticklabels()] == list(legal)
        assert [text.get_text() for text in axes.get_xticklabels()] == list(map(str, rates))
        shown = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
        assert len(shown) == len(measured.changes) + len(legal)
        for one in measured.changes:
            cell = (rates.index(one.rate), list(legal).index(one.layer))
            assert shown[cell] == f"{value(one) - value(measured.unchanged):.2g}"


def test_a_heat_map_leaves_out_what_cannot_start_from_the_network() -> None:
    plan = make_plan(SPACE, {"conv_64_1": 4})
    measured = probes(SPACE)
    changes = tuple(one for one in measured.changes if one.layer != "conv_64_1" or one.rate > 4)
    (axes, *_) = probes_figure(SPACE, replace(measured, plan=plan, changes=changes)).axes
    row = [round(text.get_position()[0]) for text in axes.texts if round(text.get_position()[1]) == 0]
    assert row == [2, 3, 4, 5, 6]  # 4, its own, to 64


def test_writes_pngs_of_stable_names_and_bytes(tmp_path: Path) -> None:
    paths = save_figures(run_figures(outcome(SPACE, BUDGET, PAPER)), tmp_path / "figures")
    assert [path.name for path in paths] == NAMES
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(NAMES)
    for path in paths:
        width, height = png_size(path)
        assert width == 1080
        assert 500 < height < 1600
    before = [path.read_bytes() for path in paths]
    save_figures(run_figures(outcome(SPACE, BUDGET, PAPER[::-1])), tmp_path / "figures")  # whatever the order
    assert [path.read_bytes() for path in paths] == before


def test_only_figures_that_show_something_are_drawn() -> None:
    bare = [replace(one, layers=(), qmse=None) for one in PAPER]
    assert [f"{name}.png" for name in run_figures(outcome(SPACE, BUDGET, bare))] == [NAMES[0], *NAMES[2:4]]


def test_no_global_state_of_matplotlib_is_touched() -> None:
    before = dict(matplotlib.rcParams)
    run_figures(outcome(SPACE, BUDGET, PAPER))
    assert dict(matplotlib.rcParams) == before
