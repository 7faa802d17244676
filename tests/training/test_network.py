import pickle
import weakref
from math import expm1, log, prod, sqrt, tanh
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from fnet_search.arch.costs import network_cost
from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Activation, Add, BatchNorm, Conv, Dense, Flatten, Pool
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.arch.plan import make_plan
from fnet_search.base.errors import FnetError
from fnet_search.importing.spaces import load_space
from fnet_search.training.network import Network, activate, apply_stateless, build, output_of, pretrained, walk
from fnet_search.training.weights import write_tensors
from tests.support.networks import ACTIVATIONS, MIXED, RESIDUAL, SCALED, STEPS, normal, randomized, sequence
from tests.support.training import step

SELU = 1.0507009873554805


class Value:
    """Something that can be watched."""


def test_a_walk_drops_what_is_no_longer_needed() -> None:
    nodes = (
        Node("a", Flatten(), (INPUT,)),
        Node("b", Flatten(), ("a",)),
        Node("c", Add(), ("b", "b")),
        Node("d", Add(), ("c", "a")),
        Node("e", Flatten(), ("d",)),
    )
    network = Macroarchitecture("n", (3, 2, 2), nodes)
    alive: dict[str, weakref.ref[Value]] = {}
    seen = {}
    for node, output in walk(network, Value(), lambda node, inputs: Value()):
        alive[node.name] = weakref.ref(output)
        del output
        seen[node.name] = {name for name, value in alive.items() if value() is not None}
    assert seen == {"a": {"a"}, "b": {"a", "b"}, "c": {"a", "c"}, "d": {"d"}, "e": {"e"}}


def test_a_walk_hands_inputs_over_in_order() -> None:
    nodes = (
        Node("b", Flatten(), ("a",)),
        Node("a", Flatten(), (INPUT,)),
        Node("c", Add(), ("b", "a")),
        Node("d", Add(), ("c", "c")),
        Node("e", Add(), ("d", "c")),
    )
    network = Macroarchitecture("n", (3, 2, 2), nodes)
    written = {
        node.name: text for node, text in walk(network, "x", lambda node, inputs: f"{node.name}({', '.join(inputs)})")
    }
    assert written["a"] == "a(x)"
    assert written["c"] == "c(b(a(x)), a(x))"
    assert written["e"] == f"e(d({written['c']}, {written['c']}), {written['c']})"
    assert output_of(network, "x", lambda node, inputs: f"{node.name}({', '.join(inputs)})") == written["e"]


def test_a_layer_may_be_called_what_torch_calls_its_own() -> None:
    """The names of every attribute of its modules, at once; and what else is odd."""
    names = [name for name in dir(nn.ModuleDict()) if name != "training"] + [
        "training",
        "a b",
        "s/1",
        "層",
        "[x]",
        "$x^{$",
    ]
    space = sequence((3, 4, 4), **{name: Conv(2, (1, 1), bias=True) for name in names}, flat=Flatten())
    network = build(space)
    assert len(network.state_dict()) == 2 * len(names)
    copy = pickle.loads(pickle.dumps(build(space, seed=1)))
    copy.load_state_dict(network.state_dict())
    copy.train().to(torch.float64).to(memory_format=torch.channels_last).float().eval()
    assert not any(module.training for module in copy.modules())
    x = normal(2, 3, 4, 4)
    assert torch.equal(copy(x), network.eval()(x))
    assert copy.layer("type") is [*copy.layers.values()][names.index("type")]


