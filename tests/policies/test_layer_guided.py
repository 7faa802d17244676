import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy.stats import spearmanr

from fnet_policies import LayerGuided
from fnet_policies.layer_guided import KEPT, STATISTICS, Model
from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import FactorizationPlan, from_indices, legal_rates, make_plan, regular, uniform
from fnet_search.base.errors import FnetError
from fnet_search.importing.spaces import load_space
from fnet_search.policy.conformance import made_up_layers as layer_stats
from fnet_search.policy.conformance import made_up_probes as probes
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation, Probes
from fnet_search.policy.metric import ClassResult
from fnet_search.policy.protocol import History
from tests.support.evaluations import trained

TINY = load_space("tiny")
EVERY = [from_indices(TINY, chosen) for chosen in product(*(range(len(of)) for of in legal_rates(TINY).values()))]
CEILING = Constraints(conv_macs=plan_cost(TINY, uniform(TINY, 2)).conv_macs)
UNDER = [plan for plan in EVERY if not CEILING.refusal(plan_cost(TINY, plan))]
REFERENCE = replace(trained(TINY, regular(TINY), 0, 0.8, 0.75), role="reference", images=400)


def history_of(
    *evaluations: Evaluation, constraints: Constraints = CEILING, measured: Probes | None = None, seed: int = 0
) -> History:
    past = (REFERENCE, *evaluations)
    return History(TINY, constraints, past, (), len(past), seed, measured or probes(TINY))


def noise(measured: Probes, plan: FactorizationPlan) -> float:
    """Of the quantized logits, by the probes: the sum over layers."""
    table = measured.increase(TINY, lambda one: one.quint8_logit_noise)
    return sum(float(table[layer][legal_rates(TINY)[layer].index(rate)]) for layer, rate in plan.rates)


def child(number: int, plan: FactorizationPlan, quint8: float, fp32: float = 0.8, images: int = 400) -> Evaluation:
    return replace(trained(TINY, plan, number, fp32, quint8), parent=0, images=images)


def test_without_evaluations_the_least_noise_under_the_budget() -> None:
    """All that these probes say follows from the noise of the quantized logits: of all plans the least is best."""
    for seed in range(5):
        measured = probes(TINY, seed)
        plan = LayerGuided(learning=False).suggest(history_of(measured=measured))
        assert plan == min(UNDER, key=lambda plan: noise(measured, plan))


def test_what_noise_does_to_the_accuracy_is_read_off_the_probes() -> None:
    measured = probes(TINY)
    model = Model.of(LayerGuided(), history_of(measured=measured))
    mean, _ = model.predict(UNDER)
    # The probes were made with a quint8 loss that grows by the noise, from 0.9 nats at an accuracy of 0.75.
    per_nat = (0.75 - 0.1) / (math.log(10) - 0.9)
    expected = [0.75 - KEPT * per_nat * noise(measured, plan) for plan in UNDER]
    assert mean[:, 0] == pytest.approx(expected, abs=1e-4)


def test_accuracies_of_a_few_images_that_rise_by_chance_change_nothing() -> None:
    """They did, on the probes of a real network, and all that the probes said was lost."""
    measured = probes(TINY)
    lucky = tuple(
        replace(one, fp32_accuracy=one.fp32_accuracy + 0.02, quint8_accuracy=one.quint8_accuracy + 0.03 * (place % 2))
        for place, one in enumerate(measured.changes)
    )
    for policy in (LayerGuided(), LayerGuided(learning=False)):
        plan = policy.suggest(history_of(measured=measured))
        assert policy.suggest(history_of(measured=replace(measured, changes=lucky))) == plan


def test_a_network_that_guesses_teaches_what_can_be_taught() -> None:
    """Worse than guessing in its loss, as after a bad quantization: the least noise is still the best."""
    measured = probes(TINY)
    unchanged = replace(measured.unchanged, quint8_loss=4.0, quint8_accuracy=0.1)
    changes = tuple(replace(one, quint8_loss=4.0 + one.quint8_loss) for one in measured.changes)
    history = history_of(measured=replace(measured, unchanged=unchanged, changes=changes))
    plan = LayerGuided(learning=False).suggest(history)
    assert plan == min(UNDER, key=lambda plan: noise(measured, plan))


def test_noise_of_single_rates_counts_less_than_what_goes_with_the_float_noise() -> None:
    """One rate is unlucky: it is expected to be worse than the float noise says, but not by all of the bad luck."""
    measured, layer = probes(TINY), "conv_16_1"
    unlucky = tuple(
        replace(one, logit_sqnr_db=one.logit_sqnr_db and one.logit_sqnr_db - 0.5)
        if (one.layer, one.rate) == (layer, 4)
        else one
        for one in measured.changes
    )
    plan = make_plan(TINY, {layer: 4})
    more = next(
        b.quint8_logit_noise - a.quint8_logit_noise for a, b in zip(measured.changes, unlucky, strict=True) if a != b
    )
    before, after = (
        float(Model.of(LayerGuided(), history_of(measured=one)).predict([plan])[0][0, 0])
        for one in (measured, replace(measured, changes=unlucky))
    )
    assert more > 0.01
    assert 0 < before - after < KEPT * more / 2


