"""From a folded network and its activation ranges to the integer network: rules 2 and 17 of docs/quint8.md."""

from collections.abc import Mapping
from math import inf
from types import MappingProxyType

from fnet_search.arch.layers import Activation, Weighted
from fnet_search.arch.macroarchitecture import Node
from fnet_search.base.errors import FnetError
from fnet_search.quant.fold import FoldedNetwork
from fnet_search.quant.quant_params import QuantParams, degenerate, quant_params
from fnet_search.quant.quantized_layer import QuantizedLayer, quantize_layer
from fnet_search.quant.ranges import TensorStats, carriers
from fnet_search.quant.simulator import QuantizedNetwork

BOUNDS: Mapping[str, tuple[float, float]] = {"relu6": (0, 6), "hardsigmoid": (0, 1), "sigmoid": (0, 1), "tanh": (-1, 1)}
"""The range of values of each bounded function."""


def quantize(
    folded: FoldedNetwork,
    stats: Mapping[str, TensorStats],
    per_channel: bool = False,
    known: Mapping[str, QuantizedLayer] = MappingProxyType({}),
) -> QuantizedNetwork:
    """The integer network of a folded one, with the activation ranges of `stats` (those of `ranges.calibrate`).

    `known` holds layers with the same weights, quantized for other ranges; equal codes are shared, not computed again.
    Raises FnetError where an int32 accumulation could overflow.
    """
    carrier = carriers(folded.network)
    params = {name: _activation_params(folded.network.by_name.get(name), tensor) for name, tensor in stats.items()}
    layers = {}
    for node in folded.network.order:
        if isinstance(node.layer, Weighted):
            source = params[carrier[node.inputs[0]]]
            weight, bias = folded.weight[node.name], folded.bias[node.name]
            try:
                layers[node.name] = quantize_layer(weight, bias, source, per_channel, known.get(node.name))
            except FnetError as error:
                raise FnetError(f"layer {node.name!r}: {error}") from None
    return QuantizedNetwork(folded.network, params, layers)


def _activation_params(node: Node | None, stats: TensorStats) -> QuantParams:
    """Rules 2 and 17: a range ends where that of the function that gives the tensor ends. A tensor that was zero over
    all samples takes the whole range of its function if that is bounded from above: with the scale 1 of rule 2 its
    codes could exceed the bound."""
    low, high = stats.low, stats.high
    if node is not None and isinstance(node.layer, Activation):
        least, most = _bounds(node.layer)
        if degenerate(low, high) and most < inf:
            low, high = (least if least > -inf else low), most
        low, high = max(low, least), min(high, most)
    return quant_params(low, high)


def _bounds(layer: Activation) -> tuple[float, float]:
    """The range of values of an activation function."""
    if layer.low is not None and layer.high is not None:
        return layer.low, layer.high
    return BOUNDS.get(layer.function, (-inf, inf))
