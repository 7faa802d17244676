"""Bias correction (Nagel et al., Data-Free Quantization, 2019, section 4.2, on calibration samples)."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fnet_search.errors import FnetError
from fnet_search.fold import FoldedNetwork
from fnet_search.layers import Conv, Dense
from fnet_search.macro import INPUT, Node
from fnet_search.network import run
from fnet_search.quantize import QuantizedLayer, QuantizedNetwork, Step, accumulate, bounded
from fnet_search.ranges import Batches


class _Both(NamedTuple):
    """A tensor of the float network and its codes in the quantized one, a batch each."""

    floats: list[Tensor]
    codes: list[Tensor]


@torch.no_grad()
def correct_biases(folded: FoldedNetwork, quantized: QuantizedNetwork, batches: Batches) -> QuantizedNetwork:
    """Layer after layer, moves the int32 biases so that the mean of each output channel, before any ReLU, is that of
    the float network over the samples, with all layers before quantized and corrected.

    What clipping and rounding shift is put right; the float network stays as it is. All samples pass one layer before
    the next, so memory grows with them: give few. Raises FnetError where an accumulation could overflow.
    """
    layers = dict(quantized.layers)
    corrected = replace(quantized, layers=layers)
    step = Step(corrected)

    def apply(node: Node, inputs: list[_Both]) -> _Both:
        floats = [folded.apply_node(node, list(parts)) for parts in zip(*(one.floats for one in inputs), strict=True)]
        if isinstance(node.layer, Conv | Dense):
            try:
                layers[node.name] = _corrected(corrected, node, floats, inputs[0].codes)
            except FnetError as error:
                raise FnetError(f"layer {node.name!r}: {error}") from None
        codes = [step(node, list(parts)) for parts in zip(*(one.codes for one in inputs), strict=True)]
        return _Both(floats, codes)

    samples = list(batches())
    run(folded.network, _Both(samples, [quantized.params[INPUT].quantize(batch) for batch in samples]), apply)
    return corrected


def _corrected(quantized: QuantizedNetwork, node: Node, floats: list[Tensor], codes: list[Tensor]) -> QuantizedLayer:
    assert isinstance(node.layer, Conv | Dense)
    layer, source = quantized.layers[node.name], quantized.params[quantized.carrier[node.inputs[0]]]
    totals = [accumulate(node.layer, part, source.zero, layer) for part in codes]
    wanted = _channel_means(floats).to(layer.bias.device) / layer.bias_scale(source).double()
    shift = torch.round(wanted - _channel_means(totals).to(layer.bias.device))
    bias = (layer.bias.double() + shift).clamp(-(2**31), 2**31 - 1)
    return bounded(replace(layer, bias=bias.to(torch.int32)))


def _channel_means(batches: list[Tensor]) -> Tensor:
    """Of [N, C, ...] tensors: the mean of each channel over all else, float64 [C]."""
    channels = [batch.transpose(0, 1).flatten(1) for batch in batches]
    sums = torch.stack([part.sum(1, dtype=torch.float64) for part in channels]).sum(0)
    return sums / sum(part.shape[1] for part in channels)
