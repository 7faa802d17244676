"""torch's operators as layers: what each computes, from its arguments and the shapes that it reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from math import lcm
from typing import Any, cast

import torch
from torch import Tensor

from fnet_search.errors import FnetError
from fnet_search.layers import (
    Activation,
    Add,
    Affine,
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

OPERANDS = ("input", "self", "other")
"""Arguments that mostly are; of arithmetic one may be a constant."""

MOVES = {
    aten.alias, aten.channel_shuffle, aten.chunk, aten.clone, aten.contiguous, aten.detach, aten.expand, aten.flatten,
    aten.narrow, aten.permute, aten.reshape, aten.select, aten.slice, aten.split, aten.split_with_sizes, aten.squeeze,
    aten.transpose, aten.unbind, aten.unflatten, aten.unsqueeze, aten.view, aten._unsafe_view,
}  # fmt: skip
"""Operators that only move values."""

NOTHING = {aten.dropout, aten.feature_dropout, aten._to_copy, aten.to, aten._assert_tensor_metadata}
"""Operators that give what they read, in evaluation and float32."""

SHAPED = {aten.full_like, aten.new_full, aten.new_ones, aten.new_zeros, aten.ones_like, aten.zeros_like}
"""Operators that give a constant, of what they read they take the shape."""

NO_SOFTMAX = "it gives probabilities where logits are needed; leave it out: the loss of a training has it"
NO_QUOTIENT = "a division by what hangs on the image is no layer"
REASONS = {
    aten.softmax: NO_SOFTMAX,
    aten.log_softmax: NO_SOFTMAX,
    aten.reciprocal: NO_QUOTIENT,
    aten._native_batch_norm_legit: "it normalises with the statistics of what it reads, in evaluation too; "
    "a BatchNorm with running statistics is a layer",
}
"""Why an operator is no layer, where there is more to say than that."""


@dataclass(frozen=True)
class Call:
    """An operator's arguments by name, as tensors those that do not hang on the image; the shapes of what it reads and
    gives, without the batch. `constant` names the tensors that hang on no parameter either: no training moves them."""

    given: Mapping[str, Any]
    shapes: Sequence[Shape]
    result: Shape
    constant: frozenset[str] = frozenset()

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


def _by_channel(call: Call, value: Tensor, trained: bool) -> tuple[float, ...]:
    """A tensor against what an operator gives: one number, or one a channel."""
    shape = call.result
    padded = (1,) * (len(shape) + 1 - value.ndim) + tuple(value.shape)
    size = size_text(tuple(value.shape)) or "one"
    _require(bool(value.isfinite().all()), "its constant is not finite")
    if trained:
        good = all(length == 1 for axis, length in enumerate(padded) if axis != 1)
        _require(good, f"a parameter of {size} is no layer: one number a channel would be")
        return tuple(value.double().flatten().tolist())
    rows = torch.broadcast_to(value.double(), (padded[0], *shape)).transpose(0, 1).flatten(1)
    _require(bool((rows == rows[:, :1]).all()), "a constant that differs from place to place is no layer")
    values = tuple(rows[:, 0].tolist())
    return values[:1] if len(set(values)) == 1 else values


def _scaled(call: Call, value: Tensor, trained: bool = False) -> Layers:
    values = _by_channel(call, value, trained)
    return [Affine(scale=values, trained=trained)] if trained or values != (1,) else []


def _shifted(call: Call, value: Tensor, trained: bool = False) -> Layers:
    values = _by_channel(call, value, trained)
    return [Affine(shift=values, trained=trained)] if trained or values != (0,) else []


def _trained_bias(call: Call) -> tuple[bool, Layers]:
    """Whether a layer has a bias that is trained, and what adds one that is a constant."""
    bias = call.given["bias"]
    if bias is None or "bias" not in call.constant:
        return bias is not None, []
    return False, _shifted(call, bias.view(-1, *[1] * (len(call.result) - 1)))


def _conv(call: Call) -> Layers:
    weight, padding = call.given["weight"], call.given["padding"]
    _require("weight" not in call.constant, CONSTANT_KERNEL)
    _require(weight.ndim == 4, "only 2-D convolutions are layers")
    kernel, dilation = pair(weight.shape[2:]), call.pair("dilation")
    if padding == "same":
        both = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        _require(not any(size % 2 for size in both), "padding 'same' of an even kernel is not the same on both sides")
        padding = [size // 2 for size in both]
    pads = (0, 0) if padding == "valid" else pair(padding)
    bias, shift = _trained_bias(call)
    return [Conv(len(weight), kernel, call.pair("stride"), pads, dilation, call.given["groups"], bias), *shift]


def _dense(call: Call) -> Layers:
    _require("weight" not in call.constant, CONSTANT_KERNEL)
    bias, shift = _trained_bias(call)
    return [Dense(len(call.given["weight"]), bias), *shift]


CONSTANT_KERNEL = "its kernel is a constant, and a layer's is trained; make it an nn.Parameter"


def _batch_norm(call: Call) -> Layers:
    """With a weight or a bias alone, or with constants, these are layers of their own."""
    parts = {name: call.given[name] for name in ("weight", "bias")}
    if not any(value is None or name in call.constant for name, value in parts.items()):
        return [BatchNorm(call.given["eps"])]
    layers: list[Layer] = [BatchNorm(call.given["eps"], affine=False)]
    for (name, value), apply in zip(parts.items(), (_scaled, _shifted), strict=True):
        if value is not None:
            layers += apply(call, value.view(-1, *[1] * (len(call.result) - 1)), name not in call.constant)
    return layers


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


def _operand(call: Call) -> str | None:
    """Which of `self` and `other` does not hang on the image, if any."""
    name = next((name for name in ("self", "other") if isinstance(call.given[name], Tensor)), None)
    _require(name is None or call.result == call.shapes[0], "a constant that makes a tensor larger is no layer")
    return name


def _sum(own: int, other: int) -> Callable[[Call], Layers]:
    """own self + other other, where the second in the operator's name is taken `alpha` times."""

    def layers(call: Call) -> Layers:
        alpha = call.given["alpha"]
        factors = {"self": own, "other": other}
        factors["self" if own < 0 else "other"] *= alpha
        name = _operand(call)
        if name is None:
            _require(factors == {"self": 1, "other": 1}, "a difference, or a sum with a factor, of tensors is no layer")
            return [Add()]
        image = factors["other" if name == "self" else "self"]
        shift = _shifted(call, call.given[name] * factors[name], name not in call.constant)
        return [*_scaled(call, torch.tensor(image)), *shift]

    return layers


def _product(call: Call) -> Layers:
    name = _operand(call)
    return [Multiply()] if name is None else _scaled(call, call.given[name], name not in call.constant)


def _quotient(call: Call) -> Layers:
    _require(call.given.get("rounding_mode") is None, "a division that is rounded is no layer")
    _require(_operand(call) == "other", NO_QUOTIENT)
    return _scaled(call, 1 / call.given["other"].double(), "other" not in call.constant)


def _negative(call: Call) -> Layers:
    return [Affine(scale=(-1.0,))]


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
    aten.max_pool2d_with_indices: _max_pool,
    aten.avg_pool2d: _average_pool,
    aten.adaptive_avg_pool2d: _adaptive("average"),
    aten.adaptive_max_pool2d: _adaptive("max"),
    aten.mean: _mean,
    aten.add: _sum(1, 1),
    aten.sub: _sum(1, -1),
    aten.rsub: _sum(-1, 1),
    aten.mul: _product,
    aten.div: _quotient,
    aten.neg: _negative,
    aten.cat: _concat,
    aten.upsample_nearest2d: _nearest,
}
