"""The integer network against an oracle in plain numpy: int64 sums, one float32 operation at a time, and fractions
where the runtime fuses two."""

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import (
    Activation,
    Add,
    BatchNorm,
    Concat,
    Conv,
    Dense,
    Flatten,
    Function,
    Layer,
    Multiply,
    Pad,
    Pool,
    Resample,
    Reshape,
    Shuffle,
    Slice,
)
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.arch.plan import parse_plan
from fnet_search.base.errors import FnetError
from fnet_search.importing.spaces import load_space
from fnet_search.quant.fold import fold
from fnet_search.quant.quant_params import QuantParams, quant_params
from fnet_search.quant.quantize import quantize
from fnet_search.quant.quantized_layer import QuantizedLayer, quantize_layer
from fnet_search.quant.ranges import calibrate, carriers
from fnet_search.quant.scheme import MINMAX, RangeMethod
from fnet_search.quant.simulator import QuantizedNetwork, accumulate, lookup_table, requantize
from fnet_search.training.weights import read_tensors, write_tensors
from tests.support.networks import BENT, GATED, MIXED, REUSED, SCALED, batches_of, normal, randomized, sequence

Array = npt.NDArray[Any]
F32 = np.float32


def clipped(x: Array) -> Array:
    return np.clip(x, 0, 255).astype(np.int64)


def dequantized(codes: Array, params: QuantParams) -> Array:
    return F32(params.scale) * (codes - params.zero).astype(F32)


def quantized(x: Array, params: QuantParams) -> Array:
    assert x.dtype == F32
    return clipped(np.rint(x / F32(params.scale)) + params.zero)


def summed(layer: Conv | Dense, codes: Array, zero: int, weights: QuantizedLayer) -> Array:
    """Rule 7, in int64."""
    x, bias = codes.astype(np.int64) - zero, weights.bias.numpy().astype(np.int64)
    zeros = np.array([one.zero for one in weights.params])
    w = weights.codes.numpy().astype(np.int64) - zeros.reshape(-1, *[1] * (weights.codes.ndim - 1))
    if isinstance(layer, Dense):
        return np.asarray(x @ w.T + bias)
    (high, wide), (down, across), (deep, broad) = layer.kernel, layer.stride, layer.dilation
    x = np.pad(x, ((0, 0), (0, 0), (layer.padding[0],) * 2, (layer.padding[1],) * 2))
    rows = (x.shape[2] - deep * (high - 1) - 1) // down + 1
    columns = (x.shape[3] - broad * (wide - 1) - 1) // across + 1
    total = np.zeros((len(x), len(w), rows, columns), dtype=np.int64)
    ins, outs = w.shape[1], len(w) // layer.groups
    for group in range(layer.groups):
        mine, theirs = slice(group * outs, (group + 1) * outs), slice(group * ins, (group + 1) * ins)
        for i in range(high):
            for j in range(wide):
                seen = x[:, theirs, i * deep :: down, j * broad :: across][:, :, :rows, :columns]
                total[:, mine] += np.einsum("nchw,kc->nkhw", seen, w[mine, :, i, j])
    return np.asarray(total + bias[:, None, None])


def requantized(total: Array, multiplier: Array, target: QuantParams) -> Array:
    """Rule 8, with a multiplier for all, or one a channel."""
    assert multiplier.dtype == F32
    multiplier = multiplier.reshape(-1, *[1] * (total.ndim - 2))
    return clipped(np.rint(total.astype(F32) * multiplier) + target.zero)


def windows(layer: Pool, x: Array) -> tuple[int, int]:
    """How many down and across, as torch counts them: with `ceil` the last one may reach over the padded edge, if it
    begins before it."""
    found = []
    for n, k, s, p in zip(x.shape[2:], layer.kernel, layer.step, layer.padding, strict=True):
        count = (n + 2 * p - k) // s + 1
        if layer.ceil and (n + 2 * p - k) % s and count * s < n + p:
            count += 1
        found.append(count)
    return found[0], found[1]


def averaged(layer: Pool, codes: Array, source: QuantParams, target: QuantParams) -> Array:
    """Rule 12, a pixel at a time."""
    x = dequantized(codes, source)
    (high, wide), (down, across), (top, left) = layer.kernel, layer.step, layer.padding
    rows, columns = windows(layer, x)
    y = np.empty((*x.shape[:2], rows, columns), dtype=F32)
    for row in range(rows):
        for column in range(columns):
            total, count = np.zeros(x.shape[:2], dtype=F32), 0
            for i in range(row * down - top, row * down - top + high):
                for j in range(column * across - left, column * across - left + wide):
                    inside = 0 <= i < x.shape[2] and 0 <= j < x.shape[3]
                    total = total + x[:, :, i, j] if inside else total
                    count += inside or layer.count_padding
            y[:, :, row, column] = total / F32(count)
    return clipped(np.rint(y / F32(target.scale) + F32(target.zero)))


