"""Macroarchitectures: typed layers on a directed graph, with inferred shapes.

A space (a named macroarchitecture, docs/glossary.md) is data. Shapes leave the batch out: ``(C, H, W)`` for images
and feature maps, ``(K,)`` for vectors.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf, isfinite
from typing import TYPE_CHECKING, assert_never

import networkx as nx

from fnet_search.arch.layers import (
    Activation,
    Add,
    Affine,
    BatchNorm,
    Concat,
    Conv,
    Dense,
    Flatten,
    Layer,
    Multiply,
    Pad,
    Pool,
    Resample,
    Reshape,
    Shape,
    Shuffle,
    Slice,
    Weighted,
)
from fnet_search.base.errors import LONGEST, FnetError, nearest

if TYPE_CHECKING:
    from torch import Tensor


INPUT = "input"
"""Name of the graph's source: the normalised image."""
LONGEST_NAME = 200
"""Characters of a layer's name. Optuna's databases hold at most 512 per key, our prefix included."""
PARTS = ("grouped", "norm", "relu", "pointwise")
"""A factorized convolution NAME becomes NAME.grouped, NAME.norm, ... (`factorize.factorize`)."""


@dataclass(frozen=True)
class Node:
    """A layer in the graph: its name and the names of the nodes (or ``"input"``) that it reads, in order."""

    name: str
    layer: Layer
    inputs: tuple[str, ...]


class LayerError(FnetError):
    """An error in one layer, with its position, from which a loader finds the line of the file."""

    def __init__(self, position: int, name: str, message: str) -> None:
        self.position, self.name, self.message = position, name, message
        super().__init__(f"layer {name!r} (number {position + 1}): {message}")


