import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from rich.table import Table

from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Conv, Dense
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import named_plans
from fnet_search.arch.space_file import parse_space, to_toml
from fnet_search.base.errors import FnetError
from fnet_search.candidates.measure import evaluate_quantized
from fnet_search.candidates.network_files import QUANTIZED, WEIGHTS
from fnet_search.deploy.latency import OTHER, Latency, LayerLatency
from fnet_search.importing.spaces import load_space
from fnet_search.inspection.latency_report import (
    block_latencies,
    conditions,
    latency_figure,
    latency_frame,
    latency_pairs,
    latency_row,
    latency_section,
    latency_table,
    layer_latency_frame,
    layer_rows,
    layers_table,
    read_latencies,
    time_networks,
    write_latencies,
)
from fnet_search.quant.calibration import quantize_trained
from fnet_search.quant.scheme import Scheme, parse_scheme
from fnet_search.rundir.recorded_run import RecordedRun, open_run
from fnet_search.rundir.run_folder import RunFolder, scheme_folder
from fnet_search.training.weights import write_tensors
from tests.support.evaluations import trained
from tests.support.html import Page
from tests.support.networks import noise, randomized

ODD = parse_space(to_toml(load_space("tiny")).replace("conv_in", "conv <in> & 'out'"), "odd")
PLANS = ("regular", "f4")


def record_run(folder: Path, space: Macroarchitecture, plans: Sequence[str]) -> RecordedRun:
    """A run of untrained networks, given plans; the first one quantized otherwise too."""
    data = noise(space, 12)
    run = RunFolder(folder)
    run.path.mkdir()
    facts = {"fingerprint": data.fingerprint(), "classes": list(data.classes), "mean": data.mean, "std": data.std}
    limits = {"conv_macs": None, "params": None, "min_quint8": None, "max_drop": None}
    texts = {"dataset": "digits", "policy": "fixed plans", "scheme": "minmax", "split": "test"}
    more = {"recipe": {}, "constraints": limits, "data": facts, "numerics": {"device": "cpu"}, "seed": 0}
    run.write_config({"space": to_toml(space), **texts, **more})
    for number, name in enumerate(plans):
        plan = named_plans(space)[name]
        network = randomized(factorize(space, plan), number)
        candidate = run.candidate(number)
        write_tensors(candidate / WEIGHTS, network.state_dict(), {"plan": str(plan)})
        schemes = [Scheme(parse_scheme("minmax").ranges), *([parse_scheme("mse+equalize")] if number == 0 else [])]
        for scheme in schemes:
            target = candidate if scheme == schemes[0] else scheme_folder(candidate, str(scheme))
            evaluation = replace(trained(space, plan, number, 0.9, 0.8, layers=False), split="test")
            found = evaluate_quantized(evaluation, network, quantize_trained(network, scheme, data, 0), data, 0, target)
            run.write_candidate(found, target)
    return open_run(folder)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    return record_run(tmp_path_factory.mktemp("latency") / "run", ODD, PLANS)


def made_up(opened: RecordedRun) -> tuple[Latency, ...]:
    """Results of the regular and the f4 network, by hand."""
    results = []
    for number, name in enumerate(PLANS):
        plan = named_plans(opened.space)[name]
        network = factorize(opened.space, plan)
        weighted = [node for node in network.order if isinstance(node.layer, Conv | Dense)]
        for precision, speed in (("quint8", 1.0), ("fp32", 2.0)):
            layers = [
                LayerLatency(node.name, node.layer.kind, 1000 * place, speed * place / 64)
                for place, node in enumerate(weighted, 1)
            ]
            if precision == "fp32":
                layers.insert(1, LayerLatency("pool_1", "pool", 0, 0.0))
            layers.append(LayerLatency(OTHER, "Transpose", 0, 0.25))
            whole = speed * (1 + number)
            results.append(
                Latency(
                    network=str(number),
                    label=name,
                    precision=precision,
                    conv_macs=40_000_000 // (1 + number),
                    total_macs=50_000_000 // (1 + number),
                    batch=2,
                    threads=1,
                    rounds=7,
                    lower_ms=whole - 0.125,
                    median_ms=whole,
                    upper_ms=whole + 1 / 3,
                    cpu_share=0.98,
                    machine="<i>CPU</i> & co",
                    onnxruntime="1.2.3",
                    layers=tuple(layers),
                )
            )
    return tuple(results)


