"""A macroarchitecture as a picture: a box a layer, layered by longest path, long networks wrapped into columns.

One unit of the drawing is an inch. The longest path runs straight down in lane 0; branches and skip connections
run beside it in lanes of their own, so that no line passes under a box.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path

import networkx as nx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch
from matplotlib.path import Path as Curve

from fnet_search.figures import mmac, save_png
from fnet_search.macro import (
    INPUT,
    Activation,
    BatchNorm,
    Conv,
    Dense,
    Layer,
    Macroarchitecture,
    Pair,
    Pool,
    Shape,
)
from fnet_search.plan import FactorizationPlan, factorize, label, network_cost

Place = str | tuple[str, str, int]
"""A layer, or the waypoint of an edge (source, target) in a rank that it passes."""
Point = tuple[float, float]

FONT, FONT_POINTS = "DejaVu Sans Mono", 7.0
CHARACTER = FONT_POINTS * 0.602 / 72  # every glyph of the font is 0.602 em wide
BOX_HEIGHT, GAP, MARGIN, LANE_GAP, SKIP_LANE, GUTTER = 0.36, 0.2, 0.2, 0.2, 0.14, 0.5
ASPECT = 0.85  # width / height that a page shows well

COLOURS = {
    "input": "#ffffff",
    "convolution": "#a9d0f5",
    "grouped convolution": "#ffd08a",
    "batch norm": "#eeeeee",
    "activation": "#d5f0dc",
    "pool": "#e3d3f4",
    "dense": "#f7c6c6",
    "flatten": "#dddddd",
    "add": "#fff3a3",
    "concat": "#b8ebe6",
}


def _pair(pair: Pair) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"


def _window(kernel: Pair) -> str:
    return f"{kernel[0]}x{kernel[1]}"


def describe(layer: Layer) -> str:
    """Kind and telling parameters: ``conv 3x3, 64, groups 8``."""
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
            return layer.function
        case Dense():
            return f"dense, {layer.out_features}"
        case BatchNorm():
            return "batch norm"
        case _:
            return layer.kind


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
        boxes[node.name] = _Box(node.name, output, describe(node.layer), tag, _family(node.layer))
    return boxes


def _edges(network: Macroarchitecture, rank: Mapping[str, int]) -> list[list[Place]]:
    """Every edge as the places it visits, one a rank."""
    return [
        [source, *((source, target, depth) for depth in range(rank[source] + 1, rank[target])), target]
        for source, target in network.graph.edges
    ]


def _lanes(edges: Sequence[Sequence[Place]], rank: Mapping[Place, int]) -> dict[Place, int]:
    """Splits the network into paths: the longest takes lane 0, the others the first lane free in their ranks."""
    rest: nx.DiGraph[Place] = nx.DiGraph()
    for edge in edges:
        for source, target in pairwise(edge):
            rest.add_edge(source, target, layers=1.0 if isinstance(target, str) else 1e-6)
    paths: list[list[Place]] = []
    while rest:
        paths.append(nx.dag_longest_path(rest, weight="layers"))
        rest.remove_nodes_from(paths[-1])
    lane: dict[Place, int] = dict.fromkeys(paths[0], 0)
    taken: set[tuple[int, int]] = set()
    for path in sorted(paths[1:], key=len):  # short ones first: inner skips are drawn inside of outer ones
        ranks = [rank[place] for place in path]
        free = next(index for index in count(1) if not any((index, depth) in taken for depth in ranks))
        taken.update((free, depth) for depth in ranks)
        lane.update(dict.fromkeys(path, free))
    return lane


def _blocks(network: Macroarchitecture, rank: Mapping[str, int]) -> list[range]:
    """Ranks that must stay in one column: it may end where a single tensor is alive, but not after a convolution
    whose norm, activation or pointwise convolution follows."""
    spans = [(source, rank[source], rank[target]) for source, target in network.graph.edges]
    starts = [0]
    for depth in range(max(rank.values())):
        alive = {source for source, start, end in spans if start <= depth < end}
        if len(alive) > 1:
            continue
        (source,) = alive
        before = network.by_name[source].layer if source in network.by_name else None
        tail = all(isinstance(node.layer, BatchNorm | Activation) for node in network.consumers(source))
        inside = source.endswith(".relu") and f"{source.removesuffix('.relu')}.pointwise" in network.by_name
        if not inside and not (tail and isinstance(before, Conv | Dense | BatchNorm)):
            starts.append(depth + 1)
    return [range(start, end) for start, end in pairwise([*starts, max(rank.values()) + 1])]


def _wrapped(blocks: Sequence[range], height: int) -> list[range]:
    columns = [blocks[0]]
    for block in blocks[1:]:
        if block.stop - columns[-1].start <= height:
            columns[-1] = range(columns[-1].start, block.stop)
        else:
            columns.append(block)
    return columns


@dataclass(frozen=True)
class _Layout:
    """Where everything stands: the left end of every (column, lane), and the columns' ranks."""

    columns: Sequence[range]
    left: Mapping[tuple[int, int], float]
    right: Sequence[float]
    """Right end of every column."""
    box_width: float
    top: float

    @property
    def width(self) -> float:
        return self.right[-1] + MARGIN

    @property
    def bottom(self) -> float:
        return self.top + max(map(len, self.columns)) * (BOX_HEIGHT + GAP) + GAP

    def column(self, depth: int) -> int:
        return next(index for index, ranks in enumerate(self.columns) if depth in ranks)

    def y(self, depth: int) -> float:
        """Upper end of the boxes of a rank; y grows downwards."""
        return self.top + GAP + (depth - self.columns[self.column(depth)].start) * (BOX_HEIGHT + GAP)

    def x(self, place: Place, depth: int, lane: int) -> float:
        """Where a line enters: the middle of a box, the left end of a lane."""
        return self.left[self.column(depth), lane] + (self.box_width / 2 if isinstance(place, str) else SKIP_LANE / 2)


