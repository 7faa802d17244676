import networkx as nx
import numpy as np
import pytest
from matplotlib.path import Path

from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Activation, Add, BatchNorm, Concat, Conv, Dense, Flatten, Pool
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.arch.plan import reverse_pyramid, uniform
from fnet_search.importing.spaces import load_space
from fnet_search.report.graph_layout import BOX_HEIGHT, Layout, lay_out
from tests.support.evaluations import residual_space

WIDTH = 2.0


def same(channels: int) -> Conv:
    return Conv(channels, padding=(1, 1), factorize=True)


def finished(name: str, nodes: list[Node]) -> Macroarchitecture:
    tail = [
        Node("gap", Pool("global_average"), (nodes[-1].name,)),
        Node("flatten", Flatten(), ("gap",)),
        Node("out", Dense(10), ("flatten",)),
    ]
    return Macroarchitecture(name, (3, 32, 32), (*nodes, *tail))


def nested_skips() -> Macroarchitecture:
    """No rank but the first and the last has a single tensor alive: a U-Net without its pools."""
    nodes = [Node("a", same(8), (INPUT,)), Node("b", same(8), ("a",)), Node("c", same(8), ("b",))]
    nodes += [Node("d", Concat(), ("c", "b")), Node("e", Concat(), ("d", "a")), Node("f", Concat(), ("e", INPUT))]
    return finished("nested", nodes)


def inception() -> Macroarchitecture:
    nodes, last = [Node("stem", same(16), (INPUT,))], "stem"
    for module in range(5):
        ends = []
        for branch in range(4):
            end = last
            for step in range(branch + 1):
                name = f"m{module}.b{branch}.{step}"
                nodes.append(Node(name, same(8), (end,)))
                end = name
            ends.append(end)
        last = f"m{module}"
        nodes.append(Node(last, Concat(), tuple(ends)))
    return finished("inception", nodes)


def preactivation() -> Macroarchitecture:
    nodes, last = [Node("stem", same(16), (INPUT,))], "stem"
    for block in range(8):
        nodes += [
            Node(f"{block}.bn", BatchNorm(), (last,)),
            Node(f"{block}.act", Activation(), (f"{block}.bn",)),
            Node(f"{block}.conv", same(16), (f"{block}.act",)),
            Node(f"{block}.add", Add(), (f"{block}.conv", last)),
        ]
        last = f"{block}.add"
    return finished("preactivation", nodes)


def networks() -> list[Macroarchitecture]:
    factorizenet = load_space("factorizenet")
    return [
        factorizenet,
        factorize(factorizenet, reverse_pyramid(factorizenet, 2)),
        residual_space(),
        factorize(residual_space(), uniform(residual_space(), 4)),
        nested_skips(),
        inception(),
        preactivation(),
    ]


@pytest.fixture(params=networks(), ids=lambda network: f"{network.name}-{len(network.nodes)}")
def laid_out(request: pytest.FixtureRequest) -> tuple[Macroarchitecture, Layout]:
    return request.param, lay_out(request.param, WIDTH)


def test_boxes_do_not_overlap_and_lie_inside(laid_out: tuple[Macroarchitecture, Layout]) -> None:
    network, layout = laid_out
    corners = [layout.corner(name) for name in network.graph]
    for index, (x, y) in enumerate(corners):
        assert 0 < x < x + WIDTH < layout.width
        assert 0 < y < y + BOX_HEIGHT < layout.bottom
        assert all(abs(x - left) > WIDTH or abs(y - top) > BOX_HEIGHT for left, top in corners[:index])


def test_every_edge_runs_from_its_source_to_its_target(laid_out: tuple[Macroarchitecture, Layout]) -> None:
    network, layout = laid_out
    assert {(edge[0], edge[-1]) for edge in layout.edges} == set(network.graph.edges)
    for edge in layout.edges:
        points = np.asarray(layout.route(edge).vertices)
        x, y = layout.entry(edge[0])
        assert tuple(points[0]) == pytest.approx((x, y + BOX_HEIGHT))
        left, top = layout.corner(edge[-1])
        assert left < points[-1][0] < left + WIDTH
        assert points[-1][1] == pytest.approx(top)


def test_no_line_passes_under_a_box_or_out_of_the_picture(laid_out: tuple[Macroarchitecture, Layout]) -> None:
    network, layout = laid_out
    corners = [layout.corner(name) for name in network.graph]
    for edge in layout.edges:
        (line,) = layout.route(edge).to_polygons(closed_only=False)
        for x, y in np.asarray(Path(line).interpolated(8).vertices):
            assert 0 <= x <= layout.width
            assert 0 <= y <= layout.bottom
            assert not any(
                left + 0.01 < x < left + WIDTH - 0.01 and top + 0.01 < y < top + BOX_HEIGHT - 0.01
                for left, top in corners
            ), (edge, x, y)


def test_two_tensors_do_not_share_a_lane(laid_out: tuple[Macroarchitecture, Layout]) -> None:
    _, layout = laid_out
    taken = [(layout.rank[place], layout.lane[place]) for place in layout.rank]
    assert len(taken) == len(set(taken))


def test_the_longest_path_runs_straight(laid_out: tuple[Macroarchitecture, Layout]) -> None:
    network, layout = laid_out
    straight = [name for name in network.graph if layout.lane[name] == 0]
    assert len(straight) == nx.dag_longest_path_length(network.graph) + 1
    assert straight[0] == INPUT
    assert network.output in straight


def test_layers_stand_below_what_they_read(laid_out: tuple[Macroarchitecture, Layout]) -> None:
    network, layout = laid_out
    assert all(layout.rank[source] < layout.rank[target] for source, target in network.graph.edges)
    ranks = [rank for column in layout.columns for rank in column]
    assert ranks == list(range(max(layout.rank.values()) + 1))


def test_a_convolution_stays_with_its_norm_and_its_pointwise_part() -> None:
    space = load_space("factorizenet")
    network = factorize(space, uniform(space, 8))
    layout = lay_out(network, WIDTH)
    assert len(layout.columns) > 1
    for node in network.nodes:
        if isinstance(node.layer, BatchNorm | Activation) or node.name.endswith(".pointwise"):
            assert layout.column(node.name) == layout.column(node.inputs[0])


def test_a_long_network_is_wrapped_to_the_shape_of_a_page() -> None:
    layout = lay_out(load_space("factorizenet"), WIDTH)
    assert 0.5 < layout.width / layout.bottom < 1.5
