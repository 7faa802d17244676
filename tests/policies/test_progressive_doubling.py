from fnet_policies import ProgressiveDoubling
from fnet_search.arch.plan import depthwise, regular, uniform
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.protocol import History
from tests.support.policy_hosts import GAP, TINY, run


def test_doubles_from_regular_to_depthwise() -> None:
    plans = [evaluation.plan for evaluation in run(ProgressiveDoubling(), GAP, Constraints())]
    assert plans == [uniform(GAP, rate) for rate in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    assert (plans[0], plans[-1]) == (regular(GAP), depthwise(GAP))


def test_walks_over_budget_plans_too() -> None:
    evaluations = run(ProgressiveDoubling(), GAP, Constraints(conv_macs=62_000_000))
    assert [evaluation.state for evaluation in evaluations] == ["refused"] * 3 + ["complete"] * 6


def test_fills_the_holes_of_a_history() -> None:
    done = run(ProgressiveDoubling(), TINY, Constraints())
    assert len(done) == 5
    holes = History(TINY, evaluations=(done[0], done[3]), running=(done[1].plan,), number=3)
    assert ProgressiveDoubling().suggest(holes) == done[2].plan


def test_resumes_where_it_was() -> None:
    done = run(ProgressiveDoubling(), TINY, Constraints())
    for number, evaluation in enumerate(done):
        assert ProgressiveDoubling().suggest(History(TINY, evaluations=tuple(done[:number]))) == evaluation.plan
    assert ProgressiveDoubling().suggest(History(TINY, running=tuple(e.plan for e in done))) is None
