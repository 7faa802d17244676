"""torch's operators as layers: what each computes, from its arguments and the shapes that it reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from math import lcm
from typing import Any, cast

import torch

from fnet_search.errors import FnetError
from fnet_search.layers import (
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
    Pool,
    Reduction,
    Resample,
    Shape,
)
from fnet_search.quantities import size_text
from fnet_search.tables import Pair

aten = torch.ops.aten

WEIGHTS = ("weight", "bias", "running_mean", "running_var")
"""Arguments that are no tensor of the image."""

MOVES = {
    aten.alias, aten.channel_shuffle, aten.chunk, aten.clone, aten.contiguous, aten.detach, aten.expand, aten.flatten,
    aten.narrow, aten.permute, aten.reshape, aten.select, aten.slice, aten.split, aten.split_with_sizes, aten.squeeze,
    aten.transpose, aten.unflatten, aten.unsqueeze, aten.view, aten._unsafe_view,
}  # fmt: skip
"""Operators that only move values."""

NOTHING = {aten.dropout, aten.feature_dropout, aten._to_copy, aten.to, aten._assert_tensor_metadata}
"""Operators that give what they read, in evaluation and float32."""

NEUTRAL = {aten.add: 0, aten.mul: 1}
"""Numbers that change nothing: Python's ``sum`` begins with one."""


@dataclass(frozen=True)
class Call:
    """An operator's arguments by name, weights as tensors; the shapes of what it reads and gives, without the batch."""

    given: Mapping[str, Any]
    shapes: Sequence[Shape]
    result: Shape

    def pair(self, name: str) -> Pair:
        return pair(self.given[name])

    @property
    def size(self) -> Pair:
        """Height and width of what it reads."""
        if len(self.shapes[0]) != 3:
            raise FnetError(f"it reads {size_text(self.shapes[0])} where a layer reads a feature map")
        return self.shapes[0][1], self.shapes[0][2]


Layers = Sequence[Layer]
"""One after the other; the first reads all that the operator does. None: it gives what it reads."""


def pair(value: object) -> Pair:
    """Height and width, of one or two numbers; zeros of none."""
    parts = cast(Sequence[int], value if isinstance(value, Sequence) else (value,))
    return (parts[0], parts[-1]) if parts else (0, 0)


def _require(good: bool, problem: str) -> None:
    if not good:
        raise FnetError(problem)


