from fractions import Fraction
from math import log10

import pytest
import torch
from torch import Tensor

from fnet_search.arch.costs import network_cost
from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Activation, BatchNorm, Conv, Dense, Flatten, Pool
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture
from fnet_search.arch.plan import parse_plan
from fnet_search.importing.spaces import load_space
from fnet_search.policy.evaluation import LayerStats
from fnet_search.quant.fold import FoldedNetwork, fold
from fnet_search.quant.layer_statistics import channel_precision, profile, sqnr_db
from fnet_search.quant.quantize import quantize
from fnet_search.quant.ranges import TensorStats, calibrate
from fnet_search.quant.scheme import RangeMethod
from fnet_search.quant.simulator import QuantizedNetwork
from fnet_search.training.network import Network
from tests.support.networks import MIXED, batches_of, normal, randomized, sequence


def test_channel_precision_by_hand() -> None:
    """Ranges 2, 0.5 and 0 (dead) of a tensor that spans -1 to 2."""
    low, high = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([1.0, 0.5, 2.0])
    precision, dead = channel_precision(low, high)
    assert precision == pytest.approx((2 / 3 + 0.5 / 3 + 0) / 3)
    assert dead == 1


def test_channel_precision_at_its_ends() -> None:
    same = torch.tensor([-1.0, -1.0]), torch.tensor([3.0, 3.0])
    assert channel_precision(*same) == (1, 0)
    assert channel_precision(torch.zeros(4), torch.zeros(4)) == (0, 4)
    assert channel_precision(torch.tensor([5.0]), torch.tensor([5.0])) == (0, 1)
    apart = torch.tensor([0.0, 7.0]), torch.tensor([0.0, 7.0])
    assert channel_precision(*apart) == (0, 2)


def test_sqnr_by_hand() -> None:
    assert sqnr_db(1000, 1) == pytest.approx(30)
    assert sqnr_db(1, 100) == pytest.approx(-20)
    assert sqnr_db(5, 2) == pytest.approx(10 * log10(5 / 2))
    assert sqnr_db(5, 0) is None
    assert sqnr_db(0, 5) is None
    assert sqnr_db(0, 0) is None


Profiled = tuple[Network, FoldedNetwork, QuantizedNetwork, dict[str, TensorStats]]


def profiled(
    trained: Network, x: Tensor, percentile: str = "1", per_channel: bool = False
) -> tuple[Profiled, dict[str, LayerStats]]:
    folded = fold(trained)
    stats = dict(calibrate(folded, batches_of(x), RangeMethod("percentile", Fraction(percentile))))
    parts = (trained, folded, quantize(folded, stats, per_channel), stats)
    return parts, {layer.layer: layer for layer in profile(*parts, [(part, part) for part in x.split(3)])}


def noise_db(x: Tensor, seen: Tensor) -> float:
    return 10 * log10(float(x.double().square().sum()) / float((x.double() - seen.double()).square().sum()))


def test_one_row_a_layer_with_weights_in_network_order() -> None:
    _, found = profiled(randomized(MIXED), normal(8, *MIXED.input_shape))
    assert [(name, layer.kind) for name, layer in found.items()] == [
        ("stem", "conv"),
        ("grouped", "conv"),
        ("two", "conv"),
        ("deep", "conv"),
        ("dense", "dense"),
        ("out", "dense"),
    ]
    norms = 2 * (8 + 6 + 20 + 12 + 12)
    assert sum(layer.params for layer in found.values()) + norms == network_cost(MIXED).params
    assert sum(layer.macs for layer in found.values()) == network_cost(MIXED).total_macs
    assert found["grouped"].macs == 9 * 2 * 8 * 12 * 10
    assert found["grouped"].params == 9 * 2 * 8 + 8


SMALL = sequence(
    (2, 6, 6),
    c=Conv(5, (3, 3)),
    n=BatchNorm(),
    r=Activation(),
    d=Conv(4, (1, 1), bias=True),
    p=Pool(),
    f=Flatten(),
    o=Dense(3),
)


def dead_channel(seed: int) -> Network:
    """Channel 1 of the first layer has no weights and a negative offset, channel 2 a negative offset only."""
    trained = randomized(SMALL, seed)
    trained.layer("c").state_dict()["weight"][1] = 0
    norm = trained.layer("n").state_dict()
    for name, value in (("weight", 1.0), ("bias", -9.0), ("running_mean", 0.0), ("running_var", 1.0)):
        norm[name][1:3] = value
    return trained


