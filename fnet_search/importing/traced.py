"""The trace of a torch module by `torch.export`, without what that says meanwhile."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO

import torch
from torch import nn
from torch.export import ExportedProgram

from fnet_search.arch.layers import Shape
from fnet_search.base.errors import FnetError, first_line
from fnet_search.base.units import size_text

BATCH = 2
"""Images that are traced: one could be taken for a dimension of size 1."""


def trace(model: nn.Module, shape: Shape, name: str) -> ExportedProgram:
    """What a module computes in evaluation mode, in operators that change nothing in place, for `BATCH` images of a
    shape. Raises FnetError, which calls it `name`, where it cannot be traced."""
    first = next(iter(model.parameters()), torch.empty(0))
    example = torch.zeros(BATCH, *shape, device=first.device)
    with _evaluating(model), torch.no_grad(), _silence():
        try:
            program: ExportedProgram = torch.export.export(model, (example,)).run_decompositions({})  # functional
            return program
        except Exception as error:  # torch.export and the module raise what they like
            reason = first_line(error)
            small = any(word in reason.lower() for word in ("too small", "kernel size", "height", "width"))
            larger = f"; `input_shape` {shape[0]}x224x224 would give it larger images"
            advice = larger if small and shape[1] < 224 else ""
            if any(type(one).__module__ == "torchvision.transforms.transforms" for one in model.modules()):
                advice = "; torchvision.transforms.v2 has transforms that can be traced"
            said = f"{reason}{advice}"
            raise FnetError(f"cannot trace {name} for an input of {size_text(shape)}: {said}") from None


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings and no log: what fails is said once, in a line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
