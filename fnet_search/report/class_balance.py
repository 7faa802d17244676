"""Class balance: how many images each class has and how the winner classifies them, for terminal and report."""

from collections.abc import Mapping, Sequence
from csv import DictReader, writer
from html import escape
from io import StringIO
from pathlib import Path

from fnet_search.base.units import percent
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.metric import ClassResult
from fnet_search.report.html_page import NONE, html_table, plain_table

Counts = Mapping[str, Sequence[int]]
"""By split (``training``, ``validation``, ``test``): the images of each class, in the order of the classes."""
Confusion = Sequence[tuple[int, int, int]]
"""Class, the class that the quint8 network predicts, and the number of images; pairs without images are left out."""

RARE = 10
"""A class with less than 1 / RARE of the training images of the largest one gets a warning."""
NAMED = 5
"""The most classes that a line names."""
SHOWN = 25
"""The most classes of a confusion matrix; with more classes, the rows of the tables."""


def counts_line(classes: Sequence[str], counts: Counts) -> str:
    """One line with the number of training images of each class; of many classes only the extremes."""
    training = list(zip(counts["training"], classes, strict=True))
    if len(classes) <= NAMED:
        return f"training images: {', '.join(f'{images:,} {name}' for images, name in training)}"
    (least, rarest), (most, largest) = min(training), max(training)
    return f"training images: {len(classes)} classes, from {least:,} ({rarest}) to {most:,} ({largest})"


def balance_warnings(classes: Sequence[str], counts: Counts) -> list[str]:
    """Warnings about the balance of a data set, a line each."""
    training = sorted(zip(counts["training"], classes, strict=True))
    most, largest = training[-1]
    few = [f"{name} ({images:,})" for images, name in training if 0 < images * RARE < most]
    lines = []
    if few:
        lines.append(
            f"less than a tenth of the {most:,} training images of {largest}: {_named(few)}; accuracy hides what "
            "becomes of them: see the metric balanced-accuracy and the class weights balanced"
        )
    for split, images in counts.items():
        if empty := [name for n, name in zip(images, classes, strict=True) if not n]:
            lines.append(f"no image in the {split} split: {_named(empty)}; nothing is known of them there")
    return lines


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


# The confusion matrix as a file


def confusion_csv(classes: Sequence[str], confusion: Confusion) -> str:
    """confusion.csv: a line for each pair of class and predicted class that has images."""
    text = StringIO()
    lines = writer(text, lineterminator="\n")
    lines.writerow(("class", "predicted", "images"))
    lines.writerows((classes[index], classes[predicted], images) for index, predicted, images in confusion)
    return text.getvalue()


def read_confusion(path: Path, classes: Sequence[str]) -> Confusion:
    """Inverse of `confusion_csv`; empty where the file is missing or of other classes."""
    place = {name: index for index, name in enumerate(classes)}
    try:
        with path.open(encoding="utf-8", newline="") as opened:
            return [(place[row["class"]], place[row["predicted"]], int(row["images"])) for row in DictReader(opened)]
    except (OSError, KeyError, TypeError, ValueError):
        return []


# The report


def classes_section(
    classes: Sequence[str], counts: Counts, measured: Evaluation | None, confusion: Confusion
) -> list[tuple[str, str]]:
    """Heading and HTML of the section on classes: the images of each class by split and, where `measured` has them, the
    winner's results for each class and its confusions. Empty for runs of versions that did not record this."""
    results = measured.classes if measured is not None else ()
    if not counts and not results:
        return []
    lines = balance_warnings(classes, counts) if counts else []
    warned = "".join(f'<p class="warning">{escape(f"{line[0].upper()}{line[1:]}.")}</p>' for line in lines)
    parts = [warned, _by_class(classes, counts, results, "" if measured is None else measured.split)]
    if confusion and measured is not None:
        parts.append(_matrix(classes, confusion, measured) if len(classes) <= SHOWN else _largest(classes, confusion))
    return [("Classes", "".join(parts))]


def _by_class(classes: Sequence[str], counts: Counts, results: Sequence[ClassResult], split: str) -> str:
    """A row for each class in order; of more than SHOWN classes only those with the lowest quint8 accuracy or, without
    results, the fewest images."""
    heads = [f"{name} images" for name in counts]
    order, intro = list(range(len(classes))), ""
    if len(classes) > SHOWN:
        worst: Sequence[float] = [_recall(result.quint8_right, result) for result in results] or counts["training"]
        order = sorted(order, key=worst.__getitem__)[:SHOWN]
        what = "lowest accuracy" if results else "fewest images"
        intro = f"The {SHOWN} of {len(classes):,} classes with the {what}. "
    if results:
        heads += ["fp32 %", "quint8 %", "predicted"]
        intro += f"The winner on the {split} split: the share of each class that is classified right, and how many "
        intro += "images of whatever class the quint8 network takes for it."
    rows = []
    for index in order:
        cells = [f"{images[index]:,}" for images in counts.values()]
        if results:
            result = results[index]
            cells += [_share(result.fp32_right, result), _share(result.quint8_right, result)]
            cells.append(f"{result.quint8_predicted:,}")
        rows.append(([classes[index]], cells))
    return (f'<p class="soft">{intro}</p>' if intro else "") + plain_table(["class"], heads, rows)


def _recall(right: int, result: ClassResult) -> float:
    """The share of a class that is right; 2, above all others, for a class without images."""
    return right / result.images if result.images else 2.0


def _share(right: int, result: ClassResult) -> str:
    return f"{100 * right / result.images:.2f}" if result.images else NONE


def _matrix(classes: Sequence[str], confusion: Confusion, measured: Evaluation) -> str:
    """The confusion matrix: rows are classes, columns predicted classes; a cell is the darker, the larger its share of
    the row."""
    by_pair = {(index, predicted): images for index, predicted, images in confusion}
    head = '<tr><th>class</th><th class="number turned">' + '</th><th class="number turned">'.join(map(escape, classes))
    rows = []
    for row, name in enumerate(classes):
        whole = sum(by_pair.get((row, column), 0) for column in range(len(classes))) or 1
        cells = []
        for column, other in enumerate(classes):
            images = by_pair.get((row, column), 0)
            share = images / whole
            title = f"{name} as {other}: {percent(share, 1)}"
            kind = "right" if row == column else "wrong"
            cells.append(
                f'<td class="number {kind}" style="--share:{round(100 * share)}%" title="{escape(title)}">'
                f"{f'{images:,}' if images else ''}</td>"
            )
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    intro = f"What the quint8 network takes the images of each class for ({measured.split} split, one row per class)."
    return f'<p class="soft">{intro}</p><div class="confusion">{html_table(f"{head}</th></tr>", rows)}</div>'


def _largest(classes: Sequence[str], confusion: Confusion) -> str:
    """The most frequent confusions."""
    whole: dict[int, int] = {}
    for index, _, images in confusion:
        whole[index] = whole.get(index, 0) + images
    wrong = sorted((entry for entry in confusion if entry[0] != entry[1]), key=lambda entry: -entry[2])[:SHOWN]
    rows = [
        ([classes[index], classes[predicted]], [f"{images:,}", f"{100 * images / whole[index]:.1f}"])
        for index, predicted, images in wrong
    ]
    intro = '<p class="soft">The most frequent confusions of the quint8 network; confusion.csv has all.</p>'
    return intro + plain_table(["class", "predicted"], ["images", "% of the class"], rows)
