"""Greedy factorization by probes: each step takes the change that costs least per MAC saved."""

from collections.abc import Iterator
from dataclasses import dataclass

from fnet_search.arch.costs import cost_table, plan_cost
from fnet_search.arch.plan import FactorizationPlan, legal_rates, make_plan
from fnet_search.policy.evaluation import Probes
from fnet_search.policy.protocol import PROBES, History, probes_of


@dataclass(frozen=True)
class Greedy:
    """Starts from the probed network. Each step changes one layer's rate: the change with the least increase of the
    probed quint8 loss per MAC saved. Suggests the first plan on this path that is under the ceilings and unseen.

    Any rate that saves MACs is a possible change (MACs are not monotone in the rate). None at the end of the path.
    """

    requires = frozenset({PROBES})

    def suggest(self, history: History) -> FactorizationPlan | None:
        space, seen = history.space, history.seen
        for plan in _path(history, probes_of(history, self)):
            if plan not in seen and not history.constraints.refusal(plan_cost(space, plan)):
                return plan
        return None


def _path(history: History, probes: Probes) -> Iterator[FactorizationPlan]:
    """The plans from the probed one on, each one change after the other."""
    loss = probes.increase(history.space, lambda probe: probe.quint8_loss)
    costs = {
        layer: [cost.conv_macs for cost in at_rates] for layer, at_rates in cost_table(history.space).by_layer.items()
    }
    rates = legal_rates(history.space)
    chosen = {layer: rates[layer].index(rate) for layer, rate in probes.plan.rates}
    while True:
        yield make_plan(history.space, {layer: rates[layer][index] for layer, index in chosen.items()})
        changes = [
            ((loss[layer][new] - loss[layer][old]) / (costs[layer][old] - costs[layer][new]), layer, new)
            for layer, old in chosen.items()
            for new in range(len(rates[layer]))
            if costs[layer][new] < costs[layer][old]
        ]
        if not changes:
            return
        _, layer, new = min(changes)
        chosen[layer] = new