def test_plans_without_learning_come_in_the_order_of_the_prediction() -> None:
    measured, evaluations = probes(TINY), list[Evaluation]()
    expected = sorted(UNDER, key=lambda plan: noise(measured, plan))[:6]
    for number, wanted in enumerate(expected, 1):
        plan = LayerGuided(learning=False).suggest(history_of(*evaluations, measured=measured))
        assert plan == wanted
        evaluations.append(child(number, wanted, 0.2 + 0.1 * number))  # whatever they reach


def test_evaluations_move_the_prediction() -> None:
    """All plans end two points above what the probes say: one evaluation is enough to know half of it and more."""
    measured = probes(TINY)
    before, covariance = Model.of(LayerGuided(), history_of(measured=measured)).predict(UNDER)
    known = child(1, UNDER[0], float(before[0, 0]) + 0.02, float(before[0, 1]) + 0.01, images=100_000)
    model = Model.of(LayerGuided(), history_of(known, measured=measured))
    after, less = model.predict(UNDER)
    assert after[0, 0] == pytest.approx(before[0, 0] + 0.02, abs=0.001)
    assert after[0, 1] == pytest.approx(before[0, 1] + 0.01, abs=0.001)
    assert (after[:, 0] > before[:, 0] + 0.01).all()
    assert (less.diagonal() < covariance.diagonal()).all()


def test_layer_statistics_are_learnt_from() -> None:
    """Where quint8 hangs on the noise of the activations, and the probes' logits say nothing, evaluations tell."""
    silent = probes(TINY, noise={layer: [0.0] * len(rates) for layer, rates in legal_rates(TINY).items()})
    statistics = {(one.layer, one.rate): one.layers for one in silent.changes}
    of = STATISTICS["noise of the activations"]

    def truth(plan: FactorizationPlan) -> float:
        return 0.8 - 0.6 * sum(of(part) for layer, rate in plan.rates for part in statistics.get((layer, rate), ()))

    order = np.random.default_rng(1).permutation(len(UNDER))
    shown, hidden = ([UNDER[place] for place in part] for part in (order[:10], order[10:]))
    evaluations = [
        replace(child(number, plan, truth(plan), images=1_000_000), layers=()) for number, plan in enumerate(shown, 1)
    ]

    def ranked(policy: LayerGuided) -> float:
        model = Model.of(policy, history_of(*evaluations, measured=silent))
        return float(spearmanr(model.predict(hidden)[0][:, 0], [truth(plan) for plan in hidden]).statistic)

    assert ranked(LayerGuided()) > 0.8
    assert ranked(LayerGuided(statistics=False)) < 0.5


def test_statistics_of_evaluated_plans_replace_those_of_the_probes() -> None:
    measured, plan = probes(TINY), uniform(TINY, 2)
    noisy = [replace(one, activation_sqnr_db=3.0) for one in layer_stats(TINY, plan)]
    known = replace(child(1, plan, 0.7), layers=tuple(noisy))
    place = list(STATISTICS).index("noise of the activations") + 2  # after the two of the probes
    before = Model.of(LayerGuided(), history_of(measured=measured)).features[place]
    after = Model.of(LayerGuided(), history_of(known, measured=measured)).features[place]
    assert before.name == after.name == "noise of the activations"
    of = STATISTICS[before.name]
    own = {one.layer: of(one) for one in REFERENCE.layers}
    more = {layer: 2 * 10**-0.3 - own[layer] for layer in legal_rates(TINY)}  # two convolutions, at 3 dB each
    scale = {after.table[layer][1] / more[layer] for layer in more}
    assert max(scale) == pytest.approx(min(scale))
    assert min(scale) > 0
    assert {layer: float(values[0]) for layer, values in after.table.items()} == dict.fromkeys(more, 0.0)
    # What training changed at rate 2 is taken over for rate 4.
    probed = {(one.layer, one.rate): sum(map(of, one.layers)) for one in measured.changes}
    shift = float(np.mean([2 * 10**-0.3 - probed[layer, 2] for layer in more]))
    for layer in more:
        expected = (probed[layer, 4] + shift - own[layer]) * min(scale)
        assert after.table[layer][2] == pytest.approx(expected)


