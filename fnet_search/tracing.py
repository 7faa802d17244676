"""A macroarchitecture from a torch module: traced by `torch.export`, each operation one of our layers, or refused.

The trace is of the module in evaluation: dropout and stochastic depth are gone. What only moves values (reshape,
transpose, split, slice, flatten) is followed on the values' places, and becomes a layer where it comes to something.
"""

import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fnet_search.errors import FnetError, first_line
from fnet_search.layers import (
    BatchNorm,
    Conv,
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
)
from fnet_search.macro import INPUT, Macroarchitecture, Node, beyond_the_first
from fnet_search.network import module_key
from fnet_search.operations import LAYERS, MOVES, NEUTRAL, NOTHING, SUPPORTED, WEIGHTS, Call, aten, title
from fnet_search.quantities import size_text

BATCH = 2
"""Images that are traced: one could be taken for a dimension of size 1."""


@dataclass(frozen=True)
class _Value:
    """What an operation of the trace gives: values of the node `source`, [2, *shape], whose places there are `places`
    (None: all, in order). `name` is what a layer that moves them would be called."""

    source: str
    shape: Shape
    places: Tensor | None = None
    name: str = ""


def from_module(model: nn.Module, example_input: Tensor, name: str = "") -> Macroarchitecture:
    """See `Macroarchitecture.from_module`."""
    odd = next((one.dtype for one in model.parameters() if one.dtype != torch.float32), None)
    if odd is not None:
        raise FnetError(f"the weights are {str(odd).removeprefix('torch.')}; call float() of the module first")
    if example_input.ndim != 4:
        raise FnetError(f"the example input must be [N, C, H, W], got shape {list(example_input.shape)}")
    shape = (example_input.shape[1], example_input.shape[2], example_input.shape[3])
    name = name or type(model).__name__.lower()
    program = _traced(model, shape, name)
    return _Import(model, program, shape).macroarchitecture(name)


