"""Latency beside MACs: times of a run's networks, measured by `timing`; as tables, as files, and in the report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from html import escape
from itertools import groupby
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fnet_search.arch.factorize import factorize
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan, label, legal_rates
from fnet_search.base.errors import FnetError
from fnet_search.base.files import write_text
from fnet_search.base.terminal import PlainTable
from fnet_search.base.units import counted, millions
from fnet_search.deploy.export import float_model, quantized_model
from fnet_search.deploy.latency import (
    FP32,
    OTHER,
    QUINT8,
    ROUNDS,
    THREADS,
    Latency,
    LayerLatency,
    TimedGraph,
    interleaved,
    layer_latencies,
    machine,
)
from fnet_search.report.html_page import NONE, cells, figure_html, head_row, html_table, plain_table
from fnet_search.report.layer_figures import slot_of
from fnet_search.report.plot_labels import PointLabel, place_labels
from fnet_search.report.style import COLOURS, GREY, MARKERS, heading, legend, new_figure, style
from fnet_search.rundir.recorded_run import RecordedNetwork, RecordedRun

NETWORKS, LAYERS = "latency.csv", "latency_layers.csv"
KEYS = ["network", "precision"]
BUSY = 0.9
"""Share of its time that a thread should run; below it, other processes disturbed the measurement."""

LatencyPair = tuple[Latency, Latency]
"""The latencies of a network in quint8 and in fp32."""


def latency_pairs(results: Sequence[Latency]) -> list[LatencyPair]:
    """The latencies grouped by network, in the given order. Both precisions of a network must be adjacent."""
    ordered = [
        tuple(sorted(group, key=lambda latency: latency.precision == FP32)) for _, group in groupby(results, _network)
    ]
    return [(quint8, fp32) for quint8, fp32 in ordered]


def _network(latency: Latency) -> str:
    return latency.network


# Measurement


def time_networks(
    opened: RecordedRun,
    networks: Sequence[RecordedNetwork],
    batch: int = 1,
    rounds: int = ROUNDS,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Latency, ...]:
    """Times networks, each once, on batches of noise. Returns the quint8 and the fp32 latency of each.

    Raises FnetError if the weights of a network are missing or broken, or if the runtime cannot run it.

    Args:
        batch: images in a batch.
        rounds: samples taken of each network and precision.
        seen: called with the number of samples taken and their total.
    """
    with TemporaryDirectory() as folder:
        subjects: list[tuple[RecordedNetwork, str, Macroarchitecture, TimedGraph]] = []
        for network in dict.fromkeys(networks):
            folded, quantized = network.load(opened.space)
            integer = quantized_model(quantized, weight_type=opened.run.weight_type)
            for precision, model in ((QUINT8, integer), (FP32, float_model(folded))):
                graph = TimedGraph(model, batch, Path(folder) / f"{len(subjects)}")
                subjects.append((network, precision, folded.network, graph))
        samples = interleaved([graph.sample for *_, graph in subjects], rounds, seen)
        quartiles = np.quantile(np.array(samples), (0.25, 0.5, 0.75), axis=1).T.tolist()
        return tuple(
            Latency(
                network=recorded.id,
                label=label(opened.space, recorded.evaluation.plan),
                precision=precision,
                conv_macs=recorded.evaluation.cost.conv_macs,
                total_macs=recorded.evaluation.cost.total_macs,
                batch=batch,
                threads=THREADS,
                rounds=rounds,
                lower_ms=lower,
                median_ms=middle,
                upper_ms=upper,
                cpu_share=min(1.0, graph.cpu / graph.wall),
                machine=machine(),
                onnxruntime=graph.version,
                layers=layer_latencies(network, graph.events(), TimedGraph.COUNTED),
            )
            for (recorded, precision, network, graph), (lower, middle, upper) in zip(subjects, quartiles, strict=True)
        )


# Files


def latency_frame(results: Sequence[Latency]) -> pd.DataFrame:
    """One row for each network and precision, one column for each field of `Latency` but `layers`."""
    columns = _columns(Latency)
    return pd.DataFrame([asdict(latency) for latency in results], columns=list(columns)).astype(columns)


def layer_latency_frame(results: Sequence[Latency]) -> pd.DataFrame:
    """One row for each network, precision and layer. ``share`` is the layer's fraction of the sum over all layers."""
    columns = {**dict.fromkeys(KEYS, "str"), **_columns(LayerLatency), "share": "float64"}
    rows = [
        {
            "network": latency.network,
            "precision": latency.precision,
            **asdict(layer),
            "share": layer.median_ms / _sum(latency),
        }
        for latency in results
        for layer in latency.layers
    ]
    return pd.DataFrame(rows, columns=list(columns)).astype(columns)


