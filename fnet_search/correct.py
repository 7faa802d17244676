"""Bias correction (Nagel et al., Data-Free Quantization, 2019, section 4.2, on calibration samples)."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fnet_search.fold import FoldedNetwork
from fnet_search.layers import Conv, Dense
from fnet_search.macro import INPUT, Node
from fnet_search.network import run
from fnet_search.params import QuantParams
from fnet_search.quantize import QuantizedLayer, QuantizedNetwork, Step, accumulate, fits, quantize_layer
from fnet_search.ranges import Batches


class _Both(NamedTuple):
    """A tensor of the float network and its codes in the quantized one, a batch each."""

    floats: list[Tensor]
    codes: list[Tensor]


@torch.no_grad()
def correct_biases(folded: FoldedNetwork, quantized: QuantizedNetwork, batches: Batches) -> QuantizedNetwork:
    """Layer after layer, moves the int32 biases so that the mean of each output channel, before any ReLU, is that of
    the float network over the samples, with all layers before quantized and corrected.

    What clipping and rounding shift is put right; the float network stays as it is. A layer whose corrected biases
    leave int32 no room for its sums is quantized again, with a wider weight scale. All samples pass one layer before
    the next, so memory grows with them: give few.
    """
    layers = dict(quantized.layers)
    corrected = replace(quantized, layers=layers)
    step = Step(corrected)

    def apply(node: Node, inputs: list[_Both]) -> _Both:
        floats = [folded.apply_node(node, list(parts)) for parts in zip(*(one.floats for one in inputs), strict=True)]
        if isinstance(node.layer, Conv | Dense):
            layer, source = layers[node.name], quantized.params[quantized.carrier[node.inputs[0]]]
            weight = folded.weight[node.name]
            layers[node.name] = _corrected(node.layer, layer, source, weight, floats, inputs[0].codes)
        codes = [step(node, list(parts)) for parts in zip(*(one.codes for one in inputs), strict=True)]
        return _Both(floats, codes)

    samples = list(batches())
    run(folded.network, _Both(samples, [quantized.params[INPUT].quantize(batch) for batch in samples]), apply)
    return corrected


def _corrected(
    node: Conv | Dense,
    layer: QuantizedLayer,
    source: QuantParams,
    weight: Tensor,
    floats: list[Tensor],
    codes: list[Tensor],
) -> QuantizedLayer:
    scale = layer.bias_scale(source).double()
    totals = [accumulate(node, part, source.zero, layer) for part in codes]
    wanted, found = (_channel_means(parts).to(scale.device) for parts in (floats, totals))
    bias = layer.bias.double() + torch.round(wanted / scale - found)
    if fits(replace(layer, bias=bias)):
        return replace(layer, bias=bias.to(torch.int32))
    wider = quantize_layer(weight, bias * scale, source, len(layer.params) > 1)
    return _corrected(node, wider, source, weight, floats, codes)  # its weights are rounded otherwise


def _channel_means(batches: list[Tensor]) -> Tensor:
    """Of [N, C, ...] tensors: the mean of each channel over all else, float64 [C]."""
    channels = [batch.transpose(0, 1).flatten(1) for batch in batches]
    sums = torch.stack([part.sum(1, dtype=torch.float64) for part in channels]).sum(0)
    return sums / sum(part.shape[1] for part in channels)
