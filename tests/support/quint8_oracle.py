"""The rules of docs/quint8.md in plain numpy: int64 sums, one float32 operation at a time, fractions where the runtime
fuses two."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fnet_search.arch.layers import (
    Activation,
    Add,
    Concat,
    Conv,
    Dense,
    Flatten,
    Multiply,
    Pad,
    Pool,
    Resample,
    Reshape,
    Shuffle,
    Slice,
)
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.quant.fold import fold
from fnet_search.quant.quant_params import QuantParams
from fnet_search.quant.quantize import quantize
from fnet_search.quant.quantized_layer import QuantizedLayer
from fnet_search.quant.ranges import calibrate, carriers
from fnet_search.quant.scheme import RangeMethod
from fnet_search.quant.simulator import QuantizedNetwork
from tests.support.networks import batches_of, randomized

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


COUNT = 2**31 // (255 * 255)
"""So many weights of 255 steps an int32 sum can take."""
