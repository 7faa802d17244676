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

SWEEPS = 1000
SETTLED = 1e-4
"""Largest change of a logarithmic scale at which sweeps end."""


@dataclass(frozen=True)
class Pair:
    """Two layers between which a positive factor a channel may move: `first` writes what only `second` reads.

    `repeat` inputs of `second` stand for one channel of `first` (pixels, where a flatten lies between).
    """

    first: str
    second: str
    repeat: int = 1


def pairs(network: Macroarchitecture) -> Iterator[Pair]:
    """The pairs of a folded network, in order: convolutions or dense layers with nothing between them that has another
    reader or is not positively homogeneous channel by channel (ReLU, leaky ReLU, pools and flatten are)."""
    for node in network.order:
        if not isinstance(node.layer, Weighted):
            continue
        reader, repeat = _only_reader(network, node), 1
        while reader is not None and _homogeneous(reader):
            if isinstance(reader.layer, Flatten):
                repeat *= network.shapes[reader.name][0] // network.input_shapes(reader)[0][0]
            reader = _only_reader(network, reader)
        if reader is not None and isinstance(reader.layer, Weighted):
            yield Pair(node.name, reader.name, repeat)


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
            return False  # those of one channel may be of another after it
        case _:
            assert_never(layer)


def equalize(folded: FoldedNetwork) -> FoldedNetwork:
    """Scales channel i between the layers of each pair by s_i = sqrt(r1_i / r2_i), r the largest absolute weights that
    write and read it, until nothing changes: then r1_i = r2_i, unless b1_i / s_i would grow beyond the largest bias of
    its layer. There s_i stops: a channel of small weights and a large bias would stretch the range of the activations.

    W1_i / s_i, b1_i / s_i and W2_i s_i: in float64, stored as float32, so the function changes by its rounding only.
    A channel that is not written or not read keeps its weights.
    """
    chained, nodes = list(pairs(folded.network)), folded.network.by_name
    repeat = {pair.second: pair.repeat for pair in chained}
    reach = {name: _reach(nodes[name], weight, repeat.get(name, 1)) for name, weight in folded.weight.items()}
    scales = {pair: torch.ones(len(folded.bias[pair.first]), dtype=torch.float64) for pair in chained}
    lowest = {pair: _share(folded.bias[pair.first]) for pair in chained}
    for _ in range(SWEEPS):
        change = 0.0
        for pair in chained:
            first, second = reach[pair.first], reach[pair.second]
            scale = torch.sqrt(first.amax(2).flatten() / second.amax(1).flatten())
            scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
            scale = torch.maximum(scale, lowest[pair] / scales[pair])
            reach[pair.first] = first / scale.view(first.shape[0], -1, 1)
            reach[pair.second] = second * scale.view(second.shape[0], 1, -1)
            scales[pair] *= scale
            change = max(change, float(scale.log().abs().max()))
        if change < SETTLED:
            break
    weight = {name: tensor.double() for name, tensor in folded.weight.items()}
    bias = {name: tensor.double() for name, tensor in folded.bias.items()}
    for pair, found in scales.items():
        scale = found.to(bias[pair.first].device)
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


def _share(bias: Tensor) -> Tensor:
    """|b_i| of the largest, float64 [C]; zeros where all are zero."""
    size = bias.double().abs().cpu()
    return size / size.max().clamp_min(torch.finfo(torch.float64).tiny)


def _grouped(node: Node, weight: Tensor) -> Tensor:
    """A view of a weight as [groups, outputs in a group, inputs in a group, kernel]."""
    groups = node.layer.groups if isinstance(node.layer, Conv) else 1
    return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _reach(node: Node, weight: Tensor, repeat: int) -> Tensor:
    """The largest absolute weight from each channel to each output, [groups, outputs, channels in a group]: small, so
    that sweeps cost little."""
    largest = _grouped(node, weight).abs().amax(3)
    return largest.reshape(*largest.shape[:2], -1, repeat).amax(3).double().cpu()
