from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn
from torchvision import transforms
from torchvision.ops import FrozenBatchNorm2d

from fnet_search.arch.costs import network_cost
from fnet_search.arch.layers import Affine, BatchNorm, Pool, Resample, Reshape, Shuffle, Slice
from fnet_search.arch.plan import legal_rates
from fnet_search.base.errors import FnetError
from fnet_search.deploy.audit import audit
from fnet_search.deploy.export import quantized_model
from fnet_search.deploy.runtime import Runtime
from fnet_search.importing.translation import from_module
from fnet_search.policy.evaluation import Audit
from fnet_search.quant.calibration import quantize_trained
from fnet_search.quant.scheme import parse_scheme
from fnet_search.training.network import pretrained
from tests.support.modules import check, images
from tests.support.networks import noise


class Of(nn.Module):
    """A stem, what is to be tried on its 8 channels, and a head, to which it matters where in the image values are."""

    def __init__(self, middle: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.parts = nn.ModuleDict(parts)
        self.tail = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        y: Any = self.middle(self.stem(x)) if not self.parts else self.middle(self.stem(x), self.parts)
        if y.ndim == 4:
            y = F.relu(self.tail(y)).mean((2, 3))
        return self.head(y)  # type: ignore[no-any-return] (middle may be anything)


class Together(nn.Module):
    """Several in one: most of what a trace takes is the same for few operations and for many."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return sum((part(x) for part in self.parts[1:]), self.parts[0](x))


def excited(x: Tensor, parts: Any) -> Tensor:
    """Squeeze and excitation as many write it, with dense layers."""
    n, c = x.shape[:2]
    gates = torch.sigmoid(parts["up"](F.relu(parts["down"](F.adaptive_avg_pool2d(x, 1).view(n, c)))))
    return x * gates.view(n, c, 1, 1).expand_as(x)


def shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def in_place(x: Tensor) -> Tensor:
    """What is read after a ReLU in place is its output."""
    y = F.relu(x, inplace=True)
    return x + y.clone()


def sloped(channels: int) -> nn.Module:
    slopes = nn.PReLU(channels)
    slopes.weight.data.uniform_(-0.5, 1.5, generator=torch.Generator().manual_seed(0))
    return slopes


MIDDLES: dict[str, tuple[Callable[..., Tensor], dict[str, nn.Module]]] = {
    "relu": (F.relu, {}),
    "relu in place": (in_place, {}),
    "relu6": (F.relu6, {}),
    "clamp": (lambda x: x.clamp(0, 6), {}),
    "clamp at 0": (lambda x: x.clamp(min=0), {}),
    "clamp to a range": (lambda x: x.clamp(-0.25, 0.5), {}),
    "clamp from above": (lambda x: torch.clamp_max(x, 0.4), {}),
    "clip": (lambda x: torch.clip(x, -0.25), {}),
    "hardtanh from 0": (lambda x, parts: parts["a"](x), {"a": nn.Hardtanh(0, float("inf"), inplace=True)}),
    "in place": (lambda x, parts: parts["b"](parts["a"](x)), {"a": nn.ELU(inplace=True), "b": nn.LeakyReLU(0.3, True)}),
    "hardtanh": (lambda x: F.hardtanh(x, -0.5, 0.25), {}),
    "leaky relu": (lambda x: F.leaky_relu(x, 0.2), {}),
    "prelu": (lambda x, parts: parts["a"](x), {"a": nn.PReLU(init=0.1)}),
    "prelu, a slope a channel": (lambda x, parts: parts["a"](x), {"a": sloped(8)}),
    "prelu, constant": (lambda x: F.prelu(x, torch.tensor([0.3])), {}),
    "prelu, constants a channel": (lambda x: F.prelu(x, torch.linspace(-0.5, 1.5, 8)), {}),
    "prelu of a vector": (lambda x, parts: parts["a"](x.mean((2, 3))), {"a": sloped(8)}),
    "elu": (lambda x: F.elu(x, 0.7), {}),
    "selu": (F.selu, {}),
    "celu": (lambda x: F.celu(x, 0.6), {}),
    "gelu": (F.gelu, {}),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), {}),
    "tanh": (torch.tanh, {}),
    "softplus": (F.softplus, {}),
    "mish": (F.mish, {}),
    "log sigmoid": (F.logsigmoid, {}),
    "abs": (torch.abs, {}),
    "hardswish": (F.hardswish, {}),
    "hardsigmoid": (F.hardsigmoid, {}),
    "sigmoid": (torch.sigmoid, {}),
    "silu": (F.silu, {}),
    "max pool": (lambda x: F.max_pool2d(x, (3, 2), (2, 1), (1, 0)), {}),
    "max pool, ceil": (lambda x: F.max_pool2d(x, 2, ceil_mode=True), {}),
    "average pool": (lambda x: F.avg_pool2d(x, 3, 2, 1), {}),
    "average pool, inside": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), {}),
    "average pool, ceil": (lambda x: F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False), {}),
    "adaptive, one": (lambda x: F.adaptive_avg_pool2d(x, 1), {}),
    "adaptive, as it is": (lambda x: F.adaptive_avg_pool2d(x, (13, 11)), {}),
    "adaptive, one side": (lambda x: F.adaptive_avg_pool2d(x, (None, 1)), {}),
    "adaptive, uneven": (lambda x: F.adaptive_avg_pool2d(x, (5, 3)), {}),
    "adaptive, larger": (lambda x: F.adaptive_avg_pool2d(x, (20, 22)), {}),
    "adaptive, maximum": (lambda x: F.adaptive_max_pool2d(x, (5, 4)), {}),
    "adaptive, maximum of all": (lambda x: F.adaptive_max_pool2d(x, 1), {}),
    "mean, kept": (lambda x: x.mean((-1, -2), keepdim=True), {}),
    "mean of a side": (lambda x: x.mean(3, keepdim=True), {}),
    "mean in two steps": (lambda x: x.mean(3).mean(2), {}),
    "mean in two steps, from below": (lambda x: x.mean(-2, keepdim=True).mean(-1, keepdim=True), {}),
    "mean of a padded mean": (
        lambda x: F.avg_pool2d(x, (13, 11), None, (6, 5), count_include_pad=False).mean((2, 3)),
        {},
    ),
    "mean of a flattened map": (lambda x: x.flatten(2).mean(-1), {}),
    "maximum": (lambda x: x.amax((2, 3)), {}),
    "maximum in two steps": (lambda x: x.amax(3).amax(2), {}),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), {}),
    "nearest, fractional": (lambda x: F.interpolate(x, scale_factor=(1.7, 2.3)), {}),
    "nearest, recomputed": (lambda x: F.interpolate(x, scale_factor=1.7, recompute_scale_factor=True), {}),
    "nearest, size": (lambda x: F.interpolate(x, (29, 82)), {}),
    "nearest, exact": (lambda x: F.interpolate(x, scale_factor=0.7, mode="nearest-exact"), {}),
    "bilinear": (lambda x, parts: parts["u"](x), {"u": nn.Upsample(scale_factor=2, mode="bilinear")}),
    "bilinear, size": (lambda x: F.interpolate(x, (39, 44), mode="bilinear"), {}),
    "bilinear, smaller": (lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear"), {}),
    "bilinear, larger and smaller": (lambda x: F.interpolate(x, scale_factor=(2, 0.25), mode="bilinear"), {}),
    "bilinear, corners": (lambda x: F.interpolate(x, (25, 21), mode="bilinear", align_corners=True), {}),
    "bilinear of one pixel": (lambda x: F.interpolate(x.mean((2, 3), True), (3, 4), mode="bilinear"), {}),
    "area": (lambda x: F.interpolate(x, (5, 7), mode="area"), {}),
    "zeros, as a convolution's": (lambda x, parts: parts["c"](F.pad(x, (2, 2, 1, 1))), {"c": nn.Conv2d(8, 8, 3, 2)}),
    "zeros on two sides": (lambda x, parts: parts["c"](F.pad(x, (0, 1, 0, 1))), {"c": nn.Conv2d(8, 8, 3, 2)}),
    "zeros before a max pool": (lambda x: F.max_pool2d(F.pad(F.logsigmoid(x), (1, 1, 1, 1)), 3, 2), {}),
    "zeros before an average pool": (lambda x: F.avg_pool2d(F.pad(x, (1, 2, 0, 1)), 3, 2), {}),
    "zero channels": (lambda x: F.avg_pool2d(F.pad(x[:, :6, ::2, ::2], (0, 0, 0, 0, 1, 1)), 2), {}),
    "padding same, even": (lambda x, parts: parts["c"](x), {"c": nn.Conv2d(8, 8, (4, 2), padding="same")}),
    "reflected": (lambda x, parts: parts["c"](x), {"c": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")}),
    "replicated": (lambda x: F.pad(x, (1, 2, 0, 3), "replicate"), {}),
    "circular": (lambda x: F.pad(x, (1, 2, 0, 3), "circular"), {}),
    "every other pixel": (lambda x: x[:, :, ::2, 1::3], {}),
    "from the end": (lambda x: torch.cat([x[:, -5:-1, -7:, 2:-1]] * 2, 1), {}),
    "flip": (lambda x: x.flip(2, -1), {}),
    "turned": (lambda x: torch.rot90(x, 2, (2, 3)), {}),
    "roll": (lambda x: x.roll((2, -1), (2, 3)), {}),
    "tile": (lambda x: x.tile(2), {}),
    "repeat": (lambda x: x.repeat(1, 1, 2, 1), {}),
    "repeat pixels": (lambda x: x.repeat_interleave(3, 3), {}),
    "pixels to channels and back": (lambda x: F.pixel_shuffle(F.pixel_unshuffle(x[:, :, 1:, 1:], 2), 2), {}),
    "unbind": (lambda x: x.unbind(3)[1].mean(2), {}),
    "add": (lambda x: x + F.relu(x), {}),
    "multiply": (lambda x: x * torch.sigmoid(x), {}),
    "gate": (lambda x: x.mean((2, 3), keepdim=True) * x, {}),
    "excitation": (excited, {"down": nn.Linear(8, 2), "up": nn.Linear(2, 8)}),
    "concat and split": (lambda x: torch.cat([x.chunk(2, 1)[1], x[:, :4]], 1), {}),
    "split of sizes": (lambda x: torch.cat(x.split([3, 4, 1], 1)[::-1], 1), {}),
    "shuffle": (shuffled, {}),
    "shuffle module": (lambda x, parts: parts["s"](x), {"s": nn.ChannelShuffle(4)}),
    "half of a shuffle": (lambda x: torch.cat(shuffled(x).chunk(2, 1), 1), {}),
    "part of a vector": (lambda x: torch.cat([x.mean((2, 3))[:, 4:], x.mean((2, 3))[:, :4]], 1), {}),
    "shuffle of a vector": (lambda x: x.mean((2, 3)).view(-1, 2, 4).transpose(1, 2).flatten(1), {}),
    "to float32": (lambda x: x.to(torch.float32).float(), {}),
    "sum": (lambda x: sum([x, F.relu(x)]) * 1, {}),
    "dropout": (lambda x, parts: parts["d"](x), {"d": nn.Dropout2d()}),
    "norm": (lambda x, parts: parts["n"](x), {"n": nn.BatchNorm2d(8, eps=0.01)}),
    "norm without weights": (lambda x, parts: parts["n"](x), {"n": nn.BatchNorm2d(8, affine=False)}),
    "dilated": (lambda x, parts: parts["c"](x), {"c": nn.Conv2d(8, 8, 3, 2, 2, 2, 4)}),
    "padding same": (lambda x, parts: parts["c"](x), {"c": nn.Conv2d(8, 8, (3, 5), padding="same")}),
    "with indices": (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], {}),
    "twice an activation": (lambda x, parts: parts["a"](-parts["a"](x)), {"a": nn.Hardswish()}),
    "unused": (lambda x: (F.relu(x), x)[1], {}),
}
MIDDLES_AT_ONCE = 8


@pytest.mark.parametrize("start", range(0, len(MIDDLES), MIDDLES_AT_ONCE))
def test_operations(start: int) -> None:
    torch.manual_seed(1)
    check(
        Together(*(Of(middle, **parts) for middle, parts in islice(MIDDLES.values(), start, start + MIDDLES_AT_ONCE))),
        images(3, 3, 13, 11),
    )


def test_weights_that_are_computed_are_weights() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    model = nn.Sequential(Standardized(3, 4, 3), normed, nn.Flatten(), nn.Linear(6 * 11 * 9, 2))
    space = check(model, images(2, 3, 13, 11))
    assert [node.layer.kind for node in space.nodes] == ["conv", "conv", "flatten", "dense"]


class Constant(nn.Module):
    """Normalises its image, and has constants and parameters of every kind between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1), persistent=False)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.scale = torch.linspace(0.5, 2, 8).view(8, 1, 1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8, affine=False)
        self.gamma = nn.Parameter(torch.linspace(0.1, 1, 8).view(8, 1, 1))
        self.alpha = nn.Parameter(torch.tensor(0.7))
        self.kernel = nn.Parameter(torch.linspace(-4, -1, 64).view(8, 8, 1, 1))
        self.frozen = FrozenBatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem((x - self.mean) / self.std) * self.scale)
        x = torch.add(self.scale, self.body(1 - x), alpha=-2)  # padded with zeros: not with what 1 - x would be
        x = x + self.alpha * F.relu(self.norm(x) * self.gamma + torch.arange(8).view(8, 1, 1))
        x = torch.rsub(F.relu6(self.frozen(x)), torch.ones_like(x), alpha=2) * x.new_tensor(0.5)
        x = F.conv2d(x, self.kernel.exp(), -self.scale.flatten())
        return -self.head(x.mean((2, 3))) * torch.full((), 3) + torch.tensor([1, 2, 3, 4, 5])


