"""The policy protocol: what a policy sees and what it returns. No torch, no Optuna.

A policy is a function of the past (docs/policy-protocol.md). It keeps no state that matters between calls, and its
random numbers come from ``(history.seed, history.number)``. So a resumed search suggests what an uninterrupted one
would have, and any number of workers can share one policy.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan
from fnet_search.base.errors import FnetError
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation, Probes


@dataclass(frozen=True)
class History:
    """The past of a search, as a policy sees it when suggestion `number` is asked for.

    `evaluations` holds every finished evaluation in order of numbers: complete, pruned, refused and failed ones, and
    the reference, but no final trainings. `running` holds the plans whose evaluations are still to come, `probes` what
    was measured before the first suggestion for policies that require it. Take random numbers from `rng` only.
    """

    space: Macroarchitecture
    constraints: Constraints = field(default_factory=Constraints)
    evaluations: tuple[Evaluation, ...] = ()
    running: tuple[FactorizationPlan, ...] = ()
    number: int = 0
    seed: int = 0
    probes: Probes | None = None

    @property
    def seen(self) -> frozenset[FactorizationPlan]:
        """Every plan suggested so far."""
        return frozenset([evaluation.plan for evaluation in self.evaluations]).union(self.running)

    def refusal(self, plan: FactorizationPlan) -> str:
        """Why a plan must not be trained: it breaks a ceiling or repeats another plan. Empty if it may be trained."""
        for evaluation in self.evaluations:
            if evaluation.plan == plan:
                return f"repeats candidate {evaluation.number}"
        if plan in self.running:
            return "repeats a plan that is being trained"
        return self.constraints.refusal(plan_cost(self.space, plan))

    @property
    def rng(self) -> np.random.Generator:
        """A fresh generator, the same at every access: a function of (seed, number)."""
        return np.random.default_rng((self.seed, self.number))


PROBES, FISHER = "probes", "fisher"
"""What a policy can require: `History.probes`, and Fisher scores in them."""


class Policy(Protocol):
    """Proposes the next plan.

    A policy that needs more than evaluations has an attribute `requires` with the names above, as in
    ``requires = frozenset({"probes"})``: the host measures them before the first suggestion. A policy that can explain
    a plan has a method ``explain(history, plan) -> Explanation``; runs show it for the winner.
    """

    def suggest(self, history: History) -> FactorizationPlan | None:
        """The next plan to train. None while plans are running: ask again when one ends. None otherwise: done."""
        ...


def requirements(policy: Policy) -> frozenset[str]:
    """What the policy requires in its history. Raises FnetError for an unknown requirement."""
    required = frozenset(getattr(policy, "requires", ()))
    if unsupported := required - {PROBES, FISHER}:
        names = ", ".join(sorted(unsupported))
        raise FnetError(f"policy {type(policy).__name__} requires {names}; known: probes, fisher")
    return required


def probes_of(history: History, policy: object) -> Probes:
    """The probes, for a policy that requires them. Raises FnetError if the host has not measured them."""
    if history.probes is None:
        raise FnetError(
            f"policy {type(policy).__name__} needs probes of a trained network; measure them with "
            "fnet_search.probes_for, and pass them as AskTell(probes=...) or History(probes=...)"
        )
    return history.probes
