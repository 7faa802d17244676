"""Reverse pyramids (paper, Figure 3): the rate grows with the input depth of the layer."""

from dataclasses import dataclass

from fnet_search.arch.plan import FactorizationPlan, initial_rates, reverse_pyramid
from fnet_search.policy.protocol import History


@dataclass(frozen=True)
class ReversePyramid:
    """``init1``, ``init2``, ``init4``, ...: the first plan that was not suggested yet.

    Suggests plans above the ceilings too; the host records them as refused.
    """

    def suggest(self, history: History) -> FactorizationPlan | None:
        plans = (reverse_pyramid(history.space, rate) for rate in initial_rates(history.space))
        seen = history.seen
        return next((plan for plan in plans if plan not in seen), None)
