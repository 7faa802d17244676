"""Fisher scores at initialisation, without training (BlockSwap, arXiv:1906.04113)."""

from dataclasses import dataclass

from fnet_search.arch.plan import FactorizationPlan
from fnet_search.policy.exact_choice import best_plan
from fnet_search.policy.protocol import FISHER, PROBES, History, probes_of


@dataclass(frozen=True)
class Fisher:
    """The unseen plan under the ceilings with the highest Fisher score; None if there is none left.

    The score of a plan is the sum over layers of what each one's rate alone adds to the score of a freshly initialised
    network on one minibatch. So the maximum is exact, where BlockSwap takes the best of a thousand random networks.
    """

    requires = frozenset({PROBES, FISHER})

    def suggest(self, history: History) -> FactorizationPlan | None:
        scores = probes_of(history, self).increase(history.space, lambda probe: probe.fisher or 0.0)
        return best_plan(history.space, history.constraints, scores, history.seen)