@pytest.mark.parametrize(("percentile", "per_channel"), [("0", False), ("1", False), ("20", False), ("1", True)])
def test_a_layer_by_hand(percentile: str, per_channel: bool) -> None:
    trained = dead_channel(1)
    x = normal(10, 2, 6, 6)
    (_, folded, network, stats), found = profiled(trained, x, percentile, per_channel)
    layer = found["c"]
    raw = trained.layer("c").get_parameter("weight").detach()
    weight = folded.weight["c"]
    y = torch.relu(torch.nn.functional.conv2d(x, weight, folded.bias["c"]))
    low, high = stats["r"].low, stats["r"].high
    assert (layer.weight_min, layer.weight_max) == (float(raw.min()), float(raw.max()))
    assert (layer.folded_min, layer.folded_max) == (float(weight.min()), float(weight.max()))
    assert (layer.activation_min, layer.activation_max) == (low, high)
    assert low == 0
    assert (high < float(y.max())) == (percentile != "0")

    def precision(channels: Tensor) -> float:
        ranges = channels.flatten(1).amax(1) - channels.flatten(1).amin(1)
        return float((ranges / (channels.max() - channels.min())).mean())

    assert layer.weight_precision == pytest.approx(precision(raw), rel=1e-6)
    assert layer.folded_precision == pytest.approx(precision(weight), rel=1e-6)
    assert layer.activation_precision == pytest.approx(precision(y.clamp(low, high).transpose(0, 1)), rel=1e-5)
    assert layer.dead_weight_channels == 1
    assert layer.dead_activation_channels == 2
    assert layer.sparsity == float((y == 0).sum()) / y.numel() > 2 / 5
    codes = network.layers["c"]
    params = codes.params if per_channel else codes.params * len(weight)
    held = torch.stack([one.dequantize(channel) for one, channel in zip(params, codes.codes, strict=True)])
    assert layer.weight_sqnr_db == pytest.approx(noise_db(weight, held), rel=1e-6)


@pytest.mark.parametrize("percentile", ["0", "1"])
def test_noise_of_activations_by_hand(percentile: str) -> None:
    x = normal(10, 2, 6, 6)
    (_, folded, network, _), found = profiled(dead_channel(2), x, percentile)
    values: dict[str, Tensor] = {}
    y = torch.relu(torch.nn.functional.conv2d(x, folded.weight["c"], folded.bias["c"]))
    values["r"] = y
    values["d"] = torch.nn.functional.conv2d(y, folded.weight["d"], folded.bias["d"])
    pooled = torch.nn.functional.max_pool2d(values["d"], 2).flatten(1)
    values["o"] = torch.nn.functional.linear(pooled, folded.weight["o"], folded.bias["o"])
    codes = {node.name: output for node, output in network.codes(x)}
    for name, carrier in {"c": "r", "d": "d", "o": "o"}.items():
        params, whole = network.params[carrier], values[carrier]
        local = noise_db(whole, params.dequantize(params.quantize(whole)))
        accumulated = noise_db(whole, params.dequantize(codes[carrier]))
        assert found[name].activation_sqnr_db == pytest.approx(local, rel=1e-4)
        assert found[name].accumulated_sqnr_db == pytest.approx(accumulated, rel=1e-4)
        assert found[name].layer == name
    assert found["o"].accumulated_sqnr_db != found["o"].activation_sqnr_db


def test_noise_adds_up() -> None:
    space = load_space("tiny")
    space = factorize(space, parse_plan(space, "f4"))
    _, found = profiled(randomized(space), normal(8, *space.input_shape), "0")
    pairs = [(layer.activation_sqnr_db, layer.accumulated_sqnr_db) for layer in found.values()]
    assert all(local is not None and accumulated is not None and local > accumulated for local, accumulated in pairs)


def test_none_where_there_is_no_noise_or_no_signal() -> None:
    """Weights, image and outputs are whole numbers that 8 bits hold exactly; the second layer is dead."""
    space = sequence((1, 1, 255), c=Conv(1, (1, 1)), d=Conv(1, (1, 1)), f=Flatten())
    trained = Network(space).eval()
    trained.layer("c").state_dict()["weight"].fill_(1)
    trained.layer("d").state_dict()["weight"].fill_(0)
    x = torch.arange(255.0).add(1).view(1, 1, 1, 255)
    _, found = profiled(trained, x, "0")
    assert (found["c"].activation_sqnr_db, found["c"].accumulated_sqnr_db) == (None, None)
    assert found["c"].sparsity == 0
    dead = found["d"]
    assert (dead.weight_sqnr_db, dead.activation_sqnr_db, dead.accumulated_sqnr_db) == (None, None, None)
    assert (dead.weight_precision, dead.folded_precision, dead.activation_precision) == (0, 0, 0)
    assert (dead.dead_weight_channels, dead.dead_activation_channels, dead.sparsity) == (1, 1, 1)


def test_a_layer_that_a_norm_follows_elsewhere_is_measured_on_its_own_output() -> None:
    space = sequence((2, 4, 4), c=Conv(3, (1, 1)), p=Pool(), n=BatchNorm(), r=Activation(), f=Flatten())
    parts, found = profiled(randomized(space), normal(8, 2, 4, 4))
    assert list(found) == ["c"]
    assert (found["c"].activation_min, found["c"].activation_max) == (parts[3]["c"].low, parts[3]["c"].high)
    assert found["c"].activation_min < 0


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_batches_make_no_difference(batch: int) -> None:
    x = normal(12, *MIXED.input_shape)
    parts, found = profiled(randomized(MIXED), x)
    for layer in profile(*parts, [(part, part) for part in x.split(batch)]):
        for name in ("weight_sqnr_db", "activation_sqnr_db", "accumulated_sqnr_db"):
            assert getattr(layer, name) == pytest.approx(getattr(found[layer.layer], name), rel=1e-4)


def test_the_input_is_no_layer() -> None:
    space: Macroarchitecture = sequence((3, 2, 2), f=Flatten(), d=Dense(2))
    parts, found = profiled(randomized(space), normal(4, 3, 2, 2))
    assert INPUT in parts[3]
    assert list(found) == ["d"]
