"""Ranges of activations (rule 4 of docs/quint8.md): which tensors are quantized, and their lowest and highest value."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import prod
from typing import Any, ClassVar, assert_never

import numpy as np
import torch
from torch import Tensor

from fnet_search.arch.layers import (
    Activation,
    Add,
    Affine,
    BatchNorm,
    Concat,
    Conv,
    Dense,
    Layer,
    Moving,
    Multiply,
    Pool,
)
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.base.errors import FnetError
from fnet_search.quant.fold import FoldedNetwork
from fnet_search.quant.quant_params import degenerate, quant_params
from fnet_search.quant.scheme import RangeMethod, range_spec
from fnet_search.training.datasets import Batches
from fnet_search.training.network import walk


def carriers(network: Macroarchitecture) -> dict[str, str]:
    """For each node of a folded network, and the input: its carrier, the node whose scale and zero point its codes
    have.

    A ReLU or ReLU6 that is the only reader of a layer is fused into it, unless that layer is an activation, a max
    pooling or only moves values: both have the ReLU's parameters. Max pooling
    and layers that only move values keep those of their input. Every other node has its own.
    """
    carrier = {INPUT: INPUT}
    for node in network.order:
        if _keeps_codes(node.layer):
            carrier[node.name] = carrier[node.inputs[0]]
            continue
        readers = network.consumers(node.name)
        fused = len(readers) == 1 and _clips(readers[0].layer) and not isinstance(node.layer, Activation)
        carrier[node.name] = readers[0].name if fused else node.name
    return carrier


def _keeps_codes(layer: Layer) -> bool:
    """Whether each output code of a layer is one of its input codes."""
    if isinstance(layer, Moving):
        return True
    match layer:
        case Pool(reduction):
            return reduction == "max"
        case Conv() | BatchNorm() | Affine() | Activation() | Dense() | Add() | Multiply() | Concat():
            return False
        case _:
            assert_never(layer)


def _clips(layer: object) -> bool:
    return isinstance(layer, Activation) and layer.function in ("relu", "relu6")


@dataclass(frozen=True)
class TensorStats:
    """A tensor over the calibration samples. `low` and `high` bound the clipped range; `channel_min` and `channel_max`
    [C] are those of each channel before clipping."""

    low: float
    high: float
    channel_min: Tensor
    channel_max: Tensor
    sparsity: float
    """Share of elements that are exactly zero."""


Watch = Callable[[Node, Tensor], None]
"""Called with a node and its float output, a batch."""

MAX_HELD_VALUES = 1 << 26
"""The most activations that are held in memory between the two passes: 256 MiB in float32."""


def calibrate(
    folded: FoldedNetwork, batches: Batches, method: RangeMethod, held: int = 0, watch: Watch | None = None
) -> Mapping[str, TensorStats]:
    """Statistics of every quantized tensor, keyed by its carrier.

    The input and the logits take min and max, hidden tensors the range of `method`. Percentiles are nearest-rank,
    exact, over all elements of a tensor; where they enclose nothing but zero (a sparse tensor), min and max replace
    them. Percentiles and least squares take two passes over the samples and keep histograms, so memory does not grow
    with the number of samples.

    Args:
        held: the number of samples, where their activations should be held for the second pass instead of computed
            again; no more than MAX_HELD_VALUES are. 0 holds none.
        watch: called with each node and its float output in the first pass.

    Raises FnetError for activations that are not finite.
    """
    return calibrate_each(folded, batches, (method,), held, watch)[0]


def calibrate_each(
    folded: FoldedNetwork,
    batches: Batches,
    methods: Sequence[RangeMethod],
    held: int = 0,
    watch: Watch | None = None,
) -> list[Mapping[str, TensorStats]]:
    """As `calibrate`, for several range methods in the same passes: one mapping for each method."""
    carrier = carriers(folded.network)
    ends = {INPUT, carrier[folded.network.output]}
    kinds = [observer_of(method) for method in methods]
    observers = {
        name: [(Observer if name in ends else kind)(method) for kind, method in zip(kinds, methods, strict=True)]
        for name in carrier.values()
    }
    hold = held * sum(prod(folded.network.shapes[name]) for name in observers) <= MAX_HELD_VALUES if held else False
    tensors = []
    for name, tensor in _tensors(folded, batches, observers, watch):
        for observer in observers[name]:
            observer.first_pass(tensor)
        if hold:
            tensors.append((name, tensor))
    remaining = {name: [observer for observer in each if not observer.settled] for name, each in observers.items()}
    if unsettled := {name: each for name, each in remaining.items() if each}:
        for name, tensor in tensors if hold else _tensors(folded, batches, unsettled):
            for observer in unsettled.get(name, ()):
                observer.second_pass(tensor)
    return [{name: each[place].stats(name) for name, each in observers.items()} for place in range(len(methods))]


def passes(*methods: RangeMethod) -> int:
    """The most passes over the samples that `calibrate` makes for these methods."""
    return max(observer_of(method).passes for method in methods)


def observer_of(method: RangeMethod) -> "type[Observer]":
    """The observer class of a range method. Raises FnetError for an unknown method, or one whose observer is not an
    `Observer`."""
    observer = range_spec(method.name).load()
    if not (isinstance(observer, type) and issubclass(observer, Observer)):
        raise FnetError(f"range method {method.name!r} cannot be loaded: its observer must be a subclass of Observer")
    return observer


@torch.no_grad()
def _tensors(
    folded: FoldedNetwork, batches: Batches, wanted: Mapping[str, object], watch: Watch | None = None
) -> Iterator[tuple[str, Tensor]]:
    for batch in batches():
        if INPUT in wanted:
            yield INPUT, batch
        for node, output in walk(folded.network, batch, folded.apply_node):
            if watch is not None:
                watch(node, output)
            if node.name in wanted:
                yield node.name, output


class Observer:
    """Watches one tensor over the calibration samples and finds its range. This one is ``minmax``.

    Each other range method is a subclass, which overrides `range` and collects what it needs in one or two passes over
    the samples, in memory that does not grow with their number.
    """

    passes: ClassVar[int] = 1
    """Over the samples, at most: 1, or 2 with a `second_pass`."""

    def __init__(self, method: RangeMethod) -> None:
        self.method = method
        self.count = self.zeros = 0
        self.channel_min = self.channel_max = torch.empty(0)

    def first_pass(self, tensor: Tensor) -> None:
        others = [axis for axis in range(tensor.ndim) if axis != 1]
        low, high = tensor.amin(others).cpu(), tensor.amax(others).cpu()
        first = self.count == 0
        self.channel_min = low if first else torch.minimum(self.channel_min, low)
        self.channel_max = high if first else torch.maximum(self.channel_max, high)
        self.count += tensor.numel()
        self.zeros += tensor.numel() - int(torch.count_nonzero(tensor))

    def second_pass(self, tensor: Tensor) -> None:
        """Is given the same tensors again, unless the observer is `settled` after the first pass."""

    @property
    def low(self) -> float:
        return float(self.channel_min.min())

    @property
    def high(self) -> float:
        return float(self.channel_max.max())

    @property
    def settled(self) -> bool:
        """Whether the first pass was enough. Must not raise for values that are not finite: `stats` does."""
        return self.passes == 1

    def range(self) -> tuple[float, float]:
        """The lowest and the highest value to be represented."""
        return self.low, self.high

    def stats(self, name: str) -> TensorStats:
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise FnetError(f"the activations of {name!r} are not finite")
        return TensorStats(*self.range(), self.channel_min, self.channel_max, self.zeros / self.count)


class Percentiles(Observer):
    """``percentile``: exact order statistics with 65,536 counters in each pass, the first for the upper 16 bits of the
    floats, the second for the lower 16 bits of those in the buckets that hold the wanted ranks."""

    passes = 2

    def __init__(self, method: RangeMethod) -> None:
        super().__init__(method)
        self.coarse = torch.zeros(1 << 16, dtype=torch.int64)
        self.fine: dict[int, Tensor] = {}

    def first_pass(self, tensor: Tensor) -> None:
        super().first_pass(tensor)
        counts = torch.bincount(_upper(_flat(tensor)).int() + (1 << 15), minlength=1 << 16).cpu()
        self.coarse += torch.cat([counts[: 1 << 15].flip(0), counts[1 << 15 :]])  # negative floats fall as bits rise

    def second_pass(self, tensor: Tensor) -> None:
        flat = _flat(tensor)
        upper = _upper(flat)
        for rank in self.open_ranks():
            bucket, _ = _locate(self.coarse, rank)
            key = bucket - (1 << 15)
            inside = _keys(flat[upper == (key if key >= 0 else key ^ 0x7FFF)])
            counts = torch.bincount(inside & 0xFFFF, minlength=1 << 16).cpu()
            self.fine[rank] = self.fine[rank] + counts if rank in self.fine else counts

    @property
    def settled(self) -> bool:
        return not self.open_ranks()

    def open_ranks(self) -> tuple[int, ...]:
        """Ranks that need the second pass. Those among the zeros of a tensor without negative values do not: it is
        known that their value is 0."""
        zeros = self.zeros if self.low >= 0 else 0
        return tuple(rank for rank in self.ranks() if rank > zeros)

    def ranks(self) -> tuple[int, ...]:
        """Nearest ranks, from 1, of the lower and the upper percentile; one entry where they are the same."""
        part = (self.method.number or Fraction(0)) / 100
        return tuple(dict.fromkeys(max(1, math.ceil(share * self.count)) for share in (part, 1 - part)))

    def range(self) -> tuple[float, float]:
        low, *_, high = [*map(self._value, self.ranks())] * (3 - len(self.ranks()))
        return (self.low, self.high) if degenerate(low, high) else (low, high)

    def _value(self, rank: int) -> float:
        if rank not in self.fine:
            return 0.0
        bucket, before = _locate(self.coarse, rank)
        low_bits, _ = _locate(self.fine[rank], rank - before)
        return _float(((bucket - (1 << 15)) << 16) | low_bits)


def _flat(tensor: Tensor) -> Tensor:
    """All elements in memory order, without a copy where possible."""
    return (tensor.movedim(1, -1) if tensor.ndim == 4 and not tensor.is_contiguous() else tensor).flatten()


def _upper(flat: Tensor) -> Tensor:
    """The upper halves of the floats' bits, int16."""
    return flat.view(torch.int16)[1 if sys.byteorder == "little" else 0 :: 2]


