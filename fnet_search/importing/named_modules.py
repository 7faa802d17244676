"""Imports torchvision networks and modules of users' Python code as spaces, with or without weights.

This runs the user's code. A saved space (TOML and safetensors) is data: loading it runs no code.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.base.errors import FnetError, first_line, unknown
from fnet_search.base.plugins import fault, importable, load_object
from fnet_search.importing import torchvision_names
from fnet_search.importing.translation import from_module
from fnet_search.training.weights import read_state

OWN = "own"
"""The value of `weights` that keeps the weights with which a module was created."""


def load_imported(
    name: str,
    input_shape: tuple[int, int, int] | None,
    weights: str | None,
    default_shape: Callable[[int], tuple[int, int, int]],
) -> Macroarchitecture:
    """A space from ``torchvision:NAME``, ``FILE.py:FUNCTION`` or ``package.module:FUNCTION``.

    FUNCTION takes no arguments and returns a module, or it is a module itself. `input_shape` is (C, H, W); None:
    `default_shape` of the input channels of the first convolution. `weights` is a file (safetensors, or a state dict of
    torch.save), a name of torchvision's (``DEFAULT``), or ``own`` for those that the module is created with; None:
    none, so that it is trained from scratch.

    Raises FnetError for a name that does not exist, code that fails, weights that do not fit, and modules that cannot
    be imported (`translation.from_module`).
    """
    where, _, what = name.rpartition(":")
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    if where == "torchvision":
        named = None if weights is None or Path(weights).suffix or Path(weights).exists() else weights
        model, mean, std = _torchvision(what, named)
        title = what
    else:
        named = OWN if weights == OWN else None
        model = _user_module(where, what)
        stem = Path(where).stem if where.endswith(".py") else where.rpartition(".")[2]
        title = stem if what == "make" else f"{stem}-{what}"
    if weights is not None and named is None:
        fill(model, weights)
    shape = input_shape or default_shape(channels_of(model))
    space = from_module(model, torch.zeros(1, *shape), title)
    space = replace(space, description=f"imported from {name}")
    return replace(space, mean=mean, std=std, weights=None if weights is None else space.weights)


def _torchvision(name: str, weights: str | None) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """The module, and the mean and std with which its weights expect images normalised."""
    from torchvision import models

    if name not in models.list_models(module=models):
        raise unknown("torchvision network", name, torchvision_names.NAMES)
    builder: Callable[..., nn.Module] = models.get_model_builder(name)
    if weights is None:
        # GoogLeNet and Inception initialise slowly, with a warning, unless told not to.
        slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return builder(weights=None, **slow), (), ()
    offered: Any = models.get_model_weights(name)
    names = [*(choice.name for choice in offered), "DEFAULT"]
    if weights not in names:
        raise unknown(f"weights of torchvision's {name}", weights, [*names, "a file"])
    chosen = getattr(offered, weights)
    try:
        model = builder(weights=chosen)
    except Exception as error:  # torch.hub raises many kinds: URLError, OSError, RuntimeError
        raise FnetError(f"cannot get weights {weights} of torchvision's {name}: {first_line(error)}") from None
    transform = chosen.transforms()
    return model, tuple(transform.mean), tuple(transform.std)


def _user_module(where: str, what: str) -> nn.Module:
    """The torch module `what` of a file or Python module, or the one that the function `what` returns."""
    name = f"{where}:{what}"
    try:
        with importable(where):
            made = load_object(where, what)
            model = made if isinstance(made, nn.Module) else made()
    except FnetError as error:
        raise FnetError(f"space {name}: {error}") from None
    except (Exception, SystemExit) as error:  # code of users may raise anything
        raise FnetError(f"space {name}: {fault(error, where)}") from error
    if not isinstance(model, nn.Module):
        raise FnetError(f"space {name}: it gives a {type(model).__name__}; a torch.nn.Module is needed")
    return model


def channels_of(model: nn.Module) -> int:
    """Channels of the images that a module reads: those of its first convolution, else 3."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return first.in_channels if first is not None else 3


def fill(model: nn.Module, path: str) -> None:
    """Loads a state dict from a file into a module, without the prefix that a wrapper or an outer module gave its
    names.

    Raises FnetError for a missing file and for weights that do not fit.
    """
    if not Path(path).exists():
        raise FnetError(
            f"the weights file {path} does not exist; name a file, or {OWN} for those that the module is created with"
        )
    own = model.state_dict()
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    state = _unwrapped(read_state(Path(path)), needed, path)
    missing = [name for name in needed if name not in state]
    extra = [name for name in state if name not in own]
    problems = [f"{_some(missing)} missing"] if missing else []
    problems += [f"{_some(extra)} not in this network"] if extra else []
    for name in needed:
        if name in state and own[name].is_floating_point() and not state[name].is_floating_point():
            problems.append(f"{name!r} is {str(state[name].dtype).removeprefix('torch.')}, not float32")
            break
    if problems:
        raise FnetError(f"the weights in {path} do not fit: {'; '.join(problems)}")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise FnetError(f"the weights in {path} do not fit: {str(error).splitlines()[-1].strip()}") from None


def _unwrapped(state: Mapping[str, Tensor], needed: Sequence[str], path: str) -> dict[str, Tensor]:
    """The entries under the prefix that most of the needed names have in a state dict, without it: ``module.`` of
    DataParallel, ``_orig_mod.`` of torch.compile, the attribute of a Lightning module. Raises FnetError if the whole
    network occurs more than once."""
    counts, wanted = Counter[str](), set(needed)
    for name in state:
        ends = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        counts.update(name[:end] for end in ends if name[end:] in wanted)
    most = max(counts.values(), default=0)
    prefixes = [prefix for prefix, count in counts.items() if count == most]
    if "" in prefixes or not prefixes:
        return dict(state)
    if len(prefixes) > 1 and most == len(needed):
        raise FnetError(
            f"{path} holds this network more than once ({_some(prefixes)} prefixes of it); save one of them alone"
        )
    return {name.removeprefix(prefixes[0]): value for name, value in state.items() if name.startswith(prefixes[0])}


def _some(names: Sequence[str]) -> str:
    """The first three names, the number of the others, and the verb: ``'a', 'b' and 'c' are``."""
    more = [f"{len(names) - 3} more"] if len(names) > 3 else []
    *others, last = [*map(repr, names[:3]), *more]
    return f"{', '.join(others)} and {last} are" if others else f"{last} is"