def _layout(columns: Sequence[range], rank: Mapping[Place, int], lane: Mapping[Place, int], box_width: float) -> _Layout:
    left: dict[tuple[int, int], float] = {}
    right: list[float] = []
    x = MARGIN
    for column, ranks in enumerate(columns):
        wide: dict[int, bool] = {}
        for place, depth in rank.items():
            if depth in ranks:
                wide[lane[place]] = wide.get(lane[place], False) or isinstance(place, str)
        for index in sorted(wide):
            left[column, index] = x
            x += (box_width if wide[index] else SKIP_LANE) + LANE_GAP
        right.append(x - LANE_GAP)
        x = right[-1] + GUTTER
    return _Layout(columns, left, right, box_width, 0.0)


def _best_layout(
    blocks: Sequence[range], rank: Mapping[Place, int], lane: Mapping[Place, int], box_width: float
) -> _Layout:
    """The wrapping that comes nearest to a page's aspect and wastes little of it."""
    heights = range(max(map(len, blocks)), blocks[-1].stop + 1)
    wrappings = dict.fromkeys(tuple(_wrapped(blocks, height)) for height in heights)
    layouts = [_layout(columns, rank, lane, box_width) for columns in wrappings]
    return min(
        layouts,
        key=lambda layout: abs(math.log(layout.width / layout.bottom / ASPECT)) + math.log(layout.width * layout.bottom),
    )


def _rounded(points: Sequence[Point], radius: float = 0.08) -> Iterator[tuple[Point, int]]:
    """Vertices and codes of a polyline with round corners."""
    yield points[0], Curve.MOVETO
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        for end, codes in ((before, (Curve.LINETO, Curve.CURVE3)), (after, (Curve.CURVE3,))):
            length = math.dist(corner, end)
            share = min(radius, length / 2) / length if length else 0.0
            near = (corner[0] + (end[0] - corner[0]) * share, corner[1] + (end[1] - corner[1]) * share)
            yield from ((near, codes[0]), (corner, codes[1])) if len(codes) > 1 else ((near, codes[0]),)
    yield points[-1], Curve.LINETO


def _bend(start: Point, end: Point) -> list[tuple[Point, int]]:
    """A vertical line, or a curve that leaves and arrives vertically."""
    if abs(start[0] - end[0]) < 1e-6:
        return [(end, Curve.LINETO)]
    middle = (start[1] + end[1]) / 2
    return [((start[0], middle), Curve.CURVE4), ((end[0], middle), Curve.CURVE4), (end, Curve.CURVE4)]


