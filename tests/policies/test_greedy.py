import itertools

import pytest

from fnet_policies import Greedy
from fnet_search.arch.costs import cost_table, plan_cost
from fnet_search.arch.plan import legal_rates, make_plan, regular
from fnet_search.base.errors import FnetError
from fnet_search.importing.spaces import load_space
from fnet_search.policy.conformance import made_up_probes as probes
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.protocol import History
from tests.support.evaluations import refused

TINY = load_space("tiny")
LAYERS = list(legal_rates(TINY))


def way(history: History) -> list[tuple[int, ...]]:
    """Rates of all suggestions."""
    found = []
    while (plan := Greedy().suggest(history)) is not None:
        found.append(tuple(rate for _, rate in plan.rates))
        past = (*history.evaluations, refused(TINY, plan, len(found)))
        history = History(TINY, history.constraints, past, probes=history.probes)
    return found


def test_each_step_costs_least_for_what_it_saves() -> None:
    """Losses are chosen so that conv_16_2 is free, conv_8 dear, and conv_16_1 in between."""
    prices = {"conv_8": 9e-6, "conv_16_1": 3e-6, "conv_16_2": 1e-7}
    costs = {layer: [cost.conv_macs for cost in of] for layer, of in cost_table(TINY).by_layer.items()}
    noise = {layer: [price * (costs[layer][0] - macs) for macs in costs[layer]] for layer, price in prices.items()}
    found = way(History(TINY, probes=probes(TINY, noise=noise)))
    assert found[0] == (1, 1, 1)
    changed = [next(i for i in range(3) if a[i] != b[i]) for a, b in itertools.pairwise(found)]
    assert changed == sorted(changed, reverse=True)  # one layer after the other, the cheapest first
    cheapest = {layer: min(range(len(of)), key=of.__getitem__) for layer, of in costs.items()}
    assert found[-1] == tuple(legal_rates(TINY)[layer][cheapest[layer]] for layer in LAYERS)


def test_every_step_saves_macs() -> None:
    for seed in range(5):
        found = way(History(TINY, probes=probes(TINY, seed)))
        macs = [plan_cost(TINY, make_plan(TINY, dict(zip(LAYERS, rates, strict=True)))).conv_macs for rates in found]
        assert macs == sorted(macs, reverse=True)
        assert len(set(macs)) == len(macs)


def test_plans_above_the_ceilings_are_passed_by() -> None:
    whole = way(History(TINY, probes=probes(TINY)))
    budget = plan_cost(TINY, regular(TINY)).conv_macs * 6 // 10
    under = way(History(TINY, Constraints(conv_macs=budget), probes=probes(TINY)))
    assert under == whole[-len(under) :]
    last_over = make_plan(TINY, dict(zip(LAYERS, whole[-len(under) - 1], strict=True)))
    assert plan_cost(TINY, last_over).conv_macs > budget


def test_without_probes() -> None:
    with pytest.raises(FnetError, match="Greedy needs probes"):
        Greedy().suggest(History(TINY))