def _columns(kind: Any) -> dict[str, str]:
    types = {str: "str", int: "int64", float: "float64"}
    return {field.name: types[field.type] for field in fields(kind) if field.type in types}


def _sum(latency: Latency) -> float:
    return sum(layer.median_ms for layer in latency.layers)


def write_latencies(opened: RecordedRun, results: Sequence[Latency]) -> list[Path]:
    """Writes ``latency.csv`` and ``latency_layers.csv`` to the run folder; returns their paths.

    Earlier measurements are replaced, since only times of the same rounds can be compared.
    """
    frames = {NETWORKS: latency_frame(results), LAYERS: layer_latency_frame(results)}
    for name, frame in frames.items():
        write_text(opened.run.path / name, frame.to_csv(index=False, lineterminator="\n"))
    return [opened.run.path / name for name in frames]


def read_latencies(opened: RecordedRun) -> tuple[Latency, ...]:
    """The latencies that `write_latencies` wrote, of networks that the run still has; () if none were measured.

    Raises FnetError, naming the file, if one of the two is broken, or if the one of the layers is missing.
    """
    if not (opened.run.path / NETWORKS).is_file():
        return ()
    rows = _read(opened.run.path / NETWORKS, _columns(Latency))
    layers: dict[tuple[str, str], list[LayerLatency]] = {}
    for row in _read(opened.run.path / LAYERS, {**dict.fromkeys(KEYS, "str"), **_columns(LayerLatency)}):
        layers.setdefault((row.pop("network"), row.pop("precision")), []).append(LayerLatency(**row))
    ids = {network.id for network in opened.networks}
    return tuple(
        Latency(**row, layers=tuple(layers.get((row["network"], row["precision"]), ())))
        for row in rows
        if row["network"] in ids
    )