def test_constants_are_constants() -> None:
    """The numbers in the layers, the parameters of the module trained and counted, code for code in the runtime."""
    torch.manual_seed(1)
    model = Constant()
    space = check(model, images(3, 3, 13, 11))
    found = pretrained(space)
    counted = sum(one.numel() for one in model.parameters())
    assert counted == sum(one.numel() for one in found.parameters()) == network_cost(space).params
    assert list(legal_rates(space)) == ["body"], "the stem reads the image, however it is normalised"
    layers = {node.name: node.layer for node in space.nodes}
    assert layers["subtract"] == Affine(shift=tuple((-model.mean.double()).flatten().tolist()))
    assert layers["divide"] == Affine(tuple((1 / model.std.double()).flatten().tolist()))
    assert layers["multiply"] == Affine(tuple(model.scale.flatten().tolist()))
    assert layers["norm"] == BatchNorm(1e-5, affine=False)
    assert layers["multiply_3"] == Affine((1.0,), trained=True)
    data = noise(space, 40)
    x = data.normalise(data.train.images)
    quantized = quantize_trained(found.eval(), parse_scheme("percentile:1"), data, 0).network
    (differing,) = audit(quantized, Runtime(quantized_model(quantized)), [x])
    assert differing == Audit(40, 40 * 5)


