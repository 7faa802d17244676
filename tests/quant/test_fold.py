from math import sqrt

import pytest
import torch

from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Activation, Add, BatchNorm, Conv, Dense, Flatten, Foldable, Layer, Pool
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.arch.plan import parse_plan
from fnet_search.importing.spaces import load_space
from fnet_search.quant.fold import fold
from fnet_search.training.network import Network
from tests.support.networks import BENT, MIXED, SCALED, normal, randomized, sequence

CASES: dict[str, dict[str, Layer]] = {
    "conv and norm": {"c": Conv(8), "n": BatchNorm(), "f": Flatten()},
    "conv with bias and norm": {"c": Conv(8, bias=True), "n": BatchNorm(1e-5), "f": Flatten()},
    "grouped conv and norm": {"c": Conv(8, groups=4, stride=(2, 1), padding=(1, 0)), "n": BatchNorm(), "f": Flatten()},
    "depthwise conv and norm": {"c": Conv(8, groups=8, dilation=(2, 1)), "n": BatchNorm(), "f": Flatten()},
    "dense and norm": {"f": Flatten(), "d": Dense(9), "n": BatchNorm(), "e": Dense(4)},
    "dense without bias and norm": {"f": Flatten(), "d": Dense(9, False), "n": BatchNorm()},
    "norm first": {"n": BatchNorm(), "c": Conv(4), "f": Flatten()},
    "norm after a pool": {"c": Conv(6), "p": Pool(), "n": BatchNorm(), "a": Activation(), "f": Flatten()},
    "norm after a ReLU": {"c": Conv(6), "a": Activation(), "n": BatchNorm(), "f": Flatten()},
    "norm on a vector": {"f": Flatten(), "n": BatchNorm(), "d": Dense(5)},
    "two norms": {"c": Conv(6), "n": BatchNorm(), "m": BatchNorm(0.1), "f": Flatten()},
    "three norms on a vector": {"f": Flatten(), "n": BatchNorm(), "m": BatchNorm(0.1), "o": BatchNorm()},
}
ADDED = (
    Node("a", Conv(8, padding=(1, 1)), (INPUT,)),
    Node("b", Conv(8, padding=(1, 1)), (INPUT,)),
    Node("s", Add(), ("b", "a")),
    Node("n", BatchNorm(), ("s",)),
    Node("f", Flatten(), ("n",)),
)
SHARED = (
    Node("c", Conv(8), (INPUT,)),
    Node("n", BatchNorm(), ("c",)),
    Node("s", Add(), ("c", "n")),
    Node("f", Flatten(), ("s",)),
)
SPREAD = (
    Node("c", Conv(8), (INPUT,)),
    Node("n", BatchNorm(), ("c",)),
    Node("r", Activation(), ("n",)),
    Node("s", Add(), ("r", "n")),
    Node("f", Flatten(), ("s",)),
)
NETWORKS = {
    **{name: sequence((8, 9, 11), **layers) for name, layers in CASES.items()},
    "norm after an add": Macroarchitecture("n", (8, 9, 11), ADDED),
    "norm after a conv that another layer reads": Macroarchitecture("n", (8, 9, 11), SHARED),
    "norm that two layers read": Macroarchitecture("n", (8, 9, 11), SPREAD),
    "mixed": MIXED,
    "scaled": SCALED,
    "bent": BENT,
}


SCALES = ("centred", "stem", "stem.act", "lifted", "body", "sum", "sum.scale")


@pytest.mark.parametrize("space", NETWORKS.values(), ids=NETWORKS.keys())
def test_a_folded_network_computes_the_same(space: Macroarchitecture) -> None:
    for seed in range(3):
        network = randomized(space, seed)
        x = normal(6, *space.input_shape, seed=seed)
        folded = fold(network)
        assert not any(isinstance(node.layer, Foldable) for node in folded.network.nodes)
        assert folded.weight.keys() == folded.bias.keys()
        with torch.no_grad():
            expected = network.double()(x.double())
            worst = (folded(x) - expected).abs().max() / expected.abs().max()
        assert worst < 2e-6


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("conv and norm", ["c", "f"]),
        ("dense and norm", ["f", "d", "e"]),
        ("norm after a pool", ["c", "p", "n", "a", "f"]),
        ("two norms", ["c", "f"]),
        ("three norms on a vector", ["f", "n"]),
        (
            "scaled",
            ["centred", "stem", "stem.act", "lifted", "body", "sum", "sum.scale", "gap", "flat", "flat.scale", "out"],
        ),
        ("norm after an add", ["a", "b", "s", "n", "f"]),
        ("norm after a conv that another layer reads", ["c", "n", "s", "f"]),
        ("norm that two layers read", ["c", "r", "s", "f"]),
    ],
)
def test_a_norm_goes_into_the_layer_before_it_where_it_alone_reads_it(name: str, nodes: list[str]) -> None:
    assert [node.name for node in fold(randomized(NETWORKS[name])).network.nodes] == nodes


