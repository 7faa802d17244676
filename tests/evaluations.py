"""Evaluations as a training might have left them, made up by hand for the tests of what shows them."""

from collections.abc import Mapping, Sequence

import numpy as np

from fnet_search.macro import (
    Activation,
    Add,
    BatchNorm,
    Concat,
    Conv,
    Dense,
    Flatten,
    Layer,
    Macroarchitecture,
    Node,
    Pool,
)
from fnet_search.plan import (
    FactorizationPlan,
    factorize,
    layer_cost,
    legal_rates,
    make_plan,
    named_plans,
    plan_cost,
    regular,
)
from fnet_search.policy import Evaluation, LayerStats, Probe, Probes

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


def layer_stats(space: Macroarchitecture, plan: FactorizationPlan, seed: int = 0) -> tuple[LayerStats, ...]:
    """Plausible statistics of every convolution and dense layer of a plan's network."""
    rng = np.random.default_rng((seed, *[rate for _, rate in plan.rates]))
    network = factorize(space, plan)
    layers = []
    for node in network.order:
        if not isinstance(node.layer, Conv | Dense):
            continue
        cost = layer_cost(node, network.input_shapes(node))
        few = rng.lognormal(0, 0.4) * (3 if isinstance(node.layer, Conv) and node.layer.groups > 1 else 1)
        linear = node.name == network.output
        layers.append(
            LayerStats(
                layer=node.name,
                kind=node.layer.kind,
                macs=cost.total_macs,
                params=cost.params,
                weight_min=-0.3 * few,
                weight_max=0.35 * few,
                weight_precision=float(rng.uniform(0.4, 0.9)),
                folded_min=-0.8 * few**2,
                folded_max=0.9 * few**2,
                folded_precision=float(rng.uniform(0.1, 0.7)),
                activation_min=-9.5 if linear else 0.0,
                activation_max=float(rng.uniform(1.5, 9)),
                activation_precision=float(rng.uniform(0.3, 0.8)),
                weight_sqnr_db=float(rng.uniform(28, 42)),
                activation_sqnr_db=float(rng.uniform(20, 38)),
                accumulated_sqnr_db=float(rng.uniform(8, 20)),
                sparsity=0.0 if linear else float(rng.uniform(0.3, 0.8)),
                dead_weight_channels=0,
                dead_activation_channels=int(rng.integers(0, 3)),
            )
        )
    return tuple(layers)


def probes(space: Macroarchitecture, seed: int = 0, noise: Mapping[str, Sequence[float]] | None = None) -> Probes:
    """Plausible probes of a regular network: further factorized is noisier. All else follows from the noise of the
    quint8 logits over that of the network as it is, which may be given per layer and rate."""
    rng, plan, changes = np.random.default_rng(seed), regular(space), []
    unchanged = Probe("", 1, plan_cost(space, plan).conv_macs, 256, 0.6, 0.9, 0.8, 0.75, None, 7.0, (), 1.0)
    for layer, rates in legal_rates(space).items():
        grown = np.cumsum(rng.uniform(0.001, 0.01, len(rates)))
        for index, rate in enumerate(rates[1:], 1):
            more = float(grown[index]) if noise is None else noise[layer][index]
            changed = make_plan(space, {layer: rate})
            statistics = [one for one in layer_stats(space, changed, seed) if one.layer.startswith(f"{layer}.")]
            changes.append(
                Probe(
                    layer,
                    rate,
                    plan_cost(space, changed).conv_macs,
                    256,
                    loss=0.6 + more / 4,
                    quint8_loss=0.9 + more,
                    fp32_accuracy=0.8 - more / 8,
                    quint8_accuracy=0.75 - more / 2,
                    logit_snr_db=-10 * np.log10(0.1 * more + 1e-9),
                    logit_sqnr_db=-10 * np.log10(unchanged.quint8_logit_noise + more),
                    layers=tuple(statistics),
                    fisher=float(rng.uniform(0.5, 1.5)),
                )
            )
    return Probes(0, plan, unchanged, tuple(changes))


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
        layers=layer_stats(space, plan) if layers else (),
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
