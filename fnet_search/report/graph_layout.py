"""The layout of a network's picture: ranks from longest paths, lanes for branches, columns so that it fits a page.

The unit is an inch and y grows downwards. The longest path runs straight down in lane 0; branches and skip connections
run beside it in lanes of their own, so that no line passes under a box.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, pairwise

import networkx as nx
import numpy as np
from matplotlib.path import Path as Curve

from fnet_search.arch.layers import Activation, Foldable, Weighted
from fnet_search.arch.macroarchitecture import Macroarchitecture

Place = str | tuple[str, int]
"""A layer, or (source, rank): the waypoint in a rank that all edges of a source share until they branch off."""
Edge = Sequence[Place]
"""The places that an edge visits, one in each rank."""
Point = tuple[float, float]
Vertex = tuple[Point, np.uint8]
"""A point of a line, and the code of matplotlib's Path for the way there."""

BOX_HEIGHT, GAP, MARGIN, LANE_GAP, SKIP_LANE, GUTTER = 0.36, 0.2, 0.2, 0.2, 0.14, 0.5
ASPECT = 0.85
"""Width / height of a portrait page with its caption."""


@dataclass(frozen=True)
class Layout:
    """The places of a network in ranks and lanes, and the ranks in columns."""

    edges: Sequence[Edge]
    rank: Mapping[Place, int]
    lane: Mapping[Place, int]
    columns: Sequence[range]
    box_width: float
    top: float = 0.0
    """Room above the columns."""

    @cached_property
    def _ends(self) -> tuple[Mapping[tuple[int, int], float], Sequence[float]]:
        """Left end of every (column, lane), right end of every column. A lane without boxes is narrow."""
        left: dict[tuple[int, int], float] = {}
        right: list[float] = []
        x = MARGIN
        for column, ranks in enumerate(self.columns):
            wide: dict[int, bool] = {}
            for place, depth in self.rank.items():
                if depth in ranks:
                    wide[self.lane[place]] = wide.get(self.lane[place], False) or isinstance(place, str)
            for lane in sorted(wide):
                left[column, lane] = x
                x += (self.box_width if wide[lane] else SKIP_LANE) + LANE_GAP
            right.append(x - LANE_GAP)
            x = right[-1] + GUTTER
        return left, right

    @property
    def width(self) -> float:
        return self._ends[1][-1] + MARGIN

    @property
    def bottom(self) -> float:
        return self.top + max(map(len, self.columns)) * (BOX_HEIGHT + GAP) + GAP

    def column(self, place: Place) -> int:
        return next(index for index, ranks in enumerate(self.columns) if self.rank[place] in ranks)

    def corner(self, place: Place) -> Point:
        """Upper left corner of a box or lane."""
        column = self.column(place)
        row = self.rank[place] - self.columns[column].start
        return self._ends[0][column, self.lane[place]], self.top + GAP + row * (BOX_HEIGHT + GAP)

    def entry(self, place: Place) -> Point:
        """Where a line enters: the middle of a box's upper side, or the middle of a narrow lane."""
        x, y = self.corner(place)
        return x + (self.box_width if isinstance(place, str) else SKIP_LANE) / 2, y

    def route(self, edge: Edge) -> Curve:
        """The line of an edge, from the lower side of its source to the upper side of its target."""
        here = _below(self.entry(edge[0]))
        drawn: list[Vertex] = [(here, Curve.MOVETO)]
        for before, place in pairwise(edge):
            if self.column(place) != self.column(before):
                corners = self._to_next_column(here, self.column(before))
                drawn += _rounded(corners)
                here = corners[-1]
            end = self.entry(place)
            if place == edge[-1]:
                end = end[0] + self._shift(edge), end[1]
            drawn += _bend(here, end)
            here = end
            if place != edge[-1]:
                here = _below(end)
                drawn.append((here, Curve.LINETO))
        vertices, codes = zip(*drawn, strict=True)
        return Curve(vertices, codes)

    def _shift(self, edge: Edge) -> float:
        """The horizontal distance of an edge's end from the middle of its target: edges from the right end on the
        right."""
        lanes = sorted(self.lane[other[-2]] for other in self.edges if other[-1] == edge[-1])
        own = self.lane[edge[-1]]
        return min(0.16, 0.45 * self.box_width / len(lanes)) * (
            lanes.index(self.lane[edge[-2]]) - (lanes.index(own) if own in lanes else 0)
        )

    def _to_next_column(self, start: Point, column: int) -> list[Point]:
        """Down, up through the gutter, and down to the junction above lane 0 of the next column."""
        left, right = self._ends
        turn, gutter = start[1] + GAP / 2, right[column] + GUTTER / 2
        entry = left[column + 1, 0] + self.box_width / 2
        return [
            start,
            (start[0], turn),
            (gutter, turn),
            (gutter, self.top),
            (entry, self.top),
            (entry, self.top + 0.06),
        ]


