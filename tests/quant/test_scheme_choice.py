"""The scheme that a network is quantized with: on which images it is calibrated, and which of several counts."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from fnet_search.base.errors import FnetError
from fnet_search.quant.calibration import (
    CALIBRATION_BATCH,
    CALIBRATION_SAMPLES,
    Calibrated,
    Quantized,
    calibrate_for,
    calibration_batches,
    quantize_trained,
)
from fnet_search.quant.fold import FoldedNetwork, fold
from fnet_search.quant.ranges import calibrate
from fnet_search.quant.scheme import CHOICE, MINMAX, MSE, PAPER, Scheme
from fnet_search.quant.scheme_choice import CHOICE_SAMPLES, FIRST_ROUND, MIN_IMAGES, least_divergent
from fnet_search.training.datasets import DataSet
from tests.support.networks import MIXED, noise, randomized

Counts = list[tuple[int, int]]


def training_images(data: DataSet) -> Tensor:
    """All, in the random order in which they are taken."""
    return torch.cat(list(calibration_batches(data, 3, len(data.train))()))


@pytest.mark.parametrize(("images", "calibrated"), [(100, 50), (101, 50), (1, 1)])
def test_several_schemes_leave_half_of_few_images_to_choose_on(images: int, calibrated: int) -> None:
    trained, data = randomized(MIXED), noise(MIXED, images)
    told: Counts = []
    found = calibrate_for(trained, CHOICE, data, 3, lambda done, total: told.append((done, total)))
    assert told[-1] == (2 * calibrated, 2 * calibrated), "two passes for all schemes together"
    first = training_images(data)[:calibrated]
    assert list(found.stats) == [MSE, MINMAX]
    for method, stats in found.stats.items():
        alone = calibrate(fold(trained), lambda: iter([first]), method)
        assert {name: (one.low, one.high) for name, one in stats.items()} == {
            name: (one.low, one.high) for name, one in alone.items()
        }
    least_divergent(found, CHOICE, data, 3, lambda done, total: told.append((done, total)))
    rest = max(1, images - calibrated)
    assert told[-1] == (rest, rest)


def test_many_images_are_not_all_taken() -> None:
    data, two = noise(MIXED, CALIBRATION_SAMPLES + CHOICE_SAMPLES + 100), (Scheme(MINMAX), Scheme(MINMAX, True))
    told: Counts = []
    found = calibrate_for(randomized(MIXED), two, data, 3, lambda done, total: told.append((done, total)))
    assert told[-1] == (CALIBRATION_SAMPLES, CALIBRATION_SAMPLES)
    least_divergent(found, two, data, 3, lambda done, total: told.append((done, total)))
    assert told[-1] == (CHOICE_SAMPLES, CHOICE_SAMPLES)


def test_the_least_divergent_on_other_images_than_it_was_calibrated_on() -> None:
    """Of few images all are there in both rounds: the best of the four without bias correction, and that with it."""
    trained, data = randomized(MIXED), noise(MIXED, 120)
    calibrated = calibrate_for(trained, CHOICE, data, 3)
    others = training_images(data)[60:]
    log_p = F.log_softmax(calibrated.folded(others).double(), 1)

    def divergence(scheme: Scheme) -> float:
        log_q = F.log_softmax(calibrated.quantized(scheme).network(others).double(), 1)
        return float((log_p.exp() * (log_p - log_q)).sum())

    plain = min((scheme for scheme in CHOICE if not scheme.bias_correct), key=divergence)
    expected = min((plain, replace(plain, bias_correct=True)), key=divergence)
    assert len({divergence(scheme) for scheme in CHOICE}) == len(CHOICE)
    found = least_divergent(calibrated, CHOICE, data, 3)
    assert found.scheme == expected
    again = quantize_trained(trained, expected, noise(MIXED, 60), 3)  # other images
    assert found.network.params.keys() == again.network.params.keys()
    only = calibrate_for(trained, (PAPER,), data, 3)
    assert least_divergent(only, (PAPER,), data, 3).network is only.quantized(PAPER).network


class Off:
    """A network that is off by so much, by half of it or by the double at random, and counts its images."""

    def __init__(self, folded: FoldedNetwork, error: float, seed: int) -> None:
        self.folded, self.error, self.images = folded, error, 0
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        self.images += len(x)
        y = self.folded(x)
        off = 2 ** (2 * torch.rand(len(x), 1, generator=self.generator) - 1)
        return y + self.error * off * torch.arange(y.shape[1])


@pytest.mark.parametrize("close", [False, True])
def test_images_are_spent_on_those_that_are_close(close: bool) -> None:
    """32 images tell an error of 0.1 from one of 0.5, or more; 0.1 and 0.1001 are compared on all."""
    folded, data = fold(randomized(MIXED)), noise(MIXED, 2 * CHOICE_SAMPLES)
    plain = [scheme for scheme in CHOICE if not scheme.bias_correct]
    errors = dict(zip(plain, (2.0, 0.1, 0.1001 if close else 0.5, 2.1), strict=True))
    errors |= {replace(scheme, bias_correct=True): 0.1001 if close else 0.02 for scheme in plain}
    networks = {scheme: Off(folded, error, seed) for seed, (scheme, error) in enumerate(errors.items())}
    known = {
        scheme: Quantized(scheme, folded, {}, network)  # type: ignore[arg-type]  # it is called, no more
        for scheme, network in networks.items()
    }
    found = least_divergent(Calibrated(folded, {}, lambda: iter(()), {}, known), CHOICE, data, 3).scheme
    best = replace(found, bias_correct=False)
    assert best in plain[1:3] if close else found == replace(plain[1], bias_correct=True)
    assert FIRST_ROUND % CALIBRATION_BATCH == MIN_IMAGES % CALIBRATION_BATCH == 0
    first, second = (FIRST_ROUND, CHOICE_SAMPLES - FIRST_ROUND) if close else (MIN_IMAGES, MIN_IMAGES)
    seen = {scheme: network.images for scheme, network in networks.items()}
    assert [seen[scheme] for scheme in plain] == [first + second * (scheme == best) for scheme in plain]
    assert [seen[replace(one, bias_correct=True)] for one in plain] == [second * (one == best) for one in plain]


def test_a_network_that_no_scheme_can_quantize() -> None:
    trained, data = randomized(MIXED), noise(MIXED, 20)
    with torch.no_grad():
        next(tensor for name, tensor in trained.state_dict().items() if name.endswith("weight")).fill_(torch.inf)
    for schemes in (CHOICE, CHOICE[:1]):
        with pytest.raises(FnetError, match="not finite"):
            calibrate_for(trained, schemes, data, 3)
