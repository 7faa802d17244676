"""Calibration: activation ranges and channel means of a trained network, on training images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fnet_search.quant.bias_correction import channel_means, correct_biases
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
"""Of these, for bias correction."""
AT_ONCE = 32
"""Images that pass a network together: few, so that what a layer gives stays in a cache."""

Seen = Callable[[int, int], None]
"""Told how many of how many images are done."""


@dataclass(frozen=True)
class Quantized:
    """A trained network made ready for 8 bits by a scheme: folded (and equalized), its calibrated tensors, the integer
    network."""

    scheme: Scheme
    folded: FoldedNetwork
    stats: Mapping[str, TensorStats]
    network: QuantizedNetwork


@dataclass(frozen=True)
class Calibrated:
    """A trained network, folded (and equalized), with the ranges of its tensors by some methods: to be quantized.

    `few` are the samples for bias correction.
    """

    folded: FoldedNetwork
    stats: Mapping[RangeMethod, Mapping[str, TensorStats]]
    few: Batches
    _known: dict[Scheme, Quantized] = field(default_factory=dict)

    def quantized(self, scheme: Scheme) -> Quantized:
        """With a scheme of these methods. Raises FnetError where an int32 accumulation could overflow."""
        if scheme not in self._known:
            stats = self.stats[scheme.ranges]
            if scheme.bias_correct:
                plain = self.quantized(replace(scheme, bias_correct=False))
                network = correct_biases(self.folded, plain.network, self.few, self.means)
            else:
                alike = (
                    one.network.layers for other, one in self._known.items() if other.per_channel == scheme.per_channel
                )
                network = quantize(self.folded, stats, scheme.per_channel, next(alike, {}))
            self._known[scheme] = Quantized(scheme, self.folded, stats, network)
        return self._known[scheme]

    @cached_property
    def means(self) -> Mapping[str, Tensor]:
        """Of the float network's channels, for bias correction."""
        return channel_means(self.folded, self.few)


def folded_for(scheme: Scheme, trained: Network) -> FoldedNetwork:
    """The float network that a scheme quantizes: folded, and equalized where it says so."""
    folded = fold(trained)
    return equalize(folded) if scheme.equalize else folded


def calibration(data: DataSet, seed: int, samples: int, at_once: int = 128, skipped: int = 0) -> Batches:
    """The same random training samples, normalised, not augmented, in batches, at each call; `skipped` leaves out the
    first ones, which another use has."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.train), generator=generator)[skipped : skipped + samples]

    def batches() -> Iterator[Tensor]:
        for part in torch.split(chosen.to(data.train.images.device), at_once):
            yield data.normalise(data.train.images[part]).to(memory_format=torch.channels_last)  # the faster one

    return batches


def prepare(
    trained: Network, scheme: Scheme, data: DataSet, seed: int, seen: Seen = lambda done, total: None
) -> Quantized:
    """Folds and quantizes a trained network in evaluation mode, as `scheme` says, on up to CALIBRATION_SAMPLES training
    images of `data`.

    `seen` counts calibration images, over all passes. Raises FnetError for activations that are not finite, and where
    an int32 accumulation could overflow.
    """
    return calibrated_for(trained, (scheme,), data, seed, seen).quantized(scheme)


def calibrated_for(
    trained: Network, schemes: Sequence[Scheme], data: DataSet, seed: int, seen: Seen = lambda done, total: None
) -> Calibrated:
    """A trained network in evaluation mode, to be quantized with any of `schemes`, which equalize all or none.

    Where these are several, half of the training images at most are taken: others are left to choose on
    (`least_divergent`). `seen` as in `prepare`. Raises FnetError for activations that are not finite.
    """
    samples = min(CALIBRATION_SAMPLES, len(data.train)) if len(schemes) == 1 else calibrated_images(data)
    folded = folded_for(schemes[0], trained)
    methods = list(dict.fromkeys(scheme.ranges for scheme in schemes))
    batches = _counted(calibration(data, seed, samples, AT_ONCE), samples * passes(*methods), seen)
    stats = dict(zip(methods, calibrate_each(folded, batches, methods), strict=True))
    return Calibrated(folded, stats, calibration(data, seed, min(samples, CORRECTION_SAMPLES), AT_ONCE))


def calibrated_images(data: DataSet) -> int:
    return max(1, min(CALIBRATION_SAMPLES, len(data.train) // 2))


def _counted(batches: Batches, total: int, seen: Seen) -> Batches:
    done = 0

    def counted() -> Iterator[Tensor]:
        nonlocal done
        for batch in batches():
            yield batch
            done += len(batch)
            seen(done, total)

    return counted
