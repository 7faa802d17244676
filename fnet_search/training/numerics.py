"""Numerics: how a training is computed on a device. Resolved once a study by measuring, recorded, used on resume."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from fnet_search.base.errors import FnetError, first_line, unknown
from fnet_search.base.units import counted
from fnet_search.training.kernels import block_diagonal, norm_relu

DType = Literal["float32", "tf32", "bfloat16"]

GROUPS = (1, 2, 4, 8, 16)
"""Channels a group for which `Numerics.group_widths` are measured."""
CLEAR = 1.05
"""A way that differs from the plain one must be so many times faster."""


@dataclass(frozen=True)
class Numerics:
    """How numbers are computed in a training. Evaluations are always in float32 (and integers), on the same device."""

    device: str
    dtype: DType = "float32"
    channels_last: bool = False
    threads: int = 1
    """Of a worker on the CPU."""
    fused: bool = False
    """BatchNorm and its ReLU in one pass (`kernels.norm_relu`), compiled by torch.compile."""
    group_widths: tuple[int, ...] = ()
    """Channels a group that convolutions of 1, 2, 4, ... channels a group are computed with, as block-diagonal ones
    (`kernels.block_diagonal`); wider ones are computed as they are."""
    alone_threads: int = 1
    """Of a worker on the CPU while the others have nothing to do (reference, final training)."""

    @contextmanager
    def arithmetic(self, autocast: bool = True) -> Iterator[None]:
        """bfloat16 with float32 master weights, or tf32 products, where `dtype` says so. Backward passes follow the
        dtypes of the forward ones: they take no `autocast`."""
        kind = torch.device(self.device).type
        before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.dtype == "tf32"
        try:
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=autocast and self.dtype == "bfloat16"):
                yield
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "group_widths": list(self.group_widths)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Numerics":
        """Inverse of `to_json`. Raises TypeError for anything else."""
        return Numerics(**{**data, "group_widths": tuple(data.get("group_widths", ()))})

    def __str__(self) -> str:
        parts = [self.device, self.dtype, "channels_last" if self.channels_last else "channels_first"]
        if self.fused:
            parts.append("fused norms")
        wider = [f"{own} as {width}" for own, width in zip(GROUPS, self.group_widths, strict=False) if width > own]
        if wider:
            parts.append(f"groups of {', '.join(wider)} channels")
        if not self.device.startswith("cuda"):
            alone = f", {self.alone_threads} alone" if self.alone_threads > self.threads else ""
            parts.append(f"{counted(self.threads, 'thread')} a worker{alone}")
        return ", ".join(parts)


def check_device(device: str) -> str:
    """The device; for ``auto`` CUDA where there is one.

    Raises FnetError for one that is not there or cannot be named.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=torch.device(device)).item()
    except (RuntimeError, AssertionError, ValueError, ImportError):
        found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise FnetError(f"device {device!r} is not there; this machine has: {', '.join(['cpu', *found])}") from None
    return device


def check_dtype(device: str, dtype: str) -> None:
    """Raises FnetError for arithmetic that the device cannot do."""
    if dtype not in ("auto", *get_args(DType)):
        raise unknown("dtype", dtype, ("auto", *get_args(DType)))
    on_cuda = device.startswith("cuda")
    if dtype == "tf32" and not (on_cuda and torch.cuda.get_device_capability(device) >= (8, 0)):
        raise FnetError(f"dtype tf32 needs a CUDA device of compute capability 8.0 or more, not {device}")
    if dtype == "bfloat16" and on_cuda and not torch.cuda.is_bf16_supported():
        raise FnetError(f"dtype bfloat16 is not supported by {device}; use tf32 or float32")


def check_kernels(numerics: Numerics) -> None:
    """Raises FnetError where the kernels of fused norms cannot be compiled."""
    before = torch.get_num_threads()
    try:
        _block(numerics)()
    except Exception as error:  # whatever torch.compile and the compilers behind it raise
        raise FnetError(f"the kernels of `fused` cannot be compiled here: {first_line(error)}") from None
    finally:
        torch.set_num_threads(before)


