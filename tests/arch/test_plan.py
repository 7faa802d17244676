import itertools
from pathlib import Path

import numpy as np
import pytest

from fnet_search.arch.costs import Cost, all_conv_macs, cost_table, network_cost, plan_cost, smallest_conv_macs
from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Activation, BatchNorm, Conv, Dense, Flatten
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.arch.plan import (
    FactorizationPlan,
    check_plan,
    depthwise,
    doublings,
    from_indices,
    indices,
    initial_rates,
    label,
    legal_rates,
    load_plan,
    make_plan,
    named_plans,
    parse_plan,
    plan_toml,
    rates_of,
    regular,
    reverse_pyramid,
    uniform,
)
from fnet_search.base.errors import FnetError
from fnet_search.importing.spaces import load_space

FACTORIZENET = load_space("factorizenet")
TINY = load_space("tiny")
LAYERS = ("conv_64_1", "conv_64_2", "conv_128_1", "conv_128_2", "conv_128_3", "conv_256_1", "conv_256_2", "conv_256_3")


def chain(*channels: int) -> Macroarchitecture:
    """A stem of the first width, then a factorizable 3x3 convolution to each of the others, on 8x8 maps."""
    nodes = [Node("stem", Conv(channels[0], padding=(1, 1)), (INPUT,))]
    for number, width in enumerate(channels[1:], 1):
        conv = Conv(width, padding=(1, 1), factorize=True)
        nodes += [Node(f"c{number}", conv, (nodes[-1].name,)), Node(f"n{number}", BatchNorm(), (f"c{number}",))]
    nodes += [Node("flat", Flatten(), (nodes[-1].name,)), Node("out", Dense(10), ("flat",))]
    return Macroarchitecture("chain", (3, 8, 8), tuple(nodes))


def rates(plan: FactorizationPlan) -> list[int]:
    return [rate for _, rate in plan.rates]


@pytest.mark.parametrize(
    ("name", "conv_macs"),
    [
        ("regular", 266_010_624),
        ("f2", 153_812_992),
        ("f4", 92_471_296),
        ("f8", 61_800_448),
        ("f16", 46_465_024),
        ("init2", 104_267_776),
        ("init4", 67_698_688),
        ("dws", 33_415_168),
    ],
)
@pytest.mark.parametrize("space", ["factorizenet", "factorizenet-gap"])
def test_the_papers_conv_macs(space: str, name: str, conv_macs: int) -> None:
    loaded = load_space(space)
    assert plan_cost(loaded, parse_plan(loaded, name)).conv_macs == conv_macs


def test_regular_by_hand() -> None:
    convs = [
        9 * 3 * 64 * 32 * 32,
        9 * 64 * 64 * 32 * 32,
        9 * 64 * 64 * 32 * 32,
        9 * 64 * 128 * 16 * 16,
        9 * 128 * 128 * 16 * 16,
        9 * 128 * 128 * 16 * 16,
        9 * 128 * 256 * 8 * 8,
        9 * 256 * 256 * 8 * 8,
        9 * 256 * 256 * 8 * 8,
    ]
    dense = [256 * 8 * 8 * 1024, 1024 * 1024, 1024 * 10]
    weights = 9 * (3 * 64 + 2 * 64 * 64 + 64 * 128 + 2 * 128 * 128 + 128 * 256 + 2 * 256 * 256)
    norms = 2 * (3 * 64 + 3 * 128 + 3 * 256)
    biases = 1024 + 1024 + 10
    cost = plan_cost(FACTORIZENET, regular(FACTORIZENET))
    assert cost == Cost(sum(convs), sum(convs) + sum(dense), weights + norms + sum(dense) + biases)
    assert cost.params == 19_759_434


