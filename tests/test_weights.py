from pathlib import Path

import pytest
import torch

from fnet_search.errors import FnetError
from fnet_search.weights import read_tensors, write_tensors


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "weights.safetensors"
    tensors = {
        "conv/1.weight": torch.randn(4, 3, 2, 2, requires_grad=True),
        "codes": torch.arange(256, dtype=torch.uint8),
        "bias": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
        "steps": torch.tensor(7),
        "none": torch.empty(0, 3),
        "half": torch.randn(3).bfloat16(),
    }
    write_tensors(path, tensors, {"plan": "a=1,b=2", "note": "é"})
    found, metadata = read_tensors(path)
    assert metadata == {"plan": "a=1,b=2", "note": "é"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert list(path.parent.iterdir()) == [path]


def test_any_memory_format_can_be_written(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 2, 2)
    tensors = {
        "last": weight.to(memory_format=torch.channels_last),
        "turned": weight.transpose(0, 1),
        "part": weight[:, 1:2],
        "shared": weight.expand(2, 4, 3, 2, 2),
    }
    write_tensors(tmp_path / "w", tensors, {})
    found, metadata = read_tensors(tmp_path / "w")
    assert metadata == {}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_what_was_read_stays_when_the_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "w"
    write_tensors(path, {"a": torch.zeros(1000)}, {})
    old, _ = read_tensors(path)
    write_tensors(path, {"a": torch.ones(1000)}, {})
    assert torch.equal(old["a"], torch.zeros(1000))
    assert torch.equal(read_tensors(path)[0]["a"], torch.ones(1000))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(FnetError, match=r"cannot read weights .*w\.safetensors"):
        read_tensors(path)
    write_tensors(path, {"a": torch.randn(100)}, {"key": "k"})
    whole = path.read_bytes()
    for length in (0, 4, 8, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FnetError, match=r"cannot read weights .*w\.safetensors"):
            read_tensors(path)
    path.write_bytes(b"\xff" * len(whole))
    with pytest.raises(FnetError, match=r"cannot read weights .*w\.safetensors"):
        read_tensors(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(FnetError, match=r"cannot read weights .*w\.safetensors"):
        read_tensors(path)