def test_noise_is_never_taken_to_help() -> None:
    history = history_of(child(1, UNDER[3], 0.7))
    drawn = Model.of(LayerGuided(), history).draws(history.rng)
    assert all((weights <= 0).all() for weights in drawn)
    assert len({tuple(weights) for weights in drawn}) == len(drawn)
    blind = Model.of(LayerGuided(by_probes=False), history).draws(history.rng)
    assert any((weights > 0).any() for weights in blind), "a rate alone may do both"


def test_the_chance_is_of_being_better_by_more_than_the_noise() -> None:
    model = Model.of(LayerGuided(), history_of(child(1, UNDER[3], 0.7)))
    noisy, quiet = (replace(model, noise=noise).improvement(UNDER)[0] for noise in (0.02, 0.0))
    assert (noisy < quiet).all()


def test_running_plans_count_as_evaluated() -> None:
    history = history_of(child(1, UNDER[3], 0.7, images=10**6))
    suggested: list[FactorizationPlan] = []
    for _ in range(4):
        plan = LayerGuided().suggest(replace(history, running=tuple(suggested), number=2 + len(suggested)))
        assert plan is not None
        assert plan not in suggested
        suggested.append(plan)
    pending = Model.of(LayerGuided(), replace(history, running=tuple(suggested)))
    _, with_running = pending.predict(suggested)
    _, without = Model.of(LayerGuided(), history).predict(suggested)
    assert (with_running.diagonal() < without.diagonal()).all()
    assert pending.predict(UNDER)[0] == pytest.approx(Model.of(LayerGuided(), history).predict(UNDER)[0], abs=1e-6)


def test_running_plans_count_before_there_is_an_evaluation() -> None:
    history = history_of()
    running = replace(history, running=(UNDER[0],))
    before, less = (Model.of(LayerGuided(), one).predict([UNDER[0]])[1][0, 0] for one in (history, running))
    assert less < before / 2
    assert LayerGuided().suggest(running) not in (None, UNDER[0])


def test_it_stops_where_no_plan_is_expected_to_be_better_by_the_noise() -> None:
    measured = probes(TINY)
    best = sorted(UNDER, key=lambda plan: noise(measured, plan))[:3]

    def after(images: int, least: int = 2) -> FactorizationPlan | None:
        done = [
            child(n, plan, 0.75 - KEPT * noise(measured, plan) / 2, images=images) for n, plan in enumerate(best, 1)
        ]
        return LayerGuided(least=least).suggest(history_of(*done, measured=measured))

    assert after(images=200) is None
    running = history_of(child(1, best[0], 0.75, images=200), measured=measured)
    assert LayerGuided().suggest(running) is not None
    assert LayerGuided().suggest(replace(running, running=(best[1],))) is None, "it may be asked again"
    assert after(images=200, least=4) is not None
    assert after(images=10**9) is not None
    noise_of_200 = math.sqrt(0.75 * 0.25 / 200)
    history = history_of(*[child(n, plan, 0.7, images=200) for n, plan in enumerate(best, 1)])
    assert Model.of(LayerGuided(), history).noise == noise_of_200


def test_the_noise_of_balanced_accuracy_is_that_of_its_small_classes() -> None:
    """The standard error of the mean of two recalls, both as the balanced accuracy of the probed network."""
    classes = (ClassResult(180, 150, 140), ClassResult(20, 15, 12))
    changed = replace(probes(TINY).unchanged, classes=classes)
    measured = replace(probes(TINY), unchanged=changed)
    told = (replace(child(1, UNDER[0], 0.7, images=200), classes=classes),)
    limits = replace(CEILING, metric="balanced-accuracy")
    model = Model.of(LayerGuided(), History(TINY, limits, told, probes=measured))
    base = (140 / 180 + 12 / 20) / 2
    assert model.base == (base, (150 / 180 + 15 / 20) / 2)
    assert model.noise == pytest.approx(math.sqrt(base * (1 - base) * (1 / 180 + 1 / 20)) / 2)
    with pytest.raises(FnetError, match=r"^the probes have no balanced accuracy; measure them with `metric`"):
        Model.of(LayerGuided(), History(TINY, limits, told, probes=probes(TINY)))


def test_constraints_after_training_are_looked_ahead_at() -> None:
    """The best prediction has a relative drop that is not allowed: another plan has the better chance."""
    measured = probes(TINY)
    model = Model.of(LayerGuided(), history_of(measured=measured))
    plans = sorted(UNDER, key=lambda plan: noise(measured, plan))
    mean = model.predict(plans)[0]
    drops = (mean[:, 1] - mean[:, 0]) / mean[:, 1]
    strict = replace(CEILING, max_drop=float(drops.min()))
    chance, _ = replace(model, history=history_of(constraints=strict, measured=measured)).improvement(plans)
    assert plans[int(np.argmax(chance))] == plans[int(np.argmin(drops))]
    floored = replace(CEILING, min_quint8=float(mean[:, 0].max()) + 0.2)
    low, _ = replace(model, history=history_of(constraints=floored, measured=measured)).improvement(plans)
    high, _ = model.improvement(plans)
    assert (low < high).all()


