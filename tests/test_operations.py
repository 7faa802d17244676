"""Operators as layers, held against what torch computes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from fnet_search.errors import FnetError
from fnet_search.layers import Conv, Flatten, Layer, Pool, Resample
from fnet_search.macro import Node
from fnet_search.network import apply_stateless
from fnet_search.operations import LAYERS, Call, aten, pair

CONVOLUTION = {"bias": None, "stride": [1], "padding": "same", "dilation": [1], "groups": 1}


SIXES = tuple(at for at, times in ((0, 3), (1, 3), (1, 2), (2, 2), (3, 2), (3, 3), (4, 3)) for _ in range(times))
"""Of 5 pixels in windows of 2, 3 and 2."""


def applied(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = apply_stateless(Node("n", layer, ("x",)), [x])
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
