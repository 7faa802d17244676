from fractions import Fraction
from math import ceil

import numpy as np
import pytest
import torch
from networks import MIXED, REUSED, batches_of, normal, randomized, sequence
from torch import Tensor

from fnet_search.errors import FnetError
from fnet_search.fold import FoldedNetwork, fold
from fnet_search.macro import INPUT, Activation, BatchNorm, Conv, Dense, Flatten, Pool
from fnet_search.network import walk
from fnet_search.ranges import RangeMethod, TensorStats, calibrate, carriers, parse_ranges


@pytest.mark.parametrize(
    ("text", "percentile", "shown"),
    [
        ("minmax", 0, "minmax"),
        ("percentile:0", 0, "minmax"),
        ("percentile:1", 1, "percentile:1"),
        ("percentile:0.1", Fraction(1, 10), "percentile:0.1"),
        ("percentile:0.000001", Fraction(1, 10**6), "percentile:1e-06"),
        ("percentile:49", 49, "percentile:49"),
        ("percentile:49.999", Fraction(49_999, 1000), "percentile:49.999"),
        ("percentile:02.50", Fraction(5, 2), "percentile:2.5"),
    ],
)
def test_methods(text: str, percentile: Fraction, shown: str) -> None:
    method = parse_ranges(text)
    assert method == RangeMethod(Fraction(percentile))
    assert str(method) == shown


def test_the_papers_method_is_the_default() -> None:
    assert RangeMethod() == parse_ranges("percentile:1")


@pytest.mark.parametrize(
    "text",
    [
        *("", "min-max", "MinMax", "percentile", "percentile:", "percentile:50", "percentile:99", "percentile:-1"),
        *("percentile:nan", "percentile:inf", "percentile:1%", "percentile:1e-1", "percentile: 1", "percentile:.5"),
    ],
)
def test_unknown_methods(text: str) -> None:
    with pytest.raises(FnetError, match=r"write minmax or percentile:P with 0 <= P < 50, as in percentile:0\.1"):
        parse_ranges(text)


def test_which_tensor_carries_the_parameters() -> None:
    assert carriers(fold(randomized(MIXED)).network) == {
        INPUT: INPUT,
        "stem": "stem.act",  # a ReLU that alone reads a layer is part of it
        "stem.act": "stem.act",
        "grouped": "grouped",
        "sum": "sum.act",
        "sum.act": "sum.act",
        "two": "two",  # two readers
        "two.norm": "two.norm",
        "two.swish": "two.swish",
        "joined": "joined",
        "average": "average",
        "average.norm": "average.act",
        "average.act": "average.act",
        "most": "average.act",  # max pooling keeps codes
        "deep": "deep",  # SiLU does not only clip
        "deep.act": "deep.act",
        "gap": "gap",
        "flat": "gap",  # so does flatten
        "dense": "dense.act",
        "dense.act": "dense.act",
        "last.norm": "last.norm",
        "out": "out",
    }


def test_more_carriers() -> None:
    assert carriers(REUSED) == {
        INPUT: INPUT,
        "c": "c",
        "p": "c",
        "r": "r",  # a ReLU after max pooling has its own
        "again": "again",  # and so has one after a ReLU
        "both": "both.act",
        "both.act": "both.act",
        "seen": "seen",  # two readers
        "wide": "wide",
        "other": "other",
        "end": "end",
        "pool": "pool.act",
        "pool.act": "pool.act",
        "flat": "pool.act",
    }


def test_max_pooling_of_the_input_keeps_its_codes() -> None:
    space = sequence((3, 8, 8), p=Pool(), f=Flatten(), d=Dense(2), r=Activation())
    assert carriers(space) == {INPUT: INPUT, "p": INPUT, "f": INPUT, "d": "r", "r": "r"}


def nearest_rank(values: Tensor, percentile: Fraction) -> tuple[float, float]:
    """The order statistics of rank ceil(p n) and ceil((1 - p) n)."""
    ordered = np.sort(values.numpy(), axis=None)
    low, high = (max(1, ceil(share * ordered.size)) for share in (percentile / 100, 1 - percentile / 100))
    return float(ordered[low - 1]), float(ordered[high - 1])


PERCENTILES = [Fraction(text) for text in ("0.000001", "0.1", "1", "2.5", "12.34", "49", "49.999999")]


@pytest.mark.parametrize("percentile", PERCENTILES, ids=str)
def test_percentiles_are_exact(percentile: Fraction) -> None:
    folded = fold(randomized(MIXED))
    batches = [normal(size, *MIXED.input_shape, seed=size) * scale for size, scale in ((5, 1.0), (1, 9.0), (17, 0.1))]
    found = calibrate(folded, batches_of(*batches), RangeMethod(percentile))
    carrier = carriers(folded.network)
    assert found.keys() == set(carrier.values())
    seen: dict[str, list[Tensor]] = {name: [] for name in found}
    for batch in batches:
        seen[INPUT].append(batch)
        for node, output in walk(folded.network, batch, folded.apply_node):
            if node.name in seen:
                seen[node.name].append(output)
    for name, tensors in seen.items():
        whole, stats = torch.cat(tensors), found[name]
        ends = (float(whole.min()), float(whole.max()))
        expected = ends if name in (INPUT, "out") else nearest_rank(whole, percentile)
        assert (stats.low, stats.high) == expected, name
        assert torch.equal(stats.channel_min, whole.transpose(0, 1).flatten(1).amin(1))
        assert torch.equal(stats.channel_max, whole.transpose(0, 1).flatten(1).amax(1))
        assert stats.sparsity == float((whole == 0).sum()) / whole.numel()


