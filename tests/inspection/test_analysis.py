import io
import math
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
import pytest
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from rich.console import Console

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Activation, Conv, Dense, Flatten, Pool
from fnet_search.arch.macroarchitecture import Macroarchitecture, Node
from fnet_search.arch.plan import FactorizationPlan, named_plans, regular
from fnet_search.arch.space_file import to_toml
from fnet_search.candidates.measure import evaluate_quantized
from fnet_search.candidates.network_files import WEIGHTS
from fnet_search.importing.spaces import load_space
from fnet_search.inspection.analysis import (
    COLUMNS,
    TENSORS,
    LayerAnalysis,
    NetworkAnalysis,
    accuracies_text,
    analysis_frame,
    analysis_table,
    analyze,
    verdict,
)
from fnet_search.inspection.analysis_figures import (
    STATISTICS,
    Statistic,
    analysis_slots,
    badness,
    boxes_figure,
    costs_figure,
    heat_figure,
)
from fnet_search.inspection.analysis_page import write_analysis
from fnet_search.policy.conformance import made_up_layers as layer_stats
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation, LayerStats
from fnet_search.quant.calibration import quantize_trained
from fnet_search.quant.scheme import Scheme, parse_scheme
from fnet_search.quant.sensitivity import PartSensitivity, Sensitivity
from fnet_search.rundir.recorded_run import RecordedRun
from fnet_search.rundir.run_folder import RunFolder, scheme_folder
from fnet_search.training.datasets import DataSet
from fnet_search.training.weights import write_tensors
from tests.support.evaluations import residual_space
from tests.support.networks import MIXED, noise, randomized
from tests.support.pictures import outside, overlapping, texts

TINY = load_space("tiny")
STEM = replace(MIXED.nodes[0], layer=Conv(8, (3, 3), padding=(1, 1), factorize=True))
BRANCHES = replace(MIXED, nodes=(STEM, *MIXED.nodes[1:]))
"""With a layer to factorize, without which a space has no plans."""
IMAGES = 64


def recorded(
    folder: Path, space: Macroarchitecture, *networks: tuple[FactorizationPlan, str]
) -> tuple[RecordedRun, DataSet]:
    """A run whose candidates have random weights; the schemes of a plan after its first are requantizations."""
    run, data = RunFolder(folder), noise(space, IMAGES)
    config = {"space": to_toml(space), "split": "test", "seed": 3, "dataset": "noise", "study": "a <study>"}
    numbers: dict[FactorizationPlan, int] = {}
    for plan, text in networks:
        again = plan in numbers
        number = numbers.setdefault(plan, len(numbers))
        candidate, scheme = run.candidate(number), parse_scheme(text)
        target = scheme_folder(candidate, str(scheme)) if again else candidate
        target.mkdir(parents=True)
        trained = randomized(factorize(space, plan), number)
        write_tensors(candidate / WEIGHTS, trained.state_dict(), {})
        begun = Evaluation(number, plan, plan_cost(space, plan), split="test")
        quantized = quantize_trained(trained, scheme, data, 3)
        run.write_candidate(evaluate_quantized(begun, trained, quantized, data, 3, target), target)
    return RecordedRun(run, config, space, Constraints()), data


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[RecordedRun, DataSet]:
    plans = named_plans(TINY)
    networks = [(plans["regular"], "percentile:1"), (plans["regular"], "mse+per-channel"), (plans["dws"], "minmax")]
    return recorded(tmp_path_factory.mktemp("tiny"), TINY, *networks)


@pytest.fixture(scope="module")
def analyses(tiny: tuple[RecordedRun, DataSet]) -> tuple[NetworkAnalysis, ...]:
    opened, data = tiny
    return analyze(opened, opened.networks, data, 40)


@pytest.fixture(scope="module")
def branches(tmp_path_factory: pytest.TempPathFactory) -> tuple[RecordedRun, NetworkAnalysis]:
    opened, data = recorded(tmp_path_factory.mktemp("mixed"), BRANCHES, (regular(BRANCHES), "percentile:1+equalize"))
    return opened, analyze(opened, opened.networks, data, 20)[0]


