from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from fnet_search.arch.costs import network_cost
from fnet_search.arch.layers import (
    Activation,
    Add,
    Affine,
    BatchNorm,
    Concat,
    Conv,
    Dense,
    Flatten,
    Layer,
    Multiply,
    Pool,
    Resample,
    Reshape,
    Shuffle,
    Slice,
)
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node, factorizing, with_default_factorizable
from fnet_search.arch.space_file import parse_space, to_toml
from fnet_search.base.errors import FnetError
from fnet_search.importing.spaces import load_space, save_space
from tests.support.networks import SCALED

BRANCHED = Macroarchitecture(
    "branched",
    (3, 32, 24),
    (
        Node("stem", Conv(8, (3, 5), (2, 1), (1, 2), bias=True), (INPUT,)),
        Node("norm", BatchNorm(1e-5), ("stem",)),
        Node("act", Activation("hardswish"), ("norm",)),
        Node("left", Conv(8, (3, 3), padding=(2, 2), dilation=(2, 2), groups=4), ("act",)),
        Node("right", Conv(8, (1, 1), factorize=True), ("act",)),
        Node("sum", Add(), ("left", "right")),
        Node("both", Concat(), ("sum", "left", "act")),
        Node("pool", Pool("average", (3, 3), (2, 2), (1, 1)), ("both",)),
        Node("gap", Pool("global_average"), ("pool",)),
        Node("flat", Flatten(), ("gap",)),
        Node("out", Dense(7, bias=False), ("flat",)),
    ),
    'a "quoted" line\nand another',
)

HEAD = """name = "mine"
input = [3, 8, 8]

[[layer]]
name = "stem"
kind = "conv"
out_channels = 8
padding = 1

"""
TAIL = """
[[layer]]
name = "flat"
kind = "flatten"

[[layer]]
name = "out"
kind = "dense"
out_features = 10
"""


def fault(tmp_path: Path, text: str) -> str:
    """What is said of a space with this text, less the path of its file."""
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FnetError) as caught:
        load_space(str(path))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message.replace(str(path), "FILE")


