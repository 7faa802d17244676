"""Warm start (docs/warm-start.md): a network of one plan from the trained network of another, without training.

A factorized layer is y = P relu(norm(G x)): G reads the patches x of each group, P is pointwise. A norm that lifts its
channels above zero leaves P G x, a least squares problem: each changed layer is fitted to what the parent computes in
its place, layer after layer, from what the child itself, as far as it is built, feeds it.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from itertools import product
from math import ceil

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from fnet_search.arch.layers import BatchNorm, Conv
from fnet_search.arch.macroarchitecture import INPUT, PARTS, Macroarchitecture, Node
from fnet_search.base.errors import FnetError
from fnet_search.training.datasets import Batches
from fnet_search.training.network import Network, module_key, walk

SHIFT = 2.5
"""Standard deviations by which a norm lifts its channels."""
SWEEPS = 3
"""Over the groups of a layer, each refitted beside all others."""
PLACES = 12_288
"""Random places of the feature maps, over all samples, that a layer is fitted on."""
PATCH_RIDGE, POINTWISE_RIDGE = 1e-2, 1e-4
"""What least squares add to each variance that they read, as a share of the mean one."""


@dataclass(frozen=True)
class _Both:
    """A tensor of the parent and what stands for it in the child, a batch each; one list while they are equal."""

    parent: list[Tensor]
    child: list[Tensor]


@dataclass(frozen=True)
class Target:
    """What a changed layer is to compute: at random places, what it reads x [n, D], what the parent gives y [n, O] and
    its hidden channels z [n, C_in] (y where it has none); their covariances with x, float64; all that the parent gives.
    """

    x: Tensor
    y: Tensor
    xx: Tensor
    yx: Tensor
    zx: Tensor
    wanted: list[Tensor]


@torch.no_grad()
def warm_start(
    parent: Network, child: Network, batches: Batches, targets: MutableMapping[str, Target] | None = None
) -> None:
    """Fills `child`, of another plan on the space of `parent`, so that it computes nearly the same.

    `parent` is in evaluation mode. Layers whose rate is unchanged are copied; so are the norms after the others, but
    for mean and variance, which follow the fit. All samples pass one layer before the next: memory grows with them.
    `targets` takes the targets of the layers; those that are in it are not computed again, so it may be given for more
    children that have the same parent, samples and first changed layer. Raises FnetError unless every rate of the child
    is a multiple of the parent's.
    """
    targets = {} if targets is None else targets
    changed = _changed(parent.network, child.network)
    parts = {f"{name}.{part}" for name in changed for part in PARTS}
    for node in child.network.order:
        if module_key(node.name) in child.layers and node.name not in parts:
            child.layer(node.name).load_state_dict(parent.layer(node.name).state_dict())
    if not changed:
        return

    def apply(node: Node, inputs: list[_Both]) -> _Both:
        if node.name not in parts:
            found = _outputs(child, node, [both.child for both in inputs])
            if all(both.parent is both.child for both in inputs):
                return _Both(found, found)
            return _Both(_outputs(parent, node, [both.parent for both in inputs]), found)
        name, _, part = node.name.rpartition(".")
        wanted, fed = inputs[0].parent, inputs[0].child
        if part == "grouped":  # from here on, the parent's side is what the layer as a whole is to give
            if name not in targets:
                targets[name] = _target(parent, _conv(child.network, node.name), name, wanted, fed)
            _fit(parent, child, name, targets[name])
            if node is last:  # nothing is fitted to what the child computes from here on
                return inputs[0]
            wanted = targets[name].wanted
        return _Both(wanted, _outputs(child, node, [fed]))

    samples, mode = list(batches()), child.training
    child.eval()
    last = [node for node in child.network.order if node.name in parts and node.name.endswith(".grouped")][-1]
    for node, _ in walk(child.network, _Both(samples, samples), apply):
        if node is last:
            break
    child.train(mode)


def _outputs(network: Network, node: Node, inputs: list[list[Tensor]]) -> list[Tensor]:
    """One layer on each batch."""
    return [network.apply_node(node, list(parts)) for parts in zip(*inputs, strict=True)]


def _changed(parent: Macroarchitecture, child: Macroarchitecture) -> list[str]:
    """Layers that have another rate in the child. Raises FnetError if it is no multiple, or for two spaces."""
    before, after = _rates(parent), _rates(child)
    changed = [name for name in {**before, **after} if before.get(name, 1) != after.get(name, 1)]
    theirs, ours = _layers(parent, changed), _layers(child, changed)
    for name in {**theirs, **ours}:
        if theirs.get(name) != ours.get(name):
            raise FnetError(f"a warm start needs two plans of one space; these networks differ in layer {name!r}")
    for name in changed:
        if after.get(name, 1) % before.get(name, 1):
            rates = f"its rate {after.get(name, 1)} is not a multiple of the parent's rate {before[name]}"
            raise FnetError(f"layer {name!r} cannot start from its parent: {rates}")
    return changed


def _rates(network: Macroarchitecture) -> dict[str, int]:
    """Rates above 1."""
    nodes = [node for node in network.order if node.name.endswith(".grouped") and isinstance(node.layer, Conv)]
    names = [node.name.removesuffix(".grouped") for node in nodes]
    return {name: _conv(network, f"{name}.grouped").groups for name in names if f"{name}.pointwise" in network.by_name}


def _layers(network: Macroarchitecture, changed: list[str]) -> dict[str, tuple[object, ...]]:
    """What the nodes of two plans have in common: kind, options and shape, of changed layers only the shape."""
    whole = {f"{name}.{part}": name for name in changed for part in PARTS} | {name: name for name in changed}
    layers: dict[str, tuple[object, ...]] = {INPUT: network.input_shape}
    for node in network.order:
        name, shape = whole.get(node.name, node.name), network.shapes[node.name]
        layers[name] = shape if name in changed else (node.layer, shape)
    return layers


def _conv(network: Macroarchitecture, name: str) -> Conv:
    layer = network.by_name[name].layer
    assert isinstance(layer, Conv)
    return layer


def _target(parent: Network, conv: Conv, name: str, inputs: list[Tensor], fed: list[Tensor]) -> Target:
    """What a layer of the child, which is fed `fed`, is fitted to: what the parent's gives for `inputs`."""
    nodes = parent.network.by_name
    factorized = name not in nodes
    hidden = wanted = _outputs(parent, nodes[f"{name}.grouped" if factorized else name], [inputs])
    for part in PARTS[1:] if factorized else ():
        wanted = _outputs(parent, nodes[f"{name}.{part}"], [wanted])
    x, y, z = _places(conv, fed, wanted, hidden)
    yx = _covariance(y, x)
    zx = _covariance(z, x) if factorized else yx
    return Target(x, y, _ridged(_covariance(x, x), PATCH_RIDGE), yx, zx, wanted)


