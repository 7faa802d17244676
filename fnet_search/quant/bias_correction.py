"""Bias correction (Nagel et al., Data-Free Quantization, 2019, section 4.2, on calibration samples)."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fnet_search.arch.layers import Weighted
from fnet_search.arch.macroarchitecture import INPUT, Node
from fnet_search.quant.fold import FoldedNetwork
from fnet_search.quant.quant_params import QuantParams
from fnet_search.quant.quantized_layer import QuantizedLayer, fits, quantize_layer
from fnet_search.quant.simulator import QuantizedNetwork, Step, accumulate
from fnet_search.training.datasets import Batches
from fnet_search.training.network import run, walk


@torch.no_grad()
def channel_means(folded: FoldedNetwork, batches: Batches) -> Mapping[str, Tensor]:
    """Of each convolution and dense layer of the float network: the mean of each output channel over the samples,
    before any ReLU, float64 [C]."""
    sums: dict[str, list[tuple[Tensor, int]]] = {}
    for batch in batches():
        for node, output in walk(folded.network, batch, folded.apply_node):
            if isinstance(node.layer, Weighted):
                sums.setdefault(node.name, []).append(_channel_sums(output))
    return {name: _mean(parts) for name, parts in sums.items()}


@torch.no_grad()
def correct_biases(
    folded: FoldedNetwork,
    quantized: QuantizedNetwork,
    batches: Batches,
    means: Mapping[str, Tensor] | None = None,
) -> QuantizedNetwork:
    """Layer after layer, moves the int32 biases so that the mean of each output channel, before any ReLU, is that of
    the float network over the samples (`means`, those of `channel_means`), with all layers before quantized and
    corrected.

    What clipping and rounding shift is put right; the float network stays as it is. A layer whose corrected biases
    leave int32 no room for its sums is quantized again, with a wider weight scale. The codes of all samples pass one
    layer before the next, so memory grows with them: give few.
    """
    wanted = channel_means(folded, batches) if means is None else means
    layers = dict(quantized.layers)
    corrected = replace(quantized, layers=layers)
    step = Step(corrected)

    def apply(node: Node, inputs: list[list[Tensor]]) -> list[Tensor]:
        if not isinstance(node.layer, Weighted):
            return [step(node, list(parts)) for parts in zip(*inputs, strict=True)]
        layer, source = layers[node.name], corrected.params[corrected.carrier[node.inputs[0]]]
        weight, mean = folded.weight[node.name], wanted[node.name].to(layer.bias.device)
        while True:
            totals = [accumulate(node.layer, codes, source.zero, layer) for codes in inputs[0]]
            bias = _bias(layer, source, mean, totals)
            if fits(layer.with_bias(bias)):
                break
            scale = layer.bias_scale(source).double()
            layer = quantize_layer(weight, bias * scale, source, len(layer.params) > 1)  # its weights round otherwise
        layers[node.name] = layer.with_bias(bias.to(torch.int32))
        shift = layers[node.name].bias - layer.bias
        return [step.output(node, total + shift.view(-1, *[1] * (total.ndim - 2))) for total in totals]

    run(corrected.network, [corrected.params[INPUT].quantize(batch) for batch in batches()], apply)
    return corrected


def _bias(layer: QuantizedLayer, source: QuantParams, wanted: Tensor, totals: list[Tensor]) -> Tensor:
    """Bias codes, float64 [C], with which the mean of each channel's int32 totals is that of the float network."""
    found = _mean([_channel_sums(total) for total in totals])
    return layer.bias.double() + torch.round(wanted / layer.bias_scale(source).double() - found)


def _channel_sums(output: Tensor) -> tuple[Tensor, int]:
    """Of [N, C, ...]: the sum of each channel over all else, float64 [C], and how many elements a channel has."""
    others = [axis for axis in range(output.ndim) if axis != 1]
    return output.sum(others, dtype=torch.float64), output.numel() // output.shape[1]


def _mean(parts: list[tuple[Tensor, int]]) -> Tensor:
    """Of `_channel_sums` of batches: float64 [C]."""
    return torch.stack([total for total, _ in parts]).sum(0) / sum(count for _, count in parts)
