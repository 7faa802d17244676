"""Layer-guided search: what single layers do to a trained network decides, and every evaluation corrects it.

The quint8 accuracy of a plan is taken to be linear in features that are sums over its layers: noise that a layer's rate
adds to the logits, by probes, and noise in its weights and activations, by layer statistics. So the plan with the best
prediction under the ceilings is found exactly among all of a space (`choose.best_plan`). The weights of the features
start from the probes, and are corrected, with what is left uncertain, by a Gaussian process over the evaluations.
Accuracies are those of the constraints' metric.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls
from scipy.stats import norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct, Kernel

from fnet_search.arch.costs import cost_table
from fnet_search.arch.factorize import convolutions
from fnet_search.arch.plan import FactorizationPlan, indices, legal_rates
from fnet_search.base.errors import FnetError
from fnet_search.policy.evaluation import Evaluation, LayerStats, Probe, Probes
from fnet_search.policy.exact_choice import best_plan, pareto_front, sample_plan
from fnet_search.policy.explanation import Explanation, LayerChoice, RateChange
from fnet_search.policy.protocol import PROBES, History, probes_of

Values = npt.NDArray[np.float64]
Table = dict[str, Values]
"""Per layer, a number for each of its legal rates."""

OFFSET = 0.05
"""What training changes in the accuracy of all plans alike, about (fraction of 1)."""
KEPT = 0.5
"""Of what a change costs before any training, the share that training leaves, about."""
DOUBT = 0.5
"""How uncertain what a feature does to the accuracy is before any evaluation, as a share of what all are expected to do
together, when they vary by one standard deviation over a space."""
LEAST_DOUBT = 0.002
"""Of the accuracy (fraction of 1): where the probes show next to nothing, and without them."""
TRAINING = 0.004
"""How much another seed, and what is not linear, change the accuracy, about."""
DRAWS = 32
"""Plans that come into question: the best for so many draws of the weights, and the best for their mean."""


@dataclass(frozen=True)
class LayerGuided:
    """The plan under the constraints with the best chance of being better than the best one so far.

    It stops when no plan is expected to be better by more than the binomial noise of the validation split. Running
    plans count as evaluated, with what is predicted for them, so that workers get different plans.

    `statistics`, `by_probes` and `learning` leave parts of it out, to see what they are worth: the layer statistics;
    all that probes say (then a plan is described by the logarithms of its rates); what evaluations say.
    """

    statistics: bool = True
    by_probes: bool = True
    learning: bool = True
    least: int = 2
    """Evaluations, begun or ended, before it may stop."""

    requires = frozenset({PROBES})

    def suggest(self, history: History) -> FactorizationPlan | None:
        model = Model.of(self, history)
        space, constraints, seen = history.space, history.constraints, history.seen
        if not model.weights.any():  # nothing is known yet
            return sample_plan(space, constraints, seen, history.rng)
        weights = [model.weights, *(model.draws(history.rng) if self.learning else [])]
        best = (best_plan(space, constraints, model.scores(weight), seen) for weight in weights)
        plans = list(dict.fromkeys(plan for plan in best if plan is not None))
        if not plans or not self.learning:
            return plans[0] if plans else None
        chance, gain = model.improvement(plans)
        if len(model.evaluations) + len(history.running) >= self.least and gain.max() <= model.noise:
            return None  # with plans running: until one of them ends
        return plans[int(np.argmax(chance))]

    def explain(self, history: History, plan: FactorizationPlan) -> Explanation:
        """Why a plan: what each layer's next rates would save and are expected to cost, and which features count."""
        model = Model.of(self, history)
        mean, covariance = model.predict([plan])
        scores, costs = model.scores(model.weights), cost_table(history.space).by_layer

        def step(layer: str, index: int, new: int) -> RateChange | None:
            legal = legal_rates(history.space)[layer]
            if not 0 <= new < len(legal):
                return None
            macs = costs[layer][new].conv_macs - costs[layer][index].conv_macs
            return RateChange(legal[new], macs, float(scores[layer][new] - scores[layer][index]))

        places = zip(plan.rates, indices(history.space, plan), strict=True)
        choices = tuple(
            LayerChoice(layer, rate, step(layer, at, at - 1), step(layer, at, at + 1)) for (layer, rate), at in places
        )
        shares = model.weights**2 / (float((model.weights**2).sum()) or 1.0)
        importances = {one.name: float(share) for one, share in zip(model.features, shares, strict=True)}
        points = pareto_front(history.space, scores)
        offset = float(mean[0, 0]) - sum(
            float(scores[layer][at]) for layer, at in zip(scores, indices(history.space, plan), strict=True)
        )
        front = tuple((point.plan, point.conv_macs, point.score + offset) for point in points)
        quint8, fp32 = mean[0].tolist()
        spread = math.sqrt(max(0.0, float(covariance[0, 0])))
        return Explanation(quint8, spread, (fp32 - quint8) / fp32, choices, importances, front)


