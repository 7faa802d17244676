from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Activation, Add, BatchNorm, Concat, Conv, Dense, Flatten, Layer, Pad, Pool
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.arch.plan import parse_plan
from fnet_search.base.errors import FnetError
from fnet_search.importing.spaces import load_space
from fnet_search.quant.calibration import calibration_batches
from fnet_search.quant.fold import fold
from fnet_search.training import warm_start as warmstart
from fnet_search.training.datasets import Batches, DataSet
from fnet_search.training.network import Network, build, walk
from fnet_search.training.recipe import Augmentation, Recipe
from fnet_search.training.train import Checkpoint, train
from fnet_search.training.warm_start import warm_start
from tests.support.networks import CPU, SCALED, batches_of, digits, normal, randomized, sequence

TINY = load_space("tiny")


def single(conv: Conv, norm: bool = True) -> Macroarchitecture:
    """One convolution on 8 channels, and what has to follow."""
    after: dict[str, Layer] = {"bn": BatchNorm()} if norm else {}
    tail: dict[str, Layer] = {"act": Activation(), "gap": Pool("global_average"), "flat": Flatten(), "out": Dense(5)}
    return sequence((8, 10, 9), conv=conv, **after, **tail)


PLAIN = single(Conv(12, padding=(1, 1), factorize=True))


def residual(bias: bool) -> Macroarchitecture:
    """Add, concat, dilation, stride, an uneven kernel, another activation, a norm that is not the only reader."""
    return Macroarchitecture(
        "residual",
        (8, 10, 9),
        (
            Node("one", Conv(8, padding=(1, 1), factorize=True), (INPUT,)),
            Node("one.bn", BatchNorm(), ("one",)),
            Node("one.act", Activation("hardswish"), ("one.bn",)),
            Node("two", Conv(8, padding=(2, 2), dilation=(2, 2), factorize=True), ("one.act",)),
            Node("two.bn", BatchNorm(), ("two",)),
            Node("sum", Add(), ("two.bn", "one.act")),
            Node("three", Conv(12, (3, 1), (2, 1), (1, 0), bias=bias, factorize=True), ("sum",)),
            Node("three.bn", BatchNorm(), ("three",)),
            Node("both", Concat(), ("three", "three.bn")),
            Node("gap", Pool("global_average"), ("both",)),
            Node("flat", Flatten(), ("gap",)),
            Node("out", Dense(5), ("flat",)),
        ),
    )


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
IMAGES = normal(150, 8, 10, 9, seed=1)


def of(space: Macroarchitecture, plan: str) -> Macroarchitecture:
    return factorize(space, parse_plan(space, plan))


def fresh(space: Macroarchitecture, plan: str, seed: int = 3) -> Network:
    return build(of(space, plan), "glorot_uniform", seed).eval()


def started(parent: Network, space: Macroarchitecture, plan: str, images: Tensor = IMAGES, seed: int = 3) -> Network:
    child = fresh(space, plan, seed)
    warm_start(parent, child, batches_of(*images.split(64)))
    return child


def tensors(network: Network) -> dict[str, Tensor]:
    return {name.removeprefix("layers.").replace("/", "."): it for name, it in network.state_dict().items()}


def differing(one: Network, other: Network) -> set[str]:
    """Parameters and buffers that only one of them has, or that are not the same bits."""
    first, second = tensors(one), tensors(other)
    shared = first.keys() & second.keys()
    return (first.keys() ^ second.keys()) | {name for name in shared if not torch.equal(first[name], second[name])}


@torch.no_grad()
def output_of(network: Network, name: str, x: Tensor = IMAGES) -> Tensor:
    """What the node of that name gives, or the last of a factorized layer."""
    wanted = {name, f"{name}.pointwise"}
    return next(output for node, output in walk(network.network, x, network.apply_node) if node.name in wanted)


def lost(parent: Network, child: Network, name: str, x: Tensor = IMAGES) -> float:
    """The mean squared error of what a layer gives, as a share of its variance."""
    wanted = output_of(parent, name, x)
    return float((wanted - output_of(child, name, x)).square().mean() / wanted.var())


