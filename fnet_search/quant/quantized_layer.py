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
SYMMETRIC_ZERO = 128
"""Zero point of weights with per-channel scales: ONNX ``QLinearConv`` wants the same one for all channels."""
BIAS_ROOM = 1 << 30
"""What bias codes stay below where weight scales are chosen for them. The rest of int32 is left to the weights, and to
bias correction."""


@dataclass(frozen=True)
class QuantizedLayer:
    """A convolution or dense layer: uint8 weight codes in torch's shape, int32 bias codes, and the weights' parameters:
    one, or one for each output channel."""

    codes: Tensor
    params: tuple[QuantParams, ...]
    bias: Tensor

    @cached_property
    def scales(self) -> Tensor:
        """float32 [1], or [C_out] with per-channel scales."""
        return torch.tensor([one.scale for one in self.params], dtype=torch.float32, device=self.codes.device)

    @cached_property
    def zeros(self) -> Tensor:
        """uint8, as `scales`."""
        return torch.tensor([one.zero for one in self.params], dtype=torch.uint8, device=self.codes.device)

    @cached_property
    def centred(self) -> Tensor:
        """q_w - z_w as float32."""
        return self.codes.float() - _by_output(self.zeros, self.codes).float()

    @cached_property
    def reach(self) -> Tensor:
        """The most that the weights of a channel can add up to: sum |q_w - z_w| 255, float64 [C_out]."""
        return self.centred.abs().flatten(1).sum(1, dtype=torch.float64) * 255

    def with_bias(self, bias: Tensor) -> "QuantizedLayer":
        """The same weights, and what is known of them, with other bias codes."""
        other = replace(self, bias=bias)
        other.__dict__.update({name: self.__dict__[name] for name in _OF_WEIGHTS if name in self.__dict__})
        return other

    @property
    def weight(self) -> Tensor:
        """s_w (q_w - z_w): the weights that the codes stand for, float32."""
        return self.centred * _by_output(self.scales, self.codes)

    def bias_scale(self, source: QuantParams) -> Tensor:
        """Rule 6: f32(s_x s_w), float32, as `scales`."""
        return float32(source.scale, self.scales) * self.scales

    @cached_property
    def slices(self) -> list[slice]:
        """Consecutive slices of input channels (within a group), each with a reach that float32 sums exactly; none
        where one channel alone reaches further (kernels of 17x17 and more)."""
        reach = self.centred.abs().flatten(2).sum(2) * 255 if self.codes.ndim > 2 else self.centred.abs() * 255
        sums = F.pad(reach.double().cumsum(1), (1, 0))
        found, start, window = [], 0, reach.shape[1]
        while start < reach.shape[1]:
            ahead = sums[:, start + 1 : start + 1 + window] - sums[:, start : start + 1]
            fits = int((ahead.amax(0) < EXACT_IN_FLOAT32).sum())
            if not fits:
                return []
            found.append(slice(start, start + fits))
            start, window = start + fits, 2 * fits  # the next one is about as long: no need to look further
        return found


_OF_WEIGHTS = ("scales", "zeros", "centred", "reach", "slices")
"""Cached properties that do not depend on the bias."""


def _by_output(values: Tensor, weight: Tensor) -> Tensor:
    """[1] or [C_out] in a shape that goes with a weight."""
    return values.view(-1, *[1] * (weight.ndim - 1))


def quantize_layer(
    weight: Tensor,
    bias: Tensor,
    source: QuantParams,
    per_channel: bool = False,
    like: QuantizedLayer | None = None,
) -> QuantizedLayer:
    """Rules 3, 6 and 10: weights by min and max, per tensor or per output channel, bias with scale f32(s_x s_w).

    Where int32 has no room for the bias beside the sums of the weights, the weight scale is widened until it has.
    Weights of zero have a scale that is made for the bias. Raises FnetError where the sums of the weights alone could
    overflow, which the runtime would let wrap around.

    `like`: the same weights quantized for another source, whose codes are taken where the parameters are the same.
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
        bounded(layer.with_bias(torch.zeros_like(layer.bias)))
        layer = _coded(weight, bias, source, torch.maximum(scales, common(_roomy(weight, bias, source))), zero)
    return bounded(layer)


def _coded(
    weight: Tensor,
    bias: Tensor,
    source: QuantParams,
    scales: Tensor,
    zero: int,
    like: QuantizedLayer | None = None,
) -> QuantizedLayer:
    """Rules 3 and 6, with these weight scales, float64 [1] or [C_out]; but where f32(s_x s_w) would not be a normal
    number of float32, with the smallest ones for which it is."""
    smallest = float(np.finfo(np.float32).tiny) / min(source.scale, 1.0)
    params = tuple(QuantParams(scale, zero) for scale in scales.clamp_min(smallest).float().tolist())
    if like is None or like.params != params:
        draft = QuantizedLayer(weight, params, bias)  # for the parameters in the shapes of the weight
        codes = clip(torch.round(weight / _by_output(draft.scales, weight)) + _by_output(draft.zeros, weight))
        like = QuantizedLayer(codes, params, bias)
    bias_codes = torch.round(bias.double() / like.bias_scale(source).double()).clamp(-(2**31), 2**31 - 1)
    return like.with_bias(bias_codes.to(torch.int32))


def _roomy(weight: Tensor, bias: Tensor, source: QuantParams) -> Tensor:
    """Weight scales at which sum |q_w - z_w| 255 + |q_b| stays below BIAS_ROOM, float64 [C_out]: the sum is at most
    (255 sum |w| + |b| / s_x) / s_w, and half a step for each weight that is rounded."""
    sums = 255 * weight.double().abs().flatten(1).sum(1) + bias.double().abs() / source.scale
    return sums / max(1, BIAS_ROOM - 128 * weight[0].numel())


def fits(layer: QuantizedLayer) -> bool:
    """Whether no int32 accumulation of a layer can overflow (rule 10)."""
    return bool(_reach(layer) < 2**31)


def bounded(layer: QuantizedLayer) -> QuantizedLayer:
    """The layer itself. Raises FnetError where its int32 accumulation can overflow (rule 10)."""
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
