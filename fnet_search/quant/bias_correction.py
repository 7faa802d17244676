"""Bias correction (Nagel et al., Data-Free Quantization, 2019, section 4.2, on calibration samples)."""

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fnet_search.arch.layers import Weighted
from fnet_search.arch.macroarchitecture import INPUT, Node
from fnet_search.quant.fold import FoldedNetwork
from fnet_search.quant.quant_params import QuantParams
from fnet_search.quant.quantized_layer import QuantizedLayer, fits, quantize_layer
from fnet_search.quant.simulator import IntegerStep, QuantizedNetwork, accumulate
from fnet_search.training.datasets import Batches
from fnet_search.training.network import output_of, walk


class ChannelMeans:
    """Collects the mean of each output channel of each convolution and dense layer of a float network, before any ReLU.

    Called with each node and its output, as by `ranges.calibrate`; takes the first `samples` images, in whole batches.
    """

    def __init__(self, samples: int = sys.maxsize) -> None:
        self.samples = samples
        self._sums: dict[str, list[tuple[Tensor, int]]] = {}
        self._images = Counter[str]()

    def __call__(self, node: Node, output: Tensor) -> None:
        if isinstance(node.layer, Weighted) and self._images[node.name] < self.samples:
            self._images[node.name] += len(output)
            self._sums.setdefault(node.name, []).append(_channel_sums(output))

    @property
    def means(self) -> Mapping[str, Tensor]:
        """float64 [C], keyed by node."""
        return {name: _mean(parts) for name, parts in self._sums.items()}


@torch.no_grad()
def channel_means(folded: FoldedNetwork, batches: Batches) -> Mapping[str, Tensor]:
    """The `ChannelMeans` of a float network over all samples: float64 [C], keyed by node."""
    collected = ChannelMeans()
    for batch in batches():
        for node, output in walk(folded.network, batch, folded.apply_node):
            collected(node, output)
    return collected.means


@torch.no_grad()
def correct_biases(
    folded: FoldedNetwork,
    quantized: QuantizedNetwork,
    batches: Batches,
    means: Mapping[str, Tensor] | None = None,
) -> QuantizedNetwork:
    """Shifts the int32 biases so that the mean of each output channel, before any ReLU, equals that of the float
    network.

    Layers are corrected in network order, each with all layers before it quantized and corrected, so that the shift
    also undoes what clipping and rounding did upstream. A layer whose corrected bias would let its int32 sums overflow
    is quantized again with a wider weight scale. All samples pass one layer before the next: memory grows with their
    number, so give few.

    Args:
        batches: normalised calibration images.
        means: those of `ChannelMeans` over the same batches; without them, the float network runs over the batches.
    """
    target_means = means or channel_means(folded, batches)
    layers = dict(quantized.layers)
    corrected = replace(quantized, layers=layers)
    step = IntegerStep(corrected)

    def apply(node: Node, inputs: list[list[Tensor]]) -> list[Tensor]:
        if not isinstance(node.layer, Weighted):
            return [step(node, list(parts)) for parts in zip(*inputs, strict=True)]
        layer, source = layers[node.name], corrected.params[corrected.carrier[node.inputs[0]]]
        weight, mean = folded.weight[node.name], target_means[node.name].to(layer.bias.device)
        while True:  # a wider weight scale rounds the weights anew, and so needs another correction
            totals = [accumulate(node.layer, codes, source.zero, layer) for codes in inputs[0]]
            bias = _corrected_bias(layer, source, mean, totals)
            if fits(layer.with_bias(bias)):
                break
            scale = layer.bias_scale(source).double()
            layer = quantize_layer(weight, bias * scale, source, len(layer.params) > 1)
        layers[node.name] = layer.with_bias(bias.to(torch.int32))
        shift = layers[node.name].bias - layer.bias
        return [step.output(node, total + shift.view(-1, *[1] * (total.ndim - 2))) for total in totals]

    output_of(corrected.network, [corrected.params[INPUT].quantize(batch) for batch in batches()], apply)
    return corrected


def _corrected_bias(layer: QuantizedLayer, source: QuantParams, mean: Tensor, totals: list[Tensor]) -> Tensor:
    """Bias codes, float64 [C], with which the mean of each channel's int32 totals stands for `mean`."""
    mean_total = _mean([_channel_sums(total) for total in totals])
    return layer.bias.double() + torch.round(mean / layer.bias_scale(source).double() - mean_total)


def _channel_sums(output: Tensor) -> tuple[Tensor, int]:
    """The sum of each channel of [N, C, ...], float64 [C], and the number of elements in a channel."""
    others = [axis for axis in range(output.ndim) if axis != 1]
    return output.sum(others, dtype=torch.float64), output.numel() // output.shape[1]


def _mean(parts: list[tuple[Tensor, int]]) -> Tensor:
    """The mean of each channel over the batches that `_channel_sums` gave `parts` of: float64 [C]."""
    return torch.stack([total for total, _ in parts]).sum(0) / sum(count for _, count in parts)
