from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Activation, Add, Concat, Conv, Dense, Flatten, Layer, Pool
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.arch.plan import parse_plan
from fnet_search.importing.spaces import load_space
from fnet_search.quant.equalize import LayerPair, equalize, layer_pairs
from fnet_search.quant.fold import FoldedNetwork, fold
from fnet_search.quant.quantize import quantize
from fnet_search.quant.ranges import calibrate
from fnet_search.quant.scheme import MINMAX
from fnet_search.training.network import output_of
from tests.support.networks import MIXED, REUSED, batches_of, normal, randomized, sequence

TINY = load_space("tiny")
CHAINS: Mapping[str, Macroarchitecture] = {
    **{name: factorize(TINY, parse_plan(TINY, name)) for name in ("regular", "f4", "dws")},
    "depthwise with more outputs": sequence(
        (6, 9, 9), a=Conv(8), r=Activation(), b=Conv(16, (3, 3), groups=8), s=Activation(), c=Conv(4), f=Flatten()
    ),
    "groups on both sides": sequence(
        (6, 9, 9), a=Conv(12, groups=3), r=Activation(), b=Conv(8, (3, 2), groups=4), c=Conv(4, groups=2), f=Flatten()
    ),
    "pools and flatten": sequence(
        (3, 12, 12),
        a=Conv(6),
        r=Activation(),
        p=Pool("average", (3, 3), (2, 2), (1, 1)),
        b=Conv(8),
        m=Pool("max", (2, 2), (1, 1)),
        f=Flatten(),
        d=Dense(20),
        s=Activation(),
        e=Dense(5),
    ),
    "slopes": sequence(
        (3, 9, 9),
        a=Conv(6),
        r=Activation("prelu", per_channel=True),
        b=Conv(8),
        s=Activation("leaky_relu", 0.2),
        c=Conv(4),
        f=Flatten(),
    ),
    "global average": sequence((3, 9, 9), a=Conv(6), g=Pool("global_average"), f=Flatten(), d=Dense(7)),
}


def doubled(folded: FoldedNetwork) -> FoldedNetwork:
    return replace(
        folded,
        weight={name: tensor.double() for name, tensor in folded.weight.items()},
        bias={name: tensor.double() for name, tensor in folded.bias.items()},
    )


def uneven(space: Macroarchitecture, seed: int = 0) -> FoldedNetwork:
    """Channels of each layer a hundred times as wide as others."""
    folded = fold(randomized(space, seed))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in folded.weight.items():
        gain = 10 ** (2 * torch.rand(len(weight), generator=generator) - 1)
        weight.mul_(gain.view(-1, *[1] * (weight.ndim - 1)))
        folded.bias[name].mul_(gain)
    return folded


@pytest.mark.parametrize("space", [*CHAINS.values(), MIXED, REUSED], ids=[*CHAINS, "mixed", "reused"])
def test_the_function_is_the_same(space: Macroarchitecture) -> None:
    """But for the rounding of weights to float32, a few 2^-24: seen in float64, below 1e-6 of the largest logit."""
    folded = uneven(space)
    before = {name: tensor.clone() for name, tensor in folded.weight.items()}
    found = equalize(folded)
    x = normal(8, *space.input_shape).double()
    expected = doubled(folded)(x)
    assert float((doubled(found)(x) - expected).abs().max()) < 1e-6 * float(expected.abs().max())
    assert all(torch.equal(folded.weight[name], tensor) for name, tensor in before.items())
    assert {tensor.dtype for tensor in (*found.weight.values(), *found.bias.values())} == {torch.float32}
    moved = {name for name in before if not torch.equal(found.weight[name], before[name])}
    assert moved == {name for pair in layer_pairs(folded.network) for name in (pair.first, pair.second)}


