"""Labels for the points of a scatter plot, placed so that they cover nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

Boxes = npt.NDArray[np.float64]
"""Rectangles (left, bottom, right, top) in pixels, one a row."""

STEPS = (3, 9, 18)  # points between marker and label, tried in this order
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7))
HORIZONTAL: Mapping[int, Literal["left", "center", "right"]] = {1: "left", 0: "center", -1: "right"}
VERTICAL: Mapping[int, Literal["bottom", "center", "top"]] = {1: "bottom", 0: "center", -1: "top"}
FONT_POINTS = 7.5


@dataclass(frozen=True)
class PointLabel:
    """A label and its markers, which lie one above the other at (x, ys); the last one is its anchor.

    `texts` are alternatives, the preferred one first; `size` is half the width of a marker, in points.
    """

    texts: Sequence[str]
    x: float
    ys: Sequence[float]
    size: float = 4.0


def place_labels(axes: Axes, labels: Sequence[PointLabel]) -> None:
    """Writes each label near its anchor, in order, clear of markers, dashed lines and other labels.

    A label without markers or a free place is left out. Freezes the layout of the figure: nothing may move afterwards.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    pixels = figure.dpi / 72
    labels = [point for point in labels if point.ys]
    markers = np.array([_markers(axes, point, pixels) for point in labels]).reshape(-1, 4)
    lines = [line.get_window_extent().padded(2 * pixels) for line in axes.lines if line.get_linestyle() in ("--", ":")]
    written = np.array([line.extents for line in lines]).reshape(-1, 4)
    for point in labels:
        anchor = axes.transData.transform((point.x, point.ys[-1]))
        sizes = {text: _size(axes, text) for text in point.texts}
        for text, step, (right, up) in product(point.texts, STEPS, DIRECTIONS):
            offset = np.array((right, up)) * (point.size + step)
            near = anchor + offset * pixels
            corner = near - sizes[text] * (1 - np.sign((right, up))) / 2
            box = np.concatenate([corner, corner + sizes[text]])
            leader = np.linspace(anchor, near, 8)
            leader = np.hstack([leader, leader])
            if _outside(axes, box) or _overlap(box, markers) or _overlap(box, written) or _overlap(leader, written):
                continue
            axes.annotate(
                text,
                (point.x, point.ys[-1]),
                (offset[0], offset[1]),
                textcoords="offset points",
                fontsize=FONT_POINTS,
                horizontalalignment=HORIZONTAL[_sign(right)],
                verticalalignment=VERTICAL[_sign(up)],
                arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.5} if step > STEPS[0] else None,
                parse_math=False,
            )
            written = np.vstack([written, box, leader])
            break


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _overlap(these: Boxes, those: Boxes) -> bool:
    """Whether any of these boxes overlaps any of those."""
    a, b = np.atleast_2d(these)[:, None], np.atleast_2d(those)[None]
    return bool(((a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:])).all(-1).any())


def _outside(axes: Axes, box: Boxes) -> bool:
    bounds = axes.get_window_extent()
    return bool(box[0] < bounds.x0 or box[1] < bounds.y0 or box[2] > bounds.x1 or box[3] > bounds.y1)


def _markers(axes: Axes, point: PointLabel, pixels: float) -> Boxes:
    """The box around the markers of a label and the line between them."""
    low, high = axes.transData.transform([(point.x, min(point.ys)), (point.x, max(point.ys))])
    return np.concatenate([low - point.size * pixels, high + point.size * pixels])


def _size(axes: Axes, text: str) -> npt.NDArray[np.float64]:
    """Width and height of a label, pixels."""
    probe = axes.text(0, 0, text, fontsize=FONT_POINTS, parse_math=False)
    extent = probe.get_window_extent()
    probe.remove()
    return np.array(extent.size)
