"""Claim: what is imported computes what the module does, with the MACs that torch counts, and its exported integers are
ONNX Runtime's.

    python benchmarks/imports.py [--size 224] [NAME ...]

torchvision's networks with random weights, and BatchNorm statistics of random images. Largest difference of the logits
of two images, also relative to the largest logit; codes of all layers, of four images, that differ from the runtime's.
"""

import argparse
import warnings
from time import perf_counter

import torch
from machine import machine
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from fnet_search.arch.costs import network_cost
from fnet_search.arch.plan import legal_rates
from fnet_search.deploy.audit import LayerAudit, audit_layers
from fnet_search.deploy.export import coded, codes_name, quantized_model
from fnet_search.deploy.runtime import Runtime, with_outputs
from fnet_search.importing.translation import from_module
from fnet_search.quant.fold import fold
from fnet_search.quant.quantize import quantize
from fnet_search.quant.ranges import calibrate
from fnet_search.quant.scheme import Scheme
from fnet_search.training.network import pretrained

NAMES = (
    *("resnet18", "resnet50", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "googlenet"),
    *("regnet_y_400mf", "efficientnet_b0", "shufflenet_v2_x1_0", "squeezenet1_1"),
)


@torch.no_grad()
def settled(name: str, size: int) -> nn.Module:
    """In evaluation mode, with running statistics of random images."""
    torch.manual_seed(0)
    slow = {"init_weights": False} if name == "googlenet" else {}
    model: nn.Module = models.get_model_builder(name)(weights=None, **slow)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    for _ in range(2):
        model.train()(torch.randn(8, 3, size, size))
    return model.eval()


@torch.no_grad()
def row(name: str, size: int) -> str:
    model, x = settled(name, size), torch.randn(4, 3, size, size)
    start = perf_counter()
    space = from_module(model, x, name)
    seconds = perf_counter() - start
    wanted, network = model(x[:2]), pretrained(space).eval()
    difference = float((network(x[:2]) - wanted).abs().max())
    with FlopCounterMode(display=False) as counted:
        model(x[:1])
    folded = fold(network)
    samples = torch.randn(16, 3, size, size)
    quantized = quantize(folded, calibrate(folded, lambda: iter([samples]), Scheme().ranges))
    exported = with_outputs(quantized_model(quantized), [codes_name(node) for node in coded(quantized)])
    ((_, layers),) = audit_layers(quantized, Runtime(exported), [x])
    codes = sum(layers, LayerAudit("", 0, 0, 0))
    return (
        f"{name:20}{len(space.nodes):6}{len(legal_rates(space)):14}{network_cost(space).total_macs:16,}"
        f"{counted.get_total_flops() // 2:16,}{difference:12.1e}{difference / float(wanted.abs().max()):10.1e}"
        f"{codes.differing:10,}{codes.codes:14,}{seconds:9.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.export.export(nn.ReLU(), (torch.zeros(1),))  # what it imports at its first use is not the network's
    print(f"{machine()}; {options.size} pixels a side")
    print(
        f"{'network':20}{'nodes':>6}{'factorizable':>14}{'MACs, ours':>16}{'MACs, torch':>16}{'difference':>12}"
        f"{'relative':>10}{'differing':>10}{'of codes':>14}{'import s':>9}"
    )
    for name in options.names:
        print(row(name, options.size), flush=True)


if __name__ == "__main__":
    main()