def written_and_read(folded: FoldedNetwork, pair: LayerPair) -> tuple[Tensor, Tensor]:
    """Largest absolute weights of each channel between two layers, found by running |weights| on one channel each."""
    space, written = folded.network, folded.weight[pair.first].flatten(1).abs().amax(1)
    node, weight = space.by_name[pair.second], folded.weight[pair.second].abs()
    groups = node.layer.groups if isinstance(node.layer, Conv) else 1
    per_group = weight.shape[1]
    read = []
    for channel in range(len(written)):
        inputs = [channel * pair.repeat + pixel for pixel in range(pair.repeat)]
        seen = []
        for index in inputs:
            group, place = divmod(index, per_group)
            outputs = len(weight) // groups
            seen.append(float(weight[group * outputs : (group + 1) * outputs, place].max()))
        read.append(max(seen))
    return written, torch.tensor(read)


@pytest.mark.parametrize("space", CHAINS.values(), ids=CHAINS.keys())
def test_what_writes_a_channel_and_what_reads_it_are_as_wide(space: Macroarchitecture) -> None:
    folded = uneven(space)
    found = equalize(folded)
    chained = list(layer_pairs(folded.network))
    assert chained
    for pair in chained:
        written, read = written_and_read(folded, pair)
        assert float((written / read).log().abs().max()) > 1
        written, read = written_and_read(found, pair)
        before, after = folded.bias[pair.first].abs(), found.bias[pair.first].abs()
        assert float(after.max()) <= float(before.max()) * (1 + 1e-6)
        held = after > 0.9999 * before.max()
        assert torch.allclose(written[~held], read[~held], rtol=1e-3, atol=0)
        assert (written[held] <= read[held] * (1 + 1e-3)).all()
        assert held.sum() < len(held)


def test_two_layers_by_hand() -> None:
    folded = fold(randomized(sequence((1, 1, 1), a=Conv(2, (1, 1)), r=Activation(), f=Flatten(), b=Dense(2))))
    folded.weight["a"].copy_(torch.tensor([8.0, -0.5]).view(2, 1, 1, 1))
    folded.bias["a"].copy_(torch.tensor([4.0, 0.5]))
    folded.weight["b"].copy_(torch.tensor([[2.0, 1.0], [-1.0, -8.0]]))
    folded.bias["b"].copy_(torch.tensor([1.0, 2.0]))
    found = equalize(folded)  # by sqrt(8 / 2) and sqrt(0.5 / 8)
    assert found.weight["a"].flatten().tolist() == [4.0, -2.0]
    assert found.bias["a"].tolist() == [2.0, 2.0]
    assert found.weight["b"].tolist() == [[4.0, 0.25], [-2.0, -2.0]]
    assert found.bias["b"].tolist() == [1.0, 2.0]
    folded.bias["a"].copy_(torch.tensor([4.0, 2.0]))
    found = equalize(folded)  # by 2 / 4 instead: no bias grows beyond 4
    assert found.weight["a"].flatten().tolist() == [4.0, -1.0]
    assert found.bias["a"].tolist() == [2.0, 4.0]
    assert found.weight["b"].tolist() == [[4.0, 0.5], [-2.0, -4.0]]


@pytest.mark.parametrize("gain", [1.0, 1e-3, 1e-6])
def test_a_channel_of_small_weights_and_a_large_bias_does_not_stretch_the_range(gain: float) -> None:
    space = sequence((3, 8, 8), a=Conv(8), r=Activation(), b=Conv(8), f=Flatten(), d=Dense(4))
    folded, x = fold(randomized(space)), normal(64, 3, 8, 8)
    folded.weight["a"][0] *= gain
    folded.bias["a"][0] = 0.5
    errors = []
    for one in (folded, equalize(folded)):
        quantized = quantize(one, calibrate(one, batches_of(x), MINMAX))
        errors.append(float((one(x) - quantized(x)).square().mean()))
    assert errors[1] < 2 * errors[0]


def found_pairs(**layers: Layer) -> list[LayerPair]:
    return list(layer_pairs(sequence((4, 8, 8), **layers)))


