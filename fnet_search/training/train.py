"""Trains one candidate. Every random number is a function of (seed, epoch), so on the CPU a training resumed from its
checkpoint gives bit for bit the network of an uninterrupted one."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from fnet_search.base.errors import FnetError
from fnet_search.policy.metric import MetricName, score
from fnet_search.training.datasets import DataSet, Split, affine_maps, augment
from fnet_search.training.network import Network
from fnet_search.training.numerics import Numerics
from fnet_search.training.recipe import Recipe
from fnet_search.training.weights import read_tensors, write_tensors


class TrainingFailed(Exception):  # noqa: N818 (reads as what happened; recorded, not shown as a bug)
    """A candidate could not be trained or quantized. The message, which says why, is recorded."""


@dataclass(frozen=True)
class TrainingProgress:
    """Progress of a candidate: in epoch `epoch` (from 1) of `epochs`, or, if `stage` is set, before or after the
    training."""

    epoch: int
    epochs: int
    ended: bool
    """Whether this epoch has just ended."""
    done: float
    """Share of the work done, 0 to 1: of the training, and once `candidates.evaluate` passes it on, of the
    evaluation."""
    loss: float | None
    """Mean of this epoch so far; None if reading it would stall a CUDA device."""
    accuracy: float | None
    """Score of the last finished epoch by the search's metric, a fraction of 1; None before."""
    split: str
    """Split on which `accuracy` was measured: ``validation``, or ``training`` if no images are held out."""
    stage: str = ""
    """The work before or after the training, as in ``measuring``."""


Report = Callable[[TrainingProgress], bool | None]
"""Receives the progress of a training; returning True at the end of an epoch stops it (successive
halving, or another process has taken the candidate over)."""


@dataclass(frozen=True)
class Trained:
    """The outcome of a training. `accuracies` has the score after each epoch, in the numerics of the training."""

    images: int
    """Images trained on, including the epochs before a resume."""
    accuracies: tuple[float, ...]
    stopped: bool = False
    """Whether `Report` stopped it before the last epoch."""


@dataclass(frozen=True)
class Checkpoint:
    """The file that a training writes after each epoch and resumes from. `key` identifies the training: a file of
    another one is ignored and overwritten."""

    path: Path
    key: str

    def save(self, network: Network, optimizer: torch.optim.SGD, accuracies: Sequence[float]) -> None:
        tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
        for name, parameter in network.named_parameters():
            momentum = optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{name}"] = momentum
        write_tensors(self.path, tensors, {"key": self.key, "accuracies": json.dumps(accuracies)})

    def resume(self, network: Network, optimizer: torch.optim.SGD) -> list[float]:
        """Restores network and optimizer, and returns the accuracies of the epochs already done. Without a usable
        checkpoint returns none: a broken one costs work, but is no error."""
        try:
            tensors, metadata = read_tensors(self.path)
        except FnetError:
            return []
        weights = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")}
        shapes, own = ({name: t.shape for name, t in state.items()} for state in (weights, network.state_dict()))
        if metadata.get("key") != self.key or shapes != own:
            return []
        network.load_state_dict(weights)
        for name, parameter in network.named_parameters():
            if (momentum := tensors.get(f"momentum.{name}")) is not None:
                optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
        accuracies: list[float] = json.loads(metadata["accuracies"])
        return accuracies


@dataclass(frozen=True)
class Watch:
    """The split and the metric of the score after each epoch."""

    split: Split
    metric: MetricName = "accuracy"


SETTLING = 1024
"""Training images for the final BatchNorm statistics (`settle`)."""
WATCHED = 2000
"""Images of the validation split used after an epoch, at most; the evaluation at the end uses all."""


