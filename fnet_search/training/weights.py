"""Tensors on disk, as safetensors; what others saved is read without making any pickled object."""

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
    """A safetensors file. Memory formats are not kept: tensors are stored contiguous.

    Raises FnetError, naming the file, where it cannot be written (a full disk).
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(stored, temporary, dict(metadata))
        except SafetensorError as error:
            raise FnetError(f"cannot write weights {path}: {error}") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises FnetError, naming the file, where it is missing or broken."""
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
"""Where training scripts keep the state dict in what they save, an average of the weights last."""


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict: of a safetensors file, or as torch saved it, by itself or under one of `HOLDERS`. No pickled object
    is ever made (weights_only).

    Raises FnetError, naming the file, where it is missing, broken, or something else.
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
    if other := _other(path, head):
        raise FnetError(f"cannot read weights {path}: {other}")
    if path.suffix == ".safetensors" or head[8:9] == b"{":  # after the length of its header
        return read_tensors(path)[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch would tell how to load it all the same
        raise FnetError(NO_STATE.format(path) + _objects(path)) from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise FnetError(f"cannot read weights {path}: {first_line(error)}") from None
    except Exception:  # bytes that are no pickle raise what they like
        raise FnetError(f"cannot read weights {path}: it is neither safetensors nor what torch.save writes") from None
    for _ in HOLDERS:  # one may hold another
        if isinstance(found, dict):
            found = next((found[key] for key in HOLDERS if isinstance(found.get(key), dict)), found)
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise FnetError(NO_STATE.format(path))
    return found


BEGINNINGS = {
    b"\x1f\x8b": "it is compressed; unpack it first",
    b"BZh": "it is compressed; unpack it first",
    b"\xfd7zXZ": "it is compressed; unpack it first",
    b"version https://git-lfs": "it is a Git LFS pointer; git lfs pull fetches the file that it stands for",
}


def _other(path: Path, head: bytes) -> str | None:
    """What a file is instead of safetensors or a state dict, and what to do about it; None: nothing known."""
    if not head:
        return "it is empty"
    if path.suffix == ".onnx":
        return "it is an ONNX file; save the state dict of the torch module that it was exported from"
    if head.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in names:
            return "it is TorchScript; torch.save(torch.jit.load(PATH).state_dict(), NEW) saves what is needed"
        if "archive_format" in names:
            return "it is an exported program; torch.save(torch.export.load(PATH).state_dict, NEW) saves what is needed"
        if "data.pkl" not in names:
            return "it is an archive that torch.save did not write"
    return next((what for beginning, what in BEGINNINGS.items() if head.startswith(beginning)), None)


def _objects(path: Path) -> str:
    """What a checkpoint would make beside tensors, as far as torch can tell."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # only of its newer format, and whatever a broken pickle raises
        names = []
    return f" (it holds {', '.join(sorted(names)[:3])}, and no Python object of a file is ever made)" if names else ""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values, first 16 hex digits."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()[:16]
