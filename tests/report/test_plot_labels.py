import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from fnet_search.report.plot_labels import PointLabel, place_labels
from tests.support.pictures import overlapping, texts


def scatter(points: list[tuple[float, float]]) -> Axes:
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([x for x, _ in points], [y for _, y in points], "o", markersize=5)
    return axes


def placed(axes: Axes) -> dict[Text, Bbox]:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return {text: box for text, box in texts(figure).items() if isinstance(text, Annotation)}


def named(axes: Axes) -> dict[str, Bbox]:
    return {text.get_text(): box for text, box in placed(axes).items()}


def test_a_lonely_point_has_its_label_beside_it() -> None:
    axes = scatter([(0, 0)])
    place_labels(axes, [PointLabel(("regular",), 0, (0,))])
    x, y = axes.transData.transform((0, 0))
    box = named(axes)["regular"]
    assert 0 < box.x0 - x < 30
    assert box.y0 < y < box.y1


@pytest.mark.parametrize("count", [10, 60])
def test_labels_cover_neither_each_other_nor_any_marker(count: int) -> None:
    points = [tuple(point) for point in np.random.default_rng(0).normal(size=(count, 2))]
    axes = scatter(points)
    place_labels(axes, [PointLabel((f"1-2-4-8-{index}", f"#{index}"), x, (y,)) for index, (x, y) in enumerate(points)])
    boxes = placed(axes)
    assert len(boxes) > count / 2
    spots = axes.transData.transform(points)
    markers = {f"marker {index}": Bbox([spot, spot]).padded(4) for index, spot in enumerate(spots)}
    assert overlapping(boxes, markers) == []
    window = axes.get_window_extent()
    assert all(window.x0 <= box.x0 and box.x1 <= window.x1 for box in boxes.values())
    assert all(window.y0 <= box.y0 and box.y1 <= window.y1 for box in boxes.values())


def test_labels_keep_clear_of_a_budget_line() -> None:
    axes = scatter([(-1, 0), (0, 0), (1, 1)])
    line = axes.axvline(0.02, linestyle="--")
    place_labels(axes, [PointLabel(("left of the budget",), 0, (0,))])
    assert not named(axes)["left of the budget"].overlaps(line.get_window_extent())


def test_the_first_labels_come_first_and_a_short_one_is_better_than_none() -> None:
    points = [(0.0, 0.0), (0.01, 0.001), (1.0, 1.0)]
    axes = scatter(points)
    wide = "a label that is wider than all of the axes" * 3
    place_labels(axes, [PointLabel(("first",), *points[0][:1], (0.0,)), PointLabel((wide, "#1"), 0.01, (0.001,))])
    assert set(named(axes)) == {"first", "#1"}


def test_what_fits_nowhere_is_left_out() -> None:
    axes = scatter([(0, 0)])
    place_labels(axes, [PointLabel(("wide" * 100,), 0, (0,))])
    assert placed(axes) == {}


def test_formulas_are_shown_as_they_are() -> None:
    axes = scatter([(0, 0)])
    place_labels(axes, [PointLabel(("$x",), 0, (0,)), PointLabel(("$\\frac$",), 0, (0,))])
    assert set(named(axes)) == {"$x", "$\\frac$"}
