from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Activation, BatchNorm, Conv, Dense, Flatten, Layer, Pad, Pool
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture
from fnet_search.arch.plan import parse_plan
from fnet_search.base.errors import FnetError
from fnet_search.base.version import __version__
from fnet_search.deploy.export import (
    coded,
    codes_name,
    float_model,
    quantized_model,
    read_model,
    read_weight_type,
    write_model,
)
from fnet_search.deploy.runtime import Runtime
from fnet_search.deploy.weight_type import WeightType
from fnet_search.importing.spaces import load_space
from fnet_search.quant.calibration import quantize_trained
from fnet_search.quant.fold import fold
from fnet_search.quant.scheme import parse_scheme
from fnet_search.quant.simulator import QuantizedNetwork
from tests.support.networks import ACTIVATIONS, BENT, GATED, MIXED, REUSED, SCALED, noise, normal, randomized, sequence

TINY = load_space("tiny")
SPACES = {
    **{"mixed": MIXED, "reused": REUSED, "gated": GATED, "scaled": SCALED, "bent": BENT},
    "tiny": factorize(TINY, parse_plan(TINY, "init2")),
}
SCHEMES = ["percentile:1", "percentile:1+per-channel"]


def quantized_network(space: Macroarchitecture, scheme: str = "percentile:1") -> QuantizedNetwork:
    return quantize_trained(randomized(space), parse_scheme(scheme), noise(space, 20), 0).network


def initializers(model: ModelProto) -> dict[str, "np.ndarray[Any, Any]"]:
    return {constant.name: numpy_helper.to_array(constant) for constant in model.graph.initializer}


def shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_the_graph(space: Macroarchitecture, scheme: str) -> None:
    """One pair of quantize and dequantize a tensor: what is quantized is a float of its own, and no codes are made of
    floats that only stand for codes (rule 18 of docs/quint8.md)."""
    network = quantized_network(space, scheme)
    model = quantized_model(network)
    onnx.checker.check_model(model, full_check=True)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 13)]
    assert (model.ir_version, model.producer_name, model.producer_version) == (7, "fnet-search", __version__)
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, shape_of(image)) == ("input", ["N", *space.input_shape])
    assert (logits.name, shape_of(logits)) == ("logits", ["N", space.classes])
    assert {end.type.tensor_type.elem_type for end in (image, logits)} == {TensorProto.FLOAT}
    writer = {name: node for node in model.graph.node for name in node.output}
    readers = Counter(name for node in model.graph.node for name in node.input)
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    for node in quantizers:
        assert readers[node.input[0]] == 1
        assert node.input[0] == INPUT or writer[node.input[0]].op_type != "DequantizeLinear"
    dequantized = Counter(node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear")
    assert set(dequantized.values()) == {1}
    gathers = [node for node in model.graph.node if node.op_type in ("Gather", "Pad")]
    gathered = {node.output[0] for node in gathers} - {node.input[0] for node in gathers}  # rows, then columns
    assert {node.output[0] for node in quantizers} | gathered == {codes_name(name) for name in [INPUT, *coded(network)]}
    for name in writer:
        assert readers[name] > 0 or name == "logits"


@pytest.mark.parametrize("weight_type", get_args(WeightType))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_a_layer_holds(scheme: str, weight_type: WeightType) -> None:
    """int8 weights are the codes less 128, and so are their zero points."""
    network = quantized_network(MIXED, scheme)
    model = quantized_model(network, {"plan": "regular"}, weight_type)
    held, less = initializers(model), 128 if weight_type == "int8" else 0
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts.pop("session_config", None) == ('{"session.x64quantprecision": "1"}' if less else None)
    assert facts == {"plan": "regular", "weight_type": weight_type}
    for name, layer in network.layers.items():
        source = network.params[network.carrier[network.network.by_name[name].inputs[0]]]
        scales = np.array([one.scale for one in layer.params], dtype=np.float32)
        zeros = np.array([one.zero - less for one in layer.params], dtype=weight_type)
        expected = {
            "weight": (layer.codes.numpy().astype(int) - less).astype(weight_type),
            "weight_scale": scales,
            "weight_zero": zeros,
            "bias": layer.bias.numpy(),
            "bias_scale": np.float32(source.scale) * scales,
            "bias_zero": np.zeros(len(scales), dtype=np.int32),
        }
        for part, values in expected.items():
            found = held[f"{name}.{part}"]
            assert found.dtype == values.dtype, part
            assert np.array_equal(found.reshape(values.shape), values), part
        assert held[f"{name}.weight_scale"].ndim == ("per-channel" in scheme)
    for name, params in network.params.items():
        assert (held[f"{name}.output_scale"], held[f"{name}.output_zero"]) == (np.float32(params.scale), params.zero)
        assert held[f"{name}.output_zero"].dtype == np.uint8


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_graph_means_the_same_in_float(scheme: str) -> None:
    """Without optimizations the runtime computes it operator by operator: a step more or less now and then."""
    space = sequence((3, 6, 5), c=Conv(8, (3, 2)), r=Activation(), p=Pool(), g=Conv(4, (2, 1), groups=4), f=Flatten())
    network = quantized_network(space, scheme)
    x = normal(3, *space.input_shape)
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    found = Runtime(quantized_model(network), options={"graph_optimization_level": level})(x)
    expected, step = network(x), network.params[network.carrier["f"]].scale
    assert float((found - expected).abs().max()) < 1.1 * step
    assert float(expected.std()) > 20 * step


INTEGER = {
    *("QLinearConv", "QGemm", "QLinearAdd", "QLinearMul", "QLinearConcat"),
    *("QLinearAveragePool", "QLinearGlobalAveragePool", "MaxPool", "NhwcMaxPool"),
    *("Flatten", "Reshape", "Slice", "Split", "Transpose", "Cast", "Gather", "QuantizeLinear", "DequantizeLinear"),
    *("Pad", "Add"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_the_runtime_computes_in_integers(space: Macroarchitecture, scheme: str, tmp_path: Path) -> None:
    network = quantized_network(space, scheme)
    path = tmp_path / "optimized.onnx"
    Runtime(quantized_model(network), options={"optimized_model_filepath": str(path)})
    found = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert set(found) <= INTEGER
    kinds = Counter(node.layer.kind for node in network.network.order)
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 1)
    assert (found["QLinearConv"], found["QGemm"]) == (kinds["conv"], kinds["dense"])
    assert (found["QLinearAdd"], found["QLinearConcat"]) == (kinds["add"], kinds["concat"])
    assert found["QLinearMul"] == kinds["multiply"]
    order = network.network.order
    sloped = {node.inputs for node in order if isinstance(node.layer, Activation) and len(node.layer.slopes) > 1}
    assert found["Add"] == len(sloped)  # where a channel's table begins, int32, once for all that look there


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_any_number_of_images(space: Macroarchitecture, scheme: str) -> None:
    network, floating = quantized_network(space, scheme), fold(randomized(space))
    integer, real = Runtime(quantized_model(network)), Runtime(float_model(floating))
    x = normal(6, *space.input_shape)
    for part in x.split([1, 5]):
        assert torch.equal(integer(part), network(part))
        assert real(part).shape == (len(part), space.classes)


CASES: dict[str, dict[str, Layer]] = {
    **{name: {"a": layer, "f": Flatten()} for name, layer in ACTIVATIONS.items()},
    "slopes of a vector": {"f": Flatten(), "d": Dense(6), "a": ACTIVATIONS["fixed_slopes"]},
    "zeros": {"z": Pad((0, 1, 0), (2, 0, 3)), "p": Pool("max", (2, 2)), "f": Flatten()},
    "zeros in a mean": {"z": Pad((0, 1, 1), (0, 1, 1)), "p": Pool("average", (3, 3), (2, 2)), "f": Flatten()},
    "zeros of a convolution": {"z": Pad((0, 1, 0), (0, 0, 1)), "c": Conv(4), "f": Flatten()},
    "max": {"p": Pool("max", (3, 2), (2, 1), (1, 1)), "f": Flatten()},
    "average": {"p": Pool("average", (3, 3), (2, 1), (1, 0)), "f": Flatten()},
    "global average": {"p": Pool("global_average"), "f": Flatten()},
    "conv": {"c": Conv(8, (3, 2), (2, 1), (1, 2), (1, 2), 2), "n": BatchNorm(), "f": Flatten()},
    "depthwise": {"c": Conv(6, padding=(2, 2), groups=6), "f": Flatten()},
    "dense": {"f": Flatten(), "d": Dense(9), "n": BatchNorm(), "a": Activation(), "e": Dense(4, bias=False)},
}
FLOATS = {**SPACES, **{name: sequence((6, 9, 11), **layers) for name, layers in CASES.items()}}


@pytest.mark.parametrize("space", FLOATS.values(), ids=FLOATS.keys())
def test_the_float_network(space: Macroarchitecture) -> None:
    """Within the rounding of float32 sums of a few hundred terms; here 1e-5 of the largest output."""
    folded = fold(randomized(space))
    x = 5 * normal(4, *space.input_shape)
    expected, found = folded(x), Runtime(float_model(folded))(x)
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("space", FLOATS.values(), ids=FLOATS.keys())
def test_its_graph_is_as_portable(space: Macroarchitecture) -> None:
    model = float_model(fold(randomized(space)))
    onnx.checker.check_model(model, full_check=True)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 13)]
    assert model.ir_version == 7
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["input", "logits"]
    assert "QuantizeLinear" not in {node.op_type for node in model.graph.node}


