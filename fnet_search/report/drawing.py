"""Pictures of macroarchitectures: a box for each layer, coloured by kind, branches side by side."""

import math
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch

from fnet_search.arch.costs import network_cost
from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import (
    Activation,
    Add,
    Affine,
    BatchNorm,
    Concat,
    Conv,
    Dense,
    Flatten,
    Layer,
    Multiply,
    Pad,
    Pool,
    Resample,
    Reshape,
    Shape,
    Shuffle,
    Slice,
)
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan, label
from fnet_search.base.toml_tables import IntPair
from fnet_search.base.units import millions
from fnet_search.report.graph_layout import BOX_HEIGHT, MARGIN, Point, lay_out
from fnet_search.report.style import DPI, save_png

FONT, FONT_POINTS = "DejaVu Sans Mono", 7.0
CHARACTER = FONT_POINTS * 0.602 / 72  # every glyph of the font is 0.602 em wide

COLOURS = {
    "input": "#ffffff",
    "convolution": "#a9d0f5",
    "grouped convolution": "#ffd08a",
    "batch norm": "#eeeeee",
    "affine": "#f6f1e4",
    "activation": "#d5f0dc",
    "pool": "#e3d3f4",
    "dense": "#f7c6c6",
    "flatten": "#dddddd",
    "reshape": "#c8c8c8",
    "slice": "#e8dcc4",
    "shuffle": "#d9c7a8",
    "resample": "#cfe0c3",
    "pad": "#d3d3e6",
    "add": "#fff3a3",
    "multiply": "#ffe08a",
    "concat": "#b8ebe6",
}


def _pair(pair: IntPair) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"


def _window(kernel: IntPair) -> str:
    return f"{kernel[0]}x{kernel[1]}"


def layer_text(layer: Layer) -> str:
    """The kind of a layer and the parameters that are not the usual ones: ``conv 3x3, 64, groups 8``."""
    match layer:
        case Conv():
            parts = [f"conv {_window(layer.kernel)}", str(layer.out_channels)]
            parts += [f"stride {_pair(layer.stride)}"] if layer.stride != (1, 1) else []
            parts += [f"dilation {_pair(layer.dilation)}"] if layer.dilation != (1, 1) else []
            parts += [f"groups {layer.groups}"] if layer.groups > 1 else []
            return ", ".join([*parts, "bias"] if layer.bias else parts)
        case Pool(reduction="global_average"):
            return "global average pool"
        case Pool():
            stride = f", stride {_pair(layer.step)}" if layer.step != layer.kernel else ""
            return f"{layer.reduction} pool {_window(layer.kernel)}{stride}"
        case Activation():
            return _function(layer)
        case Pad():
            sides = zip(layer.before, layer.after, strict=True)
            return "zeros " + ", ".join(str(a) if a == b else f"{a} and {b}" for a, b in sides)
        case Dense():
            return f"dense, {layer.out_features}"
        case BatchNorm():
            return "batch norm"
        case Affine(scale, shift):
            parts = [name for name, values in (("scale", scale), ("shift", shift)) if values]
            return f"{'trained' if layer.trained else 'constant'} {' and '.join(parts)}"
        case Slice():
            return f"channels {layer.start} to {layer.stop - 1}"
        case Shuffle():
            return f"shuffle, {layer.groups} groups"
        case Flatten() | Reshape() | Resample() | Add() | Multiply() | Concat():
            return layer.kind
        case _:
            assert_never(layer)


def _function(layer: Activation) -> str:
    """``leaky_relu 0.1``, ``clip -1 to 1``."""
    if len(layer.slopes) == 1:
        return f"{layer.function} {layer.slopes[0]:g}"
    if layer.function == "clip":
        return f"clip {layer.low:g} to {layer.high:g}"
    return f"{layer.function}, a slope for each channel" if layer.per_channel or layer.slopes else layer.function


def _family(layer: Layer) -> str:
    if isinstance(layer, Conv):
        return "grouped convolution" if layer.groups > 1 else "convolution"
    return layer.kind.replace("_", " ")


@dataclass(frozen=True)
class _Box:
    """The text of a layer: name and output shape above, description and factorization rate below."""

    name: str
    shape: str
    text: str
    tag: str
    family: str

    @property
    def width(self) -> float:
        characters = max(len(self.name) + len(self.shape), len(self.text) + len(self.tag)) + 2
        return characters * CHARACTER + 0.16