def test_a_factorized_layer_by_hand() -> None:
    before = plan_cost(FACTORIZENET, regular(FACTORIZENET))
    after = plan_cost(FACTORIZENET, make_plan(FACTORIZENET, {"conv_64_1": 4}))
    added = 9 * (64 // 4) * 64 * 32 * 32 + 64 * 64 * 32 * 32
    removed = 9 * 64 * 64 * 32 * 32
    assert after.conv_macs - before.conv_macs == added - removed
    assert after.total_macs - before.total_macs == added - removed
    assert after.params - before.params == 9 * (64 // 4) * 64 + 2 * 64 + 64 * 64 - 9 * 64 * 64


def test_cost_table_agrees_with_the_built_networks() -> None:
    rng = np.random.default_rng(0)
    for space in (FACTORIZENET, TINY, chain(48, 6, 20, 2)):
        sizes = [len(legal) for legal in legal_rates(space).values()]
        for _ in range(10):
            plan = from_indices(space, tuple(rng.integers(sizes).tolist()))
            assert plan_cost(space, plan) == network_cost(factorize(space, plan))


def test_factorizing_replaces_the_conv_by_four_nodes() -> None:
    network = factorize(FACTORIZENET, make_plan(FACTORIZENET, {"conv_128_1": 8}))
    own = [node for node in network.nodes if node.name.startswith("conv_128_1.")]
    assert own == [
        Node("conv_128_1.grouped", Conv(64, padding=(1, 1), groups=8), ("pool_1",)),
        Node("conv_128_1.norm", BatchNorm(), ("conv_128_1.grouped",)),
        Node("conv_128_1.relu", Activation("relu"), ("conv_128_1.norm",)),
        Node("conv_128_1.pointwise", Conv(128, (1, 1)), ("conv_128_1.relu",)),
        Node("conv_128_1.bn", BatchNorm(), ("conv_128_1.pointwise",)),
        Node("conv_128_1.act", Activation("relu"), ("conv_128_1.bn",)),
    ]
    assert factorize(FACTORIZENET, regular(FACTORIZENET)) == FACTORIZENET


def test_stride_and_dilation_go_to_the_grouped_convolution() -> None:
    conv = Conv(32, (3, 5), (2, 2), (2, 1), (2, 1), bias=True, factorize=True)
    nodes = (Node("c", conv, (INPUT,)), Node("f", Flatten(), ("c",)), Node("d", Dense(2), ("f",)))
    space = Macroarchitecture("strided", (16, 20, 20), nodes)
    network = factorize(space, make_plan(space, {"c": 16}))
    assert network.by_name["c.grouped"].layer == Conv(16, (3, 5), (2, 2), (2, 1), (2, 1), groups=16)
    assert network.by_name["c.pointwise"].layer == Conv(32, (1, 1), bias=True)
    assert network.shapes["c.pointwise"] == space.shapes["c"]


def test_legal_rates() -> None:
    assert rates_of(64) == (1, 2, 4, 8, 16, 32, 64)
    assert rates_of(48) == (1, 2, 4, 8, 16, 48)
    assert rates_of(3) == (1, 3)
    assert rates_of(1) == (1,)
    assert tuple(legal_rates(FACTORIZENET)) == LAYERS
    assert [len(legal) for legal in legal_rates(FACTORIZENET).values()] == [7, 7, 7, 8, 8, 8, 9, 9]


def test_named_plans() -> None:
    assert rates(uniform(FACTORIZENET, 16)) == [16] * 8
    assert rates(uniform(FACTORIZENET, 128)) == [64, 64, 64, 128, 128, 128, 128, 128]
    assert uniform(FACTORIZENET, 256) == depthwise(FACTORIZENET)
    assert rates(depthwise(FACTORIZENET)) == [64, 64, 64, 128, 128, 128, 256, 256]
    assert rates(reverse_pyramid(FACTORIZENET, 2)) == [2, 2, 2, 4, 4, 4, 8, 8]
    assert rates(reverse_pyramid(FACTORIZENET, 4)) == [4, 4, 4, 8, 8, 8, 16, 16]
    assert reverse_pyramid(FACTORIZENET, 64) == depthwise(FACTORIZENET)
    assert doublings(FACTORIZENET) == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert label(FACTORIZENET, regular(FACTORIZENET)) == "regular"
    assert label(FACTORIZENET, uniform(FACTORIZENET, 256)) == "dws"
    assert label(FACTORIZENET, make_plan(FACTORIZENET, {"conv_128_2": 4})) == "1-1-1-4-1-1-1-1"
    for name, plan in named_plans(FACTORIZENET).items():
        assert parse_plan(FACTORIZENET, name) == plan


def test_channels_that_are_no_power_of_two() -> None:
    space = chain(48, 96, 80)
    assert dict(legal_rates(space)) == {"c1": (1, 2, 4, 8, 16, 48), "c2": (1, 2, 4, 8, 16, 32, 96)}
    assert doublings(space) == (1, 2, 4, 8, 16, 32, 64)
    assert [rates(uniform(space, rate)) for rate in (16, 32, 64)] == [[16, 16], [48, 32], [48, 96]]
    assert initial_rates(space) == (1, 2, 4, 8, 16, 48)
    # At least 48 / init channels a group: init1 allows 96 / 2, init16 allows 96 / 32, init48 allows 96 / 96.
    assert [rates(reverse_pyramid(space, rate)) for rate in (1, 2, 16, 48)] == [[1, 2], [2, 4], [16, 32], [48, 96]]


def test_macs_need_not_fall_with_the_rate() -> None:
    space = chain(16, 2)
    by_rate = [plan_cost(space, make_plan(space, {"c1": rate})).conv_macs for rate in rates_of(16)]
    stem = 9 * 3 * 16 * 8 * 8
    assert by_rate[0] == stem + 9 * 16 * 2 * 8 * 8
    assert by_rate[1:] == [stem + (9 * 16 // rate * 16 + 16 * 2) * 8 * 8 for rate in (2, 4, 8, 16)]
    assert by_rate[1] > by_rate[0]
    assert smallest_conv_macs(space) == min(by_rate) < by_rate[0]
    narrow = chain(4, 1)
    assert smallest_conv_macs(narrow) == plan_cost(narrow, regular(narrow)).conv_macs


def test_all_conv_macs_of_a_whole_space() -> None:
    macs = all_conv_macs(TINY)
    assert macs.shape == tuple(len(legal) for legal in legal_rates(TINY).values()) == (4, 5, 5)
    for chosen in itertools.product(*map(range, macs.shape)):
        assert macs[chosen] == plan_cost(TINY, from_indices(TINY, chosen)).conv_macs
    assert smallest_conv_macs(TINY) == macs.min()


def test_all_conv_macs_of_factorizenet() -> None:
    macs = all_conv_macs(FACTORIZENET)
    assert macs.size == 7 * 7 * 7 * 8 * 8 * 8 * 9 * 9
    assert (int(macs.max()), int(macs.min())) == (266_010_624, smallest_conv_macs(FACTORIZENET))
    assert macs[indices(FACTORIZENET, parse_plan(FACTORIZENET, "init2"))] == 104_267_776


def test_indices_are_the_optimizers_view() -> None:
    plan = parse_plan(FACTORIZENET, "conv_64_2=4,conv_256_3=256")
    assert indices(FACTORIZENET, plan) == (0, 2, 0, 0, 0, 0, 0, 8)
    assert from_indices(FACTORIZENET, (0, 2, 0, 0, 0, 0, 0, 8)) == plan
    assert (plan["conv_64_2"], plan["conv_64_1"]) == (4, 1)
    assert hash(plan) == hash(from_indices(FACTORIZENET, (0, 2, 0, 0, 0, 0, 0, 8)))


def test_plans_survive_text_and_files(tmp_path: Path) -> None:
    plan = parse_plan(FACTORIZENET, " conv_256_1 = 8 , conv_64_1=2,")
    assert parse_plan(FACTORIZENET, str(plan)) == plan
    path = tmp_path / "plan.toml"
    path.write_text(plan_toml(plan))
    assert parse_plan(FACTORIZENET, str(path)) == load_plan(FACTORIZENET, path) == plan
    path.write_text("[rates]\nconv_64_1 = 2\nconv_256_1 = 8\n")
    assert load_plan(FACTORIZENET, path) == plan


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("conv_64_3=2", "unknown layer 'conv_64_3'; did you mean 'conv_64_"),
        ("conv_in=2", "layer 'conv_in' cannot be factorized; factorizable layers: conv_64_1, conv_64_2, "),
        ("conv_64_1=3", "illegal rate 3 for layer 'conv_64_1'; legal rates: 1, 2, 4, 8, 16, 32, 64"),
        ("conv_64_1=128", "illegal rate 128 for layer 'conv_64_1'; legal rates: 1, 2, 4, 8, 16, 32, 64"),
        ("conv_64_1=0", "illegal rate 0 for layer 'conv_64_1'"),
        ("conv_64_1=-2", "malformed plan entry 'conv_64_1=-2'; write layer=rate"),
        ("conv_64_1=two", "malformed plan entry 'conv_64_1=two'; write layer=rate"),
        ("conv_64_1=2,conv_64_1=4", "a layer is named twice"),
        ("=2", "malformed plan entry '=2'"),
        ("f3", "unknown plan 'f3'; uniform rates are f1, f2, f4, "),
        ("f512", "unknown plan 'f512'"),
        ("init128", "unknown plan 'init128'; reverse pyramids are init1, init2, "),
        ("regulr", "unknown plan 'regulr'; did you mean 'regular'?"),
        ("gone.toml", "cannot read plan gone.toml"),
    ],
)
def test_bad_plans(text: str, complaint: str) -> None:
    with pytest.raises(FnetError) as caught:
        parse_plan(FACTORIZENET, text)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a plan file needs a [rates] table of layer = rate"),
        ("rates = 3", "a plan file needs a [rates] table of layer = rate"),
        ("[rates]\nconv_64_1 = true", "the rate of 'conv_64_1' must be a whole number, got True"),
        ("[rates]\nconv_64_1 = 2.0", "the rate of 'conv_64_1' must be a whole number, got 2.0"),
        ("[rates]\nconv_64_1 = 3", "illegal rate 3 for layer 'conv_64_1'; legal rates: 1, 2, 4, 8, 16, 32, 64"),
    ],
)
def test_bad_plan_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(FnetError) as caught:
        load_plan(FACTORIZENET, path)
    assert str(caught.value) == f"{path}: {message}"


def test_a_plan_belongs_to_its_space() -> None:
    check_plan(TINY, depthwise(TINY))
    with pytest.raises(FnetError, match="unknown layer 'conv_8'"):
        check_plan(FACTORIZENET, depthwise(TINY))
    with pytest.raises(
        FnetError, match="does not name the layers of space 'tiny' in order: conv_8, conv_16_1, conv_16_2"
    ):
        check_plan(TINY, FactorizationPlan((("conv_16_1", 2), ("conv_8", 1), ("conv_16_2", 1))))
    with pytest.raises(FnetError, match="does not name the layers"):
        check_plan(TINY, FactorizationPlan((("conv_8", 1),)))


def test_nothing_to_factorize() -> None:
    space = chain(8)
    assert dict(cost_table(space).by_layer) == {}
    assert plan_cost(space, regular(space)) == network_cost(space)
    assert parse_plan(space, "regular") == regular(space)
    assert named_plans(space) == {"regular": regular(space), "dws": regular(space)}
    assert label(space, regular(space)) == "regular"
    for other in ("f2", "init1", "dws", "conv=2"):
        with pytest.raises(FnetError, match="space 'chain' has no factorizable layer, so its only plan is regular"):
            parse_plan(space, other)
