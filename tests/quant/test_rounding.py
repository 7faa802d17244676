"""Where the rules of docs/quint8.md round, on values for which that decides: halves of a code, or next to them.

Each time the codes are those of the rule's formula in numpy, one float32 operation at a time, and ONNX Runtime has the
same; formulas that round elsewhere give others.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fnet_search.arch.layers import Activation, Add, Concat, Flatten, Layer, Multiply, Pool, Slice
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.deploy.export import quantized_model
from fnet_search.deploy.runtime import Runtime
from fnet_search.quant.quant_params import QuantParams
from fnet_search.quant.quantized_layer import quantize_layer
from fnet_search.quant.simulator import QuantizedNetwork
from tests.support.networks import sequence

Array = npt.NDArray[Any]
F32 = np.float32


def rounded(values: Array) -> Array:
    """clip(rint(x), 0, 255)"""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def equal(found: Array, others: Mapping[str, Array]) -> list[str]:
    """Names of the formulas that give the same codes."""
    return [name for name, other in others.items() if np.array_equal(found, other)]


def computed(network: QuantizedNetwork, image: Array) -> Mapping[str, Array]:
    """The codes of every node for those of the input; ONNX Runtime gives the same logits."""
    x = network.params[INPUT].dequantize(torch.from_numpy(image))
    found = {node.name: codes for node, codes in network.codes(x)}
    last = network.network.output
    logits = network.params[network.carrier[last]].dequantize(found[last])
    assert torch.equal(Runtime(quantized_model(network))(x), logits)
    return {name: codes.numpy() for name, codes in found.items()}


def joined(joint: Layer, of_a: QuantParams, of_b: QuantParams, target: QuantParams) -> tuple[Array, Array, Array]:
    """Codes of two tensors, and of the layer that reads them, one after the other."""
    nodes = (
        Node("a", Slice(0, 1), (INPUT,)),
        Node("other", Slice(1, 2), (INPUT,)),
        Node("b", Activation("leaky_relu", 0.5), ("other",)),
        Node("joint", joint, ("a", "b")),
        Node("flat", Flatten(), ("joint",)),
    )
    space = Macroarchitecture("joined", (2, 64, 64), nodes)
    network = QuantizedNetwork(space, {INPUT: of_a, "b": of_b, "joint": target}, {})
    image = np.random.default_rng(0).integers(0, 256, (1, 2, 64, 64)).astype(np.uint8)
    codes = computed(network, image)
    return codes["a"].astype(np.int64), codes["b"].astype(np.int64), codes["joint"]


def params(scale: float, zero: int) -> QuantParams:
    return QuantParams(float(F32(scale)), zero)


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_are_divided_by_their_scale(per_channel: bool) -> None:
    """Rule 3: a product with the reciprocal gives other codes."""
    halves = (np.arange(-100, 100) + F32(0.5)).astype(F32) * F32(0.017)
    weight = np.concatenate([np.nextafter(halves, F32(-99)), halves, np.nextafter(halves, F32(99)), [F32(127 * 0.017)]])
    weight = np.concatenate([weight, [F32(-128 * 0.017)]]).astype(F32)
    layer = quantize_layer(torch.from_numpy(weight[None]), torch.zeros(1), params(1.0, 0), per_channel)
    scale, zero = F32(layer.params[0].scale), layer.params[0].zero
    assert np.array_equal(layer.codes[0].numpy(), rounded(np.rint(weight / scale) + zero))
    assert not np.array_equal(layer.codes[0].numpy(), rounded(np.rint(weight * (F32(1) / scale)) + zero))


def windows(size: tuple[int, int], source: QuantParams, target: QuantParams, pool: Pool) -> tuple[Array, Array]:
    """Codes of 512 channels, and of what a pool gives for them, both as [512, ...]."""
    space = sequence((512, *size), pool=pool, flat=Flatten())
    image = np.random.default_rng(0).integers(0, 256, (1, 512, *size)).astype(np.uint8)
    found = computed(QuantizedNetwork(space, {INPUT: source, "pool": target}, {}), image)
    return image[0].astype(np.int64), found["pool"][0].reshape(512, -1)


def test_an_average_pool_adds_row_by_row_in_float32_and_divides_twice() -> None:
    """Rule 12, on windows of 2x3."""
    source, target = params(0.1, 3), params(0.1, 7)
    codes, found = windows((2, 6), source, target, Pool("average", (2, 3)))
    codes = codes.reshape(512, 2, 2, 3).transpose(0, 2, 1, 3)  # [channel, window, row, column]
    d = F32(source.scale) * (codes - 3).astype(F32)

    def summed(values: Array) -> Array:
        total = np.zeros((512, 2), values.dtype)
        for place in np.ndindex(values.shape[2:]):
            total = total + values[:, :, *place]
        return total

    def after(total: Array) -> Array:
        return rounded(total / F32(6) / F32(target.scale) + F32(7))

    assert np.array_equal(found, after(summed(d)))
    others = {
        "columns first": after(summed(d.transpose(0, 1, 3, 2))),
        "summed in float64": after(summed(d.astype(np.float64)).astype(F32)),
        "integers summed": after(F32(source.scale) * (codes - 3).sum((2, 3)).astype(F32)),
        "divided once": rounded(summed(d) / (F32(6) * F32(target.scale)) + F32(7)),
    }
    assert equal(found, others) == []


def test_a_window_over_the_whole_map_is_a_global_average() -> None:
    """Rule 12 gives way to rule 11, unless the map is padded."""
    source, target = params(0.1, 3), params(0.1, 7)
    codes, found = windows((2, 3), source, target, Pool("average", (2, 3)))
    total = (codes - 3).sum((1, 2)).astype(F32)
    ratio = F32(source.scale) / (F32(target.scale) * F32(6))
    assert np.array_equal(found[:, 0], rounded(np.rint(total * ratio) + 7))
    assert np.array_equal(windows((2, 3), source, target, Pool("global_average"))[1], found)
    _, padded = windows((2, 3), source, target, Pool("average", (2, 3), (3, 3), (1, 0)))
    d = F32(source.scale) * (codes[:, 0] - 3).astype(F32)  # of the first row, below the padding
    mean = (d[:, 0] + d[:, 1] + d[:, 2]) / F32(3)
    assert np.array_equal(padded[:, 0], rounded(mean / F32(target.scale) + F32(7)))


def test_every_step_of_an_addition_is_rounded_once() -> None:
    """Rule 13: both fused multiply-adds, and each step of what is known before."""
    of_a, of_b, target = params(0.52, 127), params(0.92, 110), params(0.8, 214)
    a, b, found = joined(Add(), of_a, of_b, target)
    r_a, r_b = (float(F32(one.scale) / F32(target.scale)) for one in (of_a, of_b))

    def once(value: Any) -> Any:
        return np.asarray(value).astype(F32).astype(np.float64)

    def added(c: Any) -> Array:
        return rounded(once(a * r_a + once(b * r_b + c)))

    product = once(r_b * of_b.zero)
    c = once(target.zero - once(r_a * of_a.zero + product))
    assert np.array_equal(found, added(c))
    others = {
        "the outer not rounded": rounded(a * r_a + once(b * r_b + c)),
        "the inner not rounded": rounded(once(a * r_a + (b * r_b + c))),
        "the offset rounded at its end": added(once(target.zero - (r_a * of_a.zero + product))),
        "the product not rounded": added(once(target.zero - once(r_a * of_a.zero + r_b * of_b.zero))),
        "nothing fused": rounded(once(once(a * r_a) + once(once(b * r_b) + c))),
        "the other order": rounded(once(b * r_b + once(a * r_a + c))),
    }
    assert equal(found, others) == []


def test_a_product_is_rounded_after_each_step() -> None:
    """Rule 14: the product of the scales first, then its ratio to the target's; then the product of the codes."""
    of_a, of_b, target = params(0.1, 100), params(0.1, 120), params(0.2, 128)
    a, b, found = joined(Multiply(), of_a, of_b, target)
    s_a, s_b, s_y = (F32(one.scale) for one in (of_a, of_b, target))
    product, ratio = ((a - 100) * (b - 120)).astype(F32), s_a * s_b / s_y
    assert np.array_equal(found, rounded(product * ratio + F32(128)))
    others = {
        "the ratio of one scale first": rounded(product * (s_a / s_y * s_b) + F32(128)),
        "a ratio of float64": rounded(product * F32(np.float64(s_a) * np.float64(s_b) / np.float64(s_y)) + F32(128)),
        "a fused step": rounded((product.astype(np.float64) * ratio + 128).astype(F32)),
        "float64": rounded(product.astype(np.float64) * ratio + 128),
    }
    assert equal(found, others) == []


