from fractions import Fraction
from itertools import product
from math import ceil

import numpy as np
import pytest
import torch
from torch import Tensor

from fnet_search.arch.layers import Activation, BatchNorm, Conv, Dense, Flatten, Pool
from fnet_search.arch.macroarchitecture import INPUT
from fnet_search.base.errors import FnetError
from fnet_search.quant.fold import FoldedNetwork, fold
from fnet_search.quant.quant_params import quant_params
from fnet_search.quant.ranges import Observer, TensorStats, calibrate, carriers, observer_of
from fnet_search.quant.scheme import MINMAX, MSE, RANGE_METHODS, RangeMethod, RangeSpec, parse_ranges
from fnet_search.training.network import walk
from tests.support.networks import MIXED, REUSED, batches_of, normal, randomized, sequence

F32 = np.float32


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


def clipped_range(values: Tensor, percentile: Fraction) -> tuple[float, float]:
    """Those; min and max where no float32 step lies between them."""
    low, high = nearest_rank(values, percentile)
    empty = np.float32((max(high, 0.0) - min(low, 0.0)) / 255) == 0
    return (float(values.min()), float(values.max())) if empty else (low, high)


PERCENTILES = [Fraction(text) for text in ("0.000001", "0.1", "1", "2.5", "12.34", "49", "49.999999")]


@pytest.mark.parametrize("percentile", PERCENTILES, ids=str)
def test_percentiles_are_exact(percentile: Fraction) -> None:
    folded = fold(randomized(MIXED))
    batches = [normal(size, *MIXED.input_shape, seed=size) * scale for size, scale in ((5, 1.0), (1, 9.0), (17, 0.1))]
    found = calibrate(folded, batches_of(*batches), RangeMethod("percentile", percentile))
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
        expected = ends if name in (INPUT, "out") else clipped_range(whole, percentile)
        assert (stats.low, stats.high) == expected, name
        assert torch.equal(stats.channel_min, whole.transpose(0, 1).flatten(1).amin(1))
        assert torch.equal(stats.channel_max, whole.transpose(0, 1).flatten(1).amax(1))
        assert stats.sparsity == float((whole == 0).sum()) / whole.numel()


def test_min_and_max_where_nothing_is_clipped() -> None:
    folded = fold(randomized(MIXED))
    batches = [normal(3, *MIXED.input_shape, seed=seed) for seed in range(3)]
    for stats in calibrate(folded, batches_of(*batches), MINMAX).values():
        assert (stats.low, stats.high) == (float(stats.channel_min.min()), float(stats.channel_max.max()))


def hidden(values: list[list[float]], ranges: str) -> TensorStats:
    """Statistics of a hidden tensor that takes these values, a batch a list: the input, passed on unchanged."""
    space = sequence((1, 1, 1), same=Conv(1, (1, 1), bias=True), out=Activation("sigmoid"), f=Flatten())
    folded = FoldedNetwork(space, {"same": torch.ones(1, 1, 1, 1)}, {"same": torch.zeros(1)})
    folded.bias["same"].fill_(-0.0)
    batches = [torch.tensor(batch).view(-1, 1, 1, 1) for batch in values]
    return calibrate(folded, batches_of(*batches), parse_ranges(ranges))["same"]


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
    stats = hidden(values, f"percentile:{percentile}")
    whole = torch.tensor([value for batch in values for value in batch])
    assert (stats.low, stats.high) == clipped_range(whole, Fraction(percentile))
    assert stats.sparsity == float((whole == 0).sum()) / len(whole)


SPARSE: dict[str, tuple[list[float], tuple[float, float]]] = {
    "a few above zero": ([0.0] * 299 + [5.0], (0.0, 5.0)),
    "a few below zero": ([0.0] * 299 + [-5.0], (-5.0, 0.0)),
    "a few on both sides": ([0.0] * 398 + [-2.0, 7.0], (-2.0, 7.0)),
    "nothing between that float32 can step through": ([1e-44] * 299 + [5.0], (float(F32(1e-44)), 5.0)),
    "zero and nothing else": ([0.0] * 300, (0.0, 0.0)),
    "one value but for a few": ([3.0] * 299 + [5.0], (3.0, 3.0)),  # with zero it has 255 steps
    "one value below zero but for a few": ([-3.0] * 299 + [-5.0], (-3.0, -3.0)),
}


@pytest.mark.parametrize(("values", "expected"), SPARSE.values(), ids=SPARSE.keys())
def test_percentiles_with_nothing_but_zero_between_give_way_to_min_and_max(
    values: list[float], expected: tuple[float, float]
) -> None:
    stats = hidden([values[:7], values[7:]], "percentile:1")
    assert (stats.low, stats.high) == expected


