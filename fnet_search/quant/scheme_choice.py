"""The choice among quantization schemes.

The best scheme is the one whose outputs diverge least from the float network's, on training images that the network was
not calibrated on. It needs no labels and no image that an accuracy is measured on.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from fnet_search.base.errors import FnetError
from fnet_search.quant.calibration import (
    CALIBRATION_BATCH,
    Calibrated,
    OnImages,
    Quantized,
    calibration_batches,
    calibration_images,
)
from fnet_search.quant.scheme import Scheme
from fnet_search.quant.simulator import QuantizedNetwork
from fnet_search.training.datasets import DataSet

CHOICE_SAMPLES = 1024
"""The most training samples that choose a scheme, other than those of the calibration."""
FIRST_ROUND = 128
"""The most of them that choose ranges and weight scales; the others decide on bias correction."""
MIN_IMAGES = 32
CLEAR_ERRORS = 3.0
"""A round ends early once at least MIN_IMAGES images separate the best scheme from each other one by CLEAR_ERRORS
standard errors of the difference, which a normal error exceeds once in 700 decisions."""


@torch.no_grad()
def least_divergent(
    calibrated: Calibrated,
    schemes: Sequence[Scheme],
    data: DataSet,
    seed: int,
    on_images: OnImages = lambda done, total: None,
) -> Quantized:
    """The network quantized with the scheme whose probabilities diverge least from the float network's.

    Divergence is the mean KL divergence, in float64, over up to CHOICE_SAMPLES training images that the network was not
    calibrated on; of equal schemes the first wins. There are two rounds, each with its own images: the first chooses
    ranges and weight scales, without bias correction; the second whether that scheme corrects biases. A round ends
    early once the images decide (CLEAR_ERRORS). With fewer images than twice FIRST_ROUND both rounds use all.

    Args:
        schemes: those that `calibrated` was made for (`calibrate_for`).
        on_images: called with the number of images that are done, and their total.

    Raises FnetError where no scheme can quantize the network.
    """
    if len(schemes) == 1:
        return calibrated.quantized(schemes[0])
    skipped = calibration_images(data)
    samples = max(1, min(CHOICE_SAMPLES, len(data.train) - skipped))
    batches = list(
        calibration_batches(data, seed, samples, CALIBRATION_BATCH, min(skipped, len(data.train) - samples))()
    )
    few, end = samples < 2 * FIRST_ROUND, FIRST_ROUND // CALIBRATION_BATCH
    uncorrected = [scheme for scheme in schemes if not scheme.bias_correct]
    plain = _best(calibrated, uncorrected, batches if few else batches[:end])
    on_images(min(FIRST_ROUND, samples), samples)
    with_and_without = [scheme for scheme in schemes if replace(scheme, bias_correct=False) == plain]
    best = _best(calibrated, with_and_without, batches if few else batches[end:])
    on_images(samples, samples)
    return calibrated.quantized(best)


def _best(calibrated: Calibrated, schemes: Sequence[Scheme], batches: Sequence[Tensor]) -> Scheme:
    """The scheme that diverges least on `batches`, or on the first ones that decide it (`_decided`)."""
    networks: dict[Scheme, QuantizedNetwork] = {}
    failure: FnetError | None = None
    for scheme in schemes:
        try:
            networks[scheme] = calibrated.quantized(scheme).network
        except FnetError as error:
            failure = error
    if failure is not None and not networks:
        raise failure
    divergence = torch.empty(len(networks), 0, dtype=torch.float64)
    for x in batches if len(networks) > 1 else ():
        log_p = F.log_softmax(calibrated.folded(x).double(), 1)
        log_q = torch.stack([F.log_softmax(network(x).double(), 1) for network in networks.values()])
        divergence = torch.cat([divergence, (log_p.exp() * (log_p - log_q)).sum(2).cpu()], dim=1)
        if _decided(divergence):
            break
    return list(networks)[int(divergence.sum(1).argmin())]


def _decided(divergence: Tensor) -> bool:
    """Whether every other scheme is worse than the best one by more than CLEAR_ERRORS standard errors of the difference
    on the same images. `divergence` is [schemes, images]."""
    best, images = int(divergence.sum(1).argmin()), divergence.shape[1]
    others = [place for place in range(len(divergence)) if place != best]
    difference = divergence[others] - divergence[best]
    errors = difference.std(1, correction=0) / math.sqrt(images)
    return images >= MIN_IMAGES and bool((difference.mean(1) > CLEAR_ERRORS * errors).all())
