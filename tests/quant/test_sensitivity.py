import math
from collections.abc import Collection
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Activation, BatchNorm, Conv, Dense, Flatten, Pool
from fnet_search.arch.macroarchitecture import INPUT
from fnet_search.arch.plan import parse_plan
from fnet_search.importing.spaces import load_space
from fnet_search.quant.bias_correction import correct_biases
from fnet_search.quant.fold import FoldedNetwork, fold
from fnet_search.quant.quantize import quantize
from fnet_search.quant.ranges import calibrate, carriers
from fnet_search.quant.scheme import MINMAX, RangeMethod
from fnet_search.quant.sensitivity import (
    BATCH,
    PartlyQuantized,
    PartSensitivity,
    Sensitivity,
    sensitivity,
    stratified_sample,
)
from fnet_search.quant.simulator import QuantizedNetwork
from fnet_search.training.datasets import DataSet, Split
from fnet_search.training.network import Network
from tests.support.networks import MIXED, REUSED, batches_of, noise, randomized, sequence

TINY = load_space("tiny")
TINY_INIT1 = factorize(TINY, parse_plan(TINY, "init1"))
SPACES = {"mixed": MIXED, "reused": REUSED, "tiny": TINY_INIT1}

Prepared = tuple[FoldedNetwork, QuantizedNetwork, DataSet]


def prepared(
    trained: Network, images: int = 60, method: RangeMethod = MINMAX, per_channel: bool = False, corrected: bool = False
) -> Prepared:
    """With logits that are 0 in the mean, so that any class may win, and labels that are what the float network says:
    its accuracy is 1."""
    data = noise(trained.network, images)
    x, folded, last = data.normalise(data.train.images), fold(trained), trained.network.output
    if last in folded.bias:
        with torch.no_grad():
            folded = replace(folded, bias={**folded.bias, last: folded.bias[last] - folded(x).mean(0)})
    quantized = quantize(folded, calibrate(folded, batches_of(x), method), per_channel)
    if corrected:
        quantized = correct_biases(folded, quantized, batches_of(x))
    with torch.no_grad():
        split = Split(data.train.images, folded(x).argmax(1))
    return folded, quantized, replace(data, train=split, evaluation=split, test=split)


def images(data: DataSet) -> Tensor:
    return data.normalise(data.evaluation.images)


@torch.no_grad()
def naive(folded: FoldedNetwork, quantized: QuantizedNetwork, x: Tensor, parts: Collection[str]) -> dict[str, Tensor]:
    """Every node computed anew, with what a part is spelled out."""
    carrier = carriers(folded.network)

    def seen(name: str, tensor: Tensor) -> Tensor:
        if name not in parts:
            return tensor
        return quantized.params[name].dequantize(quantized.params[name].quantize(tensor))

    values = {INPUT: seen(INPUT, x)}
    for node in folded.network.order:
        inputs = [values[name] for name in node.inputs]
        if isinstance(node.layer, Conv | Dense) and carrier[node.name] in parts:
            layer, source = quantized.layers[node.name], quantized.params[carrier[node.inputs[0]]]
            scales = torch.tensor([one.scale for one in layer.params]).double() * source.scale
            bias = (layer.bias.double() * scales.float().double()).float()
            weight = layer.weight
            if isinstance(node.layer, Dense):
                output = F.linear(inputs[0], weight, bias)
            else:
                own = node.layer
                output = F.conv2d(inputs[0], weight, bias, own.stride, own.padding, own.dilation, own.groups)
        else:
            output = folded.apply_node(node, inputs)
        values[node.name] = seen(node.name, output)
    return values


@pytest.mark.parametrize("name", SPACES)
def test_what_is_reused_is_what_would_be_computed_to_the_bit(name: str) -> None:
    folded, quantized, data = prepared(randomized(SPACES[name]))
    network, x, last = PartlyQuantized(folded, quantized), images(data)[:9], folded.network.output
    everything = frozenset(quantized.params)
    assert everything == set(network.sources)
    with torch.no_grad():
        nothing_values, everything_values = network.values(x, frozenset()), network.values(x, everything)
        for part in network.sources:
            alone = network.logits(x, frozenset([part]), nothing_values, part)
            assert torch.equal(alone, naive(folded, quantized, x, [part])[last]), part
            without = everything - {part}
            all_but = network.logits(x, without, everything_values, part)
            assert torch.equal(all_but, naive(folded, quantized, x, without)[last]), part


