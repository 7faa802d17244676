"""Random search: the baseline for every other policy."""

from dataclasses import dataclass

from fnet_search.arch.plan import FactorizationPlan
from fnet_search.policy.exact_choice import sample_plan
from fnet_search.policy.protocol import History


@dataclass(frozen=True)
class Random:
    """A plan under the ceilings that was not suggested yet, drawn uniformly with ``history.rng``; None if none is
    left."""

    def suggest(self, history: History) -> FactorizationPlan | None:
        return sample_plan(history.space, history.constraints, history.seen, history.rng)