def test_a_model_comes_back_from_its_file(tmp_path: Path) -> None:
    facts = {"plan": "a=1,b=2", "scheme": "mse+per-channel", "note": "ü\n"}
    config = {"session_config": '{"session.x64quantprecision": "1"}'}
    network = quantized_network(TINY)
    for number, (model, more) in enumerate(
        [
            (quantized_model(network, facts), {"weight_type": "int8", **config}),
            (quantized_model(network, facts, "uint8"), {"weight_type": "uint8"}),
            (float_model(fold(randomized(TINY)), facts), {}),
        ]
    ):
        path = tmp_path / f"{number}.onnx"
        write_model(path, model)
        assert read_model(path) == (model, {**facts, **more})
        assert read_weight_type(path) == more.get("weight_type", "uint8")
        first = path.read_bytes()
        write_model(path, model)
        assert path.read_bytes() == first
    assert sorted(tmp_path.iterdir()) == [tmp_path / f"{number}.onnx" for number in range(3)]


def foreign(producer: str) -> bytes:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])
    other = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [other])
    return bytes(helper.make_model(graph, producer_name=producer).SerializeToString())


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot read FILE: No such file or directory; fnet-search export RUN -o model.onnx writes one"),
        (b"", "cannot read FILE: it is not a valid ONNX file; fnet-search export RUN -o model.onnx writes one"),
        (
            b"no\x00model",
            "cannot read FILE: it is not a valid ONNX file; fnet-search export RUN -o model.onnx writes one",
        ),
        (foreign("pytorch"), "FILE was not written by fnet-search export, but by pytorch"),
        (foreign(""), "FILE was not written by fnet-search export, but by something else"),
    ],
    ids=["missing", "empty", "garbage", "pytorch", "nameless"],
)
def test_files_that_are_not_ours(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FnetError) as caught:
        read_model(path)
    assert str(caught.value).replace(str(path), "FILE") == complaint


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    write_model(path, quantized_model(quantized_network(TINY)))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(FnetError, match=r"^cannot read .*/m\.onnx: it is not a valid ONNX file; "):
        read_model(path)


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FnetError, match=rf"^cannot read {tmp_path}: Is a directory; "):
        read_model(tmp_path)


@pytest.mark.parametrize("space", [MIXED, REUSED], ids=["mixed", "reused"])
def test_coded_nodes_are_those_with_codes_of_their_own(space: Macroarchitecture) -> None:
    """All but a layer that a ReLU is part of."""
    network = quantized_network(space)
    fused = {
        name for name, carrier in network.carrier.items() if carrier != name and network.network.consumers(carrier)
    }
    left = [node.name for node in network.network.order if node.name not in coded(network)]
    expected = {
        "mixed": ["stem", "sum", "average.norm", "dense"],
        "reused": ["both", "pool"],
    }[space.name]
    assert left == expected
    assert set(left) <= fused
