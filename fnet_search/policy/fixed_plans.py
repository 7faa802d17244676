"""The policy of a run of given plans."""

from dataclasses import dataclass

from fnet_search.arch.plan import FactorizationPlan
from fnet_search.policy.protocol import History

FIXED_PLANS = "fixed plans"
"""Name of the policy in runs of given plans. Such runs have no winner."""


@dataclass(frozen=True)
class FixedPlans:
    """Suggests each of the given plans once, in order."""

    plans: tuple[FactorizationPlan, ...]

    def suggest(self, history: History) -> FactorizationPlan | None:
        seen = history.seen
        return next((plan for plan in self.plans if plan not in seen), None)
