"""ONNX Runtime beside the integer simulator, code for code, and that the audit would notice if they differed."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor

from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Activation, Conv, Dense, Flatten, Function, Layer
from fnet_search.arch.macroarchitecture import INPUT, Node
from fnet_search.arch.plan import parse_plan
from fnet_search.deploy.audit import LayerAudit, audit, audit_layers, compare_codes
from fnet_search.deploy.export import coded, codes_name, quantized_model
from fnet_search.deploy.runtime import Runtime, with_outputs
from fnet_search.deploy.weight_type import WeightType
from fnet_search.importing.spaces import load_space
from fnet_search.policy.evaluation import Audit
from fnet_search.quant.bias_correction import correct_biases
from fnet_search.quant.calibration import quantize_trained
from fnet_search.quant.fold import fold
from fnet_search.quant.quant_params import QuantParams, clip
from fnet_search.quant.quantize import quantize
from fnet_search.quant.quantized_layer import QuantizedLayer, bounded
from fnet_search.quant.ranges import calibrate
from fnet_search.quant.scheme import MINMAX, Scheme, parse_ranges, parse_scheme
from fnet_search.quant.simulator import QuantizedNetwork, accumulate
from fnet_search.training.network import walk
from tests.support.networks import BENT, GATED, MIXED, REUSED, SCALED, batches_of, noise, normal, randomized, sequence

F32 = np.float32


def near(rng: np.random.Generator, value: float, exact: bool) -> float:
    """A scale of about this size; a power of two, whose products are exact and often end in a half, if `exact`."""
    return float(2.0 ** np.rint(np.log2(value))) if exact else float(F32(value * rng.uniform(0.7, 1.4)))


def zero_point(rng: np.random.Generator) -> int:
    """At an edge twice in three times."""
    return int(rng.choice([0, 255, rng.integers(1, 255)]))


def random_conv(rng: np.random.Generator) -> tuple[Conv, tuple[int, int, int]]:
    groups = 2 ** int(rng.integers(0, 9))
    ins, outs = (int(rng.integers(1, max(1, 48 // groups) + 1)) for _ in range(2))
    kernel, stride = int(rng.choice([1, 3, 5])), int(rng.integers(1, 3))
    padding, dilation = int(rng.integers(0, kernel + 1)), int(rng.integers(1, 3))
    height, width = (dilation * (kernel - 1) + 1 + int(rng.integers(4, 9)) * stride for _ in range(2))
    pairs = ((n, n) for n in (kernel, stride, padding, dilation))
    return Conv(outs * groups, *pairs, groups=groups, bias=True), (ins * groups, height, width)


def random_dense(rng: np.random.Generator) -> tuple[Dense, tuple[int, int, int]]:
    return Dense(int(rng.integers(1, 400))), (int(rng.integers(1, 400)), int(rng.integers(1, 6)), 1)


def random_network(rng: np.random.Generator, dense: bool, per_channel: bool) -> tuple[QuantizedNetwork, Tensor]:
    """One layer, with a ReLU or without, of codes, scales and zero points over all that they can be; and images whose
    codes are all 255, all 0, and random ones. Every third layer has biases that put the sums of the image of 255s next
    to halves of a code, where it matters how a product is rounded."""
    layer, shape = random_dense(rng) if dense else random_conv(rng)
    exact, relu, halves = rng.random() < 0.3, rng.random() < 0.4, rng.random() < 0.3
    if isinstance(layer, Dense):
        size: tuple[int, ...] = (layer.out_features, int(np.prod(shape)))
    else:
        size = (layer.out_channels, shape[0] // layer.groups, *layer.kernel)
    codes = rng.choice([rng.integers(0, 256, size), np.full(size, 255), np.zeros(size), rng.choice([0, 255], size)])
    zero, scale = 128 if per_channel else zero_point(rng), 10.0 ** rng.uniform(-4, 1)
    widths = rng.uniform(0.1, 1, size[0] if per_channel else 1)
    params = tuple(QuantParams(near(rng, scale * float(width), exact), zero) for width in widths)
    weights = QuantizedLayer(torch.from_numpy(codes.astype(np.uint8)), params, torch.zeros(size[0], dtype=torch.int32))

    source = QuantParams(near(rng, 10.0 ** rng.uniform(-4, 1), exact), zero_point(rng))
    x = torch.from_numpy(rng.integers(0, 256, (6, *shape)).astype(np.uint8))
    x[0], x[1] = 255, 0
    sums = accumulate(layer, x.flatten(1) if dense else x, source.zero, weights).reshape(6, size[0], -1).numpy()
    reach = int(np.abs(sums).max()) + 1
    multiplier = 10.0 ** rng.uniform(-5.2, -4.7) if halves else 10.0 ** rng.uniform(2, 2.5) / reach
    target = QuantParams(near(rng, source.scale * scale / multiplier, exact), 0 if relu else zero_point(rng))
    if halves:
        multipliers = weights.bias_scale(source).double().numpy() / target.scale
        wanted = (rng.integers(0, 255, size[0]) + 0.5 - target.zero) / multipliers
        bias = np.rint(wanted).astype(np.int32) - sums[0, :, sums.shape[2] // 2]
    else:
        bias = rng.integers(-reach // 2, reach // 2 + 1, size[0]).astype(np.int32)

    layers: dict[str, Layer] = {"f": Flatten(), "op": layer} if dense else {"op": layer}
    layers |= {"r": Activation()} if relu else {}
    network = sequence(shape, **layers, **({} if dense else {"f": Flatten()}))
    ends = {INPUT: source, "r" if relu else "op": target}
    weights = bounded(replace(weights, bias=torch.from_numpy(bias)))
    return QuantizedNetwork(network, ends, {"op": weights}), source.dequantize(x)


def stress(count: int, seed: int, dense: bool, per_channel: bool) -> Iterator[Audit]:
    """Every second network with int8 weights."""
    for number in range(count):
        quantized, x = random_network(np.random.default_rng((seed, number)), dense, per_channel)
        model = quantized_model(quantized, weight_type="int8" if number % 2 else "uint8")
        yield from audit(quantized, Runtime(model), [x])


@pytest.mark.parametrize("per_channel", [False, True], ids=["a scale a tensor", "a scale a channel"])
@pytest.mark.parametrize(("dense", "least"), [(False, 3_000_000), (True, 120_000)], ids=["convolutions", "dense"])
def test_single_layers(dense: bool, least: int, per_channel: bool) -> None:
    found = list(stress(120, 1, dense, per_channel))
    assert all(one.differing == one.predictions == 0 for one in found)
    total = sum(found, Audit())
    assert total.images == 120 * 6
    assert total.codes > least


SCHEMES = [
    *("percentile:1", "minmax", "mse", "percentile:1+per-channel", "minmax+equalize", "percentile:1+bias-correct"),
    "mse+per-channel+equalize+bias-correct",
]
LARGE = ["minmax", "percentile:1+per-channel", "percentile:1+bias-correct"]
SMALL = {"mixed": MIXED, "reused": REUSED, "gated": GATED, "scaled": SCALED, "bent": BENT}
WHOLE = [
    *((name, "", scheme, 20) for name, scheme in product(SMALL, SCHEMES)),
    *(("tiny", plan, scheme, 8) for plan, scheme in product(["regular", "init2", "f16", "dws"], SCHEMES)),
    *(("factorizenet-gap", plan, SCHEMES[0], 2) for plan in ("regular", "init2", "f16", "dws")),
    *(("factorizenet-gap", plan, SCHEMES[-1], 2) for plan in ("regular", "init2", "f16", "dws")),
    *(("factorizenet", plan, scheme, 2) for plan, scheme in zip(["regular", "init2", "dws"], LARGE, strict=True)),
]


QUICK = {
    *((name, "", scheme, 20) for name in SMALL for scheme in ("percentile:1", SCHEMES[-1])),
    *(("tiny", plan, scheme, 8) for plan, scheme in zip(["regular", "init2", "f16", "dws"], SCHEMES[1:], strict=False)),
    *(("factorizenet-gap", "f16", SCHEMES[-1], 2), ("factorizenet", "init2", "percentile:1+per-channel", 2)),
}
"""Each network, each scheme and each plan at least once."""


@pytest.mark.parametrize(
    ("name", "plan", "scheme", "images"),
    [pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow) for one in WHOLE],
)
def test_whole_networks(name: str, plan: str, scheme: str, images: int) -> None:
    space = SMALL.get(name) or load_space(name)
    if plan:
        space = factorize(space, parse_plan(space, plan))
    data = noise(space, images)
    quantized = quantize_trained(randomized(space), parse_scheme(scheme), data, 0).network
    x = data.normalise(data.train.images)
    assert all(len(codes.unique()) > 3 for _, codes in quantized.codes(x))
    sizes = {node.name: images * int(np.prod(quantized.network.shapes[node.name])) for node in quantized.network.order}
    for weight_type in get_args(WeightType):
        exported = quantized_model(quantized, weight_type=weight_type)
        (whole,) = audit(quantized, Runtime(exported), [x])
        assert whole == Audit(images, images * space.classes)
        model = with_outputs(exported, [codes_name(node) for node in coded(quantized)])
        ((again, layers),) = audit_layers(quantized, Runtime(model), [x])
        assert again == whole
        assert layers == tuple(LayerAudit(node, sizes[node], 0, 0) for node in coded(quantized))


def every_code(quantized: QuantizedNetwork, x: Tensor) -> int:
    """How many codes of all tensors differ."""
    return sum(layer.differing for layer in audited(quantized, x, quantized_model(quantized))[1].values())


@pytest.mark.parametrize("ranges", ["percentile:1", "minmax", "mse"])
@pytest.mark.parametrize("level", [0.0, -3.75, -9.0], ids=["dense", "sparse", "zero"])
@pytest.mark.parametrize("function", ["relu", "relu6", "hardsigmoid", "hardswish"])
def test_sparse_activations(function: Function, level: float, ranges: str) -> None:
    """Down to none that is not zero in calibration; then images that are brighter than those."""
    space = sequence((3, 9, 9), c=Conv(4, (1, 1), bias=True), a=Activation(function), d=Conv(5, (1, 1)), f=Flatten())
    folded = fold(randomized(space))
    folded.weight["c"].mul_(1.5 / folded.weight["c"].flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    folded.bias["c"].fill_(level if function in ("relu", "relu6") else level - 3)
    x = normal(20, 3, 9, 9)
    calibrated = quantize(folded, calibrate(folded, batches_of(x), parse_ranges(ranges)))
    if function == "relu6":
        codes = 6 / calibrated.params["a"].scale
        assert round(codes) >= 255
        assert level > -9 or codes == pytest.approx(255)
    assert every_code(calibrated, 6 * x) == 0


LAYERS = {
    "conv": Conv(8, padding=(1, 1), bias=True),
    "depthwise": Conv(6, padding=(1, 1), groups=6, bias=True),
    "dense": Dense(8),
}


@pytest.mark.parametrize("per_channel", [False, True], ids=["a scale a tensor", "a scale a channel"])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-9, 1e-6, 1e-4])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_layers_of_hardly_any_weights(layer: Conv | Dense, size: float, per_channel: bool) -> None:
    """As networks have them whose norms were slimmed: outputs are right to a step of 255, also with corrected biases,
    and where half of the channels have weights of any size."""
    shape = (6, 5, 5)
    between: dict[str, Layer] = {"f": Flatten(), "l": layer} if isinstance(layer, Dense) else {"l": layer}
    space = sequence(shape, s=Conv(6, (1, 1)), r=Activation(), **between, e=Activation("silu"), o=Flatten())
    x = normal(32, *shape)
    for some in (False, True):
        folded = fold(randomized(space, 5))
        slim = folded.weight["l"][: len(folded.weight["l"]) // 2 if some else None]
        slim.mul_(size)
        folded.bias["l"].copy_(torch.linspace(-0.2, 0.9, len(folded.bias["l"])))
        quantized = quantize(folded, calibrate(folded, batches_of(x), MINMAX), per_channel)
        y = dict(nodes(walk(folded.network, x, folded.apply_node)))["l"]
        for network in (quantized, correct_biases(folded, quantized, batches_of(x))):
            params = network.params["l"]
            found = params.dequantize(dict(nodes(network.codes(x)))["l"])
            if not some and size <= 1e-4:
                assert float((found - y).abs().max()) < 0.004 * float(y.max() - y.min().clamp_max(0))
            assert every_code(network, x) == 0


def nodes(walked: Iterator[tuple[Node, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((node.name, output) for node, output in walked)


def in_float64(total: Tensor, multiplier: Tensor, target: QuantParams) -> Tensor:
    """Rule 8, but for where it is rounded to float32."""
    scaled = total.double() * multiplier.double().view(1, -1, *[1] * (total.ndim - 2))
    return clip(torch.round(scaled) + target.zero)


def test_a_float64_multiplier_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In most of the layers with sums next to halves."""
    monkeypatch.setattr("fnet_search.quant.simulator.rescale", in_float64)
    assert sum(one.differing > 0 for one in stress(80, 1, False, False)) > 10


