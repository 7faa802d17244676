"""Calibration: activation ranges and channel means of a trained network, on training images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fnet_search.quant.bias_correction import ChannelMeans, correct_biases
from fnet_search.quant.equalize import equalize
from fnet_search.quant.fold import FoldedNetwork, fold
from fnet_search.quant.quantize import quantize
from fnet_search.quant.ranges import TensorStats, calibrate_each, passes
from fnet_search.quant.scheme import RangeMethod, Scheme
from fnet_search.quant.simulator import QuantizedNetwork
from fnet_search.training.datasets import Batches, DataSet
from fnet_search.training.network import Network

CALIBRATION_SAMPLES = 1024
"""Random training samples for the activation ranges (paper, section 3)."""
CORRECTION_SAMPLES = 256
"""The first of them also serve bias correction, which holds their activations of one layer in memory."""
CALIBRATION_BATCH = 32
"""Images in a batch: few, so that a layer's output stays in the processor's cache (half the time of 128 images)."""

OnImages = Callable[[int, int], None]
"""Called with the number of images that are done and their total."""


@dataclass(frozen=True)
class Quantized:
    """A trained network quantized with a scheme: the folded (and equalized) float network, the statistics of its
    tensors, the integer network."""

    scheme: Scheme
    folded: FoldedNetwork
    stats: Mapping[str, TensorStats]
    network: QuantizedNetwork


@dataclass(frozen=True)
class Calibrated:
    """A trained network, folded (and equalized), with tensor statistics for each range method: ready to be quantized
    with any scheme of these methods."""

    folded: FoldedNetwork
    stats: Mapping[RangeMethod, Mapping[str, TensorStats]]
    correction_batches: Batches
    means: Mapping[str, Tensor]
    """Channel means of the float network over `correction_batches`; empty where no scheme corrects biases."""
    _known: dict[Scheme, Quantized] = field(default_factory=dict)

    def quantized(self, scheme: Scheme) -> Quantized:
        """The network under `scheme`. Raises FnetError where an int32 accumulation could overflow."""
        if scheme not in self._known:
            stats = self.stats[scheme.ranges]
            if scheme.bias_correct:
                plain = self.quantized(replace(scheme, bias_correct=False))
                network = correct_biases(self.folded, plain.network, self.correction_batches, self.means)
            else:
                same_weights = (  # their codes are shared
                    known.network.layers
                    for other, known in self._known.items()
                    if other.per_channel == scheme.per_channel
                )
                network = quantize(self.folded, stats, scheme.per_channel, next(same_weights, {}))
            self._known[scheme] = Quantized(scheme, self.folded, stats, network)
        return self._known[scheme]


def folded_for(scheme: Scheme, trained: Network) -> FoldedNetwork:
    """The float network that `scheme` quantizes: folded, and equalized if the scheme says so."""
    folded = fold(trained)
    return equalize(folded) if scheme.equalize else folded


def calibration_batches(data: DataSet, seed: int, samples: int, batch_size: int = 128, skipped: int = 0) -> Batches:
    """Random training samples, normalised, not augmented, in batches: the same ones whenever they are iterated.

    `skipped` samples of the same random order are left out first: those that another use has taken.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.train), generator=generator)[skipped : skipped + samples]

    def batches() -> Iterator[Tensor]:
        for part in torch.split(chosen.to(data.train.images.device), batch_size):
            yield data.normalise(data.train.images[part]).to(memory_format=torch.channels_last)  # the faster one

    return batches


def quantize_trained(
    trained: Network, scheme: Scheme, data: DataSet, seed: int, on_images: OnImages = lambda done, total: None
) -> Quantized:
    """Folds, calibrates and quantizes a trained network (in evaluation mode) with `scheme`.

    Calibrates on up to CALIBRATION_SAMPLES training images of `data`; `on_images` counts them over all passes. Raises
    FnetError for activations that are not finite, and where an int32 accumulation could overflow.
    """
    return calibrate_for(trained, (scheme,), data, seed, on_images).quantized(scheme)


def calibrate_for(
    trained: Network,
    schemes: Sequence[Scheme],
    data: DataSet,
    seed: int,
    on_images: OnImages = lambda done, total: None,
) -> Calibrated:
    """Folds and calibrates a trained network (in evaluation mode) for any of `schemes`, which equalize all or none.

    With several schemes at most half of the training images are used, which leaves others to choose a scheme on
    (`least_divergent`). `on_images` as in `quantize_trained`. Raises FnetError for activations that are not finite.
    """
    samples = min(CALIBRATION_SAMPLES, len(data.train)) if len(schemes) == 1 else calibration_images(data)
    folded = folded_for(schemes[0], trained)
    methods = list(dict.fromkeys(scheme.ranges for scheme in schemes))
    batches = _counted(
        calibration_batches(data, seed, samples, CALIBRATION_BATCH), samples * passes(*methods), on_images
    )
    correcting = any(scheme.bias_correct for scheme in schemes)
    collected = ChannelMeans(CORRECTION_SAMPLES if correcting else 0)
    stats = dict(zip(methods, calibrate_each(folded, batches, methods, watch=collected), strict=True))
    correction = calibration_batches(data, seed, min(samples, CORRECTION_SAMPLES), CALIBRATION_BATCH)
    return Calibrated(folded, stats, correction, collected.means)


def calibration_images(data: DataSet) -> int:
    """How many training images calibrate several schemes."""
    return max(1, min(CALIBRATION_SAMPLES, len(data.train) // 2))


def _counted(batches: Batches, total: int, on_images: OnImages) -> Batches:
    done = 0

    def counted() -> Iterator[Tensor]:
        nonlocal done
        for batch in batches():
            yield batch
            done += len(batch)
            on_images(done, total)

    return counted