def convolution(network: Network, name: str) -> nn.Conv2d:
    layer = network.layer(name)
    assert isinstance(layer, nn.Conv2d)
    return layer


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms that lift so far that no ReLU cuts anything; hardly any ridge."""
    monkeypatch.setattr(warmstart, "SHIFT", 12.0)
    monkeypatch.setattr(warmstart, "PATCH_RIDGE", 1e-8)
    monkeypatch.setattr(warmstart, "POINTWISE_RIDGE", 1e-9)


@pytest.mark.parametrize("plan", ["regular", "f2", "dws"])
def test_of_the_same_plan_it_is_a_copy(plan: str) -> None:
    parent = randomized(of(TINY, plan))
    assert differing(parent, started(parent, TINY, plan, normal(4, 3, 32, 32))) == set()


def test_only_changed_layers_and_the_norms_after_them_differ() -> None:
    parent = randomized(of(TINY, "conv_8=2"))
    child = started(parent, TINY, "conv_8=2,conv_16_1=4", normal(16, 3, 32, 32))
    assert {name for name in differing(parent, child) if not name.startswith("conv_16_1")} == set()
    norm = {name for name in differing(parent, child) if name.startswith("conv_16_1.bn")}
    assert norm == {"conv_16_1.bn.running_mean", "conv_16_1.bn.running_var"}


def representable(conv: Conv) -> Network:
    """Its kernel is a pointwise one times a grouped one of rate 2. A norm follows, or it has a bias."""
    space = single(conv, norm=not conv.bias)
    parent = randomized(of(space, "regular"))
    grouped = normal(8, 4, *conv.kernel, seed=5)
    whole = torch.zeros(8, 8, *conv.kernel)
    whole[:4, :4], whole[4:, 4:] = grouped[:4], grouped[4:]
    pointwise = normal(conv.out_channels, 8, seed=6)
    convolution(parent, "conv").weight.data = torch.einsum("oc,cdhw->odhw", pointwise, whole) / 8
    return parent


@pytest.mark.parametrize(
    "conv",
    [
        Conv(12, padding=(1, 1), factorize=True),
        Conv(12, (1, 1), factorize=True),
        Conv(12, (3, 2), (2, 1), (0, 1), factorize=True),
        Conv(12, padding=(2, 1), dilation=(2, 1), stride=(1, 2), factorize=True),
        Conv(8, padding=(1, 1), bias=True, factorize=True),
    ],
)
@pytest.mark.usefixtures("linear")
def test_a_parent_that_groups_can_represent_is_found(conv: Conv) -> None:
    """To the rounding, also on other images."""
    parent, space = representable(conv), single(conv, norm=not conv.bias)
    child = started(parent, space, "f2")
    assert lost(parent, child, "act") < 1e-6
    assert lost(parent, child, "act", normal(50, 8, 10, 9, seed=9)) < 1e-6
    assert lost(parent, fresh(space, "f2"), "act") > 0.5


def test_without_a_norm_or_a_bias_after_it() -> None:
    """No offset is possible: the mean of the outputs has to come from hidden channels above zero, at a price."""
    space = single(Conv(4, padding=(1, 1), factorize=True), norm=False)
    parent = randomized(of(space, "regular"))
    child = started(parent, space, "f2")
    wanted, found = output_of(parent, "conv"), output_of(child, "conv")
    assert lost(parent, child, "conv") < 0.3
    assert ((wanted - found).mean((0, 2, 3)).abs() < 0.1 * wanted.std((0, 2, 3))).all()


@pytest.mark.usefixtures("linear")
def test_few_outputs_need_few_hidden_channels() -> None:
    """Two outputs: four channels a group are enough for any kernel, two of them idle."""
    space = single(Conv(2, padding=(1, 1), factorize=True))
    parent = randomized(of(space, "regular"))
    child = started(parent, space, "f2")
    assert lost(parent, child, "act") < 1e-6
    assert all(tensor.isfinite().all() for tensor in tensors(child).values())


def test_the_relu_cuts_little() -> None:
    """With the norm as it is, in a child whose groups can represent nearly all; hidden channels have unit variance, are
    lifted by SHIFT, and have their longer tail up."""
    space = single(Conv(2, padding=(1, 1), factorize=True))
    parent, images = randomized(of(space, "regular")), IMAGES.square()
    child = started(parent, space, "f2", images)
    assert 1e-6 < lost(parent, child, "act", images) < 0.02
    z = output_of(child, "conv.norm", images)
    used = z.var((0, 2, 3)) > 0.5
    assert int(used.sum()) == 4
    torch.testing.assert_close(z.mean((0, 2, 3))[used], torch.full((4,), warmstart.SHIFT), rtol=0.02, atol=0)
    torch.testing.assert_close(z.var((0, 2, 3))[used], torch.ones(4), rtol=0.02, atol=0)
    assert ((z - z.mean((0, 2, 3), keepdim=True)).pow(3).mean((0, 2, 3))[used] > 0).all()


def test_the_norm_after_a_layer_gives_the_same_mean_and_variance() -> None:
    """Though the child's layer loses much."""
    parent = randomized(of(PLAIN, "regular"))
    child = started(parent, PLAIN, "dws")
    wanted, found = output_of(parent, "bn"), output_of(child, "bn")
    assert lost(parent, child, "bn") > 0.2
    spread = wanted.std((0, 2, 3))
    assert ((wanted.mean((0, 2, 3)) - found.mean((0, 2, 3))) / spread).abs().max() < 0.01
    torch.testing.assert_close(found.std((0, 2, 3)), spread, rtol=0.05, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_any_graph(bias: bool) -> None:
    space = residual(bias)
    parent = randomized(of(space, "regular"))
    child = started(parent, space, "f2")
    for name in ("one.act", "sum", "both", "out"):
        assert lost(parent, child, name) < 0.5
        assert lost(parent, child, name) < 0.5 * lost(parent, fresh(space, "f2"), name)
    changed = {name for name in differing(parent, child) if name.startswith("three.bn")}
    moved = {"three.bn.running_mean", "three.bn.running_var"}
    assert changed == (moved if bias else set()), "what the concat reads has no norm to move it"


def test_affine_layers_are_copied() -> None:
    """Constants and trained ones; the norm within a factorized layer has weights where those around it have none."""
    images = normal(150, *SCALED.input_shape)
    parent = randomized(of(SCALED, "regular"))
    child = started(parent, SCALED, "body=2", images)
    parts = {"grouped": ("weight",), "norm": ("weight", "bias", *STATISTICS), "pointwise": ("weight",)}
    changed = {f"body.{part}.{name}" for part, names in parts.items() for name in names}
    moved = {"body_norm.running_mean", "body_norm.running_var"}
    assert differing(parent, child) == {"body.weight"} | changed | moved
    assert lost(parent, child, "sum", images) < 0.5 * lost(parent, fresh(SCALED, "body=2"), "sum", images)


def test_learned_slopes_are_copied() -> None:
    space = sequence(
        (3, 8, 8),
        stem=Conv(8),
        slopes=Activation("prelu", per_channel=True),
        one=Conv(8, factorize=True),
        slope=Activation("prelu"),
        zeros=Pad((0, 1, 0), (0, 0, 2)),
        two=Conv(8, factorize=True),
        flat=Flatten(),
    )
    parent = randomized(space)
    x = normal(64, 3, 8, 8)
    child = started(parent, space, "two=2", x)
    assert differing(parent, child) == {"two.weight", *(name for name in tensors(child) if name.startswith("two."))}
    with torch.no_grad():
        expected = parent(x)
        assert float((child(x) - expected).square().mean()) < 0.5 * float(expected.var())


def test_without_changes_before_them_layers_keep_their_bits() -> None:
    """Only `three` is another: all up to it computes the same."""
    space = residual(True)
    parent = randomized(of(space, "one=2"))
    child = started(parent, space, "one=2,three=4")
    assert torch.equal(output_of(parent, "sum"), output_of(child, "sum"))
    assert lost(parent, child, "three") < 0.6


def assembled(space: Macroarchitecture, plan: str, parts: Iterable[Network]) -> Network:
    """A network with each layer's tensors from the first of the others that has them."""
    network = fresh(space, plan)
    found: dict[str, Tensor] = {}
    for part in parts:
        found = {**part.state_dict(), **found}
    network.load_state_dict({name: found[name] for name in network.state_dict()})
    return network


def test_a_layer_is_fitted_to_what_the_child_feeds_it() -> None:
    """It makes good in part what the layers before it lose: more than layers that were fitted apart."""
    space = residual(True)
    parent = randomized(of(space, "regular"))
    child = started(parent, space, "dws")
    apart = assembled(space, "dws", [started(parent, space, f"{name}=8") for name in ("three", "two", "one")])
    assert torch.equal(output_of(child, "one"), output_of(apart, "one"))
    assert lost(parent, child, "three") < 0.97 * lost(parent, apart, "three")


def test_groups_are_fitted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """On channels that resemble each other one group can stand in for another: more so with each sweep."""
    images = IMAGES + 2 * normal(150, 1, 10, 9, seed=4)
    parent = randomized(of(PLAIN, "regular"))
    losses = []
    for sweeps in range(4):
        monkeypatch.setattr(warmstart, "SWEEPS", sweeps)
        losses.append(lost(parent, started(parent, PLAIN, "dws", images), "bn", images))
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.65 * losses[0], "in one sweep each group makes up for those before it"


@pytest.mark.usefixtures("linear")
def test_what_other_groups_give_is_not_taken_for_a_groups_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the inputs of all groups resemble each other; without any sweep."""
    monkeypatch.setattr(warmstart, "SWEEPS", 0)
    images = IMAGES + 2 * IMAGES[:, :1]
    parent = representable(Conv(12, padding=(1, 1), factorize=True))
    assert lost(parent, started(parent, PLAIN, "f2", images), "act", images) < 1e-6


def test_an_error_counts_for_what_the_norm_makes_of_it() -> None:
    """Of twelve outputs two count ten times as much: those are given better, at the cost of the others."""
    even, uneven = (randomized(of(PLAIN, "regular")) for _ in range(2))
    for parent, gain in ((even, 1.0), (uneven, 10.0)):
        norm = parent.layer("bn")
        assert isinstance(norm, nn.BatchNorm2d)
        norm.weight.data.fill_(1)
        norm.weight.data[:2] = gain
        output = output_of(parent, "conv")
        norm.running_mean, norm.running_var = output.mean((0, 2, 3)), output.var((0, 2, 3))
    wanted = output_of(even, "conv")
    errors = []
    for parent in (even, uneven):
        found = output_of(started(parent, PLAIN, "f4"), "conv")
        apart = (found - wanted) - (found - wanted).mean((0, 2, 3), keepdim=True)
        errors.append(apart.square().mean((0, 2, 3)) / wanted.var((0, 2, 3)))
    assert errors[1][:2].mean() < 0.5 * errors[0][:2].mean()
    assert errors[1][2:].mean() > errors[0][2:].mean()


def factorized_parent(mixed: bool, lift: float) -> Network:
    """Of rate 2; its grouped kernel is one of rate 4, or one of rate 4 whose channels are mixed in each group."""
    parent = randomized(of(PLAIN, "f2"))
    kernel = normal(8, 4, 3, 3, seed=7)
    for channel in range(8):
        kernel[channel, 2 if channel % 4 < 2 else 0 :][:2] = 0
    if mixed:
        turn = torch.linalg.qr(normal(4, 4, seed=8))[0]
        kernel = torch.cat([torch.einsum("cd,dehw->cehw", turn, part) for part in kernel.split(4)])
    convolution(parent, "conv.grouped").weight.data = kernel
    norm = parent.layer("conv.norm")
    assert isinstance(norm, nn.BatchNorm2d)
    z = output_of(parent, "conv.grouped")
    norm.running_mean, norm.running_var = z.mean((0, 2, 3)), z.var((0, 2, 3))
    norm.weight.data.copy_(1 + 0.3 * normal(8, seed=9))
    norm.bias.data.copy_(lift + 0.5 * normal(8, seed=10))
    return parent


@pytest.mark.usefixtures("linear")
def test_a_factorized_parent_whose_channels_can_be_imitated() -> None:
    """Its ReLU cuts half of all, which nothing linear gives."""
    parent = factorized_parent(mixed=False, lift=0)
    assert lost(parent, started(parent, PLAIN, "f4"), "bn") < 1e-4
    assert lost(parent, started(parent, PLAIN, "dws"), "bn") < 0.8


@pytest.mark.usefixtures("linear")
def test_a_factorized_parent_that_is_nearly_linear() -> None:
    """Each of its channels reads more than a group of the child, but what they make of all can be made."""
    parent = factorized_parent(mixed=True, lift=12)
    assert lost(parent, started(parent, PLAIN, "f4"), "bn") < 1e-4


def test_the_same_bits_twice_whatever_was_in_the_child() -> None:
    space = residual(True)
    parent = randomized(of(space, "one=2"))
    before = {name: tensor.clone() for name, tensor in tensors(parent).items()}
    one, two = started(parent, space, "f4", seed=3), started(parent, space, "f4", seed=4)
    assert differing(one, two) == set()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(parent).items())


def test_the_child_stays_in_its_mode() -> None:
    parent = randomized(of(PLAIN, "regular"))
    child = fresh(PLAIN, "f4").train()
    warm_start(parent, child, batches_of(*IMAGES.split(64)))
    assert child.training
    assert child.layer("conv.norm").training
    assert differing(child, started(parent, PLAIN, "f4")) == set()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in child.parameters())


def test_channels_that_say_nothing() -> None:
    """Images without anything on three channels, a parent without anything in an output, and one without anything."""
    images = IMAGES.clone()
    images[:, 2:5] = 0
    parent = randomized(of(PLAIN, "regular"))
    convolution(parent, "conv").weight.data[3] = 0
    for plan in ("f2", "dws"):
        child = started(parent, PLAIN, plan, images)
        assert all(tensor.isfinite().all() for tensor in tensors(child).values())
        assert output_of(child, "bn", images).isfinite().all()
    convolution(parent, "conv").weight.data.zero_()
    child = started(parent, PLAIN, "f2", images)
    assert lost_nothing(output_of(parent, "bn", images), output_of(child, "bn", images))


def lost_nothing(wanted: Tensor, found: Tensor) -> bool:
    return torch.allclose(wanted, found, rtol=1e-4, atol=1e-4)


def message(parent: Macroarchitecture, child: Macroarchitecture) -> str:
    with pytest.raises(FnetError) as caught:
        warm_start(randomized(parent), randomized(child), batches_of(IMAGES))
    return str(caught.value)


def test_rates_must_be_multiples() -> None:
    wrong = "layer 'two' cannot start from its parent: its rate {} is not a multiple of the parent's rate 4"
    space = residual(True)
    for plan, rate in (("regular", 1), ("f2", 2)):
        assert message(of(space, "one=1,two=4"), of(space, plan)) == wrong.format(rate)


@pytest.mark.parametrize(
    ("other", "layer"),
    [
        (single(Conv(12, factorize=True)), "conv"),
        (single(Conv(8, padding=(1, 1), factorize=True)), "conv"),
        (single(Conv(12, padding=(1, 1), factorize=True), norm=False), "bn"),
        (sequence((8, 10, 9), **{node.name: node.layer for node in PLAIN.order} | {"act": Activation("silu")}), "act"),
        (sequence((8, 9, 9), **{node.name: node.layer for node in PLAIN.order}), "input"),
    ],
)
def test_spaces_must_be_the_same(other: Macroarchitecture, layer: str) -> None:
    reason = f"a warm start needs two plans of one space; these networks differ in layer {layer!r}"
    assert message(of(other, "regular"), of(PLAIN, "f2")) == reason
    assert message(of(other, "f2"), of(PLAIN, "f4")) == reason


@pytest.fixture(scope="module")
def data() -> DataSet:
    return digits(800)


@pytest.fixture(scope="module")
def parents(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Network]:
    """Trained on the digits."""
    recipe = Recipe("test", 6, 32, 0.1, weight_decay=5e-4, augmentation=Augmentation(shift=0.05))
    folder: Path = tmp_path_factory.mktemp("parents")
    found = {}
    for plan in ("regular", "f2"):
        network = build(of(TINY, plan), recipe.initializer, 0)
        train(network, data, recipe, CPU, 0, lambda progress: None, Checkpoint(folder / plan, plan))
        found[plan] = network.eval()
    return found


def accuracy(network: Network, data: DataSet) -> float:
    logits = fold(network)(data.normalise(data.evaluation.images))
    return float((logits.argmax(1) == data.evaluation.labels).double().mean())


@pytest.mark.parametrize(
    ("parent", "plan", "drop"),
    [
        ("regular", "f2", 0.02),
        ("regular", "init2", 0.05),
        ("regular", "dws", 0.25),
        ("f2", "f4", 0.1),
        ("f2", "dws", 0.3),
    ],
)
def test_digits_are_read_without_training(
    parents: dict[str, Network], data: DataSet, parent: str, plan: str, drop: float
) -> None:
    before = accuracy(parents[parent], data)
    samples: Batches = calibration_batches(data, 0, 256)
    child = fresh(TINY, plan)
    untrained = accuracy(child, data)
    warm_start(parents[parent], child, samples)
    assert before > 0.85
    assert untrained < 0.3
    assert accuracy(child, data) > before - drop