def rounded(value: Fraction) -> Fraction:
    """To float32, once, ties to even."""
    guess = F32(float(value))
    near = [np.nextafter(guess, F32(side)) for side in (-np.inf, np.inf)] + [guess]
    return min((abs(Fraction(float(x)) - value), int(x.view(np.int32)) & 1, Fraction(float(x))) for x in near)[2]


def added(a: Array, b: Array, of_a: QuantParams, of_b: QuantParams, target: QuantParams) -> Array:
    """Rule 13, with each fma rounded once."""
    r_a, r_b = (Fraction(float(F32(one.scale) / F32(target.scale))) for one in (of_a, of_b))
    c = rounded(target.zero - rounded(r_a * of_a.zero + rounded(r_b * of_b.zero)))
    inner = [rounded(q * r_b + c) for q in range(256)]
    codes = [round(rounded(int(x) * r_a + inner[int(y)])) for x, y in zip(a.flat, b.flat, strict=True)]
    return clipped(np.array(codes, dtype=object).reshape(a.shape))


FORMULAS: Mapping[str, Any] = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "hardsigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "leaky_relu": lambda x, slopes: np.where(x > 0, x, slopes * x),
    "elu": lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(x)),
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x)),
    "celu": lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(x / alpha)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "tanh": np.tanh,
    "softplus": lambda x: np.log1p(np.exp(x)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "log_sigmoid": lambda x: -np.log1p(np.exp(-x)),
    "abs": np.abs,
    "clip": np.clip,
}


def looked_up(layer: Activation | None, codes: Array, source: QuantParams, target: QuantParams) -> Array:
    """Rule 16; None is the identity."""
    x = dequantized(codes, source).astype(np.float64)
    if layer is None:
        return quantized(x.astype(F32), target)
    slopes = [np.reshape(layer.slopes, (-1, *[1] * (codes.ndim - 2)))] if layer.slopes else []
    bounds = [layer.low, layer.high] if layer.function == "clip" else []
    with np.errstate(over="ignore"):
        return quantized(FORMULAS[layer.function](x, *slopes, *bounds).astype(F32), target)


def most(layer: Pool, codes: Array) -> Array:
    (high, wide), (down, across), (top, left) = layer.kernel, layer.step, layer.padding
    x = np.pad(codes, ((0, 0), (0, 0), (top, top + high), (left, left + wide)), constant_values=-1)
    rows, columns = windows(layer, codes)
    views = np.lib.stride_tricks.sliding_window_view(x, (high, wide), axis=(2, 3))
    return np.asarray(views[:, :, ::down, ::across][:, :, :rows, :columns].max((4, 5)))


def multiplied(a: Array, b: Array, of_a: QuantParams, of_b: QuantParams, target: QuantParams) -> Array:
    """Rule 14."""
    ratio = F32(of_a.scale) * F32(of_b.scale) / F32(target.scale)
    product = ((a - of_a.zero) * (b - of_b.zero)).astype(F32) * ratio
    return clipped(np.rint(product + F32(target.zero)))


def expected(network: QuantizedNetwork, node: Node, inputs: list[Array]) -> Array:
    """What a node must give for the codes of its inputs."""
    carrier = carriers(network.network)
    sources = [network.params[carrier[name]] for name in node.inputs]
    target, source, codes = network.params[carrier[node.name]], sources[0], inputs[0]
    match node.layer:
        case Conv() | Dense() as layer:
            weights = network.layers[node.name]
            scales = F32(source.scale) * np.array([one.scale for one in weights.params], dtype=F32)
            total = summed(layer, codes, source.zero, weights)
            return requantized(total, scales / F32(target.scale), target)
        case Activation() as layer:
            return codes if carrier[node.inputs[0]] == node.name else looked_up(layer, codes, source, target)
        case Pool(reduction="max") as layer:
            return most(layer, codes)
        case Pool(reduction="average") as layer if layer.kernel != codes.shape[2:] or any(layer.padding):
            return averaged(layer, codes, source, target)
        case Pool():
            pixels = codes.shape[2] * codes.shape[3]
            multiplier = F32(source.scale) / (F32(target.scale) * F32(pixels))
            return requantized((codes - source.zero).sum((2, 3), keepdims=True), np.array([multiplier]), target)
        case Flatten():
            return codes.reshape(len(codes), -1)
        case Reshape(shape):
            return codes.reshape(len(codes), *shape)
        case Slice(start, stop):
            return codes[:, start:stop]
        case Shuffle(groups):
            size = codes.shape[1] // groups
            return codes[:, [group * size + place for place in range(size) for group in range(groups)]]
        case Resample(rows, columns):
            return codes[:, :, rows][:, :, :, columns]
        case Pad(before, after):
            return np.pad(codes, ((0, 0), *zip(before, after, strict=True)), constant_values=source.zero)
        case Multiply():
            return multiplied(codes, inputs[1], source, sources[1], target)
        case Add():
            return added(codes, inputs[1], source, sources[1], target)
        case Concat():
            parts = zip(inputs, sources, strict=True)
            return np.concatenate([looked_up(None, part, params, target) for part, params in parts], 1)
    raise AssertionError(node)


