"""ONNX files: the quantized network as a QDQ graph with our codes and parameters, and the folded one in float32.

Input ``input``: [N, C, H, W] float32, normalised. Output ``logits``: [N, classes] float32. A QDQ graph describes
integer arithmetic by float operators: each tensor is quantized and dequantized once (rule 18 of docs/quint8.md), and a
runtime replaces each sequence of dequantize, operator, quantize by one integer kernel.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import pi, sqrt
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

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
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.base.errors import FnetError
from fnet_search.base.files import replacing
from fnet_search.base.version import __version__
from fnet_search.deploy.weight_type import WeightType
from fnet_search.quant.fold import FoldedNetwork
from fnet_search.quant.quant_params import QuantParams
from fnet_search.quant.simulator import QuantizedNetwork, lookup_table, row_starts

OPSET, IR_VERSION = 13, 7
"""Opset 13, the first with per-channel quantization, and the IR version of the same ONNX release."""
SESSION_CONFIG = {"session.x64quantprecision": "1"}
"""Session configuration of ONNX Runtime with which uint8 times int8 is exact on x86 without VNNI, whose kernels
otherwise add pairs of products in 16 bits and saturate."""
MODEL = "model.onnx"
LOGITS = "logits"
PRODUCER = "fnet-search"


def codes_name(node: str) -> str:
    """The name of the uint8 tensor with a node's codes in a quantized graph."""
    return f"{node}.codes"


def coded(quantized: QuantizedNetwork) -> list[str]:
    """The nodes whose codes are a tensor of the graph, in network order: all but layers with a fused ReLU."""
    carrier = quantized.carrier
    nodes = quantized.network.order
    return [node.name for node in nodes if carrier[node.name] in (node.name, carrier[node.inputs[0]])]


def quantized_model(
    quantized: QuantizedNetwork, metadata: Mapping[str, str] | None = None, weight_type: WeightType = "int8"
) -> ModelProto:
    """The quantized network as a QDQ graph, with `metadata` as its properties, and what the graph itself is.

    With ``int8`` a weight's code and zero point are stored less 128. The results are the same, bit for bit, and
    runtimes have faster kernels; ONNX Runtime on x86 without VNNI needs SESSION_CONFIG for it (`runtime.saturates`).
    """
    graph = _QuantizedGraph(quantized, weight_type)
    for node in quantized.network.order:
        graph.add(node)
    config = {"session_config": json.dumps(SESSION_CONFIG)} if weight_type == "int8" else {}
    return _model(graph, quantized.network, {**(metadata or {}), "weight_type": weight_type, **config})


def float_model(folded: FoldedNetwork, metadata: Mapping[str, str] | None = None) -> ModelProto:
    """The folded network as a float32 graph, with `metadata` as its properties."""
    graph = _Graph(folded.network)
    for node in folded.network.order:
        inputs = [graph.floats[source] for source in node.inputs]
        if isinstance(node.layer, Weighted):
            for part, values in (("weight", folded.weight[node.name]), ("bias", folded.bias[node.name])):
                inputs.append(graph.constant(f"{node.name}.{part}", values.cpu().numpy()))
        graph.operator(node, inputs)
    return _model(graph, folded.network, metadata or {})


def write_model(path: Path, model: ModelProto) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


def read_model(path: Path) -> tuple[ModelProto, dict[str, str]]:
    """Reads an ONNX file that `write_model` wrote: the model and its metadata.

    Raises FnetError, naming the file, if it is missing, is not ONNX, or was not written by fnet-search.
    """
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and the checker raise what they like
        reason = error.strerror if isinstance(error, OSError) else "it is not a valid ONNX file"
        raise FnetError(f"cannot read {path}: {reason}; fnet-search export RUN -o model.onnx writes one") from None
    if model.producer_name != PRODUCER:
        raise FnetError(
            f"{path} was not written by fnet-search export, but by {model.producer_name or 'something else'}"
        )
    return model, {entry.key: entry.value for entry in model.metadata_props}


def read_weight_type(path: Path) -> WeightType | None:
    """How an ONNX file that `write_model` wrote stores weights. Files of earlier versions do not say it: uint8. None if
    the file is missing or broken."""
    try:
        facts = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    except Exception:  # protobuf raises what it likes
        return None
    return "int8" if facts.get("weight_type") == "int8" else "uint8"