def near_halves() -> tuple[QuantizedNetwork, Tensor]:
    """Three layers. The first multiplies by 1/64, exactly; the second by a millionth, and has biases that put its
    sums next to halves of a code, where it matters how they are rounded; the third is an ordinary one."""
    rng = np.random.default_rng(0)

    def layer(weight: Tensor, scale: float, bias: Tensor) -> QuantizedLayer:
        return QuantizedLayer(weight.to(torch.uint8), (QuantParams(float(F32(scale)), 128),), bias.to(torch.int32))

    def any_codes(*shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, 256, shape))

    params = {
        INPUT: QuantParams(0.5, 128),
        "exact": QuantParams(8.0, 128),
        "halves": QuantParams(float(F32(7.7)), 0),
        "after": QuantParams(float(F32(0.4)), 128),
    }
    multiplier = F32(8) * F32(1.3e-6) / F32(7.7)
    halves = torch.from_numpy(np.rint((np.arange(255) + 0.5) / float(multiplier)))
    layers = {
        "exact": layer(any_codes(16, 4, 1, 1), 0.25, torch.zeros(16)),
        "halves": layer(127 + any_codes(255, 16, 1, 1) % 3, 1.3e-6, halves),
        "after": layer(any_codes(4, 255, 1, 1), 0.00004, torch.zeros(4)),
    }
    network = sequence(
        (4, 12, 12), exact=Conv(16, (1, 1)), halves=Conv(255, (1, 1)), after=Conv(4, (1, 1)), f=Flatten()
    )
    return QuantizedNetwork(network, params, layers), params[INPUT].dequantize(any_codes(4, 4, 12, 12))


