import json
import shutil
from dataclasses import replace
from functools import partial
from math import log10
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import nn

from fnet_policies import LayerGuided
from fnet_search.arch.costs import plan_cost
from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Activation, Add, BatchNorm, Conv, Dense, Flatten
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.arch.plan import legal_rates, make_plan, parse_plan, regular
from fnet_search.base.errors import FnetError
from fnet_search.candidates.evaluate import TRANSFORM_SAMPLES, evaluate
from fnet_search.candidates.job import Job, Setup, Start
from fnet_search.candidates.network_files import WEIGHTS, load_quantized, load_trained, write_codes
from fnet_search.candidates.probes import (
    CALIBRATED,
    ProbeTask,
    cut,
    fisher_score,
    probe_layer,
    probe_network,
    probe_tasks,
    probed_images,
    probes_for,
    probes_from,
    tail,
)
from fnet_search.importing.spaces import load_space
from fnet_search.importing.translation import from_module
from fnet_search.policy.asktell import AskTell
from fnet_search.policy.constraints import parse_constraints
from fnet_search.policy.evaluation import Probe, Probes
from fnet_search.quant.calibration import calibration_batches, folded_for, quantize_trained
from fnet_search.quant.quantize import quantize
from fnet_search.quant.ranges import calibrate
from fnet_search.quant.scheme import parse_scheme
from fnet_search.quant.simulator import QuantizedNetwork
from fnet_search.training.datasets import DataSet, Split, hold_out
from fnet_search.training.network import Network, build, walk
from fnet_search.training.recipe import load_recipe
from fnet_search.training.warm_start import warm_start
from fnet_search.training.weights import read_state
from tests.support.evaluations import residual_space
from tests.support.networks import CPU, MIXED, digits

TINY = load_space("tiny")
RECIPE = load_recipe("quick").with_epochs(1)


def setup_of(space: Macroarchitecture = TINY, scheme: str = "percentile:1") -> Setup:
    return Setup(space, RECIPE, (parse_scheme(scheme),), CPU, 3, "validation")


@pytest.fixture(scope="module")
def data() -> DataSet:
    return digits(400)


def trained(setup: Setup, data: DataSet, plan: str, folder: Path) -> Start:
    """A network of a plan, trained for an epoch."""
    parsed = parse_plan(setup.space, plan)
    assert evaluate(setup, data, Job(7, parsed, folder), lambda progress: None).state == "complete"
    return Start(7, parsed, folder, 1, setup.schemes[0])


