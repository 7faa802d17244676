"""Optuna's NSGA-II over the rate indices, kept under the ceilings."""

from collections.abc import Callable
from dataclasses import dataclass

from optuna.samplers import BaseSampler, NSGAIISampler

from fnet_search.optuna_bridge.sampler_policy import SamplerPolicy

POPULATION = 8
"""Smaller than Optuna's 50, because trainings are expensive."""


def _sampler(seed: int) -> NSGAIISampler:
    return NSGAIISampler(population_size=POPULATION, seed=seed)


@dataclass(frozen=True)
class NSGA2(SamplerPolicy):
    """A genetic algorithm maximising quint8 accuracy: Optuna's ``NSGAIISampler``.

    The first generation is drawn uniformly under the ceilings. Then Optuna selects, crosses and mutates parents.
    """

    sampler: Callable[..., BaseSampler] = _sampler
    startup: int = POPULATION