@dataclass(frozen=True)
class Feature:
    """A sum over layers of increases over the probed network; it varies by one (standard deviation) over a space.

    `prior` is what one such unit is expected to do to the quint8 and the fp32 accuracy, before any evaluation.
    """

    name: str
    table: Table
    prior: tuple[float, float] = (0.0, 0.0)
    harmful: bool = True
    """Whether more of it can only be worse."""


def _scaled(name: str, table: Table, prior: tuple[float, float] = (0.0, 0.0), harmful: bool = True) -> Feature:
    spread = math.sqrt(sum(float(values.var()) for values in table.values())) or 1.0
    scaled = {layer: values / spread for layer, values in table.items()}
    return Feature(name, scaled, (prior[0] * spread, prior[1] * spread), harmful)


def probe_features(history: History, probes: Probes) -> list[Feature]:
    """Noise of the float logits, as a share of their energy, and what noise of the quantized ones does not go with it.

    Losses over a few hundred images are noise themselves, for changes this small; the noise of the logits is not. What
    it does to the loss is seen over all probes together (least squares, not negative). Their accuracies say less still:
    what the loss does to the accuracy is taken from the probed network itself, and from guessing. What quantizing adds
    to one rate and not to its neighbours is an accident of ranges, for the most part, and another one after training:
    the best of many plans would be the luckiest.
    """
    changes, base = probes.changes, probes.unchanged

    def increases(value: Callable[[Probe], float]) -> Values:
        return np.array([value(one) - value(base) for one in changes])

    noise, quint8_noise = increases(lambda one: one.logit_noise), increases(lambda one: one.quint8_logit_noise)
    loss, quint8_loss = increases(lambda one: one.loss), increases(lambda one: one.quint8_loss)
    along, on_loss = _slope(noise, quint8_noise), max(0.0, _slope(noise, loss))
    of_noise, of_rest = nnls(np.stack([noise, quint8_noise - along * noise], axis=1), quint8_loss)[0]
    classes = math.prod(history.space.shapes[history.space.output])
    fp32, quint8_accuracy = _scores(base, history)
    fp32_per_nat, per_nat = _per_nat(fp32, base.loss, classes), _per_nat(quint8_accuracy, base.quint8_loss, classes)
    table = probes.increase(history.space, lambda one: one.logit_noise)
    quint8 = probes.increase(history.space, lambda one: one.quint8_logit_noise)
    rest = {layer: quint8[layer] - along * table[layer] for layer in table}
    return [
        _scaled(
            "noise of the fp32 logits", table, (KEPT * per_nat * max(on_loss, of_noise), KEPT * fp32_per_nat * on_loss)
        ),
        _scaled("further noise of the quint8 logits", rest, (KEPT**2 * per_nat * of_rest, 0.0)),
    ]


def _scores(one: Evaluation | Probe, history: History) -> tuple[float, float]:
    """Accuracies of the float network and the quantized one, by the search's metric. Raises FnetError for probes that
    were measured for another one."""
    fp32, quint8 = one.scores(history.constraints.metric)
    if quint8 is None:
        raise FnetError(f"the probes have no {history.constraints.measured}; measure them with Setup(metric=...)")
    return fp32 or 0.0, quint8


def _per_nat(accuracy: float, loss: float, classes: int) -> float:
    """Accuracy (fraction of 1) that a nat of loss costs, negative: on the line from a network to guessing.

    Of one that is hardly better than guessing in either, as it would be for one that is always right.
    """
    better, nats = accuracy - 1 / classes, math.log(classes) - loss
    return -better / nats if better > 0.05 and nats > 0.05 else -(1 - 1 / classes) / math.log(classes)


def _slope(x: Values, y: Values) -> float:
    """Of the line through the origin."""
    return float(x @ y) / (float(x @ x) or 1.0)