def _fit(parent: Network, child: Network, name: str, target: Target) -> None:
    """Fits a layer of the child, and the norms after it, to a target.

    The hidden channels are lifted; or, if the parent's layer is factorized too, each is fitted to one of the parent's,
    so that the ReLU bends what it bends there. What loses less is taken.
    """
    grouped, norm, pointwise = (child.layer(f"{name}.{part}") for part in PARTS if part != "relu")
    assert isinstance(grouped, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(pointwise, nn.Conv2d)
    readers = child.network.consumers(f"{name}.pointwise")
    after = [child.layer(reader.name) for reader in readers if isinstance(reader.layer, BatchNorm)]
    offset = pointwise.bias is not None or 0 < len(after) == len(readers)

    conv, x, y, xx = _conv(child.network, f"{name}.grouped"), target.x, target.y, target.xx
    gain = _gain(after[0]) if after else xx.new_ones(y.shape[1])  # an error counts for what the norm makes of it
    ways = [_lifted(x, _joint(xx, target.yx * gain.view(-1, 1), conv))]
    if name not in parent.network.by_name:
        ways.append(_imitating(x, _separate(xx, target.zx, conv), parent.layer(f"{name}.norm")))
    fits = [
        _pointwise(F.relu(F.batch_norm(_grouped(x, way.kernel), *way.norm, eps=norm.eps)), y, offset) for way in ways
    ]
    losses = [float((fit.lost * gain.square()).sum()) for fit in fits]
    way, fit = ways[losses.index(min(losses))], fits[losses.index(min(losses))]

    grouped.weight.copy_(way.kernel.view_as(grouped.weight))
    for own, found in zip((*_statistics(norm), norm.weight, norm.bias), way.norm, strict=True):
        own.copy_(found)
    pointwise.weight.copy_(fit.weight.view_as(pointwise.weight))
    if pointwise.bias is not None:
        pointwise.bias.copy_(fit.offset)
    for module in after if offset else ():
        mean, variance = _statistics(module)
        # The variance that is left, as a training's first batches will find it; what the norm gives keeps its mean.
        left = variance * fit.kept.float()
        narrower = torch.sqrt((left + norm.eps) / (variance + norm.eps))
        mean.copy_(fit.mean - (fit.mean - mean) * narrower - (fit.offset if pointwise.bias is None else 0))
        variance.copy_(left)


def _statistics(norm: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _gain(norm: nn.Module) -> Tensor:
    """What a norm multiplies each channel by, but for the sign, float64."""
    assert isinstance(norm, nn.BatchNorm2d)
    weight = norm.weight.double() if norm.affine else 1.0
    return (weight / torch.sqrt(_statistics(norm)[1].double() + norm.eps)).abs()


def _places(conv: Conv, inputs: list[Tensor], *outputs: list[Tensor]) -> list[Tensor]:
    """At random places: what a convolution reads, x [n, D] with D = C_in K_h K_w, and each of the outputs, [n, O]."""
    generator = torch.Generator().manual_seed(0)
    height, width = outputs[0][0].shape[2:]
    taps = list(product(*map(range, conv.kernel)))
    an_image = ceil(PLACES / sum(map(len, inputs)))
    found = []
    for batch, *maps in zip(inputs, *outputs, strict=True):
        chosen = torch.randperm(len(batch) * height * width, generator=generator)[: an_image * len(batch)]
        image, place = chosen.to(batch.device) // (height * width), chosen.to(batch.device) % (height * width)
        row, column = place // width, place % width
        padded = F.pad(batch, (conv.padding[1], conv.padding[1], conv.padding[0], conv.padding[0]))
        rows, columns = row * conv.stride[0], column * conv.stride[1]
        read = [padded[image, :, rows + i * conv.dilation[0], columns + j * conv.dilation[1]] for i, j in taps]
        found.append([torch.stack(read, 2).flatten(1), *(output[image, :, row, column] for output in maps)])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _covariance(a: Tensor, b: Tensor) -> Tensor:
    """Of [n, A] and [n, B]: [A, B], float64."""
    return (a.T @ b).double() / len(a) - torch.outer(a.mean(0).double(), b.mean(0).double())


def _blocks(size: int, groups: int) -> list[slice]:
    """Where in a patch of this size each group's part is."""
    return [slice(start, start + size // groups) for start in range(0, size, size // groups)]


def _grouped(x: Tensor, kernel: Tensor) -> Tensor:
    """A grouped convolution at the places, [n, C_in]."""
    blocks = _blocks(x.shape[1], x.shape[1] // kernel.shape[1])
    return torch.cat([x[:, at] @ part.T for at, part in zip(blocks, kernel.chunk(len(blocks)), strict=True)], 1)


def _separate(xx: Tensor, zx: Tensor, conv: Conv) -> Tensor:
    """The grouped kernel [C_in, D / groups] whose channels are nearest to z [C_in], each by itself."""
    places = zip(_blocks(len(xx), conv.groups), zx.chunk(conv.groups), strict=True)
    return torch.cat([_solve(xx[at, at], part[:, at], 0) for at, part in places])


def _joint(xx: Tensor, yx: Tensor, conv: Conv) -> Tensor:
    """The grouped kernel [C_in, D / groups] from whose channels a pointwise one can make what is nearest to y.

    It starts from the leading right singular vectors of the dense kernel's part for each group, in the metric of the
    group's xx. Then each group in turn is fitted to what all others leave.
    """
    blocks, rank = _blocks(len(xx), conv.groups), conv.out_channels // conv.groups
    roots = [torch.linalg.cholesky(xx[at, at]) for at in blocks]
    dense = torch.cholesky_solve(yx.T, torch.linalg.cholesky(xx)).T
    kernels = [_leading(dense[:, at] @ xx[at, at], root, rank)[1] for at, root in zip(blocks, roots, strict=True)]
    for _ in range(SWEEPS):
        whole: Tensor = torch.block_diag(*kernels)  # type: ignore[no-untyped-call]
        hx = whole @ xx
        weight = _solve(hx @ whole.T, yx @ whole.T, 1e-6)
        left = yx - weight @ hx
        for group, (at, root) in enumerate(zip(blocks, roots, strict=True)):
            own = weight[:, group * rank : (group + 1) * rank] @ kernels[group]
            new, kernels[group] = _leading(left[:, at] + own @ xx[at, at], root, rank)
            left -= (new @ kernels[group] - own) @ xx[at]
    return torch.cat(kernels)


def _solve(xx: Tensor, yx: Tensor, ridge: float) -> Tensor:
    """The weight [O, D] of least squares."""
    solution: Tensor = torch.linalg.solve(_ridged(xx, ridge), yx.T)
    return solution.T


def _ridged(xx: Tensor, ridge: float) -> Tensor:
    return xx + torch.diag_embed((ridge * xx.diagonal().mean() + 1e-12).expand(len(xx)))


def _leading(yx: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Weights [O, rank] and a kernel [rank, D] whose product takes x nearest to y; `root` is xx's Cholesky factor."""
    white = torch.linalg.solve_triangular(root, yx.T, upper=False).T
    left, values, right = torch.linalg.svd(white, full_matrices=False)
    kernel = torch.linalg.solve_triangular(root.T, (values.view(-1, 1) * right)[:rank].T, upper=True).T
    missing = rank - len(kernel)  # a group has more channels than the layer has outputs
    return F.pad(left[:, :rank], (0, missing)), F.pad(kernel, (0, 0, 0, missing))


@dataclass(frozen=True)
class _Hidden:
    """A grouped kernel [C_in, D / groups], and mean, variance, weight and bias of the norm after it."""

    kernel: Tensor
    norm: tuple[Tensor, Tensor, Tensor, Tensor]


def _lifted(x: Tensor, kernel: Tensor) -> _Hidden:
    """Channels of unit variance, SHIFT above zero, the longer tail up: the ReLU cuts the other."""
    z = _grouped(x, kernel.float())
    variance, mean = torch.var_mean(z, 0, correction=0)
    scale = 1 / variance.sqrt().clamp_min(1e-6 * float(variance.max().sqrt()) + 1e-12)
    scale = torch.where((z - mean).pow(3).mean(0) < 0, -scale, scale)
    one = torch.ones_like(scale)
    return _Hidden(kernel.float() * scale.view(-1, 1), (mean * scale, variance * scale.square(), one, SHIFT * one))


def _imitating(x: Tensor, kernel: Tensor, norm: nn.Module) -> _Hidden:
    """Channels that pass the norm of those that they imitate, with statistics of their own."""
    assert isinstance(norm, nn.BatchNorm2d)
    variance, mean = torch.var_mean(_grouped(x, kernel.float()), 0, correction=0)
    return _Hidden(kernel.float(), (mean, variance, norm.weight, norm.bias))


@dataclass(frozen=True)
class _Pointwise:
    """Weight [O, C_in] and offset [O]; mean of each output, and of its variance the share kept and the part lost."""

    weight: Tensor
    offset: Tensor
    mean: Tensor
    kept: Tensor
    lost: Tensor


def _pointwise(h: Tensor, y: Tensor, offset: bool) -> _Pointwise:
    """Least squares from hidden channels h [n, C_in] to y [n, O], with an offset or without."""
    h, y = h.double(), y.double()
    h_mean, y_mean = (part.mean(0) if offset else part.new_zeros(part.shape[1]) for part in (h, y))
    h, y = h - h_mean, y - y_mean
    yh, yy = y.T @ h / len(h), y.square().mean(0)
    weight = _solve(h.T @ h / len(h), yh, POINTWISE_RIDGE)
    explained = (weight * yh).sum(1)
    kept = torch.where(yy > 0, explained / yy, 1.0).clamp(0, 1)
    return _Pointwise(weight, y_mean - weight @ h_mean, y_mean, kept, yy - explained)
