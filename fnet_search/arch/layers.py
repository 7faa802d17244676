"""The layer kinds of a macroarchitecture: options, output shapes and costs. Data only, no torch.

Shapes leave the batch out: ``(C, H, W)`` for images and feature maps, ``(K,)`` for vectors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import ClassVar, Literal, get_args

from fnet_search.base.errors import FnetError, unknown
from fnet_search.base.toml_tables import IntPair, Numbers

Shape = tuple[int, ...]
Function = Literal[
    "relu", "relu6", "hardswish", "hardsigmoid", "sigmoid", "silu", "leaky_relu", "prelu", "elu", "selu", "celu",
    "gelu", "gelu_tanh", "tanh", "softplus", "mish", "log_sigmoid", "abs", "clip",
]  # fmt: skip
Reduction = Literal["max", "average", "global_average"]


def _feature_map(shape: Shape) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise FnetError(
            f"needs a feature map (C, H, W) as input, got a vector of shape {shape}; put it before the flatten"
        )
    return shape[0], shape[1], shape[2]


def _window(size: IntPair, kernel: IntPair, stride: IntPair, padding: IntPair, dilation: IntPair = (1, 1)) -> IntPair:
    """Height and width after a sliding window (ONNX Conv and MaxPool, explicit padding, floor). Raises FnetError for a
    window that is larger than the padded input."""
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    if min(out) < 1:
        reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
        padded = [n + 2 * p for n, p in zip(size, padding, strict=True)]
        with_padding = ", padding included" if max(padding) else ""
        raise FnetError(
            f"its {reach[0]}x{reach[1]} window does not fit into the {padded[0]}x{padded[1]} input{with_padding}"
        )
    return out[0], out[1]


def _positive(**values: int | IntPair) -> None:
    for name, value in values.items():
        if min(value if isinstance(value, tuple) else (value,)) < 1:
            raise FnetError(f"{name} must be at least 1, got {value}")


class _Single:
    """A layer that reads one tensor."""

    inputs: ClassVar[tuple[int, int | None]] = (1, 1)
    """The least and the largest number of input tensors; None: no upper limit."""


class _Weightless(_Single):
    """A layer without multiply-accumulates and parameters."""

    def macs(self, inputs: list[Shape]) -> int:
        return 0

    def params(self, inputs: list[Shape]) -> int:
        return 0


@dataclass(frozen=True)
class Conv(_Single):
    """2-D convolution (ONNX ``Conv``). With ``factorize``, a plan may replace it by a groupwise separable one."""

    out_channels: int
    kernel: IntPair = (3, 3)
    stride: IntPair = (1, 1)
    padding: IntPair = (0, 0)
    dilation: IntPair = (1, 1)
    groups: int = 1
    bias: bool = False
    factorize: bool = False
    kind: ClassVar[str] = "conv"

    def __post_init__(self) -> None:
        _positive(out_channels=self.out_channels, kernel=self.kernel, stride=self.stride)
        _positive(dilation=self.dilation, groups=self.groups)
        if min(self.padding) < 0:
            raise FnetError(f"padding must not be negative, got {self.padding}")
        if self.factorize and self.groups != 1:
            raise FnetError("a convolution with groups cannot be factorized; set factorize = false or groups = 1")

    def output_shape(self, inputs: list[Shape]) -> Shape:
        channels, *size = _feature_map(inputs[0])
        if channels % self.groups or self.out_channels % self.groups:
            raise FnetError(
                f"groups = {self.groups} does not divide its {channels} input and {self.out_channels} output channels"
            )
        return self.out_channels, *_window((size[0], size[1]), self.kernel, self.stride, self.padding, self.dilation)

    def macs(self, inputs: list[Shape]) -> int:
        """K_h K_w (C_in / groups) C_out H W, paper equations (1) and (2)."""
        return prod(self.kernel) * (inputs[0][0] // self.groups) * prod(self.output_shape(inputs))

    def params(self, inputs: list[Shape]) -> int:
        return self.out_channels * (prod(self.kernel) * (inputs[0][0] // self.groups) + self.bias)


@dataclass(frozen=True)
class BatchNorm(_Single):
    """Batch normalisation over channels (ONNX ``BatchNormalization``); with weight and bias only if ``affine``."""

    eps: float = 1e-3
    affine: bool = True
    kind: ClassVar[str] = "batch_norm"

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise FnetError(f"eps must be positive, got {self.eps}")

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return inputs[0]

    def macs(self, inputs: list[Shape]) -> int:
        return 0

    def params(self, inputs: list[Shape]) -> int:
        return 2 * inputs[0][0] * self.affine


@dataclass(frozen=True)
class Affine(_Single):
    """scale x + shift, each one number or one per channel; an empty one is left out.

    Both are constants unless ``trained``: then they are the values that training from scratch starts from. Folded like
    a BatchNorm.
    """

    scale: tuple[float, ...] = ()
    shift: tuple[float, ...] = ()
    trained: bool = False
    kind: ClassVar[str] = "affine"

    def __post_init__(self) -> None:
        if not self.scale and not self.shift:
            raise FnetError("needs a scale, a shift, or both")
        if not all(map(isfinite, (*self.scale, *self.shift))):
            raise FnetError("scale and shift must be finite")

    @property
    def channelwise(self) -> bool:
        """Whether it has one number per channel."""
        return max(len(self.scale), len(self.shift)) > 1

    def started(self) -> "Affine":
        """The identity with as many numbers: what training an imported network from scratch starts from."""
        return replace(self, scale=(1.0,) * len(self.scale), shift=(0.0,) * len(self.shift))

    def output_shape(self, inputs: list[Shape]) -> Shape:
        channels = inputs[0][0]
        for name, values in (("scale", self.scale), ("shift", self.shift)):
            if len(values) not in (0, 1, channels):
                raise FnetError(f"{name} must be 1 number or {channels}, one per channel, got {len(values)}")
        return inputs[0]

    def macs(self, inputs: list[Shape]) -> int:
        return 0

    def params(self, inputs: list[Shape]) -> int:
        return (len(self.scale) + len(self.shift)) * self.trained


CONSTANTS: Mapping[str, tuple[str, ...]] = {
    "leaky_relu": ("alpha",),
    "elu": ("alpha",),
    "celu": ("alpha",),
    "clip": ("low", "high"),
}
"""The constants that a function requires; functions that are not listed take none."""
FLOAT32_MAX = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True)
class Activation(_Single):
    """An elementwise function.

    `alpha` is the slope below zero of ``leaky_relu``, one number or one per channel, and the alpha of torch's ``elu``
    and ``celu``. `low` and `high` are the bounds of ``clip``; one of them may be infinite. ``prelu`` learns one slope,
    or with `per_channel` one per channel.
    """

    function: Function = "relu"
    alpha: Numbers | None = None
    low: float | None = None
    high: float | None = None
    per_channel: bool = False
    kind: ClassVar[str] = "activation"

    def __post_init__(self) -> None:
        if self.function not in get_args(Function):
            raise unknown("activation function", str(self.function), get_args(Function))
        needed = CONSTANTS.get(self.function, ())
        for name in ("alpha", "low", "high"):
            if (getattr(self, name) is not None) != (name in needed):
                raise FnetError(f"{self.function} {'needs' if name in needed else 'has no'} {name}")
        if self.per_channel and self.function != "prelu":
            raise FnetError("per_channel requires prelu")
        if self.function != "leaky_relu" and isinstance(self.alpha, tuple):
            raise FnetError(f"alpha of {self.function} must be one number, got {list(self.alpha)}")
        if not all(abs(slope) <= FLOAT32_MAX for slope in self.slopes) or self.alpha == ():
            raise FnetError(f"alpha must be finite, got {self.alpha}")
        if self.function == "celu" and self.alpha == 0:
            raise FnetError("alpha of celu must not be 0")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise FnetError(f"low must be below high, got {self.low} and {self.high}")

    @property
    def slopes(self) -> tuple[float, ...]:
        """`alpha` as a tuple."""
        return self.alpha if isinstance(self.alpha, tuple) else () if self.alpha is None else (self.alpha,)

    @property
    def channelwise(self) -> bool:
        """Whether it has one constant per channel."""
        return len(self.slopes) > 1

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if len(self.slopes) not in (0, 1, inputs[0][0]):
            raise FnetError(f"it has {len(self.slopes)} slopes for {inputs[0][0]} channels")
        return inputs[0]

    def macs(self, inputs: list[Shape]) -> int:
        return 0

    def params(self, inputs: list[Shape]) -> int:
        if self.function != "prelu":
            return 0
        return inputs[0][0] if self.per_channel else 1


@dataclass(frozen=True)
class Pool(_Weightless):
    """Max, average or global average pooling (ONNX ``MaxPool``, ``AveragePool``). The stride defaults to the kernel."""

    reduction: Reduction = "max"
    kernel: IntPair = (2, 2)
    stride: IntPair | None = None
    padding: IntPair = (0, 0)
    ceil: bool = False
    """Whether to keep a last window that starts inside the input but reaches beyond it (torch's ``ceil_mode``)."""
    count_padding: bool = False
    """Whether the divisor of an average counts the padding (``count_include_pad`` of torch and ONNX)."""
    kind: ClassVar[str] = "pool"

    def __post_init__(self) -> None:
        if self.reduction not in get_args(Reduction):
            raise unknown("pool reduction", str(self.reduction), get_args(Reduction))
        _positive(kernel=self.kernel, stride=self.step)
        if min(self.padding) < 0 or any(2 * p > k for p, k in zip(self.padding, self.kernel, strict=True)):
            raise FnetError(f"padding must be between 0 and half the kernel, got {self.padding}")
        if self.count_padding and (self.reduction != "average" or self.ceil):
            raise FnetError("count_padding requires an average pool without ceil")

    @property
    def step(self) -> IntPair:
        """The stride, the kernel where it is not given."""
        return self.stride or self.kernel

    def overhang(self, shape: Shape) -> IntPair:
        """Rows and columns by which the last windows exceed the padded input (C, H, W); (0, 0) without `ceil`."""
        if not self.ceil:
            return 0, 0
        over = []
        for n, k, s, p in zip(shape[1:], self.kernel, self.step, self.padding, strict=True):
            last = (n + 2 * p - k + s - 1) // s * s  # where the last window begins
            over.append(max(0, (last if last < n + p else last - s) + k - n - 2 * p))
        return over[0], over[1]

    def output_shape(self, inputs: list[Shape]) -> Shape:
        channels, height, width = _feature_map(inputs[0])
        if self.reduction == "global_average":
            return channels, 1, 1
        down, right = self.overhang(inputs[0])
        return channels, *_window((height + down, width + right), self.kernel, self.step, self.padding)


@dataclass(frozen=True)
class Dense(_Single):
    """Fully connected layer on a vector (ONNX ``Gemm``)."""

    out_features: int
    bias: bool = True
    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        _positive(out_features=self.out_features)

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if len(inputs[0]) != 1:
            raise FnetError(f"needs a vector as input, got shape {inputs[0]}; put a flatten before it")
        return (self.out_features,)

    def macs(self, inputs: list[Shape]) -> int:
        return inputs[0][0] * self.out_features

    def params(self, inputs: list[Shape]) -> int:
        return self.out_features * (inputs[0][0] + self.bias)


@dataclass(frozen=True)
class Flatten(_Weightless):
    """(C, H, W) to (C H W,)."""

    kind: ClassVar[str] = "flatten"

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return (prod(inputs[0]),)


@dataclass(frozen=True)
class Reshape(_Weightless):
    """The same values, in order, in another shape (C, H, W) (ONNX ``Reshape``)."""

    shape: tuple[int, int, int]
    kind: ClassVar[str] = "reshape"

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise FnetError(f"shape must be three positive integers [C, H, W], got {list(self.shape)}")

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if prod(inputs[0]) != prod(self.shape):
            raise FnetError(f"cannot reshape {inputs[0]} to {self.shape}: they hold different numbers of values")
        return self.shape


@dataclass(frozen=True)
class Slice(_Weightless):
    """The channels `start` to `stop` - 1 (ONNX ``Slice``, axis 1)."""

    start: int
    stop: int
    kind: ClassVar[str] = "slice"

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if not 0 <= self.start < self.stop <= inputs[0][0]:
            raise FnetError(f"cannot take channels {self.start} to {self.stop} of {inputs[0][0]}")
        return self.stop - self.start, *inputs[0][1:]


@dataclass(frozen=True)
class Shuffle(_Weightless):
    """Channel shuffle (ShuffleNet, arXiv 1707.01083): the first channel of each group, then the second, ..."""

    groups: int
    kind: ClassVar[str] = "shuffle"

    def __post_init__(self) -> None:
        _positive(groups=self.groups)

    def output_shape(self, inputs: list[Shape]) -> Shape:
        channels, *_ = _feature_map(inputs[0])
        if channels % self.groups:
            raise FnetError(f"groups = {self.groups} does not divide its {channels} channels")
        return inputs[0]


@dataclass(frozen=True)
class Resample(_Weightless):
    """Selects rows and columns by index, with repetition (ONNX ``Gather``)."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    kind: ClassVar[str] = "resample"

    def output_shape(self, inputs: list[Shape]) -> Shape:
        channels, *size = _feature_map(inputs[0])
        for name, chosen, length in zip(("rows", "columns"), (self.rows, self.columns), size, strict=True):
            if not chosen or min(chosen) < 0 or max(chosen) >= length:
                raise FnetError(f"{name} must be indices from 0 to {length - 1}, at least one")
        return channels, len(self.rows), len(self.columns)


@dataclass(frozen=True)
class Pad(_Weightless):
    """Pads a feature map with zeros: numbers of channels, rows and columns before and after it (ONNX ``Pad``)."""

    before: tuple[int, int, int] = (0, 0, 0)
    after: tuple[int, int, int] = (0, 0, 0)
    kind: ClassVar[str] = "pad"

    def __post_init__(self) -> None:
        if min(*self.before, *self.after) < 0:
            raise FnetError(f"before and after must not be negative, got {list(self.before)} and {list(self.after)}")

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return tuple(map(sum, zip(self.before, _feature_map(inputs[0]), self.after, strict=True)))


@dataclass(frozen=True)
class Add(_Weightless):
    """Sum of two tensors of the same shape (ONNX ``Add``)."""

    kind: ClassVar[str] = "add"
    inputs: ClassVar[tuple[int, int | None]] = (2, 2)

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if inputs[0] != inputs[1]:
            raise FnetError(f"cannot add shapes {inputs[0]} and {inputs[1]}; they must be equal")
        return inputs[0]


@dataclass(frozen=True)
class Multiply(_Weightless):
    """Product of two tensors of the same shape, or of a feature map (C, H, W) and one factor per channel (C, 1, 1), in
    either order, as in squeeze and excitation (ONNX ``Mul``)."""

    kind: ClassVar[str] = "multiply"
    inputs: ClassVar[tuple[int, int | None]] = (2, 2)

    def output_shape(self, inputs: list[Shape]) -> Shape:
        a, b = inputs
        if a == b or b == (a[0], 1, 1):
            return a
        if a == (b[0], 1, 1):
            return b
        raise FnetError(f"cannot multiply shapes {a} and {b}; they must be equal, or one of them (C, 1, 1)")


@dataclass(frozen=True)
class Concat(_Weightless):
    """Concatenation over channels (ONNX ``Concat``, axis 1)."""

    kind: ClassVar[str] = "concat"
    inputs: ClassVar[tuple[int, int | None]] = (2, None)

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if len({shape[1:] for shape in inputs}) > 1 or len({len(shape) for shape in inputs}) > 1:
            raise FnetError(
                f"cannot concatenate shapes {', '.join(map(str, inputs))}; all but the channels must be equal"
            )
        return sum(shape[0] for shape in inputs), *inputs[0][1:]


Weighted = Conv | Dense
"""Layers that multiply and accumulate. Their weights are quantized."""
Foldable = BatchNorm | Affine
"""Layers that are one affine function per channel in evaluation. They are folded into the `Weighted` layer before them
if they alone read it; otherwise they become a depthwise convolution or a diagonal dense layer."""
Moving = Flatten | Reshape | Slice | Shuffle | Resample | Pad
"""Layers that only move values, or add zeros."""
Stateless = Activation | Pool | Moving | Add | Multiply | Concat
"""Layers without weights, except that a PReLU learns its slopes. Folding turns those into constants."""
Layer = Weighted | Foldable | Stateless
"""All layer kinds, a closed set. Code that branches on the kind ends in ``typing.assert_never``, so that mypy names
every place that lacks a new kind; docs/extending.md lists them."""
KINDS: Mapping[str, type[Layer]] = {layer.kind: layer for layer in get_args(Layer)}
