from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.training.datasets import DataSet
from fnet_search.training.kernels import block_diagonal, groups_to_merge, norm_relu
from fnet_search.training.recipe import Augmentation, Recipe
from tests.support.networks import CPU, FAST, MIXED, RESIDUAL, compiled, digits, normal, randomized
from tests.support.training import Training, same, step, stopping

LAYOUTS = (torch.channels_last, pytest.param(torch.contiguous_format, marks=pytest.mark.slow))
"""Kernels are compiled for each anew, which takes seconds: trainings that are fast have the first."""


def batch_norm(channels: int, momentum: float | None = 0.3, seed: int = 5) -> nn.BatchNorm2d:
    """In training mode, at some point of a training."""
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=momentum)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.4 * normal(channels, seed=seed))
        norm.weight[0] = -0.7
        norm.bias.copy_(0.5 * normal(channels, seed=seed + 1))
    assert norm.running_mean is not None
    norm.running_mean.copy_(normal(channels, seed=seed + 2))
    return norm


def computed(x: Tensor, norm: nn.BatchNorm2d, fused: bool) -> dict[str, Tensor]:
    """Output, gradients for a gradient of the output, and statistics after a step of a copy of `norm`."""
    norm, x = deepcopy(norm), x.detach().requires_grad_()
    y = norm_relu(x, norm) if fused else F.relu(norm(x))
    y.backward(torch.empty_like(y).copy_(normal(*x.shape, seed=77)))  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    found = {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return found | {name: buffer.clone() for name, buffer in norm.named_buffers()}


@compiled
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_is_batch_norm_and_relu(layout: torch.memory_format, momentum: float | None) -> None:
    """Against torch's in float64: as near to it as torch's own float32."""
    x = (2 * normal(24, 6, 10, 10) + 3 * normal(1, 6, 1, 1, seed=1)).to(memory_format=layout)
    norm = batch_norm(6, momentum)
    found, expected = computed(x, norm, fused=True), computed(x.double(), deepcopy(norm).double(), fused=False)
    assert 0.2 < float((expected["y"] == 0).double().mean()) < 0.8
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name].to(value.dtype), value, rtol=1e-5, atol=2e-6 * scale, msg=name)
        assert found[name].dtype == (torch.int64 if name == "num_batches_tracked" else torch.float32)
    assert int(found["num_batches_tracked"]) == 1
    for name in ("y", "x"):
        assert found[name].is_contiguous(memory_format=layout), "the format of the network is kept"


@compiled
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bfloat16_is_rounded_once(layout: torch.memory_format) -> None:
    """Statistics and parameters are float32 ones of the rounded input; what is written back is rounded at the end."""
    x = normal(24, 6, 10, 10).bfloat16().to(memory_format=layout)
    norm = batch_norm(6)
    found, expected = computed(x, norm, fused=True), computed(x.double(), deepcopy(norm).double(), fused=False)
    for name in ("running_mean", "running_var"):
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-6)
    assert found["y"].dtype == found["x"].dtype == torch.bfloat16
    torch.testing.assert_close(found["y"].double(), expected["y"], rtol=2**-8, atol=1e-6)
    for name in ("x", "weight", "bias"):  # the gradient that comes in was rounded too
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(found[name].double(), expected[name], rtol=2**-7, atol=2**-8 * scale, msg=name)


@compiled
def test_an_output_gradient_of_another_format() -> None:
    """As it comes from a layer behind that does not keep the format: nothing is compiled for it."""
    x, norm = normal(24, 6, 10, 10).to(memory_format=torch.channels_last), batch_norm(6)

    def gradient(layout: torch.memory_format) -> Tensor:
        leaf, of_output = x.clone().requires_grad_(), normal(24, 6, 10, 10, seed=3).to(memory_format=layout)
        norm_relu(leaf, deepcopy(norm)).backward(of_output)  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        return leaf.grad

    expected = gradient(torch.channels_last)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(gradient(torch.contiguous_format), expected)