def test_min_and_max_where_nothing_is_clipped() -> None:
    folded = fold(randomized(MIXED))
    batches = [normal(3, *MIXED.input_shape, seed=seed) for seed in range(3)]
    for stats in calibrate(folded, batches_of(*batches), RangeMethod(Fraction(0))).values():
        assert (stats.low, stats.high) == (float(stats.channel_min.min()), float(stats.channel_max.max()))


def hidden(values: list[list[float]], percentile: str) -> TensorStats:
    """Statistics of a hidden tensor that takes these values, a batch a list: the input, passed on unchanged."""
    space = sequence((1, 1, 1), same=Conv(1, (1, 1), bias=True), out=Activation("sigmoid"), f=Flatten())
    folded = FoldedNetwork(space, {"same": torch.ones(1, 1, 1, 1)}, {"same": torch.zeros(1)})
    folded.bias["same"].fill_(-0.0)
    batches = [torch.tensor(batch).view(-1, 1, 1, 1) for batch in values]
    return calibrate(folded, batches_of(*batches), RangeMethod(Fraction(percentile)))["same"]


SPECIAL: dict[str, list[list[float]]] = {
    "constant": [[3.5] * 10, [3.5]],
    "negative constant": [[-3.5] * 10],
    "zeros": [[0.0] * 10],
    "one value": [[-7.25]],
    "two values": [[2.0], [-1.0]],
    "both zeros": [[-1.0, 0.0, -0.0, 0.0, -0.0, -0.0], [0.0, -0.0, 2.0, -0.0]],
    "ReLU zeros": [[0.0] * 90, [float(n) for n in range(1, 11)]],
    "negative zeros below": [[-0.0] * 90, [float(n) for n in range(1, 11)]],
    "all negative": [[-float(n) for n in range(1, 200)]],
    "neighbours": [[1.0 + n * 2**-23 for n in range(300)], [-1.0 - n * 2**-23 for n in range(300)]],
    "tiny and huge": [[1e-45, -1e-45, 1e-38, -3e38, 3e38, 0.0, 65536.0, -65536.0] * 3],
    "in one bucket of the first pass": [[2.0 + n * 2**-12 for n in range(8)] * 5],
}


@pytest.mark.parametrize("values", SPECIAL.values(), ids=SPECIAL.keys())
@pytest.mark.parametrize("percentile", ["0.1", "1", "10", "25", "40", "49", "49.9"])
def test_percentiles_of_special_tensors(values: list[list[float]], percentile: str) -> None:
    stats = hidden(values, percentile)
    whole = torch.tensor([value for batch in values for value in batch])
    assert (stats.low, stats.high) == nearest_rank(whole, Fraction(percentile))
    assert stats.sparsity == float((whole == 0).sum()) / len(whole)


def test_a_rank_is_not_interpolated_and_not_rounded() -> None:
    values = [[float(n) for n in range(1, 1001)]]
    assert (hidden(values, "1").low, hidden(values, "1").high) == (10, 990)
    assert (hidden(values, "0.1").low, hidden(values, "0.1").high) == (1, 999)
    assert (hidden(values, "0.11").low, hidden(values, "0.11").high) == (2, 999)
    few = [[float(n) for n in range(1, 101)]]
    assert (hidden(few, "7").low, hidden(few, "7").high) == (7, 93)  # 0.07 * 100 is a little more than 7
    assert (hidden(values, "10.01").low, hidden(values, "10.01").high) == (101, 900)


def test_a_norm_after_a_pool_is_a_layer() -> None:
    space = sequence((3, 8, 8), p=Pool("average"), n=BatchNorm(), r=Activation(), f=Flatten(), d=Dense(2))
    found = calibrate(fold(randomized(space)), batches_of(normal(4, 3, 8, 8)), RangeMethod())
    assert list(found) == [INPUT, "p", "r", "d"]
    assert found["r"].low == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("percentile", ["0", "1"])
def test_activations_that_are_not_finite_are_refused(value: float, percentile: str) -> None:
    with pytest.raises(FnetError, match="the activations of 'input' are not finite"):
        hidden([[1.0, 2.0], [3.0, value]], percentile)


def test_the_layer_whose_activations_overflow_is_named() -> None:
    folded = fold(randomized(sequence((3, 4, 4), c=Conv(4), r=Activation(), d=Conv(4, (1, 1)), f=Flatten())))
    folded.weight["d"].fill_(1e38)
    with pytest.raises(FnetError, match="the activations of 'd' are not finite"):
        calibrate(folded, batches_of(100 * normal(4, 3, 4, 4).abs()), RangeMethod())
