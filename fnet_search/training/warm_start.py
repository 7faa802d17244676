"""Warm start: fits a network of one plan to the trained network of another, without training (docs/warm-start.md).

A factorized layer is y = P relu(norm(G x)): G is the grouped kernel on patches x, P the pointwise kernel. If the norm
shifts its channels far enough above zero, the ReLU passes them unchanged and y = P G x up to an offset: a least squares
problem. Layers are fitted in network order: each to the parent's output of the same layer, reading the output of the
child's layers fitted so far.
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
"""Mean of a shifted hidden channel in standard deviations: the ReLU then cuts 0.6 % of a normal channel. More would
cost resolution in 8 bits. These constants and how they were checked: docs/warm-start.md, "The constants"."""
SWEEPS = 3
"""Sweeps over the groups of a layer, each refitted to what the others leave; most of the gain is in the first ones."""
PLACES = 12_288
"""Random positions in the feature maps, over all samples, on which a layer is fitted: about five for each unknown of an
output in the largest layers."""
PATCH_RIDGE, POINTWISE_RIDGE = 1e-2, 1e-4
"""Ridges of the least squares, as shares of the mean variance. Neighbouring pixels are nearly equal, so the covariance
of patches is nearly singular; the covariance of hidden channels is so only if channels are dead or equal."""


@dataclass(frozen=True)
class _Both:
    """A tensor in the parent and its counterpart in the child, a list of batches each; the same list while equal."""

    parent: list[Tensor]
    child: list[Tensor]


@dataclass(frozen=True)
class Target:
    """What a changed layer is fitted to.

    At n random positions: the patches x [n, D] that the child's layer reads, the parent's output y [n, O], and the
    parent's hidden channels z [n, C_in] (y if its layer is regular). `xx`, `yx` and `zx` are covariances with x,
    float64, `xx` with its ridge. `wanted` is the parent's whole output, a list of batches.
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
    """Fills `child`, of another plan of the same space, so that it computes nearly the same as `parent`.

    `parent` is in evaluation mode. Layers whose rate is unchanged are copied; so are the norms after the others, except
    for mean and variance, which follow the fit. All samples pass one layer before the next, so memory grows with them.
    `targets` caches the targets of the layers: share it between children with the same parent, samples and first
    changed layer. Raises FnetError unless every rate of the child is a multiple of the parent's, and for networks of
    two spaces.
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
            outputs = _outputs(child, node, [pair.child for pair in inputs])
            if all(pair.parent is pair.child for pair in inputs):  # nothing changed so far: computed once
                return _Both(outputs, outputs)
            return _Both(_outputs(parent, node, [pair.parent for pair in inputs]), outputs)
        name, _, part = node.name.rpartition(".")
        target_output, child_input = inputs[0].parent, inputs[0].child
        if part == "grouped":  # from this part on, the parent's side is the output of its whole layer
            if name not in targets:
                targets[name] = _target(parent, _conv(child.network, node.name), name, target_output, child_input)
            _fit(parent, child, name, targets[name])
            if node is last:  # no later fit reads what the child computes
                return inputs[0]
            target_output = targets[name].wanted
        return _Both(target_output, _outputs(child, node, [child_input]))

    samples, mode = list(batches()), child.training
    child.eval()
    last = [node for node in child.network.order if node.name in parts and node.name.endswith(".grouped")][-1]
    for node, _ in walk(child.network, _Both(samples, samples), apply):
        if node is last:
            break
    child.train(mode)


def _outputs(network: Network, node: Node, inputs: list[list[Tensor]]) -> list[Tensor]:
    """Applies one layer to each batch."""
    return [network.apply_node(node, list(parts)) for parts in zip(*inputs, strict=True)]


def _changed(parent: Macroarchitecture, child: Macroarchitecture) -> list[str]:
    """Layers with another rate in the child. Raises FnetError if it is not a multiple, and for networks of two
    spaces."""
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
    """The rates above 1 of a plan's network, by layer."""
    nodes = [node for node in network.order if node.name.endswith(".grouped") and isinstance(node.layer, Conv)]
    names = [node.name.removesuffix(".grouped") for node in nodes]
    return {name: _conv(network, f"{name}.grouped").groups for name in names if f"{name}.pointwise" in network.by_name}


