"""Which evaluation wins, and which one a child starts from."""

from collections.abc import Iterable
from math import inf, prod

from fnet_search.arch.plan import FactorizationPlan
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.metric import MetricName


def ranking(evaluations: tuple[Evaluation, ...], constraints: Constraints) -> list[Evaluation]:
    """The trained evaluations, best first: feasible ones by quint8 accuracy (of the constraints' metric), then the
    lower quint8 loss, then fewest conv MACs; then the others, least summed violation first. The first is a search's
    winner, if it is feasible; else the nearest to it."""

    def key(evaluation: Evaluation) -> tuple[float, float, float, int, int]:
        excess = sum(max(0.0, value) for value in constraints.of(evaluation).values())
        loss = inf if evaluation.quint8_loss is None else evaluation.quint8_loss
        score = evaluation.scores(constraints.metric).quint8 or 0.0
        return excess, -score, loss, evaluation.cost.conv_macs, evaluation.number

    return sorted((one for one in evaluations if one.state == "complete" and one.role != "reference"), key=key)


def choose_parent(
    evaluations: Iterable[Evaluation], plan: FactorizationPlan, metric: MetricName = "accuracy"
) -> Evaluation | None:
    """What a child of this plan starts from: of the trained networks each of whose rates divides the child's, the least
    factorized one (smallest product of rates: of it a child loses least), then the highest fp32 score, then the lowest
    number. None if there is none.

    So all children of a search start from its reference, if it was trained: they had equal training, and which ended
    before does not matter.
    """

    def key(one: Evaluation) -> tuple[int, float, int]:
        return prod(one.plan.by_layer.values()), -(one.scores(metric).fp32 or 0.0), one.number

    trained = (one for one in evaluations if one.state == "complete")
    fitting = (one for one in trained if all(plan[layer] % rate == 0 for layer, rate in one.plan.rates))
    return min(fitting, key=key, default=None)
