"""Confidence intervals of accuracies, and tests whether two networks differ on the same images. No torch."""

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
"""Confidence level of intervals; two networks differ if the p-value of their test is below 1 - LEVEL."""
DRAWS = 10_000
"""Draws of the test for balanced accuracy: a p-value of 0.05 then has a standard error of 0.002."""


def as_bits(right: Iterable[bool]) -> str:
    """One bit per image, the first image lowest, as a hexadecimal number: the form of `Evaluation.right`."""
    digits = "".join("01"[bit] for bit in right)
    return f"{int(digits[::-1] or '0', 2):x}"


def interval(right: int, images: int) -> tuple[float, float]:
    """Wilson's score interval of an accuracy, a fraction of 1, measured as `right` of `images`."""
    from scipy.stats import binomtest  # takes half a second to import

    wilson = binomtest(right, images).proportion_ci(LEVEL, method="wilson")
    return float(wilson.low), float(wilson.high)


def balanced_interval(classes: Iterable[tuple[int, int]]) -> tuple[float, float]:
    """The interval of a balanced accuracy, from (right, images) of each class.

    Combines the intervals (l, u) of the recalls p of K independent classes: the interval reaches
    sqrt(sum((p - l)^2)) / K below the mean recall and sqrt(sum((u - p)^2)) / K above it (Zou and Donner, 2008). Raises
    ValueError without images.
    """
    nonempty = [(right / images, *interval(right, images)) for right, images in classes if images]
    if not nonempty:
        raise ValueError("there are no images")
    mean = sum(share for share, _, _ in nonempty) / len(nonempty)
    below = sqrt(sum((share - low) ** 2 for share, low, _ in nonempty)) / len(nonempty)
    above = sqrt(sum((high - share) ** 2 for share, _, high in nonempty)) / len(nonempty)
    return mean - below, mean + above


def score_interval(evaluation: Evaluation, metric: MetricName) -> tuple[float, float]:
    """`interval` or `balanced_interval` of the quint8 score of an evaluation that has images."""
    if metric == "accuracy":
        return interval(round((evaluation.quint8_accuracy or 0.0) * evaluation.images), evaluation.images)
    return balanced_interval((result.quint8_right, result.images) for result in evaluation.classes)


def wins(first: Evaluation, second: Evaluation) -> tuple[int, int]:
    """How many images only the first quint8 network classifies right, and how many only the second.

    Raises ValueError if they were not measured on the same images.
    """
    first_bits, second_bits = _bits(first, second)
    return (first_bits & ~second_bits).bit_count(), (second_bits & ~first_bits).bit_count()


def _bits(first: Evaluation, second: Evaluation, metric: MetricName = "accuracy") -> tuple[int, int]:
    if not comparable(first, second, metric):
        raise ValueError(f"candidates {first.number} and {second.number} were not measured on the same images")
    return int(first.right, 16), int(second.right, 16)


def comparable(first: Evaluation, second: Evaluation, metric: MetricName = "accuracy") -> bool:
    """Whether it is known which of the same images both classify right; for balanced accuracy, by class."""
    same = bool(first.right and second.right) and (first.split, first.images) == (second.split, second.images)
    sizes, others = ([result.images for result in evaluation.classes] for evaluation in (first, second))
    return same and (metric == "accuracy" or (bool(sizes) and sizes == others))


def distinguishable(first: Evaluation, second: Evaluation, metric: MetricName = "accuracy") -> bool:
    """Whether two quint8 scores on the same images differ significantly, by a two-sided test.

    Accuracies: McNemar's exact test. Balanced accuracies differ by the mean over classes of (b - w) / n, where of n
    images only the first network classifies b right and only the second w. Under the null hypothesis b is binomial with
    b + w trials of probability 1/2. The p-value is the share of DRAWS such draws, the same ones at each call, whose
    difference is at least as large. Raises ValueError unless the evaluations are `comparable`.
    """
    first_bits, second_bits = _bits(first, second, metric)
    better, worse, sizes, start = [], [], [], 0
    by_class = [result.images for result in first.classes if result.images]
    for size in [first.images] if metric == "accuracy" else by_class:  # `Evaluation.right` is ordered by class
        of_class = ((1 << size) - 1) << start
        better.append((first_bits & ~second_bits & of_class).bit_count())
        worse.append((second_bits & ~first_bits & of_class).bit_count())
        sizes.append(size)
        start += size
    return _p_value(np.array(better), np.array(worse), np.array(sizes)) < 1 - LEVEL


def _p_value(better: Counts, worse: Counts, sizes: Counts) -> float:
    """The p-value of `distinguishable`; `better`, `worse` and `sizes` are its b, w and n, [classes]."""
    differing = better + worse > 0
    better, worse, sizes = better[differing], worse[differing], sizes[differing]
    discordant = better + worse
    if not len(sizes):
        return 1.0
    if len(set(sizes.tolist())) == 1:  # all images weigh the same
        from scipy.stats import binomtest

        return float(binomtest(int(better.sum()), int(discordant.sum())).pvalue)
    drawn = 2 * np.random.default_rng(0).binomial(discordant, 0.5, (DRAWS, len(sizes))) - discordant
    measured = abs(float(((better - worse) / sizes).sum()))
    return float((np.abs((drawn / sizes).sum(1)) >= measured - 1e-12).mean())


def undecided(winner: Evaluation, evaluations: Iterable[Evaluation], constraints: Constraints) -> list[Evaluation]:
    """The feasible candidates that do not differ significantly from the winner, fewest conv MACs first."""
    metric = constraints.metric
    ranked = [rival for rival in ranking(tuple(evaluations), constraints) if constraints.feasible(rival)]
    others = [rival for rival in ranked if rival.number != winner.number and comparable(rival, winner, metric)]
    alike = [rival for rival in others if not distinguishable(rival, winner, metric)]
    return sorted(alike, key=lambda rival: rival.cost.conv_macs)
