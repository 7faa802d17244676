"""Builds a trainable torch module from a macroarchitecture; `walk` runs a graph for every kind of value."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, assert_never

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from fnet_search.arch.layers import (
    Activation,
    Add,
    Affine,
    BatchNorm,
    Concat,
    Conv,
    Dense,
    Flatten,
    Moving,
    Multiply,
    Pad,
    Pool,
    Resample,
    Reshape,
    Shuffle,
    Slice,
    Stateless,
    Weighted,
)
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.base.errors import FnetError
from fnet_search.training.kernels import block_diagonal, groups_to_merge, norm_relu
from fnet_search.training.weights import read_state

T = TypeVar("T")

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "mish": F.mish,
    "log_sigmoid": F.logsigmoid,
    "abs": torch.abs,
}
"""The activation functions without constants."""


def activate(layer: Activation, x: Tensor) -> Tensor:
    """Applies an activation without parameters to [N, C, H, W] or [N, C]."""
    match layer:
        case Activation("leaky_relu", tuple()):
            return F.prelu(x, x.new_tensor(layer.alpha))
        case Activation("leaky_relu", float() | int() as alpha):
            return F.leaky_relu(x, alpha)
        case Activation("elu", float() | int() as alpha):
            return F.elu(x, alpha)
        case Activation("celu", float() | int() as alpha):
            return F.celu(x, alpha)
        case Activation("clip"):
            return x.clamp(layer.low, layer.high)
    return FUNCTIONS[layer.function](x)


def walk(network: Macroarchitecture, x: T, apply: Callable[[Node, list[T]], T]) -> Iterator[tuple[Node, T]]:
    """Runs a graph on values of any kind. Yields each node, in topological order, with its output; outputs are dropped
    after their last use."""
    alive: dict[str, T] = {INPUT: x}
    readers = {name: network.graph.out_degree(name) for name in network.graph}
    for node in network.order:
        output = apply(node, [alive[source] for source in node.inputs])
        for source in set(node.inputs):
            readers[source] -= 1
            if readers[source] == 0:
                del alive[source]
        alive[node.name] = output
        yield node, output


def output_of(network: Macroarchitecture, x: T, apply: Callable[[Node, list[T]], T]) -> T:
    """The output of a graph, the logits, for values of any kind."""
    outputs = [output for node, output in walk(network, x, apply) if node.name == network.output]
    return outputs[0]


def moved(layer: Moving, x: Tensor, zero: int = 0) -> Tensor:
    """Applies a layer that only moves values, to values or codes [N, C, H, W] or [N, K]; `zero` represents zero."""
    match layer:
        case Flatten():
            return x.flatten(1)
        case Reshape(shape):
            return x.reshape(-1, *shape)
        case Slice(start, stop):
            return x[:, start:stop]
        case Shuffle(groups):
            return F.channel_shuffle(x, groups)
        case Resample(rows, columns):
            return x[:, :, list(rows)][:, :, :, list(columns)]
        case Pad(before, after):
            return F.pad(
                x, [count for pair in zip(before[::-1], after[::-1], strict=True) for count in pair], value=zero
            )
        case _:
            assert_never(layer)


def apply_stateless(layer: Stateless, inputs: list[Tensor]) -> Tensor:
    """Applies a layer without weights to float tensors [N, C, H, W] or [N, K]."""
    x = inputs[0]
    if isinstance(layer, Moving):
        return moved(layer, x)
    match layer:
        case Activation():
            return activate(layer, x)
        case Pool(reduction="max"):
            return F.max_pool2d(x, layer.kernel, layer.step, layer.padding, ceil_mode=layer.ceil)
        case Pool(reduction="average"):
            return F.avg_pool2d(x, layer.kernel, layer.step, layer.padding, layer.ceil, layer.count_padding)
        case Pool():
            return x.mean(dim=(2, 3), keepdim=True)
        case Add():
            return x + inputs[1]
        case Multiply():
            return x * inputs[1]
        case Concat():
            return torch.cat(inputs, dim=1)
        case _:
            assert_never(layer)


def _module(network: Macroarchitecture, node: Node) -> nn.Module | None:
    """The torch module of a node; None for a layer without parameters."""
    layer, shape = node.layer, network.input_shapes(node)[0]
    if isinstance(layer, Stateless):
        if isinstance(layer, Activation) and layer.function == "prelu":
            return nn.PReLU(shape[0] if layer.per_channel else 1)
        return None
    match layer:
        case Conv(out_channels, kernel, stride, padding, dilation, groups, bias):
            return nn.Conv2d(shape[0], out_channels, kernel, stride, padding, dilation, groups, bias)
        case BatchNorm(eps, affine):
            # Running statistics that adapt fast, for the accuracy after each epoch; `train.settle` recomputes them.
            kind = nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d
            return kind(shape[0], eps, momentum=0.3, affine=affine)
        case Affine():
            return ScaleShift(layer)
        case Dense(out_features, bias):
            return nn.Linear(shape[0], out_features, bias)
        case _:
            assert_never(layer)


class ScaleShift(nn.Module):
    """An affine layer. Constants are not part of the state dict: the layer itself holds them."""

    scale: Tensor
    shift: Tensor

    def __init__(self, layer: Affine) -> None:
        super().__init__()
        for name, values, neutral in (("scale", layer.scale, 1.0), ("shift", layer.shift, 0.0)):
            tensor = torch.tensor(values or (neutral,), dtype=torch.float32)
            if layer.trained and values:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x * scale + shift of [N, C, H, W] or [N, K], in the dtype of x."""
        scale, shift = (values.view(-1, *[1] * (x.ndim - 2)) for values in (self.scale, self.shift))
        return (x * scale + shift).to(x.dtype)