@dataclass(frozen=True)
class Macroarchitecture:
    """A named network graph: one source (the image), one sink (the logits).

    `nodes` may come in any order; `order` has them topologically sorted. `mean` and `std`, one number per channel,
    normalise images in [0, 1]; empty: those of the data set are used. `weights` holds the trained weights of an
    imported network by the names of its `Network.state_dict`; comparison ignores them.

    Raises FnetError, naming the layer, for malformed or duplicate names, missing edges, cycles, mismatched shapes, and
    more than one output.
    """

    name: str
    input_shape: tuple[int, int, int]
    nodes: tuple[Node, ...]
    description: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    weights: "Mapping[str, Tensor] | None" = field(default=None, compare=False, repr=False)
    graph: "nx.DiGraph[str]" = field(init=False, compare=False, repr=False)
    order: tuple[Node, ...] = field(init=False, compare=False, repr=False)
    shapes: Mapping[str, Shape] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.input_shape) != 3 or min(self.input_shape) < 1:
            raise FnetError(f"input must be three positive integers [C, H, W], got {list(self.input_shape)}")
        for values in (self.mean, self.std):
            if len(values) not in (0, self.input_shape[0]) or len(self.mean) != len(self.std):
                raise FnetError(f"mean and std must be {self.input_shape[0]} numbers each, one per channel")
        if not all(map(isfinite, self.mean)) or not all(0 < value < inf for value in self.std):
            raise FnetError(f"mean must be finite and std positive, got {list(self.mean)} and {list(self.std)}")
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
            shown = cycle if len(cycle) <= 10 else [*cycle[:5], "...", *cycle[-4:]]
            raise LayerError(position[first], first, f"lies on a cycle: {' -> '.join([*shown, cycle[0]])}") from None
        order = tuple(self.nodes[position[name]] for name in names if name != INPUT)
        shapes: dict[str, Shape] = {INPUT: self.input_shape}
        for node in order:
            try:
                shapes[node.name] = node.layer.output_shape([shapes[source] for source in node.inputs])
            except FnetError as error:
                raise LayerError(position[node.name], node.name, str(error)) from None
        object.__setattr__(self, "graph", graph)
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "shapes", shapes)
        ends = [node.name for node in self.nodes if graph.out_degree(node.name) == 0]
        if len(ends) > 1:
            raise LayerError(
                position[ends[0]], ends[0], f"leads nowhere: only {ends[-1]!r} may end the network; an edge is missing"
            )
        if len(shapes[ends[0]]) != 1:
            raise LayerError(
                position[ends[0]],
                ends[0],
                f"ends the network with shape {shapes[ends[0]]}; it must end with a vector of logits",
            )

    def _check_edges(self) -> dict[str, int]:
        if not self.nodes:
            raise FnetError(f"space {self.name!r} has no layers")
        position = self._check_names()
        for index, node in enumerate(self.nodes):
            for source in node.inputs:
                if source not in position and source != INPUT:
                    known = nearest(source, [INPUT, *position])
                    raise LayerError(index, node.name, f"takes its input from {source!r}, which is not a layer{known}")
            (least, most), count = node.layer.inputs, len(node.inputs)
            if count < least or (most is not None and count > most):
                number = "1 input" if most == 1 else f"{least} inputs" if most else f"at least {least} inputs"
                raise LayerError(
                    index, node.name, f"a {node.layer.kind} layer takes {number}, got {count}: {list(node.inputs)}"
                )
        return position

    def _check_names(self) -> dict[str, int]:
        """The position of each name. A name must differ from those of other layers and of the parts of factorized ones,
        also in the names of weights, where a slash becomes a dot."""
        position: dict[str, int] = {}
        taken = {INPUT: INPUT}
        for index, node in enumerate(self.nodes):
            name = node.name
            if not name.isprintable() or name != name.strip() or not 0 < len(name) <= LONGEST_NAME:
                wanted = f"a name is one line of 1 to {LONGEST_NAME} characters, without spaces around it"
                raise LayerError(index, name[:LONGEST], wanted)
            parts = PARTS if isinstance(node.layer, Conv) and node.layer.factorize else ()
            for own in (name, *(f"{name}.{part}" for part in parts)):
                owner = taken.get(own.replace("/", "."))
                if owner == name:
                    raise LayerError(index, name, "this name is taken; every layer needs a name of its own")
                if owner is not None:
                    clash = (
                        f"the name {own!r} is taken by layer {owner!r}: in the names of weights a slash becomes a dot"
                    )
                    become = ", ".join(f"NAME.{part}" for part in PARTS)
                    raise LayerError(index, name, f"{clash}, and a factorized layer NAME becomes {become}")
                taken[own.replace("/", ".")] = name
            position[name] = index
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

    @property
    def classifier(self) -> Node | None:
        """The dense layer or convolution that gives the logits: the last one, if only layers that keep its channels
        follow it; else None."""
        node = self.order[-1]
        while not isinstance(node.layer, Weighted):
            before = self.by_name.get(node.inputs[0])
            channels = self.shapes[node.inputs[0]][0]
            keeps = len(node.inputs) == 1 and channels == self.classes and _any_classes(node.layer)
            if before is None or not keeps or len(self.consumers(before.name)) > 1:
                return None
            node = before
        return node

    def with_classes(self, classes: int) -> "Macroarchitecture":
        """The same network with `classes` logits. Where that changes the `classifier`, its weights are new. Raises
        FnetError if the network has no classifier."""
        if classes == self.classes:
            return self
        node = self.classifier
        if node is None:
            raise FnetError(
                f"space {self.name!r} has {self.classes} outputs and the data set {classes} classes; "
                "end the space with a dense layer"
            )
        layer = node.layer
        assert isinstance(layer, Weighted)
        match layer:
            case Conv():
                last: Layer = replace(layer, out_channels=classes)
            case Dense():
                last = replace(layer, out_features=classes)
            case _:
                assert_never(layer)
        nodes = tuple(replace(other, layer=last) if other is node else other for other in self.nodes)
        return replace(self, nodes=nodes)


