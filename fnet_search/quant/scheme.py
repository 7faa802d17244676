"""How a network is quantized: the range method, and what helps layers that quantize badly. No torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Literal

from fnet_search.base.errors import FnetError, unknown


@dataclass(frozen=True)
class RangeMethod:
    """How the ranges of hidden activations are found on the calibration images.

    ``minmax``; ``percentile``, which clips `percentile` percent at the top and at the bottom; ``mse``, the range with
    the least squared error of the quantized values.
    """

    kind: Literal["minmax", "percentile", "mse"] = "percentile"
    percentile: Fraction = Fraction(1)

    def __str__(self) -> str:
        return f"percentile:{float(self.percentile):g}" if self.kind == "percentile" else self.kind


MINMAX, MSE = RangeMethod("minmax", Fraction(0)), RangeMethod("mse", Fraction(0))


def parse_ranges(text: str) -> RangeMethod:
    """``minmax``, ``mse`` or ``percentile:P``, 0 <= P < 50 (0 is ``minmax``). Raises FnetError for anything else."""
    for method in (MINMAX, MSE):
        if text == str(method):
            return method
    match = re.fullmatch(r"percentile:(\d{1,2}(?:\.\d{1,6})?)", text)
    if match and Fraction(match[1]) < 50:
        return RangeMethod("percentile", Fraction(match[1])) if Fraction(match[1]) else MINMAX
    raise FnetError(
        f"unknown range method {text!r}; write minmax, mse or percentile:P with 0 <= P < 50, as in percentile:0.1"
    )


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
"""The paper's: 1 % of the hidden activations clipped at the top and at the bottom, a scale a tensor."""
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
