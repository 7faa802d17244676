from fnet_policies import ReversePyramid
from fnet_search.arch.plan import depthwise, parse_plan
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.protocol import History
from tests.support.policy_hosts import GAP, TINY, run


def test_walks_the_initial_rates() -> None:
    plans = [evaluation.plan for evaluation in run(ReversePyramid(), GAP, Constraints())]
    assert plans == [parse_plan(GAP, f"init{rate}") for rate in (1, 2, 4, 8, 16, 32, 64)]
    assert [rate for _, rate in plans[0].rates] == [1, 1, 1, 2, 2, 2, 4, 4]
    assert plans[-1] == depthwise(GAP)


def test_walks_over_budget_plans_too() -> None:
    evaluations = run(ReversePyramid(), GAP, Constraints(conv_macs=104_267_776))
    assert [evaluation.state for evaluation in evaluations] == ["refused"] + ["complete"] * 6


def test_resumes_where_it_was() -> None:
    done = run(ReversePyramid(), TINY, Constraints())
    assert len(done) == 4
    for number, evaluation in enumerate(done):
        assert ReversePyramid().suggest(History(TINY, evaluations=tuple(done[:number]))) == evaluation.plan
    assert ReversePyramid().suggest(History(TINY, running=tuple(e.plan for e in done))) is None