def test_weights_are_called_after_their_layers() -> None:
    """As in the files of all runs so far."""
    space = sequence((3, 4, 4), **{"a.b": Conv(2), "s/1": BatchNorm(), "flat": Flatten(), "out": Dense(2)})
    assert list(build(space).state_dict())[:3] == ["layers.a/b.weight", "layers.s/1.weight", "layers.s/1.bias"]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("relu", [0, 0, 0, 0, 0.5, 4, 8]),
        ("relu6", [0, 0, 0, 0, 0.5, 4, 6]),
        ("hardsigmoid", [0, 0, 1 / 3, 1 / 2, 3.5 / 6, 1, 1]),
        ("hardswish", [0, 0, -1 / 3, 0, 0.5 * 3.5 / 6, 4, 8]),
        ("sigmoid", [3.353501e-4, 0.01798621, 0.26894142, 0.5, 0.62245933, 0.98201379, 0.99966465]),
        ("silu", [-2.682801e-3, -0.07194484, -0.26894142, 0, 0.31122967, 3.92805516, 7.99731720]),
        ("leaky_relu", [-1.6, -0.8, -0.2, 0, 0.5, 4, 8]),
        ("elu", [0.7 * expm1(-8), 0.7 * expm1(-4), 0.7 * expm1(-1), 0, 0.5, 4, 8]),
        ("celu", [0.6 * expm1(-8 / 0.6), 0.6 * expm1(-4 / 0.6), 0.6 * expm1(-1 / 0.6), 0, 0.5, 4, 8]),
        ("selu", [*(SELU * 1.6732632423543772 * expm1(x) for x in (-8, -4, -1)), 0, SELU / 2, SELU * 4, SELU * 8]),
        ("gelu", [0, -1.2668497e-4, -0.15865525, 0, 0.34573123, 3.99987332, 8]),
        ("gelu_tanh", [0, -7.022943e-5, -0.15880801, 0, 0.34571401, 3.99992977, 8]),
        ("tanh", [tanh(-8), tanh(-4), tanh(-1), 0, tanh(0.5), tanh(4), tanh(8)]),
        ("softplus", [3.3540637e-4, 0.01814993, 0.31326169, log(2), 0.97407698, 4.01814993, 8.00033541]),
        ("mish", [-2.6832505e-3, -0.07259173, -0.30340146, 0, 0.37524524, 3.99741283, 7.99999820]),
        ("log_sigmoid", [-8.00033541, -4.01814993, -1.31326169, -log(2), -0.47407698, -0.01814993, -3.3540637e-4]),
        ("abs", [8, 4, 1, 0, 0.5, 4, 8]),
        ("clip", [-0.75, -0.75, -0.75, 0, 0.5, 0.5, 0.5]),
        ("at_least", [-0.5, -0.5, -0.5, 0, 0.5, 4, 8]),
    ],
)
def test_functions(function: str, expected: list[float]) -> None:
    x = torch.tensor([-8, -4, -1, 0, 0.5, 4, 8], dtype=torch.float64)
    assert activate(ACTIVATIONS[function], x).tolist() == pytest.approx(expected, abs=1e-7)


def test_a_slope_a_channel() -> None:
    x = torch.tensor([-2.0, 3.0, -4.0]).view(1, 3, 1, 1)
    assert activate(Activation("leaky_relu", (0.5, 0.5, -1)), x).flatten().tolist() == [-1, 3, 4]


def test_slopes_are_learned() -> None:
    """One, or one a channel, from 0.25 on."""
    space = sequence((4, 3, 3), one=Activation("prelu"), each=Activation("prelu", per_channel=True), f=Flatten())
    network = build(space)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    assert shapes == {"layers.one.weight": (1,), "layers.each.weight": (4,)}
    assert network_cost(space).params == 1 + 4
    x = normal(2, 4, 3, 3)
    network(x).sum().backward()
    assert torch.equal(network(x), torch.where(x > 0, x, x * 0.25**2).flatten(1))
    assert all(parameter.grad.abs().min() > 0 for parameter in network.parameters() if parameter.grad is not None)


def test_the_padding_of_an_average_pool_is_not_counted() -> None:
    x = torch.arange(12.0).view(1, 1, 3, 4)
    pool = Pool("average", (2, 3), (2, 2), (1, 1))
    expected = [[(0 + 1) / 2, (1 + 2 + 3) / 3], [(4 + 5 + 8 + 9) / 4, (5 + 6 + 7 + 9 + 10 + 11) / 6]]
    assert torch.equal(apply_stateless(pool, [x]), torch.tensor(expected).view(1, 1, 2, 2))


