"""What is measured of a network, and how it is made ready for that."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.layers import Activation, Conv, Dense, Flatten
from fnet_search.candidates.measure import MEASURED_BATCH, measure_split
from fnet_search.deploy.export import quantized_model
from fnet_search.deploy.runtime import Runtime
from fnet_search.policy.evaluation import Audit, Evaluation
from fnet_search.policy.metric import ClassResult
from fnet_search.quant.bias_correction import correct_biases
from fnet_search.quant.calibration import (
    CALIBRATION_BATCH,
    CALIBRATION_SAMPLES,
    CORRECTION_SAMPLES,
    calibration_batches,
    quantize_trained,
)
from fnet_search.quant.equalize import equalize
from fnet_search.quant.fold import fold
from fnet_search.quant.quantize import quantize
from fnet_search.quant.ranges import calibrate
from fnet_search.quant.scheme import RangeMethod, parse_scheme
from fnet_search.training.datasets import DataSet, Split
from tests.support.candidates import REGULAR, TINY
from tests.support.networks import MIXED, batches_of, noise, normal, randomized, sequence


def test_calibration_samples_are_random_training_images_and_always_the_same(data: DataSet) -> None:
    batches = calibration_batches(data, 3, 300)
    first, second = torch.cat(list(batches())), torch.cat(list(batches()))
    assert [len(batch) for batch in batches()] == [128, 128, 44]
    assert torch.equal(first, second)
    training = {image.numpy().tobytes() for image in data.normalise(data.train.images)}
    drawn = {image.numpy().tobytes() for image in first}
    assert drawn <= training
    assert len(drawn) > 290
    assert not torch.equal(first, torch.cat(list(calibration_batches(data, 4, 300)())))
    assert sum(map(len, calibration_batches(data, 3, CALIBRATION_SAMPLES)())) == 400


def test_metrics_by_hand() -> None:
    """One weight that 8 bits do not hold, two classes, three images."""
    folded = fold(randomized(sequence((1, 1, 1), f=Flatten(), d=Dense(2))))
    folded.weight["d"].copy_(torch.tensor([[1.0], [-0.3]]))
    folded.bias["d"].copy_(torch.tensor([0.0, 0.5]))
    split = Split(torch.tensor([0, 100, 255], dtype=torch.uint8).view(3, 1, 1, 1), torch.tensor([1, 1, 1]))
    data = DataSet("d", ("a", "b"), split, split, split, (0.0,), (1.0,), True)
    x = data.normalise(split.images)
    quantized = quantize(folded, calibrate(folded, batches_of(x), RangeMethod()))
    counts: list[int] = []
    found = measure_split(folded, quantized, data, split, counts.append)
    y, y8 = folded(x).double(), quantized(x).double()
    assert not torch.equal(y, y8)
    p, q = y.exp() / y.exp().sum(1, True), y8.exp() / y8.exp().sum(1, True)
    assert found.qmse == pytest.approx(sum(float(d) ** 2 for d in (y - y8).flatten()) / 6)
    assert found.qce == pytest.approx(
        -sum(float(a * b.log()) for a, b in zip(p.flatten(), q.flatten(), strict=True)) / 3
    )
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum()) / 3, rel=1e-6)
    assert found.fp32_accuracy == pytest.approx(1 / 3)  # 0 < 0.5, but 0.39 > 0.38 and 1 > 0.2
    assert found.fp32_loss == pytest.approx(-float(p[:, 1].log().mean()))
    assert found.quint8_loss == pytest.approx(-float(q[:, 1].log().mean()))
    assert counts == [3]
    assert found.confusion == ((1, 0, 2), (1, 1, 1))
    assert found.classes == (ClassResult(0, 0, 0, 2, 2, "a"), ClassResult(3, 1, 1, 1, 1, "b"))
    kept = found.complete(Evaluation(0, REGULAR, plan_cost(TINY, REGULAR)))
    assert (kept.classes, kept.fp32_balanced_accuracy, kept.constant) == (found.classes, 1 / 3, "")


def test_ties_go_to_the_lowest_class() -> None:
    """All logits are zero, in both networks; a tenth of the labels are 0."""
    folded = fold(randomized(sequence((1, 2, 2), f=Flatten(), d=Dense(10))))
    folded.weight["d"].zero_()
    folded.bias["d"].zero_()
    split = Split(torch.zeros(600, 1, 2, 2, dtype=torch.uint8), torch.arange(600) % 10)
    data = DataSet("d", tuple("0123456789"), split, split, split, (0.5,), (1.0,), True)
    quantized = quantize(folded, calibrate(folded, batches_of(data.normalise(split.images)), RangeMethod()))
    counts: list[int] = []
    found = measure_split(folded, quantized, data, split, counts.append)
    assert (found.fp32_accuracy, found.quint8_accuracy) == (0.1, 0.1)
    assert found.qmse == 0
    assert found.kl == pytest.approx(0, abs=1e-12)
    assert found.qce == pytest.approx(np.log(10))
    assert counts == [*range(MEASURED_BATCH, 600 + 1, MEASURED_BATCH)]
    assert found.quint8_loss == pytest.approx(np.log(10))
    assert (found.images, found.right) == (600, f"{2**60 - 1:x}")  # bits in order of the classes: all of class 0
    assert found.classes == (
        ClassResult(60, 60, 60, 600, 600, "0"),
        *[ClassResult(60, 0, 0, name=name) for name in "123456789"],
    )
    assert found.confusion == tuple((label, 0, 60) for label in range(10))
    assert (
        found.complete(Evaluation(0, REGULAR, plan_cost(TINY, REGULAR))).constant
        == "fp32 and quint8 predict class '0' for every image"
    )


def test_measuring_takes_an_uneven_number_of_images() -> None:
    """The mean over all images, not over batches."""
    space = sequence((3, 8, 8), c=Conv(4), f=Flatten(), d=Dense(5))
    folded = fold(randomized(space))
    images = torch.randint(0, 256, (263, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(263) % 5)
    data = DataSet("d", tuple("abcde"), split, split, split, (0.5,) * 3, (0.3,) * 3, True)
    quantized = quantize(folded, calibrate(folded, batches_of(normal(50, 3, 8, 8)), RangeMethod()))
    x = data.normalise(images)
    found = measure_split(folded, quantized, data, split)
    assert found.qmse == pytest.approx(float((folded(x).double() - quantized(x).double()).square().mean()), rel=1e-5)
    assert found.fp32_accuracy == pytest.approx(float((folded(x).argmax(1) == split.labels).double().mean()))


@pytest.mark.parametrize(
    "text",
    [
        *("percentile:5", "minmax+per-channel", "minmax+equalize", "percentile:1+bias-correct"),
        "minmax+per-channel+equalize+bias-correct",
    ],
)
def test_a_network_is_made_ready_as_the_scheme_says(text: str) -> None:
    trained, data, scheme = randomized(MIXED), noise(MIXED, 300), parse_scheme(text)
    told: list[tuple[int, int]] = []
    found = quantize_trained(trained, scheme, data, 3, lambda done, total: told.append((done, total)))
    images = len(data.train) * (1 if scheme.ranges.name == "minmax" else 2)
    assert told[-1] == (images, images), "in one pass or two"
    folded = equalize(fold(trained)) if "equalize" in text else fold(trained)
    stats = calibrate(folded, calibration_batches(data, 3, CALIBRATION_SAMPLES, CALIBRATION_BATCH), scheme.ranges)
    network = quantize(folded, stats, "per-channel" in text)
    if "bias-correct" in text:
        few = calibration_batches(data, 3, CORRECTION_SAMPLES, CALIBRATION_BATCH)
        network = correct_biases(folded, network, few)
    assert all(torch.equal(found.folded.weight[name], weight) for name, weight in folded.weight.items())
    assert {name: (one.low, one.high) for name, one in found.stats.items()} == {
        name: (one.low, one.high) for name, one in stats.items()
    }
    tensors = found.network.to_tensors()
    assert tensors.keys() == network.to_tensors().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in network.to_tensors().items())


def test_measuring_counts_what_the_runtime_gives_otherwise() -> None:
    """Over batches of 250: here the runtime has the network of other weights."""
    space = sequence((3, 8, 8), c=Conv(4), r=Activation(), f=Flatten(), d=Dense(5))
    data = noise(space, 263)
    one, other = (
        quantize_trained(randomized(space), parse_scheme(text), data, 0) for text in ("minmax", "percentile:20")
    )
    x = data.normalise(data.evaluation.images)
    same, wrong = (
        measure_split(one.folded, one.network, data, data.evaluation, runtime=Runtime(quantized_model(it.network)))
        for it in (one, other)
    )
    y, y8 = one.network(x), other.network(x)
    assert same.audit == Audit(263, 263 * 5, 0, 0)
    assert wrong.audit == Audit(263, 263 * 5, int((y != y8).sum()), int((y.argmax(1) != y8.argmax(1)).sum()))
    assert wrong.audit.predictions > 0
    assert replace(wrong, audit=None) == measure_split(one.folded, one.network, data, data.evaluation)
