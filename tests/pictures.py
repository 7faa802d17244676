"""What tests ask of a picture: is it a PNG, does one text cover another, does anything stick out."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image


def png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels; fails where `path` is not a whole PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return image.size


def texts(figure: Figure) -> dict[Text, Bbox]:
    """Every text that is drawn with its box in pixels, as laid out for saving."""
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    hidden = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in _hidden_ticks(axis)}
    return {
        text: Text.get_window_extent(text, renderer)
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


def overlapping(boxes: Sequence[tuple[str, Bbox]]) -> list[tuple[str, str]]:
    """Pairs whose boxes share more than a pixel."""
    return [(a, b) for (a, one), (b, two) in combinations(boxes, 2) if one.padded(-0.5).overlaps(two.padded(-0.5))]


def outside(figure: Figure, boxes: Sequence[tuple[str, Bbox]]) -> list[str]:
    """Those that stick out of the figure."""
    page = figure.bbox
    return [
        name
        for name, box in boxes
        if box.x0 < page.x0 - 1 or box.y0 < page.y0 - 1 or box.x1 > page.x1 + 1 or box.y1 > page.y1 + 1
    ]