@cache
def resolve(
    device: str,
    dtype: str = "auto",
    workers: int = 1,
    cores: int = 1,
    threads: int | None = None,
    fused: bool | None = None,
) -> Numerics:
    """The fastest way on this device, by timing a block of a network forward and backward: three seconds, and where
    kernels must be compiled, up to 15 s more for the first time on a machine.

    A worker on the CPU gets `threads`, or one, or its share of the cores if that is faster. What is given is not
    measured, and nothing is twice in a process.
    Raises FnetError for a device that is not there and for arithmetic or kernels that it cannot do.
    """
    device = check_device(device)
    check_dtype(device, dtype)
    before = torch.get_num_threads()
    try:
        chosen = _fastest([_fused(way, fused) for way in _ways(device, dtype, threads or 1)])
        chosen = replace(chosen, group_widths=tuple(_width(chosen, own) for own in GROUPS))
        wider = replace(chosen, threads=cores // workers)
        if device == "cpu" and threads is None and wider.threads > 1:
            chosen = _fastest([chosen, wider])
        return replace(chosen, alone_threads=max(chosen.threads, min(cores, workers * chosen.threads)))
    finally:
        torch.set_num_threads(before)


def _ways(device: str, dtype: str, threads: int) -> list[Numerics]:
    """What could be fast: float32 and, where the device has them, narrower dtypes; each in the memory format that it is
    faster in."""
    ways: list[Numerics] = []
    for one in get_args(DType):
        if dtype not in ("auto", one):
            continue
        try:
            check_dtype(device, one)
        except FnetError:
            continue
        formats = [Numerics(device, one, channels_last, threads) for channels_last in (True, False)]
        # bfloat16 without hardware for it is many times slower: nothing more is timed in it. The first time warms up.
        steps = [_block(way) for way in (formats[0], *ways[:1])]
        times = [(_timed(step), _timed(step))[1] for step in steps]
        if times[0] <= 3 * times[-1]:
            ways.append(_fastest(formats))
    return ways


def _fused(plain: Numerics, wanted: bool | None) -> Numerics:
    """Fused norms where they are wanted, or can be compiled, which takes a C++ compiler, and are faster."""
    if wanted is False:
        return plain
    candidate = replace(plain, fused=True)
    try:
        check_kernels(candidate)
    except FnetError:
        if wanted:
            raise
        return plain
    return candidate if wanted or _faster(_norm(candidate), _norm(plain)) else plain


def _fastest(ways: list[Numerics]) -> Numerics:
    """The first, unless another is clearly faster."""
    best = ways[0]
    for other in ways[1:]:
        if _faster(_block(other), _block(best)):
            best = other
    return best


def _width(numerics: Numerics, own: int) -> int:
    """The channels a group that a convolution with `own` channels a group is computed with fastest."""
    best = own
    for width in (16, 32):
        if width > own and _faster(_grouped(numerics, own, width), _grouped(numerics, own, best)):
            best = width
    return best


def _block(numerics: Numerics) -> Callable[[], None]:
    """A regular layer and a factorized one, forward and backward: each convolution with BatchNorm and ReLU."""
    convs = (
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.Conv2d(64, 64, 3, padding=1, groups=16, bias=False),
        nn.Conv2d(64, 64, 1, bias=False),
    )
    pairs = [(conv, nn.BatchNorm2d(64)) for conv in convs]
    for module in (module for pair in pairs for module in pair):
        module.to(numerics.device, memory_format=numerics.memory_format)  # type: ignore[call-overload]

    def forward(x: Tensor) -> Tensor:
        for conv, norm in pairs:
            x = norm_relu(conv(x), norm) if numerics.fused else F.relu(norm(conv(x)))
        return x

    return _pass(numerics, forward, batch=16, size=32)


def _norm(numerics: Numerics) -> Callable[[], None]:
    """BatchNorm with ReLU, forward and backward, over what no cache holds, as in a training."""
    norm = nn.BatchNorm2d(64).to(numerics.device)

    def forward(x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16) if numerics.dtype == "bfloat16" else x
        return norm_relu(x, norm) if numerics.fused else F.relu(norm(x))

    return _pass(numerics, forward, batch=64, size=32)


def _grouped(numerics: Numerics, own: int, width: int) -> Callable[[], None]:
    conv = nn.Conv2d(64, 64, 3, padding=1, groups=64 // own, bias=False)
    conv.to(numerics.device, memory_format=numerics.memory_format)  # type: ignore[call-overload]
    merge = width // own

    return _pass(numerics, lambda x: conv(x) if merge == 1 else block_diagonal(x, conv, merge), batch=32, size=16)


def _pass(numerics: Numerics, forward: Callable[[Tensor], Tensor], batch: int, size: int) -> Callable[[], None]:
    """A step forward and backward over a batch of activations [batch, 64, size, size]."""
    images = torch.randn(batch, 64, size, size, generator=torch.Generator().manual_seed(0)).to(numerics.device)
    x = images.to(memory_format=numerics.memory_format).requires_grad_()

    def step() -> None:
        if numerics.device == "cpu":
            torch.set_num_threads(numerics.threads)
        with numerics.arithmetic():
            y = forward(x)
        with numerics.arithmetic(autocast=False):
            y.backward(torch.ones_like(y))  # type: ignore[no-untyped-call]
        if numerics.device.startswith("cuda"):
            torch.cuda.synchronize(numerics.device)

    return step


def _faster(one: Callable[[], None], other: Callable[[], None], rounds: int = 3) -> bool:
    """Whether `one` is clearly faster than `other`: the best of interleaved rounds, after one that warms up."""
    times = [(_timed(one), _timed(other)) for _ in range(rounds + 1)][1:]
    return CLEAR * min(own for own, _ in times) < min(others for _, others in times)


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
