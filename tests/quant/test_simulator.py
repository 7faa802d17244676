"""The integer simulator against the oracle."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import (
    Activation,
    Add,
    Concat,
    Conv,
    Dense,
    Flatten,
    Function,
    Layer,
    Multiply,
    Pool,
)
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.arch.plan import parse_plan
from fnet_search.base.errors import FnetError
from fnet_search.importing.spaces import load_space
from fnet_search.quant.quant_params import QuantParams
from fnet_search.quant.quantized_layer import QuantizedLayer
from fnet_search.quant.simulator import QuantizedNetwork, accumulate, lookup_table, rescale
from fnet_search.training.weights import read_tensors, write_tensors
from tests.support.networks import BENT, GATED, MIXED, REUSED, SCALED, normal, sequence
from tests.support.quint8_oracle import F32, added, check, clipped, dequantized, integer, requantized, summed


@pytest.mark.parametrize(("percentile", "per_channel"), [("0", False), ("1", False), ("20", False), ("1", True)])
@pytest.mark.parametrize("space", [MIXED, REUSED, GATED, SCALED, BENT], ids=lambda space: str(space.name))
def test_whole_networks(space: Macroarchitecture, percentile: str, per_channel: bool) -> None:
    for seed in range(2):
        x = normal(4, *space.input_shape, seed=seed)
        codes = check(integer(space, x[:3], percentile, seed, per_channel), x)
        assert all(len(np.unique(values)) > 3 for values in codes.values())


@pytest.mark.parametrize("plan", ["regular", "init2", "dws"])
def test_factorized_networks(plan: str) -> None:
    space = load_space("tiny")
    x = normal(2, *space.input_shape)
    check(integer(factorize(space, parse_plan(space, plan)), x), x)


def weights_of(layer: Conv | Dense, channels: int, kind: str, rng: np.random.Generator) -> QuantizedLayer:
    """Codes: random ones with an odd zero point, all 255, 0 and 255 about 128, random ones with a scale a channel."""
    if isinstance(layer, Conv):
        shape: tuple[int, ...] = (layer.out_channels, channels // layer.groups, *layer.kernel)
    else:
        shape = (layer.out_features, channels)
    codes = {
        "random": lambda: rng.integers(0, 256, shape),
        "full": lambda: np.full(shape, 255),
        "signs": lambda: rng.choice([0, 255], shape),
        "channels": lambda: rng.integers(0, 256, shape),
    }[kind]()
    zero = {"random": 77, "full": 0, "signs": 128, "channels": 128}[kind]
    scales = 0.013 * rng.uniform(0.2, 1, shape[0] if kind == "channels" else 1)
    bias = torch.from_numpy(rng.integers(-9999, 9999, shape[0]).astype(np.int32))
    params = tuple(QuantParams(float(scale), zero) for scale in scales.astype(F32))
    return QuantizedLayer(torch.from_numpy(codes.astype(np.uint8)), params, bias)


KINDS = ["random", "full", "signs", "channels"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layer", "channels", "size"),
    [
        (Conv(5), 3, (7, 6)),
        (Conv(4, (1, 1)), 9, (5, 5)),
        (Conv(6, (3, 2), (2, 1), (1, 2), (1, 2)), 4, (9, 8)),
        (Conv(8, (3, 3), (2, 2), (2, 1), groups=2), 6, (9, 8)),
        (Conv(24, (3, 3), (1, 1), (1, 1), groups=12), 12, (5, 5)),
        (Conv(64, (3, 3), (1, 1), (1, 1), groups=64), 64, (4, 4)),
        (Conv(5, (3, 3), padding=(1, 1)), 256, (4, 4)),
        (Conv(4, (3, 3), padding=(1, 1), groups=2), 128, (4, 4)),
        (Conv(4, (5, 5), (1, 1), (2, 2)), 100, (5, 5)),
        (Conv(2, (17, 17), padding=(1, 1)), 2, (17, 17)),
        (Conv(2, (18, 18), padding=(1, 1), groups=2), 2, (18, 17)),
        (Dense(7), 40, None),
        (Dense(3), 4096, None),
    ],
    ids=str,
)
def test_sums_are_exact(layer: Conv | Dense, channels: int, size: tuple[int, int] | None, kind: str) -> None:
    """Those whose sums leave the integers of float32 too: with 29 full 3x3 channels, 259 full inputs, 17x17 windows."""
    rng = np.random.default_rng(1)
    weights = weights_of(layer, channels, kind, rng)
    shape = (3, channels, *(size or ()))
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[0] = 255
    for zero in (0, 13, 255):
        total = accumulate(layer, torch.from_numpy(codes), zero, weights)
        assert total.dtype == torch.int32
        assert np.array_equal(total.numpy(), summed(layer, codes, zero, weights))


def test_these_sums_leave_the_integers_of_float32() -> None:
    """What the test above is about: there a plain float32 sum is wrong."""
    rng = np.random.default_rng(1)
    layer = Dense(3)
    weights = weights_of(layer, 4096, "random", rng)
    codes = rng.integers(0, 256, (3, 4096)).astype(np.uint8)
    total = summed(layer, codes, 0, weights)
    assert np.abs(total).max() > 1 << 24
    assert not np.array_equal(total.astype(F32).astype(np.int64), total)


def given(rng: np.random.Generator, scale: float, zero: int) -> QuantParams:
    return QuantParams(float(F32(scale * rng.uniform(0.7, 1.4))), zero)


ZEROS = [(0, 0), (255, 0), (0, 255), (3, 101), (127, 128), (201, 77)]


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layer",
    [
        Conv(6, padding=(1, 1)),
        Conv(8, padding=(2, 2), dilation=(2, 2), groups=4),
        Conv(8, stride=(2, 2), padding=(1, 1), groups=8),
        Dense(20),
    ],
    ids=str,
)
def test_layers_with_weights_and_any_zero_points(layer: Conv | Dense, kind: str, zeros: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 256, (6, 8, 9, 8))
    codes[0], codes[1] = 255, 0
    seen = codes.reshape(6, -1) if isinstance(layer, Dense) else codes
    weights, source = weights_of(layer, seen.shape[1], kind, rng), given(rng, 0.03, zeros[0])
    reach = np.abs(summed(layer, seen, source.zero, weights)).max()
    target = given(rng, source.scale * weights.params[0].scale * reach / 200, zeros[1])
    layers: dict[str, Layer] = (
        {"f": Flatten(), "op": layer} if isinstance(layer, Dense) else {"op": layer, "f": Flatten()}
    )
    network = QuantizedNetwork(sequence((8, 9, 8), **layers), {INPUT: source, "op": target}, {"op": weights})
    check(network, torch.from_numpy(dequantized(codes, source)))


FUNCTIONS: tuple[Function, ...] = ("relu", "relu6", "hardswish", "hardsigmoid", "sigmoid", "silu")


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize(
    "layer",
    [
        Pool("global_average"),
        Pool("average"),
        Pool("average", (3, 2), (2, 1), (1, 1)),
        Pool("average", (3, 2), (2, 2), (1, 1), count_padding=True),
        Pool("average", (3, 3), (3, 2), (1, 0), ceil=True),
        Pool("average", (9, 8)),
        Pool("average", (9, 8), padding=(0, 1)),
        Pool("max", (3, 3), (2, 2), (1, 1)),
        Pool("max", (2, 3), (2, 3), ceil=True),
        *(Activation(function) for function in FUNCTIONS),
    ],
    ids=str,
)
def test_layers_without_weights_and_any_zero_points(layer: Layer, zeros: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 256, (6, 8, 9, 8))
    codes[0], codes[1] = 255, 0
    source, target = given(rng, 0.03, zeros[0]), given(rng, 0.02, zeros[1])
    network = QuantizedNetwork(sequence((8, 9, 8), op=layer, f=Flatten()), {INPUT: source, "op": target}, {})
    check(network, torch.from_numpy(dequantized(codes, source)))


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("joint", [Add(), Multiply(), Concat()], ids=str)
@pytest.mark.parametrize("order", [("other", INPUT), (INPUT, "other"), (INPUT, INPUT)])
@pytest.mark.parametrize("function", [None, "relu", "relu6"])
def test_joints_with_any_zero_points(
    joint: Layer, order: tuple[str, str], function: Function | None, zeros: tuple[int, int]
) -> None:
    rng = np.random.default_rng(6)
    depthwise = Conv(8, (1, 1), groups=8)
    nodes = [Node("other", depthwise, (INPUT,)), Node("joint", joint, order)]
    if INPUT == order[0] == order[1]:
        nodes = nodes[1:]
    params = {INPUT: given(rng, 0.03, zeros[0]), "other": given(rng, 0.04, zeros[1])}
    if function:
        nodes.append(Node("act", Activation(function), ("joint",)))
    params[nodes[-1].name] = given(rng, 0.05, 0 if function else zeros[0])
    nodes.append(Node("f", Flatten(), (nodes[-1].name,)))
    codes = rng.integers(0, 256, (3, 8, 5, 5))
    layers = {"other": weights_of(depthwise, 8, "random", rng)}
    network = QuantizedNetwork(Macroarchitecture("n", (8, 5, 5), tuple(nodes)), params, layers)
    check(network, torch.from_numpy(dequantized(codes, params[INPUT])))


def test_a_concat_of_equal_parameters_copies() -> None:
    params = QuantParams(float(F32(0.1)), 9)
    nodes = (Node("c", Concat(), (INPUT, INPUT)), Node("f", Flatten(), ("c",)))
    network = QuantizedNetwork(Macroarchitecture("n", (1, 16, 16), nodes), {INPUT: params, "c": params}, {})
    codes = torch.arange(256).view(1, 1, 16, 16)
    assert check(network, params.dequantize(codes))["f"].tolist() == [[*range(256), *range(256)]]


def test_a_concat_of_equal_scales_moves_the_zero_point() -> None:
    source, target = QuantParams(float(F32(0.1)), 9), QuantParams(float(F32(0.1)), 12)
    nodes = (Node("c", Concat(), (INPUT, INPUT)), Node("f", Flatten(), ("c",)))
    network = QuantizedNetwork(Macroarchitecture("n", (1, 2, 2), nodes), {INPUT: source, "c": target}, {})
    x = source.dequantize(torch.tensor([0, 9, 251, 255]).view(1, 1, 2, 2))
    assert check(network, x)["f"].tolist() == [[3, 12, 254, 255] * 2]


def test_requantizing_adds_the_zero_point_after_rounding() -> None:
    total = torch.tensor([-3, -1, 0, 1, 3, 5, 600, -600], dtype=torch.int32)
    half = torch.tensor([0.5])
    assert rescale(total[None], half, QuantParams(1.0, 3)).tolist() == [[1, 3, 3, 3, 5, 5, 255, 0]]
    assert rescale(total[None], half, QuantParams(1.0, 0)).tolist() == [[0, 0, 0, 0, 2, 2, 255, 0]]


def test_each_channel_has_its_multiplier() -> None:
    total = torch.tensor([[[3], [-5]], [[100], [7]]], dtype=torch.int32)
    found = rescale(total, torch.tensor([2.0, 0.5]), QuantParams(1.0, 10))
    assert found.tolist() == [[[16], [8]], [[210], [14]]]  # -2.5 and 3.5 go to the even


def test_requantizing_multiplies_in_float32() -> None:
    """With a float64 product a few of these would differ by one."""
    rng = np.random.default_rng(0)
    target = QuantParams(1.0, 100)
    differ = 0
    for multiplier in rng.uniform(1e-6, 1e-5, 50).astype(F32):
        halves = ((rng.integers(-100, 155, 2000) + 0.5) / float(multiplier)).astype(np.int64)
        total = np.concatenate([halves, halves + 1, halves - 1]).astype(np.int32)
        found = rescale(torch.from_numpy(total[None]), torch.tensor([multiplier]), target).numpy()
        assert np.array_equal(found, requantized(total[None], np.array([multiplier]), target))
        differ += int((found != clipped(np.rint(total * float(multiplier)) + 100)).sum())
    assert differ > 10


def test_an_average_pool_adds_the_zero_point_before_rounding() -> None:
    """The mean of 1 and 2 is 1.5, and 1.5 + 1 rounds to 2, though 1.5 rounds to 2 and 2 + 1 is 3."""
    nodes = (Node("p", Pool("average", (1, 2)), (INPUT,)), Node("f", Flatten(), ("p",)))
    params = {INPUT: QuantParams(1.0, 0), "p": QuantParams(1.0, 1)}
    network = QuantizedNetwork(Macroarchitecture("n", (1, 1, 4), nodes), params, {})
    assert check(network, torch.tensor([[[[1.0, 2.0, 1.0, 2.0]]]]))["p"].tolist() == [[[[2, 2]]]]


def test_a_global_average_divides_by_a_rounded_product() -> None:
    """With these scales 0.3 / (0.1 * 6) is 0.5 in float32, and 0.3 / 0.1 / 6 a little less: halves tell."""
    nodes = (Node("p", Pool("global_average"), (INPUT,)), Node("f", Flatten(), ("p",)))
    third, tenth = F32(0.3), np.nextafter(F32(0.1), F32(1))
    assert third / (tenth * F32(6)) == 0.5 > third / tenth / F32(6)
    params = {INPUT: QuantParams(float(third), 0), "p": QuantParams(float(tenth), 0)}
    network = QuantizedNetwork(Macroarchitecture("n", (3, 2, 3), nodes), params, {})
    codes = torch.zeros(1, 3, 2, 3)
    codes[0, :, 0, 0] = torch.tensor([3.0, 7.0, 11.0])
    assert check(network, params[INPUT].dequantize(codes))["f"].tolist() == [[2, 4, 6]]  # of 1.5, 3.5, 5.5


@pytest.mark.parametrize("order", [(INPUT, "b"), ("b", INPUT)])
def test_an_add_fuses_in_the_order_of_its_inputs(order: tuple[str, str]) -> None:
    """With these scales a tenth of all sums are halves in real numbers; rounding decides."""
    of_a, of_b, target = (QuantParams(float(F32(scale)), zero) for scale, zero in ((1.0, 110), (0.3, 179), (0.6, 162)))
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (1, 4, 30, 30))
    other = Conv(4, (1, 1))
    weights = QuantizedLayer(
        torch.from_numpy(rng.integers(0, 256, (4, 4, 1, 1)).astype(np.uint8)),
        (QuantParams(float(F32(0.001)), 128),),
        torch.zeros(4, dtype=torch.int32),
    )
    nodes = (Node("b", other, (INPUT,)), Node("sum", Add(), order), Node("f", Flatten(), ("sum",)))
    params = {INPUT: of_a, "b": of_b, "sum": target}
    network = QuantizedNetwork(Macroarchitecture("n", (4, 30, 30), nodes), params, {"b": weights})
    found = check(network, torch.from_numpy(dequantized(codes, of_a)))
    (a, b), (of_a, of_b) = ([values[name] for name in order] for values in (found, params))
    assert (added(b, a, of_b, of_a, target) != found["sum"]).mean() > 0.03
    r_a, r_b = (F32(one.scale) / F32(target.scale) for one in (of_a, of_b))
    c = F32(target.zero) - (r_a * F32(of_a.zero) + r_b * F32(of_b.zero))
    one_by_one = clipped(np.rint(a.astype(F32) * r_a + (b.astype(F32) * r_b + c)))
    assert (one_by_one != found["sum"]).sum() > 10


def test_tables() -> None:
    source, target = QuantParams(0.0625, 128), QuantParams(0.03125, 10)
    assert lookup_table(None, source, source).tolist() == list(range(256))
    assert lookup_table(None, QuantParams(1.0, 0), QuantParams(2.0, 7)).tolist()[:6] == [7, 7, 8, 9, 9, 9]
    relu, relu6, sigmoid, slopes = (
        lookup_table(layer, source, target).tolist()
        for layer in (*map(Activation, ("relu", "relu6", "hardsigmoid")), Activation("leaky_relu", (0.0, -0.5)))
    )
    assert relu == [[min(255, 10 + 2 * max(0, q - 128)) for q in range(256)]]
    assert relu6 == [[10 + min(192, 2 * max(0, q - 128)) for q in range(256)]]
    assert sigmoid[0][128] == 10 + 16
    assert slopes == [*relu, [min(255, 10 + max(2 * (q - 128), 128 - q)) for q in range(256)]]


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_quantized_network_comes_back_from_its_file(tmp_path: Path, per_channel: bool) -> None:
    x = normal(4, *MIXED.input_shape)
    network = integer(MIXED, x, per_channel=per_channel)
    write_tensors(tmp_path / "q", network.to_tensors(), {})
    tensors, _ = read_tensors(tmp_path / "q")
    found = QuantizedNetwork.from_tensors(network.network, tensors)
    assert found.params == network.params
    assert {name: layer.params for name, layer in found.layers.items()} == {
        name: layer.params for name, layer in network.layers.items()
    }
    assert torch.equal(found(x), network(x))
    assert found.to_tensors().keys() == tensors.keys()


@pytest.mark.parametrize(
    "name", ["input.output.zero", "deep.act.output.scale", "out.bias", "stem.weight", "stem.weight.zero"]
)
def test_a_file_that_lacks_something_is_refused(name: str) -> None:
    network = integer(MIXED, normal(2, *MIXED.input_shape))
    tensors = network.to_tensors()
    del tensors[name]
    with pytest.raises(FnetError, match=rf"do not fit the network: '{name}' is missing"):
        QuantizedNetwork.from_tensors(network.network, tensors)


def test_a_product_adds_the_zero_point_before_rounding() -> None:
    """1 / 2 + 3 = 3.5 rounds to 4, 9 / 2 + 3 = 7.5 to 8; halves rounded first, to even, would give 3 and 7."""
    one, target = QuantParams(1.0, 0), QuantParams(2.0, 3)
    nodes = (Node("m", Multiply(), (INPUT, "c")), Node("f", Flatten(), ("m",)))
    gate = Node("c", Pool("max", (1, 1)), (INPUT,))
    network = QuantizedNetwork(Macroarchitecture("n", (1, 1, 2), (gate, *nodes)), {INPUT: one, "m": target}, {})
    x = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)
    ((_, codes),) = [step for step in network.codes(x) if step[0].name == "m"]
    assert codes.flatten().tolist() == [round(1 / 2 + 3), round(9 / 2 + 3)]
