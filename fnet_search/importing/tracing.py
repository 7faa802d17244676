"""A macroarchitecture from a torch module: traced by `torch.export`, each operation one of our layers, or refused.

The trace is of the module in evaluation: dropout and stochastic depth are gone. What only moves values (reshape,
transpose, split, slice, flatten) is followed on the values' places, and becomes a layer where it comes to something.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, assert_never, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fnet_search.arch.layers import (
    Activation,
    Affine,
    BatchNorm,
    Conv,
    Dense,
    Flatten,
    Layer,
    Moving,
    Pad,
    Pool,
    Resample,
    Reshape,
    Shape,
    Shuffle,
    Slice,
    Stateless,
)
from fnet_search.arch.macroarchitecture import (
    INPUT,
    ONE_OUTPUT,
    ONLY_CLASSES,
    Macroarchitecture,
    Node,
    beyond_the_first,
    check_classifier,
)
from fnet_search.base.errors import FnetError
from fnet_search.base.units import size_text
from fnet_search.importing.operations import (
    LAYERS,
    MOVES,
    NOTHING,
    OPERANDS,
    REASONS,
    SHAPED,
    SUPPORTED,
    WEIGHTS,
    Call,
    aten,
    title,
)
from fnet_search.importing.traced import BATCH, trace
from fnet_search.training.network import module_key


@dataclass(frozen=True)
class _Value:
    """What an operation of the trace gives: values of the node `source`, [2, *shape], whose places there are `places`
    (None: all, in order). `name` is what a layer that moves them would be called."""

    source: str
    shape: Shape
    places: Tensor | None = None
    name: str = ""


def from_module(model: nn.Module, example_input: Tensor, name: str = "") -> Macroarchitecture:
    """Imports a torch module, as it computes in evaluation mode, with its weights, for images like `example_input`,
    [N, C, H, W]. `training.network.pretrained` builds it.

    Traced by `torch.export`; what the output does not depend on is left out. Convolutions of a kernel larger than 1,
    without groups, may be factorized, but for the first layer; `factorizing` changes that. Raises FnetError, naming
    node and operation, for what is no layer here.
    """
    odd = next((one.dtype for one in model.parameters() if one.dtype != torch.float32), None)
    if odd is not None:
        raise FnetError(f"the weights are {str(odd).removeprefix('torch.')}; call float() of the module first")
    if example_input.ndim != 4:
        raise FnetError(f"the example input must be [N, C, H, W], got shape {list(example_input.shape)}")
    shape = (example_input.shape[1], example_input.shape[2], example_input.shape[3])
    name = name or type(model).__name__.lower()
    program = trace(model, shape, name)
    return _Import(model, program, shape).macroarchitecture(name)


class _Import:
    """The layers of a traced module, and their weights by the names of `Network.state_dict`."""

    def __init__(self, model: nn.Module, program: ExportedProgram, shape: tuple[int, int, int]) -> None:
        self.program, self.shape = program, shape
        self.leaves = {path for path, module in model.named_modules() if path and not any(module.children())}
        self.nodes: list[Node] = []
        self.shapes: dict[str, Shape] = {INPUT: shape}
        self.weights: dict[str, Tensor] = {}
        self.moved: dict[tuple[str, Layer], str] = {}
        self.values: dict[fx.Node, _Value | Sequence[_Value]] = {}
        signature = program.graph_signature
        self.outputs = set(signature.user_outputs)
        self.constants: dict[str, Any] = {}  # and parameters: whatever does not hang on the image
        self.origins: dict[str, frozenset[str]] = {}  # the parameters and buffers that these are computed from
        self.owned: dict[str, frozenset[str]] = {}  # what a training moves of these, by layer
        known = {**program.constants, **program.state_dict}
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        for name, where in {**held, **signature.inputs_to_lifted_tensor_constants}.items():
            self.constants[name] = known[where]
            self.origins[name] = frozenset({where} if name in held else ())
        self.parameters = frozenset(signature.inputs_to_parameters.values())

    def macroarchitecture(self, name: str) -> Macroarchitecture:
        try:
            for node in self.program.graph.nodes:
                if node.op == "placeholder" and node.name in self.program.graph_signature.user_inputs:
                    self.values[node] = _Value(INPUT, self.shape)
                elif node.op == "call_function":
                    try:
                        self.operation(node)
                    except FnetError as error:
                        raise FnetError(f"{self.name_of(node)!r} ({_operation(node)}): {error}") from None
                elif node.op == "output":
                    last = self.logits(node.args[0])
            nodes = self.needed(last)
            self.check_owners(nodes)
            space = Macroarchitecture(name, self.shape, nodes, weights=self.weights)
            check_classifier(space)
        except FnetError as error:
            raise FnetError(f"cannot import {name}: {error}") from None
        return beyond_the_first(space)

    def logits(self, outputs: Sequence[object]) -> str:
        """The node that gives what the network gives. Raises FnetError where that is not one vector an image."""
        given = [one for one in outputs if isinstance(one, fx.Node) and one.name in self.outputs]
        if len(given) != 1:
            raise FnetError(f"one tensor of logits is needed, it gives {len(given)}")
        value = self.values.get(given[0])
        if not isinstance(value, _Value):
            raise FnetError("what it gives does not hang on the image")
        if value.source == INPUT:
            raise FnetError("it computes nothing")
        if prod(value.shape) == 1:
            raise FnetError(ONE_OUTPUT)
        if len(value.shape) != 1:
            flat = prod(value.shape) == value.shape[0]
            raise FnetError(
                f"it gives {size_text(value.shape)} an image, not logits; {'flatten it' if flat else ONLY_CLASSES}"
            )
        return self.whole(value)

    def check_owners(self, nodes: Sequence[Node]) -> None:
        """Raises FnetError for two layers that have weights, or statistics, in common."""
        owners: dict[str, str] = {}
        for node in nodes:
            for path in sorted(self.owned.get(node.name, ())):
                if path in owners:
                    raise FnetError(
                        f"{owners[path]!r} and {node.name!r} share {path!r} (a module that is called twice, or tied "
                        "weights): they would be counted and trained as two; give each weights of its own"
                    )
                owners[path] = node.name

    def needed(self, last: str) -> tuple[Node, ...]:
        """The nodes that the logits hang on: with what else was computed the graph would have a second end."""
        found, open_names = set(), [last]
        by_name: dict[str, Node] = {}
        for node in self.nodes:
            by_name[node.name] = self.merged(node, by_name)
        while open_names:
            name = open_names.pop()
            if name != INPUT and name not in found:
                found.add(name)
                open_names += by_name[name].inputs
        return tuple(node for name, node in by_name.items() if name in found)

    def merged(self, node: Node, before: Mapping[str, Node]) -> Node:
        """A node that does the work of the one before it too: a convolution pads itself, where both sides are alike;
        the mean of means over a side is that of the whole."""
        source = before.get(node.inputs[0])
        if source is None:
            return node
        match node.layer, source.layer:
            case Conv(padding=(height, width)), Pad((0, top, left), (0, *after)) if [top, left] == after:
                layer: Layer = replace(node.layer, padding=(height + top, width + left))
            case Pool(reduction="global_average"), Reshape() | Pool(reduction="average") if self.is_part(source):
                layer = node.layer
            case _:
                return node
        return self.merged(Node(node.name, layer, source.inputs), before)

    def is_part(self, node: Node) -> bool:
        """Whether the mean of each channel is what it was before a node."""
        before, after = self.shapes[node.inputs[0]], self.shapes[node.name]
        if isinstance(node.layer, Pool):
            windows = zip(node.layer.kernel, before[1:], after[1:], strict=True)
            whole = all((kernel == n and m == 1) or (kernel == 1 and m == n) for kernel, n, m in windows)
            return whole and node.layer.padding == (0, 0)
        return len(before) == 3 and before[0] == after[0]

    def operation(self, node: fx.Node) -> None:
        """Gives a node of the trace its value; what it computes becomes a layer."""
        target = node.target
        packet = getattr(target, "overloadpacket", None)
        passed = packet in NOTHING and not _arguments(node).get("train")
        if not passed and torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            raise FnetError("it is drawn at random, in evaluation too")
        if packet in SHAPED or all(source.name in self.constants for source in node.all_input_nodes):
            self.compute(node)
            return
        if target is operator.getitem:
            parts, index = self.values[cast(fx.Node, node.args[0])], cast(int, node.args[1])
            if isinstance(parts, _Value) and index:
                raise FnetError(f"only its first output is a layer's, not number {index + 1}")
            self.values[node] = parts if isinstance(parts, _Value) else parts[index]
            return
        given = node.meta.get("val")
        if isinstance(given, Tensor) and given.dtype != torch.float32:
            raise FnetError(f"it gives {str(given.dtype).removeprefix('torch.')}; only float32 can be imported")
        if packet is aten.pad and _arguments(node)["mode"] == "constant":
            packet = aten.constant_pad_nd
        if packet in MOVES:
            self.values[node] = self.move(node)
        elif passed:
            self.values[node] = self.value(node.args[0])
        else:
            self.values[node] = self.layers(node, packet)

    def layers(self, node: fx.Node, packet: Any) -> _Value:
        """Places the layers of an operator that computes; returns what the last one gives."""
        if packet not in LAYERS:  # before its arguments are looked at: they may be of any kind
            unknown = f"no layer computes this; those that can be imported are {SUPPORTED}"
            raise FnetError(REASONS.get(packet, unknown))
        given = _arguments(node)
        weights = {name: self.parameter(given[name]) for name in WEIGHTS if name in given}
        operands = {name: given[name] for name in OPERANDS if name in given}
        fixed = {name: self.parameter(one) for name, one in operands.items() if not self.of_image(one)}
        read = [one for name, one in operands.items() if name not in fixed] or given["tensors"]
        values = [self.value(one) for one in read]
        result = node.meta["val"][0] if isinstance(node.meta["val"], list | tuple) else node.meta["val"]
        known = {**weights, **fixed}
        moved = {name: self.trained(given[name]) for name in known}
        constant = frozenset(name for name, tensor in known.items() if tensor is not None and not moved[name])
        shapes, shape = [one.shape for one in values], tuple(result.shape[1:])
        found, name = LAYERS[packet](Call({**given, **known}, shapes, shape, constant, node.target)), self.name_of(node)
        if not found:
            return self.viewed(values[0], shape, name)
        if packet in (aten.mean, aten.amax):
            values = [self.viewed(one, (*one.shape, 1)[:3], name) for one in values]
        statistics = (self.origins.get(one.name, frozenset()) for name, one in given.items() if name in STATISTICS)
        owned = frozenset().union(*moved.values(), *statistics)
        sources = [self.whole(one) for one in values]
        for layer in found:
            if isinstance(layer, Moving) and len(found) > 1:
                sources = [self.rearranged(sources[0], layer, f"{name}.{layer.kind}")]
            else:
                sources = [self.place(self.unused(name), layer, sources, weights)]
                self.owned[sources[0]], owned = owned, frozenset()
        return self.viewed(_Value(sources[0], self.shapes[sources[0]]), shape, name)

    def compute(self, node: fx.Node) -> None:
        """What hangs on no more of the image than its shape, as weights that are normalised, is a constant."""

        def known(one: fx.Node) -> Any:
            if one.name in self.constants:
                return self.constants[one.name]
            given = one.meta["val"]  # of the trace, without values
            return torch.empty(given.shape, dtype=given.dtype, device=given.device)

        arguments, options = fx.map_arg(node.args, known), fx.map_arg(node.kwargs, known)
        with torch.no_grad():
            self.constants[node.name] = cast(Callable[..., Any], node.target)(*arguments, **options)
        sources = (self.origins.get(source.name, frozenset()) for source in node.all_input_nodes)
        self.origins[node.name] = frozenset().union(*sources)

    def of_image(self, argument: object) -> bool:
        return isinstance(argument, fx.Node) and argument.name not in self.constants

    def trained(self, argument: object) -> frozenset[str]:
        """The parameters that an argument is computed from."""
        return self.origins[argument.name] & self.parameters if isinstance(argument, fx.Node) else frozenset()

    def value(self, argument: object) -> _Value:
        found = self.values.get(argument) if isinstance(argument, fx.Node) else None
        if found is None:
            raise FnetError(
                "it reads a weight or constant where a layer reads a tensor that was computed from the image"
            )
        assert isinstance(found, _Value)
        return found

    def parameter(self, argument: object) -> Tensor | None:
        """A weight or constant, or None for none. Raises FnetError for one that hangs on the image."""
        if argument is None:
            return None
        if isinstance(argument, int | float):
            return torch.tensor(argument, dtype=torch.float64)
        name = argument.name if isinstance(argument, fx.Node) else ""
        if name not in self.constants:
            raise FnetError("its weights are computed from the image")
        found: Tensor = self.constants[name]
        return found.detach().float().clone()

    def place(
        self, name: str, layer: Layer, sources: list[str], weights: Mapping[str, Tensor | None] | None = None
    ) -> str:
        """Adds a layer, with its weights; returns its name."""
        self.shapes[name] = layer.output_shape([self.shapes[source] for source in sources])
        held = {
            part: tensor for part, tensor in (weights or {}).items() if part in _state(layer) and tensor is not None
        }
        if isinstance(layer, BatchNorm):
            held["num_batches_tracked"] = torch.tensor(0)
        if isinstance(layer, Affine) and layer.trained:
            held = {part: torch.tensor(values) for part in _state(layer) if (values := getattr(layer, part))}
            layer = layer.started()
        self.nodes.append(Node(name, layer, tuple(sources)))
        self.weights |= {f"layers.{module_key(name)}.{part}": tensor for part, tensor in held.items()}
        return name

    # -- What only moves values

    def move(self, node: fx.Node) -> _Value | list[_Value]:
        value = self.value(node.args[0])
        result = cast(Callable[..., Tensor | list[Tensor]], node.target)(
            self.places(value), *node.args[1:], **node.kwargs
        )
        name = self.name_of(node)
        if isinstance(result, Tensor):
            return self.placed(value.source, result, name)
        return [self.placed(value.source, part, name) for part in result]

    def places(self, value: _Value) -> Tensor:
        if value.places is not None:
            return value.places
        return torch.arange(BATCH * prod(value.shape)).view(BATCH, *value.shape)

    def viewed(self, value: _Value, shape: Shape, name: str) -> _Value:
        """The same values, in order, in another shape."""
        if shape == value.shape:
            return value
        return self.placed(value.source, self.places(value).reshape(BATCH, *shape), name)

    def placed(self, source: str, places: Tensor, name: str) -> _Value:
        return _Value(source, tuple(places.shape[1:]), places, name)

    def whole(self, value: _Value) -> str:
        """The node that gives a value, with layers for what moved it."""
        if value.places is None:
            return value.source
        size = prod(self.shapes[value.source])
        if value.places.shape[0] != BATCH or not torch.equal(value.places[1], value.places[0] + size):
            raise FnetError("it moves values between images")
        return self.arranged(value.source, value.places[0], value.name)

    def arranged(self, source: str, places: Tensor, name: str) -> str:
        """The node that gives the values of a source at `places`, in their shape, through as few layers as possible."""
        shape, wanted, flat = self.shapes[source], tuple(places.shape), places.flatten()
        if len(flat) == prod(shape) and torch.equal(flat, torch.arange(len(flat))):
            if wanted == shape:
                return source
            if len(wanted) == 1:
                return self.rearranged(source, Flatten(), name)
            if len(wanted) == 3:
                return self.rearranged(source, Reshape((wanted[0], wanted[1], wanted[2])), name)
            raise FnetError(f"layers read vectors or feature maps, not {size_text(wanted)}")
        if len(shape) == 1 and len(wanted) == 3:
            return self.arranged(self.rearranged(source, Reshape((shape[0], 1, 1)), name), places, name)
        found = self.pixels(source, places, name) or self.channels(source, places, name)
        if found is None:
            raise FnetError(f"no layer moves values like this, from {size_text(shape)} to {size_text(wanted)}")
        return found

    def pixels(self, source: str, places: Tensor, name: str) -> str | None:
        """Whole rows and columns, repeated, left out or in another order, maybe of other channels; None where it is
        not that."""
        shape = self.shapes[source]
        if len(shape) != 3 or places.ndim != 3 or not places.numel():
            return None
        channels = places[:, 0, 0] // (shape[1] * shape[2])
        rows, columns = places[0, :, 0] // shape[2] % shape[1], places[0, 0] % shape[2]
        if not torch.equal(places, (channels[:, None, None] * shape[1] + rows[:, None]) * shape[2] + columns):
            return None
        layer = Resample(tuple(rows.tolist()), tuple(columns.tolist()))
        if (layer.rows, layer.columns) == (tuple(range(shape[1])), tuple(range(shape[2]))):
            return None  # the channels alone
        size = len(rows) * len(columns)
        return self.arranged(
            self.rearranged(source, layer, name),
            channels[:, None, None] * size + torch.arange(size).view(len(rows), -1),
            name,
        )

    def channels(self, source: str, places: Tensor, name: str) -> str | None:
        """Whole channels: shuffled, a part of them, or both; None where it is not that."""
        shape, pixels = self.shapes[source], prod(self.shapes[source][1:])
        if not places.numel() or places.numel() % pixels:
            return None
        rows = places.reshape(-1, pixels)
        chosen = rows[:, 0] // pixels
        if not torch.equal(rows, chosen[:, None] * pixels + torch.arange(pixels)):
            return None
        for groups in (groups for groups in range(1, shape[0] + 1) if shape[0] % groups == 0):
            order = torch.arange(shape[0]).view(groups, -1).T.flatten()
            start = int((order == chosen[0]).nonzero()[0])
            if torch.equal(chosen, order[start : start + len(chosen)]):
                if groups > 1 and len(shape) == 1:
                    source = self.rearranged(source, Reshape((shape[0], 1, 1)), name)
                if groups > 1:
                    source = self.rearranged(source, Shuffle(groups), name)
                if len(chosen) < shape[0]:
                    source = self.rearranged(source, Slice(start, start + len(chosen)), name)
                return self.arranged(source, torch.arange(places.numel()).view(places.shape), name)
        return None

    def rearranged(self, source: str, layer: Layer, name: str) -> str:
        """A layer that moves values, once for all that read it."""
        if (source, layer) not in self.moved:
            wanted = name if name in self.leaves else f"{name.rpartition('.')[0]}.{layer.kind}".lstrip(".")
            self.moved[source, layer] = self.place(self.unused(wanted), layer, [source])
        return self.moved[source, layer]

    # -- Names

    def name_of(self, node: fx.Node) -> str:
        """The module's path for what a leaf module computes, else that of the module around it and the operation."""
        stack = node.meta.get("nn_module_stack") or {}
        path = re.sub(r"@\d+", "", next(reversed(stack.values()))[0]) if stack else ""
        if path in self.leaves:
            return path
        operation = _operation(node)
        return f"{path}.{operation}" if path else operation

    def unused(self, name: str) -> str:
        """The name, with a number where it is taken."""
        number, found = 1, name
        while found in self.shapes:
            number += 1
            found = f"{name}_{number}"
        return found


STATISTICS = ("running_mean", "running_var")


def _state(layer: Layer) -> tuple[str, ...]:
    """What of the weights of an operator is of a layer."""
    if isinstance(layer, Stateless):
        return ("weight",) if isinstance(layer, Activation) and layer.function == "prelu" else ()
    match layer:
        case Conv(bias=bias) | Dense(bias=bias):
            return ("weight", "bias") if bias else ("weight",)
        case BatchNorm(affine=affine):
            return (*STATISTICS, "weight", "bias") if affine else STATISTICS
        case Affine():
            return "scale", "shift"
        case _:
            assert_never(layer)


def _operation(node: fx.Node) -> str:
    """What users know an operation as."""
    if node.target is operator.getitem:
        return _operation(cast(fx.Node, node.args[0]))
    return title(getattr(node.target, "overloadpacket", node.target))


def _arguments(node: fx.Node) -> dict[str, Any]:
    """By name, with the defaults of the operator's schema."""
    schema = cast(torch._ops.OpOverload, node.target)._schema
    found = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    found |= {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    return {**found, **node.kwargs}