def audited(quantized: QuantizedNetwork, x: Tensor, model: ModelProto) -> tuple[Audit, dict[str, LayerAudit]]:
    model = with_outputs(model, [codes_name(node) for node in coded(quantized)])
    ((whole, layers),) = audit_layers(quantized, Runtime(model), [x])
    return whole, {layer.layer: layer for layer in layers}


def test_a_float64_multiplier_is_found_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, x = near_halves()
    model = quantized_model(quantized)
    whole, layers = audited(quantized, x, model)
    assert all(layer.differing == 0 for layer in layers.values())
    assert whole == Audit(4, 4 * 4 * 12 * 12)
    monkeypatch.setattr("fnet_search.quant.simulator.rescale", in_float64)
    whole, layers = audited(quantized, x, model)
    assert list(layers) == ["exact", "halves", "after", "f"]
    assert layers["exact"] == LayerAudit("exact", 4 * 16 * 12 * 12, 0, 0)
    assert layers["halves"].differing > 100
    assert layers["halves"].largest == 1
    assert whole.differing == layers["f"].differing > 0


@pytest.mark.parametrize("name", ["stem", "grouped", "two", "average.norm", "deep", "dense", "last.norm", "out"])
def test_changed_weights_are_found_in_their_layer(name: str) -> None:
    """Those of the channel that varies most: many others are dead."""
    data = noise(MIXED, 20)
    x = data.normalise(data.train.images)
    quantized = quantize_trained(randomized(MIXED), Scheme(), data, 0).network
    (outputs,) = (output for node, output in quantized.codes(x) if node.name == quantized.carrier[name])
    channel = int(outputs.transpose(0, 1).flatten(1).float().std(1).argmax())
    model = quantized_model(quantized, weight_type="uint8")
    (weight,) = (constant for constant in model.graph.initializer if constant.name == f"{name}.weight")
    codes = numpy_helper.to_array(weight).copy()
    codes[channel] = 255 - codes[channel]
    weight.CopyFrom(numpy_helper.from_array(codes, weight.name))
    _, layers = audited(quantized, x, model)
    first = next(layer for layer in layers.values() if layer.differing)
    assert first.layer == quantized.carrier[name]
    assert first.largest > 1


