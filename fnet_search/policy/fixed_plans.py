"""The policy of a run of given plans."""

from dataclasses import dataclass

from fnet_search.arch.plan import FactorizationPlan
from fnet_search.policy.protocol import History

FIXED_PLANS = "fixed plans"
"""What runs of given plans have as the name of their policy. They have no winner."""


@dataclass(frozen=True)
class FixedPlans:
    """The policy of a study of given plans: each once, in order."""

    plans: tuple[FactorizationPlan, ...]

    def suggest(self, history: History) -> FactorizationPlan | None:
        seen = history.seen
        return next((plan for plan in self.plans if plan not in seen), None)
