from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Activation, Conv, Dense, Flatten
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture
from fnet_search.arch.plan import parse_plan
from fnet_search.importing.spaces import load_space
from fnet_search.quant.bias_correction import ChannelMeans, channel_means, correct_biases
from fnet_search.quant.fold import FoldedNetwork, fold
from fnet_search.quant.quantize import quantize
from fnet_search.quant.quantized_layer import fits
from fnet_search.quant.ranges import calibrate
from fnet_search.quant.scheme import MSE, RangeMethod
from fnet_search.quant.simulator import QuantizedNetwork, accumulate
from fnet_search.training.network import walk
from tests.support.networks import MIXED, batches_of, normal, randomized, sequence

TINY = load_space("tiny")
SPACES = {
    "mixed": MIXED,
    "f4": factorize(TINY, parse_plan(TINY, "f4")),
    "dws": factorize(TINY, parse_plan(TINY, "dws")),
}


def clipped(space: Macroarchitecture, x: Tensor, per_channel: bool) -> tuple[FoldedNetwork, QuantizedNetwork]:
    """With the paper's clipping, which shifts means."""
    folded = fold(randomized(space))
    return folded, quantize(folded, calibrate(folded, batches_of(x), RangeMethod()), per_channel)


def shifts(folded: FoldedNetwork, quantized: QuantizedNetwork, x: Tensor) -> dict[str, Tensor]:
    """For each layer the differences of its channels' means, before any ReLU, in steps of its biases."""
    codes: dict[str, Tensor] = {INPUT: quantized.params[INPUT].quantize(x)}
    codes |= {node.name: output for node, output in quantized.codes(x)}
    found = {}
    for node, output in walk(folded.network, x, folded.apply_node):
        if isinstance(node.layer, Conv | Dense):
            layer, source = quantized.layers[node.name], quantized.params[quantized.carrier[node.inputs[0]]]
            total = accumulate(node.layer, codes[node.inputs[0]], source.zero, layer)
            means = (one.double().transpose(0, 1).flatten(1).mean(1) for one in (total, output))
            scale = torch.tensor([source.scale], dtype=torch.float32) * torch.tensor(
                [one.scale for one in layer.params]
            )
            mean, wanted = means
            found[node.name] = mean - wanted / scale.double()
    return found


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_means_are_those_of_the_float_network(space: Macroarchitecture, per_channel: bool) -> None:
    """To half a step, the rounding of the bias; with what the layers before it give once they are corrected."""
    x = 1 + 2 * normal(24, *space.input_shape)
    folded, quantized = clipped(space, x, per_channel)
    before = shifts(folded, quantized, x)
    corrected = correct_biases(folded, quantized, batches_of(*x.split(10)))
    after = shifts(folded, corrected, x)
    assert after.keys() == quantized.layers.keys()
    for name, shift in after.items():
        assert float(shift.abs().max()) <= 0.5 + 1e-3, name  # the float means are float32 sums
        assert float(before[name].abs().max()) > 2, name


def test_only_biases_change() -> None:
    x = normal(12, *MIXED.input_shape)
    folded, quantized = clipped(MIXED, x, True)
    floats = {name: (folded.weight[name].clone(), folded.bias[name].clone()) for name in folded.weight}
    codes = {name: tensor.clone() for name, tensor in quantized.to_tensors().items()}
    corrected = correct_biases(folded, quantized, batches_of(x)).to_tensors()
    assert corrected.keys() == codes.keys()
    assert {name for name in codes if not torch.equal(corrected[name], codes[name])} == {
        f"{name}.bias" for name in quantized.layers
    }
    assert all(corrected[f"{name}.bias"].dtype == torch.int32 for name in quantized.layers)
    assert all(torch.equal(tensor, codes[name]) for name, tensor in quantized.to_tensors().items())
    for name, (weight, bias) in floats.items():
        assert torch.equal(folded.weight[name], weight)
        assert torch.equal(folded.bias[name], bias)


def test_it_comes_nearer_to_the_float_network() -> None:
    """On other images too."""
    space = SPACES["f4"]
    x, others = (2 * normal(64, *space.input_shape, seed=seed) for seed in (0, 1))
    folded, quantized = clipped(space, x, False)
    corrected = correct_biases(folded, quantized, batches_of(x))
    y = folded(others)
    assert (corrected(others) - y).square().mean() < 0.7 * (quantized(others) - y).square().mean()


def test_batches_make_no_difference() -> None:
    x = normal(12, *MIXED.input_shape)
    folded, quantized = clipped(MIXED, x, False)
    whole, parts = (correct_biases(folded, quantized, batches_of(*x.split(size))) for size in (12, 5))
    for name, layer in whole.layers.items():
        assert int((layer.bias - parts.layers[name].bias).abs().max()) <= 1, name


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_correction_that_int32_has_no_room_for_widens_the_weight_scale(sign: float, per_channel: bool) -> None:
    space = sequence((3, 6, 6), a=Conv(4), r=Activation(), b=Conv(4), f=Flatten())
    x = normal(4, 3, 6, 6)
    folded, quantized = clipped(space, x, per_channel)
    far = replace(folded, bias={**folded.bias, "b": folded.bias["b"] + sign * 1e30})
    corrected = correct_biases(far, quantized, batches_of(x))
    assert fits(corrected.layers["b"])
    for name, shift in shifts(far, corrected, x).items():
        steps = 2**-20 * corrected.layers[name].bias.abs()  # the float means are float32 sums
        assert bool((shift.abs() <= 0.5 + 1e-3 + steps).all()), name


def test_means_are_collected_while_calibrating() -> None:
    """Of the first images, in whole batches, bit for bit those of a pass of their own; both passes of a method count
    once."""
    x = normal(40, *MIXED.input_shape)
    folded = fold(randomized(MIXED))
    collected = ChannelMeans(15)
    calibrate(folded, batches_of(*x.split(10)), MSE, watch=collected)
    alone = channel_means(folded, batches_of(*x[:20].split(10)))
    assert collected.means.keys() == alone.keys() == folded.weight.keys()
    assert all(torch.equal(mean, alone[name]) for name, mean in collected.means.items())
    assert ChannelMeans(0).means == {}
