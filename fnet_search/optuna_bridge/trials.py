"""The format of a candidate as an Optuna trial: parameters, attributes, constraints, value and state. No torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan, from_indices, indices, label, legal_rates, make_plan
from fnet_search.base.errors import FnetError
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.metric import MetricName

EVALUATION = "fnet_search:evaluation"
"""System attribute with the whole evaluation, from which histories are rebuilt. It is the text of a JSON object, which
takes a quarter of the object's memory; the dashboard does not show system attributes."""
LIMITS = "fnet_search:constraints"
"""System attribute with the constraints under which a suggestion was made."""
NUMBER = "number"
"""User attribute with the number of the suggestion: unlike the trial's number, it has no gaps."""
PLAN = "plan"
"""User attribute with the plan as text, set when it is suggested."""
ROLE, START, EPOCHS = "role", "start", "planned_epochs"
"""User attributes: the role of the training, its start (``scratch`` or ``warm``), and the most epochs it may take."""
REASON = "reason"
"""User attribute: why a plan was refused, stopped or failed, or what is wrong with its trained network."""


# Parameters are indices of rates where an optimizer chooses them, since it needs their order, and rates where people
# read them.


def index_distributions(space: Macroarchitecture) -> dict[str, BaseDistribution]:
    """A space for an optimizer: for each layer the index of its rate among the legal ones."""
    return {layer: IntDistribution(0, len(rates) - 1) for layer, rates in legal_rates(space).items()}


def index_parameters(space: Macroarchitecture, plan: FactorizationPlan) -> dict[str, int]:
    """A plan as parameters with `index_distributions`."""
    return dict(zip(legal_rates(space), indices(space, plan), strict=True))


def plan_from_indices(space: Macroarchitecture, params: Mapping[str, Any]) -> FactorizationPlan | None:
    """Inverse of `index_parameters`. None if a layer is missing or its value is not an index of a rate."""
    chosen = tuple(_index(params.get(layer), len(rates)) for layer, rates in legal_rates(space).items())
    return None if None in chosen else from_indices(space, tuple(index for index in chosen if index is not None))


def rate_distributions(space: Macroarchitecture) -> dict[str, BaseDistribution]:
    """A space for people: the rate of each layer, on a logarithmic scale, since rates double. Not all values are
    legal."""
    return {layer: IntDistribution(1, rates[-1], log=True) for layer, rates in legal_rates(space).items()}


def plan_of_trial(space: Macroarchitecture, trial: FrozenTrial) -> FactorizationPlan | None:
    """The plan of any trial: its parameters are indices or rates, as their distributions tell.

    None if a layer is missing, a distribution fits neither, a value is not a legal rate, or the trial's PLAN is one of
    another space.
    """
    legal, text = legal_rates(space), trial.user_attrs.get(PLAN)
    if not legal.keys() <= trial.params.keys():
        return None
    if isinstance(text, str) and "=" in text and written_plan(space, text) is None:
        return None
    rates = {layer: _rate(trial.params[layer], trial.distributions[layer], legal[layer]) for layer in legal}
    known = {layer: rate for layer, rate in rates.items() if rate is not None}
    return make_plan(space, known) if len(known) == len(legal) else None


def written_plan(space: Macroarchitecture, text: str) -> FactorizationPlan | None:
    """Inverse of ``str(plan)``. None for a plan of another space."""
    parts = (part.rpartition("=") for part in text.split(","))
    try:
        plan = make_plan(space, {layer: int(rate) for layer, _, rate in parts})
    except (FnetError, ValueError):
        return None
    return plan if str(plan) == text else None


def _rate(value: Any, distribution: BaseDistribution, legal: tuple[int, ...]) -> int | None:
    """The rate that a parameter's value stands for, or None.

    The values are indices if their distribution covers exactly all indices. They are rates if none is 0 and they are
    choices among legal rates, or on a logarithmic scale, or too large to be indices.
    """
    if distribution == IntDistribution(0, len(legal) - 1):
        index = _index(value, len(legal))
        return None if index is None else legal[index]
    if isinstance(distribution, CategoricalDistribution):
        rates = {choice for choice in distribution.choices if type(choice) is int}
        low, high, sure = min(rates, default=0), max(rates, default=0), rates <= set(legal)
        sure = sure and len(rates) == len(distribution.choices)
    elif isinstance(distribution, IntDistribution | FloatDistribution):
        low, high, sure = distribution.low, distribution.high, distribution.log  # type: ignore[assignment]
    else:
        return None
    return int(value) if value in legal and low >= 1 and (sure or high >= len(legal)) else None