def test_a_concat_divides_what_the_codes_stand_for() -> None:
    """Rule 15: a product with the ratio of the scales gives other codes."""
    source, target = params(0.1, 100), params(0.6, 99)
    a, _, found = joined(Concat(), source, target, target)
    values = (a - 100).astype(F32)
    first = found[:, :1]
    assert np.array_equal(first, rounded(np.rint(F32(source.scale) * values / F32(target.scale)) + 99))
    ratio = F32(source.scale) / F32(target.scale)
    assert not np.array_equal(first, rounded(np.rint(values * ratio) + 99))


def test_a_function_is_computed_in_float64_on_float32_values() -> None:
    """Rule 16: what its code stands for is rounded to float32, and so is what the function gives."""
    source, target = params(0.01, 200), params(0.02, 20)
    space = sequence((1, 16, 16), act=Activation("hardsigmoid"), flat=Flatten())
    codes = np.arange(256).reshape(1, 1, 16, 16)
    network = QuantizedNetwork(space, {INPUT: source, "act": target}, {})
    found = computed(network, codes.astype(np.uint8))["act"]

    def hardsigmoid(x: Array) -> Array:
        return np.clip(x + x.dtype.type(3), 0, 6) / x.dtype.type(6)

    def after(y: Array) -> Array:
        return rounded(np.rint(y / y.dtype.type(target.scale)) + 20)

    x = F32(source.scale) * (codes - 200).astype(F32)
    assert np.array_equal(found, after(hardsigmoid(x.astype(np.float64)).astype(F32)))
    others = {
        "computed in float32": after(hardsigmoid(x)),
        "values in float64": after(hardsigmoid(source.scale * (codes - 200.0)).astype(F32)),
        "result in float64": after(hardsigmoid(x.astype(np.float64))),
    }
    assert equal(found, others) == []