def test_every_network_once_with_a_name_of_its_own(tiny: tuple[RecordedRun, DataSet]) -> None:
    opened, data = tiny
    one, two, three = opened.networks
    told: list[tuple[int, int]] = []
    found = analyze(opened, [one, three, one, two], data, 30, lambda *progress: told.append(progress))
    assert [network.id for network in found] == ["0", "1", "0/mse+per-channel"]
    assert [network.name for network in found] == ["regular (0)", "dws", "regular (0/mse+per-channel)"]
    assert told == [(25, 90), (30, 90), (55, 90), (60, 90), (85, 90), (90, 90)]
    assert {network.sensitivity.images for network in found} == {30}


def test_rows_are_the_layers_and_what_belongs_to_none(analyses: tuple[NetworkAnalysis, ...]) -> None:
    names = ["conv_in", "conv_8", "conv_16_1", "conv_16_2"]
    assert [layer.name for layer in analyses[0].layers] == ["input", *names, "gap", "dense_out"]
    parts = [f"{name}.{part}" for name in names[1:] for part in ("grouped", "pointwise")]
    assert [layer.name for layer in analyses[2].layers] == ["input", "conv_in", *parts, "gap", "dense_out"]


def test_statistics_of_layers_are_those_of_the_evaluation(analyses: tuple[NetworkAnalysis, ...]) -> None:
    for one in analyses:
        stats = {layer.layer: asdict(layer) for layer in one.evaluation.layers}
        found = {layer.name: dict(layer.statistics) for layer in one.layers}
        assert {name: found[name] for name in stats} == stats
        assert set(found) - set(stats) == {"input", "gap"}


def test_channels_give_the_precisions_and_the_dead(
    analyses: tuple[NetworkAnalysis, ...], branches: tuple[RecordedRun, NetworkAnalysis]
) -> None:
    """Paper, equation (3), from the channels that the boxes show."""
    for one in (*analyses, branches[1]):
        for stats in one.evaluation.layers:
            layer = next(layer for layer in one.layers if layer.name == stats.layer)
            for tensor in TENSORS:
                channels, whole = layer.channels[tensor], layer.range(tensor)
                assert whole
                precision = getattr(stats, f"{tensor}_precision")
                assert fmean(channels) / whole == pytest.approx(precision, rel=1e-5)
            assert sum(value == 0 for value in layer.channels["activation"]) == stats.dead_activation_channels
            growth = (stats.folded_max - stats.folded_min) / (stats.weight_max - stats.weight_min)
            assert layer.fold_growth == pytest.approx(growth)


def test_what_has_no_weights_has_activations(
    tiny: tuple[RecordedRun, DataSet], analyses: tuple[NetworkAnalysis, ...]
) -> None:
    _, data = tiny
    row = analyses[0].layers[0]
    x = data.normalise(data.train.images)
    assert row.statistics["kind"] == "input"
    assert (row.range("weight"), row.range("folded"), row.fold_growth, row.statistics["macs"]) == (None,) * 4
    assert (row.channels["weight"], row.channels["folded"]) == ((), ())
    ranges = (x.amax((0, 2, 3)) - x.amin((0, 2, 3))).tolist()
    step = float(x.max() - x.min()) / 255  # the range in codes begins at a multiple of a step
    assert row.channels["activation"] == pytest.approx(ranges, abs=step)
    assert row.statistics["activation_precision"] == pytest.approx(fmean(ranges) / float(x.max() - x.min()), abs=0.01)
    assert row.statistics["sparsity"] == pytest.approx(float((x == 0).double().mean()))
    pool = analyses[0].layers[-2]
    assert (pool.name, pool.statistics["kind"]) == ("gap", "pool")
    assert len(pool.channels["activation"]) == 16


def test_branches_and_norms_are_rows(branches: tuple[RecordedRun, NetworkAnalysis]) -> None:
    opened, one = branches
    kinds = {layer.name: layer.statistics["kind"] for layer in one.layers}
    assert kinds["sum"] == "add"
    assert kinds["joined"] == "concat"
    assert kinds["two.swish"] == "activation"
    norm = next(layer for layer in one.layers if layer.name == "average.norm")
    assert norm.statistics["kind"] == "batch_norm"
    assert (norm.range("weight"), norm.fold_growth) == (None, None)
    folded, _ = opened.networks[0].load(BRANCHES)
    weight = folded.weight["average.norm"]
    assert norm.range("folded") == pytest.approx(float(weight.max() - weight.min()))
    assert norm.channels["folded"] == (0.0,) * len(weight)  # one weight a channel


