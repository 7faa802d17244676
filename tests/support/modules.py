"""Modules that are imported, and whether what they became computes the same."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fnet_search.arch.costs import network_cost
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.importing.translation import from_module
from fnet_search.quant.fold import fold
from fnet_search.training.network import pretrained


@torch.no_grad()
def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """In training mode, as a user leaves it, with norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.train()


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def check(model: nn.Module, x: Tensor) -> Macroarchitecture:
    """Outputs, those after folding, and MACs are those of the module."""
    space = from_module(lively(model), x[:1], "net")
    assert model.training
    wanted = model.eval()(x)
    network = pretrained(space).eval()
    largest = float(wanted.abs().max())
    assert float((network(x) - wanted).abs().max()) <= 1e-6 * largest
    assert float((fold(network)(x) - wanted).abs().max()) <= 1e-5 * largest
    with FlopCounterMode(display=False) as counted:
        model(x[:1])
    assert network_cost(space).total_macs == counted.get_total_flops() / 2
    return space
