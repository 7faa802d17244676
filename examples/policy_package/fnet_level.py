"""A policy of one's own: all layers sink to a common level of MACs."""

from fnet_search import FactorizationPlan, History
from fnet_search.arch.costs import cost_table
from fnet_search.arch.plan import legal_rates, make_plan


class Level:
    """Each layer has its lowest rate that costs no more conv MACs than a level; the level sinks from plan to plan.

    So the layers that cost most are factorized first. It keeps no state: the first such plan that is not in the history
    and within the constraints is next.
    """

    def suggest(self, history: History) -> FactorizationPlan | None:
        space = history.space
        macs = {
            layer: {rate: cost.conv_macs for rate, cost in zip(legal_rates(space)[layer], costs, strict=True)}
            for layer, costs in cost_table(space).by_layer.items()
        }
        for level in sorted({cost for by_rate in macs.values() for cost in by_rate.values()}, reverse=True):
            rates = {
                layer: next((rate for rate, cost in by_rate.items() if cost <= level), min(by_rate, key=by_rate.get))
                for layer, by_rate in macs.items()
            }
            plan = make_plan(space, rates)
            if not history.refusal(plan):
                return plan
        return None