def test_frame_has_every_statistic_and_the_costs_in_points(
    tiny: tuple[RecordedRun, DataSet], analyses: tuple[NetworkAnalysis, ...]
) -> None:
    frame = analysis_frame(tiny[0], analyses)
    assert set(LayerStats.__dataclass_fields__) < set(COLUMNS)
    assert list(frame.columns) == list(COLUMNS)
    assert len(frame) == 7 + 7 + 10
    assert frame["network"].unique().tolist() == ["0", "0/mse+per-channel", "1"]
    assert frame["scheme"].unique().tolist() == ["percentile:1", "mse+per-channel", "minmax"]
    assert set(frame["split"]) == {"test"}
    assert set(frame["images"]) == {40}
    row = frame[(frame["network"] == "1") & (frame["layer"] == "conv_8.grouped")].iloc[0]
    layer = next(layer for layer in analyses[2].layers if layer.name == "conv_8.grouped")
    assert row["label"] == "dws"
    assert row["macs"] == 9 * 8 * 16 * 16
    assert row["folded_range"] == row["folded_max"] - row["folded_min"]
    assert row["fold_growth"] == pytest.approx(row["folded_range"] / row["weight_range"])
    part, costs = layer.sensitivity, analyses[2].sensitivity
    assert row["only_accuracy"] == part.only_accuracy
    assert row["cost_points"] == pytest.approx(100 * (costs.fp32_accuracy - part.only_accuracy))
    assert row["gain_points"] == pytest.approx(100 * (part.all_but_accuracy - costs.fake_accuracy))
    assert row["cost_error_points"] == pytest.approx(100 * part.cost_error)
    assert row["gain_error_points"] == pytest.approx(100 * part.gain_error)
    empty = frame[frame["layer"] == "input"].iloc[0]
    assert all(pd.isna(empty[name]) for name in ("macs", "weight_range", "fold_growth", "weight_sqnr_db"))


def part(layer: str, cost: float = 0.0, gain: float = 0.0, error: float = 0.004) -> PartSensitivity:
    return PartSensitivity(layer, 0.9 - cost, cost, error, cost / 10, 0.8 + gain, gain, error)


def made(*parts: PartSensitivity, drop: float = 0.1, name: str = "f4") -> NetworkAnalysis:
    costs = Sensitivity(1000, 0.9, 0.9 - drop, 0.799, drop, 0.01, parts)
    evaluation = Evaluation(0, regular(TINY), plan_cost(TINY, regular(TINY)))
    statistics = {**dict.fromkeys(LayerStats.__dataclass_fields__), "kind": "conv"}
    layers = tuple(LayerAnalysis(statistics, dict.fromkeys(TENSORS, ()), one) for one in parts)
    return NetworkAnalysis("0", name, evaluation, costs, layers)


def test_verdict_names_the_layer_that_costs_and_the_one_that_gives_back() -> None:
    assert verdict(made(part("a", 0.001), part("b", 0.019, 0.013), part("c", 0.002))) == (
        "quint8 costs 10.0 ± 1.0 points. b costs most: 1.9 ± 0.4 points when only it is quantized; "
        "left in float it gives back 1.3 ± 0.4 points."
    )
    assert verdict(made(part("a", 0.001, 0.03), part("b", 0.019, 0.001))) == (
        "quint8 costs 10.0 ± 1.0 points. b costs most: 1.9 ± 0.4 points when only it is quantized; "
        "left in float it gives back 0.1 ± 0.4 points, a 3.0 ± 0.4 points."
    )


def test_verdict_says_what_is_noise() -> None:
    assert verdict(made(replace(part("a", 0.001), only_kl=0.5), part("b", 0.009, 0.001))) == (
        "quint8 costs 10.0 ± 1.0 points. No layer stands out by itself: b, the costliest, loses 0.9 ± 0.4 points when "
        "only it is quantized, which may be noise (by KL divergence, which is less noisy, a costs most); left in float "
        "it gives back 0.1 ± 0.4 points."
    )
    assert verdict(made(part("a", 0.001, 0.008), part("b", 0.019, 0.001))).endswith(
        "; no layer left in float gives back more than the noise."
    )
    assert verdict(made(part("a", 0.001), part("b", 0.009), drop=0.01)) == (
        "quint8 costs nothing measurable on 1,000 images: 1.0 ± 1.0 points."
    )
    assert verdict(made(part("a", 0.001), part("b", 0.03), drop=0.01)) == (
        "quint8 costs nothing measurable on 1,000 images: 1.0 ± 1.0 points. "
        "b costs most by itself: 3.0 ± 0.4 points when only it is quantized."
    )


