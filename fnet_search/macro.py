"""Macroarchitectures: typed layers on a directed graph, with shapes inferred; loaded from and saved to TOML.

A space (design term for a named macroarchitecture) is data. Shapes leave the batch out: ``(C, H, W)`` for images
and feature maps, ``(K,)`` for vectors.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import networkx as nx
import tomli_w

from fnet_search import resources
from fnet_search.errors import FnetError, nearest, unknown
from fnet_search.tables import Pair, build, is_int

Shape = tuple[int, ...]
Function = Literal["relu", "relu6", "hardswish", "hardsigmoid", "sigmoid", "silu"]
Reduction = Literal["max", "average", "global_average"]

INPUT = "input"
"""Name of the graph's source: the image, normalised."""


def _feature_map(shape: Shape) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise FnetError(
            f"needs a feature map (C, H, W) as input, got a vector of shape {shape}; put it before the flatten"
        )
    return shape[0], shape[1], shape[2]


def _window(size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1)) -> Pair:
    """Height and width after a sliding window (ONNX Conv and MaxPool, explicit padding, floor)."""
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    if min(out) < 1:
        raise FnetError(f"its {kernel[0]}x{kernel[1]} window does not fit into the {size[0]}x{size[1]} input")
    return out[0], out[1]


def _positive(**values: int | Pair) -> None:
    for name, value in values.items():
        if min(value if isinstance(value, tuple) else (value,)) < 1:
            raise FnetError(f"{name} must be at least 1, got {value}")


class _Weightless:
    """A layer that counts nothing: no multiply-accumulates, no parameters."""

    def macs(self, inputs: list[Shape]) -> int:
        return 0

    def params(self, inputs: list[Shape]) -> int:
        return 0


