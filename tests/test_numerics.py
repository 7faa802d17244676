import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from fnet_search.errors import FnetError
from fnet_search.numerics import Numerics, check_device, resolve


def test_what_is_asked_for() -> None:
    assert resolve("cpu", "float32") == Numerics("cpu", "float32", True, 1)
    assert resolve("cpu", "bfloat16", 3) == Numerics("cpu", "bfloat16", True, 3)


def test_what_is_measured() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        found = resolve("auto", "auto")
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert found in (Numerics(device, "float32", True, 1), Numerics(device, "bfloat16", True, 1))


def test_numerics_come_back_from_json() -> None:
    numerics = Numerics("cpu", "bfloat16", True, 2)
    assert Numerics(**numerics.to_json()) == numerics


def test_what_people_read() -> None:
    assert str(Numerics("cpu", "float32", False, 1)) == "cpu, float32, channels_first, 1 thread a worker"
    assert str(Numerics("cpu", "bfloat16", True, 2)) == "cpu, bfloat16, channels_last, 2 threads a worker"
    assert str(Numerics("cuda:1", "bfloat16", True, 2)) == "cuda:1, bfloat16, channels_last"


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_autocast(dtype: str, expected: torch.dtype) -> None:
    numerics = resolve("cpu", dtype)
    with numerics.autocast():
        assert F.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).dtype == expected
    assert F.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).dtype == torch.float32


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
