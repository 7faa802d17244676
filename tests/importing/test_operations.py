"""Operators as layers, held against what torch computes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from fnet_search.arch.layers import Activation, Affine, BatchNorm, Conv, Dense, Flatten, Layer, Pad, Pool, Resample
from fnet_search.base.errors import FnetError
from fnet_search.importing.operations import LAYERS, Call, Layers, aten, pair
from fnet_search.training.network import ScaleShift, apply_stateless

CONVOLUTION = {"bias": None, "stride": [1], "padding": "same", "dilation": [1], "groups": 1}


FOURTEEN = tuple(at for at, times in ((0, 3), (1, 3), (2, 2), (3, 3), (4, 3)) for _ in range(times))
"""Of 5 pixels in windows of 2, 3 and 2, of 6 places each, of which neighbours share 2."""


def applied(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = ScaleShift(layer)(x) if isinstance(layer, Affine) else apply_stateless(layer, [x])
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
        ((5, 4), (3, 4), [Resample(FOURTEEN, (0, 1, 2, 3)), Pool("average", (6, 1), (4, 1))]),
    ],
)
def test_what_an_adaptive_pool_comes_to(size: tuple[int, int], wanted: tuple[int, int], layers: list[Layer]) -> None:
    found = LAYERS[aten.adaptive_avg_pool2d](Call({}, [(1, *size)], (1, *wanted)))
    assert list(found) == layers


@pytest.mark.parametrize(
    ("kernel", "dilation", "pad"),
    [
        ((3, 3), [1], Pad((0, 1, 1), (0, 1, 1))),
        ((5, 3), [2, 1], Pad((0, 4, 1), (0, 4, 1))),
        ((1, 7), [1], Pad((0, 0, 3), (0, 0, 3))),
        ((2, 3), [2], Pad((0, 1, 2), (0, 1, 2))),
        ((2, 4), [1], Pad((0, 0, 1), (0, 1, 2))),
    ],
)
def test_the_padding_that_keeps_a_size(kernel: tuple[int, int], dilation: list[int], pad: Pad) -> None:
    weight = torch.zeros(4, 3, *kernel)
    call = Call({**CONVOLUTION, "weight": weight, "dilation": dilation}, [(3, 9, 8)], (4, 9, 8))
    before, layer = LAYERS[aten.conv2d](call)
    assert (before, layer) == (pad, Conv(4, kernel, dilation=pair(dilation)))
    assert layer.output_shape([before.output_shape([(3, 9, 8)])]) == (4, 9, 8)


@pytest.mark.parametrize(("ceil", "counted"), [(False, True), (True, False), (True, True), (False, False)])
@pytest.mark.parametrize("padding", [[0], [1]])
def test_average_pools(padding: list[int], ceil: bool, counted: bool) -> None:
    """What cannot be told from the plain one is the plain one: 9 pixels in windows of 3."""
    given = {"kernel_size": [3], "stride": [], "padding": padding, "ceil_mode": ceil, "count_include_pad": counted}
    call = Call({**given, "divisor_override": None}, [(2, 9, 9)], (2, 3, 3))
    if padding == [1] and ceil and counted:
        with pytest.raises(FnetError, match="both count_include_pad and ceil_mode"):
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


@pytest.mark.parametrize(
    ("shape", "dim", "layers"),
    [
        ((2, 4, 5), [2], [Pool("average", (4, 1))]),
        ((2, 4, 5), [-1], [Pool("average", (1, 5))]),
        ((2, 4, 1), [2], [Pool("global_average")]),
        ((2, 4), [-1], [Pool("global_average"), Flatten()]),
    ],
)
def test_means_of_a_side(shape: tuple[int, ...], dim: list[int], layers: list[Layer]) -> None:
    left = tuple(size for axis, size in enumerate(shape, 1) if axis != dim[0] % (len(shape) + 1))
    assert list(LAYERS[aten.mean](Call({"dim": dim, "keepdim": False}, [shape], left))) == layers


@pytest.mark.parametrize(("shape", "dim"), [((2, 4, 4), one) for one in (None, [1], [1, 2, 3])] + [((8,), [1])])
def test_other_means(shape: tuple[int, ...], dim: list[int] | None) -> None:
    with pytest.raises(FnetError, match="means and maxima are only supported over height, width or both"):
        LAYERS[aten.mean](Call({"dim": dim, "keepdim": False}, [shape], (2,)))


def test_a_vector_where_a_map_is_read() -> None:
    with pytest.raises(FnetError, match="it reads 8 where a layer needs a feature map"):
        LAYERS[aten.constant_pad_nd](Call({"pad": [1, 1], "value": 0}, [(8,)], (10,)))


def resized(operator: Any, size: int, wanted: int, factor: float | None, **options: Any) -> Layers:
    """A column of so many pixels; a factor of its own, or none."""
    sizes = {"output_size": [wanted, 1], "scale_factors": None}
    given = sizes if factor is None else {"output_size": None, "scale_factors": [factor, 1.0]}
    return LAYERS[operator](Call({**given, **options}, [(1, size, 1)], (1, wanted, 1), target=operator.vec))


def rows_of(layers: Layers, size: int) -> list[int]:
    layer = layers[0] if layers else Resample(tuple(range(size)), (0,))
    assert isinstance(layer, Resample)
    return list(layer.rows)


MODES = {"nearest": aten.upsample_nearest2d, "nearest-exact": aten._upsample_nearest_exact2d}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_nearest_pixels_are_torchs_for_any_factor(mode: str, recompute: bool) -> None:
    """Of every length to 49 and 27 factors."""
    for size in range(1, 50):
        x = torch.arange(float(size)).view(1, 1, -1, 1)
        for factor in (0.3 + 0.1 * step for step in range(27)):
            if int(size * factor) < 1:
                continue
            wanted = F.interpolate(x, scale_factor=(factor, 1), mode=mode, recompute_scale_factor=recompute).flatten()
            found = resized(MODES[mode], size, len(wanted), None if recompute else factor)
            assert rows_of(found, size) == wanted.tolist(), (size, factor)


@pytest.mark.parametrize("mode", MODES)
def test_nearest_pixels_are_torchs_for_any_size(mode: str) -> None:
    """Of 1,425 pairs of lengths to 181, a prime apart."""
    pairs = [divmod(number, 181) for number in range(0, 181 * 181, 23)]
    for size, wanted in ((a + 1, b + 1) for a, b in pairs):
        x = torch.arange(float(size)).view(1, 1, -1, 1)
        expected = F.interpolate(x, (wanted, 1), mode=mode).flatten()
        assert rows_of(resized(MODES[mode], size, wanted, None), size) == expected.tolist(), (size, wanted)


RESIZES = [
    *((size, size * factor, None, False) for size in (1, 2, 5, 14) for factor in (2, 3, 4, 5, 8, 15, 16)),
    *((size, size // factor, 1 / factor, False) for size in (17, 31, 32) for factor in (2, 3, 4, 7)),
    *((size, int(size * factor), factor, False) for size in (3, 8, 11) for factor in (1.0, 2.0, 0.5)),
    *((size, wanted, None, True) for size, wanted in ((1, 5), (4, 1), (7, 7), (4, 7), (4, 13), (7, 4), (14, 27))),
]
"""Pixels, pixels wanted, factor, whether the corners are aligned."""


@pytest.mark.parametrize(("size", "wanted", "factor", "corners"), RESIZES)
def test_bilinear_resizes(size: int, wanted: int, factor: float | None, corners: bool) -> None:
    """In float64, where torch's places are nearly exact."""
    x = torch.randn(2, 3, size, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = {"size": (wanted, 1)} if factor is None else {"scale_factor": (factor, 1.0)}
    expected = F.interpolate(x, mode="bilinear", align_corners=corners, **given)
    found = applied(resized(aten.upsample_bilinear2d, size, wanted, factor, align_corners=corners), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("size", "wanted", "factor", "corners"),
    [(13, 27, None, False), (8, 16, 2.1, False), (7, 224, None, False), (14, 28, None, True), (4, 6, 1.5, False)],
)
def test_bilinear_resizes_of_many_weights(size: int, wanted: int, factor: float | None, corners: bool) -> None:
    with pytest.raises(
        FnetError, match=r"a bilinear resize by 2, 3, 4, .* with align_corners False is supported, and "
    ):
        resized(aten.upsample_bilinear2d, size, wanted, factor, align_corners=corners)


def test_a_bilinear_resize_by_two_is_two_layers() -> None:
    """In each window of four, all of pixel 0; three of 0 and one of 1; one of 0 and three of 1; three of 1 ..."""
    found = resized(aten.upsample_bilinear2d, 3, 6, 2.0, align_corners=False)
    places = (*(0, 0), *(0, 0), *(0, 1), *(1, 1), *(1, 2), *(2, 2), *(2, 2))
    assert list(found) == [Resample(places, (0,)), Pool("average", (4, 1), (2, 1))]


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
            with pytest.raises(FnetError, match="a division by a tensor that depends on the image is not supported"):
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
        (aten.constant_pad_nd, {"pad": [0, 0, 0, 0], "value": 0}, []),
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
    with pytest.raises(FnetError, match="is not supported; only one number per channel is"):
        LAYERS[aten.mul](call)


def test_a_bias_that_is_a_constant() -> None:
    given = {**CONVOLUTION, "padding": "valid", "weight": torch.zeros(3, 3, 1, 1), "bias": CHANNELS}
    call = Call(given, [(3, 4, 5)], (3, 4, 5), frozenset({"bias"}))
    assert list(LAYERS[aten.conv2d](call)) == [Conv(3, (1, 1)), Affine(shift=(0.5, -2.0, 3.0))]
    call = Call({"weight": torch.zeros(3, 7), "bias": CHANNELS}, [(7,)], (3,), frozenset({"bias"}))
    assert list(LAYERS[aten.linear](call)) == [Dense(3, bias=False), Affine(shift=(0.5, -2.0, 3.0))]


@pytest.mark.parametrize(("slopes", "layer"), [(CHANNELS, (0.5, -2.0, 3.0)), (CHANNELS[:1], 0.5)])
def test_slopes_that_are_constants(slopes: Tensor, layer: float | tuple[float, ...]) -> None:
    call = Call({"self": None, "weight": slopes}, [(3, 4, 5)], (3, 4, 5), frozenset({"weight"}))
    assert list(LAYERS[aten.prelu](call)) == [Activation("leaky_relu", layer)]
    trained = replace(call, constant=frozenset())
    assert list(LAYERS[aten.prelu](trained)) == [Activation("prelu", per_channel=len(slopes) > 1)]


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
