"""Metrics: accuracy, balanced accuracy, and the results by class that the latter is computed from. No torch."""

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
    """Results of one class: its images, how many of them each network classifies right, and for how many images of any
    class each network predicts it."""

    images: int
    fp32_right: int
    quint8_right: int
    fp32_predicted: int = 0
    quint8_predicted: int = 0
    name: str = ""


def score(metric: MetricName, counts: Iterable[tuple[int, int]]) -> float | None:
    """The score, a fraction of 1, from (right, images) of each class.

    Accuracy is the share of all images that are right. Balanced accuracy is the mean recall of the classes that have
    images: 1 / classes for a network that always predicts the same class. None without images.
    """
    nonempty = [(right, images) for right, images in counts if images]
    if not nonempty:
        return None
    if metric == "accuracy":
        return sum(right for right, _ in nonempty) / sum(images for _, images in nonempty)
    return fmean(right / images for right, images in nonempty)


@lru_cache(maxsize=4096)
def exact(share: float, images: int = 0) -> Fraction:
    """The fraction that a rounded share stands for: a count divided by `images`, if they are given and it is close to
    one; else the nearest fraction with a denominator up to 10^9, exact for ``0.05`` and ``2 / 3``."""
    count = round(share * images)
    counted = images and abs(share * images - count) < 0.01  # some hosts average in float32
    return Fraction(count, images) if counted else Fraction(share).limit_denominator(10**9)


class Scores(NamedTuple):
    """Scores of a float network and its quantized one under one metric: fractions of 1, None if not known."""

    fp32: float | None
    quint8: float | None

    @property
    def relative_drop(self) -> float | None:
        """(fp32 - quint8) / fp32."""
        if not self.fp32 or self.quint8 is None:
            return None
        return (self.fp32 - self.quint8) / self.fp32


class Scored:
    """Base of measurements on the images of a split; gives their scores under any metric."""

    fp32_accuracy: float | None
    quint8_accuracy: float | None
    images: int
    classes: tuple[ClassResult, ...]

    @property
    def fp32_balanced_accuracy(self) -> float | None:
        """See `score`. None, as for `quint8_balanced_accuracy`, if results by class are not known."""
        return score("balanced-accuracy", ((result.fp32_right, result.images) for result in self.classes))

    @property
    def quint8_balanced_accuracy(self) -> float | None:
        return score("balanced-accuracy", ((result.quint8_right, result.images) for result in self.classes))

    def scores(self, metric: MetricName) -> Scores:
        if metric == "accuracy":
            return Scores(self.fp32_accuracy, self.quint8_accuracy)
        return Scores(self.fp32_balanced_accuracy, self.quint8_balanced_accuracy)

    def exact_scores(self, metric: MetricName) -> tuple[Fraction | None, Fraction | None]:
        """`scores` as exact fractions, so that a value at a limit meets it."""
        if metric == "accuracy":
            fp32, quint8 = (None if share is None else exact(share, self.images) for share in self.scores(metric))
            return fp32, quint8
        nonempty = [result for result in self.classes if result.images]
        if not nonempty:
            return None, None
        fp32 = sum((Fraction(result.fp32_right, result.images) for result in nonempty), Fraction()) / len(nonempty)
        quint8 = sum((Fraction(result.quint8_right, result.images) for result in nonempty), Fraction()) / len(nonempty)
        return fp32, quint8

    def effective_images(self, metric: MetricName) -> float:
        """The number of images on which plain accuracy would have the sampling noise of this score; 0 if not known.

        For balanced accuracy over K classes of n_k images it is K^2 / sum(1 / n_k), because all classes weigh the same.
        """
        if metric == "accuracy":
            return self.images
        sizes = [result.images for result in self.classes if result.images]
        return len(sizes) ** 2 / (sum(1 / size for size in sizes) or inf)

    @property
    def uneven(self) -> bool:
        """Whether the largest class has more than twice the images of the smallest one, which makes accuracy
        misleading."""
        images = [result.images for result in self.classes]
        return bool(images) and max(images) > 2 * min(images)

    @property
    def constant(self) -> str:
        """Says which class a network predicts for every image, if it does; else empty."""
        constant: dict[str, list[str]] = {}
        for network in ("fp32", "quint8"):
            predicted = [result.name for result in self.classes if getattr(result, f"{network}_predicted")]
            if len(predicted) == 1:
                constant.setdefault(predicted[0], []).append(network)
        remarks = []
        for name, networks in constant.items():
            verb = "predicts" if len(networks) == 1 else "predict"
            remarks.append(f"{' and '.join(networks)} {verb} class {name!r} for every image")
        return ", ".join(remarks)
