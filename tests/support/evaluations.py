"""Evaluations as a training might have left them, made up by hand for the tests of what shows them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.layers import Activation, Add, BatchNorm, Concat, Conv, Dense, Flatten, Layer, Pool
from fnet_search.arch.macroarchitecture import Macroarchitecture, Node
from fnet_search.arch.plan import FactorizationPlan, named_plans
from fnet_search.policy.conformance import made_up_layers
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.ranking import ranking
from fnet_search.report.outcome import Outcome

PAPER = {  # fp32 and quint8 accuracy of the paper's networks; those that it does not name are made up
    "regular": (0.8837, 0.8560),
    "f2": (0.8654, 0.8005),
    "f4": (0.8540, 0.7990),
    "f8": (0.8475, 0.7905),
    "f16": (0.8420, 0.7174),
    "init2": (0.8601, 0.8031),
    "init4": (0.8500, 0.7950),
    "dws": (0.8210, 0.7864),
}


def trained(
    space: Macroarchitecture, plan: FactorizationPlan, number: int, fp32: float, quint8: float, layers: bool = True
) -> Evaluation:
    """A complete evaluation with these accuracies (fractions of 1)."""
    drop = (fp32 - quint8) / fp32
    return Evaluation(
        number,
        plan,
        plan_cost(space, plan),
        scheme="percentile:1",
        epochs=3,
        trained_images=135_000,
        fp32_accuracy=fp32,
        quint8_accuracy=quint8,
        qmse=0.4 + 40 * drop,
        qce=0.45 + 4 * drop,
        kl=0.05 + 4 * drop,
        layers=made_up_layers(space, plan) if layers else (),
    )


def refused(space: Macroarchitecture, plan: FactorizationPlan, number: int, reason: str = "over budget") -> Evaluation:
    return Evaluation(number, plan, plan_cost(space, plan), state="refused", reason=reason)


def failed(space: Macroarchitecture, plan: FactorizationPlan, number: int, reason: str = "loss is NaN") -> Evaluation:
    return Evaluation(number, plan, plan_cost(space, plan), state="failed", reason=reason, epochs=1)


def pruned(
    space: Macroarchitecture, plan: FactorizationPlan, number: int, accuracies: tuple[float, ...] = (0.25,)
) -> Evaluation:
    """One whose training was stopped after as many epochs, with these accuracies after each."""
    reason = f"behind the others after epoch {len(accuracies)} of 8 ({100 * accuracies[-1]:.1f} %)"
    epochs = len(accuracies)
    cost = plan_cost(space, plan)
    return Evaluation(
        number, plan, cost, "pruned", reason, epochs=epochs, trained_images=45_000 * epochs, accuracies=accuracies
    )


def paper_evaluations(space: Macroarchitecture) -> tuple[Evaluation, ...]:
    """The paper's eight networks, on any space; names of one plan give one evaluation."""
    plans = named_plans(space)
    accuracies = {plans[name]: accuracy for name, accuracy in PAPER.items() if name in plans}
    return tuple(trained(space, plan, number, *pair) for number, (plan, pair) in enumerate(accuracies.items()))


def outcome(
    space: Macroarchitecture,
    constraints: Constraints,
    evaluations: Sequence[Evaluation],
    folder: Path = Path("run"),
    **known: Any,
) -> Outcome:
    """What a search came to; its winner is the best one."""
    best = next(iter(ranking(tuple(evaluations), constraints)), None)
    return Outcome(folder, space, constraints, "validation", tuple(evaluations), best, **known)


def residual_space(blocks: int = 8) -> Macroarchitecture:
    """A residual network: two 3x3 convolutions a block, every other block halves the image; ends in a concat."""
    nodes: list[Node] = []

    def then(name: str, layer: Layer, *inputs: str) -> str:
        nodes.append(Node(name, layer, inputs))
        return name

    last, channels = then("stem", Conv(16, padding=(1, 1)), "input"), 16
    for block in range(1, blocks + 1):
        step = 2 if block % 2 == 0 and block < 8 else 1
        width, first, name = channels * step, last, f"block{block}"
        last = then(f"{name}.conv1", Conv(width, padding=(1, 1), stride=(step, step), factorize=True), f"{first}")
        last = then(f"{name}.act1", Activation(), then(f"{name}.bn1", BatchNorm(), last))
        last = then(
            f"{name}.bn2", BatchNorm(), then(f"{name}.conv2", Conv(width, padding=(1, 1), factorize=True), last)
        )
        if step > 1:
            first = then(f"{name}.short", Conv(width, (1, 1), stride=(step, step)), first)
        last = then(f"{name}.act2", Activation(), then(f"{name}.add", Add(), last, first))
        channels = width
    branches = [
        then(f"head.conv{kernel}", Conv(32, (kernel, kernel), padding=(kernel // 2, kernel // 2)), last)
        for kernel in (1, 3)
    ]
    branches.append(then("head.pool", Pool("max", (3, 3), (1, 1), (1, 1)), last))
    last = then("head.gap", Pool("global_average"), then("head.concat", Concat(), *branches))
    then("out", Dense(10), then("flatten", Flatten(), last))
    return Macroarchitecture("residual", (3, 32, 32), tuple(nodes))