READ = "x"
"""Stands for the input of an activation function among the operands of its operations."""


@dataclass(frozen=True)
class _Operation:
    """An ONNX operator on the result of the operation before it and on `operands`: numbers, or READ."""

    operator: str
    operands: Sequence[Any] = ()
    attributes: Mapping[str, float] = field(default_factory=dict)


def _operations(layer: Activation, axes: int) -> list[_Operation]:
    """An activation function in operators of OPSET, for values with `axes` dimensions, without the batch. Functions
    such as HardSwish, Mish and Gelu have operators of their own only in later opsets."""
    hard_sigmoid = _Operation("HardSigmoid", (), {"alpha": 1 / 6, "beta": 0.5})
    match layer:
        case Activation("leaky_relu") if len(layer.slopes) > 1:
            return [_Operation("PRelu", [np.reshape(layer.slopes, (-1, *[1] * (axes - 1)))])]
        case Activation("leaky_relu" | "elu" | "celu"):
            names = {"leaky_relu": "LeakyRelu", "elu": "Elu", "celu": "Celu"}
            return [_Operation(names[layer.function], (), {"alpha": layer.slopes[0]})]
        case Activation("relu6"):
            return [_Operation("Clip", (0, 6))]
        case Activation("clip"):
            return [_Operation("Clip", (layer.low, layer.high))]
        case Activation("hardsigmoid"):
            return [hard_sigmoid]
        case Activation("hardswish"):
            return [hard_sigmoid, _Operation("Mul", [READ])]
        case Activation("silu"):
            return [_Operation("Sigmoid"), _Operation("Mul", [READ])]
        case Activation("mish"):
            return [_Operation("Softplus"), _Operation("Tanh"), _Operation("Mul", [READ])]
        case Activation("log_sigmoid"):
            return [_Operation("Neg"), _Operation("Softplus"), _Operation("Neg")]
        case Activation("gelu"):
            share = [_Operation("Div", [sqrt(2)]), _Operation("Erf"), _Operation("Add", [1])]
            return [*share, _Operation("Mul", [READ]), _Operation("Mul", [0.5])]
        case Activation("gelu_tanh"):
            cube = [_Operation("Mul", [READ]), _Operation("Mul", [READ]), _Operation("Mul", [0.044715])]
            share = [
                _Operation("Add", [READ]),
                _Operation("Mul", [sqrt(2 / pi)]),
                _Operation("Tanh"),
                _Operation("Add", [1]),
            ]
            return [*cube, *share, _Operation("Mul", [READ]), _Operation("Mul", [0.5])]
    return [_Operation(layer.function.capitalize())]  # Relu, Sigmoid, Selu, Tanh, Softplus, Abs


