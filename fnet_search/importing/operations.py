"""torch's operators as layers: what each computes, from its arguments and the shapes that it reads."""

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
"""Arguments that are no tensor of the image."""

OPERANDS = ("input", "self", "other")
"""Arguments that mostly are; of arithmetic one may be a constant."""

MOVES = {
    aten.alias, aten.channel_shuffle, aten.chunk, aten.clone, aten.contiguous, aten.detach, aten.expand, aten.flatten,
    aten.flip, aten.narrow, aten.pad, aten.permute, aten.pixel_shuffle, aten.pixel_unshuffle, aten.repeat,
    aten.repeat_interleave, aten.reshape, aten.roll, aten.rot90, aten.select, aten.slice, aten.split,
    aten.split_with_sizes, aten.squeeze, aten.tile, aten.transpose, aten.unbind, aten.unflatten, aten.unsqueeze,
    aten.view, aten._unsafe_view,
}  # fmt: skip
"""Operators that only move values; `aten.pad` where it pads with values of the image."""

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
    gives, without the batch. `constant` names the tensors that hang on no parameter either: no training moves them.
    `target` is the operator itself."""

    given: Mapping[str, Any]
    shapes: Sequence[Shape]
    result: Shape
    constant: frozenset[str] = frozenset()
    target: Any = None

    def pair(self, name: str) -> IntPair:
        return pair(self.given[name])

    @property
    def size(self) -> IntPair:
        """Height and width of what it reads."""
        if len(self.shapes[0]) != 3:
            raise FnetError(f"it reads {size_text(self.shapes[0])} where a layer reads a feature map")
        return self.shapes[0][1], self.shapes[0][2]


Layers = Sequence[Layer]
"""One after the other; the first reads all that the operator does. None: it gives what it reads."""


def pair(value: object) -> IntPair:
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


def _sloped(function: Function, alpha: str) -> Callable[[Call], Layers]:
    return lambda call: [Activation(function, float(call.given[alpha]))]


def _elu(call: Call) -> Layers:
    _require(call.given["scale"] == call.given["input_scale"] == 1, "an ELU with scales of its own is no layer")
    return [Activation("elu", float(call.given["alpha"]))]


def _prelu(call: Call) -> Layers:
    """With slopes that are a constant it is a leaky ReLU."""
    weight, several = call.given["weight"], call.given["weight"].numel() > 1
    if "weight" not in call.constant:
        return [Activation("prelu", per_channel=several)]
    slopes = tuple(weight.flatten().tolist())
    return [Activation("leaky_relu", slopes if several else slopes[0])]


def _gelu(call: Call) -> Layers:
    return [Activation("gelu_tanh" if call.given["approximate"] == "tanh" else "gelu")]


def _softplus(call: Call) -> Layers:
    plain = (call.given["beta"], call.given["threshold"]) == (1, 20)
    _require(plain, "of all softplus only that with beta 1 and threshold 20 is a layer")
    return [Activation("softplus")]


def _clip(low: str, high: str) -> Callable[[Call], Layers]:
    """ReLU and ReLU6, as torch writes them too, and other bounds."""

    def layers(call: Call) -> Layers:
        given = call.given.get(low), call.given.get(high)
        _require(all(isinstance(bound, int | float | None) for bound in given), "its bounds are no numbers")
        least, most = (float(end if bound is None else bound) for bound, end in zip(given, (-inf, inf), strict=True))
        if least == 0 and most in (6, inf):
            return [Activation("relu" if most == inf else "relu6")]
        return [Activation("clip", low=least, high=most)]

    return layers


def _pool(
    reduction: Reduction, kernel: IntPair, stride: IntPair, padding: IntPair = (0, 0), ceil: bool = False
) -> Pool:
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
        windows = [_laid_out(_adapted(*lengths)) for lengths in zip(call.size, wanted, strict=True)]
        return _sliding(reduction, call.size, *windows)

    return layers


def _adapted(size: int, wanted: int) -> list[Sequence[int]]:
    """The windows of an adaptive pool along a side: from floor(i size / wanted) to ceil((i + 1) size / wanted)."""
    return [range(i * size // wanted, -(-(i + 1) * size // wanted)) for i in range(wanted)]


@dataclass(frozen=True)
class _Windows:
    """Windows of equal length, `stride` apart, over the pixels at `places` of a side."""

    places: tuple[int, ...]
    length: int
    stride: int


def _sliding(reduction: Reduction, size: IntPair, down: _Windows, right: _Windows) -> Layers:
    """A pool over windows along both sides."""
    found: list[Layer] = []
    if (down.places, right.places) != tuple(tuple(range(length)) for length in size):
        found.append(Resample(down.places, right.places))
    kernel, stride = (down.length, right.length), (down.stride, right.stride)
    return found if kernel == (1, 1) else [*found, _pool(reduction, kernel, stride)]


def _laid_out(windows: Sequence[Sequence[int]]) -> _Windows:
    """Windows as some of equal length: each one's pixels are repeated to a common multiple of the lengths, which
    changes neither mean nor maximum. They share what they can."""
    length = lcm(*map(len, windows))
    repeated = [[at for at in window for _ in range(length // len(window))] for window in windows]
    steps = range(1, length) if len(windows) > 1 else ()
    alike = (step for step in steps if all(a[step:] == b[: length - step] for a, b in pairwise(repeated)))
    stride = next(alike, length)
    places = chain(repeated[0], *(window[length - stride :] for window in repeated[1:]))
    return _Windows(tuple(places), length, stride)


def _over_sides(reduction: Reduction) -> Callable[[Call], Layers]:
    """The mean or the maximum over height, width, or both; of [C, L], which is read as [C, L, 1], over the length."""

    def layers(call: Call) -> Layers:
        shape = call.shapes[0]
        axes = {axis % (len(shape) + 1) for axis in call.given.get("dim") or ()}
        good = len(shape) > 1 and min(axes, default=0) > 1
        _require(good, "of all means and maxima only those over height, width or both are layers")
        sides = (*shape[1:], 1)[:2]
        kernel = (sides[0] if 2 in axes else 1, sides[1] if 3 in axes else 1)
        pool = _pool(reduction, kernel, kernel)
        if reduction == "average" and kernel == sides:
            pool = Pool("global_average")
        return [pool, Flatten()] if len(call.result) == 1 else [pool]

    return layers


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


def _pad(call: Call) -> Layers:
    _require(call.given.get("value") in (None, 0), "of all constants only zero can be padded with")
    _ = call.size  # a vector has none, and says so
    pads = [*call.given["pad"], *[0] * 8][:8]  # before and after, the last axis first
    _require(not any(pads[6:]), "it adds images")
    _require(min(pads) >= 0, "a negative padding is no layer; take a part instead, as in x[:, :, 1:]")
    return [Pad((pads[4], pads[2], pads[0]), (pads[5], pads[3], pads[1]))] if any(pads) else []


def _nearest(call: Call) -> Layers:
    """torch's own places: what it makes of an image that holds them."""
    height, width = call.size
    given = {name: value for name, value in call.given.items() if name not in ("input", "self")}
    rows = torch.arange(height, dtype=torch.float32).view(1, 1, -1, 1).expand(1, 1, height, width)
    columns = torch.arange(width, dtype=torch.float32).expand(1, 1, height, width)
    down, right = (call.target(places.contiguous(), **given)[0, 0].int() for places in (rows, columns))
    return _sliding("max", call.size, _laid_out(down[:, :1].tolist()), _laid_out(right[0, :, None].tolist()))