def check(network: QuantizedNetwork, x: torch.Tensor) -> dict[str, Array]:
    """Compares every node with the oracle; returns the codes."""
    codes = {INPUT: quantized(x.numpy(), network.params[INPUT])}
    for node, output in network.codes(x):
        assert output.dtype == torch.uint8
        codes[node.name] = output.numpy().astype(np.int64)
        wanted = expected(network, node, [codes[name] for name in node.inputs])
        assert np.array_equal(codes[node.name], wanted), (node, np.abs(codes[node.name] - wanted).max())
    last = network.network.output
    logits = dequantized(codes[last], network.params[carriers(network.network)[last]])
    assert np.array_equal(network(x).numpy(), logits)
    return codes


def integer(
    space: Macroarchitecture, x: torch.Tensor, percentile: str = "1", seed: int = 0, per_channel: bool = False
) -> QuantizedNetwork:
    folded = fold(randomized(space, seed))
    stats = calibrate(folded, batches_of(x), RangeMethod("percentile", Fraction(percentile)))
    return quantize(folded, stats, per_channel)


@pytest.mark.parametrize(("percentile", "per_channel"), [("0", False), ("1", False), ("20", False), ("1", True)])
@pytest.mark.parametrize("space", [MIXED, REUSED, GATED, SCALED, BENT], ids=lambda space: str(space.name))
def test_whole_networks(space: Macroarchitecture, percentile: str, per_channel: bool) -> None:
    for seed in range(2):
        x = normal(4, *space.input_shape, seed=seed)
        codes = check(integer(space, x[:3], percentile, seed, per_channel), x)
        assert all(len(np.unique(values)) > 3 for values in codes.values())


@pytest.mark.parametrize("plan", ["regular", "init2", "dws"])
def test_factorized_networks(plan: str) -> None:
    space = load_space("tiny")
    x = normal(2, *space.input_shape)
    check(integer(factorize(space, parse_plan(space, plan)), x), x)