@compiled
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_over_batches(momentum: float | None) -> None:
    """Without a momentum they are the mean over all batches; the variance is that of a sample."""
    norms = [batch_norm(6, momentum) for _ in range(2)]
    for seed, size in enumerate((24, 24, 9)):
        x = 3 + normal(size, 6, 10, 10, seed=seed)
        norm_relu(x, norms[0])
        norms[1](x)
    for one, other in zip(norms[0].buffers(), norms[1].buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class NormReLU(nn.Module):
    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return norm_relu(x, self.norm)


@compiled
def test_statistics_are_taken_anew_as_torch_does_it() -> None:
    module = NormReLU(batch_norm(6))
    batches = [5 + 2 * normal(24, 6, 10, 10, seed=seed) for seed in range(3)]
    update_bn(batches, module)
    means = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    variances = torch.stack([batch.transpose(0, 1).flatten(1).var(1) for batch in batches]).mean(0)
    torch.testing.assert_close(module.norm.running_mean, means, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.norm.running_var, variances, rtol=1e-5, atol=1e-5)
    assert module.norm.momentum == 0.3


@compiled
def test_a_mean_far_from_zero_costs_no_digits() -> None:
    """A thousand standard deviations, of which the running statistics know nothing yet; away from the kink, on whose
    other side rounding puts a few values."""
    x, norm = 1000 + normal(24, 6, 10, 10), batch_norm(6)
    nn.init.constant_(norm.bias, 8)
    found, expected = computed(x, norm, fused=True), computed(x.double(), deepcopy(norm).double(), fused=False)
    assert expected["y"].min() > 1
    for name in ("running_var", "x", "weight", "bias"):
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-4, atol=1e-4 * scale, msg=name)
    torch.testing.assert_close(found["y"].double(), expected["y"], rtol=0, atol=5e-4)


@compiled
def test_a_channel_without_variance() -> None:
    x = normal(24, 6, 10, 10)
    x[:, 2] = 3.0
    found, expected = (computed(x, batch_norm(6), fused) for fused in (True, False))
    for name in ("y", "running_var"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
    assert all(value.isfinite().all() for value in found.values())


@compiled
def test_the_gradient_is_the_slope() -> None:
    """Of a weighted sum of the outputs, by differences in float64, through mean and variance of the batch."""
    x, norm, weights = normal(24, 6, 10, 10), batch_norm(6), normal(24, 6, 10, 10, seed=77)
    directions, step = normal(24, 6, 10, 10, seed=9).double(), 1e-6

    @torch.no_grad()
    def value(at: Tensor) -> float:
        return float((F.relu(deepcopy(norm).double()(at)) * weights).sum())

    slope = (value(x + step * directions) - value(x - step * directions)) / (2 * step)
    gradient = computed(x, norm, fused=True)["x"]
    assert float((gradient * directions).sum()) == pytest.approx(slope, rel=1e-5)
    assert abs(slope) > 1


@compiled
def test_kernels_are_compiled_once_for_all_shapes() -> None:
    """Also where sides are equal that were not, or were: a worker trains many networks."""
    norm_relu(normal(24, 6, 10, 10).requires_grad_(), batch_norm(6)).sum().backward()  # type: ignore[no-untyped-call]
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((6, 6, 6, 6), (8, 8, 4, 4), (9, 5, 5, 9), (4, 6, 6, 7), (3, 40, 2, 2)):
            found, expected = (computed(normal(*shape), batch_norm(shape[1]), fused) for fused in (True, False))
            torch.testing.assert_close(found["y"], expected["y"], rtol=1e-4, atol=1e-4)


WIDTHS = (16, 16, 16, 16, 16)


@pytest.mark.parametrize(
    ("in_channels", "groups", "widths", "expected"),
    [
        (64, 64, WIDTHS, 16),
        (64, 32, WIDTHS, 8),
        (64, 16, WIDTHS, 4),
        (64, 8, WIDTHS, 2),
        (64, 4, WIDTHS, 1),
        (64, 2, WIDTHS, 1),  # wider than any that was measured
        (64, 1, WIDTHS, 1),
        (64, 64, (), 1),
        (64, 64, (1, 2, 4, 8, 16), 1),
        (64, 64, (32, 2, 4, 8, 16), 32),
        (64, 32, (32, 2, 4, 8, 16), 1),
        (64, 4, (1, 2, 4, 8, 32), 2),
        (8, 8, WIDTHS, 8),  # never more than there are groups
        (3, 3, WIDTHS, 3),
        (96, 32, WIDTHS, 4),  # 3 channels a group count as 2: up to 16, so 5 groups, of which only 4 divide 32
        (60, 20, WIDTHS, 5),
        (42, 14, WIDTHS, 2),
        (15, 5, WIDTHS, 5),
        (35, 7, WIDTHS, 1),  # 5 a group: three would fit, but 7 is a prime
        (35, 7, (16, 16, 35), 7),
        (96, 8, WIDTHS, 1),  # 12 a group: two are too wide
        (96, 8, (16, 16, 16, 24), 2),
        (24, 2, (16, 16, 16, 4), 1),  # an aim below the own width
    ],
)
def test_how_many_groups_are_computed_as_one(
    in_channels: int, groups: int, widths: tuple[int, ...], expected: int
) -> None:
    assert groups_to_merge(in_channels, groups, widths) == expected


@pytest.mark.parametrize(
    ("conv", "merge"),
    [
        (nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), 4),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=True), 8),
        (nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4), 2),  # two outputs an input
        (nn.Conv2d(12, 6, (3, 1), padding=(2, 0), dilation=2, groups=6, bias=False), 3),  # fewer outputs than inputs
        (nn.Conv2d(15, 25, 1, stride=(1, 2), groups=5), 5),
        (nn.Conv2d(12, 4, 3, groups=4, bias=False), 1),
    ],
    ids=str,
)
def test_block_diagonal_is_the_grouped_convolution(conv: nn.Conv2d, merge: int) -> None:
    conv = conv.double()
    x = normal(3, conv.in_channels, 7, 9).double()
    results = []
    for compute in (conv, lambda at: block_diagonal(at, conv, merge)):
        conv.zero_grad()
        leaf = x.clone().requires_grad_()
        y = compute(leaf)
        y.backward(normal(*y.shape, seed=3).double())
        gradients = [parameter.grad for parameter in conv.parameters()]
        results.append([y.detach(), leaf.grad, *gradients])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# Networks and trainings that use them: here, since what one process compiles no other one has


