"""Candidates of the tiny space on few digits, evaluated in the test's own process."""

from pathlib import Path

import torch

from fnet_search.arch.plan import parse_plan
from fnet_search.candidates.evaluate import evaluate
from fnet_search.candidates.job import Job, Setup
from fnet_search.importing.spaces import load_space
from fnet_search.quant.scheme import PAPER
from fnet_search.training.datasets import DataSet
from fnet_search.training.recipe import Augmentation, Recipe
from fnet_search.training.train import TrainingProgress
from fnet_search.training.weights import read_tensors
from tests.support.networks import CPU

TINY = load_space("tiny")
PLAN = parse_plan(TINY, "f2")
REGULAR = parse_plan(TINY, "regular")
RECIPE = Recipe("test", 3, 32, 0.1, weight_decay=5e-4, augmentation=Augmentation(shift=0.05))
SETUP = Setup(TINY, RECIPE, (PAPER,), CPU, 7, "validation")


def silent(progress: TrainingProgress) -> None:
    pass


class Outcome:
    """An evaluation, its folder, and what was reported on the way."""

    def __init__(self, data: DataSet, folder: Path, setup: Setup = SETUP, job: Job | None = None) -> None:
        self.folder, self.seen = folder, list[TrainingProgress]()
        self.evaluation = evaluate(setup, data, job or Job(12, PLAN, folder), self.seen.append)


def same_tensors(one: Path, other: Path) -> bool:
    """Files may differ: safetensors writes metadata in any order."""
    (tensors, metadata), (others, other_metadata) = read_tensors(one), read_tensors(other)
    assert (tensors.keys(), metadata) == (others.keys(), other_metadata)
    return all(torch.equal(tensors[name], others[name]) for name in tensors)