STATISTICS: Mapping[str, Callable[[LayerStats], float]] = {
    "noise of the folded weights": lambda layer: 10 ** (-(layer.weight_sqnr_db or 100.0) / 10),
    "noise of the activations": lambda layer: 10 ** (-(layer.activation_sqnr_db or 100.0) / 10),
    "lost channel precision": lambda layer: -math.log2(max(layer.folded_precision, 2**-8)),
}
"""What is summed over the convolutions that stand for a layer: noise as a share of the signal's energy; bits."""


def statistics_features(history: History, probes: Probes) -> list[Feature]:
    """Layer statistics of each rate: as the probes found them, and as training left them in evaluated plans.

    What training changes in all rates alike, seen where both are known, is taken over for those that no evaluation had.
    """
    found = []
    legal = legal_rates(history.space)
    for name, value in STATISTICS.items():
        probed: dict[tuple[str, int], float] = {}
        for one in probes.changes:
            probed[one.layer, one.rate] = sum(map(value, one.layers))
        trained: dict[tuple[str, int], list[float]] = {}
        for evaluation in history.evaluations:
            measured = {one.layer: value(one) for one in evaluation.layers}
            for layer, rate in evaluation.plan.rates if measured else ():
                total = sum(measured[name] for name in convolutions(layer, rate))
                trained.setdefault((layer, rate), []).append(total)
        means = {key: float(np.mean(values)) for key, values in trained.items()}
        both = [means[key] - probed[key] for key in means.keys() & probed.keys()]
        shift = float(np.mean(sorted(both))) if both else 0.0
        known = {**{key: amount + shift for key, amount in probed.items()}, **means}
        table = {
            layer: np.array(
                [known.get((layer, rate), 0.0) - known.get((layer, probes.plan[layer]), 0.0) for rate in rates]
            )
            for layer, rates in legal.items()
        }
        found.append(_scaled(name, table))
    return found


def rate_features(history: History) -> list[Feature]:
    """The logarithm of each layer's rate: what is known of a plan without probes."""
    legal = legal_rates(history.space)
    return [
        _scaled(
            f"rate of {layer}",
            {name: np.log2(of) if name == layer else np.zeros(len(of)) for name, of in legal.items()},
            harmful=False,
        )
        for layer in legal
    ]


