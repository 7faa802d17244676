"""Layer statistics of a trained, folded, quantized network (paper, section 2; docs/quint8.md, metrics)."""

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from fnet_search.arch.costs import layer_cost
from fnet_search.arch.layers import Weighted
from fnet_search.policy.evaluation import LayerStats
from fnet_search.quant.fold import FoldedNetwork
from fnet_search.quant.ranges import TensorStats
from fnet_search.quant.simulator import QuantizedNetwork
from fnet_search.training.network import Network, walk


def channel_precision(low: Tensor, high: Tensor) -> tuple[float, int]:
    """Paper equation (3): the mean over channels of (channel range / tensor range), and the number of dead channels.

    `low` and `high` are the smallest and largest value of each channel, [C]. A dead channel (range 0) counts as 0.
    """
    ranges = (high - low).double()
    whole = float(high.max() - low.min())
    dead = int((ranges == 0).sum())
    return (float((ranges / whole).mean()) if whole > 0 else 0.0), dead


def sqnr_db(signal: float, noise: float) -> float | None:
    """10 log10(sum x^2 / sum (x - x_q)^2) in dB; None where there is no noise or no signal."""
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def profile(
    trained: Network,
    folded: FoldedNetwork,
    quantized: QuantizedNetwork,
    stats: Mapping[str, TensorStats],
    inputs: Iterable[tuple[Tensor, Tensor]],
    layers: Collection[str] | None = None,
) -> tuple[LayerStats, ...]:
    """One LayerStats for each convolution and dense layer (or those named in `layers`), in network order.

    Args:
        stats: of every quantized tensor, keyed by carrier.
        inputs: what SQNR is measured on: batches for the float network, each with the batch for the quantized one (the
            same, unless they come out of networks before these).
    """
    carrier = quantized.carrier
    nodes = [node for node in trained.network.order if isinstance(node.layer, Weighted)]
    nodes = [node for node in nodes if layers is None or node.name in layers]
    energies = _energies(folded, quantized, inputs, {carrier[node.name] for node in nodes})
    statistics = []
    for node in nodes:
        raw = trained.layer(node.name).get_parameter("weight").detach().cpu()
        weight, layer = folded.weight[node.name].cpu(), quantized.layers[node.name]
        weight_precision, dead_weights = channel_precision(*channel_extremes(raw))
        folded_precision, _ = channel_precision(*channel_extremes(weight))
        tensor = stats[carrier[node.name]]
        clipped = (side.clamp(tensor.low, tensor.high) for side in (tensor.channel_min, tensor.channel_max))
        activation_precision, dead_activations = channel_precision(*clipped)
        error = layer.weight.cpu().double() - weight.double()
        signal, local, accumulated = energies[carrier[node.name]]
        cost = layer_cost(node, trained.network.input_shapes(node))
        statistics.append(
            LayerStats(
                layer=node.name,
                kind=node.layer.kind,
                macs=cost.total_macs,
                params=cost.params,
                weight_min=float(raw.min()),
                weight_max=float(raw.max()),
                weight_precision=weight_precision,
                folded_min=float(weight.min()),
                folded_max=float(weight.max()),
                folded_precision=folded_precision,
                activation_min=tensor.low,
                activation_max=tensor.high,
                activation_precision=activation_precision,
                weight_sqnr_db=sqnr_db(float(weight.double().square().sum()), float(error.square().sum())),
                activation_sqnr_db=sqnr_db(signal, local),
                accumulated_sqnr_db=sqnr_db(signal, accumulated),
                sparsity=tensor.sparsity,
                dead_weight_channels=dead_weights,
                dead_activation_channels=dead_activations,
            )
        )
    return tuple(statistics)


def channel_extremes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest weight of each output channel, [C_out]."""
    return weight.flatten(1).amin(1), weight.flatten(1).amax(1)


@torch.no_grad()
def _energies(
    folded: FoldedNetwork,
    quantized: QuantizedNetwork,
    inputs: Iterable[tuple[Tensor, Tensor]],
    tensors: Collection[str],
) -> dict[str, tuple[float, float, float]]:
    """For each carrier in `tensors`: the energy (sum of squares) of the float signal, of the noise of quantizing it
    alone, and of the noise that the quantized network has accumulated there."""
    sums = dict.fromkeys(tensors, (0.0, 0.0, 0.0))
    last = [node.name for node in folded.network.order if node.name in sums][-1]
    for batch, quantized_batch in inputs:
        floats = walk(folded.network, batch, folded.apply_node)
        for (node, x), (_, codes) in zip(floats, quantized.codes(quantized_batch), strict=False):
            if node.name not in sums:
                continue
            params = quantized.params[node.name]
            local = params.dequantize(params.quantize(x)) - x
            parts = (x, local, params.dequantize(codes) - x)
            energies = (float(part.square().sum(dtype=torch.float64)) for part in parts)
            a, b, c = (old + new for old, new in zip(sums[node.name], energies, strict=True))
            sums[node.name] = (a, b, c)
            if node.name == last:
                break
    return sums