def test_the_other_pools() -> None:
    x = -torch.arange(1.0, 13).view(1, 1, 3, 4)
    most = Pool("max", (2, 2), (1, 2), (1, 0))
    assert apply_stateless(most, [x]).tolist() == [[[[-1, -3], [-1, -3], [-5, -7], [-9, -11]]]]
    assert apply_stateless(Pool("global_average"), [torch.cat([x, x + 1], 1)]).tolist() == [[[[-6.5]], [[-5.5]]]]


def test_every_layer_does_what_it_says() -> None:
    network = randomized(MIXED)
    weights = {name.replace("/", "."): tensor for name, tensor in network.layers.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, gain, offset = (
            weights[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, gain, offset, training=False, eps=1e-3)

    x = normal(4, *MIXED.input_shape)
    stem = F.relu(norm(F.conv2d(x, weights["stem.weight"], padding=1), "stem.bn"))
    grouped = F.conv2d(stem, weights["grouped.weight"], weights["grouped.bias"], padding=2, dilation=2, groups=4)
    total = (grouped + stem).clamp(0, 6)
    two = F.conv2d(total, weights["two.weight"])
    joined = torch.cat([norm(two, "two.norm"), two * (two + 3).clamp(0, 6) / 6, total], 1)
    average = F.relu(norm(F.avg_pool2d(joined, 3, 2, 1, count_include_pad=False), "average.norm"))
    most = F.max_pool2d(average, (3, 2), 1, 1)
    deep = F.conv2d(most, weights["deep.weight"], stride=(2, 1), padding=(1, 0), groups=20)
    dense = F.linear((deep * deep.sigmoid()).mean((2, 3)), weights["dense.weight"], weights["dense.bias"])
    last = norm(F.relu(norm(dense, "dense.norm")), "last.norm")
    torch.testing.assert_close(network(x), last @ weights["out.weight"].T, rtol=1e-5, atol=1e-5)


def test_a_network_has_the_parameters_that_were_counted() -> None:
    space = sequence(
        (4, 6, 6), stem=Conv(8, bias=True), c=Conv(6, factorize=True), n=BatchNorm(), f=Flatten(), d=Dense(3, False)
    )
    for rate in (1, 2, 8):
        network = factorize(space, make_plan(space, {"c": rate}))
        counted = sum(parameter.numel() for parameter in Network(network).parameters())
        assert counted == network_cost(network).params


def test_a_layer_is_found_by_its_name() -> None:
    space = sequence((3, 6, 6), c=Conv(4, factorize=True), f=Flatten(), d=Dense(3))
    network = Network(factorize(space, make_plan(space, {"c": 3})))
    assert network.layer("c.grouped").get_parameter("weight").shape == (3, 1, 3, 3)
    assert network.layer("c.pointwise").get_parameter("weight").shape == (4, 3, 1, 1)
    with pytest.raises(KeyError):
        network.layer("c.relu")


def state(network: Network) -> list[Tensor]:
    return list(network.state_dict().values())


def test_weights_are_a_function_of_the_seed() -> None:
    before = torch.get_rng_state()
    one, same, other = (build(MIXED, "he_normal", seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(state(one), state(same), strict=True))
    assert not torch.equal(one.layer("stem").get_parameter("weight"), other.layer("stem").get_parameter("weight"))


def test_biases_start_at_zero_and_norms_at_one() -> None:
    network = build(MIXED, "glorot_uniform", 3)
    assert not network.layer("grouped").get_parameter("bias").any()
    assert not network.layer("dense").get_parameter("bias").any()
    assert torch.equal(network.layer("dense.norm").get_parameter("weight"), torch.ones(12))


@pytest.mark.parametrize(("fused", "widths"), [(False, ()), (False, (1, 2, 4, 8, 16))])
def test_a_network_that_is_not_sped_up(fused: bool, widths: tuple[int, ...]) -> None:
    plain, other = (randomized(RESIDUAL) for _ in range(2))
    other.speed_up(fused, widths)
    images = normal(16, *RESIDUAL.input_shape)
    expected, found = step(plain, images), step(other, images)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_constants_are_not_trained() -> None:
    """They are the layer's: no parameter, and nothing of the state; what is trained starts with the layer's numbers."""
    network = build(SCALED)
    assert {name for name, _ in network.named_parameters()} == {
        *("layers.stem.weight", "layers.stem/scale.scale", "layers.body.weight", "layers.body_scale.shift"),
        *("layers.out.weight", "layers.out.bias"),
    }
    assert sum(parameter.numel() for parameter in network.parameters()) == network_cost(SCALED).params
    norms = {f"layers.{name}.{part}" for name in ("stem/norm", "body_norm") for part in STATISTICS}
    assert network.state_dict().keys() == {name for name, _ in network.named_parameters()} | norms
    assert network.layers["stem/scale"].state_dict()["scale"].tolist() == list(STEPS)
    images = normal(4, *SCALED.input_shape)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.25, 0.2, 0.4]).view(3, 1, 1)
    outputs = {node.name: output for node, output in walk(SCALED, images, network.eval().apply_node)}
    torch.testing.assert_close(outputs["normed"], (images - mean) / std)
    assert torch.equal(outputs["out.scale"], 3 * outputs["out"])


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def test_a_norm_without_weights_is_not_fused() -> None:
    space = sequence((3, 6, 6), c=Conv(4), n=BatchNorm(affine=False), a=Activation(), f=Flatten())
    plain, other = (randomized(space) for _ in range(2))
    other.speed_up(True, ())
    images = normal(8, *space.input_shape)
    expected, found = step(plain, images), step(other, images)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_initializers() -> None:
    space = sequence((32, 8, 8), c=Conv(64, (3, 3), groups=2), a=Activation(), f=Flatten(), d=Dense(16))
    ins, outs, within = 16 * 9, 64 * 9, 64 * 6 * 6
    glorot = build(space, "glorot_uniform", 0)
    for name, limit in {"c": sqrt(6 / (ins + outs)), "d": sqrt(6 / (within + 16))}.items():
        weight = glorot.layer(name).get_parameter("weight")
        assert 0.98 * limit < weight.abs().max() <= limit * (1 + 1e-6)
        assert float(weight.detach().std()) == pytest.approx(limit / sqrt(3), rel=0.05)
    he = build(space, "he_normal", 0).layer("c").get_parameter("weight")
    assert float(he.detach().std()) == pytest.approx(sqrt(2 / ins), rel=0.05)
    rows = build(space, "orthogonal", 0).layer("c").get_parameter("weight").flatten(1)
    assert rows.shape == (64, prod((16, 3, 3)))
    torch.testing.assert_close(rows @ rows.T, torch.eye(64), rtol=0, atol=1e-5)


def test_weights_from_a_file(tmp_path: Path) -> None:
    """Of safetensors or torch; their number of classes is the network's."""
    space = load_space("tiny")
    trained = randomized(space.with_classes(7))
    write_tensors(tmp_path / "a.safetensors", trained.state_dict(), {})
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "b.pth")
    images = normal(4, *space.input_shape)
    for name in ("a.safetensors", "b.pth"):
        loaded = load_space("tiny", weights=str(tmp_path / name))
        assert loaded.classes == 7
        assert torch.equal(pretrained(loaded).eval()(images), trained.eval()(images))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", randomized(RESIDUAL).state_dict(), {})
    with pytest.raises(FnetError, match="does not hold the weights of space 'tiny'"):
        load_space("tiny", weights=str(tmp_path / "a.safetensors"))
