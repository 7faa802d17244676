"""Numerics: device, dtype, memory format and threads of a training; resolved once a study, recorded, used on resume."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from fnet_search.errors import FnetError

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Numerics:
    """How numbers are computed in a training. Evaluations are always in float32 (and integers), on the same device."""

    device: str
    dtype: DType
    channels_last: bool
    threads: int

    def autocast(self) -> torch.autocast:
        """bfloat16 arithmetic with float32 master weights where `dtype` says so."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16")

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        threads = (
            "" if self.device.startswith("cuda") else f", {self.threads} thread{'s' * (self.threads > 1)} a worker"
        )
        return f"{self.device}, {self.dtype}, {'channels_last' if self.channels_last else 'channels_first'}{threads}"


def check_device(device: str) -> str:
    """Raises FnetError for a device that is not there or cannot be named."""
    try:
        torch.zeros(1, device=torch.device(device)).item()
    except (RuntimeError, AssertionError, ValueError, ImportError):
        found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise FnetError(f"device {device!r} is not there; this machine has: {', '.join(['cpu', *found])}") from None
    return device


def resolve(device: str, dtype: str, threads: int = 1) -> Numerics:
    """Picks dtype and memory format where `dtype` is ``auto``, by timing one block forward and backward (under 1 s)."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    plain = Numerics(device, "float32", False, threads)
    fast = Numerics(device, "bfloat16", True, threads)
    if dtype == "auto":
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            # A clear gain only: bfloat16 without hardware for it is many times slower, with it many times faster.
            chosen = fast if _seconds(plain) > 1.3 * _seconds(fast) else Numerics(device, "float32", True, threads)
        finally:
            torch.set_num_threads(before)
        return chosen
    return fast if dtype == "bfloat16" else Numerics(device, "float32", True, threads)


def _seconds(numerics: Numerics) -> float:
    x = torch.zeros(32, 64, 16, 16, device=numerics.device).to(memory_format=numerics.memory_format)
    weight = torch.zeros(64, 64, 3, 3, device=numerics.device, requires_grad=True)

    def block() -> None:
        with numerics.autocast():
            loss = F.conv2d(x, weight, padding=1).sum()
        torch.autograd.grad(loss, weight)
        if numerics.device.startswith("cuda"):
            torch.cuda.synchronize()

    return min(_timed(block) for _ in range(8))


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
