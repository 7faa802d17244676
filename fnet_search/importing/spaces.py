"""Loads spaces by name: shipped ones, space files, and imported networks."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import tomli_w

from fnet_search.arch.macroarchitecture import Macroarchitecture, check_classifier
from fnet_search.arch.space_file import read_space, to_toml
from fnet_search.base import shipped
from fnet_search.base.errors import FnetError
from fnet_search.base.files import write_text
from fnet_search.importing import torchvision_names


def load_space(
    name: str,
    input_shape: tuple[int, int, int] | None = None,
    weights: str | None = None,
    default_shape: Callable[[int], tuple[int, int, int]] = lambda channels: (channels, 224, 224),
) -> Macroarchitecture:
    """A shipped space by name (``factorizenet``: paper, Figure 2), a space file by path, with the weights saved beside
    it, or an imported network, as ``torchvision:resnet18`` or ``mymodel.py:make``.

    `input_shape` (C, H, W) is for imported networks only; None: `default_shape` of the channels that the network reads.
    `weights` of imported networks: see `modules.load_imported`; of others it is a file with the weights of the regular
    network, as a run writes it (``runs/.../candidates/000/weights.safetensors``). Raises FnetError for an unknown name,
    a malformed space (with the layer and its line), and weights that do not fit.
    """
    if name.endswith(".py"):
        raise FnetError(f"space {name}: name its function too, as in {name}:make")
    where, colon, _ = name.rpartition(":")
    if colon and not name.endswith(".toml"):
        if where.endswith(".py") and not Path(where).is_file():
            raise FnetError(f"space {name}: the file {where} does not exist")
        from fnet_search.importing.named_modules import load_imported  # torch takes seconds to import

        return load_imported(name, input_shape, weights, default_shape)
    try:
        space = read_space(name)
    except FnetError as error:
        hint = f"; torchvision's is torchvision:{name}" if name in torchvision_names.NAMES else ""
        raise FnetError(f"{error}{hint}") from None
    path = shipped.find("spaces", "space", name)
    try:
        check_classifier(space)
    except FnetError as error:
        raise FnetError(f"space {path}: {error}") from None
    if input_shape is not None and input_shape != space.input_shape:
        raise FnetError(f"`input_shape` can only be given for an imported network; space {path} has its own")
    beside = tomllib.loads(path.read_text(encoding="utf-8")).get("weights")
    if weights is None and beside is None:
        return space
    file = path.parent / str(beside) if weights is None else Path(weights)
    if not file.exists():
        raise FnetError(f"the weights file {file} does not exist")
    from fnet_search.training.network import load_weights

    return load_weights(space, file)


def save_space(space: Macroarchitecture, path: Path) -> None:
    """Writes `space` as TOML, and its weights, if any, beside it as safetensors. `load_space` gives an equal space back
    without running code."""
    text = to_toml(space)
    if space.weights is not None:
        from fnet_search.training.weights import write_tensors

        file = path.with_suffix(".safetensors")
        write_tensors(file, space.weights, {"space": space.name})
        text = text.replace("input = [", f"{tomli_w.dumps({'weights': file.name})}input = [", 1)
    write_text(path, text)