@dataclass(frozen=True)
class Model:
    """What is expected of every plan: a Gaussian process, linear in the features, around what the probes say.

    Two outputs, quint8 and fp32 accuracy. `evaluations` are those that it has learnt from.
    """

    history: History
    features: tuple[Feature, ...]
    base: tuple[float, float]
    """Accuracies of the probed network."""
    evaluations: tuple[Evaluation, ...]
    noise: float
    """Binomial standard error of a score on the validation split; 0 where its size is not known."""
    process: GaussianProcessRegressor

    @staticmethod
    def of(policy: LayerGuided, history: History) -> "Model":
        """Raises FnetError where the host has measured no probes."""
        probes = probes_of(history, policy)
        features = probe_features(history, probes) if policy.by_probes else rate_features(history)
        if policy.statistics and policy.by_probes:
            features += statistics_features(history, probes)
        metric = history.constraints.metric
        measured = [one for one in history.evaluations if one.scores(metric).quint8 is not None]
        # A host may have probed a network that is not in its history, where another has the number.
        probed = next((one for one in measured if (one.number, one.plan) == (probes.number, probes.plan)), None)
        trained = tuple(one for one in measured if one is not probed)
        fp32, quint8 = _scores(probed or probes.unchanged, history)
        images = max((one.effective_images(metric) for one in trained), default=0)
        noise = math.sqrt(quint8 * (1 - quint8) / images) if images else 0.0
        doubt = max(LEAST_DOUBT, DOUBT * sum(abs(one.prior[0]) for one in features))
        kernel: Kernel = ConstantKernel(doubt**2, "fixed") * DotProduct(OFFSET / doubt, "fixed")
        process = GaussianProcessRegressor(kernel, alpha=noise**2 + TRAINING**2, optimizer=None)
        model = Model(history, tuple(features), (quint8, fp32), trained if policy.learning else (), noise, process)
        return model._learnt()

    def _learnt(self) -> "Model":
        """Fitted to the evaluations; then to the running plans too, as if they gave what is predicted."""
        plans, running = [one.plan for one in self.evaluations], list(self.history.running)
        drop = self.base[1] - self.base[0]  # of the probed network: for hosts that know quint8 accuracies only
        reached = [one.scores(self.history.constraints.metric) for one in self.evaluations]
        found = [(quint8 or 0.0, (quint8 or 0.0) + drop if fp32 is None else fp32) for fp32, quint8 in reached]
        known = np.array(found, dtype=np.float64).reshape(-1, 2)
        if plans:
            self.process.fit(self.inputs(plans), known - self.prior(plans))
        if running:
            both, expected = [*plans, *running], self.predict(running)[0]
            self.process.fit(self.inputs(both), np.vstack([known, expected]) - self.prior(both))
        return self

    def inputs(self, plans: list[FactorizationPlan]) -> Values:
        """[plans, features]."""
        rows = [indices(self.history.space, plan) for plan in plans]
        columns = [
            [sum(float(values[index]) for values, index in zip(one.table.values(), row, strict=True)) for row in rows]
            for one in self.features
        ]
        return np.array(columns, dtype=np.float64).T

    def prior(self, plans: list[FactorizationPlan]) -> Values:
        """[plans, 2] accuracies that are expected before any evaluation."""
        weights = np.array([one.prior for one in self.features])
        return np.asarray(np.array(self.base) + self.inputs(plans) @ weights)

    def predict(self, plans: list[FactorizationPlan]) -> tuple[Values, Values]:
        """Expected accuracies [plans, 2], quint8 and fp32, and the covariance [plans, plans] of either."""
        x = self.inputs(plans)
        mean, covariance = self.process.predict(x, return_cov=True)
        if covariance.ndim == 3:
            covariance = covariance[..., 0]  # both outputs have the same
        return np.asarray(self.prior(plans) + mean.reshape(len(plans), -1)), covariance

    @property
    def weights(self) -> Values:
        """Of the features, on the quint8 accuracy."""
        outputs: Values = self.process.predict(self._basis)
        return self._weights(outputs)

    def draws(self, rng: np.random.Generator) -> list[Values]:
        """Weights as they may be: noise that is said to help is taken to do nothing."""
        drawn = self.process.sample_y(self._basis, DRAWS, int(rng.integers(2**31)))
        weights = [self._weights(drawn[..., draw]) for draw in range(DRAWS)]
        noisy = np.array([one.harmful for one in self.features])
        return [np.where(noisy, np.minimum(weight, 0.0), weight) for weight in weights]

    @property
    def _basis(self) -> Values:
        """Inputs that tell a linear function: no feature, and each alone."""
        return np.vstack([np.zeros(len(self.features)), np.eye(len(self.features))])

    def _weights(self, outputs: Values) -> Values:
        quint8 = np.asarray(outputs, dtype=np.float64).reshape(len(self.features) + 1, -1)[:, 0]
        prior = np.array([one.prior[0] for one in self.features])
        return np.asarray(quint8[1:] - quint8[0] + prior)

    def scores(self, weights: Values) -> Table:
        """Per layer and rate, what these weights make of it: a sum over layers is a plan's quint8 accuracy, but for a
        constant."""
        return {
            layer: sum(
                (weight * one.table[layer] for weight, one in zip(weights, self.features, strict=True)),
                np.zeros(len(rates)),
            )
            for layer, rates in legal_rates(self.history.space).items()
        }

    def improvement(self, plans: list[FactorizationPlan]) -> tuple[Values, Values]:
        """Of each plan: the chance that it meets the constraints and is better than the best one so far by more than
        the noise; and how much better it is expected to be (expected improvement), a fraction of 1."""
        constraints = self.history.constraints
        done = [one.plan for one in self.evaluations if constraints.feasible(one)]
        mean, covariance = self.predict([*plans, *done])
        quint8, variance = mean[:, 0], covariance.diagonal()
        new, old = slice(len(plans)), slice(len(plans), None)
        floor = np.full(len(plans), constraints.min_quint8 or -math.inf)
        if constraints.max_drop is not None:
            floor = np.maximum(floor, (1 - constraints.max_drop) * mean[new, 1])
        meets = norm.cdf((quint8[new] - floor) / np.sqrt(np.maximum(variance[new], 1e-12)))
        best = len(plans) + int(np.argmax(quint8[old])) if done else int(np.argmax(quint8[new]))
        more = quint8[new] - quint8[best]
        spread = np.sqrt(np.maximum(variance[new] + variance[best] - 2 * covariance[new, best], 1e-12))
        margin = self.noise if done else 0.0
        gain = more * norm.cdf(more / spread) + spread * norm.pdf(more / spread)
        return meets * norm.cdf((more - margin) / spread), meets * gain