def test_shapes_are_inferred() -> None:
    assert BRANCHED.shapes == {
        INPUT: (3, 32, 24),
        "stem": (8, (32 + 2 * 1 - 3) // 2 + 1, 24 + 2 * 2 - 5 + 1),
        "norm": (8, 16, 24),
        "act": (8, 16, 24),
        "left": (8, 16 + 2 * 2 - 2 * 2, 24 + 2 * 2 - 2 * 2),
        "right": (8, 16, 24),
        "sum": (8, 16, 24),
        "both": (8 + 8 + 8, 16, 24),
        "pool": (24, (16 + 2 - 3) // 2 + 1, (24 + 2 - 3) // 2 + 1),
        "gap": (24, 1, 1),
        "flat": (24,),
        "out": (7,),
    }
    assert (BRANCHED.output, BRANCHED.classes) == ("out", 7)


def test_macs_and_parameters_of_a_layer() -> None:
    conv = Conv(8, (3, 5), padding=(1, 2), groups=4, bias=True)
    assert conv.macs([(16, 10, 12)]) == 3 * 5 * (16 // 4) * 8 * 10 * 12
    assert conv.params([(16, 10, 12)]) == 8 * (3 * 5 * (16 // 4) + 1)
    assert Dense(10).macs([(64,)]) == 64 * 10
    assert Dense(10).params([(64,)]) == 10 * (64 + 1)
    assert Dense(10, bias=False).params([(64,)]) == 10 * 64
    assert BatchNorm().params([(64, 8, 8)]) == 2 * 64
    assert BatchNorm(affine=False).params([(64, 8, 8)]) == 0
    assert Affine((2.0,), (1.0,) * 64).params([(64, 8, 8)]) == 0
    assert Affine((2.0,), (1.0,) * 64, trained=True).params([(64, 8, 8)]) == 1 + 64
    for layer in (BatchNorm(), Affine((2.0,)), Activation(), Pool(), Flatten(), Add(), Concat()):
        assert layer.macs([(64, 8, 8), (64, 8, 8)]) == 0


def test_the_order_of_the_nodes_does_not_matter() -> None:
    shuffled = Macroarchitecture(BRANCHED.name, BRANCHED.input_shape, BRANCHED.nodes[::-1])
    assert shuffled.shapes == BRANCHED.shapes
    names = [node.name for node in shuffled.order]
    assert all(
        names.index(source) < names.index(node.name)
        for node in shuffled.nodes
        for source in node.inputs[:1]
        if source != INPUT
    )
    assert shuffled.output == "out"


def test_consumers_and_inputs() -> None:
    assert [node.name for node in BRANCHED.consumers("act")] == ["left", "right", "both"]
    assert BRANCHED.input_shapes(BRANCHED.by_name["both"]) == [(8, 16, 24)] * 3


@pytest.mark.parametrize("name", ["factorizenet", "factorizenet-gap", "tiny"])
def test_shipped_spaces_survive_toml(name: str, tmp_path: Path) -> None:
    space = load_space(name)
    assert space.name == name
    assert space.input_shape == (3, 32, 32)
    save_space(space, tmp_path / "again.toml")
    assert load_space(str(tmp_path / "again.toml")) == space


@pytest.mark.parametrize("space", [BRANCHED, SCALED], ids=lambda space: str(space.name))
def test_every_option_survives_toml(space: Macroarchitecture, tmp_path: Path) -> None:
    save_space(space, tmp_path / "kept.toml")
    again = load_space(str(tmp_path / "kept.toml"))
    assert again == space
    assert again.shapes == space.shapes
    assert parse_space(to_toml(again)) == space


def test_a_space_takes_its_name_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "my-net.toml").write_text((HEAD + TAIL).removeprefix('name = "mine"\n'))
    space = load_space(str(tmp_path / "my-net.toml"))
    assert space.name == "my-net"
    assert space.shapes["flat"] == (8 * 8 * 8,)


def test_classes_follow_the_data_set() -> None:
    space = load_space("tiny")
    assert space.with_classes(10) is space
    wider = space.with_classes(100)
    assert (wider.classes, wider.nodes[:-1]) == (100, space.nodes[:-1])
    headless = Macroarchitecture(
        "headless", (3, 2, 2), (Node("c", Conv(4, (1, 1)), (INPUT,)), Node("f", Flatten(), ("c",)))
    )
    with pytest.raises(FnetError, match="has 16 outputs and the data set 10 classes; end the space with a dense layer"):
        headless.with_classes(10)


def test_unknown_space_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(FnetError, match=r"unknown space 'factorisenet'; did you mean 'factorizenet'\?"):
        load_space("factorisenet")
    with pytest.raises(FnetError, match=r"space file .*gone\.toml does not exist"):
        load_space(str(tmp_path / "gone.toml"))


def test_a_cycle_names_its_layers_and_line(tmp_path: Path) -> None:
    text = HEAD + '[[layer]]\nname = "sum"\nkind = "add"\ninputs = ["stem", "back"]\n\n'
    text += '[[layer]]\nname = "back"\nkind = "activation"\n' + TAIL
    message = fault(tmp_path, text)
    assert message.startswith("FILE, line 10: layer 'sum' (number 2): lies on a cycle: ")
    assert message.endswith(("sum -> back -> sum", "back -> sum -> back"))


@pytest.mark.parametrize(
    ("layer", "complaint"),
    [
        ('kind = "convv"\nout_channels = 8', "unknown layer kind 'convv'; did you mean 'conv'?"),
        ("out_channels = 8", "needs a kind: conv, dense, batch_norm, affine, activation, pool, flatten, "),
        (
            'kind = "activation"\ninputs = ["stm"]',
            "takes its input from 'stm', which is not a layer; did you mean 'stem'?",
        ),
        ('kind = "add"', "add layer takes 2 inputs, got 1: ['stem']"),
        ('kind = "concat"', "concat layer takes at least 2 inputs, got 1: ['stem']"),
        ('kind = "activation"\ninputs = ["stem", "stem"]', "activation layer takes 1 input, got 2: ['stem', 'stem']"),
        ('kind = "activation"\ninputs = "stem"', 'inputs must be a list of layer names, as in: inputs = ["stem"]'),
        ('kind = "add"\ninputs = ["stem", "input"]', "cannot add shapes (8, 8, 8) and (3, 8, 8); they must be equal"),
        ('kind = "dense"\nout_features = 4', "needs a vector as input, got shape (8, 8, 8); put a flatten before it"),
        ('kind = "conv"\nout_channels = 8\nkernel = 9', "its 9x9 window does not fit into the 8x8 input"),
        (
            'kind = "conv"\nout_channels = 8\nkernel = 6\ndilation = 2\npadding = 1',
            "its 11x11 window does not fit into the 10x10 input, padding included",
        ),
        ('kind = "pool"\nkernel = 9', "its 9x9 window does not fit into the 8x8 input"),
        ('kind = "pool"\nkernel = [11, 2]\npadding = 1', "its 11x2 window does not fit into the 10x10 input, padding"),
        ('kind = "pool"\nkernel = 10\nstride = 1\nceil = true', "its 10x10 window does not fit into the"),
        ('kind = "conv"\nout_channels = 8\ngroups = 3', "groups = 3 does not divide its 8 input and 8 output channels"),
        ('kind = "conv"', "a conv layer needs 'out_channels'"),
        ('kind = "conv"\nout_channels = 0', "out_channels must be at least 1, got 0"),
        ('kind = "conv"\nout_channels = 8.5', "out_channels must be an integer, got 8.5"),
        ('kind = "conv"\nout_channels = true', "out_channels must be an integer, got True"),
        ('kind = "conv"\nout_channels = 8\nkernel = [3]', "kernel must be an integer or two of them [height, width]"),
        ('kind = "conv"\nout_channels = 8\npadding = -1', "padding must not be negative"),
        ('kind = "conv"\nout_channels = 8\nstride = 0', "stride must be at least 1"),
        ('kind = "conv"\nout_channels = 8\ngroups = 2\nfactorize = true', "with groups cannot be factorized"),
        ('kind = "conv"\nout_channel = 8', "a conv layer has no 'out_channel'; did you mean 'out_channels'?"),
        ('kind = "activation"\nfunction = "rleu"', "unknown activation function 'rleu'; did you mean 'relu'?"),
        ('kind = "activation"\nfunction = "leaky_relu"', "leaky_relu needs alpha"),
        ('kind = "activation"\nalpha = 0.1', "relu has no alpha"),
        ('kind = "activation"\nfunction = "clip"\nlow = 0', "clip needs high"),
        ('kind = "activation"\nfunction = "clip"\nlow = 1\nhigh = 1', "low must be below high, got 1 and 1"),
        ('kind = "activation"\nfunction = "clip"\nlow = nan\nhigh = 1', "low must be below high, got nan and 1"),
        ('kind = "activation"\nfunction = "elu"\nalpha = inf', "alpha must be finite, got inf"),
        ('kind = "activation"\nfunction = "elu"\nalpha = [1, 2]', "alpha of elu must be one number, got [1, 2]"),
        ('kind = "activation"\nfunction = "celu"\nalpha = 0', "alpha of celu must not be 0"),
        ('kind = "activation"\nfunction = "leaky_relu"\nalpha = []', "alpha must be finite, got ()"),
        ('kind = "activation"\nfunction = "leaky_relu"\nalpha = [1, 2]', "it has 2 slopes for 8 channels"),
        ('kind = "activation"\nfunction = "leaky_relu"\nalpha = "x"', "alpha must be a number or a list of numbers"),
        ('kind = "activation"\nper_channel = true', "per_channel requires prelu"),
        ('kind = "pad"\nbefore = [0, 0, -1]', "before and after must not be negative, got [0, 0, -1] and [0, 0, 0]"),
        ('kind = "pad"\nafter = 1', "after must be a list of three integers, got 1"),
        ('kind = "pool"\nreduction = "mean"', "unknown pool reduction 'mean'; did you mean 'max'?"),
        ('kind = "pool"\npadding = 2', "padding must be between 0 and half the kernel"),
        ('kind = "pool"\nstride = 0', "stride must be at least 1"),
        ('kind = "conv"\nout_channels = 8\ndilation = 0', "dilation must be at least 1"),
        ('kind = "batch_norm"\neps = 0', "eps must be positive, got 0"),
    ],
)
def test_a_bad_layer_is_named_with_its_line(layer: str, complaint: str, tmp_path: Path) -> None:
    message = fault(tmp_path, f'{HEAD}[[layer]]\nname = "bad"\n{layer}\n{TAIL}')
    assert message.startswith("FILE, line 10: layer 'bad' (number 2): ")
    assert complaint in message


def test_lines_of_inline_layers(tmp_path: Path) -> None:
    text = 'input = [3, 8, 8]\n\nlayer = [\n    # a comment\n    { name = "flat", kind = "flatten" },\n'
    message = fault(tmp_path, text + '    { name = "out", kind = "pool" },\n]\n')
    assert message.startswith("FILE, line 6: layer 'out' (number 2): needs a feature map (C, H, W) as input")


def test_names_must_differ(tmp_path: Path) -> None:
    message = fault(tmp_path, HEAD + '[[layer]]\nname = "stem"\nkind = "activation"\n' + TAIL)
    assert message.startswith("FILE, line 10: layer 'stem' (number 2): this name is taken")
    assert "layer 'input'" in fault(tmp_path, HEAD.replace("stem", "input") + TAIL)
    assert "layer '?' (number 2): needs a name" in fault(tmp_path, HEAD + '[[layer]]\nkind = "activation"\n' + TAIL)


@pytest.mark.parametrize(
    "name", ["", "a\nb", "a\tb", "a\x00b", "a\u202eb", " a", "a ", "a" * 201], ids=lambda name: repr(name)[:12]
)
def test_a_name_is_a_line(name: str) -> None:
    with pytest.raises(FnetError, match=r"\(number 1\): a name is one line of 1 to 200 characters") as caught:
        Macroarchitecture("n", (3, 8, 8), (Node(name, Flatten(), (INPUT,)),))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (("s.1", "s/1"), "layer 's/1' (number 3): the name 's/1' is taken by layer 's.1'"),
        (("conv", "conv.grouped"), "layer 'conv.grouped' (number 3): the name 'conv.grouped' is taken by layer 'conv'"),
        (("conv.relu", "conv"), "layer 'conv' (number 3): the name 'conv.relu' is taken by layer 'conv.relu'"),
        (("conv", "conv/pointwise"), "the name 'conv/pointwise' is taken by layer 'conv'"),
    ],
)
def test_names_must_differ_in_weights_and_when_factorized(
    names: tuple[str, str], complaint: str, tmp_path: Path
) -> None:
    layers = [
        f'[[layer]]\nname = "{name}"\nkind = "conv"\nout_channels = 8\npadding = 1\nfactorize = {factorize}\n'
        for name, factorize in zip(names, ("false" if names[0] == "conv.relu" else "true", "true"), strict=True)
    ]
    message = fault(tmp_path, HEAD + "".join(layers) + TAIL)
    assert message.startswith(f"FILE, line {10 + layers[0].count(chr(10))}: layer {names[1]!r} (number 3): ")
    assert complaint in message


def test_the_names_of_parts_are_free_where_nothing_is_factorized() -> None:
    nodes = (Node("a", Conv(4), (INPUT,)), Node("a.grouped", Conv(4), ("a",)), Node("flat", Flatten(), ("a.grouped",)))
    space = Macroarchitecture("n", (3, 8, 8), nodes)
    with pytest.raises(FnetError, match=r"the name 'a\.grouped' is taken by layer 'a'"):
        factorizing(space, ["a"])


@pytest.mark.parametrize("reduction", ["max", "average", "conv"])
def test_windows_are_those_of_torch(reduction: str) -> None:
    """And what torch refuses is refused."""
    refused = 0
    for n, k, s, p, more in product(range(1, 8), range(1, 6), range(1, 4), range(4), (False, True)):
        x = torch.empty(1, 1, n, 8, device="meta")
        kernel, stride, padding = (k, 1), (s, 1), (p, 0)
        try:
            if reduction == "max":
                wanted = F.max_pool2d(x, kernel, stride, padding, ceil_mode=more)
            elif reduction == "average":
                wanted = F.avg_pool2d(x, kernel, stride, padding, more)
            else:
                wanted = F.conv2d(x, torch.empty(1, 1, *kernel, device="meta"), None, stride, padding, 1 + more)
        except RuntimeError:
            wanted = None
        try:
            layer = (
                Conv(1, kernel, stride, padding, (1 + more, 1 + more))
                if reduction == "conv"
                else Pool(reduction, kernel, stride, padding, more)  # type: ignore[arg-type]
            )
            found = layer.output_shape([(1, n, 8)])
        except FnetError:
            found = None
        assert found == (wanted if wanted is None else tuple(wanted.shape[1:])), (n, k, s, p, more)
        refused += found is None
    assert 100 < refused < 500


def test_a_loose_end_is_named(tmp_path: Path) -> None:
    message = fault(
        tmp_path,
        HEAD
        + '[[layer]]\nname = "loose"\nkind = "activation"\n'
        + TAIL.replace('kind = "flatten"', 'kind = "flatten"\ninputs = ["stem"]'),
    )
    assert message.startswith("FILE, line 10: layer 'loose' (number 2): leads nowhere: only 'out' may end the network")


def test_the_end_must_be_a_vector(tmp_path: Path) -> None:
    assert "layer 'stem' (number 1): ends the network with shape (8, 8, 8)" in fault(tmp_path, HEAD)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("input = [3, 8", "cannot read space FILE: "),
        ("input = [3, 8, 8]\nlayers = []", "unknown key 'layers'; did you mean 'layer'?"),
        ("input = [3, 8]\nlayer = []", "input must be three positive integers, as in: input = [3, 32, 32]"),
        ("input = [3, 8, 0]", "input must be three positive integers"),
        ("layer = []", "input must be three positive integers"),
        ("input = [3, 8, 8]", "a space needs [[layer]] tables, at least one"),
        ("input = [3, 8, 8]\nlayer = [1]", "a space needs [[layer]] tables, at least one"),
        ("name = 3\ninput = [3, 8, 8]", "name, description and weights must be strings"),
    ],
)
def test_a_file_that_is_no_space(text: str, complaint: str, tmp_path: Path) -> None:
    assert complaint in fault(tmp_path, text)