def test_accuracies_are_named_with_images_and_split() -> None:
    one = made(part("a"))
    assert accuracies_text(one) == ("fp32 90.0 %, quint8 80.0 % (integer network 79.9 %) on 1,000 validation images")
    given = replace(one, evaluation=replace(one.evaluation, split="test"))
    assert accuracies_text(given).endswith("on 1,000 test images")


def shown(one: NetworkAnalysis, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(analysis_table(one, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_layer_of_a_long_name_has_a_row_on_a_narrow_terminal() -> None:
    one = made(part("a" * 200, 0.03), part("b"))
    lines = shown(one, 60).splitlines()
    assert "".join(line[:25].strip() for line in lines).count("a") >= 200
    assert [f"{100 * one.layers[0].sensitivity.only_accuracy:.1f}" in line for line in lines].count(True) == 1


def test_terminal_table_marks_the_costliest(analyses: tuple[NetworkAnalysis, ...]) -> None:
    one = analyses[0]
    lines = shown(one, 140).splitlines()
    (marked,) = [line for line in lines if " < " in line]
    costliest = one.costliest
    assert marked.split()[:3] == [costliest.name, "<", costliest.statistics["kind"]]
    assert f"{100 * costliest.sensitivity.only_accuracy:.1f}" in marked
    (row,) = [line for line in lines if line.startswith("conv_8 ")]
    stats = next(stats for stats in one.evaluation.layers if stats.layer == "conv_8")
    three = (stats.weight_precision, stats.folded_precision, stats.activation_precision)
    assert "/".join(f"{100 * value:.0f}" for value in three) in row
    assert row.split()[-1] == f"{9 * 8 * 16 * 16 * 16 / 1e6:.3g}"
    assert verdict(one) in " ".join(" ".join(lines).split())


def test_narrow_terminals_get_whole_columns(analyses: tuple[NetworkAnalysis, ...]) -> None:
    whole, narrow = shown(analyses[2], 140), shown(analyses[2], 60)
    assert "MMAC" in whole
    assert "MMAC" not in narrow
    assert "…" not in narrow
    assert "conv_16_2.pointwise" in narrow
    assert max(map(len, narrow.splitlines())) <= 60


def test_tables_show_names_as_they_are(analyses: tuple[NetworkAnalysis, ...]) -> None:
    assert "[bold]x[/bold]" in shown(made(part("[bold]x[/bold]"), name="[red]"), 100)


# Figures


def synthetic(space: Macroarchitecture, plan: FactorizationPlan, name: str, seed: int) -> NetworkAnalysis:
    rng = np.random.default_rng(seed)
    evaluation = Evaluation(seed, plan, plan_cost(space, plan), layers=layer_stats(space, plan, seed))
    layers = []
    for stats in evaluation.layers:
        channels = {}
        for tensor in TENSORS:
            whole = getattr(stats, f"{tensor}_max") - getattr(stats, f"{tensor}_min")
            channels[tensor] = tuple((whole * rng.uniform(0, 1, 16) ** 3).tolist())
        one = part(stats.layer, float(rng.normal(0.01, 0.01)), float(rng.normal(0.004, 0.004)))
        layers.append(LayerAnalysis(asdict(stats), channels, one))
    nothing = dict.fromkeys(LayerStats.__dataclass_fields__)
    values = {"layer": "input", "kind": "input", "activation_min": -2.0, "activation_max": 2.0, "sparsity": 0.0}
    first = LayerAnalysis(
        {**nothing, **values}, {"weight": (), "folded": (), "activation": (4.0, 3.0, 2.0)}, part("input", 0.001)
    )
    costs = Sensitivity(1000, 0.9, 0.8, 0.8, 0.1, 0.01, (first.sensitivity, *(one.sensitivity for one in layers)))
    return NetworkAnalysis(str(seed), name, evaluation, costs, (first, *layers))


SPACES = {"factorizenet": load_space("factorizenet"), "residual": residual_space()}


def six(space: Macroarchitecture) -> list[NetworkAnalysis]:
    plans = dict(list(named_plans(space).items())[:6])
    return [synthetic(space, plan, name, seed) for seed, (name, plan) in enumerate(plans.items())]


@pytest.mark.parametrize(("name", "count"), [("factorizenet", 1), ("residual", 6)])
def test_pictures_are_readable(name: str, count: int, tmp_path: Path) -> None:
    space = SPACES[name]
    networks = six(space)[-count:]
    opened = RecordedRun(RunFolder(tmp_path), {}, space, Constraints())
    frame = analysis_frame(opened, networks)
    for figure in (
        costs_figure(space, networks),
        boxes_figure(space, networks, count - 1),
        heat_figure(space, networks[-1], frame[frame["network"] == networks[-1].id]),
    ):
        boxes = texts(figure)
        assert outside(figure, boxes) == []
        numbers = {text for text in boxes if text.get_fontsize() == 6}  # of neighbouring bars, which are as close
        assert overlapping({text: box for text, box in boxes.items() if text not in numbers}) == []


def test_bars_are_the_points_of_each_layer() -> None:
    space = SPACES["factorizenet"]
    networks = six(space)[3:5]
    figure = costs_figure(space, networks)
    rows = analysis_slots(space, networks)
    assert rows[:4] == [("input", False), ("conv_in", False), ("conv_64_1", False), ("conv_64_1", True)]
    labels = figure.axes[0].get_yticklabels()
    for axes, name in zip(figure.axes, ("cost", "gain"), strict=True):
        bars = [one for one in axes.containers if isinstance(one, BarContainer)]
        for one, drawn in zip(networks, bars, strict=True):
            widths = [bar.get_width() for bar in drawn]
            assert widths == pytest.approx([100 * getattr(layer.sensitivity, name) for layer in one.layers])
            names = [labels[round(bar.get_y() + bar.get_height() / 2)].get_text() for bar in drawn]
            assert [name.split(".")[0] for name in names[:2]] == ["input", "conv_in"]
    left = figure.axes[0]
    numbers = [text.get_text() for text in left.texts]
    assert numbers == [f"{100 * one.sensitivity.costliest.cost:.1f}" for one in networks]
    colours = {bars[0].get_facecolor() for bars in left.containers if isinstance(bars, BarContainer)}
    assert len(colours) == 2


def test_axes_of_boxes_are_those_of_all_networks() -> None:
    space = SPACES["factorizenet"]
    networks = six(space)
    limits = [[axes.get_ylim() for axes in boxes_figure(space, networks, index).axes] for index in (0, 5)]
    assert limits[0] == limits[1]
    widest = max(layer.range("folded") or 0 for one in networks for layer in one.layers)
    assert limits[0][1][1] > widest


COST, SQNR, GROWTH = STATISTICS[0], STATISTICS[10], STATISTICS[5]


def test_the_worse_the_darker() -> None:
    assert (COST.column, SQNR.column, GROWTH.column) == ("cost_points", "weight_sqnr_db", "fold_growth")
    values = [float(value) for value in range(11)]
    assert badness(values, replace(COST, column="sparsity")) == pytest.approx([0, *(n / 9 for n in range(10))])
    assert badness(values, SQNR) == pytest.approx([*(n / 9 for n in range(9, -1, -1)), 0])
    logs = badness([1.0] * 9 + [10.0, 100.0, math.nan], GROWTH)
    assert logs[:11] == pytest.approx([0] * 9 + [0.5, 1])
    assert math.isnan(logs[11])


def test_noise_stays_pale() -> None:
    assert badness([0.5, -0.5, 1.0], COST, noise=1.0) == [0.25, 0, 0.5]
    assert badness([0.5, -0.5, 10.0], COST, noise=1.0) == [0.05, 0, 1]


def test_columns_that_say_nothing_are_white() -> None:
    assert badness([2.0, 2.0, 2.0], SQNR) == [0, 0, 0]
    assert all(map(math.isnan, badness([math.nan] * 3, GROWTH)))
    neutral = Statistic("zeros", "sparsity", 0)
    assert all(map(math.isnan, badness([0.1, 0.5], neutral)))


def test_heat_map_has_the_numbers(tmp_path: Path) -> None:
    space = SPACES["factorizenet"]
    one = six(space)[4]
    frame = analysis_frame(RecordedRun(RunFolder(tmp_path), {}, space, Constraints()), [one])
    (axes,) = heat_figure(space, one, frame).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [layer.name for layer in one.layers]
    written = [text.get_text() for text in axes.texts]
    rows = len(one.layers)
    assert written[:rows] == [f"{100 * layer.sensitivity.cost:.1f}" for layer in one.layers]
    precisions = [statistic.column for statistic in STATISTICS].index("folded_precision")
    assert written[precisions * rows : (precisions + 1) * rows] == [
        "",
        *(f"{100 * stats.folded_precision:.0f}" for stats in one.evaluation.layers),
    ]


# The page


def test_page_and_table_are_written(tiny: tuple[RecordedRun, DataSet], analyses: tuple[NetworkAnalysis, ...]) -> None:
    opened, _ = tiny
    path = write_analysis(opened, analyses)
    assert path == opened.run.path / "analysis" / "analysis.html"
    assert sorted(file.name for file in path.parent.iterdir()) == ["analysis.html", "layers.csv"]
    frame = pd.read_csv(path.parent / "layers.csv", dtype={"network": str})
    pd.testing.assert_frame_equal(frame, analysis_frame(opened, analyses), check_dtype=False)
    html = path.read_text()
    assert html.count("<img ") == 1 + 2 + 2 * 3
    assert html.count("<details") == html.count("</details>") == 3
    assert "a &lt;study&gt;" in html
    assert "<study>" not in html
    for one in analyses:
        assert verdict(one) in html
        assert accuracies_text(one) in html


def drawn(figure: Figure, caption: str, alt: str) -> str:
    """Instead of a picture, which takes a second."""
    return f"<img {alt}>"


def test_page_of_one_network(
    tiny: tuple[RecordedRun, DataSet], analyses: tuple[NetworkAnalysis, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fnet_search.inspection.analysis_page.figure_html", drawn)
    html = write_analysis(tiny[0], analyses[:1]).read_text()
    assert f'<p class="verdict">{verdict(analyses[0])}</p>' in html
    assert html.count("<img ") == 1 + 2 + 2
    assert html.count("<tr class=best>") == 1


def test_page_escapes_names_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fnet_search.inspection.analysis_page.verdict", lambda one: "<b>it</b> costs most")
    odd = Macroarchitecture(
        "<odd & net>",
        (3, 6, 6),
        (
            Node("<b>one</b>", Conv(4, factorize=True), ("input",)),
            Node("act", Activation(), ("<b>one</b>",)),
            Node("gap", Pool("global_average"), ("act",)),
            Node("flat", Flatten(), ("gap",)),
            Node("$out_2$", Dense(3), ("flat",)),
        ),
    )
    opened, data = recorded(tmp_path, odd, (regular(odd), str(Scheme())))
    found = analyze(opened, opened.networks, data, 10)
    html = write_analysis(opened, found).read_text()
    assert "&lt;b&gt;one&lt;/b&gt;" in html
    assert html.count("&lt;b&gt;it&lt;/b&gt; costs most") == 2
    assert "<b>" not in html
    assert "<odd" not in html


def test_more_networks_than_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fnet_search.inspection.analysis_page.figure_html", drawn)
    plans = named_plans(TINY)
    networks = [synthetic(TINY, plan, name, seed) for seed, (name, plan) in enumerate(plans.items())]
    assert len(networks) > 6
    html = write_analysis(RecordedRun(RunFolder(tmp_path), {}, TINY, Constraints()), networks).read_text()
    assert f"show the first 6 of {len(networks)}" in html
    assert html.count("<details") == len(networks)


def test_images_are_as_many_as_there_are(tiny: tuple[RecordedRun, DataSet]) -> None:
    opened, data = tiny
    (one,) = analyze(opened, opened.networks[:1], data, 1000)
    assert one.sensitivity.images == IMAGES
    assert one.sensitivity.fp32_accuracy == pytest.approx(one.evaluation.fp32_accuracy, abs=1 / IMAGES)
    assert one.sensitivity.quint8_accuracy == one.evaluation.quint8_accuracy
