"""Progressive doubling (paper, section 3): one rate for all layers, doubled until every layer is depthwise."""

from dataclasses import dataclass

from fnet_search.arch.plan import FactorizationPlan, doublings, uniform
from fnet_search.policy.protocol import History


@dataclass(frozen=True)
class ProgressiveDoubling:
    """``f1`` (regular), ``f2``, ``f4``, ... to depthwise everywhere: the first plan that was not suggested yet.

    Suggests plans above the ceilings too; the host records them as refused.
    """

    def suggest(self, history: History) -> FactorizationPlan | None:
        plans = (uniform(history.space, rate) for rate in doublings(history.space))
        seen = history.seen
        return next((plan for plan in plans if plan not in seen), None)
