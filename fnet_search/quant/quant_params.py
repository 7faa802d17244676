"""Scale and zero point: how codes stand for real numbers (rules 2, 5 and 9 of docs/quint8.md)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantParams:
    """real = scale (code - zero). `scale` is a float32 value held in a Python float; `zero` lies in 0..255."""

    scale: float
    zero: int

    def quantize(self, x: Tensor) -> Tensor:
        """Rule 5: clip(rint(x / s) + z, 0, 255)."""
        return clip(torch.round(x / float32(self.scale, x)) + self.zero)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Rule 9: s (q - z), float32."""
        return (codes.float() - self.zero) * float32(self.scale, codes)


def quant_params(low: float, high: float) -> QuantParams:
    """Rule 2: scale and zero point of a range, which is widened to hold zero. A degenerate one gives scale 1, zero
    0."""
    if degenerate(low, high):
        return QuantParams(1.0, 0)
    low, scale = min(low, 0.0), _scale(low, high)
    return QuantParams(float(np.float32(scale)), int(np.clip(np.rint(-low / scale), 0, 255)))


def degenerate(low: float, high: float) -> bool:
    """Whether the scale of a range, widened to hold zero, is 0 in float32: such a range holds nothing but zero."""
    return not np.float32(_scale(low, high)) > 0


def _scale(low: float, high: float) -> float:
    return (max(high, 0.0) - min(low, 0.0)) / 255


def float32(value: float, like: Tensor) -> Tensor:
    """`value` as a float32 scalar on the device of `like`: torch may turn a division by a Python number into a
    multiplication, which rounds differently."""
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def clip(x: Tensor) -> Tensor:
    """Clips to 0..255 as uint8. Overwrites `x`."""
    return x.clamp_(0, 255).to(torch.uint8)