def weights_of(layer: Conv | Dense, channels: int, kind: str, rng: np.random.Generator) -> QuantizedLayer:
    """Codes: random ones with an odd zero point, all 255, 0 and 255 about 128, random ones with a scale a channel."""
    if isinstance(layer, Conv):
        shape: tuple[int, ...] = (layer.out_channels, channels // layer.groups, *layer.kernel)
    else:
        shape = (layer.out_features, channels)
    codes = {
        "random": lambda: rng.integers(0, 256, shape),
        "full": lambda: np.full(shape, 255),
        "signs": lambda: rng.choice([0, 255], shape),
        "channels": lambda: rng.integers(0, 256, shape),
    }[kind]()
    zero = {"random": 77, "full": 0, "signs": 128, "channels": 128}[kind]
    scales = 0.013 * rng.uniform(0.2, 1, shape[0] if kind == "channels" else 1)
    bias = torch.from_numpy(rng.integers(-9999, 9999, shape[0]).astype(np.int32))
    params = tuple(QuantParams(float(scale), zero) for scale in scales.astype(F32))
    return QuantizedLayer(torch.from_numpy(codes.astype(np.uint8)), params, bias)


KINDS = ["random", "full", "signs", "channels"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layer", "channels", "size"),
    [
        (Conv(5), 3, (7, 6)),
        (Conv(4, (1, 1)), 9, (5, 5)),
        (Conv(6, (3, 2), (2, 1), (1, 2), (1, 2)), 4, (9, 8)),
        (Conv(8, (3, 3), (2, 2), (2, 1), groups=2), 6, (9, 8)),
        (Conv(24, (3, 3), (1, 1), (1, 1), groups=12), 12, (5, 5)),
        (Conv(64, (3, 3), (1, 1), (1, 1), groups=64), 64, (4, 4)),
        (Conv(5, (3, 3), padding=(1, 1)), 256, (4, 4)),
        (Conv(4, (3, 3), padding=(1, 1), groups=2), 128, (4, 4)),
        (Conv(4, (5, 5), (1, 1), (2, 2)), 100, (5, 5)),
        (Conv(2, (17, 17), padding=(1, 1)), 2, (17, 17)),
        (Conv(2, (18, 18), padding=(1, 1), groups=2), 2, (18, 17)),
        (Dense(7), 40, None),
        (Dense(3), 4096, None),
    ],
    ids=str,
)
def test_sums_are_exact(layer: Conv | Dense, channels: int, size: tuple[int, int] | None, kind: str) -> None:
    """Those whose sums leave the integers of float32 too: with 29 full 3x3 channels, 259 full inputs, 17x17 windows."""
    rng = np.random.default_rng(1)
    weights = weights_of(layer, channels, kind, rng)
    shape = (3, channels, *(size or ()))
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[0] = 255
    for zero in (0, 13, 255):
        total = accumulate(layer, torch.from_numpy(codes), zero, weights)
        assert total.dtype == torch.int32
        assert np.array_equal(total.numpy(), summed(layer, codes, zero, weights))


def test_these_sums_leave_the_integers_of_float32() -> None:
    """What the test above is about: there a plain float32 sum is wrong."""
    rng = np.random.default_rng(1)
    layer = Dense(3)
    weights = weights_of(layer, 4096, "random", rng)
    codes = rng.integers(0, 256, (3, 4096)).astype(np.uint8)
    total = summed(layer, codes, 0, weights)
    assert np.abs(total).max() > 1 << 24
    assert not np.array_equal(total.astype(F32).astype(np.int64), total)


def given(rng: np.random.Generator, scale: float, zero: int) -> QuantParams:
    return QuantParams(float(F32(scale * rng.uniform(0.7, 1.4))), zero)


ZEROS = [(0, 0), (255, 0), (0, 255), (3, 101), (127, 128), (201, 77)]


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layer",
    [
        Conv(6, padding=(1, 1)),
        Conv(8, padding=(2, 2), dilation=(2, 2), groups=4),
        Conv(8, stride=(2, 2), padding=(1, 1), groups=8),
        Dense(20),
    ],
    ids=str,
)
def test_layers_with_weights_and_any_zero_points(layer: Conv | Dense, kind: str, zeros: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 256, (6, 8, 9, 8))
    codes[0], codes[1] = 255, 0
    seen = codes.reshape(6, -1) if isinstance(layer, Dense) else codes
    weights, source = weights_of(layer, seen.shape[1], kind, rng), given(rng, 0.03, zeros[0])
    reach = np.abs(summed(layer, seen, source.zero, weights)).max()
    target = given(rng, source.scale * weights.params[0].scale * reach / 200, zeros[1])
    layers: dict[str, Layer] = (
        {"f": Flatten(), "op": layer} if isinstance(layer, Dense) else {"op": layer, "f": Flatten()}
    )
    network = QuantizedNetwork(sequence((8, 9, 8), **layers), {INPUT: source, "op": target}, {"op": weights})
    check(network, torch.from_numpy(dequantized(codes, source)))


FUNCTIONS: tuple[Function, ...] = ("relu", "relu6", "hardswish", "hardsigmoid", "sigmoid", "silu")


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize(
    "layer",
    [
        Pool("global_average"),
        Pool("average"),
        Pool("average", (3, 2), (2, 1), (1, 1)),
        Pool("average", (3, 2), (2, 2), (1, 1), count_padding=True),
        Pool("average", (3, 3), (3, 2), (1, 0), ceil=True),
        Pool("average", (9, 8)),
        Pool("average", (9, 8), padding=(0, 1)),
        Pool("max", (3, 3), (2, 2), (1, 1)),
        Pool("max", (2, 3), (2, 3), ceil=True),
        *(Activation(function) for function in FUNCTIONS),
    ],
    ids=str,
)
def test_layers_without_weights_and_any_zero_points(layer: Layer, zeros: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 256, (6, 8, 9, 8))
    codes[0], codes[1] = 255, 0
    source, target = given(rng, 0.03, zeros[0]), given(rng, 0.02, zeros[1])
    network = QuantizedNetwork(sequence((8, 9, 8), op=layer, f=Flatten()), {INPUT: source, "op": target}, {})
    check(network, torch.from_numpy(dequantized(codes, source)))


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("joint", [Add(), Multiply(), Concat()], ids=str)
@pytest.mark.parametrize("order", [("other", INPUT), (INPUT, "other"), (INPUT, INPUT)])
@pytest.mark.parametrize("function", [None, "relu", "relu6"])
def test_joints_with_any_zero_points(
    joint: Layer, order: tuple[str, str], function: Function | None, zeros: tuple[int, int]
) -> None:
    rng = np.random.default_rng(6)
    depthwise = Conv(8, (1, 1), groups=8)
    nodes = [Node("other", depthwise, (INPUT,)), Node("joint", joint, order)]
    if INPUT == order[0] == order[1]:
        nodes = nodes[1:]
    params = {INPUT: given(rng, 0.03, zeros[0]), "other": given(rng, 0.04, zeros[1])}
    if function:
        nodes.append(Node("act", Activation(function), ("joint",)))
    params[nodes[-1].name] = given(rng, 0.05, 0 if function else zeros[0])
    nodes.append(Node("f", Flatten(), (nodes[-1].name,)))
    codes = rng.integers(0, 256, (3, 8, 5, 5))
    layers = {"other": weights_of(depthwise, 8, "random", rng)}
    network = QuantizedNetwork(Macroarchitecture("n", (8, 5, 5), tuple(nodes)), params, layers)
    check(network, torch.from_numpy(dequantized(codes, params[INPUT])))


