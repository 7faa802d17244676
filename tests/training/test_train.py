from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import BatchNorm, Conv, Dense, Flatten
from fnet_search.arch.plan import parse_plan
from fnet_search.training.datasets import DataSet, Split
from fnet_search.training.network import Network, build
from fnet_search.training.numerics import Numerics
from fnet_search.training.recipe import Augmentation, Recipe
from fnet_search.training.train import (
    Checkpoint,
    Trained,
    TrainingFailed,
    TrainingProgress,
    Watch,
    accuracy,
    class_weights,
    train,
)
from tests.support.networks import CPU, digits, sequence
from tests.support.training import RECIPE, TINY, Training, same, silent, stopping

Whole = tuple[dict[str, Tensor], Trained]
NUMERICS = [CPU, Numerics("cpu", "bfloat16", channels_last=True)]
"""`test_kernels` has trainings with kernels that are compiled."""


@pytest.fixture(scope="module")
def data() -> DataSet:
    return digits(200)


@pytest.fixture(scope="module")
def whole(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A training that nothing interrupted: its network and what it came to."""
    training = Training(data, tmp_path_factory.mktemp("whole") / "c")
    return training(), training.trained


@pytest.mark.parametrize("numerics", NUMERICS, ids=["plain", "bfloat16"])
def test_a_training_is_a_function_of_its_seed(data: DataSet, tmp_path: Path, numerics: Numerics) -> None:
    one, two, other = (
        Training(data, tmp_path / name, numerics)(seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert same(one, two)
    assert not same(one, other)


def test_norms_end_with_the_statistics_of_the_training_images_at_rest(data: DataSet, tmp_path: Path) -> None:
    """Not with running averages, which lag behind the weights: of 200 images all are taken, as they are."""
    state = Training(data, tmp_path / "checkpoint")()
    network = build(TINY, RECIPE.initializer, 0)
    network.load_state_dict(state)
    batches = data.normalise(data.train.images)[
        torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    ].tensor_split(2)
    with torch.no_grad():
        outputs = [network.layer("conv_in")(batch) for batch in batches]
    mean = torch.stack([output.mean((0, 2, 3)) for output in outputs]).mean(0)
    variance = torch.stack([output.transpose(0, 1).flatten(1).var(1) for output in outputs]).mean(0)
    norm = network.layer("conv_in.bn")
    torch.testing.assert_close(norm.get_buffer("running_mean"), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.get_buffer("running_var"), variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("numerics", NUMERICS, ids=["plain", "bfloat16"])
@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("ended", [True, False])
def test_a_resumed_training_equals_an_uninterrupted_one(
    data: DataSet, tmp_path: Path, numerics: Numerics, epoch: int, ended: bool
) -> None:
    """Cut off right after an epoch, and in the middle of the next one."""
    whole = Training(data, tmp_path / "whole", numerics)()
    cut = Training(data, tmp_path / "cut", numerics)
    with pytest.raises(KeyboardInterrupt):
        cut(stopping(lambda progress: progress.epoch == epoch + (not ended) and progress.ended == ended))
    seen: list[TrainingProgress] = []
    assert same(cut(seen.append), whole)
    assert [progress.epoch for progress in seen if progress.ended] == list(range(1, RECIPE.epochs + 1))
    assert {progress.epoch for progress in seen if not progress.ended} == set(range(epoch + 1, RECIPE.epochs + 1))


@pytest.mark.parametrize("watched", [False, True])
def test_what_a_resumed_training_had_reached_is_reported_again(data: DataSet, tmp_path: Path, watched: bool) -> None:
    """The accuracies of its epochs, but not their losses."""
    whole, cut = (Training(data, tmp_path / name, watched=watched) for name in ("whole", "cut"))
    first, resumed = list[TrainingProgress](), list[TrainingProgress]()
    whole(first.append)
    with pytest.raises(KeyboardInterrupt):
        cut(stopping(lambda progress: progress.epoch == 2 and progress.ended))
    cut(resumed.append)
    earlier = [replace(progress, loss=None) for progress in first if progress.ended and progress.epoch < 3]
    assert resumed == earlier + [progress for progress in first if progress.epoch == 3]
    assert cut.trained == whole.trained
    assert {progress.split for progress in resumed} == {"validation" if watched else "training"}


def test_a_finished_training_is_not_done_again(data: DataSet, tmp_path: Path) -> None:
    training = Training(data, tmp_path / "c")
    whole, trained = training(), training.trained
    seen: list[TrainingProgress] = []
    assert same(training(seen.append), whole)
    assert [(progress.epoch, progress.ended) for progress in seen] == [(1, True), (2, True), (3, True)]
    assert training.trained == trained


def test_what_a_training_comes_to(data: DataSet, tmp_path: Path) -> None:
    training, seen = Training(data, tmp_path / "c"), list[TrainingProgress]()
    training(seen.append)
    assert (training.trained.images, training.trained.stopped) == (3 * 200, False)
    assert training.trained.accuracies == tuple(progress.accuracy for progress in seen if progress.ended)
    assert len(set(training.trained.accuracies)) == 3


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_training_is_stopped_at_the_end_of_an_epoch(data: DataSet, whole: Whole, tmp_path: Path, epoch: int) -> None:
    """Without what comes at the end of a whole one; a verdict within an epoch counts for nothing."""
    (expected, trained), cut = whole, Training(data, tmp_path / "cut")
    seen: list[TrainingProgress] = []

    def report(progress: TrainingProgress) -> bool:
        seen.append(progress)
        return not progress.ended or progress.epoch >= epoch

    stopped = cut(report)
    assert cut.trained == Trained(epoch * 200, trained.accuracies[:epoch], stopped=True)
    assert (seen[-1].epoch, seen[-1].ended) == (epoch, True)

    seen.clear()
    again = cut(report)
    assert [(progress.epoch, progress.ended) for progress in seen] == [(number, True) for number in range(1, epoch + 1)]
    assert cut.trained == Trained(epoch * 200, trained.accuracies[:epoch], stopped=True)
    assert same(again, stopped)

    network = cut(silent)  # the verdict may be another one by now
    assert cut.trained == trained
    assert same(network, expected)


def test_a_training_is_stopped_earlier_than_it_had_come(data: DataSet, tmp_path: Path) -> None:
    """What was trained beyond counts for nothing."""
    training = Training(data, tmp_path / "c")
    training()
    accuracies = training.trained.accuracies
    training(lambda progress: progress.epoch == 1)
    assert training.trained == Trained(200, accuracies[:1], stopped=True)


def test_a_verdict_at_the_last_epoch_comes_too_late(data: DataSet, whole: Whole, tmp_path: Path) -> None:
    (expected, trained), late = whole, Training(data, tmp_path / "late")
    for _ in range(2):
        assert same(late(lambda progress: progress.epoch == 3), expected)
        assert late.trained == trained
        assert not late.trained.stopped


def test_checkpoints_of_another_training_are_ignored(data: DataSet, whole: Whole, tmp_path: Path) -> None:
    training = Training(data, tmp_path / "c")
    with pytest.raises(KeyboardInterrupt):
        training(stopping(lambda progress: progress.ended), replace(RECIPE, learning_rate=0.01), key="another")
    assert same(training(), whole[0])


@pytest.mark.parametrize("length", [0, 7, 300, -1])
def test_broken_checkpoints_are_ignored(data: DataSet, whole: Whole, tmp_path: Path, length: int) -> None:
    training = Training(data, tmp_path / "c")
    with pytest.raises(KeyboardInterrupt):
        training(stopping(lambda progress: progress.ended))
    training.checkpoint.write_bytes(training.checkpoint.read_bytes()[:length])
    assert same(training(), whole[0])


def test_a_checkpoint_of_another_network_is_ignored(data: DataSet, whole: Whole, tmp_path: Path) -> None:
    other = build(factorize(TINY, parse_plan(TINY, "dws")), "he_normal", 0)
    train(other, data, RECIPE, CPU, 0, silent, Checkpoint(tmp_path / "c", "k"))
    assert same(Training(data, tmp_path / "c")(), whole[0])


def test_a_loss_that_is_not_finite_ends_the_training(data: DataSet, tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="the loss was not finite in epoch 1 of 3"):
        Training(data, tmp_path / "c")(recipe=replace(RECIPE, learning_rate=1e30))
    assert not (tmp_path / "c").exists()


def test_it_learns(tmp_path: Path) -> None:
    data = digits(1000)
    recipe = Recipe("r", 6, 32, 0.1, augmentation=Augmentation(shift=0.05))
    network = build(TINY, "glorot_uniform", 0)
    seen: list[TrainingProgress] = []
    train(network, data, recipe, CPU, 0, seen.append, Checkpoint(tmp_path / "c", "k"), Watch(data.evaluation))
    with torch.no_grad():
        logits = network.eval()(data.normalise(data.evaluation.images))
    accuracy = float((logits.argmax(1) == data.evaluation.labels).float().mean())
    assert accuracy > 0.7
    assert seen[-1].accuracy == pytest.approx(accuracy)
    assert seen[-1].split == "validation"


def test_what_is_reported(data: DataSet, tmp_path: Path) -> None:
    seen: list[TrainingProgress] = []
    Training(data, tmp_path / "c")(seen.append)
    steps = 4
    assert [progress.done for progress in seen if not progress.ended] == pytest.approx(
        [(step + 1) / (3 * steps) for step in range(3 * steps)]
    )
    ends = [progress for progress in seen if progress.ended]
    assert [(progress.epoch, progress.epochs, progress.done) for progress in ends] == [
        (1, 3, 1 / 3),
        (2, 3, 2 / 3),
        (3, 3, 1),
    ]
    assert {progress.split for progress in seen} == {"training"}
    assert [progress.accuracy for progress in seen[:steps]] == [None] * steps
    assert all(progress.accuracy == ends[0].accuracy for progress in seen[steps : 2 * steps])
    losses = [progress.loss for progress in seen if progress.loss is not None]
    assert len(losses) == len(seen)
    assert 0 < losses[-1] < losses[steps]


def one_dense() -> Network:
    return build(sequence((3, 8, 8), f=Flatten(), d=Dense(10)), "glorot_uniform", 0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_two_steps_by_hand(tmp_path: Path, nesterov: bool) -> None:
    """SGD with momentum (buf = m buf + g; nesterov steps by g + m buf) on a smoothed loss; biases do not decay."""
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(40) % 10)
    data = DataSet("d", tuple("0123456789"), split, split, split, (0.5,) * 3, (0.3,) * 3, True)
    recipe = Recipe(
        "r", 2, 40, 0.2, 0.8, nesterov, weight_decay=0.1, label_smoothing=0.2, schedule="steps", milestones=(1,)
    )
    network = one_dense()
    train(network, data, recipe, CPU, 0, silent, Checkpoint(tmp_path / "c", "k"))

    layer = one_dense().layer("d")
    values = [layer.get_parameter(name).detach().double() for name in ("weight", "bias")]
    moments = [torch.zeros_like(value) for value in values]
    x = data.normalise(images).flatten(1).double()
    targets = 0.8 * F.one_hot(split.labels, 10) + 0.2 / 10
    for rate in (0.2, 0.02):
        error = (torch.softmax(x @ values[0].T + values[1], 1) - targets) / 40
        gradients = [error.T @ x + 0.1 * values[0], error.sum(0)]
        moments = [0.8 * moment + gradient for moment, gradient in zip(moments, gradients, strict=True)]
        steps = [g + 0.8 * m if nesterov else m for g, m in zip(gradients, moments, strict=True)]
        values = [value - rate * step for value, step in zip(values, steps, strict=True)]
    for name, value in zip(("weight", "bias"), values, strict=True):
        torch.testing.assert_close(
            network.layer("d").get_parameter(name).detach().double(), value, rtol=1e-4, atol=1e-6
        )


def test_every_image_is_seen_once_an_epoch(tmp_path: Path) -> None:
    """With a tiny rate and no momentum the step of an epoch is the sum over all images, in whatever order."""
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(30) % 10)
    data = DataSet("d", tuple("0123456789"), split, split, split, (0.5,) * 3, (0.3,) * 3, True)
    moved = []
    for batch in (30, 10):
        network = one_dense()
        before = network.layer("d").get_parameter("weight").detach().clone().double()
        recipe = Recipe("r", 1, batch, 1e-3 * batch / 30, 0.0, schedule="steps")
        train(network, data, recipe, CPU, 0, silent, Checkpoint(tmp_path / str(batch), "k"))
        moved.append(network.layer("d").get_parameter("weight").detach().double() - before)
    assert moved[0].abs().max() > 1e-4
    torch.testing.assert_close(moved[1], moved[0], rtol=0.05, atol=2e-6)


def test_every_epoch_has_draws_of_its_own(data: DataSet, tmp_path: Path) -> None:
    """With a rate of nearly nothing only the draws can change the loss of a batch."""
    seen: list[TrainingProgress] = []
    for name, changes in (("order", Augmentation()), ("images", Augmentation(shift=0.2))):
        recipe = replace(RECIPE, learning_rate=1e-20, batch_size=50 if name == "order" else 200, augmentation=changes)
        Training(data, tmp_path / name)(seen.append, recipe)
        first_steps = [now.loss for now, last in zip(seen, [None, *seen], strict=False) if not last or last.ended]
        assert len({round(loss or 0, 4) for loss in first_steps}) == RECIPE.epochs
        seen.clear()


@pytest.mark.parametrize("images", [2, 3, 5, 33])
def test_no_batch_holds_one_image(tmp_path: Path, images: int) -> None:
    """Batch normalisation of vectors fails on a single image."""
    space = sequence((3, 4, 4), c=Conv(4), f=Flatten(), n=BatchNorm(), d=Dense(2))
    split = Split(torch.zeros(images, 3, 4, 4, dtype=torch.uint8), torch.arange(images) % 2)
    data = DataSet("d", ("a", "b"), split, split, split, (0.5,) * 3, (0.3,) * 3, True)
    recipe = Recipe("r", 1, 2 if images < 33 else 32, 0.01)
    found = train(build(space, "he_normal", 0), data, recipe, CPU, 0, silent, Checkpoint(tmp_path / "c", "k"))
    assert found.images == images


@pytest.mark.parametrize(
    ("images", "step"), [(1, 1), (1999, 1), (2000, 1), (2001, 2), (4000, 2), (4001, 3), (5000, 3), (7000, 4)]
)
def test_an_even_part_of_a_split_is_watched(images: int, step: int) -> None:
    """At most 2,000 images. This network always says 3, which is right for those that are looked at, but the first."""
    network = one_dense()
    with torch.no_grad():
        network.layer("d").get_parameter("weight").zero_()
        network.layer("d").get_parameter("bias").copy_(torch.arange(10) == 3)
    labels = torch.where(torch.arange(images) % step == 0, 3, 4)
    labels[0] = 4
    split = Split(torch.zeros(images, 3, 8, 8, dtype=torch.uint8), labels)
    data = DataSet("d", tuple("0123456789"), split, split, split, (0.5,) * 3, (0.3,) * 3, True)
    looked_at = len(range(0, images, step))
    assert looked_at <= 2000
    assert accuracy(network, data, split, CPU) == (looked_at - 1) / looked_at
    balanced = 0.5 if looked_at > 1 else 0.0  # all of class 3, none of class 4, which the first image is of
    assert accuracy(network, data, split, CPU, "balanced-accuracy") == balanced


def uneven() -> DataSet:
    """40 images of class 0, 8 of class 1, none of class 2."""
    images = torch.randint(0, 256, (48, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = Split(images, torch.tensor([0] * 40 + [1] * 8))
    return DataSet("d", ("a", "b", "c"), split, split, split, (0.5,) * 3, (0.3,) * 3, True)


def test_class_weights_make_classes_count_alike_and_images_once_on_average() -> None:
    data, recipe = uneven(), Recipe("r", 1, 16, 0.05, class_weights="balanced")
    weights = class_weights(data, recipe)
    assert weights is not None
    assert weights.tolist() == pytest.approx([48 / (2 * 40), 48 / (2 * 8), 0])
    assert float(weights[data.train.labels].mean()) == pytest.approx(1)
    assert class_weights(data, replace(recipe, class_weights="none")) is None


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_images_each_times_the_weight_of_its_class(tmp_path: Path, smoothing: float) -> None:
    """One step over all images at once: the gradient is that of the loss as it is written here."""
    data = uneven()
    recipe = Recipe("r", 1, 48, 1.0, momentum=0.0, schedule="steps", label_smoothing=smoothing)
    space = sequence((3, 8, 8), f=Flatten(), d=Dense(3))
    for weighting, of_class in (("none", (1, 1)), ("balanced", (48 / 80, 48 / 16))):
        before, after = (build(space, "he_normal", 0) for _ in range(2))
        chosen = replace(recipe, class_weights=weighting)
        train(after, data, chosen, CPU, 0, silent, Checkpoint(tmp_path / weighting, "k"))
        log_p = before(data.normalise(data.train.images)).log_softmax(1)
        wanted = torch.full((48, 3), smoothing / 3)
        wanted[torch.arange(48), data.train.labels] += 1 - smoothing
        each = torch.tensor([of_class[label] for label in data.train.labels.tolist()])
        (-(log_p * wanted).sum(1) * each).mean().backward()
        for (_, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
            assert old.grad is not None
            torch.testing.assert_close(new.data, old.data - old.grad, rtol=1e-4, atol=1e-5)