WIDEST, FARTHEST = 32, 2
"""Pixels a side of the windows that a bilinear resize is the mean of, and pixels from one to the next, at most: what it
takes to repeat them is not worth more."""
NO_RESIZE = (
    "a bilinear resize by 2, 3, 4, ... (at most 16) with align_corners False is a layer, and any nearest one; "
    "this one has too many different weights"
)


def _bilinear(call: Call) -> Layers:
    """Means of windows over repeated pixels: at 3.25, a quarter of pixel 4 and three of pixel 3."""
    factors = call.given.get("scale_factors") or (call.given.get("scales_h"), call.given.get("scales_w"))
    sides = zip(call.size, call.result[1:], factors, strict=True)
    down, right = (_laid_out(_between(*side, call.given["align_corners"])) for side in sides)
    good = all(one.length <= WIDEST and one.stride <= FARTHEST for one in (down, right))
    _require(good, NO_RESIZE)
    return _sliding("average", call.size, down, right)


def _between(size: int, wanted: int, factor: float | None, corners: bool) -> list[Sequence[int]]:
    """For each pixel of a side the two that it lies between, each as often as it weighs, in lowest terms."""
    step = Fraction(size, wanted)
    if corners:
        step = Fraction(size - 1, max(1, wanted - 1))
    elif factor is not None:  # what torch computes with, where size and factor do not go together
        near = Fraction(factor).limit_denominator(WIDEST)
        step = 1 / (near if float(near) == factor else Fraction(factor))
    half = Fraction(0 if corners else 1, 2)
    found: list[Sequence[int]] = []
    for i in range(wanted):
        at = max(Fraction(0), (i + half) * step - half)
        first = min(int(at), size - 1)
        share = at - first if first < size - 1 else Fraction(0)
        _require(share.denominator <= WIDEST, NO_RESIZE)
        found.append([first] * (share.denominator - share.numerator) + [first + 1] * share.numerator)
    return found


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
    """What users know an operator as: ``add``, ``batch_norm``."""
    name = str(getattr(operator, "__name__", operator))
    return "batch_norm" if "batch_norm" in name else TITLES.get(name, name)


SUPPORTED = ", ".join(sorted({title(one).removeprefix("_") for one in (*LAYERS, *MOVES)}))
"""Operators that can be imported, for people."""
