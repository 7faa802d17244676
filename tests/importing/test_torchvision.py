"""Networks of torchvision compute what they do there, in float32 and in codes."""

import pytest
import torch
from torch import nn
from torchvision import models

from fnet_search.arch.costs import network_cost
from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Conv
from fnet_search.arch.macroarchitecture import INPUT
from fnet_search.arch.plan import legal_rates, make_plan
from fnet_search.base.errors import FnetError
from fnet_search.deploy.audit import audit
from fnet_search.deploy.export import float_model, quantized_model
from fnet_search.deploy.runtime import Runtime
from fnet_search.importing.named_modules import load_imported
from fnet_search.importing.translation import from_module
from fnet_search.policy.evaluation import Audit
from fnet_search.quant.calibration import quantize_trained
from fnet_search.quant.fold import fold
from fnet_search.quant.scheme import parse_scheme
from fnet_search.training.network import pretrained
from tests.support.modules import check, images, lively
from tests.support.networks import noise

QUICK = ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0", "squeezenet1_1")
SLOW = ("resnet50", "vgg11_bn", "mobilenet_v2", "densenet121", "googlenet", "regnet_y_400mf", "efficientnet_b0")
NETWORKS = (*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW))


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    slow = {"init_weights": False} if name == "googlenet" else {}
    model: nn.Module = models.get_model_builder(name)(weights=None, **slow)
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_torchvision(name: str) -> None:
    space = check(built(name), images(2, 3, 64, 64))
    assert space.classes == 1000
    chosen = [node.layer for node in space.nodes if isinstance(node.layer, Conv) and node.layer.factorize]
    assert all(layer.kernel != (1, 1) and layer.groups == 1 for layer in chosen)
    convs = [node for node in space.order if isinstance(node.layer, Conv)]
    assert convs[0].inputs == (INPUT,)
    assert convs[0].name not in legal_rates(space)
    spatial = [one.layer for one in convs[1:] if isinstance(one.layer, Conv) and one.layer.kernel != (1, 1)]
    assert len(chosen) == sum(one.groups == 1 for one in spatial)


AUDITED = (
    *("mobilenet_v3_small", "squeezenet1_1"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "shufflenet_v2_x0_5")),
)
"""Of each kind one; `benchmarks/imports.py` has all."""


@pytest.mark.parametrize("name", AUDITED)
def test_codes_are_those_of_the_runtime(name: str) -> None:
    space = from_module(lively(built(name)), images(1, 3, 32 if name == "resnet18" else 64, 64), name)
    data = noise(space, 4)
    quantized = quantize_trained(pretrained(space).eval(), parse_scheme("percentile:1"), data, 0).network
    x = data.normalise(data.train.images)
    (found,) = audit(quantized, Runtime(quantized_model(quantized)), [x])
    assert found == Audit(4, 4 * 1000)
    floating = fold(pretrained(space).eval())
    wanted = floating(x)
    assert float((Runtime(float_model(floating))(x) - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_layers_have_the_names_of_their_modules() -> None:
    space = from_module(built("resnet18"), images(1, 3, 64, 64))
    names = [node.name for node in space.nodes]
    assert names[:6] == ["conv1", "bn1", "relu", "maxpool", "layer1.0.conv1", "layer1.0.bn1"]
    assert names[6:11] == ["layer1.0.relu", "layer1.0.conv2", "layer1.0.bn2", "layer1.0.add", "layer1.0.relu_2"]
    assert names[-3:] == ["avgpool", "flatten", "fc"]
    assert space.name == "resnet"


def test_an_example_of_the_wrong_shape() -> None:
    with pytest.raises(FnetError, match=r"must be \[N, C, H, W\], got shape \[3, 8, 8\]"):
        from_module(built("resnet18"), images(3, 8, 8))


def test_a_factorized_import_is_a_network() -> None:
    space = from_module(built("squeezenet1_1"), images(1, 3, 64, 64), "s")
    layers = legal_rates(space)
    plan = make_plan(space, {layer: rates[-1] for layer, rates in layers.items()})
    network = factorize(space, plan)
    assert network.weights is None
    assert network_cost(network).conv_macs < network_cost(space).conv_macs
    assert len(network.nodes) == len(space.nodes) + 3 * len(layers)


def test_names_of_torchvision_load_as_spaces() -> None:
    space = load_imported("torchvision:squeezenet1_1", (3, 64, 64), None, lambda channels: (channels, 1, 1))
    assert (space.name, space.input_shape, space.weights) == ("squeezenet1_1", (3, 64, 64), None)
