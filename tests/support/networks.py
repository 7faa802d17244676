"""Small networks, weights and images for the tests of what is computed with them."""

import shutil
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from fnet_search.arch.layers import (
    Activation,
    Add,
    Affine,
    BatchNorm,
    Concat,
    Conv,
    Dense,
    Flatten,
    Function,
    Layer,
    Multiply,
    Pad,
    Pool,
    Resample,
    Reshape,
    Shuffle,
    Slice,
)
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.training.datasets import Batches, DataSet, Split, hold_out, load_dataset
from fnet_search.training.network import Network
from fnet_search.training.numerics import Numerics

torch.set_num_threads(1)  # as the workers do: a training is bitwise reproducible with one

CPU = Numerics("cpu")
FAST = Numerics("cpu", "bfloat16", channels_last=True, fused=True, group_widths=(16, 16, 16, 16, 16))
"""Everything that a training can be sped up by."""

compiled = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="fused norms are compiled by a C++ compiler"
)
"""Of tests that need one."""


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
        Node("stem.bn", BatchNorm(), ("stem",)),
        Node("stem.act", Activation("relu"), ("stem.bn",)),
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

GATED = Macroarchitecture(
    "gated",
    (3, 11, 9),
    (
        Node("stem", Conv(12, (3, 3), padding=(1, 1)), (INPUT,)),
        Node("stem.act", Activation("hardswish"), ("stem",)),
        Node("left", Slice(0, 6), ("stem.act",)),
        Node("right", Slice(6, 12), ("stem.act",)),
        Node("deep", Conv(6, (3, 3), padding=(1, 1), groups=6), ("right",)),
        Node("deep.norm", BatchNorm(), ("deep",)),
        Node("joined", Concat(), ("left", "deep.norm")),
        Node("shuffled", Shuffle(3), ("joined",)),
        Node("squeeze", Pool("global_average"), ("shuffled",)),
        Node("vector", Flatten(), ("squeeze",)),
        Node("reduce", Dense(4), ("vector",)),
        Node("reduce.act", Activation(), ("reduce",)),
        Node("expand", Dense(12), ("reduce.act",)),
        Node("gate", Activation("sigmoid"), ("expand",)),
        Node("gates", Reshape((12, 1, 1)), ("gate",)),
        Node("scaled", Multiply(), ("shuffled", "gates")),
        Node("product", Multiply(), ("scaled", "stem.act")),
        Node("most", Pool("max", ceil=True), ("product",)),
        Node("padded", Pool("average", (3, 3), (2, 2), (1, 1), count_padding=True), ("most",)),
        Node("rest", Pool("average", ceil=True), ("padded",)),
        Node("larger", Resample((0, 0, 1), (1, 0, 0, 1)), ("rest",)),
        Node("larger.act", Activation(), ("larger",)),
        Node("flat", Flatten(), ("larger.act",)),
        Node("out", Dense(5), ("flat",)),
    ),
)
"""Layers that only move values, products of equal and of unequal shapes, pools that count their padding, or windows
that reach over the edge."""

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "leaky_relu": {"alpha": 0.2},
    "elu": {"alpha": 0.7},
    "celu": {"alpha": 0.6},
    "clip": {"low": -0.75, "high": 0.5},
}
ACTIVATIONS: Mapping[str, Activation] = {
    **{function: Activation(function, **OPTIONS.get(function, {})) for function in get_args(Function)},
    "slopes": Activation("prelu", per_channel=True),
    "fixed_slopes": Activation("leaky_relu", (0.25, -1, 0, 2, 0.5, 0.125)),
    "at_least": Activation("clip", low=-0.5, high=float("inf")),
}
"""Every function, with all that it can be given."""

