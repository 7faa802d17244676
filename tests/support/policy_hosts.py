"""A host for policies: the smallest loop around `suggest`, with accuracies from a formula instead of training."""

from itertools import product

import numpy as np

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan, from_indices, indices, legal_rates
from fnet_search.importing.spaces import load_space
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.protocol import History, Policy

TINY = load_space("tiny")
GAP = load_space("factorizenet-gap")


def every_plan(space: Macroarchitecture, constraints: Constraints) -> set[FactorizationPlan]:
    """All plans under the ceilings."""
    plans = (from_indices(space, chosen) for chosen in product(*map(range, map(len, legal_rates(space).values()))))
    return {plan for plan in plans if not constraints.refusal(plan_cost(space, plan))}


def evaluate(space: Macroarchitecture, plan: FactorizationPlan, number: int, constraints: Constraints) -> Evaluation:
    """Refused over the ceilings; else each layer costs accuracy as it is factorized, the middle ones most."""
    cost = plan_cost(space, plan)
    if reason := constraints.refusal(cost):
        return Evaluation(number, plan, cost, "refused", reason)
    deepest = np.array([len(rates) - 1 for rates in legal_rates(space).values()])
    weights = np.hanning(len(deepest) + 2)[1:-1]
    loss = float((weights * np.array(indices(space, plan)) / deepest).sum() / weights.sum())
    return Evaluation(number, plan, cost, fp32_accuracy=0.95 - 0.1 * loss, quint8_accuracy=0.9 - 0.2 * loss)


def run(
    policy: Policy, space: Macroarchitecture, constraints: Constraints, trials: int = 1000, seed: int = 0
) -> list[Evaluation]:
    """What one worker records until the policy is done, or after so many suggestions."""
    past: list[Evaluation] = []
    while len(past) < trials:
        plan = policy.suggest(History(space, constraints, tuple(past), number=len(past), seed=seed))
        if plan is None:
            break
        past.append(evaluate(space, plan, len(past), constraints))
    return past