def fixed_indices(space: Macroarchitecture, trial: FrozenTrial) -> dict[str, int]:
    """The rate indices that an enqueued trial has fixed, by layer; values that are not an index are left out."""
    fixed = trial.system_attrs.get("fixed_params", {})
    indices = {layer: _index(fixed.get(layer), len(rates)) for layer, rates in legal_rates(space).items()}
    return {layer: index for layer, index in indices.items() if index is not None}


def _index(value: Any, rates: int) -> int | None:
    """A value as an index below `rates`, or None. Users may have written it as a float, or read it with numpy."""
    if isinstance(value, int | float | np.integer) and 0 <= value < rates and value == int(value):
        return int(value)
    return None


def read_constraints(trial: FrozenTrial) -> Constraints | None:
    """The constraints that `write_constraints` wrote; None if there are none."""
    limits = trial.system_attrs.get(LIMITS)
    return None if limits is None else Constraints(**limits)


def write_constraints(storage: BaseStorage, trial: FrozenTrial, constraints: Constraints) -> None:
    """Writes the constraints of a suggestion into its trial, so that an objective finds them whatever the sampler."""
    storage.set_trial_system_attr(trial._trial_id, LIMITS, asdict(constraints))


def suggestion_attributes(space: Macroarchitecture, number: int, plan: FactorizationPlan) -> dict[str, Any]:
    """The user attributes of a suggestion."""
    return {NUMBER: number, PLAN: str(plan), "label": label(space, plan)}


def write_evaluation(trial: Trial, constraints: Constraints, evaluation: Evaluation) -> None:
    """Writes an evaluation into its running trial: scalars for people, violations for samplers, and all of it at the
    end."""
    cost = evaluation.cost
    scalars = {
        "conv_macs": cost.conv_macs,
        "total_macs": cost.total_macs,
        "params": cost.params,
        REASON: evaluation.remark or None,
        "feasible": int(constraints.feasible(evaluation)),  # a number: the dashboard sorts no others
        **{name: getattr(evaluation, name) for name in ("fp32_accuracy", "quint8_accuracy", "qmse", "qce", "kl")},
        **{name: getattr(evaluation, name) for name in ("fp32_balanced_accuracy", "quint8_balanced_accuracy")},
        "relative_drop": evaluation.relative_drop,
        "zero_shot_accuracy": evaluation.zero_shot_accuracy,
        "epochs": evaluation.epochs or None,
        "inherited_epochs": evaluation.inherited_epochs or None,
        "scheme": evaluation.scheme or None,
        "differing_codes": evaluation.audit and evaluation.audit.differing,
    }
    for name, value in scalars.items():
        if value is not None:
            trial.set_user_attr(name, value)
    for name, violation in constraints.of(evaluation).items():
        trial.set_constraint(name, violation)
        trial.set_user_attr(f"violation_{name}", violation)
    # Last: a trial that has this attribute counts as measured, even if its worker dies before it ends the trial.
    text = json.dumps(evaluation.to_json(), separators=(",", ":"))
    trial.storage.set_trial_system_attr(trial._trial_id, EVALUATION, text)


def read_evaluation(trial: FrozenTrial) -> Evaluation | None:
    """The evaluation that `write_evaluation` wrote; None if there is none."""
    data = trial.system_attrs.get(EVALUATION) or trial.user_attrs.get("evaluation")  # of earlier versions
    return Evaluation.from_json(json.loads(data) if isinstance(data, str) else data) if data else None


def value_and_state(evaluation: Evaluation, metric: MetricName) -> tuple[float | None, TrialState]:
    """The value (quint8 score under `metric`) and state of an evaluation's trial. Optuna itself gives a pruned trial
    the last score that was reported."""
    return evaluation.scores(metric).quint8, state_of(evaluation)


def state_of(evaluation: Evaluation) -> TrialState:
    """The state of an evaluation's trial. Samplers ignore failed trials."""
    pruned = dict.fromkeys(("refused", "pruned"), TrialState.PRUNED)
    states = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL, **pruned}
    return states[evaluation.state]
