"""Tensors on disk, as safetensors; also reads state dicts of torch, without unpickling any object."""

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fnet_search.base.errors import FnetError, first_line
from fnet_search.base.files import replacing


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file. Tensors are stored contiguous; memory formats are lost.

    Raises FnetError, naming the file, if it cannot be written (a full disk).
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(stored, temporary, dict(metadata))
        except SafetensorError as error:
            raise FnetError(f"cannot write weights {path}: {error}") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises FnetError, naming the file, if it is missing or broken."""
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FnetError(f"cannot read weights {path}: {error}") from None


NO_STATE = "{} does not hold a state dict alone; save one with torch.save(model.state_dict(), PATH)"

HOLDERS = (
    *("state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights"),
    *("ema", "model_ema", "state_dict_ema", "ema_state_dict"),
)
"""Keys under which training scripts save a state dict, averaged weights last."""


def read_state(path: Path) -> dict[str, Tensor]:
    """Reads a state dict from a safetensors file or a file of torch.save, at the top or under one of HOLDERS. Unpickles
    tensors only (weights_only).

    Raises FnetError, naming the file, if it is missing, broken, or something else.
    """
    if path.is_dir():
        raise FnetError(f"{path} is a folder; name the file of weights in it")
    if not path.is_file():
        raise FnetError(f"the weights file {path} does not exist")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise FnetError(f"cannot read weights {path}: {error}") from None
    if reason := _other_format(path, head):
        raise FnetError(f"cannot read weights {path}: {reason}")
    if path.suffix == ".safetensors" or head[8:9] == b"{":  # a safetensors header is JSON after 8 bytes of length
        return read_tensors(path)[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's message advises to load it unsafely
        raise FnetError(NO_STATE.format(path) + _objects(path)) from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise FnetError(f"cannot read weights {path}: {first_line(error)}") from None
    except Exception:  # bytes that are no pickle may raise anything
        raise FnetError(f"cannot read weights {path}: it is neither safetensors nor what torch.save writes") from None
    for _ in HOLDERS:  # they may be nested
        if isinstance(state, dict):
            state = next((state[key] for key in HOLDERS if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise FnetError(NO_STATE.format(path))
    return state


BEGINNINGS = {
    b"\x1f\x8b": "it is compressed; unpack it first",
    b"BZh": "it is compressed; unpack it first",
    b"\xfd7zXZ": "it is compressed; unpack it first",
    b"version https://git-lfs": "it is a Git LFS pointer; fetch the file with git lfs pull",
}


def _other_format(path: Path, head: bytes) -> str | None:
    """Names a known other format and what to do about it; None for an unknown one, and for safetensors and
    torch.save."""
    if not head:
        return "it is empty"
    if path.suffix == ".onnx":
        return "it is an ONNX file; save the state dict of the torch module that it was exported from"
    if head.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in names:
            return "it is TorchScript; save its state dict: torch.save(torch.jit.load(PATH).state_dict(), NEW)"
        if "archive_format" in names:
            return "it is an exported program; save its state dict: torch.save(torch.export.load(PATH).state_dict, NEW)"
        if "data.pkl" not in names:
            return "it is an archive that torch.save did not write"
    return next((reason for beginning, reason in BEGINNINGS.items() if head.startswith(beginning)), None)


def _objects(path: Path) -> str:
    """The classes that a checkpoint would unpickle besides tensors, as far as torch can tell."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # it reads the newer format only, and a broken pickle may raise anything
        names = []
    return f" (it holds {', '.join(sorted(names)[:3])}; Python objects are never loaded from a file)" if names else ""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The first 16 hex digits of the SHA-256 over names and values."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()[:16]