def _layers(network: Macroarchitecture, changed: list[str]) -> dict[str, tuple[object, ...]]:
    """What two plans of one space must share: each layer's options and shape, of changed layers only the shape."""
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
    """The target of a layer that reads `fed` in the child and `inputs` in the parent."""
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

    The first way shifts the hidden channels above zero (`_shifted`). If the parent's layer is factorized too, the
    second fits each hidden channel to the parent's of the same index, so that the ReLU cuts the same (`_imitating`).
    The way that loses less variance is taken.
    """
    grouped, norm, pointwise = (child.layer(f"{name}.{part}") for part in PARTS if part != "relu")
    assert isinstance(grouped, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(pointwise, nn.Conv2d)
    readers = child.network.consumers(f"{name}.pointwise")
    after = [child.layer(reader.name) for reader in readers if isinstance(reader.layer, BatchNorm)]
    offset = pointwise.bias is not None or 0 < len(after) == len(readers)

    conv, x, y, xx = _conv(child.network, f"{name}.grouped"), target.x, target.y, target.xx
    gain = _gain(after[0]) if after else xx.new_ones(y.shape[1])  # the norm after the layer amplifies errors by it
    ways = [_shifted(x, _joint(xx, target.yx * gain.view(-1, 1), conv))]
    if name not in parent.network.by_name:
        ways.append(_imitating(x, _separate(xx, target.zx, conv), parent.layer(f"{name}.norm")))
    fits = [
        _pointwise(F.relu(F.batch_norm(_grouped(x, way.kernel), *way.norm, eps=norm.eps)), y, offset) for way in ways
    ]
    losses = [float((fit.lost * gain.square()).sum()) for fit in fits]
    way, fit = ways[losses.index(min(losses))], fits[losses.index(min(losses))]

    grouped.weight.copy_(way.kernel.view_as(grouped.weight))
    for own, fitted in zip((*_statistics(norm), norm.weight, norm.bias), way.norm, strict=True):
        own.copy_(fitted)
    pointwise.weight.copy_(fit.weight.view_as(pointwise.weight))
    if pointwise.bias is not None:
        pointwise.bias.copy_(fit.offset)
    for module in after if offset else ():
        mean, variance = _statistics(module)
        # The fit explains the share `kept` of the variance, which the first batches of a training will find. The
        # norm's mean is moved so that its output keeps its mean.
        left = variance * fit.kept.float()
        narrower = torch.sqrt((left + norm.eps) / (variance + norm.eps))
        mean.copy_(fit.mean - (fit.mean - mean) * narrower - (fit.offset if pointwise.bias is None else 0))
        variance.copy_(left)


def _statistics(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Running mean and variance of a BatchNorm."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _gain(norm: nn.Module) -> Tensor:
    """The absolute factor by which a norm multiplies each channel, |gamma| / sqrt(var + eps), float64."""
    assert isinstance(norm, nn.BatchNorm2d)
    weight = norm.weight.double() if norm.affine else 1.0
    return (weight / torch.sqrt(_statistics(norm)[1].double() + norm.eps)).abs()


def _places(conv: Conv, inputs: list[Tensor], *outputs: list[Tensor]) -> list[Tensor]:
    """At random positions, the patches that a convolution reads, [n, D] with D = C_in K_h K_w, and each output, [n,
    O]."""
    generator = torch.Generator().manual_seed(0)
    height, width = outputs[0][0].shape[2:]
    taps = list(product(*map(range, conv.kernel)))
    per_image = ceil(PLACES / sum(map(len, inputs)))
    chunks = []
    for batch, *maps in zip(inputs, *outputs, strict=True):
        chosen = torch.randperm(len(batch) * height * width, generator=generator)[: per_image * len(batch)]
        image, place = chosen.to(batch.device) // (height * width), chosen.to(batch.device) % (height * width)
        row, column = place // width, place % width
        padded = F.pad(batch, (conv.padding[1], conv.padding[1], conv.padding[0], conv.padding[0]))
        rows, columns = row * conv.stride[0], column * conv.stride[1]
        read = [padded[image, :, rows + i * conv.dilation[0], columns + j * conv.dilation[1]] for i, j in taps]
        chunks.append([torch.stack(read, 2).flatten(1), *(output[image, :, row, column] for output in maps)])
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


def _covariance(a: Tensor, b: Tensor) -> Tensor:
    """The covariance [A, B] of a [n, A] and b [n, B], float64."""
    return (a.T @ b).double() / len(a) - torch.outer(a.mean(0).double(), b.mean(0).double())


def _blocks(size: int, groups: int) -> list[slice]:
    """The slice of each group in a patch of this size."""
    return [slice(start, start + size // groups) for start in range(0, size, size // groups)]


def _grouped(x: Tensor, kernel: Tensor) -> Tensor:
    """A grouped convolution of patches x [n, D] with a kernel [C_in, D / groups]: [n, C_in]."""
    blocks = _blocks(x.shape[1], x.shape[1] // kernel.shape[1])
    return torch.cat([x[:, at] @ part.T for at, part in zip(blocks, kernel.chunk(len(blocks)), strict=True)], 1)


def _separate(xx: Tensor, zx: Tensor, conv: Conv) -> Tensor:
    """The grouped kernel [C_in, D / groups] whose channels are each nearest to one of z [C_in], by least squares."""
    parts = zip(_blocks(len(xx), conv.groups), zx.chunk(conv.groups), strict=True)
    return torch.cat([_solve(xx[at, at], part[:, at], 0) for at, part in parts])


def _joint(xx: Tensor, yx: Tensor, conv: Conv) -> Tensor:
    """The grouped kernel [C_in, D / groups] G that minimises E |y - P G x|^2 together with a free pointwise P.

    Block-diagonal reduced-rank regression, for which only one group has a closed solution (`_leading`). Starts with
    each group fitted to its part of the dense solution yx xx^-1. Then SWEEPS times: refits P, and each group in turn to
    what all others leave of y.
    """
    blocks, rank = _blocks(len(xx), conv.groups), conv.out_channels // conv.groups
    roots = [torch.linalg.cholesky(xx[at, at]) for at in blocks]
    dense = torch.cholesky_solve(yx.T, torch.linalg.cholesky(xx)).T
    kernels = [_leading(dense[:, at] @ xx[at, at], root, rank)[1] for at, root in zip(blocks, roots, strict=True)]
    for _ in range(SWEEPS):
        # hx = cov(h, x) of the hidden channels h = G x; left = cov(y - P h, x), kept up to date group by group.
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
    """The least squares weight [O, D] of y on x, from their covariances."""
    solution: Tensor = torch.linalg.solve(_ridged(xx, ridge), yx.T)
    return solution.T


def _ridged(xx: Tensor, ridge: float) -> Tensor:
    """xx with a share of its mean variance added to each; the floor keeps idle channels finite."""
    return xx + torch.diag_embed((ridge * xx.diagonal().mean() + 1e-12).expand(len(xx)))


def _leading(yx: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Weights [O, rank] and a kernel [rank, D] whose product maps x nearest to y; `root` is the Cholesky factor of xx.

    The leading singular vectors of yx root^-T: least squares in coordinates where x is white.
    """
    white = torch.linalg.solve_triangular(root, yx.T, upper=False).T
    left, values, right = torch.linalg.svd(white, full_matrices=False)
    kernel = torch.linalg.solve_triangular(root.T, (values.view(-1, 1) * right)[:rank].T, upper=True).T
    missing = rank - len(kernel)  # if a group has more channels than the layer has outputs
    return F.pad(left[:, :rank], (0, missing)), F.pad(kernel, (0, 0, 0, missing))