# Measured


def test_networks_are_timed_in_both_precisions_and_kept(opened: RecordedRun) -> None:
    progress: list[tuple[int, int]] = []
    networks = opened.find(["0", "0/mse+equalize", "1"])
    results = time_networks(opened, [*networks, networks[0]], 2, 3, lambda done, total: progress.append((done, total)))
    assert progress == [(done, 18) for done in range(1, 19)]
    ids = ["0", "0/mse+equalize", "1"]
    assert [(one.network, one.precision) for one in results] == [(i, p) for i in ids for p in ("quint8", "fp32")]
    assert [one.label for one in results] == ["regular"] * 4 + ["f4"] * 2
    for one, network in zip(results, [one for one in networks for _ in range(2)], strict=True):
        assert 0 < one.lower_ms <= one.median_ms <= one.upper_ms
        assert 0 < one.cpu_share <= 1
        assert (one.batch, one.threads, one.rounds) == (2, 1, 3)
        assert one.machine
        assert re.fullmatch(r"\d+\.\d+.*", one.onnxruntime)
        cost = network.evaluation.cost
        assert (one.conv_macs, one.total_macs) == (cost.conv_macs, cost.total_macs)
        assert sum(layer.macs for layer in one.layers) == cost.total_macs
        structure = factorize(opened.space, network.evaluation.plan)
        weighted = [node.name for node in structure.order if isinstance(node.layer, Conv | Dense)]
        assert [layer.layer for layer in one.layers if layer.macs] == weighted
        assert all(layer.median_ms > 0 for layer in one.layers if layer.macs)
    write_latencies(opened, results)
    assert read_latencies(opened) == results
    assert len(latency_section(opened)) == 1


def test_a_network_without_weights_is_an_error(tmp_path: Path) -> None:
    opened = record_run(tmp_path / "run", ODD, PLANS[:1])
    (network,) = opened.find(["0"])
    (network.folder / QUANTIZED).unlink()
    with pytest.raises(FnetError, match=QUANTIZED):
        time_networks(opened, [network], rounds=1)


# Files


def test_files_give_back_what_was_written(opened: RecordedRun) -> None:
    results = made_up(opened)
    paths = write_latencies(opened, results)
    assert [path.name for path in paths] == ["latency.csv", "latency_layers.csv"]
    assert [path.parent for path in paths] == [opened.run.path] * 2
    assert read_latencies(opened) == results
    heads = [path.read_text(encoding="utf-8").splitlines()[0] for path in paths]
    assert heads == [
        "network,label,precision,conv_macs,total_macs,batch,threads,rounds,lower_ms,median_ms,upper_ms,cpu_share,"
        "machine,onnxruntime",
        "network,precision,layer,kind,macs,median_ms,share",
    ]
    words = tuple(replace(one, label="NA", machine="null", median_ms=0.1 + 0.2) for one in results[:2])
    write_latencies(opened, words)
    assert read_latencies(opened) == words


def test_frames_have_a_row_for_each_and_shares_that_add_up(opened: RecordedRun) -> None:
    results = made_up(opened)
    frame, layers = latency_frame(results), layer_latency_frame(results)
    assert frame.to_dict("records") == [
        {key: value for key, value in asdict(one).items() if key != "layers"} for one in results
    ]
    assert len(layers) == sum(len(one.layers) for one in results)
    assert layers.groupby(["network", "precision"])["share"].sum().tolist() == pytest.approx([1.0] * 4)
    first = layers.iloc[0]
    assert first["share"] == pytest.approx(results[0].layers[0].median_ms / sum(x.median_ms for x in results[0].layers))
    assert list(latency_frame(()).columns) == list(frame.columns)