def train(
    network: Network,
    data: DataSet,
    recipe: Recipe,
    numerics: Numerics,
    seed: int,
    report: Report,
    checkpoint: Checkpoint,
    watch: Watch | None = None,
) -> Trained:
    """Trains `network` in place.

    Resumes from `checkpoint` if it is one of this training, reporting its epochs again, and rewrites it after each
    epoch. Without `watch`, reports the accuracy on the training images. Raises TrainingFailed if the loss is not
    finite.
    """
    network.to(device=numerics.device, memory_format=numerics.memory_format)  # type: ignore[call-overload]
    network.speed_up(numerics.fused, numerics.group_widths)
    optimizer = _optimizer(network, recipe)
    count = recipe.images(len(data.train))
    steps = min(
        math.ceil(count / recipe.batch_size), count // 2
    )  # no batch of one image, which BatchNorm cannot normalise
    accuracies, weights = checkpoint.resume(network, optimizer), class_weights(data, recipe)
    split = "training" if watch is None else "validation"

    def ended(epoch: int, loss: float | None) -> bool:
        done, accuracy = (epoch + 1) / recipe.epochs, accuracies[epoch]
        stop = report(TrainingProgress(epoch + 1, recipe.epochs, True, done, loss, accuracy, split))
        return bool(stop) and epoch + 1 < recipe.epochs

    for epoch in range(len(accuracies)):
        if ended(epoch, None):
            return Trained((epoch + 1) * count, tuple(accuracies[: epoch + 1]), stopped=True)
    for epoch in range(len(accuracies), recipe.epochs):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(data.train), generator=generator)[:count].to(numerics.device)
        maps = affine_maps(len(order), data.train.images.shape[2:], recipe.augmentation, data.flips, generator)
        maps = maps.to(numerics.device)
        network.train()
        loss_sum = torch.zeros((), device=numerics.device)
        correct = torch.zeros((), dtype=torch.int64, device=numerics.device)
        for step, (chosen, theta) in enumerate(zip(order.tensor_split(steps), maps.tensor_split(steps), strict=True)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate_at(epoch * steps + step, steps)
            batch = data.train.take(chosen)
            images = augment(data.normalise(batch.images), theta).to(memory_format=numerics.memory_format)
            with numerics.arithmetic():
                logits = network(images)
                loss = _loss(logits.float(), batch.labels, recipe.label_smoothing, weights)
            optimizer.zero_grad(set_to_none=True)
            with numerics.arithmetic(autocast=False):
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss_sum += loss.detach()
            correct += (logits.argmax(1) == batch.labels).sum()
            if numerics.device == "cpu" or step % 20 == 0:  # on CUDA reading a value back would stall the device
                done = (epoch + (step + 1) / steps) / recipe.epochs
                mean = float(loss_sum) / (step + 1) if numerics.device == "cpu" else None
                last = accuracies[-1] if accuracies else None
                report(TrainingProgress(epoch + 1, recipe.epochs, False, done, mean, last, split))
        if not math.isfinite(float(loss_sum)):
            raise TrainingFailed(f"the loss was not finite in epoch {epoch + 1} of {recipe.epochs}")
        if epoch + 1 == recipe.epochs:
            settle(network, data, numerics, seed)
        on_training = float(correct) / count
        accuracies.append(
            on_training if watch is None else accuracy(network, data, watch.split, numerics, watch.metric)
        )
        checkpoint.save(network, optimizer, accuracies)
        if ended(epoch, float(loss_sum) / steps):
            return Trained((epoch + 1) * count, tuple(accuracies), stopped=True)
    return Trained(recipe.epochs * count, tuple(accuracies))


def class_weights(data: DataSet, recipe: Recipe) -> Tensor | None:
    """Loss weights of the classes, [classes] float32: N / (K n) for each of the K classes that have n > 0 of the N
    training images. None: all images have the same weight."""
    if recipe.class_weights == "none":
        return None
    counts = torch.bincount(data.train.labels, minlength=len(data.classes)).float()
    return (len(data.train) / (counts * (counts > 0).sum())).nan_to_num(posinf=0.0)


def _loss(logits: Tensor, labels: Tensor, smoothing: float, weights: Tensor | None) -> Tensor:
    """Mean cross entropy of a batch, each image's multiplied by the weight of its class."""
    if weights is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    return (weights[labels] * F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")).mean()


def _optimizer(network: Network, recipe: Recipe) -> torch.optim.SGD:
    """SGD with weight decay for weights only."""
    decayed = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    return torch.optim.SGD(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        fused=True,
    )


def settle(network: Network, data: DataSet, numerics: Numerics, seed: int) -> None:
    """Recomputes the BatchNorm statistics with the final weights, on random training images without augmentation.

    The running statistics lag behind the weights: after the few steps of a short training they are useless.
    """
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:SETTLING]
    images = data.train.images[chosen.to(numerics.device)].tensor_split(math.ceil(len(chosen) / 128))
    batches = (data.normalise(batch).to(memory_format=numerics.memory_format) for batch in images)
    with numerics.arithmetic():
        update_bn(batches, network)


@torch.no_grad()
def accuracy(
    network: nn.Module,
    data: DataSet,
    split: Split,
    numerics: Numerics,
    metric: MetricName = "accuracy",
    batch: int = 500,
) -> float:
    """The score by `metric` in the numerics of the training, on WATCHED evenly spaced images of a split at most; for
    progress reports and successive halving only."""
    network.eval()
    part = split.take(torch.arange(0, len(split), math.ceil(len(split) / WATCHED), device=numerics.device))
    images_of = torch.bincount(part.labels, minlength=len(data.classes))
    right_of = torch.zeros_like(images_of)
    for images, labels in part.batches(batch):
        with numerics.arithmetic():
            logits = network(data.normalise(images).to(memory_format=numerics.memory_format))
        right_of += torch.bincount(labels[logits.argmax(1) == labels], minlength=len(data.classes))
    return score(metric, zip(right_of.tolist(), images_of.tolist(), strict=True)) or 0.0
