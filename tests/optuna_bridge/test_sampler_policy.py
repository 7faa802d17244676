from dataclasses import replace
from functools import partial

import optuna
import pytest
from optuna.samplers import BruteForceSampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler

from fnet_policies import Random
from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import FactorizationPlan, indices
from fnet_search.base.errors import FnetError
from fnet_search.importing.spaces import load_space
from fnet_search.optuna_bridge.sampler_policy import SamplerPolicy
from fnet_search.policy.asktell import AskTell
from fnet_search.policy.conformance import PolicyConformance, made_up_evaluation
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.protocol import History

TINY, SPACE = load_space("tiny"), load_space("factorizenet")
CEILING = Constraints(conv_macs=120_000_000)


class Genetic(SamplerPolicy):
    def __init__(self) -> None:
        super().__init__(partial(NSGAIISampler, population_size=4), startup=4)


class TestAnySampler(PolicyConformance):
    policy = Genetic


def searched(policy: SamplerPolicy, trials: int, seed: int = 0) -> list[Evaluation]:
    loop = AskTell(policy, SPACE, CEILING, seed)
    for _ in range(trials):
        plan = loop.ask()
        assert plan is not None
        loop.tell(made_up_evaluation(SPACE, plan))
    return list(loop.evaluations)


@pytest.mark.parametrize(
    "sampler",
    [
        NSGAIISampler,
        partial(TPESampler, multivariate=True),
        RandomSampler,
        partial(QMCSampler, warn_independent_sampling=False),
        BruteForceSampler,
    ],
    ids=["nsga2", "tpe", "random", "qmc", "brute force"],
)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_any_sampler_searches_under_the_budget(sampler: type[optuna.samplers.BaseSampler]) -> None:
    """Nothing twice, nothing above the ceilings; one that was just made says what one says that was there all along."""
    found = searched(SamplerPolicy(sampler, startup=3), 12)
    plans = [one.plan for one in found]
    assert len(set(plans)) == 12
    assert all(plan_cost(SPACE, plan).conv_macs <= 120_000_000 for plan in plans)
    assert {one.state for one in found} == {"complete"}
    last = History(SPACE, CEILING, tuple(found[:-1]), number=11)
    assert SamplerPolicy(sampler, startup=3).suggest(last) == plans[-1]


def test_a_sampler_keeps_what_it_keeps_in_a_study() -> None:
    """A quasi-random sequence goes on from where it was: each of its points is proposed once."""
    policy = SamplerPolicy(partial(QMCSampler, warn_independent_sampling=False), startup=1, proposals=1)
    history = History(SPACE, evaluations=tuple(searched(SamplerPolicy(RandomSampler), 6)), number=6)
    (first,) = policy.proposed(history, 0)
    more = replace(history, evaluations=(*history.evaluations, made_up_evaluation(SPACE, first)), number=7)
    (second,) = policy.proposed(more, 0)
    (same,) = SamplerPolicy(policy.sampler, startup=1, proposals=1).proposed(more, 0)
    assert first != second == same


def test_the_first_plans_are_those_of_random_search() -> None:
    plans = [one.plan for one in searched(SamplerPolicy(TPESampler, startup=4), 5)]
    for number, plan in enumerate(plans):
        known = tuple(made_up_evaluation(SPACE, one) for one in plans[:number])
        drawn = Random().suggest(History(SPACE, CEILING, known, number=number))
        assert (plan == drawn) == (number < 4)


def test_what_the_sampler_sees() -> None:
    """Values, constraints, states, and what is running."""
    seen = list[optuna.trial.FrozenTrial]()

    class Watching(RandomSampler):
        def sample_independent(self, study, trial, param_name, param_distribution):  # type: ignore[no-untyped-def]
            seen[:] = study.get_trials(deepcopy=False)
            return super().sample_independent(study, trial, param_name, param_distribution)

    limits = Constraints(conv_macs=120_000_000, min_quint8=0.8)
    past = searched(SamplerPolicy(RandomSampler), 5)
    past[1] = replace(past[1], state="pruned", quint8_accuracy=None, accuracies=(0.25, 0.5))
    past[2] = replace(past[2], state="failed", quint8_accuracy=None)
    past[3] = replace(past[3], role="reference")
    history = History(SPACE, limits, tuple(past[:4]), (past[4].plan,), number=5)
    for replay in (True, False):
        policy = SamplerPolicy(Watching, startup=1, replay=replay)
        assert policy.suggest(history) is not None
        complete, pruned, running = seen[:3]
        assert (complete.value, complete.state.name) == (past[0].quint8_accuracy, "COMPLETE")
        assert tuple(complete.params.values()) == indices(SPACE, past[0].plan)
        violation = max(0.0, (0.8 - (past[0].quint8_accuracy or 0)) / 0.8)
        assert complete.constraints == {"conv_macs": 0.0, "min_quint8": pytest.approx(violation)}
        assert (pruned.state.name, pruned.intermediate_values) == ("PRUNED", {1: 0.25, 2: 0.5})
        assert (running.state.name, tuple(running.params.values())) == ("RUNNING", indices(SPACE, past[4].plan))


def test_without_a_proposal_that_fits_a_plan_is_drawn() -> None:
    def same(seed: int) -> optuna.samplers.BaseSampler:
        return optuna.samplers.PartialFixedSampler(dict.fromkeys(dict(past[0].plan.rates), 0), RandomSampler(seed))

    past = searched(SamplerPolicy(RandomSampler), 10)
    policy = SamplerPolicy(lambda seed: same(seed), startup=1)
    history = History(SPACE, CEILING, tuple(past), number=10)
    found: set[FactorizationPlan | None] = {policy.suggest(replace(history, seed=seed)) for seed in range(3)}
    assert len(found) == 3
    assert all(plan is not None and not history.refusal(plan) for plan in found)


def test_a_sampler_that_was_made_already_is_refused() -> None:
    with pytest.raises(
        FnetError, match=r"SamplerPolicy needs a sampler class, not an instance: SamplerPolicy\(RandomSampler\)"
    ):
        SamplerPolicy(RandomSampler())  # type: ignore[arg-type] (the mistake)


def test_what_was_trained_but_not_quantized_is_no_value() -> None:
    past = [replace(one, quint8_accuracy=None) for one in searched(SamplerPolicy(RandomSampler), 4)]
    history = History(SPACE, CEILING, tuple(past), number=4)
    for sampler in (RandomSampler, TPESampler, NSGAIISampler):
        assert SamplerPolicy(sampler, startup=0).suggest(history) not in {None, *history.seen}
        assert SamplerPolicy(sampler, startup=4).suggest(history) == Random().suggest(history)
