"""The integer simulator: quint8 networks exactly as ONNX Runtime computes them (docs/quint8.md).

Codes are uint8 tensors; every step is an integer operation or a single float32 one, in the runtime's order.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import assert_never

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from fnet_search.arch.layers import (
    Activation,
    Add,
    Affine,
    BatchNorm,
    Concat,
    Conv,
    Dense,
    Moving,
    Multiply,
    Pool,
    Weighted,
)
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.base.errors import FnetError
from fnet_search.quant.quant_params import QuantParams, clip, float32
from fnet_search.quant.quantized_layer import QuantizedLayer
from fnet_search.quant.ranges import carriers
from fnet_search.training.network import activate, apply_stateless, moved, output_of, walk


@dataclass(frozen=True)
class QuantizedNetwork:
    """The integer network: `params` holds the scale and zero point of every carrier, `layers` the weights of every
    convolution and dense layer."""

    network: Macroarchitecture
    params: Mapping[str, QuantParams]
    layers: Mapping[str, QuantizedLayer]

    @cached_property
    def carrier(self) -> Mapping[str, str]:
        return carriers(self.network)

    def codes(self, x: Tensor) -> Iterator[tuple[Node, Tensor]]:
        """Yields every node with its output codes, uint8, for normalised float images [N, C, H, W]."""
        return walk(self.network, self.params[INPUT].quantize(x), IntegerStep(self))

    def __call__(self, x: Tensor) -> Tensor:
        """[N, C, H, W] normalised images to [N, classes] logits: dequantized, float32."""
        logits = output_of(self.network, self.params[INPUT].quantize(x), IntegerStep(self))
        return self.params[self.carrier[self.network.output]].dequantize(logits)

    def to_tensors(self) -> dict[str, Tensor]:
        """Codes, biases, scales and zero points, to be saved; `from_tensors` reads them."""
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            tensors |= {f"{name}.weight": layer.codes, f"{name}.bias": layer.bias}
            tensors |= {f"{name}.weight.scale": layer.scales, f"{name}.weight.zero": layer.zeros}
        for name, params in self.params.items():
            tensors[f"{name}.output.scale"] = torch.tensor(params.scale)
            tensors[f"{name}.output.zero"] = torch.tensor(params.zero, dtype=torch.uint8)
        return tensors

    @staticmethod
    def from_tensors(network: Macroarchitecture, tensors: Mapping[str, Tensor]) -> "QuantizedNetwork":
        """Inverse of `to_tensors` for the same folded network. Raises FnetError where something is missing."""
        weighted = [node.name for node in network.order if isinstance(node.layer, Weighted)]
        try:
            layers = {
                name: QuantizedLayer(
                    tensors[f"{name}.weight"], _unpack(f"{name}.weight", tensors), tensors[f"{name}.bias"]
                )
                for name in weighted
            }
            for name, layer in layers.items():
                _check(network, network.by_name[name], layer)
            params = {name: _unpack(f"{name}.output", tensors)[0] for name in dict.fromkeys(carriers(network).values())}
        except KeyError as error:
            raise FnetError(f"the quantized weights do not fit the network: {error} is missing") from None
        return QuantizedNetwork(network, params, layers)


def _check(network: Macroarchitecture, node: Node, layer: QuantizedLayer) -> None:
    """Raises FnetError for codes whose shape is not that of the layer."""
    kind, inputs = node.layer, network.input_shapes(node)[0]
    assert isinstance(kind, Weighted)
    match kind:
        case Conv(out_channels, kernel, groups=groups):
            shape: tuple[int, ...] = (out_channels, inputs[0] // groups, *kernel)
        case Dense(out_features):
            shape = (out_features, inputs[0])
        case _:
            assert_never(kind)
    if (tuple(layer.codes.shape), tuple(layer.bias.shape)) != (shape, shape[:1]) or len(layer.params) not in (
        1,
        shape[0],
    ):
        raise FnetError(f"the quantized weights do not fit the network: those of {node.name!r} have another shape")


def _unpack(name: str, tensors: Mapping[str, Tensor]) -> tuple[QuantParams, ...]:
    scales, zeros = tensors[f"{name}.scale"].flatten().tolist(), tensors[f"{name}.zero"].flatten().tolist()
    return tuple(map(QuantParams, scales, zeros))


def lookup_table(function: Activation | None, source: QuantParams, target: QuantParams) -> Tensor:
    """Rule 16: a function of one tensor as a table: target codes of the 256 source codes, [256], or a row for each
    slope that the function has, [rows, 256]. None requantizes from `source` to `target`."""
    x = source.dequantize(torch.arange(256))
    if function is None:
        return target.quantize(x)
    y = activate(function, x.double()[:, None].expand(-1, max(1, len(function.slopes))))
    return target.quantize(y.float()).T.contiguous()


class IntegerStep:
    """Computes the output codes of a node from its input codes, for `network.walk` and `network.output_of`. Each case
    is a rule of docs/quint8.md."""

    def __init__(self, quantized: QuantizedNetwork) -> None:
        self.params, self.layers, self.carrier = quantized.params, quantized.layers, quantized.carrier

    def __call__(self, node: Node, inputs: list[Tensor]) -> Tensor:
        layer, codes = node.layer, inputs[0]
        sources = [self.params[self.carrier[name]] for name in node.inputs]
        source, target = sources[0], self.params[self.carrier[node.name]]
        if isinstance(layer, Moving):
            return moved(layer, codes, source.zero)
        match layer:
            case Conv() | Dense():
                return self.output(node, accumulate(layer, codes, source.zero, self.layers[node.name]))
            case Activation() if self.carrier[node.inputs[0]] == node.name:
                return codes  # fused: the layer before clipped at the zero point already
            case Activation():
                return _lookup(lookup_table(layer, source, target), codes)
            case Pool(reduction="max"):
                return apply_stateless(layer, [codes.float()]).to(torch.uint8)
            case Pool(reduction="average") if layer.kernel != codes.shape[2:] or any(layer.padding):
                return _average_pool(layer, codes, source, target)
            case Pool():  # the runtime takes a window over the whole feature map for a global average too
                pixels = float32(codes.shape[2] * codes.shape[3], codes)
                total = (codes.to(torch.int32) - source.zero).sum(dim=(2, 3), keepdim=True, dtype=torch.int32)
                multiplier = float32(source.scale, codes) / (float32(target.scale, codes) * pixels)
                return rescale(total, multiplier, target)
            case Add():
                return _add(codes, inputs[1], source, sources[1], target)
            case Multiply():
                return _multiply(codes, inputs[1], source, sources[1], target)
            case Concat():
                parts = zip(inputs, sources, strict=True)
                same = [
                    part if params == target else _lookup(lookup_table(None, params, target), part)
                    for part, params in parts
                ]
                return torch.cat(same, dim=1)
            case BatchNorm() | Affine():
                raise TypeError(f"{layer.kind} is not part of a folded network")
            case _:
                assert_never(layer)

    def output(self, node: Node, total: Tensor) -> Tensor:
        """The output codes of a convolution or dense layer from its int32 accumulators `total`."""
        source, target = (self.params[self.carrier[name]] for name in (node.inputs[0], node.name))
        scale = self.layers[node.name].bias_scale(source)
        return rescale(total, scale / float32(target.scale, scale), target)


def row_starts(rows: int, axes: int) -> Tensor:
    """The start of each channel's row in a flattened `lookup_table`, int32, in a shape that broadcasts with codes of
    `axes` dimensions."""
    return 256 * torch.arange(rows, dtype=torch.int32).view(-1, *[1] * (axes - 2))


def _lookup(codes: Tensor, index: Tensor) -> Tensor:
    """The entries of a `lookup_table` at the codes `index`: with several rows, channel i looks them up in row i."""
    places, rows = index.int(), codes.numel() // 256
    if rows > 1:
        places += row_starts(rows, index.ndim).to(index.device)
    return codes.flatten().to(index.device)[places]


def accumulate(layer: Weighted, codes: Tensor, zero: int, weights: QuantizedLayer) -> Tensor:
    """Rule 7: sum (q_x - z_x)(q_w - z_w) + q_b, int32, exact.

    Runs on float convolutions, which are exact while no partial sum leaves the float's integers: float32 where the
    reach max over outputs of sum |q_w - z_w| 255 stays under 2^24, in slices of input channels where it does not;
    float64 for groups and kernels with a longer reach, and on other devices, whose kernels may transform their inputs.
    """
    x = codes.float().sub_(zero)
    weight, slices = weights.centred.to(x.device), weights.slices

    def apply(x: Tensor, weight: Tensor) -> Tensor:
        match layer:
            case Conv():
                return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
            case Dense():
                return F.linear(x, weight)
            case _:
                assert_never(layer)

    grouped = isinstance(layer, Conv) and layer.groups > 1
    if x.device.type != "cpu" or not slices or (grouped and len(slices) > 1):
        total = torch.round(apply(x.double(), weight.double())).to(torch.int32)
    elif len(slices) == 1:
        total = apply(x, weight).to(torch.int32)
    else:
        total = torch.stack([apply(x[:, part], weight[:, part]).to(torch.int32) for part in slices]).sum(
            0, dtype=torch.int32
        )
    return total.add_(weights.bias.to(codes.device).view(1, -1, *[1] * (total.ndim - 2)))


def rescale(total: Tensor, multiplier: Tensor, target: QuantParams) -> Tensor:
    """Rule 8: clip(rint(f32(acc) M) + z_y, 0, 255); clipping at z_y is the ReLU.

    M is float32, [1] or [C_out].
    """
    scaled = total.float().mul_(multiplier.to(total.device).view(1, -1, *[1] * (total.ndim - 2)))
    return clip(scaled.round_().add_(target.zero))


def _average_pool(layer: Pool, codes: Tensor, source: QuantParams, target: QuantParams) -> Tensor:
    """Rule 12: float32 sums in row order, each rounded; the divisor counts the pixels inside the image, or all."""
    down, right = layer.overhang(tuple(codes.shape[1:]))
    pads = [layer.padding[1], layer.padding[1] + right, layer.padding[0], layer.padding[0] + down]
    x = F.pad(source.dequantize(codes), pads)
    inside = F.pad(torch.ones_like(codes[:1, :1], dtype=torch.float32), pads, value=float(layer.count_padding))
    height, width = ((n - k) // s + 1 for n, k, s in zip(x.shape[2:], layer.kernel, layer.step, strict=True))
    total, count = torch.zeros(()), torch.zeros(())
    for row in range(layer.kernel[0]):
        for column in range(layer.kernel[1]):
            rows = slice(row, row + layer.step[0] * (height - 1) + 1, layer.step[0])
            columns = slice(column, column + layer.step[1] * (width - 1) + 1, layer.step[1])
            total = total + x[:, :, rows, columns]
            count = count + inside[:, :, rows, columns]
    return clip(torch.round(total / count / float32(target.scale, x) + target.zero))


def _add(a: Tensor, b: Tensor, of_a: QuantParams, of_b: QuantParams, target: QuantParams) -> Tensor:
    """Rule 13: two fused multiply-adds, each rounded once (float64, then cast)."""
    ratio_a = float(np.float32(of_a.scale) / np.float32(target.scale))
    ratio_b = float(np.float32(of_b.scale) / np.float32(target.scale))
    product = float(np.float32(ratio_b * of_b.zero))
    offset = float(np.float32(target.zero - np.float64(np.float32(ratio_a * of_a.zero + product))))
    inner = (b.double() * ratio_b + offset).float()
    return clip(torch.round((a.double() * ratio_a + inner.double()).float()))


def _multiply(a: Tensor, b: Tensor, of_a: QuantParams, of_b: QuantParams, target: QuantParams) -> Tensor:
    """Rule 14: the product of the integers, which float32 holds, times one ratio; each step rounded."""
    product = np.float32(of_a.scale) * np.float32(of_b.scale)
    ratio = float(product / np.float32(target.scale))
    return clip(torch.round((a.float() - of_a.zero) * (b.float() - of_b.zero) * ratio + target.zero))
