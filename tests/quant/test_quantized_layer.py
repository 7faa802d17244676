"""Weights and biases of a layer as codes."""

from itertools import product

import numpy as np
import pytest
import torch

from fnet_search.base.errors import FnetError
from fnet_search.quant.quant_params import QuantParams
from fnet_search.quant.quantized_layer import quantize_layer
from tests.support.quint8_oracle import COUNT, F32


def test_weights_by_min_and_max_and_biases_in_their_scale() -> None:
    weight = torch.tensor([[-1.0, 0.5], [126.5, 3.0], [0.25, -0.75]])
    layer = quantize_layer(weight, torch.tensor([0.625, 0.875, -0.625]), QuantParams(0.5, 99))
    assert layer.params == (QuantParams(0.5, 2),)
    assert layer.codes.tolist() == [[0, 3], [255, 8], [2, 0]]
    assert layer.bias.dtype == torch.int32
    assert layer.bias.tolist() == [2, 4, -2]  # in steps of 0.25, halves to the even


def test_weights_with_a_scale_a_channel() -> None:
    """The smallest that holds them in -128 to 127 steps."""
    weight = torch.tensor([[-1.0, 0.5], [31.75, -8.0], [-0.25, 0.1], [0.0, 0.0]])
    layer = quantize_layer(weight, torch.tensor([1.0, -1.0, 0.625, 3.0]), QuantParams(0.5, 99), per_channel=True)
    steps = (1 / 128, 31.75 / 127, 0.25 / 128, 31.75 / 127)  # a dead channel has the widest one's
    assert layer.params == tuple(QuantParams(float(F32(step)), 128) for step in steps)
    assert layer.codes.tolist() == [[0, 192], [255, 96], [0, 179], [128, 128]]
    assert layer.bias.tolist() == [256, -8, 640, 24]  # in halves of these steps


def test_a_channel_is_held_to_half_a_step_of_its_own() -> None:
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(
        (rng.normal(size=(200, 5, 3, 3)) * 10.0 ** rng.uniform(-6, 3, (200, 1, 1, 1))).astype(F32)
    )
    weight[:40] = weight[:40].abs()
    weight[40:80] = -weight[40:80].abs()
    layer = quantize_layer(weight, torch.zeros(200), QuantParams(0.1, 0), per_channel=True)
    assert {params.zero for params in layer.params} == {128}
    scales = torch.tensor([params.scale for params in layer.params], dtype=torch.float64)
    widest = torch.maximum(weight.flatten(1).amax(1) / 127, -weight.flatten(1).amin(1) / 128)
    assert torch.allclose(scales, widest.double(), rtol=1e-6, atol=0)
    held = torch.stack([params.dequantize(codes) for params, codes in zip(layer.params, layer.codes, strict=True)])
    assert torch.equal(layer.weight, held)
    errors = (held.double() - weight.double()).abs().flatten(1).amax(1)
    assert bool((errors <= scales * (0.5 + 1e-4)).all())  # 127 steps of float32


@pytest.mark.parametrize("bias", [1e-3, -1.0, 1e4, -1e9, 1e30])
@pytest.mark.parametrize("weight", [0.0, 1e-38, 1e-20, 1e-6, 1.0])
def test_channels_whose_bias_is_far_above_their_weights(weight: float, bias: float) -> None:
    """The bias comes out right to a part in 2^24, or half a step; the weights as well as int32 allows."""
    source = QuantParams(float(F32(0.013)), 7)
    layer = quantize_layer(torch.tensor([[weight, -weight], [0.5, 0.25]]), torch.tensor([bias, 0.1]), source, True)
    scales = F32(source.scale) * np.array([params.scale for params in layer.params], dtype=F32)
    assert np.isfinite(scales).all()
    assert (scales > 0).all()
    assert np.abs(layer.bias.numpy()).max() <= 2**30 * (1 + 2**-20)
    real = layer.bias.numpy().astype(np.float64) * scales.astype(np.float64)
    assert real[0] == pytest.approx(float(F32(bias)), rel=2**-23, abs=float(scales[0]) / 2)
    step = layer.params[0].scale
    assert step <= max(weight / 127 if weight else 0.5 / 127, abs(bias) / (source.scale * 2**30), 2**-126) * 1.0001
    alone = quantize_layer(torch.tensor([[0.5, 0.25]]), torch.tensor([0.1]), source, True)
    assert (layer.params[1], layer.bias[1]) == (alone.params[0], alone.bias[0])
    assert layer.codes[1].tolist() == alone.codes[0].tolist()


