"""Ranges of activations (rule 4 of docs/quint8.md): which tensors are quantized, and from where to where."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
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
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture
from fnet_search.base.errors import FnetError
from fnet_search.quant.fold import FoldedNetwork
from fnet_search.quant.quant_params import degenerate, quant_params
from fnet_search.quant.scheme import RangeMethod, range_spec
from fnet_search.training.datasets import Batches
from fnet_search.training.network import walk


def carriers(network: Macroarchitecture) -> dict[str, str]:
    """For each node of a folded network (and the input) the node whose scale and zero point its codes have.

    A ReLU or ReLU6 that is the only reader of a layer is fused into it: both carry the ReLU's parameters. Max pooling
    and layers that only move values keep those of their input. Everything else has its own.
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
    """Whether the codes that a layer gives are some of those that it reads."""
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
    """A tensor over the calibration samples. `low` and `high` bound the clipped range; channel extremes are [C]."""

    low: float
    high: float
    channel_min: Tensor
    channel_max: Tensor
    sparsity: float
    """Share of elements that are exactly zero."""


HELD = 1 << 26
"""Values of activations that are held between two passes, at most: a quarter of a gigabyte."""


def calibrate(folded: FoldedNetwork, batches: Batches, method: RangeMethod, held: int = 0) -> Mapping[str, TensorStats]:
    """Statistics of every quantized tensor, keyed by its carrier.

    The network's input and its logits get min and max, hidden tensors what `method` says: nearest-rank percentiles
    pooled over all elements, exact, or the range of least squared error. Percentiles between which there is nothing but
    zero (a sparse tensor) give way to min and max. Both take two passes over the samples and keep histograms, so memory
    does not grow with their number.

    `held`: the samples are so many, and few: what the network gives for them is held for the second pass, where that is
    at most HELD values, and not computed again. Raises FnetError for activations that are not finite.
    """
    return calibrate_each(folded, batches, (method,), held)[0]


def calibrate_each(
    folded: FoldedNetwork, batches: Batches, methods: Sequence[RangeMethod], held: int = 0
) -> list[Mapping[str, TensorStats]]:
    """As `calibrate`, for several range methods in the same passes."""
    carrier = carriers(folded.network)
    ends = {INPUT, carrier[folded.network.output]}
    kinds = [observer_of(method) for method in methods]
    observers = {
        name: [(Observer if name in ends else kind)(method) for kind, method in zip(kinds, methods, strict=True)]
        for name in carrier.values()
    }
    hold = held * sum(prod(folded.network.shapes[name]) for name in observers) <= HELD if held else False
    tensors = []
    for name, tensor in _tensors(folded, batches, observers):
        for observer in observers[name]:
            observer.first_pass(tensor)
        if hold:
            tensors.append((name, tensor))
    left = {name: [one for one in each if not one.settled] for name, each in observers.items()}
    if unsettled := {name: each for name, each in left.items() if each}:
        for name, tensor in tensors if hold else _tensors(folded, batches, unsettled):
            for observer in unsettled.get(name, ()):
                observer.second_pass(tensor)
    return [{name: each[place].stats(name) for name, each in observers.items()} for place in range(len(methods))]


def passes(*methods: RangeMethod) -> int:
    """How often `calibrate` looks at the samples, at most."""
    return max(observer_of(method).passes for method in methods)


def observer_of(method: RangeMethod) -> "type[Observer]":
    """Raises FnetError for a method that is not there, or whose observer is none."""
    found = range_spec(method.name).load()
    if not (isinstance(found, type) and issubclass(found, Observer)):
        raise FnetError(f"range method {method.name!r} cannot be loaded: its observer must be a subclass of Observer")
    return found


