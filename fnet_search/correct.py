"""Bias correction (Nagel et al., Data-Free Quantization, 2019, section 4.2, on calibration samples)."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fnet_search.errors import FnetError
from fnet_search.fold import FoldedNetwork
from fnet_search.layers import Conv, Dense
from fnet_search.macro import INPUT, Node
from fnet_search.network import run, walk
from fnet_search.quantize import QuantizedLayer, QuantizedNetwork, Step, accumulate, bounded
from fnet_search.ranges import Batches


@torch.no_grad()
def channel_means(folded: FoldedNetwork, batches: Batches) -> Mapping[str, Tensor]:
    """Of each convolution and dense layer of the float network: the mean of each output channel over the samples,
    before any ReLU, float64 [C]."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for batch in batches():
        for node, output in walk(folded.network, batch, folded.apply_node):
            if isinstance(node.layer, Conv | Dense):
                total, count = _channel_sums(output)
                sums[node.name] = sums.get(node.name, 0) + total
                counts[node.name] = counts.get(node.name, 0) + count
    return {name: total / counts[name] for name, total in sums.items()}


@torch.no_grad()
def correct_biases(quantized: QuantizedNetwork, means: Mapping[str, Tensor], batches: Batches) -> QuantizedNetwork:
    """Layer after layer, moves the int32 biases so that the mean of each output channel, before any ReLU, is that of
    the float network over the samples (`channel_means`), with all layers before quantized and corrected.

    What clipping and rounding shift is put right; the float network stays as it is. The codes of all samples pass one
    layer before the next, so memory grows with them: give few. Raises FnetError where an accumulation could overflow.
    """
    layers = dict(quantized.layers)
    corrected = replace(quantized, layers=layers)
    step = Step(corrected)

    def apply(node: Node, inputs: list[list[Tensor]]) -> list[Tensor]:
        if not isinstance(node.layer, Conv | Dense):
            return [step(node, list(parts)) for parts in zip(*inputs, strict=True)]
        layer, source = layers[node.name], corrected.params[corrected.carrier[node.inputs[0]]]
        totals = [accumulate(node.layer, codes, source.zero, layer) for codes in inputs[0]]
        try:
            layers[node.name] = _corrected(layer, means[node.name] / layer.bias_scale(source).double(), totals)
        except FnetError as error:
            raise FnetError(f"layer {node.name!r}: {error}") from None
        shift = layers[node.name].bias - layer.bias
        return [step.output(node, total + shift.view(-1, *[1] * (total.ndim - 2))) for total in totals]

    run(corrected.network, [corrected.params[INPUT].quantize(batch) for batch in batches()], apply)
    return corrected


def _corrected(layer: QuantizedLayer, wanted: Tensor, totals: list[Tensor]) -> QuantizedLayer:
    """`wanted`: the mean of each channel's int32 totals, float64 [C]."""
    found = [_channel_sums(total) for total in totals]
    mean = torch.stack([total for total, _ in found]).sum(0) / sum(count for _, count in found)
    bias = (layer.bias.double() + torch.round(wanted - mean)).clamp(-(2**31), 2**31 - 1)
    return bounded(replace(layer, bias=bias.to(torch.int32)))


def _channel_sums(output: Tensor) -> tuple[Tensor, int]:
    """Of [N, C, ...]: the sum of each channel over all else, float64 [C], and how many elements a channel has."""
    others = [axis for axis in range(output.ndim) if axis != 1]
    return output.sum(others, dtype=torch.float64), output.numel() // output.shape[1]
