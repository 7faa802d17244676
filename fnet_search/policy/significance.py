"""How sure an accuracy is, and which of two networks is better on the same images. No torch."""

from collections.abc import Iterable
from math import sqrt

import numpy as np
import numpy.typing as npt

from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.metric import MetricName
from fnet_search.policy.ranking import ranking

Counts = npt.NDArray[np.int64]
LEVEL = 0.95
"""Of intervals; two networks differ where chance alone gives such a difference in fewer than 1 - LEVEL of cases."""
DRAWS = 10_000
"""Of the test for balanced accuracy: its p-value of 0.05 has a standard error of 0.002."""


def as_bits(right: Iterable[bool]) -> str:
    """A bit an image, the first one the lowest, as a hexadecimal number: `Evaluation.right`."""
    digits = "".join("01"[one] for one in right)
    return f"{int(digits[::-1] or '0', 2):x}"


def interval(right: int, images: int) -> tuple[float, float]:
    """From where to where an accuracy, a fraction of 1, may be that was measured as so many of so many images: Wilson's
    score interval."""
    from scipy.stats import binomtest  # it takes half a second to import

    found = binomtest(right, images).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def balanced_interval(classes: Iterable[tuple[int, int]]) -> tuple[float, float]:
    """As `interval`, of balanced accuracy: so many of so many images, for each class.

    From the intervals (l, u) of the K classes' shares p, which are independent: below their mean lies
    sqrt(sum((p - l)^2)) / K, above it sqrt(sum((u - p)^2)) / K (Zou and Donner, 2008). Raises ValueError without
    images.
    """
    known = [(right / images, *interval(right, images)) for right, images in classes if images]
    if not known:
        raise ValueError("there are no images")
    mean = sum(share for share, _, _ in known) / len(known)
    below = sqrt(sum((share - low) ** 2 for share, low, _ in known)) / len(known)
    above = sqrt(sum((high - share) ** 2 for share, _, high in known)) / len(known)
    return mean - below, mean + above


def score_interval(one: Evaluation, metric: MetricName) -> tuple[float, float]:
    """`interval` or `balanced_interval` of the quint8 score of an evaluation that has images."""
    if metric == "accuracy":
        return interval(round((one.quint8_accuracy or 0.0) * one.images), one.images)
    return balanced_interval((it.quint8_right, it.images) for it in one.classes)


def wins(one: Evaluation, other: Evaluation) -> tuple[int, int]:
    """How many images only the one quint8 network classifies right, and how many only the other.

    Raises ValueError where they were not measured on the same images.
    """
    first, second = _bits(one, other)
    return (first & ~second).bit_count(), (second & ~first).bit_count()


def _bits(one: Evaluation, other: Evaluation, metric: MetricName = "accuracy") -> tuple[int, int]:
    if not comparable(one, other, metric):
        raise ValueError(f"candidates {one.number} and {other.number} were not measured on the same images")
    return int(one.right, 16), int(other.right, 16)


def comparable(one: Evaluation, other: Evaluation, metric: MetricName = "accuracy") -> bool:
    """Whether both say which of the same images they classify right; for balanced accuracy, of which classes."""
    same = bool(one.right and other.right) and (one.split, one.images) == (other.split, other.images)
    sizes, others = ([it.images for it in each.classes] for each in (one, other))
    return same and (metric == "accuracy" or (bool(sizes) and sizes == others))


def distinguishable(one: Evaluation, other: Evaluation, metric: MetricName = "accuracy") -> bool:
    """Whether chance does not explain the difference of two quint8 scores on the same images, two-sided.

    Of accuracies: McNemar's exact test. Balanced accuracies differ by the mean over classes of (b - w) / n, where of n
    images only the one classifies b right, only the other w. By chance alone b is binomial, b + w draws of 1/2 each:
    the p-value is the share of `DRAWS` such draws whose difference is at least as large, the same ones at each call.
    Raises ValueError where they are not `comparable`.
    """
    first, second = _bits(one, other, metric)
    better, worse, sizes, start = [], [], [], 0
    for size in [one.images] if metric == "accuracy" else [it.images for it in one.classes if it.images]:
        of_class = ((1 << size) - 1) << start
        better.append((first & ~second & of_class).bit_count())
        worse.append((second & ~first & of_class).bit_count())
        sizes.append(size)
        start += size
    return _p_value(np.array(better), np.array(worse), np.array(sizes)) < 1 - LEVEL


def _p_value(better: Counts, worse: Counts, sizes: Counts) -> float:
    """Each [classes]."""
    differing = better + worse > 0
    better, worse, sizes = better[differing], worse[differing], sizes[differing]
    discordant = better + worse
    if not len(sizes):
        return 1.0
    if len(set(sizes.tolist())) == 1:  # each image weighs the same
        from scipy.stats import binomtest

        return float(binomtest(int(better.sum()), int(discordant.sum())).pvalue)
    drawn = 2 * np.random.default_rng(0).binomial(discordant, 0.5, (DRAWS, len(sizes))) - discordant
    found = abs(float(((better - worse) / sizes).sum()))
    return float((np.abs((drawn / sizes).sum(1)) >= found - 1e-12).mean())


def undecided(winner: Evaluation, evaluations: Iterable[Evaluation], constraints: Constraints) -> list[Evaluation]:
    """The candidates that meet the constraints and cannot be told apart from the winner, fewest conv MACs first."""
    metric = constraints.metric
    ranked = [one for one in ranking(tuple(evaluations), constraints) if constraints.feasible(one)]
    others = [one for one in ranked if one.number != winner.number and comparable(one, winner, metric)]
    alike = [one for one in others if not distinguishable(one, winner, metric)]
    return sorted(alike, key=lambda one: one.cost.conv_macs)
