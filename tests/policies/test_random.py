from dataclasses import replace

import pytest

from fnet_policies import Random
from fnet_search.arch.costs import all_conv_macs, plan_cost
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.protocol import History
from tests.support.policy_hosts import GAP, TINY, every_plan, run

CEILING = Constraints(conv_macs=440_000, params=4_500)


def test_tries_every_plan_under_the_ceilings_once_and_ends() -> None:
    plans = [evaluation.plan for evaluation in run(Random(), TINY, CEILING)]
    assert 10 < len(plans) < 100
    assert len(plans) == len(set(plans))
    assert set(plans) == every_plan(TINY, CEILING)


@pytest.mark.parametrize("macs", [33_415_168, 33_600_000, 34_000_000, 60_000_000])
def test_never_over_budget(macs: int) -> None:
    evaluations = run(Random(), GAP, Constraints(conv_macs=macs), trials=20)
    assert len(evaluations) == min(20, int((all_conv_macs(GAP) <= macs).sum()))
    assert all(plan_cost(GAP, evaluation.plan).conv_macs <= macs for evaluation in evaluations)


def test_another_seed_is_another_search() -> None:
    runs = [[evaluation.plan for evaluation in run(Random(), GAP, Constraints(), trials=3, seed=s)] for s in (0, 1)]
    assert not set(runs[0]) & set(runs[1])


def test_does_not_suggest_what_is_running() -> None:
    history = History(TINY, CEILING)
    running = [plan for plan in every_plan(TINY, CEILING) if plan != Random().suggest(history)]
    last = Random().suggest(replace(history, running=tuple(running)))
    assert last is not None
    assert last not in running
    assert Random().suggest(replace(history, running=(*running, last))) is None