class _Layers(nn.ModuleDict):
    """Modules by layer name. Unlike ModuleDict, takes names of attributes too (``type``, ``forward``), because modules
    are items here and never attributes.
    """

    def add_module(self, name: str, module: nn.Module | None) -> None:
        assert module is not None
        self._modules[name] = module

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


class Network(nn.Module):
    """The trainable network of a macroarchitecture: normalised float images [N, C, H, W] to logits [N, classes]."""

    def __init__(self, network: Macroarchitecture) -> None:
        super().__init__()
        self.network = network
        modules = {node.name: _module(network, node) for node in network.order}
        self.layers = _Layers({module_key(name): module for name, module in modules.items() if module is not None})
        self._fused: frozenset[str] = frozenset()
        self._merged: dict[str, int] = {}

    def layer(self, name: str) -> nn.Module:
        """The module of a node that has one."""
        return self.layers[module_key(name)]

    def speed_up(self, fused: bool, group_widths: tuple[int, ...]) -> None:
        """Selects the kernels of `kernels` for training mode; results differ by rounding only.

        `fused`: each BatchNorm and the ReLU after it in one pass. `group_widths`: see `numerics.Numerics`.
        """
        network = self.network
        self._fused = frozenset(
            node.name
            for node in network.order
            if fused and isinstance(node.layer, BatchNorm) and node.layer.affine
            if len(network.shapes[node.name]) == 3
            if [reader.layer for reader in network.consumers(node.name)] == [Activation("relu")]
        )
        self._merged = {
            node.name: groups_to_merge(self.network.input_shapes(node)[0][0], node.layer.groups, group_widths)
            for node in network.order
            if isinstance(node.layer, Conv)
        }

    def apply_node(self, node: Node, inputs: list[Tensor]) -> Tensor:
        """Applies one layer to float tensors [N, C, H, W] or [N, K]."""
        key, x = module_key(node.name), inputs[0]
        if key not in self.layers:
            assert isinstance(node.layer, Stateless)
            computed = self.training and node.inputs[0] in self._fused  # by the BatchNorm before it
            return x if computed else apply_stateless(node.layer, inputs)
        module = self.layers[key]
        if self.training and node.name in self._fused:
            assert isinstance(module, nn.BatchNorm2d)
            return norm_relu(x, module)
        if self.training and self._merged.get(node.name, 1) > 1:
            assert isinstance(module, nn.Conv2d)
            return block_diagonal(x, module, self._merged[node.name])
        output: Tensor = module(x)
        return output

    def forward(self, x: Tensor) -> Tensor:
        return output_of(self.network, x, self.apply_node)


def module_key(name: str) -> str:
    """The layer name as a module name, which must not hold dots; `Macroarchitecture` keeps the results distinct."""
    return name.replace(".", "/")


INITIALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "glorot_uniform": nn.init.xavier_uniform_,
    "he_normal": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    "orthogonal": nn.init.orthogonal_,
}


def build(network: Macroarchitecture, initializer: str = "glorot_uniform", seed: int = 0) -> Network:
    """A freshly initialised network, determined by (network, initializer, seed). Biases are zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Network(network)
        for node in network.order:
            if isinstance(node.layer, Weighted):
                layer = module.layer(node.name)
                assert isinstance(layer, nn.Conv2d | nn.Linear)
                INITIALIZERS[initializer](layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return module


def pretrained(network: Macroarchitecture, initializer: str = "glorot_uniform", seed: int = 0) -> Network:
    """The network with its imported weights; the weights of a new last layer are drawn as in `build`.

    Raises FnetError for a network without weights.
    """
    if network.weights is None:
        raise FnetError(f"space {network.name!r} has no weights; import it with weights, or train it from scratch")
    module = build(network, initializer, seed)
    initial = module.state_dict()
    loaded = {name: w for name, w in network.weights.items() if name in initial and initial[name].shape == w.shape}
    module.load_state_dict({**initial, **loaded})
    return module


def load_weights(network: Macroarchitecture, path: Path) -> Macroarchitecture:
    """The network with weights from a file (`weights.read_state`), and with the number of classes that they have.
    Raises FnetError, naming the file, if they do not fit."""
    state = read_state(path)
    last = network.classifier
    weight = None if last is None else state.get(f"layers.{module_key(last.name)}.weight")
    resized = network if weight is None else network.with_classes(weight.shape[0])
    shapes = {name: tensor.shape for name, tensor in Network(resized).state_dict().items()}
    wrong = [name for name in {**shapes, **state} if name not in state or shapes.get(name) != state[name].shape]
    if wrong:
        raise FnetError(f"{path} does not hold the weights of space {network.name!r}: {wrong[0]!r} does not fit")
    return replace(resized, weights=state)