def _keys(flat: Tensor) -> Tensor:
    """int32 keys that order as the floats do."""
    bits = flat.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _float(key: int) -> float:
    """Inverse of `_keys`. NaN for keys beyond that of infinity, which no finite tensor has."""
    bits = torch.tensor([key], dtype=torch.int64).to(torch.int32)
    return float((bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32))


def _locate(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bucket that holds the element of `rank` (from 1), and the number of elements in the buckets before it."""
    cumulative = histogram.cumsum(0)
    bucket = int(torch.searchsorted(cumulative, torch.tensor(rank)))
    return bucket, int(cumulative[bucket] - histogram[bucket])


class LeastSquares(Observer):
    """``mse``: the range with the least sum (x - x_q)^2, over a histogram of BINS equal bins between min and max.

    With 65,536 bins and 255 steps a bin is at least 16 times narrower than a step, as long as the range is at least a
    sixteenth of min to max; so a bin's centre may stand for its values. Zeros are left out: every range holds them.
    """

    passes = 2
    BINS = 1 << 16

    def __init__(self, method: RangeMethod) -> None:
        super().__init__(method)
        self.histogram = torch.zeros(self.BINS, dtype=torch.int64)

    @property
    def settled(self) -> bool:
        return not (math.isfinite(self.high - self.low) and self.high > self.low)

    def second_pass(self, tensor: Tensor) -> None:
        self.histogram += torch.bincount(_flat(self._bins(tensor)), minlength=self.BINS).cpu()

    def _bins(self, tensor: Tensor) -> Tensor:
        return ((tensor.double() - self.low) * (self.BINS / (self.high - self.low))).int().clamp_(0, self.BINS - 1)

    def range(self) -> tuple[float, float]:
        """Shrinks min and max on a grid of 64 by 64 shares, then twice around the best, each grid 8 times finer."""
        if self.settled:
            return self.low, self.high
        ends = min(self.low, 0.0), max(self.high, 0.0)
        histogram = self.histogram.clone()
        histogram[self._bins(torch.zeros(1))] -= self.zeros
        moments = _Moments(histogram.numpy(), self.low, self.high)
        grids = [np.arange(1, 65) / 64 if end else np.ones(1) for end in ends]
        for finer in (8, 64, 512):
            pairs = list(product(*grids))
            shares = pairs[int(moments.errors([(ends[0] * low, ends[1] * high) for low, high in pairs]).argmin())]
            grids = [np.clip(share + np.arange(-8, 9) / (64 * finer), 1e-4, 1) for share in shares]
        return ends[0] * float(shares[0]), ends[1] * float(shares[1])


class _Moments:
    """Cumulative sums of a histogram's counts, values and squares, from which the error of a range follows with one
    difference for each of its 256 codes."""

    def __init__(self, counts: "np.ndarray[Any, np.dtype[np.int64]]", low: float, high: float) -> None:
        self.low, self.width = low, (high - low) / len(counts)
        centres = low + (np.arange(len(counts)) + 0.5) * self.width
        self.sums = [np.concatenate([[0.0], np.cumsum(counts * centres**power)]) for power in range(3)]

    def errors(self, ranges: Sequence[tuple[float, float]]) -> "np.ndarray[Any, np.dtype[np.float64]]":
        """sum (x - x_q)^2 for each range; 64 ranges at a time, to bound the memory."""
        return np.concatenate([self._errors(ranges[start : start + 64]) for start in range(0, len(ranges), 64)])

    def _errors(self, ranges: Sequence[tuple[float, float]]) -> "np.ndarray[Any, np.dtype[np.float64]]":
        params = [quant_params(low, high) for low, high in ranges]
        scales, zeros = np.array([(each.scale, each.zero) for each in params]).T[:, :, None]
        codes = np.arange(256.0)
        values = scales * (codes - zeros)
        edges = (scales * (codes[1:] - 0.5 - zeros) - self.low) / self.width
        inner = np.clip(np.rint(edges), 0, len(self.sums[0]) - 1).astype(int)
        cuts = np.pad(inner, ((0, 0), (1, 1)))
        cuts[:, -1] = -1
        count, total, squares = (np.diff(sums[cuts]) for sums in self.sums)
        return np.asarray((squares - 2 * values * total + values**2 * count).sum(1))