FORKED = Macroarchitecture(
    "forked",
    (3, 8, 8),
    (
        Node("a", Conv(4, (3, 3), padding=(1, 1)), (INPUT,)),
        Node("a.act", Activation(), ("a",)),
        Node("b.one", Conv(4, (3, 3), padding=(1, 1)), ("a.act",)),
        Node("b.two", Conv(4, (1, 1)), ("b.one",)),
        Node("b.three", Conv(4, (3, 3), padding=(1, 1), groups=2), ("b.two",)),
        Node("image", Pool("average", (1, 1)), (INPUT,)),
        Node("c", Conv(4, (3, 3), padding=(1, 1)), ("image",)),
        Node("sum", Add(), ("b.three", "c")),
        Node("last", Conv(7, (1, 1), bias=True), ("sum",)),
        Node("last.act", Activation(), ("last",)),
        Node("gap", Pool("global_average"), ("last.act",)),
        Node("flat", Flatten(), ("gap",)),
    ),
)


def factorizable(space: Macroarchitecture) -> list[str]:
    return [node.name for node in space.nodes if isinstance(node.layer, Conv) and node.layer.factorize]


def test_what_is_factorized_by_itself() -> None:
    """Neither what reads the image, with a pool between or not, nor kernels of 1, nor groups."""
    assert factorizable(with_default_factorizable(FORKED)) == ["b.one"]