def test_a_rank_is_not_interpolated_and_not_rounded() -> None:
    values = [[float(n) for n in range(1, 1001)]]
    assert (hidden(values, "percentile:1").low, hidden(values, "percentile:1").high) == (10, 990)
    assert (hidden(values, "percentile:0.1").low, hidden(values, "percentile:0.1").high) == (1, 999)
    assert (hidden(values, "percentile:0.11").low, hidden(values, "percentile:0.11").high) == (2, 999)
    few = [[float(n) for n in range(1, 101)]]
    assert (hidden(few, "percentile:7").low, hidden(few, "percentile:7").high) == (
        7,
        93,
    )  # 0.07 * 100 is a little more than 7
    assert (hidden(values, "percentile:10.01").low, hidden(values, "percentile:10.01").high) == (101, 900)


def test_a_norm_after_a_pool_is_a_layer() -> None:
    space = sequence((3, 8, 8), p=Pool("average"), n=BatchNorm(), r=Activation(), f=Flatten(), d=Dense(2))
    found = calibrate(fold(randomized(space)), batches_of(normal(4, 3, 8, 8)), RangeMethod())
    assert list(found) == [INPUT, "p", "r", "d"]
    assert found["r"].low == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("ranges", ["minmax", "percentile:1", "mse"])
def test_activations_that_are_not_finite_are_refused(value: float, ranges: str) -> None:
    with pytest.raises(FnetError, match="the activations of 'input' are not finite"):
        hidden([[1.0, 2.0], [3.0, value]], ranges)


@pytest.mark.parametrize("ranges", ["minmax", "percentile:1", "mse"])
def test_the_layer_whose_activations_overflow_is_named(ranges: str) -> None:
    folded = fold(randomized(sequence((3, 4, 4), c=Conv(4), r=Activation(), d=Conv(4, (1, 1)), f=Flatten())))
    folded.weight["d"].fill_(1e38)
    with pytest.raises(FnetError, match="the activations of 'd' are not finite"):
        calibrate(folded, batches_of(100 * normal(4, 3, 4, 4).abs()), parse_ranges(ranges))


def squared_error(values: Tensor, low: float, high: float) -> float:
    """sum (x - x_q)^2."""
    params = quant_params(low, high)
    return float((params.dequantize(params.quantize(values)).double() - values.double()).square().sum())


def least_error(values: Tensor) -> float:
    """The least over all ranges that are min and max times n / 100 and, around the best, n / 1000."""
    ends = min(float(values.min()), 0.0), max(float(values.max()), 0.0)

    def best(lows: list[float], highs: list[float]) -> tuple[float, float, float]:
        pairs = product(lows if ends[0] else [1.0], highs if ends[1] else [1.0])
        return min((squared_error(values, ends[0] * a, ends[1] * b), a, b) for a, b in pairs)

    _, *shares = best(*[[n / 100 for n in range(2, 101, 2)]] * 2)
    near = [[min(1.0, max(1e-3, share + n / 1000)) for n in range(-20, 21)] for share in shares]
    return best(*near)[0]


def student(*shape: int, freedom: int = 3) -> Tensor:
    """Heavy tails."""
    return normal(*shape) / normal(freedom, *shape, seed=1).square().mean(0).sqrt()


TENSORS = {
    "normal": normal(3000),
    "a ReLU's output": normal(3000).relu(),
    "negative": -normal(3000).abs() - 0.1,
    "far from zero": normal(3000) + 50,
    "uniform": torch.linspace(-1, 1, 3000),
    "skewed": normal(3000).exp() - 0.5,
    "heavy tails": student(3000),
    "heavy tails above zero": student(3000).relu() ** 1.5,
    "one far away": torch.cat([normal(3000), torch.tensor([300.0])]),
    "hardswish": torch.nn.functional.hardswish(3 * normal(3000)),
    "few values": torch.tensor([-1.0, 0.25, 3.0] * 50),
    "large": 1e30 * student(3000),
    "small": 1e-30 * student(3000),
}


