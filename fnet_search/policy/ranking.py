"""Selects the winner among evaluations, and the parent of a child."""

from collections.abc import Iterable
from math import inf, prod

from fnet_search.arch.plan import FactorizationPlan
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.metric import MetricName


def ranking(evaluations: tuple[Evaluation, ...], constraints: Constraints) -> list[Evaluation]:
    """The complete evaluations without the reference, best first.

    Feasible ones come first, by highest quint8 score (of the constraints' metric), then lowest quint8 loss, then fewest
    conv MACs; then the others, by least summed violation. The first one is the winner of a search.
    """

    def key(evaluation: Evaluation) -> tuple[float, float, float, int, int]:
        excess = sum(max(0.0, value) for value in constraints.of(evaluation).values())
        loss = inf if evaluation.quint8_loss is None else evaluation.quint8_loss
        score = evaluation.scores(constraints.metric).quint8 or 0.0
        return excess, -score, loss, evaluation.cost.conv_macs, evaluation.number

    trained = (evaluation for evaluation in evaluations if evaluation.state == "complete")
    return sorted((evaluation for evaluation in trained if evaluation.role != "reference"), key=key)


def choose_parent(
    evaluations: Iterable[Evaluation], plan: FactorizationPlan, metric: MetricName = "accuracy"
) -> Evaluation | None:
    """The parent of a child with this plan: a trained network each of whose rates divides the child's.

    Takes the least factorized one (smallest product of rates), because a child loses least of it; then the highest fp32
    score, then the lowest number. None if there is none. So all children start from the regular network, if
    that was trained: they get equal training, in whatever order candidates end.
    """

    def key(evaluation: Evaluation) -> tuple[int, float, int]:
        rates = evaluation.plan.by_layer.values()
        return prod(rates), -(evaluation.scores(metric).fp32 or 0.0), evaluation.number

    def divides(evaluation: Evaluation) -> bool:
        return all(plan[layer] % rate == 0 for layer, rate in evaluation.plan.rates)

    trained = (evaluation for evaluation in evaluations if evaluation.state == "complete")
    return min(filter(divides, trained), key=key, default=None)