def test_which_layers_are_a_pair() -> None:
    a, b, flat = Conv(4, padding=(1, 1), bias=True), Conv(4, bias=True), Flatten()
    assert found_pairs(a=a, b=b, f=flat) == [LayerPair("a", "b")]
    assert found_pairs(a=a, r=Activation(), m=Pool(), s=Activation(), b=b, f=flat) == [LayerPair("a", "b")]
    assert found_pairs(a=a, p=Pool("average"), f=flat, d=Dense(3)) == [LayerPair("a", "d", 4 * 4)]
    assert found_pairs(a=a, g=Pool("global_average"), f=flat, d=Dense(3)) == [LayerPair("a", "d", 1)]
    assert found_pairs(f=flat, d=Dense(3), e=Dense(2)) == [LayerPair("d", "e")]
    assert found_pairs(a=a, f=flat) == []
    for function in ("relu6", "sigmoid", "hardswish", "hardsigmoid", "silu"):
        assert found_pairs(a=a, r=Activation(function), b=b, f=flat) == []  # type: ignore[arg-type]
    assert found_pairs(a=a, r=Activation(), s=Activation("relu6"), b=b, f=flat) == []


def test_a_channel_with_another_reader_stays() -> None:
    a, b = Conv(4, (1, 1), bias=True), Conv(4, (1, 1), bias=True)

    def joined(*nodes: Node) -> list[LayerPair]:
        return list(layer_pairs(Macroarchitecture("n", (4, 8, 8), (*nodes, Node("f", Flatten(), (nodes[-1].name,))))))

    first = Node("a", a, (INPUT,))
    assert joined(first, Node("b", b, ("a",)), Node("s", Add(), ("a", "b"))) == []
    assert joined(first, Node("b", b, ("a",)), Node("s", Concat(), ("b", "a"))) == []
    assert joined(first, Node("s", Add(), ("a", INPUT)), Node("b", b, ("s",))) == []
    assert joined(first, Node("s", Add(), ("a", "a")), Node("b", b, ("s",))) == []
    assert joined(first, Node("s", Concat(), ("a", INPUT)), Node("b", b, ("s",))) == []
    assert joined(first, Node("b", b, ("a",)), Node("c", b, ("a",)), Node("s", Add(), ("b", "c"))) == []
    acts = (Node("r", Activation(), ("a",)), Node("b", b, ("r",)), Node("s", Add(), ("b", "r")))
    assert joined(first, *acts) == []


def test_a_mixed_networks_pairs() -> None:
    assert list(layer_pairs(fold(randomized(MIXED)).network)) == [
        LayerPair("average.norm", "deep"),
        LayerPair("dense", "last.norm"),
        LayerPair("last.norm", "out"),
    ]
    assert list(layer_pairs(REUSED)) == []


def test_channels_that_are_not_written_or_not_read_are_left_alone() -> None:
    folded = uneven(sequence((3, 6, 6), a=Conv(5), r=Activation(), b=Conv(4), f=Flatten()))
    folded.weight["a"][1] = 0
    folded.weight["b"][:, 3] = 0
    found = equalize(folded)
    for channel in (1, 3):
        assert torch.equal(found.weight["a"][channel], folded.weight["a"][channel])
        assert found.bias["a"][channel] == folded.bias["a"][channel]
        assert torch.equal(found.weight["b"][:, channel], folded.weight["b"][:, channel])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (*found.weight.values(), *found.bias.values()))
    assert not torch.equal(found.weight["a"][0], folded.weight["a"][0])


def test_what_is_equal_already_stays() -> None:
    once = equalize(uneven(CHAINS["f4"]))
    twice = equalize(once)
    for name, weight in once.weight.items():
        assert torch.allclose(twice.weight[name], weight, rtol=2e-3, atol=0), name
    x = normal(2, 3, 32, 32)
    assert torch.allclose(
        output_of(once.network, x, once.apply_node), twice(x), rtol=0, atol=1e-4 * float(once(x).abs().max())
    )