def test_a_concat_of_equal_parameters_copies() -> None:
    params = QuantParams(float(F32(0.1)), 9)
    nodes = (Node("c", Concat(), (INPUT, INPUT)), Node("f", Flatten(), ("c",)))
    network = QuantizedNetwork(Macroarchitecture("n", (1, 16, 16), nodes), {INPUT: params, "c": params}, {})
    codes = torch.arange(256).view(1, 1, 16, 16)
    assert check(network, params.dequantize(codes))["f"].tolist() == [[*range(256), *range(256)]]


def test_a_concat_of_equal_scales_moves_the_zero_point() -> None:
    source, target = QuantParams(float(F32(0.1)), 9), QuantParams(float(F32(0.1)), 12)
    nodes = (Node("c", Concat(), (INPUT, INPUT)), Node("f", Flatten(), ("c",)))
    network = QuantizedNetwork(Macroarchitecture("n", (1, 2, 2), nodes), {INPUT: source, "c": target}, {})
    x = source.dequantize(torch.tensor([0, 9, 251, 255]).view(1, 1, 2, 2))
    assert check(network, x)["f"].tolist() == [[3, 12, 254, 255] * 2]


def test_requantizing_adds_the_zero_point_after_rounding() -> None:
    total = torch.tensor([-3, -1, 0, 1, 3, 5, 600, -600], dtype=torch.int32)
    half = torch.tensor([0.5])
    assert requantize(total[None], half, QuantParams(1.0, 3)).tolist() == [[1, 3, 3, 3, 5, 5, 255, 0]]
    assert requantize(total[None], half, QuantParams(1.0, 0)).tolist() == [[0, 0, 0, 0, 2, 2, 255, 0]]


def test_each_channel_has_its_multiplier() -> None:
    total = torch.tensor([[[3], [-5]], [[100], [7]]], dtype=torch.int32)
    found = requantize(total, torch.tensor([2.0, 0.5]), QuantParams(1.0, 10))
    assert found.tolist() == [[[16], [8]], [[210], [14]]]  # -2.5 and 3.5 go to the even


def test_requantizing_multiplies_in_float32() -> None:
    """With a float64 product a few of these would differ by one."""
    rng = np.random.default_rng(0)
    target = QuantParams(1.0, 100)
    differ = 0
    for multiplier in rng.uniform(1e-6, 1e-5, 50).astype(F32):
        halves = ((rng.integers(-100, 155, 2000) + 0.5) / float(multiplier)).astype(np.int64)
        total = np.concatenate([halves, halves + 1, halves - 1]).astype(np.int32)
        found = requantize(torch.from_numpy(total[None]), torch.tensor([multiplier]), target).numpy()
        assert np.array_equal(found, requantized(total[None], np.array([multiplier]), target))
        differ += int((found != clipped(np.rint(total * float(multiplier)) + 100)).sum())
    assert differ > 10


def test_an_average_pool_adds_the_zero_point_before_rounding() -> None:
    """The mean of 1 and 2 is 1.5, and 1.5 + 1 rounds to 2, though 1.5 rounds to 2 and 2 + 1 is 3."""
    nodes = (Node("p", Pool("average", (1, 2)), (INPUT,)), Node("f", Flatten(), ("p",)))
    params = {INPUT: QuantParams(1.0, 0), "p": QuantParams(1.0, 1)}
    network = QuantizedNetwork(Macroarchitecture("n", (1, 1, 4), nodes), params, {})
    assert check(network, torch.tensor([[[[1.0, 2.0, 1.0, 2.0]]]]))["p"].tolist() == [[[[2, 2]]]]


def test_a_global_average_divides_by_a_rounded_product() -> None:
    """With these scales 0.3 / (0.1 * 6) is 0.5 in float32, and 0.3 / 0.1 / 6 a little less: halves tell."""
    nodes = (Node("p", Pool("global_average"), (INPUT,)), Node("f", Flatten(), ("p",)))
    third, tenth = F32(0.3), np.nextafter(F32(0.1), F32(1))
    assert third / (tenth * F32(6)) == 0.5 > third / tenth / F32(6)
    params = {INPUT: QuantParams(float(third), 0), "p": QuantParams(float(tenth), 0)}
    network = QuantizedNetwork(Macroarchitecture("n", (3, 2, 3), nodes), params, {})
    codes = torch.zeros(1, 3, 2, 3)
    codes[0, :, 0, 0] = torch.tensor([3.0, 7.0, 11.0])
    assert check(network, params[INPUT].dequantize(codes))["f"].tolist() == [[2, 4, 6]]  # of 1.5, 3.5, 5.5