def lay_out(network: Macroarchitecture, box_width: float) -> Layout:
    """The layout whose columns come nearest to a page's aspect and waste little of it."""
    generations = nx.topological_generations(network.graph)
    depth = {name: rank for rank, names in enumerate(generations) for name in names}
    edges: list[list[Place]] = [
        [source, *((source, rank) for rank in range(depth[source] + 1, depth[target])), target]
        for source, target in network.graph.edges
    ]
    rank = {place: depth[place] if isinstance(place, str) else place[1] for edge in edges for place in edge}
    lane = _lanes(edges, rank)
    blocks = _blocks(network, depth)
    heights = range(max(map(len, blocks)), blocks[-1].stop + 1)
    wrappings = dict.fromkeys(tuple(_wrapped(blocks, height)) for height in heights)
    layouts = [Layout(edges, rank, lane, columns, box_width) for columns in wrappings]

    def badness(layout: Layout) -> float:
        width, height = layout.width, layout.bottom
        return abs(math.log(width / height / ASPECT)) + math.log(width * height)

    return min(layouts, key=badness)


def _lanes(edges: Sequence[Edge], rank: Mapping[Place, int]) -> dict[Place, int]:
    """Splits the network into paths: the longest takes lane 0, each other one the first lane that is free in its
    ranks."""
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
    """Ranks that must stay in one column. A column may end where a single tensor is alive, but not between a
    convolution and the norm, activation or pointwise convolution that follows it."""
    spans = [(source, rank[source], rank[target]) for source, target in network.graph.edges]
    starts = [0]
    for depth in range(max(rank.values())):
        alive = {source for source, start, end in spans if start <= depth < end}
        if len(alive) > 1:
            continue
        (source,) = alive
        before = network.by_name[source].layer if source in network.by_name else None
        tail = all(isinstance(node.layer, Foldable | Activation) for node in network.consumers(source))
        inside = source.endswith(".relu") and f"{source.removesuffix('.relu')}.pointwise" in network.by_name
        if not inside and not (tail and isinstance(before, Weighted | Foldable)):
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


def _below(entry: Point) -> Point:
    return entry[0], entry[1] + BOX_HEIGHT


def _toward(start: Point, end: Point) -> Point:
    """The point a corner's radius away from `start` towards `end`."""
    length = math.dist(start, end)
    share = min(0.08, length / 2) / length if length else 0.0
    return start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share


def _rounded(points: Sequence[Point]) -> Iterator[Vertex]:
    """A polyline with round corners, without its first point."""
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        yield _toward(corner, before), Curve.LINETO
        yield corner, Curve.CURVE3
        yield _toward(corner, after), Curve.CURVE3
    yield points[-1], Curve.LINETO


def _bend(start: Point, end: Point) -> list[Vertex]:
    """A vertical line, or a curve that leaves and arrives vertically."""
    if abs(start[0] - end[0]) < 1e-6:
        return [(end, Curve.LINETO)]
    middle = (start[1] + end[1]) / 2
    return [((start[0], middle), Curve.CURVE4), ((end[0], middle), Curve.CURVE4), (end, Curve.CURVE4)]
