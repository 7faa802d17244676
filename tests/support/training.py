"""Short trainings of the tiny space on 200 digits."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fnet_search.importing.spaces import load_space
from fnet_search.training.datasets import DataSet
from fnet_search.training.network import Network, build
from fnet_search.training.numerics import Numerics
from fnet_search.training.recipe import Augmentation, Recipe
from fnet_search.training.train import Checkpoint, Report, Trained, TrainingProgress, Watch, train
from tests.support.networks import CPU, normal

TINY = load_space("tiny")
RECIPE = Recipe(
    "test", 3, 64, 0.05, nesterov=True, weight_decay=5e-4, augmentation=Augmentation(0.1, 0.1, 15, True, True)
)


def silent(progress: TrainingProgress) -> None:
    pass


class Training:
    """Trainings that share a checkpoint; each starts with a new network."""

    def __init__(self, data: DataSet, checkpoint: Path, numerics: Numerics = CPU, watched: bool = False) -> None:
        self.data, self.checkpoint, self.numerics, self.watched = data, checkpoint, numerics, watched
        self.trained = Trained(0, ())

    def __call__(
        self, report: Report = silent, recipe: Recipe = RECIPE, seed: int = 0, key: str = "k"
    ) -> dict[str, Tensor]:
        network = build(TINY, recipe.initializer, seed)
        watch = Watch(self.data.evaluation) if self.watched else None
        checkpoint = Checkpoint(self.checkpoint, key)
        self.trained = train(network, self.data, recipe, self.numerics, seed, report, checkpoint, watch)
        return network.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def stopping(when: Callable[[TrainingProgress], bool]) -> Report:
    def report(progress: TrainingProgress) -> None:
        if when(progress):
            raise KeyboardInterrupt

    return report


def step(network: Network, images: Tensor) -> dict[str, Tensor]:
    """Logits of a step in training mode, its gradients, and statistics after it."""
    logits = network.train()(images)
    (logits * normal(*logits.shape, seed=3)).sum().backward()
    found = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    return {"logits": logits.detach()} | found | dict(network.named_buffers())
