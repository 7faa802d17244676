"""Imports a torch module as a macroarchitecture: traces it with `torch.export` and translates each operation to layers.

The trace is of evaluation mode, so dropout and stochastic depth are gone. Operations that only move values (reshape,
transpose, split, slice, flatten) are applied to the values' positions; only their combined effect becomes layers.
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
    check_classifier,
    with_default_factorizable,
)
from fnet_search.base.errors import FnetError
from fnet_search.base.units import size_text
from fnet_search.importing.operations import (
    IDENTITIES,
    LAYERS,
    MOVES,
    OPERANDS,
    REASONS,
    SHAPE_ONLY,
    SUPPORTED,
    WEIGHTS,
    Call,
    aten,
    title,
)
from fnet_search.importing.tracing import BATCH, trace
from fnet_search.training.network import module_key


@dataclass(frozen=True)
class _Value:
    """The output of a traced operation, [BATCH, *shape]: values of the node `source` at the positions `places` (None:
    all, in order). `name` is for a layer that moves them."""

    source: str
    shape: Shape
    places: Tensor | None = None
    name: str = ""


def from_module(model: nn.Module, example_input: Tensor, name: str = "") -> Macroarchitecture:
    """The macroarchitecture of a torch module in evaluation mode, with its weights, for images like `example_input`
    [N, C, H, W]. `training.network.pretrained` builds a network from it.

    Operations that the output does not depend on are left out. Convolutions with a kernel larger than 1x1 and without
    groups become factorizable, except those that read the image; `arch.macroarchitecture.factorizing` changes that.
    Raises FnetError, naming node and operation, for an operation that is not supported.
    """
    wrong = next((parameter.dtype for parameter in model.parameters() if parameter.dtype != torch.float32), None)
    if wrong is not None:
        raise FnetError(f"the weights are {str(wrong).removeprefix('torch.')}; call float() of the module first")
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
        self.constants: dict[str, Any] = {}  # values, parameters too, that do not depend on the image
        self.origins: dict[str, frozenset[str]] = {}  # the parameters and buffers that each constant depends on
        self.owned: dict[str, frozenset[str]] = {}  # the parameters and buffers that belong to each layer
        known = {**program.constants, **program.state_dict}
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        for name, where in {**held, **signature.inputs_to_lifted_tensor_constants}.items():
            self.constants[name] = known[where]
            self.origins[name] = frozenset({where} if name in held else ())
        self.parameters = frozenset(signature.inputs_to_parameters.values())

    def macroarchitecture(self, name: str) -> Macroarchitecture:
        """Translates the trace. Raises FnetError for a network that cannot be imported."""
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
        return with_default_factorizable(space)

    def logits(self, outputs: Sequence[object]) -> str:
        """The node of the network's output. Raises FnetError unless that is one vector of logits per image."""
        given = [output for output in outputs if isinstance(output, fx.Node) and output.name in self.outputs]
        if len(given) != 1:
            raise FnetError(f"it gives {len(given)} tensors; one tensor of logits is needed")
        value = self.values.get(given[0])
        if not isinstance(value, _Value):
            raise FnetError("its output does not depend on the image")
        if value.source == INPUT:
            raise FnetError("it computes nothing")
        if prod(value.shape) == 1:
            raise FnetError(ONE_OUTPUT)
        if len(value.shape) != 1:
            flat = prod(value.shape) == value.shape[0]
            raise FnetError(
                f"it gives {size_text(value.shape)} per image, not logits; {'flatten it' if flat else ONLY_CLASSES}"
            )
        return self.whole(value)

    def check_owners(self, nodes: Sequence[Node]) -> None:
        """Raises FnetError if two layers share weights or statistics."""
        owners: dict[str, str] = {}
        for node in nodes:
            for path in sorted(self.owned.get(node.name, ())):
                if path in owners:
                    raise FnetError(
                        f"{owners[path]!r} and {node.name!r} share {path!r} (a module that is called twice, or tied "
                        "weights): they would be counted and trained as two; give each its own weights"
                    )
                owners[path] = node.name

    def needed(self, last: str) -> tuple[Node, ...]:
        """The nodes that the logits depend on; any other would be a second output of the graph."""
        reached, open_names = set(), [last]
        by_name: dict[str, Node] = {}
        for node in self.nodes:
            by_name[node.name] = self.merged(node, by_name)
        while open_names:
            name = open_names.pop()
            if name != INPUT and name not in reached:
                reached.add(name)
                open_names += by_name[name].inputs
        return tuple(node for name, node in by_name.items() if name in reached)

    def merged(self, node: Node, before: Mapping[str, Node]) -> Node:
        """The node, merged with the one before it where it can do both: a convolution takes over symmetric zero
        padding, a global average the average over one side or a reshape before it."""
        source = before.get(node.inputs[0])
        if source is None:
            return node
        match node.layer, source.layer:
            case Conv(padding=(height, width)), Pad((0, top, left), (0, *after)) if [top, left] == after:
                layer: Layer = replace(node.layer, padding=(height + top, width + left))
            case Pool(reduction="global_average"), Reshape() | Pool(reduction="average") if self.keeps_means(source):
                layer = node.layer
            case _:
                return node
        return self.merged(Node(node.name, layer, source.inputs), before)

    def keeps_means(self, node: Node) -> bool:
        """Whether a node changes the mean of no channel."""
        before, after = self.shapes[node.inputs[0]], self.shapes[node.name]
        if isinstance(node.layer, Pool):
            windows = zip(node.layer.kernel, before[1:], after[1:], strict=True)
            whole = all((kernel == n and m == 1) or (kernel == 1 and m == n) for kernel, n, m in windows)
            return whole and node.layer.padding == (0, 0)
        return len(before) == 3 and before[0] == after[0]

    def operation(self, node: fx.Node) -> None:
        """Records the value of a traced operation: a constant, moved values, or the output of new layers."""
        target = node.target
        packet = getattr(target, "overloadpacket", None)
        passed = packet in IDENTITIES and not _arguments(node).get("train")
        if not passed and torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            raise FnetError("it is random, in evaluation mode too; remove it")
        if packet in SHAPE_ONLY or all(source.name in self.constants for source in node.all_input_nodes):
            self.compute(node)
            return
        if target is operator.getitem:
            parts, index = self.values[cast(fx.Node, node.args[0])], cast(int, node.args[1])
            if isinstance(parts, _Value) and index:
                raise FnetError(f"only its first output is supported, not number {index + 1}")
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
        """Adds the layers of an operator that computes; returns the output of the last one."""
        if packet not in LAYERS:  # checked before its arguments, which may be of any kind
            unknown = f"no layer computes this; supported operations are {SUPPORTED}"
            raise FnetError(REASONS.get(packet, unknown))
        given = _arguments(node)
        weights = {name: self.parameter(given[name]) for name in WEIGHTS if name in given}
        operands = {name: given[name] for name in OPERANDS if name in given}
        fixed = {name: self.parameter(operand) for name, operand in operands.items() if not self.of_image(operand)}
        read = [operand for name, operand in operands.items() if name not in fixed] or given["tensors"]
        values = [self.value(operand) for operand in read]
        result = node.meta["val"][0] if isinstance(node.meta["val"], list | tuple) else node.meta["val"]
        known = {**weights, **fixed}
        origins = {name: self.trained(given[name]) for name in known}
        constant = frozenset(name for name, tensor in known.items() if tensor is not None and not origins[name])
        shapes, shape = [value.shape for value in values], tuple(result.shape[1:])
        call, name = Call({**given, **known}, shapes, shape, constant, node.target), self.name_of(node)
        layers = LAYERS[packet](call)
        if not layers:
            return self.viewed(values[0], shape, name)
        if packet in (aten.mean, aten.amax):
            values = [self.viewed(value, (*value.shape, 1)[:3], name) for value in values]
        buffers = [given[part] for part in STATISTICS if part in given]
        owned = frozenset().union(*origins.values(), *(self.origins.get(part.name, frozenset()) for part in buffers))
        sources = [self.whole(value) for value in values]
        for layer in layers:
            if isinstance(layer, Moving) and len(layers) > 1:
                sources = [self.rearranged(sources[0], layer, f"{name}.{layer.kind}")]
            else:
                sources = [self.place(self.unused(name), layer, sources, weights)]
                self.owned[sources[0]], owned = owned, frozenset()
        return self.viewed(_Value(sources[0], self.shapes[sources[0]]), shape, name)

    def compute(self, node: fx.Node) -> None:
        """Computes a constant: an operation that depends on the image's shape at most, as normalised weights do."""

        def known(source: fx.Node) -> Any:
            if source.name in self.constants:
                return self.constants[source.name]
            given = source.meta["val"]  # has a shape but no values
            return torch.empty(given.shape, dtype=given.dtype, device=given.device)

        arguments, options = fx.map_arg(node.args, known), fx.map_arg(node.kwargs, known)
        with torch.no_grad():
            self.constants[node.name] = cast(Callable[..., Any], node.target)(*arguments, **options)
        sources = (self.origins.get(source.name, frozenset()) for source in node.all_input_nodes)
        self.origins[node.name] = frozenset().union(*sources)

    def of_image(self, argument: object) -> bool:
        """Whether an argument depends on the image."""
        return isinstance(argument, fx.Node) and argument.name not in self.constants

    def trained(self, argument: object) -> frozenset[str]:
        """The parameters that an argument depends on."""
        return self.origins[argument.name] & self.parameters if isinstance(argument, fx.Node) else frozenset()

    def value(self, argument: object) -> _Value:
        """The value of an argument. Raises FnetError if it does not depend on the image."""
        value = self.values.get(argument) if isinstance(argument, fx.Node) else None
        if value is None:
            raise FnetError(
                "it reads a weight or constant where a layer needs a tensor that was computed from the image"
            )
        assert isinstance(value, _Value)
        return value

    def parameter(self, argument: object) -> Tensor | None:
        """A weight or constant as a float tensor; None for None. Raises FnetError if it depends on the image."""
        if argument is None:
            return None
        if isinstance(argument, int | float):
            return torch.tensor(argument, dtype=torch.float64)
        name = argument.name if isinstance(argument, fx.Node) else ""
        if name not in self.constants:
            raise FnetError("its weights are computed from the image")
        constant: Tensor = self.constants[name]
        return constant.detach().float().clone()

    def place(
        self, name: str, layer: Layer, sources: list[str], weights: Mapping[str, Tensor | None] | None = None
    ) -> str:
        """Adds a layer and its weights; returns its name."""
        self.shapes[name] = layer.output_shape([self.shapes[source] for source in sources])
        held = {
            part: tensor
            for part, tensor in (weights or {}).items()
            if part in _state_names(layer) and tensor is not None
        }
        if isinstance(layer, BatchNorm):
            held["num_batches_tracked"] = torch.tensor(0)
        if isinstance(layer, Affine) and layer.trained:
            held = {part: torch.tensor(values) for part in _state_names(layer) if (values := getattr(layer, part))}
            layer = layer.started()
        self.nodes.append(Node(name, layer, tuple(sources)))
        self.weights |= {f"layers.{module_key(name)}.{part}": tensor for part, tensor in held.items()}
        return name

    # -- Operations that only move values

    def move(self, node: fx.Node) -> _Value | list[_Value]:
        """Applies an operation to the positions of the values that it moves."""
        value = self.value(node.args[0])
        result = cast(Callable[..., Tensor | list[Tensor]], node.target)(
            self.places(value), *node.args[1:], **node.kwargs
        )
        name = self.name_of(node)
        if isinstance(result, Tensor):
            return self.placed(value.source, result, name)
        return [self.placed(value.source, part, name) for part in result]

    def places(self, value: _Value) -> Tensor:
        """The positions of a value in the flattened batch of its source, [BATCH, *shape]."""
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
        """The node that gives a value, after adding the layers that move it."""
        if value.places is None:
            return value.source
        size = prod(self.shapes[value.source])
        if value.places.shape[0] != BATCH or not torch.equal(value.places[1], value.places[0] + size):
            raise FnetError("it moves values between images; keep the batch as it is")
        return self.arranged(value.source, value.places[0], value.name)

    def arranged(self, source: str, places: Tensor, name: str) -> str:
        """The node that gives the values of a source at `places`, in their shape, after adding as few layers as
        possible."""
        shape, wanted, flat = self.shapes[source], tuple(places.shape), places.flatten()
        if len(flat) == prod(shape) and torch.equal(flat, torch.arange(len(flat))):
            if wanted == shape:
                return source
            if len(wanted) == 1:
                return self.rearranged(source, Flatten(), name)
            if len(wanted) == 3:
                return self.rearranged(source, Reshape((wanted[0], wanted[1], wanted[2])), name)
            raise FnetError(f"it gives {size_text(wanted)}; layers read vectors or feature maps")
        if len(shape) == 1 and len(wanted) == 3:
            return self.arranged(self.rearranged(source, Reshape((shape[0], 1, 1)), name), places, name)
        arranged = self.pixels(source, places, name) or self.channels(source, places, name)
        if arranged is None:
            raise FnetError(f"no layer moves values like this, from {size_text(shape)} to {size_text(wanted)}")
        return arranged

    def pixels(self, source: str, places: Tensor, name: str) -> str | None:
        """Adds the layer that repeats, drops or reorders whole rows and columns; what remains is a matter of channels.
        None if that is not what `places` do."""
        shape = self.shapes[source]
        if len(shape) != 3 or places.ndim != 3 or not places.numel():
            return None
        channels = places[:, 0, 0] // (shape[1] * shape[2])
        rows, columns = places[0, :, 0] // shape[2] % shape[1], places[0, 0] % shape[2]
        if not torch.equal(places, (channels[:, None, None] * shape[1] + rows[:, None]) * shape[2] + columns):
            return None
        layer = Resample(tuple(rows.tolist()), tuple(columns.tolist()))
        if (layer.rows, layer.columns) == (tuple(range(shape[1])), tuple(range(shape[2]))):
            return None  # only channels move
        size = len(rows) * len(columns)
        return self.arranged(
            self.rearranged(source, layer, name),
            channels[:, None, None] * size + torch.arange(size).view(len(rows), -1),
            name,
        )

    def channels(self, source: str, places: Tensor, name: str) -> str | None:
        """Adds the layers that shuffle or slice whole channels. None if that is not what `places` do."""
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
        """Adds a layer that moves values, shared by all its readers; returns its name."""
        if (source, layer) not in self.moved:
            wanted = name if name in self.leaves else f"{name.rpartition('.')[0]}.{layer.kind}".lstrip(".")
            self.moved[source, layer] = self.place(self.unused(wanted), layer, [source])
        return self.moved[source, layer]

    # -- Names

    def name_of(self, node: fx.Node) -> str:
        """The path of the leaf module that computes a node; else the path of the module around it and the operation."""
        stack = node.meta.get("nn_module_stack") or {}
        path = re.sub(r"@\d+", "", next(reversed(stack.values()))[0]) if stack else ""
        if path in self.leaves:
            return path
        operation = _operation(node)
        return f"{path}.{operation}" if path else operation

    def unused(self, name: str) -> str:
        """The name, numbered if it is taken."""
        number, free = 1, name
        while free in self.shapes:
            number += 1
            free = f"{name}_{number}"
        return free


STATISTICS = ("running_mean", "running_var")


def _state_names(layer: Layer) -> tuple[str, ...]:
    """Names of the tensors that a layer has in the state dict."""
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
    """The name of an operation in messages."""
    if node.target is operator.getitem:
        return _operation(cast(fx.Node, node.args[0]))
    return title(getattr(node.target, "overloadpacket", node.target))


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operation by name, with the defaults of its schema."""
    schema = cast(torch._ops.OpOverload, node.target)._schema
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    positional = {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    return {**defaults, **positional, **node.kwargs}
