"""Ranges of activations (design, section 3, rule 4): which tensors are quantized, and from where to where."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from fnet_search.errors import FnetError
from fnet_search.fold import FoldedNetwork
from fnet_search.macro import INPUT, Activation, Flatten, Macroarchitecture, Pool
from fnet_search.network import walk

Batches = Callable[[], Iterator[Tensor]]
"""Gives the calibration samples, normalised [N, C, H, W], anew at each call."""


@dataclass(frozen=True)
class RangeMethod:
    """How hidden activations are clipped: `percentile` percent at the top and at the bottom; 0 is min and max."""

    percentile: Fraction = Fraction(1)

    def __str__(self) -> str:
        return f"percentile:{float(self.percentile):g}" if self.percentile else "minmax"


def parse_ranges(text: str) -> RangeMethod:
    """``minmax`` or ``percentile:P``, 0 <= P < 50. Raises FnetError for anything else."""
    if text == "minmax":
        return RangeMethod(Fraction(0))
    match = re.fullmatch(r"percentile:(\d{1,2}(?:\.\d{1,6})?)", text)
    if match and Fraction(match[1]) < 50:
        return RangeMethod(Fraction(match[1]))
    raise FnetError(
        f"unknown range method {text!r}; write minmax or percentile:P with 0 <= P < 50, as in percentile:0.1"
    )


def carriers(network: Macroarchitecture) -> dict[str, str]:
    """For each node of a folded network (and the input) the node whose scale and zero point its codes have.

    A ReLU or ReLU6 that is the only reader of a layer is fused into it: both carry the ReLU's parameters. Max pooling
    and flatten keep those of their input. Everything else has its own.
    """
    carrier = {INPUT: INPUT}
    for node in network.order:
        if isinstance(node.layer, Flatten) or (isinstance(node.layer, Pool) and node.layer.reduction == "max"):
            carrier[node.name] = carrier[node.inputs[0]]
            continue
        readers = network.consumers(node.name)
        fused = len(readers) == 1 and _clips(readers[0].layer) and not isinstance(node.layer, Activation)
        carrier[node.name] = readers[0].name if fused else node.name
    return carrier


def _clips(layer: object) -> bool:
    return isinstance(layer, Activation) and layer.function in ("relu", "relu6")


@dataclass(frozen=True)
class TensorStats:
    """A tensor over the calibration samples. `low` and `high` bound the clipped range; channel extremes are [C]."""

    low: float
    high: float
    channel_min: Tensor
    channel_max: Tensor
    sparsity: float
    """Share of elements that are exactly zero."""


def calibrate(folded: FoldedNetwork, batches: Batches, method: RangeMethod) -> Mapping[str, TensorStats]:
    """Statistics of every quantized tensor, keyed by its carrier.

    The network's input and its logits get min and max, hidden tensors the nearest-rank percentiles pooled over all
    elements, exact: two passes over histograms of the floats' bits, so memory does not grow with the samples.
    Raises FnetError for activations that are not finite.
    """
    carrier = carriers(folded.network)
    ends = {INPUT, carrier[folded.network.output]}
    observers = {name: _Observer(method if name not in ends else RangeMethod(Fraction(0))) for name in carrier.values()}
    for name, tensor in _tensors(folded, batches, observers):
        observers[name].first_pass(tensor)
    if any(observer.open_ranks() for observer in observers.values()):
        for name, tensor in _tensors(folded, batches, observers):
            observers[name].second_pass(tensor)
    return {name: observer.stats(name) for name, observer in observers.items()}


@torch.no_grad()
def _tensors(folded: FoldedNetwork, batches: Batches, wanted: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    for batch in batches():
        yield INPUT, batch
        for node, output in walk(folded.network, batch, folded.apply_node):
            if node.name in wanted:
                yield node.name, output


class _Observer:
    """Extremes and exact percentiles of one tensor, in 64 Ki counters a pass."""

    def __init__(self, method: RangeMethod) -> None:
        self.method = method
        self.count = self.zeros = 0
        self.channel_min = self.channel_max = torch.empty(0)
        self.coarse = torch.zeros(1 << 16, dtype=torch.int64)
        self.fine: dict[int, Tensor] = {}

    def first_pass(self, tensor: Tensor) -> None:
        channels = tensor.transpose(0, 1).flatten(1)
        low, high = channels.amin(1).cpu(), channels.amax(1).cpu()
        first = self.count == 0
        self.channel_min = low if first else torch.minimum(self.channel_min, low)
        self.channel_max = high if first else torch.maximum(self.channel_max, high)
        self.count += tensor.numel()
        self.zeros += int((tensor == 0).sum())
        if self.method.percentile:
            self.coarse += torch.bincount((_keys(tensor) >> 16) + (1 << 15), minlength=1 << 16).cpu()

    def second_pass(self, tensor: Tensor) -> None:
        for rank in self.open_ranks():
            bucket, _ = _locate(self.coarse, rank)
            key = (bucket - (1 << 15)) << 16
            near = _keys(tensor[(tensor >= _float(key)) & (tensor <= _float(key | 0xFFFF))])
            inside = near[near >> 16 == key >> 16]  # 0.0 and -0.0 are equal, but not in one bucket
            found = torch.bincount(inside & 0xFFFF, minlength=1 << 16).cpu()
            self.fine[rank] = self.fine[rank] + found if rank in self.fine else found

    def open_ranks(self) -> tuple[int, ...]:
        """Ranks that the first pass has not settled: the zeros at the bottom of a ReLU's output are settled."""
        if not self.method.percentile:
            return ()
        zeros = self.zeros if float(self.channel_min.min()) >= 0 else 0
        return tuple(rank for rank in self.ranks() if rank > zeros)

    def ranks(self) -> tuple[int, ...]:
        """Nearest ranks, from 1, of the lower and the upper percentile; one entry where they are the same."""
        part = self.method.percentile / 100
        return tuple(dict.fromkeys(max(1, math.ceil(share * self.count)) for share in (part, 1 - part)))

    def stats(self, name: str) -> TensorStats:
        low, high = float(self.channel_min.min()), float(self.channel_max.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise FnetError(f"the activations of {name!r} are not finite")
        if self.method.percentile:
            low, *_, high = [*map(self._value, self.ranks())] * (3 - len(self.ranks()))
        return TensorStats(low, high, self.channel_min, self.channel_max, self.zeros / self.count)

    def _value(self, rank: int) -> float:
        if rank not in self.fine:
            return 0.0
        bucket, before = _locate(self.coarse, rank)
        low_bits, _ = _locate(self.fine[rank], rank - before)
        return _float(((bucket - (1 << 15)) << 16) | low_bits)


def _keys(tensor: Tensor) -> Tensor:
    """Flat int32 keys that order as the floats do."""
    bits = tensor.contiguous().view(torch.int32).flatten()
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _float(key: int) -> float:
    """Inverse of `_keys`. NaN for keys beyond infinity, which no finite tensor has."""
    bits = torch.tensor([key], dtype=torch.int64).to(torch.int32)
    return float((bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32))


def _locate(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bucket that holds the element of a rank (from 1), and how many elements lie before that bucket."""
    cumulative = histogram.cumsum(0)
    bucket = int(torch.searchsorted(cumulative, torch.tensor(rank)))
    return bucket, int(cumulative[bucket] - histogram[bucket])
