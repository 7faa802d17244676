"""Makes the network of a plan: replaces convolutions by groupwise separable ones (paper, section 2)."""

from dataclasses import replace

from fnet_search.arch.layers import Activation, BatchNorm, Conv
from fnet_search.arch.macroarchitecture import Macroarchitecture, Node
from fnet_search.arch.plan import FactorizationPlan, check_plan


def replacement(space: Macroarchitecture, node: Node, rate: int) -> list[Node]:
    """The nodes that replace a convolution: above rate 1 grouped KxK, BatchNorm, ReLU, pointwise (paper, section 3)."""
    if rate == 1:
        return [node]
    conv, name = node.layer, node.name
    assert isinstance(conv, Conv)
    channels = space.shapes[node.inputs[0]][0]
    norms = [reader.layer for reader in space.consumers(name) if isinstance(reader.layer, BatchNorm)]
    return [
        Node(
            f"{name}.grouped", Conv(channels, conv.kernel, conv.stride, conv.padding, conv.dilation, rate), node.inputs
        ),
        Node(f"{name}.norm", replace(norms[0], affine=True) if norms else BatchNorm(), (f"{name}.grouped",)),
        Node(f"{name}.relu", Activation("relu"), (f"{name}.norm",)),
        Node(f"{name}.pointwise", Conv(conv.out_channels, (1, 1), bias=conv.bias), (f"{name}.relu",)),
    ]


def convolutions(layer: str, rate: int) -> tuple[str, ...]:
    """Names of the convolutions that replace a layer at a rate."""
    return (layer,) if rate == 1 else (f"{layer}.grouped", f"{layer}.pointwise")


def factorize(space: Macroarchitecture, plan: FactorizationPlan) -> Macroarchitecture:
    """The network of a plan: every layer with a rate above 1 replaced by its groupwise separable convolution.

    ``NAME`` becomes ``NAME.grouped``, ``NAME.norm``, ``NAME.relu``, ``NAME.pointwise``; all other nodes stay.
    """
    check_plan(space, plan)
    renamed = {layer: f"{layer}.pointwise" for layer, rate in plan.rates if rate > 1}
    nodes: list[Node] = []
    for node in space.nodes:
        new = replacement(space, node, plan.by_layer.get(node.name, 1))
        nodes += [
            Node(part.name, part.layer, tuple(renamed.get(source, source) for source in part.inputs)) for part in new
        ]
    return Macroarchitecture(space.name, space.input_shape, tuple(nodes), space.description)
