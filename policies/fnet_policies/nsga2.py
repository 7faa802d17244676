"""Optuna's NSGA-II over the rate indices, kept under the ceilings."""

from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import NSGAIISampler
from optuna.trial import create_trial

from fnet_search.choose import sample_plan
from fnet_search.plan import FactorizationPlan, from_indices, indices, legal_rates, plan_cost
from fnet_search.policy import Evaluation, History


@dataclass(frozen=True)
class NSGA2:
    """A genetic algorithm maximising quint8 accuracy: Optuna's ``NSGAIISampler``, with a `population` smaller than its
    50, since trainings are dear.

    The first generation is uniform under the ceilings. Then parents are selected, crossed and mutated by Optuna; the
    first of so many `proposals` that is unseen and under the ceilings is suggested, or else a plan drawn uniformly from
    those that are. None if there is none left. Running plans do not count yet.
    """

    population: int = 8
    proposals: int = 32

    def suggest(self, history: History) -> FactorizationPlan | None:
        space, constraints, seen, rng = history.space, history.constraints, history.seen, history.rng
        trained = [one for one in history.evaluations if one.quint8_accuracy is not None and one.role == "candidate"]
        if len(trained) >= self.population:
            study = self._study(history, trained, int(rng.integers(2**31)))
            for _ in range(self.proposals):
                proposed = study.ask(_distributions(history)).params
                plan = from_indices(space, tuple(proposed[layer] for layer in legal_rates(space)))
                if plan not in seen and not constraints.refusal(plan_cost(space, plan)):
                    return plan
        return sample_plan(space, constraints, seen, rng)

    def _study(self, history: History, trained: list[Evaluation], seed: int) -> optuna.Study:
        """The trained plans as a study in memory, `population` of them a generation, in order."""
        sampler = NSGAIISampler(population_size=self.population, seed=seed)
        before = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        optuna.logging.set_verbosity(before)
        for place, one in enumerate(trained):
            study.add_trial(
                create_trial(
                    value=one.quint8_accuracy,
                    params=dict(zip(legal_rates(history.space), indices(history.space, one.plan), strict=True)),
                    distributions=_distributions(history),
                    system_attrs={sampler._get_generation_key(): place // self.population},
                    constraints={name: max(0.0, value) for name, value in history.constraints.of(one).items()},
                )
            )
        return study


def _distributions(history: History) -> dict[str, BaseDistribution]:
    return {layer: IntDistribution(0, len(rates) - 1) for layer, rates in legal_rates(history.space).items()}