def _boxes(network: Macroarchitecture, plan: FactorizationPlan | None) -> dict[str, _Box]:
    def shape(sizes: Shape) -> str:
        return "x".join(map(str, sizes))

    rates = {f"{name}.grouped" if rate > 1 else name: rate for name, rate in plan.rates} if plan else {}
    boxes = {INPUT: _Box(INPUT, shape(network.input_shape), "image", "", "input")}
    for node in network.nodes:
        tag = f"rate {rates[node.name]}" if node.name in rates else ""
        if plan is None and isinstance(node.layer, Conv) and node.layer.factorize:
            tag = "factorizable"
        output = shape(network.shapes[node.name])
        boxes[node.name] = _Box(node.name, output, layer_text(node.layer), tag, _family(node.layer))
    return boxes


def _draw_box(axes: Axes, box: _Box, corner: Point, width: float) -> None:
    x, y = corner
    style = "round,pad=0,rounding_size=0.05"
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, BOX_HEIGHT, boxstyle=style, facecolor=COLOURS[box.family], edgecolor="#555555", linewidth=0.6
        )
    )
    for text, side, line, weight, colour in (
        (box.name, "left", 0.3, "bold", "#000000"),
        (box.shape, "right", 0.3, "normal", "#333333"),
        (box.text, "left", 0.72, "normal", "#222222"),
        (box.tag, "right", 0.72, "bold", "#7a3b00"),
    ):
        axes.text(
            x + 0.08 if side == "left" else x + width - 0.08,
            y + line * BOX_HEIGHT,
            text,
            horizontalalignment=side,
            verticalalignment="center",
            family=FONT,
            fontsize=FONT_POINTS,
            fontweight=weight,
            color=colour,
            parse_math=False,
        )


def _title(network: Macroarchitecture, space: Macroarchitecture, plan: FactorizationPlan | None) -> str:
    cost = network_cost(network)
    name = label(space, plan) if plan else ""
    named = f", plan {name}" if 0 < len(name) <= 40 else ""
    return f"{space.name}{named}: {millions(cost.conv_macs)} MMAC in convolutions, {cost.params:,} parameters"


def drawing(network: Macroarchitecture, plan: FactorizationPlan | None = None) -> Figure:
    """The picture of a network; with a plan, that of the factorized network with its rates."""
    factorized = factorize(network, plan) if plan else network
    boxes = _boxes(factorized, plan)
    box_width = max(box.width for box in boxes.values())
    layout = lay_out(factorized, box_width)

    families = [family for family in COLOURS if any(box.family == family for box in boxes.values())]
    width = max(layout.width, 3.2)
    title = textwrap.wrap(_title(factorized, network, plan), int((width - 2 * MARGIN) / 0.085))
    legend_rows = math.ceil(len(families) * 1.55 / (width - 2 * MARGIN))
    layout = replace(layout, top=MARGIN + 0.18 * len(title) + 0.1)
    height = layout.bottom + 0.17 * legend_rows + MARGIN

    dpi = min(DPI, 60_000 / max(width, height))  # Agg draws fewer than 65,536 pixels a side
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for line, text in enumerate(title):
        axes.text(
            MARGIN, MARGIN + 0.18 * line, text, verticalalignment="top", fontsize=9, fontweight="bold", parse_math=False
        )
    for edge in layout.edges:
        arrow = FancyArrowPatch(
            path=layout.route(edge), arrowstyle="-|>", mutation_scale=6, linewidth=0.8, color="#444444"
        )
        axes.add_patch(arrow)
    for name, box in boxes.items():
        _draw_box(axes, box, layout.corner(name), box_width)
    axes.legend(
        handles=[Patch(facecolor=COLOURS[family], edgecolor="#555555", label=family) for family in families],
        loc="lower left",
        bbox_to_anchor=(MARGIN / width, MARGIN / 2 / height),
        ncols=math.ceil(len(families) / legend_rows),
        fontsize=7,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.2,
        columnspacing=1.2,
    )
    return figure


def draw(network: Macroarchitecture, path: Path, plan: FactorizationPlan | None = None) -> None:
    """Writes the `drawing` of a network as a PNG file."""
    save_png(drawing(network, plan), path)