def test_networks_that_are_gone_are_left_out(opened: RecordedRun) -> None:
    results = made_up(opened)
    write_latencies(opened, [*results, *(replace(one, network="9") for one in results[2:])])
    assert read_latencies(opened) == results


@pytest.mark.parametrize("name", ["latency.csv", "latency_layers.csv"])
@pytest.mark.parametrize("text", ["", "nonsense\n1\n", "\xff\x00", None])
def test_broken_files_are_named(opened: RecordedRun, name: str, text: str | None) -> None:
    write_latencies(opened, made_up(opened))
    path = opened.run.path / name
    if text is not None:
        path.write_text(text, encoding="latin-1")
    elif name == "latency.csv":
        frame = pd.read_csv(path, dtype=str)
        frame["median_ms"] = "fast"
        frame.to_csv(path, index=False)
    else:
        path.unlink()
    with pytest.raises(FnetError, match=rf"^cannot read .*{name}: .+; measure again with fnet-search latency$"):
        read_latencies(opened)


# Shown


def test_numbers_of_a_network(opened: RecordedRun) -> None:
    texts, numbers = latency_row(latency_pairs(made_up(opened))[1])
    assert texts == ["1", "f4"]
    speeds = ["25.0", "12.5"]  # 25 MMAC x 2 images in 2 and in 4 ms
    assert numbers == [
        *("20.0", "25.0"),
        *("2.000", "1.875 to 2.333", speeds[0]),
        *("4.000", "3.875 to 4.333", speeds[1]),
        "2.00",
    ]


def test_pairs_do_not_depend_on_which_precision_is_first(opened: RecordedRun) -> None:
    results = made_up(opened)
    assert latency_pairs(results) == latency_pairs([results[1], results[0], *results[2:]])
    assert [(a.precision, b.precision) for a, b in latency_pairs(results)] == [("quint8", "fp32")] * 2


def test_layers_line_up_and_add_up(opened: RecordedRun) -> None:
    regular = latency_pairs(made_up(opened))[0]
    order = [node.name for node in opened.space.order]
    rows = layer_rows(regular, order)
    assert [words[0] for words, _ in rows] == [
        "conv <in> & 'out'",
        "pool_1",
        "conv_8",
        "conv_16_1",
        "conv_16_2",
        "dense_out",
        OTHER,
        "sum of the layers",
        "whole network",
    ]
    sums = 15 / 64 + 0.25, 30 / 64 + 0.25
    shares = [100 * 2 / 64 / sums[0], 100 * 4 / 64 / sums[1]]
    speed = 2000 * 2 / 1e6 / (2 / 64), 2000 * 2 / 1e6 / (4 / 64)
    assert rows[2] == (
        ["conv_8", "conv"],
        ["0.002", "0.031", f"{shares[0]:.1f}", f"{speed[0]:.1f}", "0.062", f"{shares[1]:.1f}", f"{speed[1]:.1f}"],
    )
    assert rows[1] == (["pool_1", "pool"], ["-", "-", "-", "-", "0.000", "0.0", "-"])
    assert rows[-2][1] == ["-", "0.484", "100.0", "-", "0.719", "100.0", "-"]
    assert rows[-1][1] == ["50.0", "1.000", "-", "100.0", "2.000", "-", "50.0"]


def test_blocks_by_rate_count_both_parts(opened: RecordedRun) -> None:
    results = made_up(opened)
    found = block_latencies(opened, results)
    assert list(found) == ["conv_8", "conv_16_1", "conv_16_2"]
    assert found["conv_8"] == {1: (2 / 64, 2000), 4: ((2 + 3) / 64, 5000)}
    assert found["conv_16_2"] == {1: (4 / 64, 4000), 4: ((6 + 7) / 64, 13_000)}
    slower = tuple(
        replace(one, network="0/mse+equalize", layers=tuple(replace(x, median_ms=9 * x.median_ms) for x in one.layers))
        for one in results[:2]
    )
    assert block_latencies(opened, [*results, *slower])["conv_8"][1] == (pytest.approx(5 * 2 / 64), 2000)