@dataclass(frozen=True)
class Conv:
    """2-D convolution (ONNX ``Conv``); ``factorize`` lets a plan replace it by a groupwise separable one."""

    out_channels: int
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = False
    factorize: bool = False
    kind: ClassVar[str] = "conv"

    def __post_init__(self) -> None:
        _positive(out_channels=self.out_channels, kernel=self.kernel, stride=self.stride)
        _positive(dilation=self.dilation, groups=self.groups)
        if min(self.padding) < 0:
            raise FnetError(f"padding must not be negative, got {self.padding}")
        if self.factorize and self.groups != 1:
            raise FnetError("a convolution with groups cannot be factorized; set factorize = false or groups = 1")

    def output_shape(self, inputs: list[Shape]) -> Shape:
        channels, *size = _feature_map(inputs[0])
        if channels % self.groups or self.out_channels % self.groups:
            raise FnetError(
                f"groups = {self.groups} does not divide its {channels} input and {self.out_channels} output channels"
            )
        return self.out_channels, *_window((size[0], size[1]), self.kernel, self.stride, self.padding, self.dilation)

    def macs(self, inputs: list[Shape]) -> int:
        """K_h K_w (C_in / groups) C_out H W, paper equations (1) and (2)."""
        return prod(self.kernel) * (inputs[0][0] // self.groups) * prod(self.output_shape(inputs))

    def params(self, inputs: list[Shape]) -> int:
        return self.out_channels * (prod(self.kernel) * (inputs[0][0] // self.groups) + self.bias)


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalisation over channels (ONNX ``BatchNormalization``)."""

    eps: float = 1e-3
    kind: ClassVar[str] = "batch_norm"

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise FnetError(f"eps must be positive, got {self.eps}")

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return inputs[0]

    def macs(self, inputs: list[Shape]) -> int:
        return 0

    def params(self, inputs: list[Shape]) -> int:
        return 2 * inputs[0][0]


@dataclass(frozen=True)
class Activation(_Weightless):
    """An elementwise function."""

    function: Function = "relu"
    kind: ClassVar[str] = "activation"

    def __post_init__(self) -> None:
        if self.function not in get_args(Function):
            raise unknown("activation function", str(self.function), get_args(Function))

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return inputs[0]


@dataclass(frozen=True)
class Pool(_Weightless):
    """Max, average (padding not counted) or global average pooling, stride = kernel unless given."""

    reduction: Reduction = "max"
    kernel: Pair = (2, 2)
    stride: Pair | None = None
    padding: Pair = (0, 0)
    kind: ClassVar[str] = "pool"

    def __post_init__(self) -> None:
        if self.reduction not in get_args(Reduction):
            raise unknown("pool reduction", str(self.reduction), get_args(Reduction))
        _positive(kernel=self.kernel, stride=self.step)
        if min(self.padding) < 0 or any(2 * p > k for p, k in zip(self.padding, self.kernel, strict=True)):
            raise FnetError(f"padding must be between 0 and half the kernel, got {self.padding}")

    @property
    def step(self) -> Pair:
        return self.stride or self.kernel

    def output_shape(self, inputs: list[Shape]) -> Shape:
        channels, height, width = _feature_map(inputs[0])
        if self.reduction == "global_average":
            return channels, 1, 1
        return channels, *_window((height, width), self.kernel, self.step, self.padding)


@dataclass(frozen=True)
class Dense:
    """Fully connected layer on a vector (ONNX ``Gemm``)."""

    out_features: int
    bias: bool = True
    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        _positive(out_features=self.out_features)

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if len(inputs[0]) != 1:
            raise FnetError(f"needs a vector as input, got shape {inputs[0]}; put a flatten before it")
        return (self.out_features,)

    def macs(self, inputs: list[Shape]) -> int:
        return inputs[0][0] * self.out_features

    def params(self, inputs: list[Shape]) -> int:
        return self.out_features * (inputs[0][0] + self.bias)


@dataclass(frozen=True)
class Flatten(_Weightless):
    """(C, H, W) to (C H W,)."""

    kind: ClassVar[str] = "flatten"

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return (prod(inputs[0]),)


@dataclass(frozen=True)
class Add(_Weightless):
    """Sum of two tensors of one shape (ONNX ``Add``)."""

    kind: ClassVar[str] = "add"

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if inputs[0] != inputs[1]:
            raise FnetError(f"cannot add shapes {inputs[0]} and {inputs[1]}; they must be equal")
        return inputs[0]


@dataclass(frozen=True)
class Concat(_Weightless):
    """Concatenation over channels (ONNX ``Concat``, axis 1)."""

    kind: ClassVar[str] = "concat"

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if len({shape[1:] for shape in inputs}) > 1 or len({len(shape) for shape in inputs}) > 1:
            raise FnetError(
                f"cannot concatenate shapes {', '.join(map(str, inputs))}; all but the channels must be equal"
            )
        return sum(shape[0] for shape in inputs), *inputs[0][1:]


Layer = Conv | BatchNorm | Activation | Pool | Dense | Flatten | Add | Concat
KINDS: Mapping[str, type[Layer]] = {layer.kind: layer for layer in get_args(Layer)}


@dataclass(frozen=True)
class Node:
    """A layer in its place: its name and the names of the nodes (or ``"input"``) that feed it, in order."""

    name: str
    layer: Layer
    inputs: tuple[str, ...]


class _LayerError(FnetError):
    """A fault of one layer; knows which, so that a loader can say where in its file it stands."""

    def __init__(self, position: int, name: str, message: str) -> None:
        self.position, self.name, self.message = position, name, message
        super().__init__(f"layer {name!r} (number {position + 1}): {message}")


@dataclass(frozen=True)
class Macroarchitecture:
    """A named network graph without weights: one source (the image), one sink (the logits).

    `nodes` may come in any order; `order` has them topologically sorted. Raises FnetError, naming the layer, for
    duplicate names, missing edges, cycles, mismatched shapes, or more than one end.
    """

    name: str
    input_shape: tuple[int, int, int]
    nodes: tuple[Node, ...]
    description: str = ""
    graph: "nx.DiGraph[str]" = field(init=False, compare=False, repr=False)
    order: tuple[Node, ...] = field(init=False, compare=False, repr=False)
    shapes: Mapping[str, Shape] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.input_shape) != 3 or min(self.input_shape) < 1:
            raise FnetError(f"input must be three positive integers [C, H, W], got {list(self.input_shape)}")
        position = self._check_edges()
        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_node(INPUT)
        graph.add_nodes_from(position)
        graph.add_edges_from((source, node.name) for node in self.nodes for source in node.inputs)
        try:
            names = list(nx.lexicographical_topological_sort(graph, key=lambda name: position.get(name, -1)))
        except nx.NetworkXUnfeasible:
            cycle = [edge[0] for edge in nx.find_cycle(graph)]
            first = min(cycle, key=position.__getitem__)
            raise _LayerError(position[first], first, f"lies on a cycle: {' -> '.join([*cycle, cycle[0]])}") from None
        order = tuple(self.nodes[position[name]] for name in names if name != INPUT)
        shapes: dict[str, Shape] = {INPUT: self.input_shape}
        for node in order:
            try:
                shapes[node.name] = node.layer.output_shape([shapes[source] for source in node.inputs])
            except FnetError as error:
                raise _LayerError(position[node.name], node.name, str(error)) from None
        object.__setattr__(self, "graph", graph)
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "shapes", shapes)
        ends = [node.name for node in self.nodes if graph.out_degree(node.name) == 0]
        if len(ends) > 1:
            raise _LayerError(
                position[ends[0]], ends[0], f"leads nowhere: only {ends[-1]!r} may end the network; an edge is missing"
            )
        if len(shapes[ends[0]]) != 1:
            raise _LayerError(
                position[ends[0]],
                ends[0],
                f"ends the network with shape {shapes[ends[0]]}; it must end with a vector of logits",
            )

    def _check_edges(self) -> dict[str, int]:
        if not self.nodes:
            raise FnetError(f"space {self.name!r} has no layers")
        position: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            if node.name in position or node.name == INPUT:
                raise _LayerError(index, node.name, "this name is taken; every layer needs a name of its own")
            position[node.name] = index
        for index, node in enumerate(self.nodes):
            for source in node.inputs:
                if source not in position and source != INPUT:
                    known = nearest(source, [INPUT, *position])
                    raise _LayerError(index, node.name, f"takes its input from {source!r}, which is not a layer{known}")
            wanted = {"add": (2, 2), "concat": (2, None)}.get(node.layer.kind, (1, 1))
            count = len(node.inputs)
            if count < wanted[0] or (wanted[1] is not None and count > wanted[1]):
                number = f"{wanted[0]} inputs" if wanted[1] else "at least 2 inputs"
                number = "1 input" if wanted == (1, 1) else number
                raise _LayerError(
                    index, node.name, f"a {node.layer.kind} layer takes {number}, got {count}: {list(node.inputs)}"
                )
        return position

    @cached_property
    def by_name(self) -> Mapping[str, Node]:
        return {node.name: node for node in self.nodes}

    @property
    def output(self) -> str:
        """Name of the node whose output are the logits."""
        return self.order[-1].name

    @property
    def classes(self) -> int:
        return self.shapes[self.output][0]

    def input_shapes(self, node: Node) -> list[Shape]:
        return [self.shapes[source] for source in node.inputs]

    def consumers(self, name: str) -> list[Node]:
        """Nodes that read the output of `name`, in file order."""
        return [self.by_name[reader] for reader in self.graph.successors(name)]

    def with_classes(self, classes: int) -> "Macroarchitecture":
        """The same network with `classes` logits. Raises FnetError unless it ends with a dense layer."""
        last = self.order[-1]
        if classes == self.classes:
            return self
        if not isinstance(last.layer, Dense):
            raise FnetError(
                f"space {self.name!r} has {self.classes} outputs and the data set {classes} classes; "
                "end the space with a dense layer"
            )
        dense = Node(last.name, Dense(classes, last.layer.bias), last.inputs)
        nodes = tuple(dense if node is last else node for node in self.nodes)
        return Macroarchitecture(self.name, self.input_shape, nodes, self.description)


def load_space(name: str) -> Macroarchitecture:
    """A shipped space by name (``factorizenet``: paper, Figure 2), or a user's own TOML file by path.

    Raises FnetError, with the layer and its line, for whatever is wrong with it.
    """
    path = resources.find("spaces", "space", name)
    try:
        return parse_space(path.read_text(encoding="utf-8"), str(path), path.stem)
    except (OSError, UnicodeDecodeError) as error:
        raise FnetError(f"cannot read space {path}: {error}") from None


def parse_space(text: str, path: str = "space", default_name: str = "") -> Macroarchitecture:
    """A space from its TOML text; see `to_toml` for the form. `path` is what error messages call it."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FnetError(f"cannot read space {path}: {error}") from None
    extra = [key for key in table if key not in ("name", "description", "input", "layer")]
    if extra:
        raise FnetError(
            f"{path}: unknown key {extra[0]!r}{nearest(extra[0], ['name', 'description', 'input', 'layer'])}"
        )
    name, description = table.get("name", default_name), table.get("description", "")
    if not isinstance(name, str) or not isinstance(description, str):
        raise FnetError(f"{path}: name and description must be strings")
    shape, layers = table.get("input"), table.get("layer")
    if not isinstance(shape, list) or len(shape) != 3 or not all(is_int(n) and n > 0 for n in shape):
        raise FnetError(f"{path}: input must be three positive integers, as in: input = [3, 32, 32]")
    if not isinstance(layers, list) or not layers or not all(isinstance(entry, dict) for entry in layers):
        raise FnetError(f"{path}: a space needs [[layer]] tables, at least one")
    try:
        nodes = tuple(_nodes(layers))
        return Macroarchitecture(name, (shape[0], shape[1], shape[2]), nodes, description)
    except _LayerError as fault:
        lines = [
            number for number, line in enumerate(text.splitlines(), 1) if line.strip().startswith(("[[layer]]", "{"))
        ]
        place = f", line {lines[fault.position]}" if len(lines) == len(layers) else ""
        raise FnetError(f"{path}{place}: {fault}") from None


def _nodes(layers: list[dict[str, Any]]) -> Iterator[Node]:
    before = INPUT
    for index, entry in enumerate(layers):
        name = entry.get("name")
        if not isinstance(name, str) or not name:
            raise _LayerError(index, "?", 'needs a name, as in: name = "conv_1"')
        try:
            yield Node(name, _layer(entry), _sources(entry, before))
        except FnetError as error:
            raise _LayerError(index, name, str(error)) from None
        before = name


def _sources(entry: dict[str, Any], before: str) -> tuple[str, ...]:
    sources = entry.get("inputs", [before])
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise FnetError(f'inputs must be a list of layer names, as in: inputs = ["{before}"]')
    return tuple(sources)


def _layer(entry: dict[str, Any]) -> Layer:
    kind = entry.get("kind")
    if kind is None:
        raise FnetError(f"needs a kind: {', '.join(KINDS)}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise unknown("layer kind", str(kind), KINDS)
    options = {key: value for key, value in entry.items() if key not in ("name", "kind", "inputs")}
    return build(KINDS[kind], options, f"a {kind} layer")


def to_toml(space: Macroarchitecture) -> str:
    """The TOML text of a space: ``input``, then one ``layer`` a line; what has its default value is left out,
    ``inputs`` too where it is the layer before."""
    layers: list[dict[str, Any]] = []
    before = INPUT
    for node in space.nodes:
        entry: dict[str, Any] = {"name": node.name, "kind": node.layer.kind}
        for option in fields(node.layer):
            value = getattr(node.layer, option.name)
            if value != option.default:
                entry[option.name] = value[0] if isinstance(value, tuple) and value[0] == value[1] else value
        if node.inputs != (before,):
            entry["inputs"] = list(node.inputs)
        layers.append(entry)
        before = node.name
    head = tomli_w.dumps({"name": space.name, "description": space.description})
    return f"{head}input = {list(space.input_shape)}\n\n{tomli_w.dumps({'layer': layers})}"


def save_space(space: Macroarchitecture, path: Path) -> None:
    """Writes `space` as TOML; `load_space` gives an equal one back."""
    path.write_text(to_toml(space), encoding="utf-8")