@pytest.mark.parametrize(
    ("factorize", "keep", "found"),
    [
        ((), (), ["b.one"]),
        (("b.*",), (), ["b.one", "b.two"]),
        (("*",), ("c", "last"), ["a", "b.one", "b.two"]),
        ((), ("b.one",), []),
        (("c", "[al]*"), ("*",), []),
    ],
)
def test_patterns(factorize: tuple[str, ...], keep: tuple[str, ...], found: list[str]) -> None:
    changed = factorizing(with_default_factorizable(FORKED), factorize, keep)
    assert factorizable(changed) == found
    assert changed.shapes == FORKED.shapes


@pytest.mark.parametrize("pattern", ["b.three", "a.act", "d*"])
def test_a_pattern_that_matches_nothing_to_factorize(pattern: str) -> None:
    for given in ({"factorize": (pattern,)}, {"keep": (pattern,)}):
        with pytest.raises(FnetError, match="matches no convolution without groups of space 'forked'"):
            factorizing(FORKED, **given)


def test_other_classes_of_a_network_that_ends_with_a_convolution() -> None:
    space = FORKED.with_classes(3)
    assert space.by_name["last"].layer == Conv(3, (1, 1), bias=True)
    assert (space.classes, space.shapes["last"]) == (3, (3, 8, 8))
    others = ([node for node in one.nodes if node.name != "last"] for one in (space, FORKED))
    assert next(others) == next(others)


