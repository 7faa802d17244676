import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from fnet_search.base.errors import FnetError
from fnet_search.training.numerics import GROUPS, DType, Numerics, check_device, check_dtype, resolve
from tests.support.networks import compiled


@pytest.fixture(autouse=True)
def measured_anew() -> None:
    resolve.cache_clear()


def fits(widths: tuple[int, ...]) -> bool:
    """As they can be measured: each as it is, or a wider one."""
    return len(widths) == len(GROUPS) and all(
        width in (own, 16, 32) and width >= own for own, width in zip(GROUPS, widths, strict=True)
    )


@pytest.mark.parametrize(
    ("dtype", "threads", "fused"),
    [("bfloat16", 3, False), ("float32", 3, False), pytest.param("float32", 1, True, marks=compiled)],
)
def test_what_is_asked_for(dtype: DType, threads: int, fused: bool) -> None:
    """Whatever would be faster."""
    found = resolve("cpu", dtype, workers=2, cores=4, threads=threads, fused=fused)
    asked = Numerics("cpu", dtype, found.channels_last, threads, fused, found.group_widths, min(4, 2 * threads))
    assert found == asked
    assert fits(found.group_widths)


def test_what_is_measured() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        found = resolve("auto", workers=2, cores=5)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    on_cuda = torch.cuda.is_available()
    assert found.device == ("cuda" if on_cuda else "cpu")
    assert found.dtype in (("bfloat16", "tf32", "float32") if on_cuda else ("bfloat16", "float32"))
    assert found.threads in ((1,) if on_cuda else (1, 2))
    assert found.alone_threads == 2 * found.threads
    assert fits(found.group_widths)


def test_nothing_is_measured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"dtype": "float32", "threads": 1, "fused": False}
    found = resolve("cpu", **asked)
    monkeypatch.setattr("fnet_search.training.numerics._timed", None)
    assert resolve("cpu", **asked) is found
    with pytest.raises(TypeError):
        resolve("cpu", **asked | {"threads": 2})


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
        (Numerics("cpu"), "cpu, float32, channels_first, 1 thread a worker"),
        (Numerics("cpu", "bfloat16", True, 2), "cpu, bfloat16, channels_last, 2 threads a worker"),
        (Numerics("cpu", alone_threads=2), "cpu, float32, channels_first, 1 thread a worker, 2 alone"),
        (Numerics("cuda:1", "bfloat16", True, 2), "cuda:1, bfloat16, channels_last"),
        (Numerics("cuda", "tf32"), "cuda, tf32, channels_first"),
        (Numerics("cpu", fused=True), "cpu, float32, channels_first, fused norms, 1 thread a worker"),
        (
            Numerics("cpu", "float32", True, 1, True, (16, 32, 4, 16, 16)),
            "cpu, float32, channels_last, fused norms, groups of 1 as 16, 2 as 32, 8 as 16 channels, 1 thread a worker",
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
    assert str(caught.value).startswith(f"device {device!r} is not there; this machine has: cpu")
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