def test_the_numbers_of_a_parameter_are_weights() -> None:
    """Not of the space, which is the same whatever they are."""
    model = Of(lambda x, parts: parts["s"](x), s=Scale())
    space = from_module(model, images(1, 3, 13, 11))
    assert space.by_name["parts.s"].layer == Affine((1.0,) * 8, trained=True)
    assert space.weights is not None
    assert torch.equal(space.weights["layers.parts/s.scale"], torch.full((8,), 0.1))


def test_an_image_that_is_changed_in_place() -> None:
    check(nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3 * 4 * 4, 2)), images(2, 3, 4, 4))


def test_a_head_of_dense_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
    )
    space = check(model, images(2, 3, 8, 8))
    assert [node.name for node in space.nodes] == ["0", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("what", "layers"),
    [
        ("shuffle", [Shuffle(2)]),
        ("concat and split", [Slice(4, 8), Slice(0, 4)]),
        ("half of a shuffle", [Shuffle(2), Slice(0, 4), Slice(4, 8)]),
        ("every other pixel", [Resample((0, 2, 4, 6, 8, 10, 12), (1, 4, 7, 10))]),
        ("excitation", [Reshape((8, 1, 1)), Resample((0,) * 13, (0,) * 11)]),
        ("adaptive, as it is", []),
    ],
)
def test_moves_come_to_few_layers(what: str, layers: list[object]) -> None:
    middle, parts = MIDDLES[what]
    space = from_module(Of(middle, **parts), images(1, 3, 13, 11))
    moving = [node.layer for node in space.nodes if isinstance(node.layer, Slice | Shuffle | Resample | Reshape)]
    assert moving == layers