def _traced(model: nn.Module, shape: Shape, name: str) -> ExportedProgram:
    first = next(iter(model.parameters()), torch.empty(0))
    example = torch.zeros(BATCH, *shape, device=first.device)
    with _evaluating(model), torch.no_grad(), _silence():
        try:
            program: ExportedProgram = torch.export.export(model, (example,)).run_decompositions({})  # functional
            return program
        except Exception as error:  # torch.export and the module raise what they like
            reason = first_line(error)
            small = any(word in reason.lower() for word in ("too small", "kernel size", "height", "width"))
            advice = f"; --input {shape[0]}x224x224 would give it larger images" if small and shape[1] < 224 else ""
            said = f"{reason}{advice}"
            raise FnetError(f"cannot trace {name} for an input of {size_text(shape)}: {said}") from None


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings and no log: what fails is said once, in a line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
        self.parameters: dict[str, Any] = {}
        known = {**program.constants, **program.state_dict}
        for held in (signature.inputs_to_parameters, signature.inputs_to_buffers):
            self.parameters |= {name: known[where] for name, where in held.items()}

    def macroarchitecture(self, name: str) -> Macroarchitecture:
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name not in self.parameters:
                self.values[node] = _Value(INPUT, self.shape)
            elif node.op == "call_function":
                try:
                    self.operation(node)
                except FnetError as error:
                    where = self.name_of(node)
                    raise FnetError(f"cannot import {name}: {where!r} ({_operation(node)}): {error}") from None
            elif node.op == "output":
                given = [one for one in node.args[0] if one is not None and one.name in self.outputs]
                logits = self.values.get(given[0]) if len(given) == 1 else None
                if not isinstance(logits, _Value):
                    raise FnetError(f"cannot import {name}: one tensor of logits is needed, it gives {len(given)}")
                last, shape = self.whole(logits), logits.shape
        if last == INPUT:
            raise FnetError(f"cannot import {name}: it computes nothing")
        if len(shape) != 1:
            raise FnetError(f"cannot import {name}: it gives {size_text(shape)}, not logits; flatten it")
        return beyond_the_first(Macroarchitecture(name, self.shape, self.needed(last), weights=self.weights))

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
        if all(source.name in self.parameters for source in node.all_input_nodes):
            if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
                raise FnetError("it is drawn at random")
            self.compute(node)
            return
        if target is operator.getitem:
            parts, index = self.values[cast(fx.Node, node.args[0])], cast(int, node.args[1])
            self.values[node] = parts if isinstance(parts, _Value) else parts[index]  # the first of a norm or a pool
            return
        given = node.meta.get("val")
        if isinstance(given, Tensor) and given.dtype != torch.float32:
            raise FnetError(f"it gives {str(given.dtype).removeprefix('torch.')}; only float32 can be imported")
        packet = getattr(target, "overloadpacket", None)
        if packet is aten.pad and _arguments(node)["mode"] == "constant":
            packet = aten.constant_pad_nd
        if packet in MOVES:
            self.values[node] = self.move(node)
        elif packet in NOTHING:
            self.values[node] = self.value(node.args[0])
        else:
            self.values[node] = self.layers(node, packet)

    def layers(self, node: fx.Node, packet: Any) -> _Value:
        """Places the layers of an operator that computes; returns what the last one gives."""
        if packet not in LAYERS:  # before its arguments are looked at: they may be of any kind
            raise FnetError(f"no layer computes this; those that can be imported are {SUPPORTED}")
        given = _arguments(node)
        if given.get("other") == NEUTRAL.get(packet, ()):
            return self.value(given["self"])
        weights = {name: self.parameter(given[name]) for name in WEIGHTS if name in given}
        read = [value for name, value in given.items() if name in ("input", "self", "other")] or given["tensors"]
        values = [self.value(one) for one in read]
        result = node.meta["val"][0] if isinstance(node.meta["val"], list | tuple) else node.meta["val"]
        call = Call({**given, **weights}, [one.shape for one in values], tuple(result.shape[1:]), node.target)
        found, name = LAYERS[packet](call), self.name_of(node)
        if not found:
            return self.viewed(values[0], call.result, name)
        if packet in (aten.mean, aten.amax):
            values = [self.viewed(one, (*one.shape, 1)[:3], name) for one in values]
        sources = [self.whole(one) for one in values]
        for layer in found:
            if isinstance(layer, Moving) and len(found) > 1:
                sources = [self.rearranged(sources[0], layer, f"{name}.{layer.kind}")]
            else:
                sources = [self.place(self.unused(name), layer, sources, weights)]
        return self.viewed(_Value(sources[0], self.shapes[sources[0]]), call.result, name)

    def compute(self, node: fx.Node) -> None:
        """What does not hang on the image, as weights that are normalised, is a weight."""
        arguments = fx.map_arg(node.args, lambda one: self.parameters[one.name])
        options = fx.map_arg(node.kwargs, lambda one: self.parameters[one.name])
        with torch.no_grad():
            self.parameters[node.name] = cast(Callable[..., Any], node.target)(*arguments, **options)

    def value(self, argument: object) -> _Value:
        found = self.values.get(argument) if isinstance(argument, fx.Node) else None
        if found is None:
            what = "a number" if isinstance(argument, int | float) else "a weight or constant"
            raise FnetError(f"it reads {what} where a layer reads a tensor that was computed from the image")
        assert isinstance(found, _Value)
        return found

    def parameter(self, argument: object) -> Tensor | None:
        """A weight, or None for none. Raises FnetError for one that hangs on the image."""
        if argument is None:
            return None
        name = argument.name if isinstance(argument, fx.Node) else ""
        if name not in self.parameters:
            raise FnetError("its weights are computed from the image")
        found: Tensor = self.parameters[name]
        return found.detach().float().clone()

    def place(
        self, name: str, layer: Layer, sources: list[str], weights: Mapping[str, Tensor | None] | None = None
    ) -> str:
        """Adds a layer, with its weights; returns its name."""
        self.shapes[name] = layer.output_shape([self.shapes[source] for source in sources])
        self.nodes.append(Node(name, layer, tuple(sources)))
        held = {part: tensor for part, tensor in (weights or {}).items() if tensor is not None}
        if isinstance(layer, BatchNorm):
            mean = held["running_mean"]
            counted = {"num_batches_tracked": torch.tensor(0)}
            held = {"weight": torch.ones_like(mean), "bias": torch.zeros_like(mean), **held, **counted}
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


def _operation(node: fx.Node) -> str:
    """What users know an operation as."""
    return title(getattr(node.target, "overloadpacket", node.target))


def _arguments(node: fx.Node) -> dict[str, Any]:
    """By name, with the defaults of the operator's schema."""
    schema = cast(torch._ops.OpOverload, node.target)._schema
    found = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    found |= {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    return {**found, **node.kwargs}
