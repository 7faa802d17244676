import gzip
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fnet_search.base.errors import FnetError
from fnet_search.training.weights import read_state, read_tensors, write_tensors


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


def script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)  # type: ignore[no-untyped-call]


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty.pth": (lambda path: path.write_bytes(b""), "it is empty"),
    "hello.pth": (lambda path: path.write_text("hello"), "it is neither safetensors nor what torch.save writes"),
    "hello.safetensors": (lambda path: path.write_text("hello"), "Error while deserializing header: header too small"),
    "packed.pth.gz": (lambda path: path.write_bytes(gzip.compress(b"w")), "it is compressed; unpack it first"),
    "packed.safetensors": (lambda path: path.write_bytes(gzip.compress(b"w")), "it is compressed; unpack it first"),
    "model.onnx": (lambda path: path.write_bytes(b"\x08\x07"), "it is an ONNX file; save the state dict of the torch"),
    "pointer.safetensors": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"),
        "it is a Git LFS pointer; fetch the file with git lfs pull",
    ),
    "arrays.npz": (lambda path: np.savez(path, a=np.zeros(3)), "it is an archive that torch.save did not write"),
    "script.pt": (script, "it is TorchScript; save its state dict: torch.save(torch.jit.load(PATH).state_dict(), NEW)"),
    "program.pt2": (
        lambda path: torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(3, 2),)), path),
        "it is an exported program; save its state dict: torch.save(torch.export.load(PATH).state_dict, NEW)",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_state_dict_is_told_in_a_line(name: str, tmp_path: Path) -> None:
    write, complaint = OTHERS[name]
    write(tmp_path / name)
    with pytest.raises(FnetError) as error:
        read_state(tmp_path / name)
    assert str(error.value).startswith(f"cannot read weights {tmp_path / name}: {complaint}")
    assert "\n" not in str(error.value)


def test_what_is_advised_can_be_read(tmp_path: Path) -> None:
    script(tmp_path / "script.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(torch.jit.load(tmp_path / "script.pt").state_dict(), tmp_path / "a.pth")  # type: ignore[no-untyped-call]
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(3, 2),))
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save(torch.export.load(tmp_path / "program.pt2").state_dict, tmp_path / "b.pth")
    for name in ("a.pth", "b.pth"):
        assert {key: value.shape for key, value in read_state(tmp_path / name).items()} == {
            "weight": (2, 2),
            "bias": (2,),
        }


def test_safetensors_need_no_name(tmp_path: Path) -> None:
    write_tensors(tmp_path / "weights.bin", {"a": torch.ones(3)}, {})
    assert torch.equal(read_state(tmp_path / "weights.bin")["a"], torch.ones(3))
