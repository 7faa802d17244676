"""From folded networks and ranges to integer networks."""

import math
from dataclasses import replace

import numpy as np
import pytest

from fnet_search.arch.layers import (
    Activation,
    BatchNorm,
    Conv,
    Flatten,
)
from fnet_search.base.errors import FnetError
from fnet_search.quant.fold import fold
from fnet_search.quant.quant_params import QuantParams, quant_params
from fnet_search.quant.quantize import quantize
from fnet_search.quant.ranges import calibrate, carriers
from fnet_search.quant.scheme import MINMAX, RangeMethod
from tests.support.networks import MIXED, batches_of, normal, randomized, sequence
from tests.support.quint8_oracle import (
    COUNT,
    F32,
    check,
    integer,
    quantized,
)


def test_the_layer_that_cannot_be_quantized_is_named() -> None:
    space = sequence((COUNT + 1, 1, 1), d=Conv(2, (1, 1)), f=Flatten())
    folded = fold(randomized(space))
    folded.weight["d"].fill_(1.0)
    stats = calibrate(folded, batches_of(normal(4, COUNT + 1, 1, 1)), RangeMethod())
    with pytest.raises(FnetError, match="layer 'd': int32 accumulation can overflow"):
        quantize(folded, stats)


def range_params(layer: Activation, low: float, high: float) -> QuantParams:
    """The parameters of what a function gives, where the samples lie in a range."""
    folded = fold(randomized(sequence((1, 1, 1), c=Conv(1, (1, 1)), r=layer, f=Flatten())))
    stats = calibrate(folded, batches_of(normal(4, 1, 1, 1)), RangeMethod())
    return quantize(folded, {**stats, "r": replace(stats["r"], low=low, high=high)}).params["r"]


@pytest.mark.parametrize(
    ("layer", "bound"),
    [
        (Activation("relu6"), 6.0),
        (Activation("hardsigmoid"), 1.0),
        (Activation("sigmoid"), 1.0),
        (Activation("clip", low=0.0, high=0.7), 0.7),
        (Activation("clip", low=-math.inf, high=0.7), 0.7),
    ],
    ids=str,
)
def test_the_range_of_a_bounded_function_ends_at_its_bound(layer: Activation, bound: float) -> None:
    for high, expected in ((0.0, bound), (1e-44, bound), (bound / 2, bound / 2), (bound, bound), (9.0, bound)):
        assert range_params(layer, 0.0, high) == QuantParams(float(F32(expected / 255)), 0)


@pytest.mark.parametrize(
    ("layer", "low", "high"),
    [(Activation("tanh"), -1.0, 1.0), (Activation("clip", low=-0.5, high=2.0), -0.5, 2.0)],
    ids=str,
)
def test_the_range_of_a_function_with_two_bounds(layer: Activation, low: float, high: float) -> None:
    whole = quant_params(low, high)
    assert range_params(layer, 0.0, 0.0) == range_params(layer, 2 * low, 2 * high) == whole
    assert range_params(layer, low / 2, high / 2) == quant_params(low / 2, high / 2)


def test_zeros_of_a_function_without_an_upper_bound() -> None:
    assert range_params(Activation("clip", low=-0.5, high=math.inf), 0.0, 0.0) == QuantParams(1.0, 0)


def test_ranges_become_parameters() -> None:
    folded = fold(randomized(MIXED))
    stats = calibrate(folded, batches_of(normal(8, *MIXED.input_shape)), RangeMethod())
    network = quantize(folded, stats)
    assert network.params == {name: quant_params(tensor.low, tensor.high) for name, tensor in stats.items()}
    assert network.params["stem.act"].zero == network.params["sum.act"].zero == 0
    assert network.params["sum.act"].scale <= F32(6 / 255)
    for name, layer in network.layers.items():
        weight = folded.weight[name]
        (params,) = layer.params
        assert params == quant_params(float(weight.min()), float(weight.max()))
        assert np.array_equal(layer.codes.numpy(), quantized(weight.numpy(), params))
        source = network.params[carriers(folded.network)[folded.network.by_name[name].inputs[0]]]
        scale = float(F32(source.scale) * F32(params.scale))
        assert np.array_equal(layer.bias.numpy(), np.rint(folded.bias[name].double().numpy() / scale))


def test_a_scale_a_channel_in_a_whole_network() -> None:
    network = integer(MIXED, normal(8, *MIXED.input_shape), per_channel=True)
    whole = integer(MIXED, normal(8, *MIXED.input_shape))
    assert network.params == whole.params
    for name, layer in network.layers.items():
        assert len(layer.params) == len(layer.codes) == len(layer.bias)
        assert {params.zero for params in layer.params} == {128}
        assert len(set(layer.params)) > 1, name


DEGENERATE: dict[str, tuple[float, float, float]] = {
    "dead weights": (0.0, 1.0, 1.0),
    "dead ReLU": (0.0, -1.0, 1.0),
    "constant image": (1.0, 0.5, 0.0),
    "dead weights and biases": (0.0, 0.0, 1.0),
}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("weight", "bias", "spread"), DEGENERATE.values(), ids=DEGENERATE.keys())
def test_degenerate_layers(weight: float, bias: float, spread: float, per_channel: bool) -> None:
    space = sequence((3, 6, 6), c=Conv(4, bias=True), r=Activation(), n=BatchNorm(), d=Conv(4, (2, 2)), f=Flatten())
    folded = fold(randomized(space))
    folded.weight["c"].mul_(weight)
    folded.bias["c"].fill_(bias)
    x = 3 + spread * normal(4, 3, 6, 6)
    network = quantize(folded, calibrate(folded, batches_of(x), RangeMethod()), per_channel)
    check(network, x)
    if bias < 0:
        assert network.params["r"] == QuantParams(1.0, 0)


@pytest.mark.parametrize("per_channel", [False, True])
def test_quantized_networks_come_near_the_float_one(per_channel: bool) -> None:
    folded = fold(randomized(MIXED))
    x = normal(16, *MIXED.input_shape)
    network = quantize(folded, calibrate(folded, batches_of(x), MINMAX), per_channel)
    y = folded(x)
    assert (network(x) - y).square().mean() < 0.01 * y.var()
