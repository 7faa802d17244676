"""Tensors on disk, as safetensors: no pickle is ever read."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fnet_search.errors import FnetError
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


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values, first 16 hex digits."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()[:16]