@dataclass(frozen=True)
class _Hidden:
    """A fitted grouped kernel [C_in, D / groups], and mean, variance, weight and bias of the norm after it."""

    kernel: Tensor
    norm: tuple[Tensor, Tensor, Tensor, Tensor]


def _shifted(x: Tensor, kernel: Tensor) -> _Hidden:
    """Scales channels to unit variance and mean SHIFT, their longer tail up, so that the ReLU cuts the shorter one."""
    z = _grouped(x, kernel.float())
    variance, mean = torch.var_mean(z, 0, correction=0)
    scale = 1 / variance.sqrt().clamp_min(1e-6 * float(variance.max().sqrt()) + 1e-12)
    scale = torch.where((z - mean).pow(3).mean(0) < 0, -scale, scale)
    one = torch.ones_like(scale)
    return _Hidden(kernel.float() * scale.view(-1, 1), (mean * scale, variance * scale.square(), one, SHIFT * one))


def _imitating(x: Tensor, kernel: Tensor, norm: nn.Module) -> _Hidden:
    """Channels with the weight and bias of the parent's norm and their own mean and variance."""
    assert isinstance(norm, nn.BatchNorm2d)
    variance, mean = torch.var_mean(_grouped(x, kernel.float()), 0, correction=0)
    return _Hidden(kernel.float(), (mean, variance, norm.weight, norm.bias))


@dataclass(frozen=True)
class _Pointwise:
    """Weight [O, C_in] and offset [O]; of each output the mean, the share of variance explained, and the rest lost."""

    weight: Tensor
    offset: Tensor
    mean: Tensor
    kept: Tensor
    lost: Tensor


def _pointwise(h: Tensor, y: Tensor, offset: bool) -> _Pointwise:
    """Least squares from hidden channels h [n, C_in] to y [n, O], with or without an offset."""
    h, y = h.double(), y.double()
    h_mean, y_mean = (part.mean(0) if offset else part.new_zeros(part.shape[1]) for part in (h, y))
    h, y = h - h_mean, y - y_mean
    yh, yy = y.T @ h / len(h), y.square().mean(0)
    weight = _solve(h.T @ h / len(h), yh, POINTWISE_RIDGE)
    explained = (weight * yh).sum(1)
    kept = torch.where(yy > 0, explained / yy, 1.0).clamp(0, 1)
    return _Pointwise(weight, y_mean - weight @ h_mean, y_mean, kept, yy - explained)
