"""Translates torch operators to layers, from their arguments and the shapes of their inputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, pairwise
from math import inf, lcm
from typing import Any, cast

import torch
from torch import Tensor

from fnet_search.arch.layers import (
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
    Pad,
    Pool,
    Reduction,
    Resample,
    Shape,
)
from fnet_search.base.errors import FnetError
from fnet_search.base.toml_tables import IntPair
from fnet_search.base.units import size_text

aten = torch.ops.aten

WEIGHTS = ("weight", "bias", "running_mean", "running_var")
"""Names of arguments that are weights."""

OPERANDS = ("input", "self", "other")
"""Names of arguments that depend on the image; in arithmetic one of them may be a constant."""

MOVES = {
    aten.alias, aten.channel_shuffle, aten.chunk, aten.clone, aten.contiguous, aten.detach, aten.expand, aten.flatten,
    aten.flip, aten.narrow, aten.pad, aten.permute, aten.pixel_shuffle, aten.pixel_unshuffle, aten.repeat,
    aten.repeat_interleave, aten.reshape, aten.roll, aten.rot90, aten.select, aten.slice, aten.split,
    aten.split_with_sizes, aten.squeeze, aten.tile, aten.transpose, aten.unbind, aten.unflatten, aten.unsqueeze,
    aten.view, aten._unsafe_view,
}  # fmt: skip
"""Operators that only move values; `aten.pad` in its modes that pad with values of the image."""

IDENTITIES = {aten.dropout, aten.feature_dropout, aten._to_copy, aten.to, aten._assert_tensor_metadata}
"""Operators that are the identity in evaluation mode and float32."""

SHAPE_ONLY = {aten.full_like, aten.new_full, aten.new_ones, aten.new_zeros, aten.ones_like, aten.zeros_like}
"""Operators that give a constant: they only use the shape of their input."""

NO_SOFTMAX = "it gives probabilities where logits are needed; leave it out, since the training loss includes it"
NO_QUOTIENT = "a division by a tensor that depends on the image is not supported"
REASONS = {
    aten.softmax: NO_SOFTMAX,
    aten.log_softmax: NO_SOFTMAX,
    aten.reciprocal: NO_QUOTIENT,
    aten._native_batch_norm_legit: "it normalises with the statistics of its input, in evaluation mode too; "
    "use a BatchNorm with running statistics",
}
"""Messages for operators that are not supported, where the general one says too little."""


@dataclass(frozen=True)
class Call:
    """One call of an operator. `given` has its arguments by name, those that do not depend on the image as tensors.
    `shapes` and `result` are the shapes of inputs and output, without the batch. `constant` names the tensors that
    depend on no parameter either, so that training does not change them. `target` is the operator."""

    given: Mapping[str, Any]
    shapes: Sequence[Shape]
    result: Shape
    constant: frozenset[str] = frozenset()
    target: Any = None

    def pair(self, name: str) -> IntPair:
        """An argument as height and width."""
        return pair(self.given[name])

    @property
    def size(self) -> IntPair:
        """Height and width of the input. Raises FnetError if it is not a feature map."""
        if len(self.shapes[0]) != 3:
            raise FnetError(f"it reads {size_text(self.shapes[0])} where a layer needs a feature map")
        return self.shapes[0][1], self.shapes[0][2]


Layers = Sequence[Layer]
"""Layers in a chain; the first reads all inputs of the operator. Empty for the identity."""


def pair(value: object) -> IntPair:
    """One or two numbers as height and width; (0, 0) for an empty list."""
    parts = cast(Sequence[int], value if isinstance(value, Sequence) else (value,))
    return (parts[0], parts[-1]) if parts else (0, 0)


def _require(good: bool, problem: str) -> None:
    if not good:
        raise FnetError(problem)


def _by_channel(call: Call, value: Tensor, trained: bool) -> tuple[float, ...]:
    """A tensor that broadcasts against the operator's output, as one number or one per channel. Raises FnetError if it
    varies between positions or images."""
    shape = call.result
    padded = (1,) * (len(shape) + 1 - value.ndim) + tuple(value.shape)
    size = size_text(tuple(value.shape)) or "one"
    _require(bool(value.isfinite().all()), "its constant is not finite")
    if trained:
        good = all(length == 1 for axis, length in enumerate(padded) if axis != 1)
        _require(good, f"a parameter of size {size} is not supported; only one number per channel is")
        return tuple(value.double().flatten().tolist())
    rows = torch.broadcast_to(value.double(), (padded[0], *shape)).transpose(0, 1).flatten(1)
    _require(bool((rows == rows[:, :1]).all()), "a constant that differs between positions is not supported")
    values = tuple(rows[:, 0].tolist())
    return values[:1] if len(set(values)) == 1 else values


def _scaled(call: Call, value: Tensor, trained: bool = False) -> Layers:
    """A layer that multiplies by a tensor; none for a constant 1."""
    values = _by_channel(call, value, trained)
    return [Affine(scale=values, trained=trained)] if trained or values != (1,) else []


def _shifted(call: Call, value: Tensor, trained: bool = False) -> Layers:
    """A layer that adds a tensor; none for a constant 0."""
    values = _by_channel(call, value, trained)
    return [Affine(shift=values, trained=trained)] if trained or values != (0,) else []


def _trained_bias(call: Call) -> tuple[bool, Layers]:
    """Whether the layer has a trained bias, and the layers that add a constant one."""
    bias = call.given["bias"]
    if bias is None or "bias" not in call.constant:
        return bias is not None, []
    return False, _shifted(call, bias.view(-1, *[1] * (len(call.result) - 1)))


def _conv(call: Call) -> Layers:
    weight, padding = call.given["weight"], call.given["padding"]
    _require("weight" not in call.constant, CONSTANT_KERNEL)
    _require(weight.ndim == 4, "only 2-D convolutions are supported")
    kernel, dilation = pair(weight.shape[2:]), call.pair("dilation")
    before: list[Layer] = []
    if padding == "same":
        down, right = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
        before = [Pad((0, down // 2, right // 2), (0, down - down // 2, right - right // 2))]
    pads = (0, 0) if isinstance(padding, str) else pair(padding)
    bias, shift = _trained_bias(call)
    conv = Conv(len(weight), kernel, call.pair("stride"), pads, dilation, call.given["groups"], bias)
    return [*before, conv, *shift]


def _dense(call: Call) -> Layers:
    _require("weight" not in call.constant, CONSTANT_KERNEL)
    bias, shift = _trained_bias(call)
    return [Dense(len(call.given["weight"]), bias), *shift]


CONSTANT_KERNEL = "its kernel is a constant; make it an nn.Parameter"


def _batch_norm(call: Call) -> Layers:
    """A BatchNorm; a weight without a bias, a bias without a weight, and constants become affine layers after it."""
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


def _sloped(function: Function, alpha: str) -> Callable[[Call], Layers]:
    return lambda call: [Activation(function, float(call.given[alpha]))]


def _elu(call: Call) -> Layers:
    _require(call.given["scale"] == call.given["input_scale"] == 1, "an ELU with other scales than 1 is not supported")
    return [Activation("elu", float(call.given["alpha"]))]


def _prelu(call: Call) -> Layers:
    """A PReLU; with constant slopes a leaky ReLU."""
    weight, several = call.given["weight"], call.given["weight"].numel() > 1
    if "weight" not in call.constant:
        return [Activation("prelu", per_channel=several)]
    slopes = tuple(weight.flatten().tolist())
    return [Activation("leaky_relu", slopes if several else slopes[0])]


def _gelu(call: Call) -> Layers:
    return [Activation("gelu_tanh" if call.given["approximate"] == "tanh" else "gelu")]


def _softplus(call: Call) -> Layers:
    plain = (call.given["beta"], call.given["threshold"]) == (1, 20)
    _require(plain, "only softplus with beta 1 and threshold 20 is supported")
    return [Activation("softplus")]


def _clip(low: str, high: str) -> Callable[[Call], Layers]:
    """ReLU, ReLU6, or a clip with other bounds; `low` and `high` are the names of the arguments."""

    def layers(call: Call) -> Layers:
        given = call.given.get(low), call.given.get(high)
        _require(all(isinstance(bound, int | float | None) for bound in given), "its bounds must be numbers")
        least, most = (float(end if bound is None else bound) for bound, end in zip(given, (-inf, inf), strict=True))
        if least == 0 and most in (6, inf):
            return [Activation("relu" if most == inf else "relu6")]
        return [Activation("clip", low=least, high=most)]

    return layers


def _pool(
    reduction: Reduction, kernel: IntPair, stride: IntPair, padding: IntPair = (0, 0), ceil: bool = False
) -> Pool:
    """A pool; torch gives an empty stride, here (0, 0), for that of the kernel."""
    return Pool(reduction, kernel, None if stride in (kernel, (0, 0)) else stride, padding, ceil)


def _max_pool(call: Call) -> Layers:
    _require(call.pair("dilation") == (1, 1), "a pool with dilation is not supported")
    window = call.pair("kernel_size"), call.pair("stride"), call.pair("padding")
    return [_pool("max", *window, call.given["ceil_mode"])]


def _average_pool(call: Call) -> Layers:
    _require(call.given["divisor_override"] is None, "an average pool with divisor_override is not supported")
    window = call.pair("kernel_size"), call.pair("stride"), call.pair("padding")
    pool = _pool("average", *window, call.given["ceil_mode"])
    counted = call.given["count_include_pad"] and pool.padding != (0, 0)
    ceil = pool.overhang((1, *call.size)) != (0, 0)
    _require(not (counted and ceil), "an average pool with both count_include_pad and ceil_mode is not supported")
    return [replace(pool, ceil=ceil, count_padding=counted)]


def _adaptive(reduction: Reduction) -> Callable[[Call], Layers]:
    """An adaptive pool: its windows, which may differ in length, as a resample and a pool of equal windows."""

    def layers(call: Call) -> Layers:
        wanted = pair(call.result[1:])
        if wanted == call.size:
            return []
        if wanted == (1, 1) and reduction == "average":
            return [Pool("global_average")]
        windows = [_laid_out(_adapted(*lengths)) for lengths in zip(call.size, wanted, strict=True)]
        return _sliding(reduction, call.size, *windows)

    return layers


def _adapted(size: int, wanted: int) -> list[Sequence[int]]:
    """The windows of an adaptive pool along a side: from floor(i size / wanted) to ceil((i + 1) size / wanted)."""
    return [range(i * size // wanted, -(-(i + 1) * size // wanted)) for i in range(wanted)]


@dataclass(frozen=True)
class _Windows:
    """Windows of equal length, `stride` apart, over the pixels of a side with the indices `places`."""

    places: tuple[int, ...]
    length: int
    stride: int


def _sliding(reduction: Reduction, size: IntPair, down: _Windows, right: _Windows) -> Layers:
    """A pool over windows along both sides, after a resample if they need one."""
    layers: list[Layer] = []
    if (down.places, right.places) != tuple(tuple(range(length)) for length in size):
        layers.append(Resample(down.places, right.places))
    kernel, stride = (down.length, right.length), (down.stride, right.stride)
    return layers if kernel == (1, 1) else [*layers, _pool(reduction, kernel, stride)]


def _laid_out(windows: Sequence[Sequence[int]]) -> _Windows:
    """Makes windows equally long: repeats each one's pixels up to the least common multiple of the lengths, which
    changes neither mean nor maximum. Takes the smallest stride, at which neighbours share the most pixels."""
    length = lcm(*map(len, windows))
    repeated = [[at for at in window for _ in range(length // len(window))] for window in windows]
    steps = range(1, length) if len(windows) > 1 else ()
    alike = (step for step in steps if all(a[step:] == b[: length - step] for a, b in pairwise(repeated)))
    stride = next(alike, length)
    places = chain(repeated[0], *(window[length - stride :] for window in repeated[1:]))
    return _Windows(tuple(places), length, stride)


def _over_sides(reduction: Reduction) -> Callable[[Call], Layers]:
    """The mean or maximum over height, width, or both, as a pool. [C, L] is read as [C, L, 1]."""

    def layers(call: Call) -> Layers:
        shape = call.shapes[0]
        axes = {axis % (len(shape) + 1) for axis in call.given.get("dim") or ()}
        good = len(shape) > 1 and min(axes, default=0) > 1
        _require(good, "means and maxima are only supported over height, width or both")
        sides = (*shape[1:], 1)[:2]
        kernel = (sides[0] if 2 in axes else 1, sides[1] if 3 in axes else 1)
        pool = _pool(reduction, kernel, kernel)
        if reduction == "average" and kernel == sides:
            pool = Pool("global_average")
        return [pool, Flatten()] if len(call.result) == 1 else [pool]

    return layers


def _operand(call: Call) -> str | None:
    """Which of `self` and `other` does not depend on the image, if any."""
    name = next((name for name in ("self", "other") if isinstance(call.given[name], Tensor)), None)
    _require(
        name is None or call.result == call.shapes[0], "a constant that broadcasts to a larger tensor is not supported"
    )
    return name


def _sum(own: int, other: int) -> Callable[[Call], Layers]:
    """A sum of `self` and `other` with the signs `own` and `other`; torch's `alpha` multiplies the subtrahend, else
    `other`."""

    def layers(call: Call) -> Layers:
        alpha = call.given["alpha"]
        factors = {"self": own, "other": other}
        factors["self" if own < 0 else "other"] *= alpha
        name = _operand(call)
        if name is None:
            _require(
                factors == {"self": 1, "other": 1}, "a difference, or a sum with a factor, of tensors is not supported"
            )
            return [Add()]
        image = factors["other" if name == "self" else "self"]
        shift = _shifted(call, call.given[name] * factors[name], name not in call.constant)
        return [*_scaled(call, torch.tensor(image)), *shift]

    return layers


def _product(call: Call) -> Layers:
    name = _operand(call)
    return [Multiply()] if name is None else _scaled(call, call.given[name], name not in call.constant)


def _quotient(call: Call) -> Layers:
    _require(call.given.get("rounding_mode") is None, "a rounded division is not supported")
    _require(_operand(call) == "other", NO_QUOTIENT)
    return _scaled(call, 1 / call.given["other"].double(), "other" not in call.constant)


def _negative(call: Call) -> Layers:
    return [Affine(scale=(-1.0,))]


def _concat(call: Call) -> Layers:
    axes = len(call.shapes[0]) + 1
    _require(call.given["dim"] % axes == 1, "tensors can only be concatenated over channels")
    return [Concat()] if len(call.shapes) > 1 else []


def _pad(call: Call) -> Layers:
    _require(call.given.get("value") in (None, 0), "it pads with a constant other than zero; only zero is supported")
    _ = call.size  # raises for a vector
    pads = [*call.given["pad"], *[0] * 8][:8]  # before and after, the last axis first
    _require(not any(pads[6:]), "it pads the batch; only channels, rows and columns can be padded")
    _require(min(pads) >= 0, "negative padding is not supported; take a slice instead, as in x[:, :, 1:]")
    return [Pad((pads[4], pads[2], pads[0]), (pads[5], pads[3], pads[1]))] if any(pads) else []


def _nearest(call: Call) -> Layers:
    """A nearest resize. The source indices come from torch itself: it resizes an image of indices."""
    height, width = call.size
    given = {name: value for name, value in call.given.items() if name not in ("input", "self")}
    rows = torch.arange(height, dtype=torch.float32).view(1, 1, -1, 1).expand(1, 1, height, width)
    columns = torch.arange(width, dtype=torch.float32).expand(1, 1, height, width)
    down, right = (call.target(places.contiguous(), **given)[0, 0].int() for places in (rows, columns))
    return _sliding("max", call.size, _laid_out(down[:, :1].tolist()), _laid_out(right[0, :, None].tolist()))


WIDEST, FARTHEST = 32, 2
"""The largest windows, in pixels per side, and the largest stride of the pool that computes a bilinear resize: beyond
them repeating pixels costs more than it is worth."""
NO_RESIZE = (
    "a bilinear resize by 2, 3, 4, ... (at most 16) with align_corners False is supported, and any nearest one; "
    "this one has too many different weights"
)


def _bilinear(call: Call) -> Layers:
    """A bilinear resize as means over repeated pixels: position 3.25 is the mean of three times pixel 3 and once pixel
    4."""
    factors = call.given.get("scale_factors") or (call.given.get("scales_h"), call.given.get("scales_w"))
    sides = zip(call.size, call.result[1:], factors, strict=True)
    down, right = (_laid_out(_between(*side, call.given["align_corners"])) for side in sides)
    good = all(windows.length <= WIDEST and windows.stride <= FARTHEST for windows in (down, right))
    _require(good, NO_RESIZE)
    return _sliding("average", call.size, down, right)


def _between(size: int, wanted: int, factor: float | None, corners: bool) -> list[Sequence[int]]:
    """For each output pixel of a side the two input pixels around it, each repeated by its weight, in lowest terms."""
    step = Fraction(size, wanted)
    if corners:
        step = Fraction(size - 1, max(1, wanted - 1))
    elif factor is not None:  # torch computes with the given factor, even if size * factor is not the output size
        near = Fraction(factor).limit_denominator(WIDEST)
        step = 1 / (near if float(near) == factor else Fraction(factor))
    half = Fraction(0 if corners else 1, 2)
    windows: list[Sequence[int]] = []
    for i in range(wanted):
        at = max(Fraction(0), (i + half) * step - half)
        first = min(int(at), size - 1)
        share = at - first if first < size - 1 else Fraction(0)
        _require(share.denominator <= WIDEST, NO_RESIZE)
        windows.append([first] * (share.denominator - share.numerator) + [first + 1] * share.numerator)
    return windows


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
    aten.leaky_relu: _sloped("leaky_relu", "negative_slope"),
    aten.prelu: _prelu,
    aten.elu: _elu,
    aten.selu: _activation("selu"),
    aten.celu: _sloped("celu", "alpha"),
    aten.gelu: _gelu,
    aten.tanh: _activation("tanh"),
    aten.softplus: _softplus,
    aten.mish: _activation("mish"),
    aten.log_sigmoid: _activation("log_sigmoid"),
    aten.abs: _activation("abs"),
    aten.hardtanh: _clip("min_val", "max_val"),
    aten.clamp: _clip("min", "max"),
    aten.clamp_min: _clip("min", "max"),
    aten.clamp_max: _clip("min", "max"),
    aten.clip: _clip("min", "max"),
    aten.max_pool2d: _max_pool,
    aten.max_pool2d_with_indices: _max_pool,
    aten.avg_pool2d: _average_pool,
    aten.adaptive_avg_pool2d: _adaptive("average"),
    aten.adaptive_max_pool2d: _adaptive("max"),
    aten.mean: _over_sides("average"),
    aten.amax: _over_sides("max"),
    aten.add: _sum(1, 1),
    aten.sub: _sum(1, -1),
    aten.rsub: _sum(-1, 1),
    aten.mul: _product,
    aten.div: _quotient,
    aten.neg: _negative,
    aten.cat: _concat,
    aten.upsample_nearest2d: _nearest,
    aten._upsample_nearest_exact2d: _nearest,
    aten.upsample_bilinear2d: _bilinear,
    aten.constant_pad_nd: _pad,
}


TITLES = {
    "cat": "concat",
    "mul": "multiply",
    "div": "divide",
    "sub": "subtract",
    "rsub": "subtract",
    "neg": "negative",
}


def title(operator: object) -> str:
    """The name of an operator in messages: ``add``, ``batch_norm``."""
    name = str(getattr(operator, "__name__", operator))
    return "batch_norm" if "batch_norm" in name else TITLES.get(name, name)


SUPPORTED = ", ".join(sorted({title(operator).removeprefix("_") for operator in (*LAYERS, *MOVES)}))
"""The names of the operators that can be imported, for messages."""