@pytest.fixture(scope="module")
def start(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Start:
    return trained(setup_of(), data, "regular", tmp_path_factory.mktemp("regular"))


@pytest.fixture(scope="module")
def probes(data: DataSet, start: Start) -> Probes:
    return probe_network(setup_of(), data, start, fisher=True)


def test_a_chain_is_cut_right_before_the_layer() -> None:
    space = load_space("factorizenet")
    for layer in legal_rates(space):
        assert [cut(space, layer)] == list(space.by_name[layer].inputs)


def test_a_residual_network_is_cut_before_the_block() -> None:
    space = residual_space()
    assert cut(space, "block3.conv1") == "block2.act2"
    assert cut(space, "block3.conv2") == "block2.act2"  # the shortcut passes the first convolution by
    assert cut(space, "block1.conv2") == "stem"


def test_no_cut_parts_a_layer_from_its_norm_or_activation() -> None:
    assert cut(MIXED, "grouped") == "stem.act"
    assert cut(MIXED, "two") == "sum.act"
    assert cut(MIXED, "deep") == "most"


def test_a_norm_that_is_read_beside_its_activation_is_no_cut() -> None:
    """It would be a norm without its layer, and an activation that its layer does not clip at."""
    nodes = (
        Node("a", Conv(8), (INPUT,)),
        Node("a.norm", BatchNorm(), ("a",)),
        Node("a.act", Activation(), ("a.norm",)),
        Node("b", Conv(8, factorize=True), ("a.act",)),
        Node("sum", Add(), ("b", "a.norm")),
        Node("flat", Flatten(), ("sum",)),
        Node("out", Dense(5), ("flat",)),
    )
    kernels = [replace(node.layer, padding=(1, 1)) if isinstance(node.layer, Conv) else node.layer for node in nodes]
    padded = tuple(replace(node, layer=layer) for node, layer in zip(nodes, kernels, strict=True))
    assert cut(Macroarchitecture("beside", (3, 6, 6), padded), "b") == INPUT


@torch.no_grad()
@pytest.mark.parametrize("layer", ["block1.conv1", "block3.conv2", "block8.conv1"])
def test_a_tail_computes_what_the_whole_network_does(layer: str) -> None:
    space = residual_space()
    at = cut(space, layer)
    part = tail(space, at)
    torch.manual_seed(0)
    whole, rest = Network(space).eval(), Network(part).eval()
    weights = whole.state_dict()
    rest.load_state_dict({name: weights[name] for name in rest.state_dict()})
    x = torch.randn(3, *space.input_shape)
    outputs = {INPUT: x} | {node.name: output for node, output in walk(space, x, whole.apply_node)}
    assert torch.equal(rest(outputs[at]), whole(x))
    assert cut(part, layer) == INPUT


def test_every_rate_of_every_layer_is_probed_and_nothing_changed_once() -> None:
    space = load_space("factorizenet")
    tasks = probe_tasks(space, Start(0, regular(space), Path(), 1))
    assert sum(len(task.rates) for task in tasks) == 55 + 1
    assert [task.layer for task in tasks] == list(legal_rates(space))
    assert [task.rates[0] for task in tasks] == [2, 2, 2, 2, 2, 2, 2, 1]


def test_a_factorized_network_is_probed_at_multiples_of_its_rates() -> None:
    space = load_space("factorizenet")
    tasks = {task.layer: task.rates for task in probe_tasks(space, Start(0, parse_plan(space, "init8"), Path(), 1))}
    assert tasks["conv_64_1"] == (16, 32, 64)
    assert tasks["conv_128_2"] == (32, 64, 128)
    assert tasks["conv_256_3"] == (32, 64, 128, 256)  # first its own


def long_way(setup: Setup, data: DataSet, start: Start, layer: str, rate: int) -> tuple[list[float], list[float]]:
    """Losses, accuracies; energies of signal and noises: of the whole network, all of it computed."""
    parent = load_trained(setup.space, start.plan, start.folder)
    plan = make_plan(setup.space, {**start.plan.by_layer, layer: rate})
    child = Network(factorize(setup.space, plan)).eval()
    samples = calibration_batches(data, setup.seed, TRANSFORM_SAMPLES)
    warm_start(parent, child, samples)
    folded = folded_for(setup.schemes[0], child)
    before = quantize_trained(parent, setup.schemes[0], data, setup.seed)
    names = [INPUT, *(node.name for node in setup.space.order)]
    unchanged = set(names[: names.index(layer)]) & before.stats.keys()
    few = calibration_batches(data, setup.seed, CALIBRATED)
    stats = {**calibrate(folded, few, setup.schemes[0].ranges), **{name: before.stats[name] for name in unchanged}}
    network = quantize(folded, stats, setup.schemes[0].per_channel)
    part = probed_images(data)
    x = data.normalise(part.images)
    with torch.no_grad():
        y, y8, reference = folded(x), network(x), before.folded(x)
    losses = [float(F.cross_entropy(logits.double(), part.labels)) for logits in (y, y8)]
    accuracies = [float((logits.argmax(1) == part.labels).double().mean()) for logits in (y, y8)]
    energies = [float(z.double().square().sum()) for z in (reference, y - reference, y8 - reference)]
    return [*losses, *accuracies], energies


@pytest.mark.parametrize("scheme", ["percentile:1", "minmax+per-channel"])
def test_a_probe_is_what_the_whole_network_gives_with_that_change(scheme: str, data: DataSet, tmp_path: Path) -> None:
    setup = setup_of(scheme=scheme)
    start = trained(setup, data, "regular", tmp_path)
    for layer in legal_rates(TINY):
        task = ProbeTask(layer, legal_rates(TINY)[layer][1:3], start)
        for one in probe_layer(setup, data, task):
            expected, (signal, noise, quint8_noise) = long_way(setup, data, start, layer, one.rate)
            assert one.loss == pytest.approx(expected[0], rel=1e-4)
            assert one.quint8_loss == pytest.approx(expected[1], rel=1e-3)
            hits = [one.fp32_accuracy, one.quint8_accuracy]
            assert hits == pytest.approx(expected[2:], abs=2 / one.images)  # rounded otherwise, a batch at a time
            assert one.logit_snr_db == pytest.approx(10 * log10(signal / noise), abs=0.01)
            # Ranges differ in the sixth digit, and so some codes by one.
            assert one.logit_sqnr_db == pytest.approx(10 * log10(signal / quint8_noise), abs=0.2)
            assert one.images == 128  # a tenth of 287 would say too little
            assert one.conv_macs == plan_cost(TINY, make_plan(TINY, {layer: one.rate})).conv_macs


def test_a_tail_takes_the_codes_of_the_whole_network(
    data: DataSet, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its input has their scale and zero point, not a range of its own."""
    made: list[QuantizedNetwork] = []

    def spying(*arguments: Any) -> QuantizedNetwork:
        made.append(quantize(*arguments))
        return made[-1]

    monkeypatch.setattr("fnet_search.candidates.probes.quantize", spying)
    probe_layer(setup_of(), data, ProbeTask("conv_16_2", (2,), start))
    parent = load_trained(TINY, start.plan, start.folder)
    _, whole = load_quantized(parent, setup_of().schemes[0], start.folder)
    assert [one.params[INPUT] for one in made] == [whole.params["conv_16_1.act"]]


def test_the_unchanged_network_is_measured_as_it_is(data: DataSet, start: Start, probes: Probes) -> None:
    assert probes.number == start.number
    assert probes.plan == regular(TINY)
    one = probes.unchanged
    assert (one.layer, one.rate, one.layers, one.logit_snr_db) == ("", 1, (), None)
    parent = load_trained(TINY, start.plan, start.folder)
    folded, quantized = load_quantized(parent, setup_of().schemes[0], start.folder)
    part = probed_images(data)
    x = data.normalise(part.images)
    with torch.no_grad():
        hits = [float((network(x).argmax(1) == part.labels).double().mean()) for network in (folded, quantized)]
    assert one.fp32_accuracy == pytest.approx(hits[0], abs=2 / len(part))
    assert one.quint8_accuracy == pytest.approx(hits[1], abs=5 / len(part))  # its last layers are calibrated on fewer


def test_the_statistics_of_a_probe_are_those_of_the_changed_layer(probes: Probes) -> None:
    for one in probes.changes:
        names = [layer.layer for layer in one.layers]
        assert names == ([one.layer] if one.rate == 1 else [f"{one.layer}.grouped", f"{one.layer}.pointwise"])
        assert all(layer.weight_sqnr_db is not None for layer in one.layers)


def test_increases_are_over_the_unchanged_network(probes: Probes) -> None:
    table = probes.increase(TINY, lambda one: one.quint8_loss)
    assert {layer: len(values) for layer, values in table.items()} == {
        layer: len(rates) for layer, rates in legal_rates(TINY).items()
    }
    assert all(values[0] == 0 for values in table.values())
    one = probes.changes[0]
    assert table[one.layer][1] == one.quint8_loss - probes.unchanged.quint8_loss
    noise = probes.increase(TINY, lambda one: one.logit_noise)
    assert all((values[1:] > 0).all() for values in noise.values())


def test_probes_survive_json(probes: Probes) -> None:
    assert [Probe.from_json(one.to_json()) for one in probes.changes] == list(probes.changes)


def test_for_balanced_accuracy_probes_have_results_by_class(data: DataSet, start: Start, probes: Probes) -> None:
    setup = replace(setup_of(), metric="balanced-accuracy")
    found = probe_layer(setup, data, ProbeTask("conv_16_2", (2,), start))[0]
    (same,) = [one for one in probes.changes if (one.layer, one.rate) == ("conv_16_2", 2)]
    assert replace(found, classes=(), fisher=same.fisher) == same
    labels = probed_images(data).labels
    assert [one.images for one in found.classes] == torch.bincount(labels, minlength=10).tolist()
    assert sum(one.fp32_right for one in found.classes) == round(found.fp32_accuracy * len(labels))
    assert sum(one.quint8_right for one in found.classes) == round(found.quint8_accuracy * len(labels))
    assert Probe.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_factorized_network_can_be_probed(data: DataSet, tmp_path: Path) -> None:
    setup = setup_of()
    start = trained(setup, data, "f2", tmp_path)
    found = probe_network(setup, data, start)
    assert found.plan == parse_plan(TINY, "f2")
    rates = {(one.layer, one.rate) for one in found.changes}
    assert rates == {(layer, rate) for layer, of in legal_rates(TINY).items() for rate in of if rate > 2}
    noise = found.increase(TINY, lambda one: one.logit_noise)
    assert all(list(values[:2]) == [0, 0] for values in noise.values())  # less factorized, and as it is
    for one in found.changes:
        expected, _ = long_way(setup, data, start, one.layer, one.rate)
        assert one.loss == pytest.approx(expected[0], rel=1e-3)


def test_a_residual_network_can_be_probed(tmp_path: Path) -> None:
    setup, data = setup_of(residual_space(2)), digits(100)
    start = trained(setup, data, "regular", tmp_path)
    for layer in ("block1.conv2", "block2.conv1"):
        (one,) = probe_layer(setup, data, ProbeTask(layer, (4,), start))
        expected, (signal, noise, _) = long_way(setup, data, start, layer, 4)
        assert one.loss == pytest.approx(expected[0], rel=1e-3)
        assert one.logit_snr_db == pytest.approx(10 * log10(signal / noise), abs=0.05)


def test_probing_tells_how_far_it_is_and_gives_the_same_again(data: DataSet, start: Start, probes: Probes) -> None:
    task = probe_tasks(TINY, start)[0]
    seen: list[int] = []
    again = probe_layer(setup_of(), data, task, seen.append)
    assert seen == [*range(1, len(task.rates) + 1)]
    same = [replace(one, fisher=None) for one in probes.changes if one.layer == task.layer]
    assert list(again) == same


def test_missing_weights_are_named(data: DataSet, start: Start, tmp_path: Path) -> None:
    with pytest.raises(FnetError, match=r"weights\.safetensors"):
        probe_layer(setup_of(), data, ProbeTask("conv_8", (2,), replace(start, folder=tmp_path)))


def test_a_fisher_score_is_of_gates_on_the_channels(data: DataSet, probes: Probes) -> None:
    """With a gate of one on each channel of each image: half the mean square of the loss's derivatives by the gates."""
    setup, plan = setup_of(), make_plan(TINY, {"conv_8": 4})
    network = build(factorize(TINY, plan), RECIPE.initializer, setup.seed).train()
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(setup.seed))[:64]
    batch = data.train.take(chosen)
    gates: list[torch.Tensor] = []

    def gated(node: Node, inputs: list[torch.Tensor]) -> torch.Tensor:
        output = network.apply_node(node, inputs)
        if node.name not in ("conv_8.act", "conv_16_1.act", "conv_16_2.act"):
            return output
        gates.append(torch.ones(*output.shape[:2], 1, 1, requires_grad=True))
        return output * gates[-1]

    logits = [output for _, output in walk(network.network, data.normalise(batch.images), gated)][-1]
    F.cross_entropy(logits, batch.labels, reduction="sum").backward()
    derivatives = [gate.grad for gate in gates if gate.grad is not None]
    expected = sum(float(one.square().mean(0).sum()) / 2 for one in derivatives)
    (found,) = (one.fisher for one in probes.changes if (one.layer, one.rate) == ("conv_8", 4))
    assert len(derivatives) == 3
    assert found == pytest.approx(expected, rel=1e-4)
    assert fisher_score(setup, data, regular(TINY)) == probes.unchanged.fisher != found


def test_probes_of_all_layers_are_put_together_in_any_order(probes: Probes) -> None:
    measured = [*probes.changes, probes.unchanged]
    assert probes_from(7, regular(TINY), measured) == probes


@pytest.mark.parametrize(("held_out", "images"), [(100, 100), (287, 128), (2_500, 250), (5_000, 500), (10_000, 512)])
def test_a_tenth_of_the_validation_images_is_probed_on(held_out: int, images: int, data: DataSet) -> None:
    labels = torch.arange(held_out) % 10
    evaluation = Split(torch.zeros(held_out, 1, 1, 1, dtype=torch.uint8), labels)
    found = probed_images(replace(data, evaluation=evaluation))
    assert len(found) == images
    counts = found.labels.bincount()
    assert int(counts.max() - counts.min()) <= 1


def net() -> nn.Sequential:
    """A user's network, whose names in weights are its own."""
    torch.manual_seed(1)
    convolutions = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


def test_probes_for_a_loop_of_ones_own_are_those_of_a_search(data: DataSet, start: Start, probes: Probes) -> None:
    """Of the same weights, given as they may be, on the same images."""
    path = start.folder / WEIGHTS
    images = replace(data, evaluation=data.test, test=data.test)
    held = hold_out(images)
    setup = replace(setup_of(), seed=0)
    with_codes = probes_for(TINY, path, held, scheme="percentile:1", fisher=True)
    assert with_codes == probes_for("tiny", read_state(path), images, scheme=parse_scheme("percentile:1"), fisher=True)
    assert (with_codes.number, with_codes.plan) == (0, regular(TINY))
    trained = load_trained(TINY, regular(TINY), start.folder)
    prepared = quantize_trained(trained, setup.schemes[0], held, 0)
    write_codes(start.folder / "again", regular(TINY), trained, prepared)
    shutil.copy(path, start.folder / "again" / WEIGHTS)
    again = replace(start, number=0, folder=start.folder / "again")
    assert with_codes == probe_network(setup, held, again, fisher=True)
    assert [(one.layer, one.rate) for one in with_codes.changes] == [(one.layer, one.rate) for one in probes.changes]


def test_probes_for_a_module_and_tensors(data: DataSet) -> None:
    model, other = net().train(), net()
    with torch.no_grad():
        other[2].weight.mul_(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = data.normalise(data.train.images[:200, :, ::4, ::4]), data.train.labels[:200]
    found = probes_for(model, None, given)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    space = from_module(model, given[0][:1])
    assert [(one.layer, one.rate) for one in found.changes] == [
        (layer, rate) for layer, rates in legal_rates(space).items() for rate in rates[1:]
    ]
    assert AskTell(LayerGuided(), space, parse_constraints(space, "80%"), probes=found).ask() is not None
    by_class = parse_constraints(space, "80%", metric="balanced-accuracy")
    with pytest.raises(FnetError, match="no balanced accuracy; measure them with `metric` 'balanced-accuracy'"):
        AskTell(LayerGuided(), space, by_class, probes=found).ask()
    balanced = probes_for(model, None, given, metric="balanced-accuracy")
    assert AskTell(LayerGuided(), space, by_class, probes=balanced).ask() is not None
    measure = partial(probes_for, scheme="percentile:1")
    found = measure(model, None, given)
    assert measure(space, None, given) == found
    assert measure(model, other.state_dict(), given) == measure(other, None, given) != found
    float_mean = given[0].mean((0, 2, 3))
    shifted = (given[0] - float_mean[:, None, None], given[1])
    assert measure(model, None, shifted) != found, "tensors are read as they are"


@pytest.mark.parametrize(
    ("network", "weights", "images", "complaint"),
    [
        ("tiny", None, "digits", "space 'tiny' has no weights; give a file or a state dict"),
        (
            net(),
            {"0.weight": torch.zeros(1)},
            "digits",
            "do not fit: '0.bias', '2.weight', '2.bias' and 2 more are missing",
        ),
        (net(), "nowhere.pt", "digits", "the weights file nowhere.pt does not exist"),
        (net(), None, "digit", "unknown data set 'digit'; did you mean 'digits'?"),
        (net()[:1] + net()[3:], None, "digits", "there is nothing to factorize in"),
        (
            from_module(net(), torch.zeros(1, 3, 16, 16)),
            None,
            (torch.zeros(40, 3, 32, 32), torch.arange(40) % 10),
            "the network is for images of 3x16x16, 10 classes; the data are 3x32x32, 10 classes",
        ),
        (net(), None, (torch.zeros(40, 3, 32, 32, dtype=torch.uint8), torch.arange(40) % 10), "images must be float32"),
        (net(), None, (torch.zeros(40, 3, 32, 32), torch.zeros(30)), "images must be float32 [N, C, H, W]"),
    ],
)
def test_what_probes_cannot_be_measured_of(network: Any, weights: Any, images: Any, complaint: str) -> None:
    with pytest.raises(FnetError) as caught:
        probes_for(network, weights, images)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