@pytest.mark.parametrize("order", [(INPUT, "b"), ("b", INPUT)])
def test_an_add_fuses_in_the_order_of_its_inputs(order: tuple[str, str]) -> None:
    """With these scales a tenth of all sums are halves in real numbers; rounding decides."""
    of_a, of_b, target = (QuantParams(float(F32(scale)), zero) for scale, zero in ((1.0, 110), (0.3, 179), (0.6, 162)))
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (1, 4, 30, 30))
    other = Conv(4, (1, 1))
    weights = QuantizedLayer(
        torch.from_numpy(rng.integers(0, 256, (4, 4, 1, 1)).astype(np.uint8)),
        (QuantParams(float(F32(0.001)), 128),),
        torch.zeros(4, dtype=torch.int32),
    )
    nodes = (Node("b", other, (INPUT,)), Node("sum", Add(), order), Node("f", Flatten(), ("sum",)))
    params = {INPUT: of_a, "b": of_b, "sum": target}
    network = QuantizedNetwork(Macroarchitecture("n", (4, 30, 30), nodes), params, {"b": weights})
    found = check(network, torch.from_numpy(dequantized(codes, of_a)))
    (a, b), (of_a, of_b) = ([values[name] for name in order] for values in (found, params))
    assert (added(b, a, of_b, of_a, target) != found["sum"]).mean() > 0.03
    r_a, r_b = (F32(one.scale) / F32(target.scale) for one in (of_a, of_b))
    c = F32(target.zero) - (r_a * F32(of_a.zero) + r_b * F32(of_b.zero))
    one_by_one = clipped(np.rint(a.astype(F32) * r_a + (b.astype(F32) * r_b + c)))
    assert (one_by_one != found["sum"]).sum() > 10


def test_tables() -> None:
    source, target = QuantParams(0.0625, 128), QuantParams(0.03125, 10)
    assert lookup_table(None, source, source).tolist() == list(range(256))
    assert lookup_table(None, QuantParams(1.0, 0), QuantParams(2.0, 7)).tolist()[:6] == [7, 7, 8, 9, 9, 9]
    relu, relu6, sigmoid, slopes = (
        lookup_table(layer, source, target).tolist()
        for layer in (*map(Activation, ("relu", "relu6", "hardsigmoid")), Activation("leaky_relu", (0.0, -0.5)))
    )
    assert relu == [[min(255, 10 + 2 * max(0, q - 128)) for q in range(256)]]
    assert relu6 == [[10 + min(192, 2 * max(0, q - 128)) for q in range(256)]]
    assert sigmoid[0][128] == 10 + 16
    assert slopes == [*relu, [min(255, 10 + max(2 * (q - 128), 128 - q)) for q in range(256)]]


def test_weights_by_min_and_max_and_biases_in_their_scale() -> None:
    weight = torch.tensor([[-1.0, 0.5], [126.5, 3.0], [0.25, -0.75]])
    layer = quantize_layer(weight, torch.tensor([0.625, 0.875, -0.625]), QuantParams(0.5, 99))
    assert layer.params == (QuantParams(0.5, 2),)
    assert layer.codes.tolist() == [[0, 3], [255, 8], [2, 0]]
    assert layer.bias.dtype == torch.int32
    assert layer.bias.tolist() == [2, 4, -2]  # in steps of 0.25, halves to the even


def test_weights_with_a_scale_a_channel() -> None:
    """The smallest that holds them in -128 to 127 steps."""
    weight = torch.tensor([[-1.0, 0.5], [31.75, -8.0], [-0.25, 0.1], [0.0, 0.0]])
    layer = quantize_layer(weight, torch.tensor([1.0, -1.0, 0.625, 3.0]), QuantParams(0.5, 99), per_channel=True)
    steps = (1 / 128, 31.75 / 127, 0.25 / 128, 31.75 / 127)  # a dead channel has the widest one's
    assert layer.params == tuple(QuantParams(float(F32(step)), 128) for step in steps)
    assert layer.codes.tolist() == [[0, 192], [255, 96], [0, 179], [128, 128]]
    assert layer.bias.tolist() == [256, -8, 640, 24]  # in halves of these steps