def _conv(call: Call) -> Layers:
    weight, padding = call.given["weight"], call.given["padding"]
    _require(weight.ndim == 4, "only 2-D convolutions are layers")
    kernel, dilation = pair(weight.shape[2:]), call.pair("dilation")
    if padding == "same":
        both = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        _require(not any(size % 2 for size in both), "padding 'same' of an even kernel is not the same on both sides")
        padding = [size // 2 for size in both]
    pads = (0, 0) if padding == "valid" else pair(padding)
    bias = call.given["bias"] is not None
    return [Conv(len(weight), kernel, call.pair("stride"), pads, dilation, call.given["groups"], bias)]


def _dense(call: Call) -> Layers:
    return [Dense(len(call.given["weight"]), call.given["bias"] is not None)]


def _batch_norm(call: Call) -> Layers:
    return [BatchNorm(call.given["eps"])]


def _activation(function: Function) -> Callable[[Call], Layers]:
    return lambda call: [Activation(function)]


def _clip(low: str, high: str) -> Callable[[Call], Layers]:
    """ReLU and ReLU6, as torch writes them too."""

    def layers(call: Call) -> Layers:
        bounds = call.given[low], call.given[high]
        if bounds == (0, None):
            return [Activation("relu")]
        _require(
            bounds == (0, 6), f"of all ranges only 0 to 6, ReLU6, is a layer; this one is {bounds[0]} to {bounds[1]}"
        )
        return [Activation("relu6")]

    return layers


def _pool(reduction: Reduction, kernel: Pair, stride: Pair, padding: Pair = (0, 0), ceil: bool = False) -> Pool:
    return Pool(reduction, kernel, None if stride in (kernel, (0, 0)) else stride, padding, ceil)


def _max_pool(call: Call) -> Layers:
    _require(call.pair("dilation") == (1, 1), "a pool with dilation is no layer")
    window = call.pair("kernel_size"), call.pair("stride"), call.pair("padding")
    return [_pool("max", *window, call.given["ceil_mode"])]


def _average_pool(call: Call) -> Layers:
    _require(call.given["divisor_override"] is None, "an average pool with a divisor of its own is no layer")
    window = call.pair("kernel_size"), call.pair("stride"), call.pair("padding")
    pool = _pool("average", *window, call.given["ceil_mode"])
    counted = call.given["count_include_pad"] and pool.padding != (0, 0)
    ceil = pool.overhang((1, *call.size)) != (0, 0)
    _require(not (counted and ceil), "an average pool that counts its padding, with ceil_mode, is no layer")
    return [replace(pool, ceil=ceil, count_padding=counted)]


def _adaptive(reduction: Reduction) -> Callable[[Call], Layers]:
    def layers(call: Call) -> Layers:
        wanted = pair(call.result[1:])
        if wanted == call.size:
            return []
        if wanted == (1, 1) and reduction == "average":
            return [Pool("global_average")]
        rows, columns = (_windows(*lengths) for lengths in zip(call.size, wanted, strict=True))
        found: list[Layer] = []
        if not rows.whole or not columns.whole:
            found.append(Resample(rows.places, columns.places))
        kernel, stride = (rows.length, columns.length), (rows.stride, columns.stride)
        return found if kernel == (1, 1) else [*found, _pool(reduction, kernel, stride)]

    return layers


@dataclass(frozen=True)
class _Windows:
    """An adaptive pool along one side: windows of equal length over the pixels at `places`, which may be all."""

    places: tuple[int, ...]
    length: int
    stride: int
    whole: bool


def _windows(size: int, wanted: int) -> _Windows:
    """torch's: from floor(i size / wanted) to ceil((i + 1) size / wanted). Where they have different lengths or steps,
    each one's pixels are repeated to a common multiple of the lengths: neither mean nor maximum changes."""
    starts = [i * size // wanted for i in range(wanted)]
    spans = [range(start, -(-(i + 1) * size // wanted)) for i, start in enumerate(starts)]
    steps = {b - a for a, b in pairwise(starts)} or {size}
    if len({len(span) for span in spans}) == len(steps) == 1 and 0 not in steps:
        return _Windows(tuple(range(size)), len(spans[0]), steps.pop(), True)
    length = lcm(*map(len, spans))
    places = chain.from_iterable([at] * (length // len(span)) for span in spans for at in span)
    return _Windows(tuple(places), length, length, False)


def _mean(call: Call) -> Layers:
    axes = sorted(axis % 4 for axis in call.given["dim"] or ())
    whole = axes == [2, 3] and min(call.size) > 0  # a vector has no size, and says so
    _require(whole, "of all means only that over height and width is a layer")
    return [Pool("global_average"), *([] if call.given["keepdim"] else [Flatten()])]


def _add(call: Call) -> Layers:
    _require(call.given["alpha"] == 1, "a sum with a factor is no layer")
    return [Add()]


def _concat(call: Call) -> Layers:
    axes = len(call.shapes[0]) + 1
    _require(call.given["dim"] % axes == 1, "tensors can be concatenated over their channels only")
    return [Concat()] if len(call.shapes) > 1 else []


def _nearest(call: Call) -> Layers:
    sides = zip(call.size, call.result[1:], strict=True)
    rows, columns = (tuple(i * own // asked for i in range(asked)) for own, asked in sides)
    return [Resample(rows, columns)]


LAYERS: Mapping[Any, Callable[[Call], Layers]] = {
    aten.conv2d: _conv,
    aten.linear: _dense,
    aten._native_batch_norm_legit_no_training: _batch_norm,
    aten.relu: _activation("relu"),
    aten.relu6: _activation("relu6"),
    aten.hardswish: _activation("hardswish"),
    aten.hardsigmoid: _activation("hardsigmoid"),
    aten.sigmoid: _activation("sigmoid"),
    aten.silu: _activation("silu"),
    aten.hardtanh: _clip("min_val", "max_val"),
    aten.clamp: _clip("min", "max"),
    aten.max_pool2d: _max_pool,
    aten.avg_pool2d: _average_pool,
    aten.adaptive_avg_pool2d: _adaptive("average"),
    aten.adaptive_max_pool2d: _adaptive("max"),
    aten.mean: _mean,
    aten.add: _add,
    aten.mul: lambda call: [Multiply()],
    aten.cat: _concat,
    aten.upsample_nearest2d: _nearest,
}