@pytest.mark.parametrize("name", SPACES)
def test_no_part_quantized_is_the_float_network(name: str) -> None:
    folded, quantized, data = prepared(randomized(SPACES[name]))
    x = images(data)[:9]
    with torch.no_grad():
        values = PartlyQuantized(folded, quantized).values(x, frozenset())
        assert torch.equal(values[folded.network.output], folded(x))


@pytest.mark.parametrize(("per_channel", "corrected"), [(False, False), (True, True)])
@pytest.mark.parametrize("name", SPACES)
def test_all_parts_quantized_is_the_integer_network_but_for_rare_steps(
    name: str, per_channel: bool, corrected: bool
) -> None:
    folded, quantized, data = prepared(randomized(SPACES[name]), per_channel=per_channel, corrected=corrected)
    network, everything, x = PartlyQuantized(folded, quantized), frozenset(quantized.params), images(data)
    exact = {INPUT: network.input(x, everything)}
    with torch.no_grad():
        whole = network.values(x, everything)
        for node, codes in quantized.codes(x):
            output = network.apply(node, [exact[name] for name in node.inputs], everything)
            carrier = quantized.carrier[node.name]
            if node.name != carrier and network.sources[carrier] == node.name:
                exact[node.name] = output  # its ReLU comes, and is fused into it
                continue
            params = quantized.params[carrier]
            exact[node.name] = params.dequantize(codes)
            assert int((params.quantize(output).int() - codes.int()).abs().max()) <= 1, node.name
            assert float((params.quantize(whole[node.name]) != codes).double().mean()) < 0.01, node.name


def test_parts_are_all_that_is_quantized_once_and_named_after_what_makes_it() -> None:
    """A fused ReLU goes with its layer, also with an add; a norm of its own is a layer, as it was folded."""
    folded, quantized, _ = prepared(randomized(MIXED))
    assert PartlyQuantized(folded, quantized).sources == {
        "input": "input",
        "stem.act": "stem",
        "grouped": "grouped",
        "sum.act": "sum",
        "two": "two",
        "two.norm": "two.norm",
        "two.swish": "two.swish",
        "joined": "joined",
        "average": "average",
        "average.act": "average.norm",
        "deep": "deep",
        "deep.act": "deep.act",
        "gap": "gap",
        "dense.act": "dense",
        "last.norm": "last.norm",
        "out": "out",
    }


def test_relus_that_are_not_fused_are_parts() -> None:
    folded, quantized, _ = prepared(randomized(REUSED))
    assert list(PartlyQuantized(folded, quantized).sources.values()) == [
        *("input", "c", "r", "again", "both", "seen", "wide", "other", "end", "pool"),
    ]


def test_figures_are_those_of_networks_computed_one_by_one() -> None:
    """Over several batches, the last one not full."""
    folded, quantized, data = prepared(randomized(TINY_INIT1, 1), 2 * BATCH + 7, RangeMethod())
    labels = data.evaluation.labels.roll(3)  # the float network is not always right either
    split = Split(data.evaluation.images, torch.where(torch.arange(len(labels)) % 5 == 0, labels, labels.roll(-3)))
    told: list[tuple[int, int]] = []
    found = sensitivity(folded, quantized, data, split, lambda *progress: told.append(progress))
    total = 2 * BATCH + 7
    assert told == [(BATCH, total), (2 * BATCH, total), (total, total)]
    assert found.images == total

    x, last = images(data), folded.network.output
    everything = frozenset(quantized.params)

    def logits(parts: Collection[str]) -> Tensor:
        return naive(folded, quantized, x, parts)[last]

    def hits(parts: Collection[str]) -> list[bool]:
        right: list[bool] = (logits(parts).argmax(1) == split.labels).tolist()
        return right

    def paired(one: list[bool], two: list[bool]) -> tuple[float, float]:
        lost = sum(a and not b for a, b in zip(one, two, strict=True))
        won = sum(b and not a for a, b in zip(one, two, strict=True))
        mean = (lost - won) / total
        return mean, math.sqrt(((lost + won) / total - mean**2) / total)

    whole, fake = hits(()), hits(everything)
    assert found.fp32_accuracy == pytest.approx(sum(whole) / total)
    assert found.fake_accuracy == pytest.approx(sum(fake) / total)
    exact = (quantized(x).argmax(1) == split.labels).double().mean()
    assert found.quint8_accuracy == pytest.approx(float(exact))
    assert (found.drop, found.drop_error) == pytest.approx(paired(whole, fake))
    assert found.drop > 0
    assert [part.layer for part in found.parts] == list(PartlyQuantized(folded, quantized).sources.values())
    log_p = F.log_softmax(logits(()).double(), 1)
    for part, name in zip(found.parts, PartlyQuantized(folded, quantized).sources, strict=True):
        only, all_but = hits([name]), hits(everything - {name})
        assert part.only_accuracy == pytest.approx(sum(only) / total)
        assert part.all_but_accuracy == pytest.approx(sum(all_but) / total)
        assert (part.cost, part.cost_error) == pytest.approx(paired(whole, only))
        assert (part.gain, part.gain_error) == pytest.approx(paired(all_but, fake))
        log_q = F.log_softmax(logits([name]).double(), 1)
        kl = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
        assert part.only_kl == pytest.approx(kl, rel=1e-4, abs=1e-9)