BENT = Macroarchitecture(
    "bent",
    (3, 9, 8),
    (
        Node("image.pad", Pad((0, 1, 0), (0, 0, 2)), (INPUT,)),
        Node("stem", Conv(6, (3, 3), (2, 1)), ("image.pad",)),
        Node("stem.norm", BatchNorm(), ("stem",)),
        *(Node(name, layer, ("stem.norm",)) for name, layer in ACTIVATIONS.items()),
        Node("joined", Concat(), tuple(ACTIVATIONS)),
        Node("narrow", Conv(6, (1, 1)), ("joined",)),
        Node("zeros", Pad((0, 0, 1), (1, 0, 0)), ("narrow",)),
        Node("zeros.act", Activation(), ("zeros",)),
        Node("most", Pool("max", (2, 2), (1, 1)), ("zeros.act",)),
        Node("larger", Resample((0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2), (0, 0, 0, 0, 1, 1, 1, 1)), ("most",)),
        Node("between", Pool("average", (4, 4), (2, 2)), ("larger",)),
        Node("gap", Pool("global_average"), ("between",)),
        Node("flat", Flatten(), ("gap",)),
        Node("dense", Dense(7), ("flat",)),
        Node("dense.act", Activation("prelu", per_channel=True), ("dense",)),
        Node("out", Dense(5), ("dense.act",)),
    ),
)
"""Functions of every kind, with learned and fixed slopes, on feature maps and vectors; zeros around the image, before a
max pool, and as channels; the bilinear resize by two."""

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

RESIDUAL = Macroarchitecture(
    "residual",
    (3, 10, 10),
    (
        Node("stem", Conv(12, (3, 3), padding=(1, 1)), (INPUT,)),
        Node("stem.norm", BatchNorm(), ("stem",)),
        Node("stem.act", Activation(), ("stem.norm",)),
        Node("one", Conv(12, (3, 3), padding=(1, 1), groups=4), ("stem.act",)),
        Node("one.norm", BatchNorm(), ("one",)),
        Node("one.act", Activation(), ("one.norm",)),
        Node("add", Add(), ("one.norm", "stem.act")),
        Node("two", Conv(24, (3, 3), (2, 2), (1, 1), groups=12), ("add",)),
        Node("two.norm", BatchNorm(), ("two",)),
        Node("two.left", Activation(), ("two.norm",)),
        Node("two.right", Activation(), ("two.norm",)),
        Node("side", Conv(24, (1, 1), (2, 2), bias=True, groups=2), ("one.act",)),
        Node("side.norm", BatchNorm(), ("side",)),
        Node("side.act", Activation("relu6"), ("side.norm",)),
        Node("joined", Concat(), ("two.left", "two.right", "side.act")),
        Node("last.norm", BatchNorm(), ("joined",)),
        Node("last.act", Activation(), ("last.norm",)),
        Node("gap", Pool("global_average"), ("last.act",)),
        Node("flat", Flatten(), ("gap",)),
        Node("dense", Dense(12), ("flat",)),
        Node("dense.norm", BatchNorm(), ("dense",)),
        Node("dense.act", Activation(), ("dense.norm",)),
        Node("out", Dense(5), ("dense.act",)),
    ),
)
"""Norms before a ReLU: alone, of vectors, and where another layer reads them too; grouped convolutions."""


STEPS = tuple(0.5 + 0.25 * channel for channel in range(8))

SCALED = Macroarchitecture(
    "scaled",
    (3, 10, 9),
    (
        Node("centred", Affine(shift=(-0.4, -0.5, -0.6)), (INPUT,)),
        Node("normed", Affine(scale=(4.0, 5.0, 2.5)), ("centred",)),
        Node("stem", Conv(8, padding=(1, 1)), ("normed",)),
        Node("stem.norm", BatchNorm(affine=False), ("stem",)),
        Node("stem.scale", Affine(STEPS, trained=True), ("stem.norm",)),
        Node("stem.act", Activation(), ("stem.scale",)),
        Node("lifted", Affine((-2.0,), STEPS), ("stem.act",)),
        Node("body", Conv(8, padding=(1, 1), factorize=True), ("lifted",)),
        Node("body_norm", BatchNorm(affine=False), ("body",)),
        Node("body_scale", Affine(shift=(0.5,), trained=True), ("body_norm",)),
        Node("sum", Add(), ("body_scale", "lifted")),
        Node("sum.scale", Affine((0.75,)), ("sum",)),
        Node("gap", Pool("global_average"), ("sum.scale",)),
        Node("flat", Flatten(), ("gap",)),
        Node("flat.scale", Affine(STEPS, STEPS), ("flat",)),
        Node("out", Dense(5), ("flat.scale",)),
        Node("out.scale", Affine((3.0,)), ("out",)),
    ),
)
"""Affine layers before a padded convolution, after norms without weights, a ReLU, a sum and on vectors; constants and
trained ones."""


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
