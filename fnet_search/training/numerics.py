"""Numerics: how a training is computed on a device. Chosen once per run by timing, recorded, and reused on resume."""

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
"""Channels per group for which `Numerics.group_widths` are measured."""
CLEAR = 1.05
"""A variant must be this many times faster than the plain one to be chosen, so that timing noise does not decide."""


@dataclass(frozen=True)
class Numerics:
    """How a training computes. Evaluations always use float32 (and integers), on the same device."""

    device: str
    dtype: DType = "float32"
    channels_last: bool = False
    threads: int = 1
    """Threads of a worker on the CPU."""
    fused: bool = False
    """Whether BatchNorm and its ReLU are one pass (`kernels.norm_relu`), compiled by torch.compile."""
    group_widths: tuple[int, ...] = ()
    """For convolutions of 1, 2, 4, ... channels per group: the channels per group that they are computed with, as
    block-diagonal convolutions (`kernels.block_diagonal`). Beyond the end of the list, unchanged."""
    alone_threads: int = 1
    """Threads of a worker on the CPU while the others are idle (reference, final training)."""

    @contextmanager
    def arithmetic(self, autocast: bool = True) -> Iterator[None]:
        """A context for bfloat16 with float32 master weights, or for tf32 products, as `dtype` says. Use it without
        `autocast` for backward passes, which follow the dtypes of the forward passes."""
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
            parts.append(f"{counted(self.threads, 'thread')} per worker{alone}")
        return ", ".join(parts)


def check_device(device: str) -> str:
    """Returns `device`; for ``auto`` CUDA if available, else the CPU. Raises FnetError for a device that is malformed
    or not available."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=torch.device(device)).item()
    except (RuntimeError, AssertionError, ValueError, ImportError):
        available = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise FnetError(f"device {device!r} is not available; this machine has: {', '.join(available)}") from None
    return device


def check_dtype(device: str, dtype: str) -> None:
    """Raises FnetError for a dtype that is unknown or that the device does not support."""
    if dtype not in ("auto", *get_args(DType)):
        raise unknown("dtype", dtype, ("auto", *get_args(DType)))
    on_cuda = device.startswith("cuda")
    if dtype == "tf32" and not (on_cuda and torch.cuda.get_device_capability(device) >= (8, 0)):
        raise FnetError(f"dtype tf32 needs a CUDA device of compute capability 8.0 or more, not {device}")
    if dtype == "bfloat16" and on_cuda and not torch.cuda.is_bf16_supported():
        raise FnetError(f"dtype bfloat16 is not supported by {device}; use tf32 or float32")


def check_kernels(numerics: Numerics) -> None:
    """Raises FnetError if the kernels of fused norms cannot be compiled."""
    before = torch.get_num_threads()
    try:
        _block(numerics)()
    except Exception as error:  # torch.compile and the compilers behind it may raise anything
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
    """The fastest numerics on this device, by timing a block of a network forward and backward.

    Takes three seconds, and up to 15 s more for compiling kernels the first time on a machine; cached in the process. A
    worker on the CPU gets `threads`; if that is None, one, or its share of the cores if that is faster. Only what is
    not given is chosen by timing; the memory format always is. Raises FnetError for a device that is not available, and
    for a dtype or kernels that it does not support.
    """
    device = check_device(device)
    check_dtype(device, dtype)
    before = torch.get_num_threads()
    try:
        chosen = _fastest([_with_fused(plain, fused) for plain in _dtypes(device, dtype, threads or 1)])
        chosen = replace(chosen, group_widths=tuple(_width(chosen, own) for own in GROUPS))
        wider = replace(chosen, threads=cores // workers)
        if device == "cpu" and threads is None and wider.threads > 1:
            chosen = _fastest([chosen, wider])
        return replace(chosen, alone_threads=max(chosen.threads, min(cores, workers * chosen.threads)))
    finally:
        torch.set_num_threads(before)


def _dtypes(device: str, dtype: str, threads: int) -> list[Numerics]:
    """Numerics worth timing: float32 and the narrower dtypes that the device supports, each in its faster memory
    format."""
    chosen: list[Numerics] = []
    for kind in get_args(DType):
        if dtype not in ("auto", kind):
            continue
        try:
            check_dtype(device, kind)
        except FnetError:
            continue
        formats = [Numerics(device, kind, channels_last, threads) for channels_last in (True, False)]
        # bfloat16 without hardware for it is many times slower: not worth timing further. The first pass warms up.
        steps = [_block(numerics) for numerics in (formats[0], *chosen[:1])]
        times = [(_timed(step), _timed(step))[1] for step in steps]
        if times[0] <= 3 * times[-1]:
            chosen.append(_fastest(formats))
    return chosen


def _with_fused(plain: Numerics, wanted: bool | None) -> Numerics:
    """Adds fused norms if wanted; if not given, when they can be compiled (which needs a C++ compiler) and are
    faster."""
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


def _fastest(choices: list[Numerics]) -> Numerics:
    """The first choice, unless a later one is clearly faster."""
    best = choices[0]
    for other in choices[1:]:
        if _faster(_block(other), _block(best)):
            best = other
    return best


def _width(numerics: Numerics, own: int) -> int:
    """The channels per group with which a convolution of `own` channels per group is computed fastest."""
    best = own
    for width in (16, 32):
        if width > own and _faster(_grouped(numerics, own, width), _grouped(numerics, own, best)):
            best = width
    return best


def _block(numerics: Numerics) -> Callable[[], None]:
    """A pass over a regular and a factorized layer, each convolution with BatchNorm and ReLU."""
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
    """A pass over BatchNorm with ReLU, on more data than caches hold, as in a training."""
    norm = nn.BatchNorm2d(64).to(numerics.device)

    def forward(x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16) if numerics.dtype == "bfloat16" else x
        return norm_relu(x, norm) if numerics.fused else F.relu(norm(x))

    return _pass(numerics, forward, batch=64, size=32)


def _grouped(numerics: Numerics, own: int, width: int) -> Callable[[], None]:
    """A pass over a convolution of `own` channels per group, computed with `width`."""
    conv = nn.Conv2d(64, 64, 3, padding=1, groups=64 // own, bias=False)
    conv.to(numerics.device, memory_format=numerics.memory_format)  # type: ignore[call-overload]
    merge = width // own

    return _pass(numerics, lambda x: conv(x) if merge == 1 else block_diagonal(x, conv, merge), batch=32, size=16)


def _pass(numerics: Numerics, forward: Callable[[Tensor], Tensor], batch: int, size: int) -> Callable[[], None]:
    """A function that runs `forward` and its backward pass on activations [batch, 64, size, size]."""
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


def _faster(first: Callable[[], None], second: Callable[[], None], rounds: int = 3) -> bool:
    """Whether `first` is clearly faster than `second`: compares the best of interleaved rounds, after one that warms
    up."""
    times = [(_timed(first), _timed(second)) for _ in range(rounds + 1)][1:]
    return CLEAR * min(own for own, _ in times) < min(others for _, others in times)


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