class _Graph:
    """An ONNX graph under construction: its nodes and constants. `floats` has the name of each node's float tensor."""

    def __init__(self, network: Macroarchitecture) -> None:
        self.network = network
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self.floats = {INPUT: INPUT}

    def constant(self, name: str, values: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def integers(self, name: str, values: Sequence[int]) -> str:
        return self.constant(name, np.array(values, dtype=np.int64))

    def node(self, operator: str, name: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name, **attributes))
        return output

    def output(self, node: str) -> str:
        """The name of the float tensor that the operator of a node writes."""
        return LOGITS if node == self.network.output else f"{node}.output"

    def moved(self, node: Node, layer: Resample | Pad, tensor: str, output: str, zero: Any) -> str:
        """A layer that only moves values or codes. `zero` is the padding, an array of their dtype."""
        if isinstance(layer, Pad):
            pads = self.integers(f"{node.name}.pads", [0, *layer.before, 0, *layer.after])
            return self.node("Pad", node.name, [tensor, pads, self.constant(f"{node.name}.zero", zero)], output)
        rows, columns = (self.integers(f"{node.name}.{part}", getattr(layer, part)) for part in ("rows", "columns"))
        taken = self.node("Gather", f"{node.name}.take", [tensor, rows], f"{node.name}.taken", axis=2)
        return self.node("Gather", node.name, [taken, columns], output, axis=3)

    def function(self, node: Node, layer: Activation, tensor: str, output: str) -> str:
        """An activation function in float, as a chain of operators. Returns the name of its output."""
        *before, last = _operations(layer, len(self.network.shapes[node.name]))
        read = tensor
        for number, operation in enumerate(before, 1):
            read = self.operation(operation, f"{node.name}.step{number}", tensor, read, f"{node.name}.after{number}")
        return self.operation(last, node.name, tensor, read, output)

    def operation(self, operation: _Operation, name: str, x: str, read: str, output: str) -> str:
        arrays = (np.asarray(operand, np.float32) for operand in operation.operands if operand is not READ)
        constants = (self.constant(f"{name}.number{index}", array) for index, array in enumerate(arrays))
        operands = [x if operand is READ else next(constants) for operand in operation.operands]
        return self.node(operation.operator, name, [read, *operands], output, **operation.attributes)

    def operator(self, node: Node, inputs: Sequence[str]) -> str:
        """A layer as ONNX operators on float tensors. Returns the name of its output."""
        layer, name = node.layer, node.name
        output = self.floats[name] = self.output(name)

        def add(operator: str, *more: str, **attributes: Any) -> str:
            return self.node(operator, name, [*inputs, *more], output, **attributes)

        match layer:
            case Conv():
                geometry = {"kernel_shape": layer.kernel, "strides": layer.stride, "dilations": layer.dilation}
                return add("Conv", **geometry, pads=[*layer.padding, *layer.padding], group=layer.groups)
            case Dense():
                return add("Gemm", transB=1)
            case Pool(reduction="global_average"):
                return add("GlobalAveragePool")
            case Pool():
                # Explicit pads, since runtimes disagree on ceil_mode.
                down, right = layer.overhang(self.network.input_shapes(node)[0])
                pads = [*layer.padding, layer.padding[0] + down, layer.padding[1] + right]
                window = {"kernel_shape": layer.kernel, "strides": layer.step, "pads": pads}
                if layer.reduction == "max":
                    return add("MaxPool", **window)
                return add("AveragePool", **window, count_include_pad=int(layer.count_padding))
            case Flatten():
                return add("Flatten", axis=1)
            case Reshape(shape):
                return add("Reshape", self.integers(f"{name}.shape", [0, *shape]))
            case Slice(start, stop):
                interval = {"start": start, "stop": stop, "axis": 1}
                return add("Slice", *(self.integers(f"{name}.{part}", [value]) for part, value in interval.items()))
            case Shuffle(groups):
                channels, height, width = self.network.shapes[name]
                split = self.integers(f"{name}.split", [0, groups, channels // groups, height, width])
                joined = self.integers(f"{name}.join", [0, channels, height, width])
                apart = self.node("Reshape", f"{name}.apart", [*inputs, split], f"{name}.parts")
                crossed = self.node("Transpose", f"{name}.cross", [apart], f"{name}.crossed", perm=[0, 2, 1, 3, 4])
                return self.node("Reshape", name, [crossed, joined], output)
            case Resample() | Pad():
                return self.moved(node, layer, inputs[0], output, np.float32(0))
            case Add():
                return add("Add")
            case Multiply():
                return add("Mul")
            case Concat():
                return add("Concat", axis=1)
            case Activation():
                return self.function(node, layer, inputs[0], output)
            case BatchNorm() | Affine():
                raise TypeError(f"{layer.kind} is not part of a folded network")
            case _:
                assert_never(layer)


class _QuantizedGraph(_Graph):
    """A QDQ graph under construction. `floats` has the name of each node's dequantized tensor, `codes_name` that of its
    codes."""

    def __init__(self, quantized: QuantizedNetwork, weight_type: WeightType) -> None:
        super().__init__(quantized.network)
        self.weight_type = weight_type
        self.quantized, self.carrier, self.coded = quantized, quantized.carrier, coded(quantized)
        for name, params in quantized.params.items():
            self.parameters(f"{name}.output", params)
        self.quantize(INPUT, INPUT)

    def parameters(self, name: str, params: QuantParams) -> None:
        self.constant(f"{name}_scale", np.float32(params.scale))
        self.constant(f"{name}_zero", np.uint8(params.zero))

    def output(self, node: str) -> str:
        return f"{node}.output"  # LOGITS is the name of the last dequantized tensor

    def quantize(self, node: str, tensor: str) -> None:
        params = [f"{self.carrier[node]}.output_{part}" for part in ("scale", "zero")]
        self.node("QuantizeLinear", f"{node}.quantize", [tensor, *params], codes_name(node))
        self.dequantize(node)

    def dequantize(self, node: str) -> None:
        params = [f"{self.carrier[node]}.output_{part}" for part in ("scale", "zero")]
        output = self.floats[node] = LOGITS if node == self.network.output else f"{node}.dequantized"
        self.node("DequantizeLinear", f"{node}.dequantize", [codes_name(node), *params], output)

    def weights(self, node: Node) -> list[str]:
        """Adds the weight and the bias of a layer and dequantizes them; per-channel scales lie on axis 0. Returns the
        names of the dequantized tensors."""
        layer = self.quantized.layers[node.name]
        scales = layer.bias_scale(self.quantized.params[self.carrier[node.inputs[0]]])
        codes, zeros = layer.codes, layer.zeros
        if self.weight_type == "int8":
            codes, zeros = ((values.int() - 128).to(torch.int8) for values in (codes, zeros))
        parts = {
            "weight": (codes, layer.scales, zeros),
            "bias": (layer.bias, scales, (0 * scales).to(layer.bias.dtype)),
        }
        names = []
        for part, (values, scale, zero) in parts.items():
            name = f"{node.name}.{part}"
            single = len(layer.params) == 1
            arrays = {"scale": scale, "zero": zero}
            inputs = [self.constant(name, values.cpu().numpy())]
            for suffix, parameters in arrays.items():
                array = parameters.cpu().numpy()
                inputs.append(self.constant(f"{name}_{suffix}", array[0] if single else array))
            names.append(f"{name}_dequantized")
            self.node("DequantizeLinear", f"{name}.dequantize", inputs, names[-1], **({} if single else {"axis": 0}))
        return names

    def add(self, node: Node) -> None:
        layer, name = node.layer, node.name
        inputs = [self.floats[source] for source in node.inputs]
        if isinstance(layer, Activation) and self.carrier[node.inputs[0]] != name:
            source, target = (self.quantized.params[self.carrier[end]] for end in (node.inputs[0], name))
            rows = lookup_table(layer, source, target)
            lookup = self.constant(f"{name}.table", rows.flatten().numpy())
            index = self.node(
                "Cast", f"{name}.cast", [codes_name(node.inputs[0])], f"{name}.index", to=TensorProto.INT32
            )
            if len(rows) > 1:
                starts = row_starts(len(rows), 1 + len(self.network.shapes[name])).numpy()
                places = [index, self.constant(f"{name}.rows", starts)]
                index = self.node("Add", f"{name}.place", places, f"{name}.places")
            self.node("Gather", name, [lookup, index], codes_name(name))
            self.dequantize(name)
            return
        if isinstance(layer, Resample | Pad):
            zero = np.uint8(self.quantized.params[self.carrier[name]].zero)
            self.moved(node, layer, codes_name(node.inputs[0]), codes_name(name), zero)
            self.dequantize(name)
            return
        if isinstance(layer, Weighted):
            inputs += self.weights(node)
        output = self.operator(node, inputs)
        if name in self.coded:  # otherwise the output of the fused ReLU is quantized
            self.quantize(name, output)


def _model(graph: _Graph, network: Macroarchitecture, metadata: Mapping[str, str]) -> ModelProto:
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape])
        for name, shape in ((INPUT, network.input_shape), (LOGITS, network.shapes[network.output]))
    ]
    read = {name for node in graph.nodes for name in node.input} | {LOGITS}
    # A tensor that only tables read is not dequantized.
    nodes = [node for node in graph.nodes if read & set(node.output)]
    model = helper.make_model(
        helper.make_graph(nodes, network.name, ends[:1], ends[1:], graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name=PRODUCER,
        producer_version=__version__,
    )
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    return model
