"""What tests ask of a picture: is it a PNG, does one text cover another, does anything stick out."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations, product
from pathlib import Path

import pytest
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image


@contextmanager
def reports_of_one_picture() -> Iterator[None]:
    """Runs, and studies of them, draw one small figure, instead of all, which take seconds."""
    with pytest.MonkeyPatch.context() as patched:
        for function, name in (
            ("fnet_search.engine.reporting.run_figures", "accuracy_vs_macs"),
            ("fnet_search.comparison.result_page.result_figures", "tradeoff.png"),
        ):
            patched.setattr(function, lambda *_, name=name: {name: Figure(figsize=(1, 1))})
        yield


def png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels; fails where `path` is not a whole PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return image.size


def texts(figure: Figure) -> dict[Text, Bbox]:
    """Every text that is drawn with its box in pixels, as laid out for saving."""
    figure.draw_without_rendering()
    hidden = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in _hidden_ticks(axis)}
    return {
        text: Text.get_window_extent(text)
        for text in figure.findobj(Text)
        if isinstance(text, Text) and text.get_text().strip() and text.get_visible() and text not in hidden
    }


def _hidden_ticks(axis: Axis) -> list[Text]:
    """Labels of ticks beyond the axis, of an axis that is off, or that shared axes leave to another panel."""
    low, high = sorted(axis.get_view_interval())
    margin = 1e-9 * (high - low)
    return [
        label
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)
        if not axis.axes.axison or not low - margin <= tick.get_loc() <= high + margin
    ]


def overlapping(boxes: Mapping[Text, Bbox], others: Mapping[str, Bbox] | None = None) -> list[tuple[str, str]]:
    """Pairs of texts, and of a text and another thing, that share more than a pixel."""
    found = []
    for (one, box), (two, other) in combinations(boxes.items(), 2):
        angle = one.get_rotation()
        if angle == two.get_rotation() and angle % 90:
            box, other = _upright(box, angle), _upright(other, angle)
        if box.padded(-0.5).overlaps(other.padded(-0.5)):
            found.append((one.get_text(), two.get_text()))
    for (text, box), (name, other) in product(boxes.items(), (others or {}).items()):
        if box.padded(-0.5).overlaps(other.padded(-0.5)):
            found.append((text.get_text(), name))
    return found


def _upright(box: Bbox, degrees: float) -> Bbox:
    """The box of a slanted text, turned back about the origin by its angle."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    width, height = (
        (a * cos - b * sin) / (cos**2 - sin**2) for a, b in ((box.width, box.height), (box.height, box.width))
    )
    x, y = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    return Bbox.from_bounds(x * cos + y * sin - width / 2, y * cos - x * sin - height / 2, width, height)


def outside(figure: Figure, boxes: Mapping[Text, Bbox]) -> list[str]:
    """Texts that stick out of the figure."""
    page = figure.bbox.padded(1)
    return [text.get_text() for text, box in boxes.items() if not _within(box, page)]


def _within(box: Bbox, page: Bbox) -> bool:
    return bool(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1)
