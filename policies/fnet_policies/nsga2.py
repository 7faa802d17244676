"""Optuna's NSGA-II over the rate indices, kept under the ceilings."""

from collections.abc import Callable
from dataclasses import dataclass

from optuna.samplers import BaseSampler, NSGAIISampler

from fnet_search.optuna_bridge.sampler_policy import SamplerPolicy

POPULATION = 8
"""Smaller than Optuna's 50, since trainings are dear."""


def _sampler(seed: int) -> NSGAIISampler:
    return NSGAIISampler(population_size=POPULATION, seed=seed)


@dataclass(frozen=True)
class NSGA2(SamplerPolicy):
    """A genetic algorithm maximising quint8 accuracy: Optuna's ``NSGAIISampler``.

    The first generation is uniform under the ceilings. Then parents are selected, crossed and mutated by Optuna.
    """

    sampler: Callable[..., BaseSampler] = _sampler
    startup: int = POPULATION
