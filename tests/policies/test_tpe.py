import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter

import numpy as np
import optuna
import pytest
from optuna.distributions import IntDistribution
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from fnet_policies import TPE, Random, tpe
from fnet_search.arch.costs import all_conv_macs, plan_cost
from fnet_search.arch.layers import Dense, Flatten
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.arch.plan import FactorizationPlan, depthwise, indices, legal_rates, regular
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.exact_choice import sample_plan
from fnet_search.policy.protocol import History
from tests.support.policy_hosts import GAP, TINY, evaluate, every_plan, run

CEILING = Constraints(conv_macs=440_000, params=4_500)
BUDGET = Constraints(conv_macs=60_000_000)


def test_tries_every_plan_under_the_ceilings_once_and_ends() -> None:
    plans = [evaluation.plan for evaluation in run(TPE(), TINY, CEILING)]
    assert 10 < len(plans) < 100
    assert len(plans) == len(set(plans))
    assert set(plans) == every_plan(TINY, CEILING)


@pytest.mark.parametrize("macs", [33_415_168, 33_600_000, 34_000_000, 60_000_000, 120_000_000])
def test_never_over_budget_and_never_twice(macs: int) -> None:
    evaluations = run(TPE(), GAP, Constraints(conv_macs=macs), trials=25)
    assert len(evaluations) == min(25, int((all_conv_macs(GAP) <= macs).sum()))
    assert len({evaluation.plan for evaluation in evaluations}) == len(evaluations)
    assert all(plan_cost(GAP, evaluation.plan).conv_macs <= macs for evaluation in evaluations)


def test_another_seed_is_another_search() -> None:
    plans = {evaluation.plan for seed in range(4) for evaluation in run(TPE(), GAP, BUDGET, trials=3, seed=seed)}
    assert len(plans) == 4 * 3


def test_workers_spread_out() -> None:
    done = tuple(run(TPE(), GAP, BUDGET, trials=20))
    running: list[FactorizationPlan] = []
    for number in range(20, 24):
        plan = TPE().suggest(History(GAP, BUDGET, done, tuple(running), number=number))
        assert plan is not None
        running.append(plan)
    assert len({evaluation.plan for evaluation in done}.union(running)) == 24
    assert all(not BUDGET.refusal(plan_cost(GAP, plan)) for plan in running)


def test_running_plans_count_as_bad() -> None:
    """Constant liar: what a layer has in a running plan scores lower than without it."""
    done = tuple(run(TPE(), TINY, Constraints(), trials=20))
    plan = regular(TINY)
    before, after = (
        model(History(TINY, evaluations=done, running=running))[1]
        for running in ((), (depthwise(TINY), depthwise(TINY)))
    )
    assert all(after[layer][-1] < before[layer][-1] for layer, _ in plan.rates)


def test_waits_for_what_is_running() -> None:
    plans = tuple(every_plan(TINY, CEILING))
    assert TPE().suggest(History(TINY, CEILING, running=plans)) is None
    assert TPE().suggest(History(TINY, CEILING, running=plans[1:])) == plans[0]


def test_failed_plans_are_not_suggested_again() -> None:
    done = run(TPE(), TINY, CEILING, trials=10)
    failed = tuple(replace(e, state="failed", fp32_accuracy=None, quint8_accuracy=None) for e in done)
    plan = TPE().suggest(History(TINY, CEILING, failed, number=10))
    assert plan is not None
    assert plan not in {evaluation.plan for evaluation in failed}


def model(history: History) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Log densities of the good plans, and what the model scores, per layer and rate."""
    return TPE().model(history)


def mixed_history() -> History:
    """Complete, pruned, refused, failed and running plans."""
    done = run(Random(), TINY, Constraints(), trials=40, seed=1)
    constraints = Constraints(conv_macs=460_000, max_drop=0.12)
    past = [evaluate(TINY, evaluation.plan, number, constraints) for number, evaluation in enumerate(done)]
    assert {evaluation.state for evaluation in past} == {"complete", "refused"}
    assert {constraints.feasible(evaluation) for evaluation in past if evaluation.state == "complete"} == {True, False}
    past[7] = replace(past[7], state="failed", quint8_accuracy=None)
    feasible = [number for number, evaluation in enumerate(past[:-3]) if constraints.feasible(evaluation)]
    for number, accuracies in zip(feasible[1:5], [(0.5,), (0.1, 0.3), (0.3, 0.2), (0.2, 0.3)], strict=True):
        past[number] = replace(past[number], state="pruned", quint8_accuracy=None, accuracies=accuracies)
    return History(TINY, constraints, tuple(past[:-3]), tuple(evaluation.plan for evaluation in past[-3:]), number=40)


INDEXED = {layer: IntDistribution(0, len(rates) - 1) for layer, rates in legal_rates(TINY).items()}


def in_optuna(history: History, sampler: TPESampler) -> optuna.Study:
    """The history as a study of Optuna's own sampler."""

    def trials() -> Iterator[FrozenTrial]:
        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "refused": TrialState.PRUNED}
        past = [(one.plan, one) for one in history.evaluations if one.state != "failed"]
        for plan, one in [*past, *((plan, None) for plan in history.running)]:
            yield create_trial(
                state=TrialState.RUNNING if one is None else states[one.state],
                value=one and one.quint8_accuracy,
                params=dict(zip(INDEXED, indices(TINY, plan), strict=True)),
                distributions=dict(INDEXED),
                constraints=history.constraints.of(one) if one else {},
                intermediate_values=dict(enumerate(one.accuracies, 1)) if one else {},
            )

    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials(trials())
    return study