def test_a_channel_is_held_to_half_a_step_of_its_own() -> None:
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(
        (rng.normal(size=(200, 5, 3, 3)) * 10.0 ** rng.uniform(-6, 3, (200, 1, 1, 1))).astype(F32)
    )
    weight[:40] = weight[:40].abs()
    weight[40:80] = -weight[40:80].abs()
    layer = quantize_layer(weight, torch.zeros(200), QuantParams(0.1, 0), per_channel=True)
    assert {params.zero for params in layer.params} == {128}
    scales = torch.tensor([params.scale for params in layer.params], dtype=torch.float64)
    widest = torch.maximum(weight.flatten(1).amax(1) / 127, -weight.flatten(1).amin(1) / 128)
    assert torch.allclose(scales, widest.double(), rtol=1e-6, atol=0)
    held = torch.stack([params.dequantize(codes) for params, codes in zip(layer.params, layer.codes, strict=True)])
    assert torch.equal(layer.weight, held)
    errors = (held.double() - weight.double()).abs().flatten(1).amax(1)
    assert bool((errors <= scales * (0.5 + 1e-4)).all())  # 127 steps of float32


@pytest.mark.parametrize("bias", [1e-3, -1.0, 1e4, -1e9, 1e30])
@pytest.mark.parametrize("weight", [0.0, 1e-38, 1e-20, 1e-6, 1.0])
def test_channels_whose_bias_is_far_above_their_weights(weight: float, bias: float) -> None:
    """The bias comes out right to a part in 2^24, or half a step; the weights as well as int32 allows."""
    source = QuantParams(float(F32(0.013)), 7)
    layer = quantize_layer(torch.tensor([[weight, -weight], [0.5, 0.25]]), torch.tensor([bias, 0.1]), source, True)
    scales = F32(source.scale) * np.array([params.scale for params in layer.params], dtype=F32)
    assert np.isfinite(scales).all()
    assert (scales > 0).all()
    assert np.abs(layer.bias.numpy()).max() <= 2**30 * (1 + 2**-20)
    real = layer.bias.numpy().astype(np.float64) * scales.astype(np.float64)
    assert real[0] == pytest.approx(float(F32(bias)), rel=2**-23, abs=float(scales[0]) / 2)
    step = layer.params[0].scale
    assert step <= max(weight / 127 if weight else 0.5 / 127, abs(bias) / (source.scale * 2**30), 2**-126) * 1.0001
    alone = quantize_layer(torch.tensor([[0.5, 0.25]]), torch.tensor([0.1]), source, True)
    assert (layer.params[1], layer.bias[1]) == (alone.params[0], alone.bias[0])
    assert layer.codes[1].tolist() == alone.codes[0].tolist()


def test_a_channel_too_small_for_a_scale_in_float32() -> None:
    layer = quantize_layer(torch.tensor([[1e-44], [1.0]]), torch.zeros(2), QuantParams(1.0, 0), per_channel=True)
    assert layer.params[0] == QuantParams(2.0**-126, 128)
    assert layer.codes.tolist() == [[128], [255]]
    assert layer.bias.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("per_channel", "steps", "zero", "codes"),
    [
        (False, [2 / (0.25 * 2**30)], 0, [2**28, 0, -(2**30)]),
        (True, [0.5 / (0.25 * 2**30), 1.0, 2 / (0.25 * 2**30)], 128, [2**30, 0, -(2**30)]),
    ],
)
def test_weights_of_zero_have_a_scale_for_the_bias(
    per_channel: bool, steps: list[float], zero: int, codes: list[int]
) -> None:
    layer = quantize_layer(torch.zeros(3, 2), torch.tensor([0.5, 0.0, -2.0]), QuantParams(0.25, 0), per_channel)
    assert layer.params == tuple(QuantParams(step, zero) for step in steps)
    assert layer.codes.tolist() == [[zero, zero]] * 3
    assert layer.bias.tolist() == codes


def test_biases_are_rounded_in_float64() -> None:
    """A float32 quotient has no odd numbers above 2^24."""
    weight = torch.tensor([[127.5], [255.0]])
    source = QuantParams(float(F32(1e-7)), 0)
    bias = torch.tensor([12.345678, -34.56789])
    layer = quantize_layer(weight, bias, source)
    scale = float(F32(1e-7) * F32(1.0))
    exact = [int(np.rint(value / scale)) for value in bias.double().tolist()]
    assert layer.bias.tolist() == exact
    assert any(value != int(F32(value)) for value in exact)


COUNT = 2**31 // (255 * 255)
"""So many weights of 255 steps an int32 sum can take."""


@pytest.mark.parametrize("sign", [1, -1])
def test_a_scale_is_widened_only_where_int32_has_no_room_for_the_bias(sign: int) -> None:
    room = 2**31 - 1 - COUNT * 255 * 255
    weight, source = torch.full((1, COUNT), 127.5) * sign, QuantParams(1.0, 0)
    layer = quantize_layer(weight, torch.tensor([sign * room * 0.5]), source)
    assert layer.params == (QuantParams(0.5, 0 if sign == 1 else 255),)
    assert layer.bias.tolist() == [sign * room]
    wider = quantize_layer(weight, torch.tensor([sign * (room + 1) * 0.5]), source)
    (params,) = wider.params
    assert params.zero == layer.params[0].zero
    assert 1 < params.scale < 1.01 * 1.0 / (1 - 128 * COUNT / 2**30)  # half of int32 is left to bias correction
    assert (wider.weight - weight).abs().max() <= params.scale / 2
    assert float(wider.bias) * params.scale == pytest.approx(sign * (room + 1) * 0.5, abs=params.scale / 2)


