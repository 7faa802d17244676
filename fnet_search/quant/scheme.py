"""How a network is quantized: the range method, and what helps layers that quantize badly. No torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

from fnet_search.base.errors import FnetError, first_line, unknown
from fnet_search.base.plugins import installed, load_installed, load_object

GROUP = "fnet_search.range_methods"
"""Of entry points: each is a `RangeSpec`."""


@dataclass(frozen=True)
class RangeMethod:
    """How the ranges of hidden activations are found on the calibration images.

    ``minmax``; ``percentile``, which clips `number` percent at the top and at the bottom; ``mse``, the range with the
    least squared error of the quantized values; or one of another package.
    """

    name: str = "percentile"
    number: Fraction | None = Fraction(1)
    """None: the method takes none."""

    def __str__(self) -> str:
        return self.name if self.number is None else f"{self.name}:{float(self.number):g}"


MINMAX, MSE = RangeMethod("minmax", None), RangeMethod("mse", None)


@dataclass(frozen=True)
class RangeSpec:
    """What is known of a range method by its name, without torch: ours are in RANGE_METHODS, those of other packages in
    GROUP."""

    observer: str
    """``package.module:NAME`` of its `ranges.Observer`."""
    numbers: tuple[int, int] | None = None
    """A method that takes a number, at least the first of these and below the second, is written ``NAME:P``."""

    def load(self) -> Any:
        """The observer; imports torch."""
        where, _, what = self.observer.rpartition(":")
        return load_object(where, what)

    def written(self, name: str) -> str:
        """How a method of that name is written, for people."""
        return name if self.numbers is None else f"{name}:P with {self.numbers[0]} <= P < {self.numbers[1]}"


RANGE_METHODS: Mapping[str, RangeSpec] = {
    "minmax": RangeSpec("fnet_search.quant.ranges:Observer"),
    "mse": RangeSpec("fnet_search.quant.ranges:LeastSquares"),
    "percentile": RangeSpec("fnet_search.quant.ranges:Percentiles", (0, 50)),
}


def range_spec(name: str) -> RangeSpec:
    """Raises FnetError for a name that no range method has, and a plug-in that cannot be loaded."""
    if name in RANGE_METHODS:
        return RANGE_METHODS[name]
    found = load_installed(GROUP, "range method", name, RANGE_METHODS)
    if not isinstance(found, RangeSpec):
        raise FnetError(f"range method {name!r} cannot be loaded: it is a {type(found).__name__}, not a RangeSpec")
    try:
        found.load()  # now, not after a training
    except Exception as error:  # a third party's code raises what it likes
        raise FnetError(f"range method {name!r} cannot be loaded: {first_line(error)}") from error
    return found


def parse_ranges(text: str) -> RangeMethod:
    """``minmax``, ``mse`` or ``percentile:P``, 0 <= P < 50 (0 is ``minmax``); or a method of another package, as its
    `RangeSpec` says. Raises FnetError for anything else."""
    name, colon, rest = text.partition(":")
    others = installed(GROUP) if name not in RANGE_METHODS else []
    if name in RANGE_METHODS or name in others:
        spec = range_spec(name)
        number = Fraction(rest) if re.fullmatch(r"\d{1,9}(\.\d{1,6})?", rest) else None
        if spec.numbers is None and not colon:
            return RangeMethod(name, None)
        if spec.numbers is not None and number is not None and spec.numbers[0] <= number < spec.numbers[1]:
            found = RangeMethod(name, number)
            return MINMAX if found == RangeMethod("percentile", Fraction(0)) else found
        if name in others:
            raise FnetError(f"unknown range method {text!r}; write {spec.written(name)}")
    *first, last = (spec.written(name) for name, spec in RANGE_METHODS.items())
    more = f"; or of other packages: {', '.join(others)}" if others else ""
    raise FnetError(f"unknown range method {text!r}; write {', '.join(first)} or {last}, as in percentile:0.1{more}")


_HELPS = {"per-channel": "per_channel", "equalize": "equalize", "bias-correct": "bias_correct"}


@dataclass(frozen=True)
class Scheme:
    """A quantization scheme: the range method of hidden activations, one scale for each output channel of the weights
    instead of one a tensor, cross-layer equalization before, bias correction after.

    Written ``percentile:1``, ``mse+per-channel+equalize+bias-correct``; `parse_scheme` reads that.
    """

    ranges: RangeMethod = RangeMethod()
    per_channel: bool = False
    equalize: bool = False
    bias_correct: bool = False

    def __str__(self) -> str:
        return "+".join([str(self.ranges), *(word for word, name in _HELPS.items() if getattr(self, name))])


def parse_scheme(text: str) -> Scheme:
    """Inverse of ``str(scheme)``. Raises FnetError for anything else."""
    ranges, *helps = text.split("+")
    for word in helps:
        if word not in _HELPS:
            raise unknown("part of a quantization scheme", word, _HELPS)
    return Scheme(parse_ranges(ranges), **{_HELPS[word]: True for word in helps})


PAPER = Scheme()
"""The paper's: 1 % of the hidden activations clipped at the top and at the bottom, per-tensor scales."""
CHOICE = tuple(
    Scheme(ranges, per_channel, False, bias_correct)
    for per_channel, bias_correct, ranges in product((True, False), (True, False), (MSE, MINMAX))
)
"""What ``auto`` chooses from; the first is what candidates are compared with where a run has no reference."""
AUTO = "auto"


def parse_schemes(text: str) -> tuple[Scheme, ...]:
    """What a network is quantized with, the best of these: ``auto`` (CHOICE), ``paper``, or a scheme.

    Raises FnetError for anything else.
    """
    if text in (AUTO, "paper"):
        return CHOICE if text == AUTO else (PAPER,)
    try:
        return (parse_scheme(text),)
    except FnetError as error:
        raise FnetError(f"scheme {text!r}: {error}; or auto, or paper") from None


def schemes_text(schemes: Sequence[Scheme]) -> str:
    """Inverse of `parse_schemes`."""
    return AUTO if tuple(schemes) == CHOICE else str(schemes[0])
