"""Tensors on disk, as safetensors; what others saved is read without making any pickled object."""

import hashlib
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fnet_search.errors import FnetError, first_line
from fnet_search.files import replacing


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


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict: of a safetensors file, or as torch saved it. No pickled object is ever made (weights_only).

    Raises FnetError, naming the file, where it is missing, broken, or something else.
    """
    if not path.is_file():
        raise FnetError(f"the weights file {path} does not exist")
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch would tell how to load it all the same
        raise FnetError(NO_STATE.format(path)) from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise FnetError(f"cannot read weights {path}: {first_line(error)}") from None
    for key in ("state_dict", "model"):  # as training scripts save them
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise FnetError(NO_STATE.format(path))
    return found


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values, first 16 hex digits."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()[:16]