def test_what_read_a_folded_norm_reads_the_layer() -> None:
    folded = fold(randomized(NETWORKS["norm that two layers read"])).network
    assert {node.name: node.inputs for node in folded.nodes} == {
        "c": (INPUT,),
        "r": ("c",),
        "s": ("r", "c"),
        "f": ("s",),
    }


def test_a_norm_without_a_layer_becomes_depthwise_or_diagonal() -> None:
    folded = fold(randomized(NETWORKS["norm after a pool"]))
    assert folded.network.by_name["n"].layer == Conv(6, (1, 1), groups=6, bias=True)
    assert folded.weight["n"].shape == (6, 1, 1, 1)
    folded = fold(randomized(NETWORKS["norm on a vector"]))
    length = 8 * 9 * 11
    assert folded.network.by_name["n"].layer == Dense(length)
    assert torch.equal(folded.weight["n"], torch.diag(folded.weight["n"].diagonal()))


def test_layers_keep_their_options_and_get_a_bias() -> None:
    folded = fold(randomized(NETWORKS["grouped conv and norm"]))
    expected = Conv(8, groups=4, stride=(2, 1), padding=(1, 0), bias=True)
    assert folded.network.by_name["c"].layer == expected
    plain = fold(randomized(sequence((3, 5, 5), c=Conv(4), f=Flatten())))
    assert plain.network.by_name["c"].layer == Conv(4, bias=True)
    assert torch.equal(plain.bias["c"], torch.zeros(4))


def test_folding_by_hand() -> None:
    network = Network(sequence((1, 1, 1), c=Conv(1, (1, 1), bias=True), n=BatchNorm(0.5), f=Flatten())).eval()
    values = {"weight": 3.0, "bias": -2.0, "running_mean": 5.0, "running_var": 1.75}
    for name, value in values.items():
        network.layer("n").state_dict()[name].fill_(value)
    network.layer("c").state_dict()["weight"].fill_(0.25)
    network.layer("c").state_dict()["bias"].fill_(0.125)
    folded = fold(network)
    gain = 3 / sqrt(1.75 + 0.5)
    assert folded.weight["c"].item() == pytest.approx(0.25 * gain)
    assert folded.bias["c"].item() == pytest.approx((0.125 - 5) * gain - 2)


def test_folding_is_rounded_once() -> None:
    """In float64, stored as float32: chains of float32 operations differ in the last bit here and there."""
    network = randomized(NETWORKS["conv with bias and norm"])
    folded = fold(network)
    conv = {name: tensor.double() for name, tensor in network.layer("c").state_dict().items()}
    norm = {name: tensor.double() for name, tensor in network.layer("n").state_dict().items()}
    gain = norm["weight"] / (norm["running_var"] + 1e-5).sqrt()
    assert folded.weight["c"].dtype == folded.bias["c"].dtype == torch.float32
    assert torch.equal(folded.weight["c"], (conv["weight"] * gain.view(-1, 1, 1, 1)).float())
    exact = (conv["bias"] - norm["running_mean"]) * gain + norm["bias"]
    torch.testing.assert_close(folded.bias["c"], exact.float(), rtol=2e-7, atol=0)


def test_folding_changes_nothing_in_what_was_trained() -> None:
    space = load_space("tiny")
    network = randomized(factorize(space, parse_plan(space, "init2")))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = fold(network)
    for tensor in [*folded.weight.values(), *folded.bias.values()]:
        assert not tensor.requires_grad
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
