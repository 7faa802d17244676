"""Which score of a network counts: its accuracy, or its balanced accuracy; and the results by class that the latter is
taken from. No torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import inf
from statistics import fmean
from typing import Literal, NamedTuple

MetricName = Literal["accuracy", "balanced-accuracy"]


@dataclass(frozen=True, slots=True)
class ClassResult:
    """Of one class: how many images there are, how many of them each network classifies right, and how many images of
    whatever class each network takes for it."""

    images: int
    fp32_right: int
    quint8_right: int
    fp32_predicted: int = 0
    quint8_predicted: int = 0
    name: str = ""


def score(metric: MetricName, counts: Iterable[tuple[int, int]]) -> float | None:
    """A fraction of 1, from the images of each class: how many are classified right, of how many.

    Accuracy is the share of all images; balanced accuracy the mean of the shares (recalls) of the classes that have
    images: 1 / classes for a network that always answers the same. None: there are no images.
    """
    known = [(right, images) for right, images in counts if images]
    if not known:
        return None
    if metric == "accuracy":
        return sum(right for right, _ in known) / sum(images for _, images in known)
    return fmean(right / images for right, images in known)


@lru_cache(maxsize=4096)
def exact(share: float, images: int = 0) -> Fraction:
    """The fraction of 1 that a float stands for: so many of the images; where their number is not known, or the share
    is no count of them, the nearest of a small denominator, which both ``0.05`` and ``2 / 3`` have."""
    count = round(share * images)
    counted = images and abs(share * images - count) < 0.01  # some hosts average in float32
    return Fraction(count, images) if counted else Fraction(share).limit_denominator(10**9)


class Scores(NamedTuple):
    """Of a float network and its quantized one under one metric; fractions of 1, None where not known."""

    fp32: float | None
    quint8: float | None

    @property
    def relative_drop(self) -> float | None:
        """(fp32 - quint8) / fp32."""
        if not self.fp32 or self.quint8 is None:
            return None
        return (self.fp32 - self.quint8) / self.fp32


class Scored:
    """What was measured on the images of a split, under any metric."""

    fp32_accuracy: float | None
    quint8_accuracy: float | None
    images: int
    classes: tuple[ClassResult, ...]

    @property
    def fp32_balanced_accuracy(self) -> float | None:
        """See `score`. None: results by class are not known; as of `quint8_balanced_accuracy`."""
        return score("balanced-accuracy", ((one.fp32_right, one.images) for one in self.classes))

    @property
    def quint8_balanced_accuracy(self) -> float | None:
        return score("balanced-accuracy", ((one.quint8_right, one.images) for one in self.classes))

    def scores(self, metric: MetricName) -> Scores:
        if metric == "accuracy":
            return Scores(self.fp32_accuracy, self.quint8_accuracy)
        return Scores(self.fp32_balanced_accuracy, self.quint8_balanced_accuracy)

    def exact_scores(self, metric: MetricName) -> tuple[Fraction | None, Fraction | None]:
        """`scores` as the fractions that the images count: at a limit is met."""
        if metric == "accuracy":
            fp32, quint8 = (None if one is None else exact(one, self.images) for one in self.scores(metric))
            return fp32, quint8
        known = [one for one in self.classes if one.images]
        if not known:
            return None, None
        fp32 = sum((Fraction(one.fp32_right, one.images) for one in known), Fraction()) / len(known)
        quint8 = sum((Fraction(one.quint8_right, one.images) for one in known), Fraction()) / len(known)
        return fp32, quint8

    def effective_images(self, metric: MetricName) -> float:
        """On how many images an accuracy has the sampling noise of the score; 0: not known.

        Balanced accuracy over K classes of n_k images has that of K^2 / sum(1 / n_k) images: each class counts alike.
        """
        if metric == "accuracy":
            return self.images
        sizes = [one.images for one in self.classes if one.images]
        return len(sizes) ** 2 / (sum(1 / size for size in sizes) or inf)

    @property
    def uneven(self) -> bool:
        """Whether the largest class has more than twice the images of the smallest one: then accuracy says less."""
        images = [one.images for one in self.classes]
        return bool(images) and max(images) > 2 * min(images)

    @property
    def constant(self) -> str:
        """Says which class a network predicts for every image, where it does: it tells nothing apart. Else empty."""
        found: dict[str, list[str]] = {}
        for network in ("fp32", "quint8"):
            taken = [one.name for one in self.classes if getattr(one, f"{network}_predicted")]
            if len(taken) == 1:
                found.setdefault(taken[0], []).append(network)
        said = []
        for name, networks in found.items():
            verb = "predicts" if len(networks) == 1 else "predict"
            said.append(f"{' and '.join(networks)} {verb} class {name!r} for every image")
        return ", ".join(said)
