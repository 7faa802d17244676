"""Cross-layer equalization (Nagel et al., Data-Free Quantization, 2019, section 4.1): the same function, with weights
whose output channels use their tensor's range more evenly."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import assert_never

import torch
from torch import Tensor

from fnet_search.arch.layers import (
    Activation,
    Add,
    Affine,
    BatchNorm,
    Concat,
    Conv,
    Dense,
    Flatten,
    Multiply,
    Pad,
    Pool,
    Resample,
    Reshape,
    Shuffle,
    Slice,
    Weighted,
)
from fnet_search.arch.macroarchitecture import Macroarchitecture, Node
from fnet_search.quant.fold import FoldedNetwork

MAX_SWEEPS = 1000
"""Only a bound: with random weights factorizenet settles in 97 sweeps, under the plan init2 in 265."""
SETTLED = 1e-4
"""Sweeps end when no logarithmic scale changes by more: 0.01 %, far below a step of eight bits."""


@dataclass(frozen=True)
class LayerPair:
    """Two layers that can exchange a positive factor for each channel: only `second` reads what `first` writes.

    `repeat` inputs of `second` belong to one channel of `first` (pixels, where a flatten lies between).
    """

    first: str
    second: str
    repeat: int = 1


def layer_pairs(network: Macroarchitecture) -> Iterator[LayerPair]:
    """The pairs of a folded network, in network order: convolutions or dense layers with nothing between them but nodes
    that have one reader and are positively homogeneous channel by channel (ReLU, leaky ReLU, pools, flatten)."""
    for node in network.order:
        if not isinstance(node.layer, Weighted):
            continue
        reader, repeat = _only_reader(network, node), 1
        while reader is not None and _homogeneous(reader):
            if isinstance(reader.layer, Flatten):
                repeat *= network.shapes[reader.name][0] // network.input_shapes(reader)[0][0]
            reader = _only_reader(network, reader)
        if reader is not None and isinstance(reader.layer, Weighted):
            yield LayerPair(node.name, reader.name, repeat)


def _only_reader(network: Macroarchitecture, node: Node) -> Node | None:
    readers = network.consumers(node.name)
    return readers[0] if len(readers) == 1 else None


def _homogeneous(node: Node) -> bool:
    layer = node.layer
    match layer:
        case Activation(function):
            return function in ("relu", "leaky_relu")
        case Pool() | Flatten():
            return True
        case Conv() | Dense() | BatchNorm() | Affine() | Add() | Multiply() | Concat():
            return False
        case Reshape() | Slice() | Shuffle() | Resample() | Pad():
            return False  # may move values from one channel to another
        case _:
            assert_never(layer)


def equalize(folded: FoldedNetwork) -> FoldedNetwork:
    """Scales channel i between the layers of each pair, W1_i / s_i, b1_i / s_i and W2_i s_i, until r1_i = r2_i.

    s_i = sqrt(r1_i / r2_i), with r1_i and r2_i the largest absolute weights that write and read the channel. s_i stops
    where b1_i / s_i would exceed the largest bias of its layer: a channel with small weights and a large bias would
    otherwise stretch the range of the activations. A channel that is not written or not read keeps its weights.
    Computed in float64 and stored as float32, so the network's function changes by that rounding only.
    """
    pairs, nodes = list(layer_pairs(folded.network)), folded.network.by_name
    repeat = {pair.second: pair.repeat for pair in pairs}
    largest = {
        name: _largest_weights(nodes[name], weight, repeat.get(name, 1)) for name, weight in folded.weight.items()
    }
    scales = {pair: torch.ones(len(folded.bias[pair.first]), dtype=torch.float64) for pair in pairs}
    lowest = {pair: _relative_size(folded.bias[pair.first]) for pair in pairs}
    for _ in range(MAX_SWEEPS):
        change = 0.0
        for pair in pairs:
            first, second = largest[pair.first], largest[pair.second]
            scale = torch.sqrt(first.amax(2).flatten() / second.amax(1).flatten())
            scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
            scale = torch.maximum(scale, lowest[pair] / scales[pair])
            largest[pair.first] = first / scale.view(first.shape[0], -1, 1)
            largest[pair.second] = second * scale.view(second.shape[0], 1, -1)
            scales[pair] *= scale
            change = max(change, float(scale.log().abs().max()))
        if change < SETTLED:
            break
    weight = {name: tensor.double() for name, tensor in folded.weight.items()}
    bias = {name: tensor.double() for name, tensor in folded.bias.items()}
    for pair, factors in scales.items():
        scale = factors.to(bias[pair.first].device)
        weight[pair.first] = weight[pair.first] / scale.view(-1, *[1] * (weight[pair.first].ndim - 1))
        bias[pair.first] = bias[pair.first] / scale
        read = _grouped(nodes[pair.second], weight[pair.second])
        by_input = scale.repeat_interleave(pair.repeat).view(read.shape[0], 1, read.shape[2], 1)
        weight[pair.second] = (read * by_input).view_as(weight[pair.second])
    return replace(
        folded,
        weight={name: tensor.float() for name, tensor in weight.items()},
        bias={name: tensor.float() for name, tensor in bias.items()},
    )


def _relative_size(bias: Tensor) -> Tensor:
    """|b_i| / max |b|, float64 [C]; zeros where all are zero."""
    size = bias.double().abs().cpu()
    return size / size.max().clamp_min(torch.finfo(torch.float64).tiny)


def _grouped(node: Node, weight: Tensor) -> Tensor:
    """A view of a weight as [groups, outputs in a group, inputs in a group, kernel]."""
    groups = node.layer.groups if isinstance(node.layer, Conv) else 1
    return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _largest_weights(node: Node, weight: Tensor, repeat: int) -> Tensor:
    """The largest absolute weight between each channel and each output, float64 [groups, outputs, channels in a group].

    Without the kernel's positions the sweeps cost little.
    """
    over_kernel = _grouped(node, weight).abs().amax(3)
    return over_kernel.reshape(*over_kernel.shape[:2], -1, repeat).amax(3).double().cpu()
