"""Greedy factorization by probes: always the change that costs least for what it saves."""

from collections.abc import Iterator
from dataclasses import dataclass

from fnet_search.arch.costs import cost_table, plan_cost
from fnet_search.arch.plan import FactorizationPlan, legal_rates, make_plan
from fnet_search.policy.evaluation import Probes
from fnet_search.policy.protocol import PROBES, History, probes_of


@dataclass(frozen=True)
class Greedy:
    """From the probed network, step by step the change of one layer's rate with the least increase of the quint8 loss
    per MAC saved, by the probes; the first plan of these steps under the ceilings that was not suggested yet.

    Every rate that saves MACs is a step (they are not monotone in the rate). None at the end of the way.
    """

    requires = frozenset({PROBES})

    def suggest(self, history: History) -> FactorizationPlan | None:
        space, seen = history.space, history.seen
        for plan in _steps(history, probes_of(history, self)):
            if plan not in seen and not history.constraints.refusal(plan_cost(space, plan)):
                return plan
        return None


def _steps(history: History, probes: Probes) -> Iterator[FactorizationPlan]:
    loss = probes.increase(history.space, lambda one: one.quint8_loss)
    costs = {layer: [cost.conv_macs for cost in of] for layer, of in cost_table(history.space).by_layer.items()}
    rates = legal_rates(history.space)
    chosen = {layer: rates[layer].index(rate) for layer, rate in probes.plan.rates}
    while True:
        yield make_plan(history.space, {layer: rates[layer][index] for layer, index in chosen.items()})
        steps = [
            ((loss[layer][new] - loss[layer][old]) / (costs[layer][old] - costs[layer][new]), layer, new)
            for layer, old in chosen.items()
            for new in range(len(rates[layer]))
            if costs[layer][new] < costs[layer][old]
        ]
        if not steps:
            return
        _, layer, new = min(steps)
        chosen[layer] = new