def _route(
    edge: Sequence[Place], layout: _Layout, rank: Mapping[Place, int], lane: Mapping[Place, int], shift: float
) -> Curve:
    """The line of an edge, from the lower end of its source to the upper end of its target (`shift` off its middle)."""

    def x(place: Place) -> float:
        return layout.x(place, rank[place], lane[place])

    here: Point = (x(edge[0]), layout.y(rank[edge[0]]) + BOX_HEIGHT)
    drawn: list[tuple[Point, int]] = [(here, Curve.MOVETO)]
    for before, place in pairwise(edge):
        column = layout.column(rank[place])
        if column != layout.column(rank[before]):
            gutter, above = layout.right[column - 1] + GUTTER / 2, layout.top
            entry = layout.left[column, 0] + layout.box_width / 2
            turn = here[1] + GAP / 2
            corners = [here, (here[0], turn), (gutter, turn), (gutter, above), (entry, above), (entry, above + 0.06)]
            drawn += list(_rounded(corners))[1:]
            here = corners[-1]
        end = (x(place) + (shift if place == edge[-1] else 0.0), layout.y(rank[place]))
        drawn += _bend(here, end)
        here = end
        if place != edge[-1]:
            here = (end[0], end[1] + BOX_HEIGHT)
            drawn.append((here, Curve.LINETO))
    vertices, codes = zip(*drawn, strict=True)
    return Curve(vertices, codes)


def _shifts(edges: Sequence[Sequence[Place]], lane: Mapping[Place, int]) -> list[float]:
    """How far from the middle of its target each edge arrives: lines from the right arrive on the right."""
    shifts = []
    for edge in edges:
        rivals = sorted({lane[other[-2]] for other in edges if other[-1] == edge[-1]})
        straight = sum(index < lane[edge[-1]] for index in rivals)
        if lane[edge[-1]] not in rivals and lane[edge[-2]] > lane[edge[-1]]:
            straight -= 1
        shifts.append(0.16 * (rivals.index(lane[edge[-2]]) - straight) if len(rivals) > 1 else 0.0)
    return shifts


def _draw_box(axes: Axes, box: _Box, x: float, y: float, width: float) -> None:
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
    return f"{space.name}{named}: {mmac(cost.conv_macs)} MMAC in convolutions, {cost.params:,} parameters"


def drawing(network: Macroarchitecture, plan: FactorizationPlan | None = None) -> Figure:
    """The picture of a network; with a plan, that of the factorized network, the rates shown."""
    factorized = factorize(network, plan) if plan else network
    boxes = _boxes(factorized, plan)
    box_width = max(box.width for box in boxes.values())
    depth = {name: rank for rank, names in enumerate(nx.topological_generations(factorized.graph)) for name in names}
    edges = _edges(factorized, depth)
    rank = {place: depth[place] if isinstance(place, str) else place[2] for edge in edges for place in edge}
    lane = _lanes(edges, rank)
    layout = _best_layout(_blocks(factorized, depth), rank, lane, box_width)

    families = [family for family in COLOURS if any(box.family == family for box in boxes.values())]
    width = max(layout.width, 3.2)
    title = textwrap.wrap(_title(factorized, network, plan), int((width - 2 * MARGIN) / 0.085))
    legend_rows = math.ceil(len(families) * 1.55 / (width - 2 * MARGIN))
    top = MARGIN + 0.18 * len(title) + 0.1
    layout = _Layout(layout.columns, layout.left, layout.right, box_width, top)
    height = layout.bottom + 0.17 * legend_rows + MARGIN

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for line, text in enumerate(title):
        axes.text(
            MARGIN, MARGIN + 0.18 * line, text, verticalalignment="top", fontsize=9, fontweight="bold", parse_math=False
        )
    for edge, shift in zip(edges, _shifts(edges, lane), strict=True):
        route = _route(edge, layout, rank, lane, shift)
        axes.add_patch(FancyArrowPatch(path=route, arrowstyle="-|>", mutation_scale=6, linewidth=0.8, color="#444444"))
    for name, box in boxes.items():
        x = layout.left[layout.column(depth[name]), lane[name]]
        _draw_box(axes, box, x, layout.y(depth[name]), box_width)
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
    """Writes the picture of a network as PNG; with a plan, that of the factorized network."""
    save_png(drawing(network, plan), path)