CHAIN = sequence(
    (3, 8, 8),
    one=Conv(8, (3, 3), padding=(1, 1)),
    norm=BatchNorm(),
    act=Activation(),
    two=Conv(8, (1, 1), bias=True),
    act2=Activation(),
    three=Conv(8, (3, 3), padding=(1, 1)),
    act3=Activation(),
    gap=Pool("global_average"),
    flat=Flatten(),
    out=Dense(6),
)


@pytest.mark.parametrize(("spoiled", "reader"), [("one", "two"), ("two", "three")])
def test_a_layer_with_one_wide_channel_is_found(spoiled: str, reader: str) -> None:
    """A channel with a thousand times the range of the others takes all the codes. Nothing reads it: as a float
    network nothing has changed."""
    trained = randomized(CHAIN, 2)
    with torch.no_grad():
        trained.layer(spoiled).get_parameter("weight")[0] *= 1000
        trained.layer(reader).get_parameter("weight")[:, 0] = 0
    folded, quantized, data = prepared(trained)
    found = sensitivity(folded, quantized, data, data.evaluation)
    assert found.fp32_accuracy == 1
    assert found.costliest.layer == spoiled
    assert found.costliest.cost > 3 * found.costliest.cost_error
    assert all(part.cost < found.costliest.cost / 4 for part in found.parts if part.layer != spoiled)
    assert found.most_gained.layer == spoiled


def test_a_costly_sum_is_found() -> None:
    """Clipped far below its values."""
    trained = randomized(MIXED)
    folded, quantized, data = prepared(trained)
    narrow = replace(quantized.params["sum.act"], scale=quantized.params["sum.act"].scale / 50)
    spoiled = replace(quantized, params={**quantized.params, "sum.act": narrow})
    assert sensitivity(folded, quantized, data, data.evaluation).costliest.cost < 0.2
    found = sensitivity(folded, spoiled, data, data.evaluation)
    assert found.costliest.layer == "sum"
    assert found.costliest.cost > 0.2


def part(layer: str, cost: float = 0.0, gain: float = 0.0, only_kl: float = 0.0) -> PartSensitivity:
    return PartSensitivity(layer, 0.9 - cost, cost, 0.01, only_kl, 0.8 + gain, gain, 0.01)


def test_of_equal_costs_the_gain_and_then_the_divergence_decide() -> None:
    def found(*parts: PartSensitivity) -> Sensitivity:
        return Sensitivity(100, 0.9, 0.8, 0.8, 0.1, 0.01, parts)

    assert found(part("a", 0.1), part("b", 0.2), part("c", 0.1, 0.3)).costliest.layer == "b"
    assert found(part("a", 0.1), part("b", 0.2), part("c", 0.1, 0.3)).most_gained.layer == "c"
    assert found(part("a", 0.1, 0.1), part("b", 0.1, 0.2)).costliest.layer == "b"
    assert found(part("a", 0.1, 0.1, 2), part("b", 0.1, 0.1, 1)).costliest.layer == "a"
    assert found(part("a", 0.1, 0.1), part("b", 0.2, 0.1)).most_gained.layer == "b"


def test_a_sample_has_the_proportions_of_the_classes() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[
        torch.randperm(100, generator=torch.Generator().manual_seed(0))
    ]
    split = Split(torch.arange(100).view(-1, 1, 1, 1).expand(-1, 1, 2, 2), labels)
    chosen = stratified_sample(split, 10)
    assert torch.bincount(chosen.labels).tolist() == [5, 3, 2]
    numbers = chosen.images[:, 0, 0, 0]
    assert len(set(numbers.tolist())) == 10
    assert torch.equal(chosen.labels, labels[numbers])
    assert stratified_sample(split, 10).images.equal(chosen.images)
    assert stratified_sample(split, 100) is split
    assert stratified_sample(split, 1000) is split
