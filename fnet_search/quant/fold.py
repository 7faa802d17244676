"""Folding of BatchNorm (rule 1 of docs/quint8.md): the float network that is quantized."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import assert_never

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from fnet_search.arch.layers import Activation, Affine, BatchNorm, Conv, Dense, Foldable, Stateless, Weighted
from fnet_search.arch.macroarchitecture import Macroarchitecture, Node
from fnet_search.training.network import Network, ScaleShift, apply_stateless, output_of


@dataclass(frozen=True)
class FoldedNetwork:
    """A network without BatchNorm and affine layers: its convolutions and dense layers have a float32 weight and bias.

    Weights have torch's shapes, [C_out, C_in / groups, K_h, K_w] and [out, in]; `weight` and `bias` are keyed by node.
    """

    network: Macroarchitecture
    weight: Mapping[str, Tensor]
    bias: Mapping[str, Tensor]

    def apply_node(self, node: Node, inputs: list[Tensor]) -> Tensor:
        """One layer on float tensors [N, C, H, W] or [N, K]."""
        layer = node.layer
        if isinstance(layer, Stateless):
            return apply_stateless(layer, inputs)
        match layer:
            case Conv():
                weight, bias = self.weight[node.name], self.bias[node.name]
                return F.conv2d(inputs[0], weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
            case Dense():
                return F.linear(inputs[0], self.weight[node.name], self.bias[node.name])
            case BatchNorm() | Affine():
                raise TypeError(f"{layer.kind} is not part of a folded network")
            case _:
                assert_never(layer)

    def __call__(self, x: Tensor) -> Tensor:
        """[N, C, H, W] normalised images to [N, classes] logits, float32."""
        return output_of(self.network, x, self.apply_node)


def fold(trained: Network) -> FoldedNetwork:
    """Folds each BatchNorm and affine layer into the convolution or dense layer before it.

    g = gamma / sqrt(var + eps), W' = W g, b' = (b - mean) g + beta, computed in float64 and stored as float32. Where no
    such layer comes before, or another node reads it too, the BatchNorm becomes a 1x1 depthwise convolution (on
    vectors: a dense layer with a diagonal weight). The learned slopes of a PReLU become constants of a leaky ReLU.
    """
    space = trained.network
    weight: dict[str, Tensor] = {}
    bias: dict[str, Tensor] = {}
    nodes: dict[str, Node] = {}
    alias: dict[str, str] = {}
    for node in space.order:
        inputs = tuple(alias.get(source, source) for source in node.inputs)
        if isinstance(node.layer, Weighted):
            module = trained.layer(node.name)
            assert isinstance(module, nn.Conv2d | nn.Linear)
            weight[node.name] = module.weight.detach().double()
            outputs = len(module.weight)
            bias[node.name] = (
                module.weight.new_zeros(outputs).double() if module.bias is None else module.bias.detach().double()
            )
            nodes[node.name] = Node(node.name, replace(node.layer, bias=True), inputs)
        elif isinstance(node.layer, Foldable):
            source = inputs[0]
            shape = space.input_shapes(node)[0]
            gain, offset = _affine(trained.layer(node.name), shape[0])
            if source in weight and len(space.consumers(node.inputs[0])) == 1:
                weight[source] = weight[source] * gain.view(-1, *[1] * (weight[source].ndim - 1))
                bias[source] = bias[source] * gain + offset
                alias[node.name] = source
            elif len(shape) == 3:
                weight[node.name], bias[node.name] = gain.view(-1, 1, 1, 1), offset
                nodes[node.name] = Node(node.name, Conv(shape[0], (1, 1), groups=shape[0], bias=True), inputs)
            else:
                weight[node.name], bias[node.name] = torch.diag(gain), offset
                nodes[node.name] = Node(node.name, Dense(shape[0]), inputs)
        elif isinstance(node.layer, Activation) and node.layer.function == "prelu":
            slopes = trained.layer(node.name).get_parameter("weight").tolist()
            alpha = tuple(slopes) if node.layer.per_channel else slopes[0]
            nodes[node.name] = Node(node.name, Activation("leaky_relu", alpha), inputs)
        else:
            nodes[node.name] = Node(node.name, node.layer, inputs)
    network = Macroarchitecture(space.name, space.input_shape, tuple(nodes.values()), space.description)
    return FoldedNetwork(
        network,
        {name: tensor.float().contiguous() for name, tensor in weight.items()},
        {name: tensor.float().contiguous() for name, tensor in bias.items()},
    )


def _affine(module: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """Gain and offset, float64 [C], of an affine layer or of a BatchNorm in evaluation mode."""
    if isinstance(module, ScaleShift):
        gain, offset = (values.detach().double().expand(channels) for values in (module.scale, module.shift))
        return gain, offset
    assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    assert module.running_var is not None
    assert module.running_mean is not None
    gamma, beta = (module.weight.detach(), module.bias.detach()) if module.affine else (torch.ones(()), torch.zeros(()))
    gain = gamma.double() / torch.sqrt(module.running_var.double() + module.eps)
    return gain, beta.double() - module.running_mean.double() * gain
