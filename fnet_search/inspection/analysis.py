"""Where a run's networks lose accuracy to 8 bits, layer by layer: measured again, as a data frame and as a table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import pandas as pd
import torch
from rich.table import Table
from rich.text import Text

from fnet_search.arch.layers import Weighted
from fnet_search.arch.macroarchitecture import INPUT
from fnet_search.arch.plan import label
from fnet_search.base.terminal import fitting
from fnet_search.base.units import millions
from fnet_search.policy.evaluation import Evaluation, LayerStats
from fnet_search.quant.calibration import CALIBRATION_SAMPLES, calibration_batches
from fnet_search.quant.fold import FoldedNetwork
from fnet_search.quant.layer_statistics import channel_extremes, channel_precision
from fnet_search.quant.ranges import TensorStats, calibrate
from fnet_search.quant.scheme import MINMAX
from fnet_search.quant.sensitivity import PartSensitivity, Sensitivity, sensitivity, stratified_sample
from fnet_search.quant.simulator import QuantizedNetwork
from fnet_search.report.style import plan_name
from fnet_search.rundir.recorded_run import RecordedNetwork, RecordedRun
from fnet_search.training.datasets import DataSet
from fnet_search.training.network import Network

IMAGES = 1_000
"""Default number of the split's images on which partly quantized networks are measured."""

# The measurements of a network


TENSORS = ("weight", "folded", "activation")
"""A layer's raw weights, folded weights and clipped activations: the prefixes of the fields of `LayerStats`."""


@dataclass(frozen=True)
class LayerAnalysis:
    """A convolution or dense layer, or a quantized tensor that belongs to none: the input, a sum, a pool's output."""

    statistics: Mapping[str, Any]
    """The fields of `LayerStats` by name; None for those that do not apply, such as weights of a sum."""
    channels: Mapping[str, tuple[float, ...]]
    """For each of `TENSORS`: max - min of every output channel; () if the layer has no such tensor."""
    sensitivity: PartSensitivity

    @property
    def name(self) -> str:
        return self.sensitivity.layer

    def range(self, tensor: str) -> float | None:
        """max - min of one of `TENSORS`; None if the layer has no such tensor."""
        low, high = (self.statistics[f"{tensor}_{end}"] for end in ("min", "max"))
        return None if low is None or high is None else float(high - low)

    @property
    def fold_growth(self) -> float | None:
        """Range of the folded weights divided by that of the raw ones; None if the layer has no weights."""
        raw, folded = self.range("weight"), self.range("folded")
        return folded / raw if raw and folded is not None else None


@dataclass(frozen=True)
class NetworkAnalysis:
    """The analysis of one network."""

    id: str
    """`RecordedNetwork.id`, the name that commands take."""
    name: str
    """A short name for figures, unique among the networks that are analysed together."""
    evaluation: Evaluation
    sensitivity: Sensitivity
    layers: tuple[LayerAnalysis, ...]
    """In network order."""

    @property
    def costliest(self) -> LayerAnalysis:
        """The layer of `Sensitivity.costliest`."""
        return next(layer for layer in self.layers if layer.sensitivity is self.sensitivity.costliest)


