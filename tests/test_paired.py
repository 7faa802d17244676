"""How sure an accuracy is: intervals, and two networks on the same images."""

from dataclasses import replace
from math import comb, sqrt

import pytest

from fnet_search.macro import load_space
from fnet_search.paired import as_bits, comparable, distinguishable, interval, undecided, wins
from fnet_search.plan import regular
from fnet_search.policy import Constraints, Evaluation
from tests.evaluations import trained

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
