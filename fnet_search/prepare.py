"""A trained network made ready for 8 bits: folded, calibrated, quantized, by a scheme or the best of several.

Which scheme is best is decided without labels, and without images that any accuracy is measured on: by how far the
quantized outputs diverge from the float ones, on training images that the ranges were not found on.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

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
from fnet_search.scheme import Scheme

CALIBRATION_SAMPLES = 1024
"""Random training samples for the activation ranges (paper, section 3)."""
CORRECTION_SAMPLES = 256
"""Of these, for bias correction."""
CHOICE_SAMPLES = 1024
"""Other training samples, at most, that a scheme is chosen on."""
ROUNDS = (64, 256)
"""After so many of them the better half of the schemes goes on."""
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
    return prepare_each(trained, (scheme,), data, seed, seen)[0]


def prepare_each(
    trained: Network, schemes: Sequence[Scheme], data: DataSet, seed: int, seen: Seen = lambda done, total: None
) -> list[Quantized]:
    """As `prepare`, with each of `schemes`. Where these are several, on at most half of the training images: others are
    left to choose on (`least_divergent`).

    Schemes that the network cannot be quantized with are left out; raises FnetError where no other is left.
    """
    samples = min(CALIBRATION_SAMPLES, len(data.train)) if len(schemes) == 1 else _half(data)
    tried = _each(trained, schemes, data, seed, samples, seen)
    found = [one for one in tried if isinstance(one, Quantized)]
    if not found:
        raise next(one for one in tried if isinstance(one, FnetError))
    return found


def _half(data: DataSet) -> int:
    return max(1, min(CALIBRATION_SAMPLES, len(data.train) // 2))


def _each(
    trained: Network, schemes: Sequence[Scheme], data: DataSet, seed: int, samples: int, seen: Seen
) -> list[Quantized | FnetError]:
    found: dict[Scheme, Quantized | FnetError] = {}
    for equalized in dict.fromkeys(scheme.equalize for scheme in schemes):
        alike = [scheme for scheme in schemes if scheme.equalize == equalized]
        folded = folded_for(alike[0], trained)
        methods = list(dict.fromkeys(scheme.ranges for scheme in alike))
        batches = _counted(calibration(data, seed, samples, AT_ONCE), samples * passes(*methods), seen)
        stats = dict(zip(methods, calibrate_each(folded, batches, methods), strict=True))
        few = calibration(data, seed, min(samples, CORRECTION_SAMPLES), AT_ONCE)
        means = channel_means(folded, few) if any(scheme.bias_correct for scheme in alike) else {}
        plain: dict[Scheme, QuantizedNetwork] = {}
        for scheme in alike:
            bare = replace(scheme, bias_correct=False)
            try:
                if bare not in plain:
                    plain[bare] = quantize(folded, stats[scheme.ranges], scheme.per_channel)
                network = correct_biases(plain[bare], means, few) if scheme.bias_correct else plain[bare]
                found[scheme] = Quantized(scheme, folded, stats[scheme.ranges], network)
            except FnetError as error:
                found[scheme] = error
    return [found[scheme] for scheme in schemes]


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
    quantized: Sequence[Quantized], data: DataSet, seed: int, seen: Seen = lambda done, total: None
) -> Quantized:
    """Of several quantizations of one trained network (`prepare_each`), that whose probabilities diverge least from the
    float network's: mean KL in float64 over up to CHOICE_SAMPLES training images that it was not calibrated on.

    After each of ROUNDS the better half goes on, so that most of the images are spent on those that are close. Of equal
    ones the first.
    """
    if len(quantized) == 1:
        return quantized[0]
    skipped = _half(data)
    samples = min(CHOICE_SAMPLES, max(1, len(data.train) - skipped))
    skipped = min(skipped, len(data.train) - samples)  # of a single image there is no other
    left, rounds, count = list(quantized), list(ROUNDS), 0
    divergence = dict.fromkeys((one.scheme for one in left), 0.0)
    for x in calibration(data, seed, samples, AT_ONCE, skipped)():
        log_p = F.log_softmax(left[0].folded(x).double(), 1)
        for one in left:
            log_q = F.log_softmax(one.network(x).double(), 1)
            divergence[one.scheme] += float((log_p.exp() * (log_p - log_q)).sum())
        count += len(x)
        seen(count, samples)
        if rounds and count >= rounds[0]:
            rounds.pop(0)
            left = sorted(left, key=lambda one: divergence[one.scheme])[: math.ceil(len(left) / 2)]
    return min(left, key=lambda one: divergence[one.scheme])
