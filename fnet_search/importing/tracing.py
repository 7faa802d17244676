"""Traces a torch module with `torch.export`, without its warnings and logs."""

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
"""Images in the traced batch: a batch of one could be mistaken for a dimension of size 1."""


def trace(model: nn.Module, shape: Shape, name: str) -> ExportedProgram:
    """The trace of a module in evaluation mode, in functional operators, for BATCH images of a shape. Raises FnetError,
    with the module's `name`, if it cannot be traced."""
    first = next(iter(model.parameters()), torch.empty(0))
    example = torch.zeros(BATCH, *shape, device=first.device)
    with _evaluating(model), torch.no_grad(), _silence():
        try:
            program: ExportedProgram = torch.export.export(model, (example,)).run_decompositions({})  # functional
            return program
        except Exception as error:  # torch.export and the module may raise anything
            reason = first_line(error)
            small = any(word in reason.lower() for word in ("too small", "kernel size", "height", "width"))
            larger = f"; `input_shape` {shape[0]}x224x224 would give it larger images"
            advice = larger if small and shape[1] < 224 else ""
            if any(type(module).__module__ == "torchvision.transforms.transforms" for module in model.modules()):
                advice = "; use torchvision.transforms.v2, which can be traced"
            raise FnetError(f"cannot trace {name} for an input of {size_text(shape)}: {reason}{advice}") from None


@contextmanager
def _silence() -> Iterator[None]:
    """Suppresses warnings, logs and standard error: a failure is reported once, in one line."""
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
    """Evaluation mode; restores the mode of each module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