@pytest.mark.parametrize(
    "last",
    [
        (Node("half", Slice(0, 2), ("flat",)),),
        (Node("twice", Concat(), ("flat", "flat")),),
        (Node("again", Add(), ("flat", "flat")),),
    ],
    ids=lambda nodes: nodes[0].name,
)
def test_other_classes_where_channels_are_mixed(last: tuple[Node, ...]) -> None:
    space = Macroarchitecture("mixed", FORKED.input_shape, (*FORKED.nodes, *last))
    with pytest.raises(FnetError, match="end the space with a dense layer"):
        space.with_classes(5)


@pytest.mark.parametrize(
    ("one", "several"),
    [
        (Affine((3.0,)), Affine((3.0,) * 5)),
        (Activation("leaky_relu", 0.5), Activation("leaky_relu", (0.5,) * 5)),
    ],
    ids=lambda layer: str(layer.kind),
)
def test_other_classes_where_the_logits_are_scaled(one: Layer, several: Layer) -> None:
    """By one number it is the same layer; numbers for each class are of those classes."""

    def ended(layer: Layer) -> Macroarchitecture:
        return replace(SCALED, nodes=(*SCALED.nodes[:-1], Node("out.scale", layer, ("out",))))

    assert ended(one).with_classes(3).shapes["out.scale"] == (3,)
    with pytest.raises(FnetError, match="end the space with a dense layer"):
        ended(several).with_classes(3)


