import numpy as np
import pytest
import torch

from fnet_search.quant.quant_params import QuantParams, quant_params

F32 = np.float32


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero"),
    [
        (0.0, 255.0, 1.0, 0),
        (-255.0, 0.0, 1.0, 255),
        (-3.0, 252.0, 1.0, 3),
        (-2.5, 252.5, 1.0, 2),  # halves go to the even
        (-3.5, 251.5, 1.0, 4),
        (-0.4, 254.6, 1.0, 0),
        (3.0, 510.0, 2.0, 0),  # widened to hold zero
        (-510.0, -7.0, 2.0, 255),
        (5.1, 5.1, 0.02, 0),
        (-5.1, -5.1, 0.02, 255),
        (0.0, 0.0, 1.0, 0),  # nothing to tell apart
        (-0.0, 0.0, 1.0, 0),
        (0.0, 1e-50, 1.0, 0),
        (-1e30, 1e30, 2e30 / 255, 128),
        (0.0, 1e-30, 1e-30 / 255, 0),
    ],
)
def test_parameters_of_a_range(low: float, high: float, scale: float, zero: int) -> None:
    assert quant_params(low, high) == QuantParams(float(F32(scale)), zero)


def test_the_zero_point_is_computed_with_the_scale_before_it_is_rounded() -> None:
    """A step of 1 + 2^-30 is 1 in float32; the zero point is just below a half, or just above."""
    step = 1 + 2**-30
    for halves in (5, 7, 201, 203):
        low = -halves / 2 * 1.0
        exact, coarse = np.rint(-low / step), np.rint(-low / F32(step))
        assert quant_params(low, 255 * step + low) == QuantParams(1.0, int(exact))
        assert exact == halves // 2
        assert coarse == round(halves / 2)


def test_zero_is_always_exact() -> None:
    rng = np.random.default_rng(0)
    for low, high in rng.normal(size=(200, 2)) * 10.0 ** rng.integers(-9, 9, (200, 1)):
        params = quant_params(float(low), float(high))
        assert 0 <= params.zero <= 255
        assert params.scale == float(F32(params.scale))
        assert params.dequantize(params.quantize(torch.zeros(1))).item() == 0


def test_quantizing_rounds_halves_to_even_and_clips() -> None:
    params = QuantParams(0.5, 3)
    x = torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75, 0.0, 1e30, -1e30, float("inf"), -float("inf"), 126.0, 126.25])
    assert params.quantize(x).tolist() == [3, 5, 5, 3, 1, 3, 255, 0, 255, 0, 255, 255]
    assert params.dequantize(torch.tensor([0, 3, 255], dtype=torch.uint8)).tolist() == [-1.5, 0, 126]


def test_quantizing_divides() -> None:
    """The runtime divides by the scale; a product with its reciprocal gives another code now and then."""
    params = QuantParams(float(F32(0.1)), 0)
    halves = (np.arange(0, 255) + F32(0.5)).astype(F32) * F32(0.1)
    x = np.concatenate([np.nextafter(halves, F32(0)), halves, np.nextafter(halves, F32(99))])
    divided = np.clip(np.rint(x / F32(0.1)), 0, 255)
    assert np.array_equal(params.quantize(torch.from_numpy(x)).numpy(), divided)
    assert not np.array_equal(np.clip(np.rint(x * (F32(1) / F32(0.1))), 0, 255), divided)