def _any_classes(layer: Layer) -> bool:
    """Whether a layer after the classifier works with any number of classes and keeps one channel per class."""
    match layer:
        case Activation() | Affine():
            return not layer.channelwise
        case BatchNorm() | Pool() | Flatten():
            return True
        case Conv() | Dense() | Reshape() | Slice() | Shuffle() | Resample() | Pad() | Add() | Multiply() | Concat():
            return False
        case _:
            assert_never(layer)


ONLY_CLASSES = "fnet-search is for classification with one class per image"
ONE_OUTPUT = f"it gives one number per image; end it with one logit for each of two or more classes: {ONLY_CLASSES}"


NON_CLASSIFIER_OUTPUTS = ("sigmoid", "hardsigmoid", "log_sigmoid", "tanh")
"""Last functions of networks for multi-label classification or regression."""


def check_classifier(space: Macroarchitecture) -> None:
    """Raises FnetError for a network of another task: a single output, or outputs that pass a function of
    NON_CLASSIFIER_OUTPUTS."""
    if space.classes < 2:
        raise FnetError(ONE_OUTPUT)
    node: Node | None = space.order[-1]
    while node is not None and not isinstance(node.layer, Weighted) and len(node.inputs) == 1:
        if isinstance(node.layer, Activation) and node.layer.function in NON_CLASSIFIER_OUTPUTS:
            raise FnetError(
                f"it ends with a {node.layer.function}, {node.name!r}, as for several labels per image or for "
                f"regression; {ONLY_CLASSES}: end it with the logits, without the {node.layer.function}"
            )
        node = space.by_name.get(node.inputs[0])


def factorizing(space: Macroarchitecture, factorize: Sequence[str] = (), keep: Sequence[str] = ()) -> Macroarchitecture:
    """The same network with other factorizable layers: also those that match a pattern of `factorize`, but none that
    matches a pattern of `keep`.

    Patterns as in ``layer1.*`` (`fnmatch`). Raises FnetError for one that matches no convolution without groups.
    """
    candidates = [node.name for node in space.nodes if isinstance(node.layer, Conv) and node.layer.groups == 1]
    for pattern in (*factorize, *keep):
        if not fnmatch.filter(candidates, pattern):
            known = nearest(pattern, candidates)
            raise FnetError(f"{pattern!r} matches no convolution without groups of space {space.name!r}{known}")

    def changed(node: Node) -> Node:
        if node.name not in candidates:
            return node
        asked, kept = (
            any(fnmatch.fnmatchcase(node.name, pattern) for pattern in patterns) for patterns in (factorize, keep)
        )
        assert isinstance(node.layer, Conv)
        return replace(node, layer=replace(node.layer, factorize=(node.layer.factorize or asked) and not kept))

    return replace(space, nodes=tuple(map(changed, space.nodes)))


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation that most networks trained on ImageNet use (torchvision's)."""


def normalising(space: Macroarchitecture, text: str | None) -> Macroarchitecture:
    """The same network for images normalised by `text`: ``imagenet``, or ``MEAN/STD`` with one number per channel each;
    None changes nothing. Raises FnetError for anything else.
    """
    if text is None:
        return space
    try:
        mean, std = IMAGENET if text == "imagenet" else (tuple(map(float, part.split(","))) for part in text.split("/"))
    except ValueError:
        raise FnetError(f"`normalise` {text}: write imagenet, or MEAN/STD as in 0.5,0.5,0.5/0.2,0.2,0.2") from None
    return replace(space, mean=mean, std=std)


def with_default_factorizable(space: Macroarchitecture) -> Macroarchitecture:
    """The same network with every convolution factorizable where it pays: those with a kernel larger than 1x1 and
    without groups, except those that read the image."""
    early = {INPUT}
    for node in space.order:
        if not isinstance(node.layer, Weighted) and early.issuperset(node.inputs):
            early.add(node.name)

    def chosen(node: Node) -> Node:
        layer = node.layer
        if not isinstance(layer, Conv) or early.issuperset(node.inputs) or layer.groups > 1 or layer.kernel == (1, 1):
            return node
        return replace(node, layer=replace(layer, factorize=True))

    return replace(space, nodes=tuple(map(chosen, space.nodes)))
