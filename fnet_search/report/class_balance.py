"""Class balance: how many images each class has, and what the winner makes of each, for terminal and report."""

from collections.abc import Mapping, Sequence
from csv import DictReader, writer
from html import escape
from io import StringIO
from pathlib import Path

from fnet_search.base.units import percent
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.metric import ClassResult
from fnet_search.report.html_page import NONE, plain_table, table

Counts = Mapping[str, Sequence[int]]
"""By split (``training``, ``validation``, ``test``): the images of each class, in the order of the classes."""
Confusion = Sequence[tuple[int, int, int]]
"""Class, the class that the quint8 network predicts, and how many images: those pairs that have any."""

FEW = 10
"""A class is warned of that has fewer than the FEW-th part of the largest one's training images."""
NAMED = 5
"""Classes that a line names."""
SHOWN = 25
"""Classes of a whole confusion matrix, and lines of the tables where there are more."""


def counts_line(classes: Sequence[str], counts: Counts) -> str:
    """How many training images the classes have, in a line: of many the extremes."""
    training = list(zip(counts["training"], classes, strict=True))
    if len(classes) <= NAMED:
        return f"training images: {', '.join(f'{images:,} {name}' for images, name in training)}"
    (least, rarest), (most, largest) = min(training), max(training)
    return f"training images: {len(classes)} classes, from {least:,} ({rarest}) to {most:,} ({largest})"


def warnings(classes: Sequence[str], counts: Counts) -> list[str]:
    """What is wrong with the balance of a data set, a line each."""
    training = sorted(zip(counts["training"], classes, strict=True))
    most, largest = training[-1]
    few = [f"{name} ({images:,})" for images, name in training if 0 < images * FEW < most]
    found = []
    if few:
        found.append(
            f"less than a tenth of the {most:,} training images of {largest}: {_named(few)}; accuracy hides what "
            "becomes of them: see the metric balanced-accuracy and the class weights balanced"
        )
    for split, images in counts.items():
        if empty := [name for n, name in zip(images, classes, strict=True) if not n]:
            found.append(f"no image in the {split} split: {_named(empty)}; nothing is known of them there")
    return found


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


# The confusion matrix as a file


def confusion_csv(classes: Sequence[str], confusion: Confusion) -> str:
    """One line a pair of a class and the one that is predicted, which has images."""
    text = StringIO()
    lines = writer(text, lineterminator="\n")
    lines.writerow(("class", "predicted", "images"))
    lines.writerows((classes[one], classes[other], images) for one, other, images in confusion)
    return text.getvalue()


def read_confusion(path: Path, classes: Sequence[str]) -> Confusion:
    """Inverse of `confusion_csv`; nothing where the file is missing or not one of these classes."""
    place = {name: index for index, name in enumerate(classes)}
    try:
        with path.open(encoding="utf-8", newline="") as opened:
            return [(place[row["class"]], place[row["predicted"]], int(row["images"])) for row in DictReader(opened)]
    except (OSError, KeyError, TypeError, ValueError):
        return []


# The report


def section(
    classes: Sequence[str], counts: Counts, measured: Evaluation | None, confusion: Confusion
) -> list[tuple[str, str]]:
    """Heading and HTML: the images of each class, by split; where `measured` has them, the results of the winner by
    class, and what it takes for what. Nothing of what an earlier version has not recorded."""
    results = measured.classes if measured is not None else ()
    if not counts and not results:
        return []
    said = warnings(classes, counts) if counts else []
    warned = "".join(f'<p class="warning">{escape(f"{one[0].upper()}{one[1:]}.")}</p>' for one in said)
    parts = [warned, _by_class(classes, counts, results, "" if measured is None else measured.split)]
    if confusion and measured is not None:
        parts.append(_matrix(classes, confusion, measured) if len(classes) <= SHOWN else _pairs(classes, confusion))
    return [("Classes", "".join(parts))]


def _by_class(classes: Sequence[str], counts: Counts, results: Sequence[ClassResult], split: str) -> str:
    """Classes in their order; of more than SHOWN those with the lowest quint8 accuracy, or else the fewest images."""
    heads = [f"{name} images" for name in counts]
    order, intro = list(range(len(classes))), ""
    if len(classes) > SHOWN:
        worst: Sequence[float] = [_recall(one.quint8_right, one) for one in results] or counts["training"]
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
            one = results[index]
            cells += [_share(one.fp32_right, one), _share(one.quint8_right, one), f"{one.quint8_predicted:,}"]
        rows.append(([classes[index]], cells))
    return (f'<p class="soft">{intro}</p>' if intro else "") + plain_table(["class"], heads, rows)


def _recall(right: int, one: ClassResult) -> float:
    """Of a class without images above all others."""
    return right / one.images if one.images else 2.0


def _share(right: int, one: ClassResult) -> str:
    return f"{100 * right / one.images:.2f}" if one.images else NONE


def _matrix(classes: Sequence[str], confusion: Confusion, measured: Evaluation) -> str:
    """Rows are the classes, columns what is predicted; the darker, the larger a share of the row."""
    found = {(one, other): images for one, other, images in confusion}
    head = '<tr><th>class</th><th class="number turned">' + '</th><th class="number turned">'.join(map(escape, classes))
    rows = []
    for row, name in enumerate(classes):
        whole = sum(found.get((row, column), 0) for column in range(len(classes))) or 1
        cells = []
        for column, other in enumerate(classes):
            images = found.get((row, column), 0)
            share = images / whole
            title = f"{name} as {other}: {percent(share, 1)}"
            kind = "right" if row == column else "wrong"
            cells.append(
                f'<td class="number {kind}" style="--share:{round(100 * share)}%" title="{escape(title)}">'
                f"{f'{images:,}' if images else ''}</td>"
            )
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    intro = f"What the quint8 network takes the images of each class for ({measured.split} split, one row per class)."
    return f'<p class="soft">{intro}</p><div class="confusion">{table(f"{head}</th></tr>", rows)}</div>'


def _pairs(classes: Sequence[str], confusion: Confusion) -> str:
    """The most frequent confusions."""
    whole: dict[int, int] = {}
    for one, _, images in confusion:
        whole[one] = whole.get(one, 0) + images
    wrong = sorted((found for found in confusion if found[0] != found[1]), key=lambda found: -found[2])[:SHOWN]
    rows = [
        ([classes[one], classes[other]], [f"{images:,}", f"{100 * images / whole[one]:.1f}"])
        for one, other, images in wrong
    ]
    intro = '<p class="soft">The most frequent confusions of the quint8 network; confusion.csv has all.</p>'
    return intro + plain_table(["class", "predicted"], ["images", "% of the class"], rows)
