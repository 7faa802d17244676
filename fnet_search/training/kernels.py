"""Fast kernels for training: BatchNorm with its ReLU in one pass, grouped convolutions as block-diagonal ones.
`numerics` decides by timing which of them a training uses."""

import logging
import threading
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

# BatchNorm with ReLU takes four passes over an activation, forward and backward. Each is one compiled function, which
# reads it once and stores no intermediate. Sums run over pixels, then over images: the inner sums stay in the cache,
# and float32 is exact enough for them.


def import_compiler() -> None:
    """Imports and configures what torch.compile needs, which takes two seconds: before its first use, or earlier."""
    import torch._dynamo.config
    import torch._inductor.config
    import torch.fx.experimental._config
    from tqdm import tqdm

    torch._inductor.config.compile_threads = 1  # a pool of compiling processes only pays for large graphs
    import torch._inductor.compile_fx

    tqdm.set_lock(threading.RLock())  # torch.fx's progress bar else makes a multiprocessing lock that outlives a worker
    torch.fx.experimental._config.use_duck_shape = False  # sides that are equal now may differ next time
    torch._dynamo.config.recompile_limit = 64  # beyond the limit torch silently stops compiling
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns that there is no CUDA


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled by torch.compile, at its first use, for all shapes; again only for another dtype, memory
    format or number of threads."""
    import_compiler()
    return torch.compile(function, dynamic=True)


def _channels(x: Tensor) -> Tensor:
    """[C] as [1, C, 1, 1]."""
    return x.view(1, -1, 1, 1)


def _moments(x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel, the sums of x - shift and of its square."""
    d = x.float() - _channels(shift)
    return d.sum((2, 3)).sum(0), d.square().sum((2, 3)).sum(0)


def _scaled_relu(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """relu(a x + b)."""
    return torch.relu(x.float() * _channels(a) + _channels(b)).to(x.dtype)


def _gradient_sums(g: Tensor, x: Tensor, a: Tensor, b: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel, the sums of g and of g (x - mean), where the ReLU passes."""
    x = x.float()
    g = torch.where(x * _channels(a) + _channels(b) > 0, g.float(), 0.0)
    return g.sum((2, 3)).sum(0), (g * (x - _channels(mean))).sum((2, 3)).sum(0)


def _input_gradient(g: Tensor, x: Tensor, a: Tensor, b: Tensor, mean: Tensor, k: Tensor, c: Tensor) -> Tensor:
    """a g + k (x - mean) + c, with g only where the ReLU passes."""
    y = x.float()
    masked = torch.where(y * _channels(a) + _channels(b) > 0, g.float(), 0.0)
    return (_channels(a) * masked + _channels(k) * (y - _channels(mean)) + _channels(c)).to(x.dtype)


class _NormReLU(torch.autograd.Function):
    """relu(a x + b) with a = gamma / sqrt(var + eps), b = beta - a mean. The backward pass recomputes the ReLU's
    mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        count = x.numel() // x.shape[1]
        # Shifted by the mean of one image, without which the variance, a difference of squares, would cancel.
        shift = x[0].mean((1, 2), dtype=torch.float32)
        first, second = (total / count for total in _compiled(_moments)(x, shift))
        mean, variance = shift + first, (second - first.square()).clamp_min(0)
        rstd = torch.rsqrt(variance + eps)
        a = gamma * rstd
        b = beta - a * mean
        ctx.save_for_backward(x, a, b, mean, rstd)
        ctx.mark_non_differentiable(mean, variance)
        return _compiled(_scaled_relu)(x, a, b), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, mean, rstd = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        g = gradients[0]
        if x.is_contiguous(memory_format=torch.channels_last):
            g = g.contiguous(memory_format=torch.channels_last)
        total, product = _compiled(_gradient_sums)(g, x, a, b, mean)
        of_gamma = product * rstd
        k, c = -a * rstd * of_gamma / count, -a * total / count
        x_gradient = _compiled(_input_gradient)(g, x, a, b, mean, k, c)
        return x_gradient, of_gamma, total, None


def norm_relu(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """relu(norm(x)) of [N, C, H, W] in training mode; updates the norm's running statistics as torch does."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    y, mean, variance = _NormReLU.apply(x, norm.weight, norm.bias, norm.eps)
    with torch.no_grad():
        norm.num_batches_tracked += 1
        count = x.numel() // x.shape[1]
        share = 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean, share)
        norm.running_var.lerp_(variance * (count / (count - 1)), share)
    return y  # type: ignore[no-any-return]


def groups_to_merge(in_channels: int, groups: int, widths: tuple[int, ...]) -> int:
    """How many groups to compute together as one block-diagonal group: a divisor of `groups`.

    `widths` are the target input channels per group, for groups of 1, 2, 4, ... channels; wider groups stay as they
    are.
    """
    own = in_channels // groups
    place = own.bit_length() - 1
    width = widths[place] if place < len(widths) else own
    return max(m for m in range(1, groups + 1) if groups % m == 0 and m * own <= max(width, own))


@lru_cache
def _blocks(out_channels: int, groups: int, per_group: int, merge: int, device: torch.device) -> Tensor:
    """A mask [C_out, merge * per_group, 1, 1]: 1 where a weight of the merged group belongs to the grouped kernel."""
    own = torch.arange(out_channels, device=device) // (out_channels // groups) % merge
    block = torch.arange(merge * per_group, device=device) // per_group
    return (own[:, None] == block).float()[:, :, None, None]


def block_diagonal(x: Tensor, conv: nn.Conv2d, merge: int) -> Tensor:
    """The grouped convolution `conv` of `x`, computing `merge` groups as a dense one with zeros between them."""
    per_group = conv.in_channels // conv.groups
    blocks = _blocks(conv.out_channels, conv.groups, per_group, merge, conv.weight.device)
    weight = conv.weight.repeat(1, merge, 1, 1) * blocks
    assert isinstance(conv.padding, tuple)
    return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups // merge)
