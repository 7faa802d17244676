from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from fnet_search.arch.layers import KINDS, Activation, Conv, Dense, Flatten, Pad, Pool
from fnet_search.arch.macroarchitecture import Macroarchitecture, Node
from fnet_search.arch.plan import FactorizationPlan, make_plan, regular, reverse_pyramid, uniform
from fnet_search.importing.spaces import load_space
from fnet_search.report.drawing import COLOURS, draw, drawing, layer_text
from tests.support.evaluations import residual_space
from tests.support.pictures import outside, overlapping, png_size, texts


def written(figure: Figure) -> list[str]:
    return [text.get_text() for text in texts(figure)]


def test_describes_what_tells_layers_apart() -> None:
    assert layer_text(Conv(64, groups=8)) == "conv 3x3, 64, groups 8"
    assert layer_text(Conv(16, (1, 7), stride=(2, 2), dilation=(1, 2), bias=True)) == (
        "conv 1x7, 16, stride 2, dilation 1x2, bias"
    )
    assert layer_text(Pool()) == "max pool 2x2"
    assert layer_text(Pool("average", (3, 3), (1, 1))) == "average pool 3x3, stride 1"
    assert layer_text(Pool("global_average")) == "global average pool"
    assert layer_text(Activation("relu6")) == "relu6"
    assert layer_text(Activation("leaky_relu", 0.1)) == "leaky_relu 0.1"
    assert layer_text(Activation("clip", low=-1, high=0.5)) == "clip -1 to 0.5"
    assert layer_text(Activation("prelu", per_channel=True)) == "prelu, a slope for each channel"
    assert layer_text(Activation("leaky_relu", (0.1, 0.2))) == "leaky_relu, a slope for each channel"
    assert layer_text(Pad((0, 1, 0), (0, 1, 2))) == "zeros 0, 1, 0 and 2"
    assert layer_text(Dense(10)) == "dense, 10"


@pytest.mark.parametrize("name", ["tiny", "factorizenet", "factorizenet-gap"])
def test_writes_a_png_of_every_shipped_space(name: str, tmp_path: Path) -> None:
    space = load_space(name)
    draw(space, tmp_path / "network.png")
    width, height = png_size(tmp_path / "network.png")
    assert 400 < width < 3000
    assert 400 < height < 3000
    assert [path.name for path in tmp_path.iterdir()] == ["network.png"]


def test_a_second_picture_replaces_the_first(tmp_path: Path) -> None:
    path = tmp_path / "network.png"
    path.write_bytes(b"old")
    draw(load_space("tiny"), path)
    first = path.read_bytes()
    draw(load_space("tiny"), path)
    assert path.read_bytes() == first


def test_every_layer_is_there_with_its_shape() -> None:
    space = residual_space()
    shown = written(drawing(space))
    for node in space.nodes:
        assert node.name in shown
    assert shown.count("32x16x16") == sum(shape == (32, 16, 16) for shape in space.shapes.values())
    assert shown.count("factorizable") == sum(isinstance(n.layer, Conv) and n.layer.factorize for n in space.nodes)


def test_a_plan_shows_the_factorized_network_and_its_rates() -> None:
    space = load_space("factorizenet")
    plan = make_plan(space, {"conv_64_2": 4, "conv_256_3": 256})
    shown = written(drawing(space, plan))
    for part in ("grouped", "norm", "relu", "pointwise"):
        assert f"conv_64_2.{part}" in shown
    assert "conv_64_2" not in shown
    assert "conv 3x3, 64, groups 4" in shown
    assert [shown.count(f"rate {rate}") for rate in (1, 4, 256)] == [6, 1, 1]
    assert "factorizable" not in shown


def test_the_title_names_the_plan_and_its_cost() -> None:
    space = load_space("factorizenet")
    title = " ".join(text for text in written(drawing(space, reverse_pyramid(space, 2))) if "init2" in text)
    assert title.startswith("factorizenet, plan init2: 104.3 MMAC")


@pytest.mark.parametrize(
    "space", [load_space("tiny"), load_space("factorizenet"), residual_space()], ids=lambda space: space.name
)
@pytest.mark.parametrize("plan", [None, regular, lambda space: uniform(space, 4)], ids=["as is", "regular", "f4"])
def test_nothing_overlaps_or_sticks_out(space: Macroarchitecture, plan: object) -> None:
    chosen = plan(space) if callable(plan) else None
    assert chosen is None or isinstance(chosen, FactorizationPlan)
    figure = drawing(space, chosen)
    boxes = texts(figure)
    assert overlapping(boxes) == []
    assert outside(figure, boxes) == []
    cards = [patch.get_window_extent() for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
    inside = [
        box for card in cards for box in boxes.values() if card.x0 < box.x0 and box.x1 < card.x1 and box.overlaps(card)
    ]
    assert len(inside) >= 3 * len(cards)  # name, shape and description, none wider than its box


def test_kinds_have_colours_and_a_legend() -> None:
    figure = drawing(residual_space())
    legend = figure.axes[0].get_legend()
    assert legend is not None
    named = [text.get_text() for text in legend.get_texts()]
    kinds = {"input", "convolution", "batch norm", "activation", "pool", "dense", "flatten", "add", "concat"}
    assert set(named) == kinds
    assert len(set(COLOURS.values())) == len(COLOURS)
    assert {kind.replace("_", " ") for kind in KINDS} <= {*COLOURS, "conv"}


def test_names_are_not_read_as_formulas() -> None:
    nodes = (Node("a$x_1$b", Flatten(), ("input",)), Node("$\\frac$", Dense(10), ("a$x_1$b",)))
    shown = written(drawing(Macroarchitecture("s$p$", (3, 8, 8), nodes)))
    assert {"a$x_1$b", "$\\frac$"} <= set(shown)
