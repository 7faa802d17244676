"""Quantization schemes: a range method, and the options for layers that quantize badly. No torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

from fnet_search.base.errors import FnetError, first_line, unknown
from fnet_search.base.plugins import installed, load_installed, load_object

GROUP = "fnet_search.range_methods"
"""The entry-point group of range methods; each entry is a `RangeSpec`."""


@dataclass(frozen=True)
class RangeMethod:
    """How the ranges of hidden activations are found on the calibration images.

    ``minmax``; ``percentile``, which clips `number` percent of the values at the top and at the bottom; ``mse``, the
    range with the least squared error of the quantized values; or a method of another package.
    """

    name: str = "percentile"
    number: Fraction | None = Fraction(1)
    """None for a method that takes no number."""

    def __str__(self) -> str:
        return self.name if self.number is None else f"{self.name}:{float(self.number):g}"


MINMAX, MSE = RangeMethod("minmax", None), RangeMethod("mse", None)


@dataclass(frozen=True)
class RangeSpec:
    """A range method, described without importing torch: RANGE_METHODS has ours, entry points of GROUP those of
    others."""

    observer: str
    """``package.module:NAME`` of its class, a `ranges.Observer`."""
    numbers: tuple[int, int] | None = None
    """For a method written ``NAME:P``: the lowest P, and the number that P must stay below."""

    def load(self) -> Any:
        """The observer class. Imports torch."""
        where, _, what = self.observer.rpartition(":")
        return load_object(where, what)

    def written(self, name: str) -> str:
        """How the method is written, for messages."""
        return name if self.numbers is None else f"{name}:P with {self.numbers[0]} <= P < {self.numbers[1]}"


RANGE_METHODS: Mapping[str, RangeSpec] = {
    "minmax": RangeSpec("fnet_search.quant.ranges:Observer"),
    "mse": RangeSpec("fnet_search.quant.ranges:LeastSquares"),
    "percentile": RangeSpec("fnet_search.quant.ranges:Percentiles", (0, 50)),
}


def range_spec(name: str) -> RangeSpec:
    """The range method called `name`. Raises FnetError for an unknown name and for a plug-in that cannot be loaded."""
    if name in RANGE_METHODS:
        return RANGE_METHODS[name]
    spec = load_installed(GROUP, "range method", name, RANGE_METHODS)
    if not isinstance(spec, RangeSpec):
        raise FnetError(f"range method {name!r} cannot be loaded: it is a {type(spec).__name__}, not a RangeSpec")
    try:
        spec.load()  # fail now, not after a training
    except Exception as error:  # a third party's code raises what it likes
        raise FnetError(f"range method {name!r} cannot be loaded: {first_line(error)}") from error
    return spec


def parse_ranges(text: str) -> RangeMethod:
    """Reads ``minmax``, ``mse``, ``percentile:P`` with 0 <= P < 50 (0 is ``minmax``), or a method of another package,
    as its `RangeSpec` says. Raises FnetError for anything else."""
    name, colon, rest = text.partition(":")
    others = installed(GROUP) if name not in RANGE_METHODS else []
    if name in RANGE_METHODS or name in others:
        spec = range_spec(name)
        number = Fraction(rest) if re.fullmatch(r"\d{1,9}(\.\d{1,6})?", rest) else None
        if spec.numbers is None and not colon:
            return RangeMethod(name, None)
        if spec.numbers is not None and number is not None and spec.numbers[0] <= number < spec.numbers[1]:
            method = RangeMethod(name, number)
            return MINMAX if method == RangeMethod("percentile", Fraction(0)) else method
        if name in others:
            raise FnetError(f"unknown range method {text!r}; write {spec.written(name)}")
    *first, last = (spec.written(name) for name, spec in RANGE_METHODS.items())
    more = f"; or of other packages: {', '.join(others)}" if others else ""
    raise FnetError(f"unknown range method {text!r}; write {', '.join(first)} or {last}, as in percentile:0.1{more}")


_OPTIONS = {"per-channel": "per_channel", "equalize": "equalize", "bias-correct": "bias_correct"}
"""The words of a scheme after its range method, and the fields that they set."""


@dataclass(frozen=True)
class Scheme:
    """A quantization scheme: the range method of hidden activations; whether weights have a scale for each output
    channel instead of one for the tensor; cross-layer equalization before quantizing; bias correction after.

    Written ``percentile:1``, ``mse+per-channel+equalize+bias-correct``; `parse_scheme` reads that.
    """

    ranges: RangeMethod = RangeMethod()
    per_channel: bool = False
    equalize: bool = False
    bias_correct: bool = False

    def __str__(self) -> str:
        return "+".join([str(self.ranges), *(word for word, name in _OPTIONS.items() if getattr(self, name))])


def parse_scheme(text: str) -> Scheme:
    """Inverse of ``str(scheme)``. Raises FnetError for anything else."""
    ranges, *options = text.split("+")
    for word in options:
        if word not in _OPTIONS:
            raise unknown("part of a quantization scheme", word, _OPTIONS)
    return Scheme(parse_ranges(ranges), **{_OPTIONS[word]: True for word in options})


PAPER = Scheme()
"""That of the paper: 1 % of the hidden activations clipped at the top and at the bottom, per-tensor scales."""
CHOICE = tuple(
    Scheme(ranges, per_channel, False, bias_correct)
    for per_channel, bias_correct, ranges in product((True, False), (True, False), (MSE, MINMAX))
)
"""The schemes that ``auto`` chooses from. Runs without a reference compare candidates under the first one."""
AUTO = "auto"


def parse_schemes(text: str) -> tuple[Scheme, ...]:
    """The schemes that a network's is chosen from: CHOICE for ``auto``, else one: ``paper``, or a scheme as
    `parse_scheme` reads it. Raises FnetError for anything else."""
    if text in (AUTO, "paper"):
        return CHOICE if text == AUTO else (PAPER,)
    try:
        return (parse_scheme(text),)
    except FnetError as error:
        raise FnetError(f"scheme {text!r}: {error}; or auto, or paper") from None


def schemes_text(schemes: Sequence[Scheme]) -> str:
    """Inverse of `parse_schemes`."""
    return AUTO if tuple(schemes) == CHOICE else str(schemes[0])
