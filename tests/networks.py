"""Small networks, weights and images for the tests of what is computed with them."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fnet_search.data import DataSet, Split, hold_out, load_dataset
from fnet_search.macro import (
    INPUT,
    Activation,
    Add,
    BatchNorm,
    Concat,
    Conv,
    Dense,
    Flatten,
    Layer,
    Macroarchitecture,
    Node,
    Pool,
)
from fnet_search.network import Network
from fnet_search.numerics import Numerics
from fnet_search.ranges import Batches

torch.set_num_threads(1)  # as the workers do: a training is bitwise reproducible with one

CPU = Numerics("cpu", "float32", False, 1)


def sequence(input_shape: tuple[int, int, int], **layers: Layer) -> Macroarchitecture:
    """A chain of layers."""
    sources = (INPUT, *layers)
    nodes = tuple(Node(name, layer, (source,)) for (name, layer), source in zip(layers.items(), sources, strict=False))
    return Macroarchitecture("sequence", input_shape, nodes)


MIXED = Macroarchitecture(
    "mixed",
    (3, 12, 10),
    (
        Node("stem", Conv(8, (3, 3), padding=(1, 1)), (INPUT,)),
        Node("stem.norm", BatchNorm(), ("stem",)),
        Node("stem.act", Activation("relu"), ("stem.norm",)),
        Node("grouped", Conv(8, (3, 3), padding=(2, 2), dilation=(2, 2), groups=4, bias=True), ("stem.act",)),
        Node("sum", Add(), ("grouped", "stem.act")),
        Node("sum.act", Activation("relu6"), ("sum",)),
        Node("two", Conv(6, (1, 1)), ("sum.act",)),
        Node("two.norm", BatchNorm(), ("two",)),
        Node("two.swish", Activation("hardswish"), ("two",)),
        Node("joined", Concat(), ("two.norm", "two.swish", "sum.act")),
        Node("average", Pool("average", (3, 3), (2, 2), (1, 1)), ("joined",)),
        Node("average.norm", BatchNorm(), ("average",)),
        Node("average.act", Activation("relu"), ("average.norm",)),
        Node("most", Pool("max", (3, 2), (1, 1), (1, 1)), ("average.act",)),
        Node("deep", Conv(40, (3, 3), (2, 1), (1, 0), groups=20), ("most",)),
        Node("deep.act", Activation("silu"), ("deep",)),
        Node("gap", Pool("global_average"), ("deep.act",)),
        Node("flat", Flatten(), ("gap",)),
        Node("dense", Dense(12), ("flat",)),
        Node("dense.norm", BatchNorm(), ("dense",)),
        Node("dense.act", Activation("relu"), ("dense.norm",)),
        Node("last.norm", BatchNorm(), ("dense.act",)),
        Node("out", Dense(5, bias=False), ("last.norm",)),
    ),
)
"""Every kind of layer; a norm with no layer of its own before it after a pool, after a ReLU, after a layer that has
another reader."""

REUSED = Macroarchitecture(
    "reused",
    (3, 8, 8),
    (
        Node("c", Conv(4, (1, 1), bias=True), (INPUT,)),
        Node("p", Pool(), ("c",)),
        Node("r", Activation(), ("p",)),
        Node("again", Activation(), ("r",)),
        Node("both", Concat(), ("again", "p")),
        Node("both.act", Activation("relu6"), ("both",)),
        Node("seen", Add(), ("both.act", "both.act")),
        Node("wide", Activation(), ("seen",)),
        Node("other", Activation("sigmoid"), ("seen",)),
        Node("end", Add(), ("wide", "other")),
        Node("pool", Pool("average"), ("end",)),
        Node("pool.act", Activation(), ("pool",)),
        Node("flat", Flatten(), ("pool.act",)),
    ),
)
"""ReLUs where they cannot be part of the layer before: after max pooling, after a ReLU, beside another reader."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batches_of(*tensors: Tensor) -> Batches:
    def batches() -> Iterator[Tensor]:
        return iter(tensors)

    return batches


@torch.no_grad()
def randomized(space: Macroarchitecture, seed: int = 0) -> Network:
    """In evaluation mode, with random weights, biases and norms."""
    network = Network(space).eval()
    generator = torch.Generator().manual_seed(seed)
    for layer in network.layers.values():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
            if parameter.ndim > 1:
                parameter.div_(parameter[0].numel() ** 0.5)
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.05, 3, generator=generator)
    return network


def noise(space: Macroarchitecture, images: int, seed: int = 0) -> DataSet:
    """Random images for a space, each of random colours, the same in every split."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 192, (images, space.input_shape[0], 1, 1), generator=generator)
    pixels = colours + torch.randint(0, 64, (images, *space.input_shape), generator=generator)
    split = Split(pixels.to(torch.uint8), torch.arange(images) % space.classes)
    channels = space.input_shape[0]
    classes = tuple(map(str, range(space.classes)))
    return DataSet("noise", classes, split, split, split, (0.5,) * channels, (0.3,) * channels, True)


def digits(images: int) -> DataSet:
    """The digits with validation held out, `images` of them to train on."""
    data = hold_out(load_dataset("digits", (3, 32, 32)))
    return DataSet(
        data.name,
        data.classes,
        data.train.take(torch.arange(images)),
        data.evaluation,
        data.test,
        data.mean,
        data.std,
        data.flips,
    )
