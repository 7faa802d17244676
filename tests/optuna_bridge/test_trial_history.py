"""Trials of somebody else in a policy's history: read as their distributions say, or left out."""

import re
from collections.abc import Callable
from typing import Any

import optuna
import pytest

from fnet_policies import ReversePyramid
from fnet_search.arch.plan import legal_rates, uniform
from fnet_search.arch.space_file import parse_space
from fnet_search.importing.spaces import load_space
from fnet_search.optuna_bridge.sampler import PolicySampler, suggest_plan

TINY = load_space("tiny")


def added(suggest: Callable[[optuna.Trial, str, tuple[int, ...]], object], values: dict[str, object]) -> optuna.Study:
    """A study with a trial of an objective that suggests each layer so; enqueued with these values."""
    other = optuna.create_study(direction="maximize")
    other.enqueue_trial(values)

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("learning_rate", 0.1, 0.2)
        for layer, rates in legal_rates(TINY).items():
            suggest(trial, layer, rates)
        return 0.75

    other.optimize(objective, n_trials=1)
    study = optuna.create_study(direction="maximize", sampler=PolicySampler(ReversePyramid(), TINY))
    study.add_trials(other.trials)
    return study


def categorical(*choices: object) -> Callable[[optuna.Trial, str, tuple[int, ...]], object]:
    return lambda trial, layer, rates: trial.suggest_categorical(layer, choices or rates)  # type: ignore[arg-type]


def integer(low: int, high: int = 0, **how: bool) -> Callable[[optuna.Trial, str, tuple[int, ...]], object]:
    return lambda trial, layer, rates: trial.suggest_int(layer, low, high or rates[-1], **how)


def real(low: float, high: float = 0, **how: bool) -> Callable[[optuna.Trial, str, tuple[int, ...]], object]:
    return lambda trial, layer, rates: trial.suggest_float(layer, low, high or rates[-1], **how)


TWOS = dict.fromkeys(legal_rates(TINY), 2)
BY_VALUE = {
    "categorical rates": (categorical(), TWOS, 2),
    "some of them": (categorical(8, 2), TWOS, 2),
    "with others, too large for indices": (categorical(2, 3, 12), TWOS, 2),
    "logarithmic integers": (integer(1, log=True), TWOS, 2),
    "a few logarithmic integers": (integer(1, 4, log=True), TWOS, 2),
    "integers too large for indices": (integer(1), TWOS, 2),
    "logarithmic numbers": (real(1, log=True), TWOS, 2),
    "numbers too large for indices": (real(1), TWOS, 2),
    "indices": (lambda trial, layer, rates: trial.suggest_int(layer, 0, len(rates) - 1), TWOS, 4),
}
LEFT_OUT = {
    "a value that is no rate": (integer(1, log=True), {**TWOS, "conv_16_1": 3}),
    "a number between": (real(1), {**TWOS, "conv_8": 2.5}),
    "categorical indices": (categorical(0, 1, 2, 3), TWOS),
    "categories of words": (categorical("2", "4"), dict.fromkeys(TWOS, "2")),
    "truth": (categorical(True, 2), TWOS),
    "integers that may be either": (integer(1, 3), TWOS),
    "the indices of other rates": (integer(0, 2), TWOS),
    "numbers that may be either": (real(0, 3), TWOS),
    "a layer is missing": (
        lambda trial, layer, rates: layer == "conv_8" or trial.suggest_int(layer, 0, len(rates) - 1),
        {"conv_16_1": 2, "conv_16_2": 2},
    ),
    "layers of other names": (lambda trial, layer, rates: trial.suggest_int(f"old.{layer}", 0, len(rates) - 1), {}),
}


@pytest.mark.parametrize(("suggest", "values", "rate"), BY_VALUE.values(), ids=BY_VALUE.keys())
def test_trials_of_others_are_read_as_their_distributions_say(
    suggest: Any, values: dict[str, object], rate: int, recwarn: pytest.WarningsRecorder
) -> None:
    study = added(suggest, values)
    assert isinstance(study.sampler, PolicySampler)
    recwarn.clear()
    (one,) = study.sampler.history(study).evaluations
    assert (one.plan, one.quint8_accuracy) == (uniform(TINY, rate), 0.75)
    assert not recwarn.list


@pytest.mark.parametrize(("suggest", "values"), LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_trials_that_stand_for_no_plan_are_left_out_and_said_to_be_once(
    suggest: Any, values: dict[str, object], recwarn: pytest.WarningsRecorder
) -> None:
    study = added(suggest, values)
    study.add_trials(study.trials)
    assert isinstance(study.sampler, PolicySampler)
    recwarn.clear()
    for _ in range(2):
        assert study.sampler.history(study).evaluations == ()
    (said,) = recwarn.list
    assert re.match(r"left out of the policy's history: 2 trials of the study \(0, 1\), whose", str(said.message))


def test_a_plan_that_was_written_tells_that_legal_rates_have_changed() -> None:
    """A layer of 48 channels has as many rates as one of 32: the last index means another rate."""
    wide, narrow = (
        parse_space(
            f'input = [{channels}, 8, 8]\n[[layer]]\nname = "c"\nkind = "conv"\nout_channels = 4\npadding = 1\n'
            'factorize = true\n[[layer]]\nname = "flat"\nkind = "flatten"\n[[layer]]\nname = "d"\nkind = "dense"\n'
            "out_features = 2\n",
            "space",
        )
        for channels in (48, 32)
    )
    assert [len(legal_rates(space)["c"]) for space in (wide, narrow)] == [6, 6]
    study = optuna.create_study(direction="maximize", sampler=PolicySampler(ReversePyramid(), wide))
    study.optimize(lambda trial: 0.01 * suggest_plan(trial, wide)["c"])
    sampler = PolicySampler(ReversePyramid(), narrow)
    with pytest.warns(UserWarning, match="left out of the policy's history: 1 trial of"):
        found = sampler.history(study).evaluations
    assert [(one.plan["c"], one.quint8_accuracy) for one in found] == [(rate, 0.01 * rate) for rate in (1, 2, 4, 8, 16)]