def test_weights_whose_sums_could_leave_int32_are_refused() -> None:
    weight = torch.ones(1, COUNT + 1)
    for bias in (0.0, 1.0, -1e9):
        with pytest.raises(FnetError, match=r"int32 accumulation can overflow: .* reaches 2\.15e\+09"):
            quantize_layer(weight, torch.tensor([bias]), QuantParams(1.0, 0))


SHAPES = [(8, 5, 3, 3), (8, 1, 3, 3), (6, 40), (2, 30_000)]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-12, 1e-9, 1e-6, 1e-3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_biases_far_above_the_weights_come_out_right(shape: tuple[int, ...], size: float, per_channel: bool) -> None:
    """Also where half of the channels are zero, and where the sources are coarse or fine."""
    rng = np.random.default_rng(3)
    bias = torch.from_numpy(rng.uniform(-1, 1, shape[0]).astype(F32))
    for step, some in product((1e-4, 0.02, 3.0), (False, True)):
        weight = torch.from_numpy((size * rng.normal(size=shape)).astype(F32))
        if some:
            weight[: shape[0] // 2] = 0
        source = QuantParams(float(F32(step)), 7)
        layer = quantize_layer(weight, bias, source, per_channel)
        scale = layer.bias_scale(source).double()
        held = layer.bias.double() * scale
        assert bool((scale >= np.finfo(F32).tiny).all())
        assert bool(((held - bias).abs() <= bias.abs() * 2**-20 + scale / 2).all())
        # An output is wrong by half a step of each weight, and of the bias, at most.
        reach = 255 * source.scale * (layer.weight.double() - weight.double()).abs().flatten(1).sum(1)
        whole = 255 * source.scale * weight.double().abs().flatten(1).sum(1) + bias.abs()
        if some and per_channel:
            assert bool((reach[: shape[0] // 2] == 0).all())
        if size <= 1e-6 and len(shape) > 2:
            assert float((reach + scale / 2).max()) < 0.004 * float(whole.max())


def test_a_bias_scale_is_a_normal_number() -> None:
    """1e-30 times 1e-30 is none in float32; the runtime has no integers for it."""
    source = QuantParams(float(F32(1e-30)), 0)
    for per_channel in (False, True):
        layer = quantize_layer(torch.full((1, 1), 1e-30), torch.zeros(1), source, per_channel)
        assert float(layer.bias_scale(source)) == pytest.approx(2.0**-126, rel=1e-6)
        assert layer.bias.tolist() == [0]


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


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_quantized_network_comes_back_from_its_file(tmp_path: Path, per_channel: bool) -> None:
    x = normal(4, *MIXED.input_shape)
    network = integer(MIXED, x, per_channel=per_channel)
    write_tensors(tmp_path / "q", network.to_tensors(), {})
    tensors, _ = read_tensors(tmp_path / "q")
    found = QuantizedNetwork.from_tensors(network.network, tensors)
    assert found.params == network.params
    assert {name: layer.params for name, layer in found.layers.items()} == {
        name: layer.params for name, layer in network.layers.items()
    }
    assert torch.equal(found(x), network(x))
    assert found.to_tensors().keys() == tensors.keys()


@pytest.mark.parametrize(
    "name", ["input.output.zero", "deep.act.output.scale", "out.bias", "stem.weight", "stem.weight.zero"]
)
def test_a_file_that_lacks_something_is_refused(name: str) -> None:
    network = integer(MIXED, normal(2, *MIXED.input_shape))
    tensors = network.to_tensors()
    del tensors[name]
    with pytest.raises(FnetError, match=rf"do not fit the network: '{name}' is missing"):
        QuantizedNetwork.from_tensors(network.network, tensors)


def test_a_product_adds_the_zero_point_before_rounding() -> None:
    """1 / 2 + 3 = 3.5 rounds to 4, 9 / 2 + 3 = 7.5 to 8; halves rounded first, to even, would give 3 and 7."""
    one, target = QuantParams(1.0, 0), QuantParams(2.0, 3)
    nodes = (Node("m", Multiply(), (INPUT, "c")), Node("f", Flatten(), ("m",)))
    gate = Node("c", Pool("max", (1, 1)), (INPUT,))
    network = QuantizedNetwork(Macroarchitecture("n", (1, 1, 2), (gate, *nodes)), {INPUT: one, "m": target}, {})
    x = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)
    ((_, codes),) = [step for step in network.codes(x) if step[0].name == "m"]
    assert codes.flatten().tolist() == [round(1 / 2 + 3), round(9 / 2 + 3)]