def analyze(
    opened: RecordedRun,
    networks: Sequence[RecordedNetwork],
    data: DataSet,
    images: int = IMAGES,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[NetworkAnalysis, ...]:
    """Analyses networks of a run, each once.

    The networks are those that were evaluated, with the same codes and ranges. Only the extremes of the activations'
    channels are computed again, on the calibration images. Raises FnetError if weights or codes are missing or broken.

    Args:
        images: the most images of the run's split to measure on.
        seen: called with the number of images that are done and their total, over all networks.
    """
    networks, sample = list(dict.fromkeys(networks)), stratified_sample(data.evaluation, images)
    analyses = []
    for number, (network, name) in enumerate(zip(networks, _names(opened, networks), strict=True)):
        before, total = number * len(sample), len(networks) * len(sample)
        trained = network.load_trained(opened.space)
        folded, quantized = network.load(opened.space)
        batches = calibration_batches(data, opened.config["seed"], CALIBRATION_SAMPLES)
        stats = calibrate(folded, batches, MINMAX)  # only for extremes and zeros, which are the same for every method

        def on_images(done: int, _: int, before: int = before, total: int = total) -> None:
            seen(before + done, total)

        costs = sensitivity(folded, quantized, data, sample, on_images)
        layers = tuple(_layer(part, network.evaluation, trained, folded, quantized, stats) for part in costs.parts)
        analyses.append(NetworkAnalysis(network.id, name, network.evaluation, costs, layers))
    return tuple(analyses)


def _names(opened: RecordedRun, networks: Sequence[RecordedNetwork]) -> list[str]:
    """Names of the networks for figures: those of their plans, followed by the id where two would be the same."""
    names = [plan_name(opened.space, network.evaluation) for network in networks]
    return [
        name if names.count(name) == 1 else f"{name} ({network.id})"
        for name, network in zip(names, networks, strict=True)
    ]


def _layer(
    part: PartSensitivity,
    evaluation: Evaluation,
    trained: Network,
    folded: FoldedNetwork,
    quantized: QuantizedNetwork,
    stats: Mapping[str, TensorStats],
) -> LayerAnalysis:
    recorded = {layer.layer: asdict(layer) for layer in evaluation.layers}
    carrier = quantized.carrier[part.layer]
    layer = None if part.layer == INPUT else trained.network.by_name[part.layer].layer
    if part.layer in recorded:
        statistics = recorded[part.layer]
        low, high = statistics["activation_min"], statistics["activation_max"]
    else:
        low, high = quantized.params[carrier].dequantize(torch.tensor([0, 255])).tolist()
    tensor = stats[carrier]
    channels = {"activation": (tensor.channel_min.clamp(low, high), tensor.channel_max.clamp(low, high))}
    if part.layer in folded.weight:
        channels["folded"] = channel_extremes(folded.weight[part.layer])
    if isinstance(layer, Weighted):
        channels["weight"] = channel_extremes(trained.layer(part.layer).get_parameter("weight").detach())
    if part.layer not in recorded:  # one with weights is a BatchNorm of its own, folded into a depthwise convolution
        statistics = dict.fromkeys(field.name for field in fields(LayerStats))
        statistics |= {"layer": part.layer, "kind": layer.kind if layer else INPUT, "sparsity": tensor.sparsity}
        for name, ends in channels.items():
            precision, dead = channel_precision(*ends)
            statistics |= {f"{name}_min": float(ends[0].min()), f"{name}_max": float(ends[1].max())}
            statistics |= {f"{name}_precision": precision}
            statistics |= {"dead_activation_channels": dead} if name == "activation" else {}
    ranges = {name: tuple((high - low).tolist()) for name, (low, high) in channels.items()}
    return LayerAnalysis(statistics, {name: ranges.get(name, ()) for name in TENSORS}, part)


# The frame

COLUMNS = {
    "network": "str",
    "label": "str",
    "scheme": "str",
    "split": "str",
    "images": "int64",
    "layer": "str",
    "kind": "str",
    "macs": "Int64",
    "params": "Int64",
    **{
        field.name: "Int64" if field.name.startswith("dead_") else "float64"
        for field in fields(LayerStats)
        if field.name not in ("layer", "kind", "macs", "params")
    },
    **{f"{name}_range": "float64" for name in TENSORS},
    "fold_growth": "float64",
    "fp32_accuracy": "float64",
    "fake_accuracy": "float64",
    "quint8_accuracy": "float64",
    "only_accuracy": "float64",
    "all_but_accuracy": "float64",
    "cost_points": "float64",
    "cost_error_points": "float64",
    "gain_points": "float64",
    "gain_error_points": "float64",
    "only_kl": "float64",
}


def analysis_frame(opened: RecordedRun, analyses: Iterable[NetworkAnalysis]) -> pd.DataFrame:
    """One row for each network and layer, with `COLUMNS`; NaN where a value does not apply.

    Accuracies are fractions of 1, on ``images`` images. ``cost_points`` is the accuracy lost when only this layer is
    quantized, ``gain_points`` the accuracy regained when only this layer is left in float, both in percentage points;
    their errors are standard errors.
    """
    rows = []
    for analysis in analyses:
        costs = analysis.sensitivity
        network = {
            "network": analysis.id,
            "label": label(opened.space, analysis.evaluation.plan),
            "scheme": analysis.evaluation.scheme,
            "split": analysis.evaluation.split,
            "images": costs.images,
            **{name: getattr(costs, name) for name in ("fp32_accuracy", "fake_accuracy", "quint8_accuracy")},
        }
        for layer in analysis.layers:
            part = layer.sensitivity
            values = {
                **network,
                **layer.statistics,
                **{f"{name}_range": layer.range(name) for name in TENSORS},
                "fold_growth": layer.fold_growth,
                **{name: getattr(part, name) for name in ("only_accuracy", "all_but_accuracy", "only_kl")},
                **{
                    f"{name}_points": 100 * getattr(part, name) for name in ("cost", "cost_error", "gain", "gain_error")
                },
            }
            rows.append([values[name] for name in COLUMNS])
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


# Texts


def points(value: float, error: float) -> str:
    """A difference of accuracies and its standard error, both fractions of 1, as ``1.9 ± 0.4 points``."""
    return f"{100 * value:.1f} ± {100 * error:.1f} points"


def accuracies_text(analysis: NetworkAnalysis) -> str:
    """The network's accuracies on the images of the analysis, as text."""
    costs = analysis.sensitivity
    return (
        f"fp32 {100 * costs.fp32_accuracy:.1f} %, quint8 {100 * costs.fake_accuracy:.1f} % "
        f"(integer network {100 * costs.quint8_accuracy:.1f} %) on {costs.images:,} {analysis.evaluation.split} images"
    )


def verdict(analysis: NetworkAnalysis) -> str:
    """Says in one or two sentences which layer costs the accuracy.

    A drop of the network below two standard errors counts as noise. For a single layer the threshold is three, since it
    is the largest of some twenty.
    """
    costs, worst, best = analysis.sensitivity, analysis.sensitivity.costliest, analysis.sensitivity.most_gained
    clear = worst.cost > 3 * worst.cost_error
    alone = f"{points(worst.cost, worst.cost_error)} when only it is quantized"
    if costs.drop <= 2 * costs.drop_error:
        text = f"quint8 costs nothing measurable on {costs.images:,} images: {points(costs.drop, costs.drop_error)}."
        return f"{text} {worst.layer} costs most by itself: {alone}." if clear else text
    text = f"quint8 costs {points(costs.drop, costs.drop_error)}. "
    if not clear:
        farthest = max(costs.parts, key=lambda part: part.only_kl).layer
        text += f"No layer stands out by itself: {worst.layer}, the costliest, loses {alone}, which may be noise "
        text += f"(by KL divergence, which is less noisy, {farthest} costs most)"
    else:
        text += f"{worst.layer} costs most: {alone}"
    if best is worst:
        return f"{text}; left in float it gives back {points(worst.gain, worst.gain_error)}."
    if best.gain <= 3 * best.gain_error:
        return f"{text}; no layer left in float gives back more than the noise."
    return (
        f"{text}; left in float it gives back {points(worst.gain, worst.gain_error)}, "
        f"{best.layer} {points(best.gain, best.gain_error)}."
    )


# On the terminal


def analysis_table(analysis: NetworkAnalysis, width: int = 120) -> Table:
    """A table of the network's layers for the terminal, with the costliest one marked. Accuracies are in percent.

    Args:
        width: characters of the terminal. Columns that do not fit are left out, the last ones first; long names of
            layers are folded.
    """
    columns = {
        "layer": [f"{layer.name}{' <' if layer is analysis.costliest else ''}" for layer in analysis.layers],
        "kind": [layer.statistics["kind"] for layer in analysis.layers],
        "only it\nquint8 %": [f"{100 * layer.sensitivity.only_accuracy:.1f}" for layer in analysis.layers],
        "all but\nit %": [f"{100 * layer.sensitivity.all_but_accuracy:.1f}" for layer in analysis.layers],
        "weight\nrange": [_form(layer.range("weight")) for layer in analysis.layers],
        "folded\nrange": [_form(layer.range("folded")) for layer in analysis.layers],
        "growth\nx": [_form(layer.fold_growth, ".2f") for layer in analysis.layers],
        "activ.\nrange": [_form(layer.range("activation")) for layer in analysis.layers],
        "precision %\nraw/fold/act": _joined(analysis, [f"{name}_precision" for name in TENSORS], 100),
        "SQNR dB\nw/act/accum": _joined(analysis, ("weight_sqnr_db", "activation_sqnr_db", "accumulated_sqnr_db")),
        "zero\n%": _joined(analysis, ("sparsity",), 100),
        "dead\nw/act": _joined(analysis, ("dead_weight_channels", "dead_activation_channels")),
        "MMAC": [
            "-" if layer.statistics["macs"] is None else millions(layer.statistics["macs"]) for layer in analysis.layers
        ],
    }
    names, rows = list(columns), list(zip(*columns.values(), strict=True))
    places = fitting(names, rows, width, {"layer": 24}, reversed(names[1:]), between=1, around=0)
    table = Table(
        title=Text(
            f"{analysis.id}: {analysis.name}, quantized with {analysis.evaluation.scheme}; {accuracies_text(analysis)}"
        ),
        title_justify="left",
        caption=Text(f"< {verdict(analysis)}"),
        caption_justify="left",
        padding=(0, 1, 0, 0),
        box=None,
    )
    for name in (names[place] for place in places):
        is_text, folded = name in ("layer", "kind"), name == "layer"
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not folded, overflow="fold")
    for layer, row in zip(analysis.layers, rows, strict=True):
        cells = (Text(row[place]) for place in places)
        table.add_row(*cells, style="bold red" if layer is analysis.costliest else "")
    return table


def _form(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else f"{value:{form}}"


def _joined(analysis: NetworkAnalysis, names: Sequence[str], scale: float = 1.0) -> list[str]:
    """For each layer the named statistics, times `scale` and rounded, as ``61/58/99``."""
    rows = [[layer.statistics[name] for name in names] for layer in analysis.layers]
    return ["/".join("-" if value is None else f"{scale * value:.0f}" for value in values) for values in rows]
