"""Operators as layers, held against what torch computes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from fnet_search.errors import FnetError
from fnet_search.layers import Affine, BatchNorm, Conv, Dense, Flatten, Layer, Pool, Resample
from fnet_search.macro import Node
from fnet_search.network import ScaleShift, apply_stateless
from fnet_search.operations import LAYERS, Call, aten, pair

CONVOLUTION = {"bias": None, "stride": [1], "padding": "same", "dilation": [1], "groups": 1}


SIXES = tuple(at for at, times in ((0, 3), (1, 3), (1, 2), (2, 2), (3, 2), (3, 3), (4, 3)) for _ in range(times))
"""Of 5 pixels in windows of 2, 3 and 2."""


def applied(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = ScaleShift(layer)(x) if isinstance(layer, Affine) else apply_stateless(Node("n", layer, ("x",)), [x])
    return x


@pytest.mark.parametrize("wanted", range(1, 13))
@pytest.mark.parametrize("size", range(1, 13))
def test_adaptive_pools_of_any_size(size: int, wanted: int) -> None:
    """In float64: means of repeated pixels are rounded otherwise, by one part in 10^15."""
    x = torch.randn(2, 3, size, 13 - size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    call = Call({}, [(3, size, 13 - size)], (3, wanted, 13 - wanted))
    mean = applied(LAYERS[aten.adaptive_avg_pool2d](call), x)
    assert torch.allclose(mean, F.adaptive_avg_pool2d(x, (wanted, 13 - wanted)), rtol=0, atol=1e-14)
    most = applied(LAYERS[aten.adaptive_max_pool2d](call), x)
    assert torch.equal(most, F.adaptive_max_pool2d(x, (wanted, 13 - wanted)))


@pytest.mark.parametrize(
    ("size", "wanted", "layers"),
    [
        ((6, 6), (6, 6), []),
        ((6, 4), (1, 1), [Pool("global_average")]),
        ((6, 4), (3, 1), [Pool("average", (2, 4))]),
        ((6, 4), (5, 3), [Pool("average", (2, 2), (1, 1))]),
        ((1, 1), (3, 2), [Resample((0, 0, 0), (0, 0))]),
        ((3, 4), (2, 2), [Pool("average", (2, 2), (1, 2))]),
        ((5, 4), (3, 4), [Resample(SIXES, (0, 1, 2, 3)), Pool("average", (6, 1))]),
    ],
)
def test_what_an_adaptive_pool_comes_to(size: tuple[int, int], wanted: tuple[int, int], layers: list[Layer]) -> None:
    found = LAYERS[aten.adaptive_avg_pool2d](Call({}, [(1, *size)], (1, *wanted)))
    assert list(found) == layers


@pytest.mark.parametrize(
    ("kernel", "dilation", "padding"),
    [((3, 3), [1], (1, 1)), ((5, 3), [2, 1], (4, 1)), ((1, 7), [1], (0, 3)), ((2, 3), [2], (1, 2))],
)
def test_the_padding_that_keeps_a_size(kernel: tuple[int, int], dilation: list[int], padding: tuple[int, int]) -> None:
    weight = torch.zeros(4, 3, *kernel)
    call = Call({**CONVOLUTION, "weight": weight, "dilation": dilation}, [(3, 9, 8)], (4, 9, 8))
    (layer,) = LAYERS[aten.conv2d](call)
    assert layer == Conv(4, kernel, padding=padding, dilation=pair(dilation))
    assert layer.output_shape([(3, 9, 8)]) == (4, 9, 8)


def test_a_padding_that_differs_from_side_to_side() -> None:
    with pytest.raises(FnetError, match="padding 'same' of an even kernel is not the same on both sides"):
        LAYERS[aten.conv2d](Call({**CONVOLUTION, "weight": torch.zeros(4, 3, 2, 3)}, [(3, 9, 8)], (4, 9, 8)))


@pytest.mark.parametrize(("ceil", "counted"), [(False, True), (True, False), (True, True), (False, False)])
@pytest.mark.parametrize("padding", [[0], [1]])
def test_average_pools(padding: list[int], ceil: bool, counted: bool) -> None:
    """What cannot be told from the plain one is the plain one: 9 pixels in windows of 3."""
    given = {"kernel_size": [3], "stride": [], "padding": padding, "ceil_mode": ceil, "count_include_pad": counted}
    call = Call({**given, "divisor_override": None}, [(2, 9, 9)], (2, 3, 3))
    if padding == [1] and ceil and counted:
        with pytest.raises(FnetError, match="counts its padding, with ceil_mode"):
            LAYERS[aten.avg_pool2d](call)
        return
    (layer,) = LAYERS[aten.avg_pool2d](call)
    x = torch.randn(1, 2, 9, 9)
    assert torch.equal(applied([layer], x), F.avg_pool2d(x, 3, None, padding[0], ceil, counted))
    if padding == [0]:
        assert layer == Pool("average", (3, 3))


MEANS: dict[bool, list[Layer]] = {True: [Pool("global_average")], False: [Pool("global_average"), Flatten()]}


@pytest.mark.parametrize("keep", MEANS)
def test_means(keep: bool) -> None:
    call = Call({"dim": [-1, 2], "keepdim": keep}, [(2, 4, 4)], (2, 1, 1) if keep else (2,))
    assert list(LAYERS[aten.mean](call)) == MEANS[keep]


@pytest.mark.parametrize("dim", [None, [1], [2], [1, 2, 3]])
def test_other_means(dim: list[int] | None) -> None:
    with pytest.raises(FnetError, match="only that over height and width is a layer"):
        LAYERS[aten.mean](Call({"dim": dim, "keepdim": False}, [(2, 4, 4)], (2,)))


def test_a_vector_where_a_map_is_read() -> None:
    with pytest.raises(FnetError, match="it reads 8 where a layer reads a feature map"):
        LAYERS[aten.mean](Call({"dim": [2, 3], "keepdim": False}, [(8,)], ()))


CHANNELS = torch.tensor([0.5, -2.0, 3.0])
CONSTANTS = {
    "a number": torch.tensor(4.0, dtype=torch.float64),
    "a channel": CHANNELS.view(3, 1, 1),
    "a channel, whole numbers": torch.tensor([[[[1]], [[2]], [[3]]]]),
    "the whole shape": CHANNELS.view(1, 3, 1, 1).expand(2, 3, 4, 5),
}
ARITHMETIC: dict[str, tuple[Any, Any, dict[str, float]]] = {
    "add": (aten.add, torch.add, {"alpha": 1}),
    "add with a factor": (aten.add, torch.add, {"alpha": -3}),
    "sub": (aten.sub, torch.sub, {"alpha": 1}),
    "sub with a factor": (aten.sub, torch.sub, {"alpha": 2}),
    "rsub": (aten.rsub, torch.rsub, {"alpha": 1}),
    "rsub with a factor": (aten.rsub, torch.rsub, {"alpha": 2}),
    "mul": (aten.mul, torch.mul, {}),
    "div": (aten.div, torch.div, {}),
}


@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_with_constants(name: str, constant: str) -> None:
    """In both orders; layers and torch round alike, but for a division, which is a product with the inverse."""
    packet, function, options = ARITHMETIC[name]
    x, value = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)), CONSTANTS[constant]
    for image, fixed in (("self", "other"), ("other", "self")):
        given = {image: None, fixed: value, **options}
        call = Call(given, [(3, 4, 5)], (3, 4, 5), frozenset({fixed}))
        if (name, fixed) == ("div", "self"):
            with pytest.raises(FnetError, match="a division by what hangs on the image is no layer"):
                LAYERS[packet](call)
            continue
        layers = LAYERS[packet](call)
        assert not any(layer.trained for layer in layers if isinstance(layer, Affine))
        operands = (x, value.float()) if image == "self" else (value.float(), x)
        torch.testing.assert_close(applied(layers, x), function(*operands, **options), rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize(
    ("packet", "given", "layers"),
    [
        (aten.mul, {"other": torch.tensor(1.0)}, []),
        (aten.add, {"other": torch.zeros(3, 1, 1), "alpha": 2}, []),
        (aten.sub, {"other": torch.zeros(()), "alpha": 1}, []),
        (aten.rsub, {"other": torch.zeros(()), "alpha": 1}, [Affine((-1.0,))]),
        (aten.div, {"other": torch.full((3, 4, 5), 4.0)}, [Affine((0.25,))]),
        (aten.mul, {"other": CHANNELS.view(3, 1, 1)}, [Affine((0.5, -2.0, 3.0))]),
    ],
)
def test_what_changes_nothing_is_no_layer(packet: Any, given: dict[str, Any], layers: list[Layer]) -> None:
    call = Call({"self": None, **given}, [(3, 4, 5)], (3, 4, 5), frozenset({"other"}))
    assert list(LAYERS[packet](call)) == layers


@pytest.mark.parametrize(
    ("value", "scale"), [(torch.ones(()), (1.0,)), (torch.ones(1, 1, 1), (1.0,)), (torch.ones(3, 1, 1), (1.0,) * 3)]
)
def test_a_parameter_is_a_layer_whatever_its_numbers(value: Tensor, scale: tuple[float, ...]) -> None:
    call = Call({"self": None, "other": value}, [(3, 3, 3)], (3, 3, 3))
    assert list(LAYERS[aten.mul](call)) == [Affine(scale, trained=True)]


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 3, 3), (3, 1, 3)])
def test_a_parameter_that_is_not_a_number_a_channel(shape: tuple[int, ...]) -> None:
    """Though all its numbers are equal at first."""
    call = Call({"self": None, "other": torch.ones(shape)}, [(3, 3, 3)], (3, 3, 3))
    with pytest.raises(FnetError, match="is no layer: one number a channel would be"):
        LAYERS[aten.mul](call)


def test_a_bias_that_is_a_constant() -> None:
    given = {**CONVOLUTION, "weight": torch.zeros(3, 3, 1, 1), "bias": CHANNELS}
    call = Call(given, [(3, 4, 5)], (3, 4, 5), frozenset({"bias"}))
    assert list(LAYERS[aten.conv2d](call)) == [Conv(3, (1, 1)), Affine(shift=(0.5, -2.0, 3.0))]
    call = Call({"weight": torch.zeros(3, 7), "bias": CHANNELS}, [(7,)], (3,), frozenset({"bias"}))
    assert list(LAYERS[aten.linear](call)) == [Dense(3, bias=False), Affine(shift=(0.5, -2.0, 3.0))]


@pytest.mark.parametrize(
    ("weight", "bias", "constant", "after"),
    [
        (None, None, (), []),
        (CHANNELS, None, (), [Affine((0.5, -2.0, 3.0), trained=True)]),
        (None, CHANNELS, (), [Affine(shift=(0.5, -2.0, 3.0), trained=True)]),
        (CHANNELS, CHANNELS, ("weight",), [Affine((0.5, -2.0, 3.0)), Affine(shift=(0.5, -2.0, 3.0), trained=True)]),
    ],
)
def test_norms_of_which_not_all_is_trained(
    weight: Tensor | None, bias: Tensor | None, constant: tuple[str, ...], after: list[Layer]
) -> None:
    call = Call({"weight": weight, "bias": bias, "eps": 0.1}, [(3, 4, 5)], (3, 4, 5), frozenset(constant))
    layers = LAYERS[aten._native_batch_norm_legit_no_training](call)
    assert list(layers) == [BatchNorm(0.1, affine=False), *after]
