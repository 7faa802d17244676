"""A trained network made ready for 8 bits: folded, calibrated, quantized, by a scheme or the best of several.

Which scheme is best is decided without labels, and without images that any accuracy is measured on: by how far the
quantized outputs diverge from the float ones, on training images that the ranges were not found on.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from fnet_search.correct import channel_means, correct_biases
from fnet_search.data import DataSet
from fnet_search.equalize import equalize
from fnet_search.errors import FnetError
from fnet_search.fold import FoldedNetwork, fold
from fnet_search.network import Network
from fnet_search.quantize import QuantizedNetwork, quantize
from fnet_search.ranges import Batches, TensorStats, calibrate_each, passes
from fnet_search.scheme import RangeMethod, Scheme

CALIBRATION_SAMPLES = 1024
"""Random training samples for the activation ranges (paper, section 3)."""
CORRECTION_SAMPLES = 256
"""Of these, for bias correction."""
CHOICE_SAMPLES = 1024
"""Other training samples, at most, that a scheme is chosen on."""
FIRST = 128
"""So many of them, at most, are for the ranges and the weight scales; the others tell whether biases are corrected."""
FEWEST, DOUBT = 32, 3.0
"""A round ends sooner where this many images, or more, tell the schemes apart by so many standard errors."""
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
                alike = (one.network for other, one in self._known.items() if other.per_channel == scheme.per_channel)
                network = quantize(self.folded, stats, scheme.per_channel, next(alike, None))
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
    samples = min(CALIBRATION_SAMPLES, len(data.train)) if len(schemes) == 1 else _half(data)
    folded = folded_for(schemes[0], trained)
    methods = list(dict.fromkeys(scheme.ranges for scheme in schemes))
    batches = _counted(calibration(data, seed, samples, AT_ONCE), samples * passes(*methods), seen)
    stats = dict(zip(methods, calibrate_each(folded, batches, methods), strict=True))
    return Calibrated(folded, stats, calibration(data, seed, min(samples, CORRECTION_SAMPLES), AT_ONCE))


def _half(data: DataSet) -> int:
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


@torch.no_grad()
def least_divergent(
    calibrated: Calibrated,
    schemes: Sequence[Scheme],
    data: DataSet,
    seed: int,
    seen: Seen = lambda done, total: None,
) -> Quantized:
    """The network quantized with that one of `schemes` (those of `calibrated_for`) whose probabilities diverge least
    from the float network's: by the mean KL divergence, in float64, over up to CHOICE_SAMPLES training images that it
    was not calibrated on. Of equal ones the first.

    In two rounds, each on images of its own: ranges and weight scales, without bias correction; then that one with it
    and without. A round takes no more images than it needs (DOUBT). Fewer images than twice FIRST are all there in
    both. Raises FnetError where no scheme can quantize the network.
    """
    if len(schemes) == 1:
        return calibrated.quantized(schemes[0])
    skipped = _half(data)
    samples = max(1, min(CHOICE_SAMPLES, len(data.train) - skipped))
    batches = list(calibration(data, seed, samples, AT_ONCE, min(skipped, len(data.train) - samples))())
    few, end = samples < 2 * FIRST, FIRST // AT_ONCE
    plain = _best(calibrated, [one for one in schemes if not one.bias_correct], batches if few else batches[:end])
    seen(min(FIRST, samples), samples)
    both = [scheme for scheme in schemes if replace(scheme, bias_correct=False) == plain]
    found = _best(calibrated, both, batches if few else batches[end:])
    seen(samples, samples)
    return calibrated.quantized(found)


def _best(calibrated: Calibrated, schemes: Sequence[Scheme], batches: Sequence[Tensor]) -> Scheme:
    """The scheme that diverges least on these images, or on the first of them that leave no doubt."""
    networks: dict[Scheme, QuantizedNetwork] = {}
    failure: FnetError | None = None
    for scheme in schemes:
        try:
            networks[scheme] = calibrated.quantized(scheme).network
        except FnetError as error:
            failure = error
    if failure is not None and not networks:
        raise failure
    found = torch.empty(len(networks), 0, dtype=torch.float64)
    for x in batches if len(networks) > 1 else ():
        log_p = F.log_softmax(calibrated.folded(x).double(), 1)
        log_q = torch.stack([F.log_softmax(network(x).double(), 1) for network in networks.values()])
        found = torch.cat([found, (log_p.exp() * (log_p - log_q)).sum(2).cpu()], dim=1)
        if _clear(found):
            break
    return list(networks)[int(found.sum(1).argmin())]


def _clear(divergence: Tensor) -> bool:
    """Whether each scheme but the best one is worse than it by more than DOUBT standard errors of the difference on the
    same images; of [schemes, images]."""
    best, images = int(divergence.sum(1).argmin()), divergence.shape[1]
    others = [place for place in range(len(divergence)) if place != best]
    difference = divergence[others] - divergence[best]
    errors = difference.std(1, correction=0) / math.sqrt(images)
    return images >= FEWEST and bool((difference.mean(1) > DOUBT * errors).all())
