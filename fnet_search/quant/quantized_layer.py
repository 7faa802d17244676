"""Weights and biases of one layer in quint8: rules 3, 6 and 10 of docs/quint8.md."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from fnet_search.base.errors import FnetError
from fnet_search.quant.quant_params import QuantParams, clip, degenerate, float32, quant_params

EXACT_IN_FLOAT32 = 1 << 24
"""float32 represents all integers below this, so sums that stay below it are exact in any order."""
SYMMETRIC_ZERO = 128
"""Zero point of weights with per-channel scales: ONNX ``QLinearConv`` wants the same one for all channels."""
BIAS_ROOM = 1 << 30
"""Bound on bias codes when weight scales are widened for them: half of int32, so that the sums of the weights, and
later bias correction, have the other half."""


@dataclass(frozen=True)
class QuantizedLayer:
    """A convolution or dense layer: uint8 weight codes in torch's shape, int32 bias codes [C_out], and the weights'
    parameters: one, or one for each output channel."""

    codes: Tensor
    params: tuple[QuantParams, ...]
    bias: Tensor

    @cached_property
    def scales(self) -> Tensor:
        """float32 [1], or [C_out] with per-channel scales."""
        return torch.tensor([params.scale for params in self.params], dtype=torch.float32, device=self.codes.device)

    @cached_property
    def zeros(self) -> Tensor:
        """uint8, as `scales`."""
        return torch.tensor([params.zero for params in self.params], dtype=torch.uint8, device=self.codes.device)

    @cached_property
    def centred(self) -> Tensor:
        """q_w - z_w as float32."""
        return self.codes.float() - _by_output(self.zeros, self.codes).float()

    @cached_property
    def reach(self) -> Tensor:
        """The largest sum that the weights of an output channel can give: sum |q_w - z_w| 255, float64 [C_out]."""
        return self.centred.abs().flatten(1).sum(1, dtype=torch.float64) * 255

    def with_bias(self, bias: Tensor) -> "QuantizedLayer":
        """The same weights with other bias codes. Keeps the cached properties of the weights."""
        other = replace(self, bias=bias)
        other.__dict__.update({name: self.__dict__[name] for name in _OF_WEIGHTS if name in self.__dict__})
        return other

    @property
    def weight(self) -> Tensor:
        """The weights that the codes stand for: s_w (q_w - z_w), float32."""
        return self.centred * _by_output(self.scales, self.codes)

    def bias_scale(self, source: QuantParams) -> Tensor:
        """Rule 6: f32(s_x s_w), float32, as `scales`."""
        return float32(source.scale, self.scales) * self.scales

    @cached_property
    def slices(self) -> list[slice]:
        """Consecutive slices of input channels (within a group), each with sums that float32 holds exactly; empty where
        the sums of one channel exceed that (kernels of 17x17 and more)."""
        reach = self.centred.abs().flatten(2).sum(2) * 255 if self.codes.ndim > 2 else self.centred.abs() * 255
        sums = F.pad(reach.double().cumsum(1), (1, 0))
        slices, start, window = [], 0, reach.shape[1]
        while start < reach.shape[1]:
            ahead = sums[:, start + 1 : start + 1 + window] - sums[:, start : start + 1]
            fits = int((ahead.amax(0) < EXACT_IN_FLOAT32).sum())
            if not fits:
                return []
            slices.append(slice(start, start + fits))
            start, window = start + fits, 2 * fits  # the next slice is about as long, so do not look much further
        return slices


_OF_WEIGHTS = ("scales", "zeros", "centred", "reach", "slices")
"""Cached properties that do not depend on the bias."""


def _by_output(values: Tensor, weight: Tensor) -> Tensor:
    """[1] or [C_out] in a shape that broadcasts with a weight."""
    return values.view(-1, *[1] * (weight.ndim - 1))


def quantize_layer(
    weight: Tensor,
    bias: Tensor,
    source: QuantParams,
    per_channel: bool = False,
    like: QuantizedLayer | None = None,
) -> QuantizedLayer:
    """Rules 3, 6 and 10: weights by min and max, per tensor or per output channel, bias with scale f32(s_x s_w).

    Where int32 cannot hold the bias together with the sums of the weights, the weight scale is widened until it can.
    Weights that are all zero take a scale that suits the bias. Raises FnetError where the sums of the weights alone
    could overflow, which the runtime would let wrap around.

    Args:
        source: parameters of the layer's input.
        like: the same weights quantized for another source; its codes are reused where the parameters are equal.
    """

    def common(scales: Tensor) -> Tensor:
        return scales if per_channel else scales.amax(0, keepdim=True)

    least = common(bias.double().abs() / (source.scale * BIAS_ROOM))
    if per_channel:
        scales, zero = _channel_scales(weight, least), SYMMETRIC_ZERO
    else:
        ends = float(weight.min()), float(weight.max())
        params = quant_params(*ends)
        scales, zero = torch.full_like(least, params.scale), params.zero
        if degenerate(*ends):
            scales = torch.where(least > 0, least, scales)
    layer = _coded(weight, bias, source, scales, zero, like)
    if not fits(layer):
        bounded(layer.with_bias(torch.zeros_like(layer.bias)))  # no scale helps where the weights alone overflow
        layer = _coded(
            weight, bias, source, torch.maximum(scales, common(_scales_with_room(weight, bias, source))), zero
        )
    return bounded(layer)


def _coded(
    weight: Tensor,
    bias: Tensor,
    source: QuantParams,
    scales: Tensor,
    zero: int,
    like: QuantizedLayer | None = None,
) -> QuantizedLayer:
    """Rules 3 and 6 with the given weight scales, float64 [1] or [C_out], raised where needed to the smallest ones for
    which f32(s_x s_w) is a normal float32 number."""
    smallest = float(np.finfo(np.float32).tiny) / min(source.scale, 1.0)
    params = tuple(QuantParams(scale, zero) for scale in scales.clamp_min(smallest).float().tolist())
    if like is None or like.params != params:
        draft = QuantizedLayer(weight, params, bias)  # for the parameters in the shapes of the weight
        codes = clip(torch.round(weight / _by_output(draft.scales, weight)) + _by_output(draft.zeros, weight))
        like = QuantizedLayer(codes, params, bias)
    bias_codes = torch.round(bias.double() / like.bias_scale(source).double()).clamp(-(2**31), 2**31 - 1)
    return like.with_bias(bias_codes.to(torch.int32))


def _scales_with_room(weight: Tensor, bias: Tensor, source: QuantParams) -> Tensor:
    """Weight scales at which sum |q_w - z_w| 255 + |q_b| stays below BIAS_ROOM, float64 [C_out]: the sum is at most
    (255 sum |w| + |b| / s_x) / s_w, and half a step for each weight that is rounded."""
    sums = 255 * weight.double().abs().flatten(1).sum(1) + bias.double().abs() / source.scale
    return sums / max(1, BIAS_ROOM - 128 * weight[0].numel())


def fits(layer: QuantizedLayer) -> bool:
    """Whether no int32 accumulation of a layer can overflow (rule 10)."""
    return bool(_reach(layer) < 2**31)


def bounded(layer: QuantizedLayer) -> QuantizedLayer:
    """Returns `layer`. Raises FnetError where its int32 accumulation can overflow (rule 10)."""
    if not fits(layer):
        raise FnetError(f"int32 accumulation can overflow: sum |q_w - z_w| 255 + |q_b| reaches {_reach(layer):.3g}")
    return layer


def _reach(layer: QuantizedLayer) -> float:
    return float((layer.reach + layer.bias.double().abs()).max())


def _channel_scales(weight: Tensor, least: Tensor) -> Tensor:
    """For each output channel the smallest scale that holds its weights in codes 0..255 around 128, but no less than
    `least`; float64 [C_out]. A channel of zeros takes the scale of the widest one."""
    rows = weight.flatten(1).double()
    scales = torch.maximum(rows.amax(1) / 127, -rows.amin(1) / 128)
    scales = torch.maximum(torch.where(scales > 0, scales, scales.max()), least)
    return torch.where(scales > 0, scales, 1.0)