def test_an_adaptive_pool_of_equal_windows_is_one_layer() -> None:
    space = from_module(Of(lambda x: F.adaptive_avg_pool2d(x, (4, 3))), images(1, 3, 12, 9))
    assert Pool("average", (3, 3)) in [node.layer for node in space.nodes]
    assert not any(isinstance(node.layer, Resample) for node in space.nodes)


class Gives(nn.Module):
    """Whatever a function makes of its logits."""

    def __init__(self, last: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.head, self.last = nn.Linear(3, 5), last

    def forward(self, x: Tensor) -> Any:
        return self.last(self.head(x.mean((2, 3))))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Tied(nn.Sequential):
    """Two convolutions, one kernel."""

    def __init__(self) -> None:
        first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        first.weight = second.weight
        super().__init__(first, second, nn.Flatten(), nn.Linear(3 * 13 * 11, 2))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "layer norm": (
        Of(lambda x, parts: parts["n"](x), n=nn.LayerNorm(11)),
        r"cannot import of: 'parts\.n' \(layer_norm\): no layer computes this; supported operations are abs, .*"
        "batch_norm, .*conv2d, .*linear, .*relu, .*reshape, ",
    ),
    "softmax": (
        Of(lambda x: x.mean((2, 3)).softmax(1)),
        r"'softmax' \(softmax\): it gives probabilities where logits are needed; leave it out, since the",
    ),
    "log softmax": (
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 13 * 11, 2), nn.LogSoftmax(1)),
        r"'2' \(log_softmax\): it gives probabilities where logits are needed",
    ),
    "sigmoid": (
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 13 * 11, 2), nn.Sigmoid()),
        "it ends with a sigmoid, '2', as for several labels per image or for regression; fnet-search is for ",
    ),
    "sigmoid of a map": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardsigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "it ends with a hardsigmoid, '1'",
    ),
    "one output": (
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 13 * 11, 1)),
        "cannot import sequential: it gives one number per image; end it with one logit for each of two or more "
        "classes: fnet-search is for classification with one class per image",
    ),
    "one output, squeezed": (
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 13 * 11, 1), nn.Flatten(0)),
        "it gives one number per image",
    ),
    "over the image": (Of(lambda x: 2 / x), "a division by a tensor that depends on the image is not supported"),
    "a tensor over the image": (
        Of(lambda x: torch.ones(8, 1, 1) / x),
        "a division by a tensor that depends on the image",
    ),
    "a rounded quotient": (
        Of(lambda x: torch.div(x, 2, rounding_mode="floor")),
        "a rounded division is not supported",
    ),
    "a difference": (Of(lambda x: x - F.relu(x)), "a difference, or a sum with a factor, of tensors is not supported"),
    "from place to place": (
        Of(lambda x: x * torch.linspace(0, 1, 11)),
        r"'multiply' \(multiply\): a constant that differs between positions is not supported",
    ),
    "from image to image": (Of(lambda x: x + torch.arange(2).view(2, 1, 1, 1)), "differs between positions"),
    "infinite": (Of(lambda x: x * float("inf")), "its constant is not finite"),
    "by zero": (Of(lambda x: x / 0), "its constant is not finite"),
    "larger": (
        Of(lambda x: x.mean((2, 3), keepdim=True) + torch.zeros(1, 1, 3, 3)),
        "a constant that broadcasts to a larger tensor is not supported",
    ),
    "positions": (
        Of(lambda x, parts: x + parts["p"].weight.view(8, 13, 11), p=nn.Embedding(8, 143)),
        "a parameter of size 8x13x11 is not supported; only one number per",
    ),
    "concat of a constant": (
        Of(lambda x: torch.cat([x[:, 1:], torch.zeros(2, 1, 13, 11)], 1)),
        r"'concat' \(concat\): it reads a weight or constant where a layer needs a tensor",
    ),
    "constant kernel": (
        Of(lambda x: F.conv2d(x, torch.ones(8, 1, 3, 3) / 9, groups=8)),
        "its kernel is a constant; make it an nn.Parameter",
    ),
    "constant matrix": (Of(lambda x: F.linear(x.mean((2, 3)), torch.eye(8))), "its kernel is a constant"),
    "torchvision's old transform": (
        nn.Sequential(transforms.Normalize([0.5] * 3, [0.5] * 3), nn.Flatten(), nn.Linear(3 * 13 * 11, 2)),
        "; use torchvision.transforms.v2, which can be traced",
    ),
    "indices": (
        Of(lambda x: F.max_pool2d(x, 2, return_indices=True)[1] * 1.0),
        r"'max_pool2d_with_indices' \(max_pool2d_with_indices\): only its first output is supported, not number 2",
    ),
    "indices of an adaptive pool": (
        Of(lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)[1] * 1.0),
        r"\(adaptive_max_pool2d\): only its first output is supported, not number 2",
    ),
    "statistics of the batch": (
        Of(lambda x, parts: parts["n"](x), n=nn.BatchNorm2d(8, track_running_stats=False)),
        r"'parts.n' \(batch_norm\): it normalises with the statistics of its input, in evaluation mode too",
    ),
    "dropout in evaluation": (
        Of(lambda x: F.dropout(x, training=True)),
        "it is random, in evaluation mode too; remove it",
    ),
    "twice a convolution": (
        Of(lambda x, parts: parts["c"](F.relu(parts["c"](x))), c=nn.Conv2d(8, 8, 1)),
        "'parts.c' and 'parts.c_2' share 'parts.c.bias' .a module that is called twice, or tied weights.: they",
    ),
    "twice a norm": (
        Of(lambda x, parts: parts["n"](F.relu(parts["n"](x))), n=nn.BatchNorm2d(8, affine=False)),
        "'parts.n' and 'parts.n_2' share 'parts.n.running_mean'",
    ),
    "tied weights": (Tied(), "'0' and '1' share '1.weight' .a module that is called twice, or tied weights.: they"),
    "twice a scale": (
        Of(lambda x, parts: parts["s"](F.relu(parts["s"](x))), s=Scale()),
        "'parts.s' and 'parts.s_2' share 'parts.s.gamma'",
    ),
    "twice a slope": (
        Of(lambda x, parts: parts["a"](-parts["a"](x)), a=nn.PReLU()),
        "'parts.a' and 'parts.a_2' share 'parts.a.weight'",
    ),
    "tanh": (
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 13 * 11, 2), nn.Tanh()),
        "it ends with a tanh, '2', as for several labels per image or for regression",
    ),
    "clamp by the image": (Of(lambda x: x.clamp(min=x.mean())), r"\(mean\): means and maxima are only supported over"),
    "clamp by a tensor": (Of(lambda x: x.clamp(min=x.mean((2, 3), True))), r"\(clamp\): its bounds must be numbers"),
    "other softplus": (Of(lambda x: F.softplus(x, 2)), "only softplus with beta 1 and threshold 20 is supported"),
    "mean of channels": (Of(lambda x: x.mean(1, keepdim=True) * x), "are only supported over height, width or both"),
    "bilinear, odd": (
        Of(lambda x: F.interpolate(x, (20, 20), mode="bilinear")),
        r"'upsample_bilinear2d' \(upsample_bilinear2d\): a bilinear resize by 2, 3, 4, ... \(at most 16\) with ",
    ),
    "bicubic": (
        Of(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic")),
        "no layer computes this; supported operations",
    ),
    "antialiased": (
        Of(lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)),
        r"\(_upsample_bilinear2d_aa\): no layer computes this; supported operations",
    ),
    "padded with ones": (Of(lambda x: F.pad(x, (1, 1, 1, 1), value=1)), "pads with a constant other than zero"),
    "padded by less than nothing": (Of(lambda x: F.pad(x, (-1, 0))), "negative padding is not supported; take a slice"),
    "padded with images": (
        Of(lambda x: F.pad(x, (0,) * 7 + (1,))),
        "it pads the batch; only channels, rows and columns can be padded",
    ),
    "pixels from channels": (
        Of(lambda x: F.pixel_shuffle(x, 2).repeat(1, 4, 1, 1)),
        "no layer moves values like this, from 8x13x11 to 8x26",
    ),
    "channels in another order": (Of(lambda x: x.flip(1)), "no layer moves values like this, from 8x13x11 to 8x13x11"),
    "repeated channels": (Of(lambda x: x[:, :4].repeat(1, 2, 1, 1)), "no layer moves values like this, from 8x13"),
    "transposed": (Of(lambda x: x.transpose(2, 3)), "no layer moves values like this, from 8x13x11 to 8x11x13"),
    "between images": (Of(lambda x: x.flip(0)), "it moves values between images"),
    "concat of rows": (Of(lambda x: torch.cat([x, x], 2)), "can only be concatenated over channels"),
    "neither vector nor map": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(8 * 11 * 9, 2)),
        "it gives 8x99; layers read vectors or feature maps",
    ),
    "random": (Of(lambda x: F.conv2d(x, torch.randn(8, 8, 1, 1))), r"\(randn\): it is random"),
    "half weights": (Of(F.relu).half(), r"the weights are float16; call float\(\) of the module first"),
    "half precision": (Of(lambda x: x.half().float()), "it gives float16; only float32 can be imported"),
    "dilated pool": (Of(lambda x: F.max_pool2d(x, 2, dilation=2)), "a pool with dilation is not supported"),
    "1-D": (nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3)), "no layer computes this"),
    "weights of the image": (
        Of(lambda x: F.conv2d(x, F.adaptive_avg_pool2d(x, 1)[:1].expand(8, 8, 1, 1))),
        r"cannot import of: 'conv2d' \(conv2d\): its weights are computed from the image",
    ),
    "two outputs": (Gives(lambda x: (x, x)), "it gives 2 tensors; one tensor of logits is needed"),
    "outputs by name": (
        Gives(lambda x: {"boxes": x, "classes": -x}),
        "it gives 2 tensors; one tensor of logits is needed",
    ),
    "no output": (Gives(lambda x: 3), "it gives 0 tensors; one tensor of logits is needed"),
    "a constant": (Gives(lambda x: torch.zeros(2, 5)), "its output does not depend on the image"),
    "nothing": (nn.Identity(), "cannot import identity: it computes nothing"),
    "a branch": (Branching(), "cannot trace branching for an input of 3x13x11"),
    "a map at the end": (
        nn.Conv2d(3, 4, 3),
        "cannot import conv2d: it gives 4x11x9 per image, not logits; fnet-search is for classification with one class",
    ),
    "a pixel at the end": (nn.Conv2d(3, 4, (13, 11)), "it gives 4x1x1 per image, not logits; flatten it"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_layer_is_named(what: str, capfd: pytest.CaptureFixture[str]) -> None:
    model, complaint = REFUSED[what]
    with pytest.raises(FnetError, match=complaint) as error:
        from_module(model, images(1, 3, 13, 11))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
