"""How sure an accuracy is, and which of two networks is better on the same images. No torch."""

from collections.abc import Iterable

from scipy.stats import binomtest

from fnet_search.policy import Constraints, Evaluation, ranking

LEVEL = 0.95
"""Of intervals; two networks differ where chance alone gives such a difference in fewer than 1 - LEVEL of cases."""


def as_bits(right: Iterable[bool]) -> str:
    """A bit an image, the first one the lowest, as a hexadecimal number: `Evaluation.right`."""
    digits = "".join("01"[one] for one in right)
    return f"{int(digits[::-1] or '0', 2):x}"


def interval(right: int, images: int) -> tuple[float, float]:
    """From where to where an accuracy, a fraction of 1, may be that was measured as so many of so many images: Wilson's
    score interval."""
    found = binomtest(right, images).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def wins(one: Evaluation, other: Evaluation) -> tuple[int, int]:
    """How many images only the one quint8 network classifies right, and how many only the other.

    Raises ValueError where they were not measured on the same images.
    """
    if not comparable(one, other):
        raise ValueError(f"candidates {one.number} and {other.number} were not measured on the same images")
    first, second = int(one.right, 16), int(other.right, 16)
    return (first & ~second).bit_count(), (second & ~first).bit_count()


def comparable(one: Evaluation, other: Evaluation) -> bool:
    """Whether both say which of the same images they classify right."""
    return bool(one.right and other.right) and (one.split, one.images) == (other.split, other.images)


def distinguishable(one: Evaluation, other: Evaluation) -> bool:
    """Whether chance does not explain the difference of two quint8 accuracies on the same images (McNemar's exact test,
    two-sided). Raises ValueError as `wins`."""
    better, worse = wins(one, other)
    return better + worse > 0 and bool(binomtest(better, better + worse).pvalue < 1 - LEVEL)


def undecided(winner: Evaluation, evaluations: Iterable[Evaluation], constraints: Constraints) -> list[Evaluation]:
    """The candidates that meet the constraints and cannot be told apart from the winner, fewest conv MACs first."""
    ranked = [one for one in ranking(tuple(evaluations), constraints) if constraints.feasible(one)]
    others = [one for one in ranked if one.number != winner.number and comparable(one, winner)]
    alike = [one for one in others if not distinguishable(one, winner)]
    return sorted(alike, key=lambda one: one.cost.conv_macs)