def shown(table: Table) -> str:
    console = Console(width=200, record=True, file=StringIO())
    console.print(table)
    return console.export_text()


def test_tables_for_the_terminal(opened: RecordedRun) -> None:
    results = made_up(opened)
    assert "│ 1       │ f4      │      20.0 │       25.0 │     2.000 │ 1.875 to 2.333 │" in shown(
        latency_table(results)
    )
    odd = tuple(replace(one, label="[red]1-2[/red]") for one in results)
    assert "[red]1-2[/red]" in shown(latency_table(odd))
    layers = shown(layers_table(opened, latency_pairs(odd)[1]))
    assert layers.splitlines()[0].strip() == "layers of network 1 ([red]1-2[/red]): ms a run, median"
    assert [layers.index(name) for name in ("conv_8.grouped", "conv_8.pointwise", OTHER, "whole network")] == sorted(
        layers.index(name) for name in ("conv_8.grouped", "conv_8.pointwise", OTHER, "whole network")
    )


def test_conditions_warn_of_a_busy_machine(opened: RecordedRun) -> None:
    results = made_up(opened)
    said = "ONNX Runtime 1.2.3 on <i>CPU</i> & co; 1 thread, a batch of 2 images, 7 interleaved rounds"
    assert conditions(results) == said
    busy = [*results[:-1], replace(results[-1], cpu_share=0.55)]
    assert conditions(busy) == f"{said}; other processes took up to 45 % of the time: measure again on an idle machine"
    assert "a batch of 1 image," in conditions([replace(one, batch=1) for one in results])


def test_the_figure_has_every_network_in_both_precisions(opened: RecordedRun) -> None:
    results = made_up(opened)
    figure = latency_figure("my space", [*results, *(replace(one, network="7", label="x" * 30) for one in results[:2])])
    axes = figure.axes[0]
    lines = {str(line.get_label()): line for line in axes.lines}
    assert list(lines["quint8"].get_xdata()) == [40, 20, 40]
    assert list(lines["quint8"].get_ydata()) == [1, 2, 1]
    assert list(lines["fp32"].get_ydata()) == [2, 4, 2]
    ideal = lines["quint8, if it followed the MACs"]
    assert (list(ideal.get_xdata()), list(ideal.get_ydata())) == ([0, 40], [0, 1])
    assert {"regular", "f4"} <= {text.get_text() for text in axes.texts} <= {"regular", "f4", "#7"}
    assert (axes.get_xlim()[0], axes.get_ylim()[0]) == (0, 0)
    assert "MMAC" in axes.get_xlabel()
    assert "ms" in axes.get_ylabel()


def test_the_section_shows_networks_blocks_and_layers(opened: RecordedRun) -> None:
    results = made_up(opened)
    write_latencies(opened, results)
    ((head, html),) = latency_section(opened)
    page = Page(html)
    assert head == "Latency"
    assert html.count("<img ") == 1
    assert html.count("<details>") == 2
    assert "<i>" not in html
    assert "<in>" not in html
    assert "<i>CPU</i> & co" in page.text
    assert "conv <in> & 'out'" in page.text
    for text in ("conv MMAC", "quint8 ms", "fp32 ms", "GMAC/s", "MMAC/ms", "1.875 to 2.333", "whole network"):
        assert text in page.text
    assert "<strong>0.078</strong>" in html  # conv_8: 5/64 ms instead of 2/64, though this is f4
    assert "250 % | 250 %" in page.text
    assert "<strong>0.031" not in html
    write_latencies(opened, results[:2])
    ((_, alone),) = latency_section(opened)
    assert "<img " not in alone
    assert "<h3>" not in alone


def test_there_is_no_section_where_nothing_was_measured(tmp_path: Path) -> None:
    opened = record_run(tmp_path / "run", ODD, PLANS[:1])
    assert latency_section(opened) == ()
    assert read_latencies(opened) == ()