def test_the_scores_are_what_optuna_maximises() -> None:
    """With very many candidates Optuna meets every rate, and proposes each layer's best one."""
    sampler = TPESampler(multivariate=False, n_ei_candidates=20_000, seed=0)
    proposed = in_optuna(mixed_history(), sampler).ask(dict(INDEXED)).params
    best = {layer: int(np.argmax(scores)) for layer, scores in model(mixed_history())[1].items()}
    assert proposed == best
    assert len(set(best.values())) > 1


def test_proposes_what_optuna_does_as_often() -> None:
    """Over 300 seeds of Optuna's sampler, per layer, by the chi square of what we propose in 100,000 draws."""
    history, good_and_scores = mixed_history(), model(mixed_history())
    study = in_optuna(history, TPESampler(multivariate=False, seed=0))
    asked: dict[str, Counter[int]] = {layer: Counter() for layer in INDEXED}
    for seed in range(300):
        study.sampler = TPESampler(multivariate=False, n_ei_candidates=3, seed=seed)
        trial = study.ask(dict(INDEXED))
        for layer, index in trial.params.items():
            asked[layer][index] += 1
        study.tell(trial, state=TrialState.FAIL)  # which the sampler ignores
    rng = np.random.default_rng(0)
    for layer, distribution in INDEXED.items():
        good, scores = (part[layer] for part in good_and_scores)
        ours = Counter(tpe._best_of(3, good, scores, rng.random(100_000)))
        expected = {index: 300 * ours[index] / 100_000 for index in range(distribution.high + 1)}
        chi_square = sum((asked[layer][index] - often) ** 2 / often for index, often in expected.items() if often > 1)
        assert sum(often for often in expected.values() if often > 1) > 295
        freedom = sum(often > 1 for often in expected.values()) - 1
        assert freedom >= 2
        assert chi_square < freedom + 4 * (2 * freedom) ** 0.5, layer


def test_begins_with_plans_that_are_uniform_under_the_ceilings() -> None:
    """Only what was trained counts: neither failed nor running ones are among the ten."""
    done = run(TPE(), GAP, BUDGET, trials=11)
    for number, evaluation in enumerate(done[:10]):
        history = History(GAP, BUDGET, tuple(done[:number]), number=number)
        assert evaluation.plan == sample_plan(GAP, BUDGET, history.seen, history.rng)
    history = History(GAP, BUDGET, tuple(done[:10]), number=10)
    assert done[10].plan != sample_plan(GAP, BUDGET, history.seen, history.rng)
    failed = replace(history, evaluations=(*done[:9], replace(done[9], state="failed")))
    assert TPE().suggest(failed) == sample_plan(GAP, BUDGET, failed.seen, failed.rng)
    running = replace(history, evaluations=tuple(done[:9]), running=(done[9].plan,))
    assert TPE().suggest(running) == sample_plan(GAP, BUDGET, running.seen, running.rng)


def test_falls_back_to_what_the_model_scores_best() -> None:
    history = mixed_history()
    by_layer = model(history)[1]
    left = every_plan(TINY, history.constraints) - history.seen
    assert len(left) > 10

    def score(plan: FactorizationPlan) -> float:
        return sum(layer[index] for layer, index in zip(by_layer.values(), indices(TINY, plan), strict=True))

    assert TPE(startup=1, proposals=0).suggest(history) == max(left, key=score)


def test_proposals_come_before_the_best_by_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one draw a layer they are hardly ever the best: over seeds, many plans are suggested from one history."""
    monkeypatch.setattr(tpe, "_CANDIDATES", 1)
    history = History(GAP, BUDGET, tuple(run(Random(), GAP, BUDGET, trials=40)), number=40)
    plans = {TPE().suggest(replace(history, seed=seed)) for seed in range(20)}
    assert len(plans) == 20
    assert TPE(proposals=0).suggest(history) not in plans


def test_beats_random() -> None:
    """On a formula where each layer costs accuracy of its own, over four seeds."""
    found = {
        policy: [[e.quint8_accuracy or 0.0 for e in run(policy, GAP, BUDGET, trials=20, seed=s)] for s in range(4)]
        for policy in (TPE(), Random())
    }
    best = {policy: np.mean([max(accuracies) for accuracies in runs]) for policy, runs in found.items()}
    late = {policy: [np.mean(accuracies[10:]) for accuracies in runs] for policy, runs in found.items()}
    assert best[TPE()] > best[Random()]
    assert min(late[TPE()]) > max(late[Random()])


def test_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(action="error"):
        TPE(startup=1).suggest(mixed_history())
    assert caplog.records == []


def test_a_space_with_nothing_to_choose() -> None:
    nodes = (Node("f", Flatten(), (INPUT,)), Node("d", Dense(2), ("f",)))
    space = Macroarchitecture("fixed", (1, 2, 2), nodes)
    only = regular(space)
    assert TPE().suggest(History(space)) == only
    assert TPE().suggest(History(space, running=(only,))) is None


def test_suggests_in_well_under_a_second() -> None:
    done = tuple(run(Random(), GAP, BUDGET, trials=1000))
    started = perf_counter()
    TPE().suggest(History(GAP, BUDGET, done, number=1000))
    assert perf_counter() - started < 1.0  # 0.02 s on an idle core