def test_differences_by_hand() -> None:
    simulated = torch.tensor([[0.5, 1.0, -1.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 2.0, 1.0]])
    runtime = torch.tensor([[0.5, 1.0, -1.0], [2.0, 2.5, 0.0], [0.0, 0.0, 0.0], [3.0, 1.0, 1.5]])
    found = compare_codes(simulated, runtime)
    assert found == Audit(images=4, codes=12, differing=3, predictions=1)
    assert str(found) == "3 of 12 output codes and 1 of 4 predictions differ"
    assert compare_codes(simulated, simulated.clone()) == Audit(4, 12)


def test_audits_of_batches_add_up() -> None:
    quantized, x = near_halves()
    wrong = quantized_model(quantized)
    (bias,) = (constant for constant in wrong.graph.initializer if constant.name == "after.bias")
    bias.CopyFrom(numpy_helper.from_array(np.array([0, 0, 9999, 0], dtype=np.int32), bias.name))
    runtime = Runtime(with_outputs(wrong, [codes_name(node) for node in coded(quantized)]))
    whole, parts = (list(audit_layers(quantized, runtime, x.split(size))) for size in (4, 1))
    assert len(parts) == 4
    assert sum((one for one, _ in parts), Audit()) == whole[0][0]
    assert sum(audit(quantized, runtime, x.split(3)), Audit()) == whole[0][0]
    assert 0 < whole[0][0].differing <= 4 * 12 * 12
    for number, layer in enumerate(whole[0][1]):
        first, *others = (layers[number] for _, layers in parts)
        assert sum(others, first) == layer
