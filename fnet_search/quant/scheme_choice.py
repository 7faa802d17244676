"""A trained network made ready for 8 bits: folded, calibrated, quantized, by a scheme or the best of several.

Which scheme is best is decided without labels, and without images that any accuracy is measured on: by how far the
quantized outputs diverge from the float ones, on training images that the ranges were not found on.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from fnet_search.base.errors import FnetError
from fnet_search.quant.calibration import AT_ONCE, Calibrated, Quantized, Seen, calibrated_images, calibration
from fnet_search.quant.scheme import Scheme
from fnet_search.quant.simulator import QuantizedNetwork
from fnet_search.training.datasets import DataSet

CHOICE_SAMPLES = 1024
"""Other training samples, at most, that a scheme is chosen on."""
FIRST = 128
"""So many of them, at most, are for the ranges and the weight scales; the others tell whether biases are corrected."""
FEWEST, DOUBT = 32, 3.0
"""A round ends sooner where this many images, or more, tell the schemes apart by so many standard errors."""


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
    skipped = calibrated_images(data)
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