def test_explanations_are_differences_of_predictions() -> None:
    measured = probes(TINY)
    history = history_of(child(1, UNDER[5], 0.71), child(2, UNDER[9], 0.69), measured=measured)
    plan = make_plan(TINY, {"conv_8": 2, "conv_16_1": 16})
    found, model = LayerGuided().explain(history, plan), Model.of(LayerGuided(), history)
    own = float(model.predict([plan])[0][0, 0])
    assert found.expected == pytest.approx(own)
    fp32 = float(model.predict([plan])[0][0, 1])
    assert found.expected_drop == pytest.approx((fp32 - own) / fp32)
    assert [(choice.layer, choice.rate) for choice in found.choices] == list(plan.rates)
    for choice in found.choices:
        rates = legal_rates(TINY)[choice.layer]
        at = rates.index(choice.rate)
        assert (choice.lower is None) == (at == 0)
        assert (choice.higher is None) == (at == len(rates) - 1)
        for step, rate in ((choice.lower, rates[at - 1]), (choice.higher, rates[min(at + 1, len(rates) - 1)])):
            if step is not None:
                other = make_plan(TINY, {**plan.by_layer, choice.layer: rate})
                assert step.rate == rate
                assert step.conv_macs == plan_cost(TINY, other).conv_macs - plan_cost(TINY, plan).conv_macs
                assert step.quint8_accuracy == pytest.approx(float(model.predict([other])[0][0, 0]) - own)
    assert sum(found.importances.values()) == pytest.approx(1)
    assert len(found.importances) == 2 + len(STATISTICS)
    assert max(found.importances, key=found.importances.__getitem__) == "noise of the fp32 logits"


def test_without_probes_it_starts_at_random_and_learns_rates() -> None:
    blind = LayerGuided(by_probes=False)
    first = [blind.suggest(history_of(seed=seed)) for seed in range(6)]
    assert len(set(first)) > 1
    evaluations = [
        child(n, plan, 0.8 - 0.02 * math.log2(plan["conv_16_2"]), images=1_000_000)
        for n, plan in enumerate(UNDER[::5], 1)
    ]
    model = Model.of(blind, history_of(*evaluations))
    weights = dict(zip([one.name for one in model.features], model.weights, strict=True))
    assert min(weights, key=weights.__getitem__) == "rate of conv_16_2"


def test_the_probed_network_need_not_be_in_the_history() -> None:
    """As in a host of one's own, where the first candidate has number 0, as the probed network had elsewhere."""
    one = replace(child(0, UNDER[3], 0.5), images=400)
    history = replace(history_of(), evaluations=(one,), number=1)
    model = Model.of(LayerGuided(), history)
    assert model.evaluations == (one,)
    assert model.base == (probes(TINY).unchanged.quint8_accuracy, probes(TINY).unchanged.fp32_accuracy)


def test_quint8_accuracies_alone_teach_too() -> None:
    """As the values of a plain Optuna study: the drop from fp32 is taken to be that of the probed network."""
    plans = (UNDER[3], UNDER[7], UNDER[11])
    both = [child(number, plan, 0.6 + 0.03 * number, 0.65 + 0.03 * number) for number, plan in enumerate(plans, 1)]
    alone = [replace(one, fp32_accuracy=None) for one in both]  # REFERENCE drops from 0.8 to 0.75
    expected = Model.of(LayerGuided(), history_of(*both)).predict(UNDER)[0]
    assert Model.of(LayerGuided(), history_of(*alone)).predict(UNDER)[0] == pytest.approx(expected)


def test_plans_that_failed_or_were_stopped_teach_nothing() -> None:
    history = history_of(child(1, UNDER[2], 0.7))
    failed = replace(child(2, UNDER[4], 0.7), state="failed", quint8_accuracy=None, fp32_accuracy=None, layers=())
    model = Model.of(LayerGuided(), history_of(child(1, UNDER[2], 0.7), failed))
    assert model.predict(UNDER)[0] == pytest.approx(Model.of(LayerGuided(), history).predict(UNDER)[0])
    assert LayerGuided().suggest(history_of(child(1, UNDER[2], 0.7), failed)) not in (UNDER[4], UNDER[2])


def test_a_space_is_used_up() -> None:
    least = min(EVERY, key=lambda plan: plan_cost(TINY, plan).conv_macs)
    constraints = Constraints(conv_macs=plan_cost(TINY, least).conv_macs)
    assert LayerGuided().suggest(history_of(constraints=constraints)) == least
    assert LayerGuided().suggest(history_of(child(1, least, 0.7), constraints=constraints)) is None
