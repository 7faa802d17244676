from itertools import product

from fnet_policies import Fisher
from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import FactorizationPlan, from_indices, legal_rates, uniform
from fnet_search.importing.spaces import load_space
from fnet_search.policy.conformance import made_up_probes as probes
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.protocol import History
from tests.support.evaluations import refused

TINY = load_space("tiny")


def test_plans_come_in_the_order_of_their_scores() -> None:
    measured = probes(TINY)
    fisher = {(one.layer, one.rate): one.fisher or 0.0 for one in measured.changes}
    assert measured.unchanged.fisher == 1.0
    constraints = Constraints(conv_macs=plan_cost(TINY, uniform(TINY, 2)).conv_macs)

    def score(plan: FactorizationPlan) -> float:
        return sum(fisher[layer, rate] - 1.0 for layer, rate in plan.rates if rate > 1)

    every = [from_indices(TINY, chosen) for chosen in product(*(range(len(of)) for of in legal_rates(TINY).values()))]
    under = [plan for plan in every if not constraints.refusal(plan_cost(TINY, plan))]
    expected = sorted(under, key=score, reverse=True)
    history = History(TINY, constraints, probes=measured)
    for place in range(len(under)):
        plan = Fisher().suggest(history)
        assert plan == expected[place]
        assert plan is not None
        past = (*history.evaluations, refused(TINY, plan, place))
        history = History(TINY, constraints, past, probes=measured)
    assert Fisher().suggest(history) is None