@pytest.mark.parametrize(
    ("last", "complaint"),
    [
        (
            '{ name = "out", kind = "dense", out_features = 1 }',
            "it gives one number per image; end it with one logit for each of",
        ),
        (
            '{ name = "out", kind = "dense", out_features = 4 }, { name = "end", kind = "activation", '
            'function = "sigmoid" }',
            "it ends with a sigmoid, 'end', as for several labels per image or for regression; fnet-search is for ",
        ),
    ],
)
def test_other_tasks_than_classification_are_refused(last: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "other.toml"
    path.write_text(f'name = "other"\ninput = [3, 2, 2]\nlayer = [{{ name = "flat", kind = "flatten" }}, {last}]')
    with pytest.raises(FnetError) as error:
        load_space(str(path))
    assert str(error.value).startswith(f"space {path}: {complaint}")


def test_other_classes_where_the_last_layer_is_read_twice() -> None:
    gate = Node("soft", Activation("sigmoid"), ("last",)), Node("last.act", Multiply(), ("soft", "last"))
    with pytest.raises(FnetError, match="end the space with a dense layer"):
        Macroarchitecture("n", (3, 8, 8), (*FORKED.nodes[:9], *gate, *FORKED.nodes[10:])).with_classes(5)


@pytest.mark.parametrize(
    ("layer", "shape", "complaint"),
    [
        (Slice(2, 5), (4, 8, 8), "cannot take channels 2 to 5 of 4"),
        (Slice(2, 2), (4, 8, 8), "cannot take channels 2 to 2 of 4"),
        (Shuffle(3), (4, 8, 8), "groups = 3 does not divide its 4 channels"),
        (Resample((0, 8), (0,)), (4, 8, 8), "rows must be indices from 0 to 7, at least one"),
        (Resample((0,), ()), (4, 8, 8), "columns must be indices from 0 to 7"),
        (Reshape((4, 3, 1)), (16,), "they hold different numbers of values"),
        (Affine((1.0, 2.0)), (4, 8, 8), "scale must be 1 number or 4, one per channel, got 2"),
        (Affine(shift=(1.0,) * 5), (4,), "shift must be 1 number or 4"),
    ],
    ids=str,
)
def test_layers_that_do_not_fit(layer: Layer, shape: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(FnetError, match=complaint):
        layer.output_shape([shape])


@pytest.mark.parametrize(
    ("a", "b", "shape"),
    [
        ((4, 3, 5), (4, 3, 5), (4, 3, 5)),
        ((4, 3, 5), (4, 1, 1), (4, 3, 5)),
        ((4, 1, 1), (4, 3, 5), (4, 3, 5)),
        ((4,), (4,), (4,)),
        ((4, 3, 5), (3, 1, 1), None),
        ((4, 3, 5), (4, 3, 1), None),
        ((4, 3, 5), (4,), None),
    ],
)
def test_shapes_of_a_product(a: tuple[int, ...], b: tuple[int, ...], shape: tuple[int, ...] | None) -> None:
    if shape is not None:
        assert Multiply().output_shape([a, b]) == shape
    else:
        with pytest.raises(FnetError, match="must be equal, or one of them"):
            Multiply().output_shape([a, b])


def test_a_pool_whose_last_window_reaches_over_the_edge() -> None:
    assert Pool("max", (3, 3), (2, 2), ceil=True).output_shape([(1, 8, 7)]) == (1, 4, 3)
    assert Pool("max", (3, 3), (2, 2)).output_shape([(1, 8, 7)]) == (1, 3, 3)
    assert Pool("max", (2, 2), (3, 3), ceil=True).output_shape([(1, 6, 7)]) == (1, 2, 3)  # not one that begins outside
    assert Pool("max", (2, 2), (3, 3), (1, 1), ceil=True).output_shape([(1, 5, 6)]) == (1, 2, 3)


def test_resnet20_is_the_one_of_its_paper() -> None:
    """He et al. 2016, section 4.2: 0.27 M parameters; here with projections."""
    space = load_space("resnet20")
    body = 432 + 7 * 9 * 16 * 16 - 9 * 16 * 16 + 9 * 16 * 32 + 5 * 9 * 32 * 32 + 9 * 32 * 64 + 5 * 9 * 64 * 64
    skips, norms = 16 * 32 + 32 * 64, 2 * (7 * 16 + 7 * 32 + 7 * 64)
    assert network_cost(space).params == body + skips + norms + 64 * 10 + 10
    assert len(factorizable(space)) == 18


@pytest.mark.parametrize(
    "layer",
    [
        Resample((0, 0), (1, 1)),
        Resample((0,), (2,)),
        Resample((3, 3, 1), (0, 2)),
        Reshape((8, 8, 1)),
        Slice(1, 2),
        Shuffle(2),
        Pool("average", (3, 3), (1, 1), count_padding=True),
        Pool("max", (2, 2), ceil=True),
    ],
    ids=str,
)
def test_every_layer_survives_toml(layer: Layer) -> None:
    nodes = (Node("l", layer, (INPUT,)), Node("f", Flatten(), ("l",)))
    space = Macroarchitecture("s", (4, 4, 4), nodes)
    assert parse_space(to_toml(space)) == space


def test_a_file_of_code_wants_its_function(tmp_path: Path) -> None:
    with pytest.raises(FnetError, match=r"space net.py: name its function too, as in net.py:make"):
        load_space("net.py")