@pytest.mark.parametrize("values", TENSORS.values(), ids=TENSORS.keys())
def test_least_squares(values: Tensor) -> None:
    """Within 1 % of what a finer search on the values themselves finds, and no worse than clipping nothing or 1 %."""
    stats = hidden([values.tolist()], "mse")
    found = squared_error(values, stats.low, stats.high)
    assert min(0.0, float(values.min())) <= stats.low <= 0 <= stats.high <= max(0.0, float(values.max()))
    assert found <= 1.01 * least_error(values)
    for ranges in ("minmax", "percentile:1"):
        other = hidden([values.tolist()], ranges)
        assert found <= squared_error(values, other.low, other.high), ranges


def test_least_squares_clips_what_is_worth_clipping() -> None:
    """One value far away costs more than all others gain from a smaller step, unless they are many."""
    few, many = (hidden([[*normal(count).tolist(), 30.0]], "mse") for count in (3000, 300_000))
    assert few.high > 29
    assert 3 < many.high < 29
    assert hidden([TENSORS["uniform"].tolist()], "mse").high == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("name", ["constant", "negative constant", "zeros", "one value", "tiny and huge"])
def test_least_squares_of_special_tensors(name: str) -> None:
    values = SPECIAL[name]
    stats, all_of_it = hidden(values, "mse"), hidden(values, "minmax")
    whole = torch.tensor([value for batch in values for value in batch])
    error = squared_error(whole, stats.low, stats.high)
    assert error <= squared_error(whole, all_of_it.low, all_of_it.high)


@pytest.mark.parametrize("ranges", ["minmax", "percentile:1", "mse"])
def test_batches_make_no_difference(ranges: str) -> None:
    folded = fold(
        randomized(sequence((3, 6, 6), c=Conv(4), r=Activation(), d=Conv(4), s=Activation("silu"), f=Flatten()))
    )
    x = normal(12, 3, 6, 6)
    whole, parts = (calibrate(folded, batches_of(*x.split(size)), parse_ranges(ranges)) for size in (12, 5))
    for name, stats in whole.items():
        found = parts[name]
        assert (found.low, found.high) == pytest.approx((stats.low, stats.high), rel=1e-5), name
    values = student(500)
    one, many = hidden([values.tolist()], ranges), hidden([[value] for value in values.tolist()], ranges)
    assert (one.low, one.high) == (many.low, many.high)


def held(part: object) -> int:
    """How many numbers an observer keeps."""
    if isinstance(part, Tensor):
        return part.numel()
    if isinstance(part, dict):
        return sum(map(held, part.values()))
    return 1


@pytest.mark.parametrize("method", [MINMAX, RangeMethod(), MSE], ids=str)
def test_memory_does_not_grow_with_the_samples(method: RangeMethod) -> None:
    kept = []
    for batches in (1, 30):
        observer = observer_of(method)(method)
        for seed in range(batches):
            observer.first_pass(normal(20, 3, 4, 4, seed=seed))
        for seed in range(batches):
            observer.second_pass(normal(20, 3, 4, 4, seed=seed))
        kept.append(sum(map(held, vars(observer).values())))
    assert kept[0] == kept[1] < 3 * 2**16 + 100


class Twice(Observer):
    """The mean of all values, and as far beyond it as the mean distance: which takes two passes."""

    passes = 2
    total = distance = 0.0

    def first_pass(self, tensor: Tensor) -> None:
        super().first_pass(tensor)
        self.total += float(tensor.double().sum())

    def second_pass(self, tensor: Tensor) -> None:
        self.distance += float((tensor.double() - self.total / self.count).abs().sum())

    def range(self) -> tuple[float, float]:
        return (self.total - self.distance) / self.count, (self.total + self.distance) / self.count


@pytest.mark.parametrize("held", [0, 6], ids=["computed again", "held"])
def test_a_method_that_looks_twice(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All hidden tensors are seen by it, in both passes; the input and the logits are not."""
    monkeypatch.setitem(RANGE_METHODS, "twice", RangeSpec(f"{__name__}:Twice"))  # type: ignore[arg-type]
    folded = fold(randomized(sequence((3, 4, 4), c=Conv(2, (1, 1)), s=Activation("silu"), f=Flatten(), d=Dense(5))))
    x = normal(6, 3, 4, 4)
    values = {node.name: output for node, output in walk(folded.network, x, folded.apply_node)}
    found = calibrate(folded, batches_of(*x.split(2)), parse_ranges("twice"), held)
    for name in ("c", "s"):
        mean = values[name].double().mean()
        distance = (values[name].double() - mean).abs().mean()
        assert (found[name].low, found[name].high) == pytest.approx((float(mean - distance), float(mean + distance)))
    for name, ends in {INPUT: x, "d": values["d"]}.items():
        assert (found[name].low, found[name].high) == (float(ends.min()), float(ends.max()))
