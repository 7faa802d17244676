import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from fnet_search.base.errors import FnetError
from fnet_search.training.numerics import GROUPS, DType, Numerics, check_device, check_dtype, check_kernels, resolve


@pytest.fixture(autouse=True)
def measured_anew() -> None:
    resolve.cache_clear()


class Clock:
    """Time that only computing takes: as much a pass as `cost` says, which is of its numerics; a convolution that is
    computed as a wider one takes less than it costs otherwise by what `saved` has of its own and its new width."""

    def __init__(self) -> None:
        self.now, self.passes = 0.0, 0
        self.cost: Callable[[Numerics], float] = lambda numerics: 1.0
        self.saved: dict[tuple[int, int], float] = {}
        self.fused = 1.0
        """What a norm with its activation in one kernel takes, where one in two takes 1."""

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found, arithmetic = Clock(), Numerics.arithmetic

    def computed(numerics: Numerics, autocast: bool = True) -> Any:
        found.now += found.cost(numerics)
        found.passes += 1
        return arithmetic(numerics, autocast)

    def norm_relu(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        found.now += found.fused - 1
        return F.relu(norm(x))

    def block_diagonal(x: Tensor, conv: nn.Conv2d, merge: int) -> Tensor:
        own = conv.in_channels // conv.groups
        found.now -= found.saved.get((own, own * merge), 0.0)
        return conv(x)  # type: ignore[no-any-return]

    def few_pixels(batch: int, channels: int, *size: int, generator: torch.Generator) -> Tensor:
        return torch.ones(1, channels, 2, 2)

    monkeypatch.setattr(torch, "randn", few_pixels)  # the clock does not go by what really takes time
    monkeypatch.setattr(Numerics, "arithmetic", computed)
    for name, replacement in (("time", found), ("norm_relu", norm_relu), ("block_diagonal", block_diagonal)):
        monkeypatch.setattr(f"fnet_search.training.numerics.{name}", replacement)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return found


PLAIN = Numerics("cpu", "float32", True, 1, False, GROUPS, 2)
"""What is chosen where all ways take the same time, for two workers."""


def chosen(**options: Any) -> Numerics:
    return resolve("auto", workers=2, cores=5, **options)


def test_the_plain_way_is_taken_unless_another_is_clearly_faster(clock: Clock) -> None:
    assert chosen() == PLAIN
    resolve.cache_clear()
    clock.cost = lambda numerics: 1.0 if numerics == PLAIN else 0.97
    clock.fused, clock.saved = 0.99, {(1, 16): 0.05}
    assert chosen() == PLAIN


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (lambda one: 1.0 if one.dtype == "float32" else 0.8, {"dtype": "bfloat16"}),
        (lambda one: 1.0 if one.channels_last else 0.8, {"channels_last": False}),
        (lambda one: 1.0 if one.threads == 1 else 0.8, {"threads": 2, "alone_threads": 4}),
        # bfloat16 that takes three times as long in one format is not timed in the other.
        (lambda one: 1.0 if one.dtype == "float32" else 3.1 if one.channels_last else 0.1, {}),
    ],
)
def test_the_fastest_way_is_taken(clock: Clock, cost: Callable[[Numerics], float], expected: dict[str, Any]) -> None:
    clock.cost = cost
    assert chosen() == replace(PLAIN, **expected)


def test_norms_are_fused_and_groups_widened_where_that_is_faster(clock: Clock) -> None:
    """A convolution of one channel a group is computed as 16, of 4 as 32, which beats 16."""
    clock.fused, clock.saved = 0.5, {(1, 16): 0.4, (1, 32): 0.41, (4, 16): 0.3, (4, 32): 0.6, (8, 32): 0.01}
    assert chosen() == replace(PLAIN, fused=True, group_widths=(16, 2, 32, 8, 16))


@pytest.mark.parametrize(
    ("dtype", "threads", "fused"), [("bfloat16", 3, False), ("float32", 3, False), ("float32", 1, True)]
)
def test_what_is_asked_for(clock: Clock, dtype: DType, threads: int, fused: bool) -> None:
    """Whatever would be faster."""
    clock.cost = lambda one: (one.dtype == dtype) + (one.threads == threads) + 1.0
    clock.fused = 2.0 if fused else 0.5
    found = resolve("cpu", dtype, workers=2, cores=4, threads=threads, fused=fused)
    assert found == Numerics("cpu", dtype, True, threads, fused, GROUPS, min(4, 2 * threads))


def test_nothing_is_measured_twice(clock: Clock) -> None:
    asked: dict[str, Any] = {"dtype": "float32", "threads": 1, "fused": False}
    found = resolve("cpu", **asked)
    before = clock.passes
    assert resolve("cpu", **asked) is found
    assert clock.passes == before
    resolve("cpu", **asked | {"threads": 2})
    assert clock.passes > before


def test_measuring_leaves_the_threads_as_they_were(clock: Clock) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        chosen()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_what_is_measured_here() -> None:
    """Whatever is fast: something that a training can be computed with."""
    found = resolve("auto", workers=2, cores=2)
    check_dtype(found.device, found.dtype)
    assert found.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert all(width in (own, 16, 32) and width >= own for own, width in zip(GROUPS, found.group_widths, strict=True))
    check_kernels(found)