def test_a_channel_too_small_for_a_scale_in_float32() -> None:
    layer = quantize_layer(torch.tensor([[1e-44], [1.0]]), torch.zeros(2), QuantParams(1.0, 0), per_channel=True)
    assert layer.params[0] == QuantParams(2.0**-126, 128)
    assert layer.codes.tolist() == [[128], [255]]
    assert layer.bias.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("per_channel", "steps", "zero", "codes"),
    [
        (False, [2 / (0.25 * 2**30)], 0, [2**28, 0, -(2**30)]),
        (True, [0.5 / (0.25 * 2**30), 1.0, 2 / (0.25 * 2**30)], 128, [2**30, 0, -(2**30)]),
    ],
)
def test_weights_of_zero_have_a_scale_for_the_bias(
    per_channel: bool, steps: list[float], zero: int, codes: list[int]
) -> None:
    layer = quantize_layer(torch.zeros(3, 2), torch.tensor([0.5, 0.0, -2.0]), QuantParams(0.25, 0), per_channel)
    assert layer.params == tuple(QuantParams(step, zero) for step in steps)
    assert layer.codes.tolist() == [[zero, zero]] * 3
    assert layer.bias.tolist() == codes


def test_biases_are_rounded_in_float64() -> None:
    """A float32 quotient has no odd numbers above 2^24."""
    weight = torch.tensor([[127.5], [255.0]])
    source = QuantParams(float(F32(1e-7)), 0)
    bias = torch.tensor([12.345678, -34.56789])
    layer = quantize_layer(weight, bias, source)
    scale = float(F32(1e-7) * F32(1.0))
    exact = [int(np.rint(value / scale)) for value in bias.double().tolist()]
    assert layer.bias.tolist() == exact
    assert any(value != int(F32(value)) for value in exact)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_scale_is_widened_only_where_int32_has_no_room_for_the_bias(sign: int) -> None:
    room = 2**31 - 1 - COUNT * 255 * 255
    weight, source = torch.full((1, COUNT), 127.5) * sign, QuantParams(1.0, 0)
    layer = quantize_layer(weight, torch.tensor([sign * room * 0.5]), source)
    assert layer.params == (QuantParams(0.5, 0 if sign == 1 else 255),)
    assert layer.bias.tolist() == [sign * room]
    wider = quantize_layer(weight, torch.tensor([sign * (room + 1) * 0.5]), source)
    (params,) = wider.params
    assert params.zero == layer.params[0].zero
    assert 1 < params.scale < 1.01 * 1.0 / (1 - 128 * COUNT / 2**30)  # half of int32 is left to bias correction
    assert (wider.weight - weight).abs().max() <= params.scale / 2
    assert float(wider.bias) * params.scale == pytest.approx(sign * (room + 1) * 0.5, abs=params.scale / 2)


def test_weights_whose_sums_could_leave_int32_are_refused() -> None:
    weight = torch.ones(1, COUNT + 1)
    for bias in (0.0, 1.0, -1e9):
        with pytest.raises(FnetError, match=r"int32 accumulation can overflow: .* reaches 2\.15e\+09"):
            quantize_layer(weight, torch.tensor([bias]), QuantParams(1.0, 0))


SHAPES = [(8, 5, 3, 3), (8, 1, 3, 3), (6, 40), (2, 30_000)]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-12, 1e-9, 1e-6, 1e-3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_biases_far_above_the_weights_come_out_right(shape: tuple[int, ...], size: float, per_channel: bool) -> None:
    """Also where half of the channels are zero, and where the sources are coarse or fine."""
    rng = np.random.default_rng(3)
    bias = torch.from_numpy(rng.uniform(-1, 1, shape[0]).astype(F32))
    for step, some in product((1e-4, 0.02, 3.0), (False, True)):
        weight = torch.from_numpy((size * rng.normal(size=shape)).astype(F32))
        if some:
            weight[: shape[0] // 2] = 0
        source = QuantParams(float(F32(step)), 7)
        layer = quantize_layer(weight, bias, source, per_channel)
        scale = layer.bias_scale(source).double()
        held = layer.bias.double() * scale
        assert bool((scale >= np.finfo(F32).tiny).all())
        assert bool(((held - bias).abs() <= bias.abs() * 2**-20 + scale / 2).all())
        # An output is wrong by half a step of each weight, and of the bias, at most.
        reach = 255 * source.scale * (layer.weight.double() - weight.double()).abs().flatten(1).sum(1)
        whole = 255 * source.scale * weight.double().abs().flatten(1).sum(1) + bias.abs()
        if some and per_channel:
            assert bool((reach[: shape[0] // 2] == 0).all())
        if size <= 1e-6 and len(shape) > 2:
            assert float((reach + scale / 2).max()) < 0.004 * float(whole.max())


def test_a_bias_scale_is_a_normal_number() -> None:
    """1e-30 times 1e-30 is none in float32; the runtime has no integers for it."""
    source = QuantParams(float(F32(1e-30)), 0)
    for per_channel in (False, True):
        layer = quantize_layer(torch.full((1, 1), 1e-30), torch.zeros(1), source, per_channel)
        assert float(layer.bias_scale(source)) == pytest.approx(2.0**-126, rel=1e-6)
        assert layer.bias.tolist() == [0]