@compiled
@pytest.mark.parametrize("space", [MIXED, RESIDUAL], ids=lambda space: str(space.name))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_fast_network_trains_as_a_plain_one(space: Macroarchitecture, layout: torch.memory_format) -> None:
    plain, fast = (randomized(space).to(memory_format=layout) for _ in range(2))
    fast.speed_up(True, (16, 16, 16, 16, 16))
    images = normal(16, *space.input_shape).to(memory_format=layout)
    assert torch.equal(fast(images), plain(images)), "in evaluation mode nothing is changed"
    expected, found = step(plain, images), step(fast, images)
    assert found.keys() == expected.keys()
    assert len(found) == 1 + len(list(plain.parameters())) + len(list(plain.buffers()))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-4, msg=name)
    assert not torch.equal(found["logits"], expected["logits"]), "it was computed in another way"
    fast.speed_up(False, ())
    assert torch.equal(fast(images), plain(images))


@pytest.fixture(scope="module")
def data() -> DataSet:
    return digits(200)


@compiled
def test_a_fast_training_is_a_function_of_its_seed(data: DataSet, tmp_path: Path) -> None:
    one, two, other = (
        Training(data, tmp_path / name, FAST)(seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert same(one, two)
    assert not same(one, other)


@compiled
@pytest.mark.parametrize("ended", [True, False])
def test_a_resumed_fast_training_equals_an_uninterrupted_one(data: DataSet, tmp_path: Path, ended: bool) -> None:
    """Cut off right after an epoch, and in the middle of the next one."""
    whole, cut = Training(data, tmp_path / "whole", FAST)(), Training(data, tmp_path / "cut", FAST)
    with pytest.raises(KeyboardInterrupt):
        cut(stopping(lambda progress: progress.epoch == 1 + (not ended) and progress.ended == ended))
    assert same(cut(), whole)


@pytest.mark.slow  # kernels are compiled for two threads
@compiled
def test_two_threads_are_reproducible_too(data: DataSet, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one, two, three = (Training(data, tmp_path / name, replace(FAST, threads=2))() for name in "abc")
    finally:
        torch.set_num_threads(before)
    assert same(one, two)
    assert same(one, three)


@compiled
def test_fused_norms_train_the_same_network(data: DataSet, tmp_path: Path) -> None:
    """Up to rounding, which a training enlarges: here over two steps in float32."""
    recipe = Recipe("r", 1, 100, 0.05, augmentation=Augmentation(0.1, 0.1, 15))
    plain, fast = (
        Training(data, tmp_path / name, numerics)(recipe=recipe)
        for name, numerics in (("plain", CPU), ("fast", replace(FAST, dtype="float32")))
    )
    assert not same(plain, fast)
    for name, tensor in plain.items():
        torch.testing.assert_close(fast[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
