"""The scheme that a network is quantized with: on which images it is calibrated, and which of several counts."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from networks import MIXED, noise, randomized
from torch import Tensor

from fnet_search.data import DataSet
from fnet_search.errors import FnetError
from fnet_search.fold import fold
from fnet_search.prepare import (
    AT_ONCE,
    CALIBRATION_SAMPLES,
    CHOICE_SAMPLES,
    ROUNDS,
    Quantized,
    calibration,
    least_divergent,
    prepare,
    prepare_each,
)
from fnet_search.ranges import calibrate
from fnet_search.scheme import CHOICE, MINMAX, MSE, PAPER, Scheme, parse_scheme


def training_images(data: DataSet) -> Tensor:
    """All, in the random order in which they are taken."""
    return torch.cat(list(calibration(data, 3, len(data.train))()))


@pytest.mark.parametrize(("images", "calibrated"), [(100, 50), (101, 50), (1, 1)])
def test_several_schemes_leave_half_of_few_images_to_choose_on(images: int, calibrated: int) -> None:
    trained, data = randomized(MIXED), noise(MIXED, images)
    told: list[tuple[int, int]] = []
    found = prepare_each(trained, CHOICE, data, 3, lambda done, total: told.append((done, total)))
    assert [one.scheme for one in found] == list(CHOICE)
    assert told[-1] == (2 * calibrated, 2 * calibrated), "two passes for all schemes together"
    first = training_images(data)[:calibrated]
    for method in (MINMAX, MSE):
        stats = calibrate(fold(trained), lambda: iter([first]), method)
        ranges = {name: (one.low, one.high) for name, one in stats.items()}
        same = [one for one in found if one.scheme.ranges == method]
        assert len(same) == len(CHOICE) / 2
        assert all({name: (s.low, s.high) for name, s in one.stats.items()} == ranges for one in same)
    counts: list[tuple[int, int]] = []
    least_divergent(found, data, 3, lambda done, total: counts.append((done, total)))
    rest = max(1, images - calibrated)
    assert counts[-1] == (rest, rest)


def test_many_images_are_not_all_taken() -> None:
    data = noise(MIXED, CALIBRATION_SAMPLES + CHOICE_SAMPLES + 100)
    two = (Scheme(MINMAX), Scheme(MINMAX, per_channel=True))
    counts: list[tuple[int, int]] = []
    tried = prepare_each(randomized(MIXED), two, data, 3, lambda done, total: counts.append((done, total)))
    assert counts[-1] == (CALIBRATION_SAMPLES, CALIBRATION_SAMPLES)
    least_divergent(tried, data, 3, lambda done, total: counts.append((done, total)))
    assert counts[-1] == (CHOICE_SAMPLES, CHOICE_SAMPLES)


def test_the_least_divergent_on_other_images_than_it_was_calibrated_on() -> None:
    """In float64, by the mean KL divergence; fewer than the first of ROUNDS: all are compared on all."""
    trained, data = randomized(MIXED), noise(MIXED, 2 * ROUNDS[0] - 2)
    tried = prepare_each(trained, (*CHOICE, PAPER), data, 3)
    others = training_images(data)[len(data.train) // 2 :]
    log_p = F.log_softmax(tried[0].folded(others).double(), 1)
    divergences = [
        float((log_p.exp() * (log_p - F.log_softmax(one.network(others).double(), 1))).sum()) for one in tried
    ]
    assert len(set(divergences)) > 2
    assert least_divergent(tried, data, 3) is tried[divergences.index(min(divergences))]
    assert least_divergent(tried[3:4], data, 3) is tried[3]


class Off:
    """A network that is off by so much, and counts its images."""

    def __init__(self, quantized: Quantized, error: float) -> None:
        self.folded, self.error, self.images = quantized.folded, error, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.images += len(x)
        y = self.folded(x)
        return y + self.error * torch.arange(y.shape[1])


def test_the_better_half_goes_on() -> None:
    """Most images are spent on those that are close; of equal ones the first wins."""
    images = 2 * CHOICE_SAMPLES
    data = noise(MIXED, images)
    one = prepare(randomized(MIXED), PAPER, noise(MIXED, 10), 3)
    networks = [Off(one, error) for error in (0.5, 0.1, 0.3, 0.1, 0.2)]
    schemes = [Scheme(*kind) for kind in product((MSE, MINMAX), (False, True), (False, True))]
    tried = [
        replace(one, scheme=scheme, network=network)  # type: ignore[arg-type]  # it is called, no more
        for scheme, network in zip(schemes, networks, strict=False)
    ]
    assert least_divergent(tried, data, 3) is tried[1]
    assert all(stage % AT_ONCE == 0 for stage in ROUNDS)
    assert [network.images for network in networks] == [ROUNDS[0], CHOICE_SAMPLES, ROUNDS[0], CHOICE_SAMPLES, ROUNDS[1]]


def test_a_network_that_no_scheme_can_quantize() -> None:
    trained, data = randomized(MIXED), noise(MIXED, 20)
    with torch.no_grad():
        next(tensor for name, tensor in trained.state_dict().items() if name.endswith("weight")).fill_(torch.inf)
    for schemes in (CHOICE, CHOICE[:1]):
        with pytest.raises(FnetError, match="not finite"):
            prepare_each(trained, schemes, data, 3)