@torch.no_grad()
def _tensors(folded: FoldedNetwork, batches: Batches, wanted: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    for batch in batches():
        if INPUT in wanted:
            yield INPUT, batch
        for node, output in walk(folded.network, batch, folded.apply_node):
            if node.name in wanted:
                yield node.name, output


class Observer:
    """What a range method sees of one tensor: here its extremes, which are the range of ``minmax``.

    A subclass for each other method finds its `range` from what it keeps in one pass over the samples or in two; what
    it keeps must not grow with their number.
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
        """Called with the same tensors again, unless `settled`."""

    @property
    def low(self) -> float:
        return float(self.channel_min.min())

    @property
    def high(self) -> float:
        return float(self.channel_max.max())

    @property
    def settled(self) -> bool:
        """Whether one pass was enough. Raises nothing, also for values that are not finite: `stats` does."""
        return self.passes == 1

    def range(self) -> tuple[float, float]:
        """From where to where values are represented."""
        return self.low, self.high

    def stats(self, name: str) -> TensorStats:
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise FnetError(f"the activations of {name!r} are not finite")
        return TensorStats(*self.range(), self.channel_min, self.channel_max, self.zeros / self.count)


class Percentiles(Observer):
    """Exact order statistics in 64 Ki counters a pass: first the upper half of the floats' bits, then the lower."""

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
            found = torch.bincount(inside & 0xFFFF, minlength=1 << 16).cpu()
            self.fine[rank] = self.fine[rank] + found if rank in self.fine else found

    @property
    def settled(self) -> bool:
        return not self.open_ranks()

    def open_ranks(self) -> tuple[int, ...]:
        """Ranks that the first pass has not settled: the zeros at the bottom of a ReLU's output are settled."""
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
    """All elements, in the order in which they lie in memory where that needs no copy."""
    return (tensor.movedim(1, -1) if tensor.ndim == 4 and not tensor.is_contiguous() else tensor).flatten()


def _upper(flat: Tensor) -> Tensor:
    """The upper halves of the floats' bits, int16."""
    return flat.view(torch.int16)[1 if sys.byteorder == "little" else 0 :: 2]


def _keys(flat: Tensor) -> Tensor:
    """int32 keys that order as the floats do."""
    bits = flat.view(torch.int32)
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


class LeastSquares(Observer):
    """The range with the least sum (x - x_q)^2, over a histogram of BINS equal bins between min and max.

    A bin is at least 16 times narrower than a step, down to a range of a sixteenth of the whole: then what a bin's
    place within a step says about its values is exact enough. Zeros are left out: they are always represented.
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
        """Shrinks min and max on a grid of 64 by 64, then twice around the best on one that is 8 times finer."""
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
    """Sums of a histogram's counts, values and squares up to each bin: the error of a range in 256 additions."""

    def __init__(self, counts: "np.ndarray[Any, np.dtype[np.int64]]", low: float, high: float) -> None:
        self.low, self.width = low, (high - low) / len(counts)
        centres = low + (np.arange(len(counts)) + 0.5) * self.width
        self.sums = [np.concatenate([[0.0], np.cumsum(counts * centres**power)]) for power in range(3)]

    def errors(self, ranges: Sequence[tuple[float, float]]) -> "np.ndarray[Any, np.dtype[np.float64]]":
        """sum (x - x_q)^2 with the parameters of each range, a few ranges at a time."""
        return np.concatenate([self._errors(ranges[start : start + 64]) for start in range(0, len(ranges), 64)])

    def _errors(self, ranges: Sequence[tuple[float, float]]) -> "np.ndarray[Any, np.dtype[np.float64]]":
        params = [quant_params(low, high) for low, high in ranges]
        scales, zeros = np.array([[one.scale for one in params], [one.zero for one in params]])[:, :, None]
        codes = np.arange(256.0)
        values = scales * (codes - zeros)
        edges = (scales * (codes[1:] - 0.5 - zeros) - self.low) / self.width
        inner = np.clip(np.rint(edges), 0, len(self.sums[0]) - 1).astype(int)
        cuts = np.pad(inner, ((0, 0), (1, 1)))
        cuts[:, -1] = -1
        count, total, squares = (np.diff(sums[cuts]) for sums in self.sums)
        return np.asarray((squares - 2 * values * total + values**2 * count).sum(1))