UNCOMPILED = """
import torch
from fnet_search.base.errors import FnetError
from fnet_search.training.numerics import resolve
torch.set_num_threads(5)
print(resolve("cpu", "float32", threads=2).fused, torch.get_num_threads())
try:
    resolve("cpu", "float32", threads=2, fused=True)
except FnetError as error:
    print(error)
print(torch.get_num_threads())
"""


@pytest.mark.slow
def test_fused_norms_without_a_compiler(tmp_path: Path) -> None:
    """They are left out, and one line where they were asked for."""
    nothing = {"CXX": "/nonexistent", "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    child = subprocess.run(
        [sys.executable, "-c", UNCOMPILED], env=os.environ | nothing, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    left_out, asked_for, after = child.stdout.splitlines()
    assert left_out == "False 5"
    assert asked_for.startswith("the kernels of `fused` cannot be compiled here: ")
    assert len(asked_for) > 60
    assert after == "5", "threads are as they were after an error too"


def test_numerics_come_back_from_json() -> None:
    numerics = Numerics("cpu", "bfloat16", True, 2, True, (16, 16, 4, 8, 16), 6)
    assert Numerics.from_json(json.loads(json.dumps(numerics.to_json()))) == numerics
    of_version_0_1 = {"device": "cpu", "dtype": "float32", "channels_last": False, "threads": 3}
    assert Numerics.from_json(of_version_0_1) == Numerics("cpu", "float32", False, 3)


@pytest.mark.parametrize(
    ("numerics", "text"),
    [
        (Numerics("cpu"), "cpu, float32, channels_first, 1 thread per worker"),
        (Numerics("cpu", "bfloat16", True, 2), "cpu, bfloat16, channels_last, 2 threads per worker"),
        (Numerics("cpu", alone_threads=2), "cpu, float32, channels_first, 1 thread per worker, 2 alone"),
        (Numerics("cuda:1", "bfloat16", True, 2), "cuda:1, bfloat16, channels_last"),
        (Numerics("cuda", "tf32"), "cuda, tf32, channels_first"),
        (Numerics("cpu", fused=True), "cpu, float32, channels_first, fused norms, 1 thread per worker"),
        (
            Numerics("cpu", "float32", True, 1, True, (16, 32, 4, 16, 16)),
            "cpu, float32, channels_last, fused norms, groups of 1 as 16, 2 as 32, 8 as 16 channels, "
            "1 thread per worker",
        ),
        (Numerics("cuda", "tf32", group_widths=(1, 2, 4, 8, 16)), "cuda, tf32, channels_first"),
    ],
)
def test_what_people_read(numerics: Numerics, text: str) -> None:
    assert str(numerics) == text


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_arithmetic(dtype: DType, expected: torch.dtype) -> None:
    with Numerics("cpu", dtype).arithmetic():
        assert F.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).dtype == expected
    assert F.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).dtype == torch.float32


def set_tf32(allowed: tuple[bool, bool]) -> tuple[bool, bool]:
    """What was allowed before, in convolutions and in matrix products."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed
    return before


@pytest.mark.parametrize("before", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
def test_tf32_is_on_for_trainings_in_tf32_only(dtype: DType, before: tuple[bool, bool]) -> None:
    """And as it was afterwards, after an error too."""
    usual = set_tf32(before)
    try:
        with Numerics("cpu", dtype).arithmetic():
            within = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    finally:
        after = set_tf32(usual)
    assert within == (dtype == "tf32",) * 2
    assert after == before


@pytest.mark.parametrize(("channels_last", "strides"), [(True, (60, 1, 15, 3)), (False, (60, 20, 5, 1))])
def test_memory_format(channels_last: bool, strides: tuple[int, ...]) -> None:
    numerics = Numerics("cpu", "float32", channels_last, 1)
    assert torch.zeros(2, 3, 4, 5).to(memory_format=numerics.memory_format).stride() == strides


@pytest.mark.parametrize("device", ["", "gpu", "cpu:x", "cuda:99", "xpu:7", "meta", "hpu", "privateuseone"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(FnetError) as caught:
        check_device(device)
    assert str(caught.value).startswith(f"device {device!r} is not available; this machine has: cpu")
    with pytest.raises(FnetError):
        resolve(device, "float32")


def test_the_cpu_is_there() -> None:
    assert check_device("cpu") == "cpu"
    for dtype in ("auto", "float32", "bfloat16"):
        check_dtype("cpu", dtype)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("tf32", "dtype tf32 needs a CUDA device of compute capability 8.0 or more, not cpu"),
        ("bfloat", "unknown dtype 'bfloat'; did you mean 'bfloat16'?"),
        ("", "unknown dtype ''"),
    ],
)
def test_arithmetic_that_a_device_cannot_do(dtype: str, message: str) -> None:
    for check in (check_dtype, resolve):
        with pytest.raises(FnetError) as caught:
            check("cpu", dtype)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)