def _read(path: Path, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    try:
        frame = pd.read_csv(path, usecols=list(columns), dtype=str, keep_default_na=False).astype(columns)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not what fnet-search latency writes"
        raise FnetError(f"cannot read {path}: {reason}; measure again with fnet-search latency") from None
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


# Texts and tables

HEADINGS = ("network", "plan")
MEASURED = (
    "conv MMAC",
    "total MMAC",
    "quint8 ms",
    "quartiles ms",
    "GMAC/s",
    "fp32 ms",
    "quartiles ms",
    "GMAC/s",
    "fp32 / quint8",
)
LAYER_HEADINGS = ("layer", "kind")
LAYER_MEASURED = ("MMAC", "quint8 ms", "% of all", "MMAC/ms", "fp32 ms", "% of all", "MMAC/ms")
LEAST = ("GMAC/s", "MMAC/ms", "quartiles ms", "total MMAC", "kind", "% of all", "fp32 / quint8", "MMAC", "conv MMAC")
"""Columns to drop on a narrow terminal, the least important first."""


def conditions(results: Sequence[Latency]) -> str:
    """How and on what the networks were measured; with a warning if other processes used the processor."""
    latency = results[0]
    threads, images = counted(latency.threads, "thread"), f"a batch of {counted(latency.batch, 'image')}"
    text = (
        f"ONNX Runtime {latency.onnxruntime} on {latency.machine}; {threads}, {images}, "
        f"{latency.rounds} interleaved rounds"
    )
    share = min(latency.cpu_share for latency in results)
    if share < BUSY:
        text += f"; other processes took up to {100 * (1 - share):.0f} % of the time: measure again on an idle machine"
    return text


def _ms(value: float) -> str:
    return f"{value:,.1f}" if value >= 100 else f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def latency_row(pair: LatencyPair) -> tuple[list[str], list[str]]:
    """A network's row: the cells under `HEADINGS`, and those under `MEASURED`."""
    quint8, fp32 = pair
    times = [
        text
        for latency in pair
        for text in (
            _ms(latency.median_ms),
            f"{_ms(latency.lower_ms)} to {_ms(latency.upper_ms)}",
            f"{latency.macs_per_second / 1e9:.1f}",
        )
    ]
    macs = [millions(quint8.conv_macs), millions(quint8.total_macs)]
    return [quint8.network, quint8.label], [*macs, *times, f"{fp32.median_ms / quint8.median_ms:.2f}"]


def layer_rows(pair: LatencyPair, order: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """The rows of a network's layers, each as its cells under `LAYER_HEADINGS` and those under `LAYER_MEASURED`.

    The last two rows are the sum of the layers, and the network as it was timed whole.

    Args:
        order: names of the layers, in the order of the rows. Layers that were not timed are left out.
    """
    by_name = [{layer.layer: layer for layer in latency.layers} for latency in pair]
    rows = []
    for name in [name for name in [*order, OTHER] if any(name in layers for layers in by_name)]:
        timed = [layers.get(name) for layers in by_name]
        kinds = dict.fromkeys(layer.kind for layer in timed if layer)
        macs = max(layer.macs for layer in timed if layer)
        times = []
        for layer, latency in zip(timed, pair, strict=True):
            if layer is None:
                times += [NONE] * 3
                continue
            speed = f"{macs * latency.batch / 1e6 / layer.median_ms:,.1f}" if macs and layer.median_ms else NONE
            times += [_ms(layer.median_ms), f"{100 * layer.median_ms / _sum(latency):.1f}", speed]
        rows.append(([name, "; ".join(kinds)], [millions(macs) if macs else NONE, *times]))
    totals = [text for latency in pair for text in (_ms(_sum(latency)), "100.0", NONE)]
    whole = [
        text for latency in pair for text in (_ms(latency.median_ms), NONE, f"{latency.macs_per_second / 1e9:,.1f}")
    ]
    rows.append((["sum of the layers", ""], [NONE, *totals]))
    rows.append((["whole network", "timed on its own"], [millions(pair[0].total_macs), *whole]))
    return rows


def latency_table(results: Sequence[Latency]) -> PlainTable:
    """A table of the networks for the terminal."""
    rows = [[*words, *values] for words, values in map(latency_row, latency_pairs(results))]
    return PlainTable("latency: ms a run, median", (*HEADINGS, *MEASURED), rows, {"network": 12, "plan": 12}, LEAST)


def layers_table(opened: RecordedRun, pair: LatencyPair) -> PlainTable:
    """A table of one network's layers for the terminal."""
    title = f"layers of network {pair[0].network} ({pair[0].label}): ms a run, median"
    rows = [[*words, *values] for words, values in layer_rows(pair, _order(opened, pair[0].network))]
    return PlainTable(title, (*LAYER_HEADINGS, *LAYER_MEASURED), rows, {"layer": 20, "kind": 8}, LEAST)


def _order(opened: RecordedRun, network: str) -> list[str]:
    return [node.name for node in factorize(opened.space, _plans(opened)[network]).order]


def _plans(opened: RecordedRun) -> dict[str, FactorizationPlan]:
    return {network.id: network.evaluation.plan for network in opened.networks}


# The report


def latency_figure(space: str, results: Sequence[Latency]) -> Figure:
    """Milliseconds a run against conv MACs, in both precisions, with quartiles.

    A line shows where the times would be if they were proportional to the MACs, starting from the network with the
    most.
    """
    measured = latency_pairs(results)
    figure = new_figure(4.2)
    heading(figure, f"Latency against MACs: {space}, a batch of {results[0].batch}")
    axes = figure.add_subplot()
    style(axes)
    axes.set_xlabel("multiply-accumulates in convolutions (MMAC)", fontsize=9)
    axes.set_ylabel("latency, one thread (ms)", fontsize=9)
    macs = [quint8.conv_macs / 1e6 for quint8, _ in measured]
    times = [[latency.median_ms for latency in reversed(pair)] for pair in measured]
    axes.vlines(macs, list(map(min, times)), list(map(max, times)), color="#bbbbbb", linewidth=1)
    for index, name in enumerate(("fp32", "quint8")):
        series = [pair[1 - index] for pair in measured]
        lower, upper = [latency.lower_ms for latency in series], [latency.upper_ms for latency in series]
        axes.vlines(macs, lower, upper, color=COLOURS[index])
        medians = [latency.median_ms for latency in series]
        axes.plot(macs, medians, MARKERS[index], color=COLOURS[index], markersize=5, label=name)
    most = max((quint8 for quint8, _ in measured), key=lambda latency: latency.conv_macs)
    line = [0, most.conv_macs / 1e6], [0, most.median_ms]
    axes.plot(*line, color=GREY, linestyle="-.", linewidth=1, label="quint8, if it followed the MACs")
    axes.margins(x=0.08, y=0.1)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    legend(axes)
    labels = []
    for (quint8, _), x, ys in zip(measured, macs, times, strict=True):
        name = quint8.label if len(quint8.label) <= 24 else f"#{quint8.network}"
        labels.append(PointLabel(tuple(dict.fromkeys([name, f"#{quint8.network}"])), x, ys))
    place_labels(axes, labels)
    return figure


def block_latencies(opened: RecordedRun, results: Sequence[Latency]) -> dict[str, dict[int, tuple[float, int]]]:
    """For each factorizable layer and rate that was timed: milliseconds in quint8 and MACs.

    Both are those of the convolution, or of the grouped and the pointwise one together. If several networks have the
    rate, the time is their median.
    """
    plans = _plans(opened)
    timed: dict[str, dict[int, list[tuple[float, int]]]] = {layer: {} for layer in legal_rates(opened.space)}
    for quint8, _ in latency_pairs(results):
        plan = plans[quint8.network]
        for layer, rate in plan.rates:
            parts = [part for part in quint8.layers if slot_of(plan, part.layer)[0] == layer]
            cost = sum(part.median_ms for part in parts), sum(part.macs for part in parts)
            timed[layer].setdefault(rate, []).append(cost)
    return {
        layer: {rate: (median(ms for ms, _ in costs[rate]), costs[rate][0][1]) for rate in sorted(costs)}
        for layer, costs in timed.items()
    }


def _blocks(opened: RecordedRun, results: Sequence[Latency]) -> str:
    """The table of layers by rate, empty if only one rate was timed."""
    by_layer = block_latencies(opened, results)
    rates = sorted({rate for by_rate in by_layer.values() for rate in by_rate})
    if len(rates) < 2:
        return ""
    rows = []
    for layer, by_rate in by_layer.items():
        columns = []
        for rate in rates:
            if rate not in by_rate:
                columns.append(f'<td class="number">{NONE}</td>')
                continue
            (ms, macs), (regular_ms, regular_macs) = by_rate[rate], by_rate.get(1, (0.0, 0))
            text = f"<strong>{_ms(ms)}</strong>" if regular_ms and ms >= regular_ms and rate > 1 else _ms(ms)
            share = (
                f"{100 * ms / regular_ms:.0f} % | {100 * macs / regular_macs:.0f} %" if regular_ms and rate > 1 else ""
            )
            columns.append(f'<td class="number">{text}<span class="reason">{share}</span></td>')
        rows.append(f"<tr>{cells([layer], numbers=False)}{''.join(columns)}</tr>")
    note = (
        "The time of a factorized layer is that of its grouped and its pointwise convolution together; below it are "
        "its shares of the regular convolution's time | MACs. Bold: no faster than the regular convolution."
    )
    table = html_table(head_row(["layer, quint8 ms at rate"], map(str, rates)), rows)
    return f'<h3>Layers by rate</h3><p class="soft">{note}</p>{table}'


def latency_section(opened: RecordedRun) -> Sequence[tuple[str, str]]:
    """The report's section of latencies of networks and layers beside their MACs; empty if none were measured."""
    try:
        results = read_latencies(opened)
    except FnetError as error:  # the report of a run does not depend on this
        return [("Latency", f'<p class="soft">{escape(str(error))}</p>')]
    if not results:
        return ()
    measured = latency_pairs(results)
    winner = opened.winner
    html = f'<p class="soft">{escape(conditions(results))}; ms a run, median and quartiles.</p>'
    html += plain_table(HEADINGS, MEASURED, [latency_row(pair) for pair in measured], winner.id if winner else None)
    if len(measured) > 1:
        caption = (
            "Low is good. The further a network lies above the dashed line, the less its saved MACs save time. "
            "Vertical lines in the markers' colours are the quartiles, where they are visible."
        )
        html += figure_html(latency_figure(opened.space.name, results), caption, "latency against MACs")
    html += _blocks(opened, results)
    for pair in measured:
        name = escape(f"Layers of network {pair[0].network} ({pair[0].label})")
        rows = layer_rows(pair, _order(opened, pair[0].network))
        html += f"<details><summary>{name}</summary>{plain_table(LAYER_HEADINGS, LAYER_MEASURED, rows)}</details>"
    return [("Latency", html)]
