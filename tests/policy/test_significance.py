"""How sure an accuracy is: intervals, and two networks on the same images."""

from dataclasses import replace
from itertools import product
from math import comb, sqrt

import pytest

from fnet_search.arch.plan import regular
from fnet_search.importing.spaces import load_space
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.metric import ClassResult
from fnet_search.policy.significance import (
    as_bits,
    balanced_interval,
    comparable,
    distinguishable,
    interval,
    undecided,
    wins,
)
from tests.support.evaluations import trained

SPACE = load_space("tiny")


def network(right: str, number: int = 0, macs: int = 0) -> Evaluation:
    """Of the images, those marked with 1 are classified right."""
    accuracy = right.count("1") / len(right)
    made = trained(SPACE, regular(SPACE), number, 1.0, accuracy)
    cost = replace(made.cost, conv_macs=made.cost.conv_macs + macs)
    return replace(made, images=len(right), right=as_bits(bit == "1" for bit in right), cost=cost)


def test_bits() -> None:
    assert as_bits([True, False, False, False, True]) == f"{1 + 16:x}"
    assert as_bits([False, False]) == "0"
    assert as_bits([]) == "0"


def test_interval_is_wilsons_score() -> None:
    z, n, p = 1.959963984540054, 287, 284 / 287
    centre, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = [(centre + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    assert interval(284, 287) == pytest.approx(expected)
    assert interval(0, 10)[0] == 0
    assert interval(10, 10)[1] == 1


def test_wins_count_the_images_that_only_one_gets_right() -> None:
    assert wins(network("11100"), network("00110")) == (2, 1)
    assert wins(network("00000"), network("11111")) == (0, 5)


def test_other_images_are_not_compared() -> None:
    one = network("1101")
    assert comparable(one, one)
    for other in (network("11010"), replace(one, split="test"), replace(one, right="")):
        assert not comparable(one, other)
        with pytest.raises(ValueError, match="not measured on the same images"):
            wins(one, other)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (3, 0), (5, 0), (6, 0), (9, 1), (8, 2), (60, 40), (61, 39)])
def test_a_difference_counts_where_chance_gives_it_in_fewer_than_one_of_twenty_cases(better: int, worse: int) -> None:
    n = better + worse
    tail = sum(comb(n, k) for k in range(worse + 1)) / 2**n
    one, other = network("1" * better + "0" * worse + "1" * 50), network("0" * better + "1" * worse + "1" * 50)
    assert distinguishable(one, other) == (2 * tail < 0.05)
    assert distinguishable(other, one) == distinguishable(one, other)


def test_those_that_cannot_be_told_apart_are_named_cheapest_first() -> None:
    best = network("1" * 100)
    cheap, cheaper = network("1" * 97 + "000", 1, macs=-2), network("1" * 95 + "00000", 2, macs=-3)
    worse, unlike = network("1" * 90 + "0" * 10, 3, macs=-4), replace(network("1" * 99 + "0", 4), right="")
    everything = (worse, cheap, best, unlike, cheaper)
    assert undecided(best, everything, Constraints()) == [cheaper, cheap]
    assert undecided(best, everything, Constraints(min_quint8=0.96)) == [cheap]


def classified(*classes: tuple[str, str]) -> tuple[Evaluation, Evaluation]:
    """Two networks; of each class, the images that the one and the other get right."""
    both = []
    for which in (0, 1):
        made = network("".join(of[which] for of in classes))
        counts = tuple(ClassResult(len(of[which]), 0, of[which].count("1")) for of in classes)
        both.append(replace(made, number=which, classes=counts))
    return both[0], both[1]


def test_the_interval_of_one_class_is_that_of_an_accuracy() -> None:
    assert balanced_interval([(284, 287), (0, 0)]) == pytest.approx(interval(284, 287))


def test_the_interval_of_balanced_accuracy_is_as_wide_as_its_small_classes_say() -> None:
    low, high = balanced_interval([(500, 600), (5, 8)])
    (low_1, high_1), (low_2, high_2) = interval(500, 600), interval(5, 8)
    mean = (500 / 600 + 5 / 8) / 2
    assert mean - low == pytest.approx(sqrt((500 / 600 - low_1) ** 2 + (5 / 8 - low_2) ** 2) / 2)
    assert high - mean == pytest.approx(sqrt((high_1 - 500 / 600) ** 2 + (high_2 - 5 / 8) ** 2) / 2)
    assert high - low > (high_2 - low_2) / 2
    with pytest.raises(ValueError, match="no images"):
        balanced_interval([(0, 0)])


def p_value(one: Evaluation, other: Evaluation, sizes: list[int]) -> float:
    """Of the difference of balanced accuracies: every image that only one gets right may as well be the other's."""
    first, second, weights, signs, start = int(one.right, 16), int(other.right, 16), [], [], 0
    for size in sizes:
        for image in range(start, start + size):
            if (sign := (first >> image & 1) - (second >> image & 1)) != 0:
                weights.append(1 / size)
                signs.append(sign)
        start += size
    found = abs(sum(sign * weight for sign, weight in zip(signs, weights, strict=True)))
    sums = [abs(sum(s * w for s, w in zip(way, weights, strict=True))) for way in product((-1, 1), repeat=len(weights))]
    return sum(it >= found - 1e-12 for it in sums) / len(sums)


@pytest.mark.parametrize(
    ("classes", "distinguished"),
    [
        ([("1" * 40, "1" * 40), ("1110", "0000")], False),  # three of the small class: chance gives that in 1 of 4
        ([("1" * 38 + "00", "1" * 40), ("11111111", "00000001")], True),
        ([("0" * 6 + "1" * 34, "1" * 40), ("1111000", "0001000")], False),  # better in one class, worse in the other
        ([("1" * 8 + "0" * 32, "0" * 40), ("111", "000")], True),
        ([("1" * 40, "1" * 40), ("111", "111")], False),
    ],
)
def test_balanced_accuracies_are_compared_by_class(classes: list[tuple[str, str]], distinguished: bool) -> None:
    one, other = classified(*classes)
    exact = p_value(one, other, [len(of[0]) for of in classes])
    assert abs(exact - 0.05) > 0.01, "so that draws decide as all cases do"
    assert (exact < 0.05) == distinguished
    assert distinguishable(one, other, "balanced-accuracy") == distinguished
    assert distinguishable(other, one, "balanced-accuracy") == distinguished


@pytest.mark.parametrize(("better", "worse"), [(5, 0), (6, 0), (9, 1), (8, 2)])
def test_with_equal_classes_balanced_accuracy_is_accuracy(better: int, worse: int) -> None:
    one, other = classified(
        ("1" * better + "0" * (20 - better), "0" * 20), ("0" * worse + "1" * (20 - worse), "1" * 20)
    )
    assert distinguishable(one, other, "balanced-accuracy") == distinguishable(one, other)


def test_a_rare_class_decides_between_networks_of_balanced_accuracy_only() -> None:
    """98 of 100 images of the large class against 90, but none of the rare one's 12 against ten."""
    common, rare = classified(("1" * 98 + "00", "1" * 90 + "0" * 10), ("0" * 12, "1" * 10 + "00"))
    balanced = Constraints(metric="balanced-accuracy")
    assert not distinguishable(common, rare)
    assert distinguishable(common, rare, "balanced-accuracy")
    assert undecided(rare, (common, rare), Constraints()) == [common]
    assert undecided(rare, (common, rare), balanced) == []
    assert not comparable(common, replace(rare, classes=()), "balanced-accuracy")
    with pytest.raises(ValueError, match="not measured on the same images"):
        distinguishable(common, replace(rare, classes=()), "balanced-accuracy")
