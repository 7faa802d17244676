"""Layer-guided search: predicts plans from probes of single layers, and corrects the prediction by every evaluation.

The quint8 accuracy of a plan is modelled as linear in features that are sums over its layers: the noise that a layer's
rate adds to the logits, from probes, and the noise in its weights and activations, from layer statistics. So the plan
with the best prediction under the ceilings is found exactly (`exact_choice.best_plan`). The features' weights have a
prior mean from the probes; a Gaussian process over the evaluations gives their posterior. Accuracies are scores by the
constraints' metric.
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
"""Per layer, one number for each of its legal rates."""

OFFSET = 0.05
"""Prior standard deviation of the offset common to all plans: by how much training shifts all accuracies alike, as a
fraction of 1; an estimate."""
KEPT = 0.5
"""The share of a change's loss before training that remains after it: training halves it, roughly."""
DOUBT = 0.5
"""Prior standard deviation of a feature's weight (accuracy per standard deviation of the feature over the space), as a
share of the summed expected effects of all features."""
LEAST_DOUBT = 0.002
"""The smallest such standard deviation (fraction of 1): where probes show almost nothing, and without probes."""
TRAINING = 0.004
"""Standard deviation of a score due to the seed and to nonlinear effects (fraction of 1), besides the sampling noise of
the validation images."""
DRAWS = 32
"""Draws of the weights. The plans compared are the best one for each draw and the best one for the mean."""


@dataclass(frozen=True)
class LayerGuided:
    """The plan under the ceilings with the best chance of meeting the constraints and beating the best one so far.

    It stops when no plan is expected to be better by more than the binomial noise of the validation split. Running
    plans count as evaluated with their predictions, so that workers get different plans.

    `statistics`, `by_probes` and `learning` switch off parts for ablation: the layer statistics; the probes (then the
    features are the logarithms of the rates); the evaluations.
    """

    statistics: bool = True
    by_probes: bool = True
    learning: bool = True
    least: int = 2
    """Evaluations, running ones included, before it may stop."""

    requires = frozenset({PROBES})

    def suggest(self, history: History) -> FactorizationPlan | None:
        model = Model.of(self, history)
        space, constraints, seen = history.space, history.constraints, history.seen
        if not model.weights.any():  # no feature has any effect yet
            return sample_plan(space, constraints, seen, history.rng)
        candidates = [model.weights, *(model.draws(history.rng) if self.learning else [])]
        best = (best_plan(space, constraints, model.scores(weights), seen) for weights in candidates)
        plans = list(dict.fromkeys(plan for plan in best if plan is not None))
        if not plans or not self.learning:
            return plans[0] if plans else None
        chance, gain = model.improvement(plans)
        if len(model.evaluations) + len(history.running) >= self.least and gain.max() <= model.noise:
            return None  # with plans running: asked again when one of them ends
        return plans[int(np.argmax(chance))]

    def explain(self, history: History, plan: FactorizationPlan) -> Explanation:
        """What each layer's neighbouring rates would save and are expected to cost, and how much each feature
        counts."""
        model = Model.of(self, history)
        mean, covariance = model.predict([plan])
        scores, costs = model.scores(model.weights), cost_table(history.space).by_layer

        def change(layer: str, index: int, new: int) -> RateChange | None:
            legal = legal_rates(history.space)[layer]
            if not 0 <= new < len(legal):
                return None
            macs = costs[layer][new].conv_macs - costs[layer][index].conv_macs
            return RateChange(legal[new], macs, float(scores[layer][new] - scores[layer][index]))

        places = zip(plan.rates, indices(history.space, plan), strict=True)
        choices = tuple(
            LayerChoice(layer, rate, change(layer, at, at - 1), change(layer, at, at + 1))
            for (layer, rate), at in places
        )
        shares = model.weights**2 / (float((model.weights**2).sum()) or 1.0)
        importances = {feature.name: float(share) for feature, share in zip(model.features, shares, strict=True)}
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
    """A sum over layers of increases over the probed network, scaled to a standard deviation of 1 over the space.

    `prior` is the expected effect of one unit on the quint8 and on the fp32 accuracy, before any evaluation.
    """

    name: str
    table: Table
    prior: tuple[float, float] = (0.0, 0.0)
    harmful: bool = True
    """Whether more of it can only lower the accuracy."""


def _scaled(name: str, table: Table, prior: tuple[float, float] = (0.0, 0.0), harmful: bool = True) -> Feature:
    """The feature of a table and a prior per unit of it, scaled to a standard deviation of 1 over the space."""
    spread = math.sqrt(sum(float(values.var()) for values in table.values())) or 1.0
    scaled = {layer: values / spread for layer, values in table.items()}
    return Feature(name, scaled, (prior[0] * spread, prior[1] * spread), harmful)


def probe_features(history: History, probes: Probes) -> list[Feature]:
    """Two features: the noise of the float logits as a share of their energy, and the part of the noise of the
    quantized logits that is not proportional to it.

    For changes this small, losses over a few hundred images are mostly sampling noise; the noise of the logits is not.
    Its effect on the loss is fitted over all probes together (non-negative least squares). Accuracies are noisier
    still, so the accuracy per nat of loss comes from the probed network (`_per_nat`). The noise that quantization adds
    at one rate but not at neighbouring rates is mostly an accident of the ranges and differs after training. With its
    full weight, the plan with the best prediction would be the one with the luckiest ranges. So it is discounted once
    more by KEPT.
    """
    changes, base = probes.changes, probes.unchanged

    def increases(value: Callable[[Probe], float]) -> Values:
        return np.array([value(probe) - value(base) for probe in changes])

    noise, quint8_noise = increases(lambda probe: probe.logit_noise), increases(lambda probe: probe.quint8_logit_noise)
    loss, quint8_loss = increases(lambda probe: probe.loss), increases(lambda probe: probe.quint8_loss)
    along, on_loss = _slope(noise, quint8_noise), max(0.0, _slope(noise, loss))
    of_noise, of_rest = nnls(np.stack([noise, quint8_noise - along * noise], axis=1), quint8_loss)[0]
    classes = math.prod(history.space.shapes[history.space.output])
    fp32, quint8_accuracy = _scores(base, history)
    fp32_per_nat, per_nat = _per_nat(fp32, base.loss, classes), _per_nat(quint8_accuracy, base.quint8_loss, classes)
    table = probes.increase(history.space, lambda probe: probe.logit_noise)
    quint8 = probes.increase(history.space, lambda probe: probe.quint8_logit_noise)
    rest = {layer: quint8[layer] - along * table[layer] for layer in table}
    return [
        _scaled(
            "noise of the fp32 logits", table, (KEPT * per_nat * max(on_loss, of_noise), KEPT * fp32_per_nat * on_loss)
        ),
        _scaled("further noise of the quint8 logits", rest, (KEPT**2 * per_nat * of_rest, 0.0)),
    ]


def _scores(measured: Evaluation | Probe, history: History) -> tuple[float, float]:
    """Scores of the float and the quantized network by the search's metric. Raises FnetError for probes that were
    measured for another metric."""
    fp32, quint8 = measured.scores(history.constraints.metric)
    if quint8 is None:
        wanted = history.constraints
        raise FnetError(f"the probes have no {wanted.measured}; measure them with `metric` {wanted.metric!r}")
    return fp32 or 0.0, quint8


def _per_nat(accuracy: float, loss: float, classes: int) -> float:
    """The accuracy (fraction of 1) that a nat of loss costs, negative: the slope from this network to chance level.

    For a network hardly better than chance in either, the slope from a network that is always right.
    """
    better, nats = accuracy - 1 / classes, math.log(classes) - loss
    return -better / nats if better > 0.05 and nats > 0.05 else -(1 - 1 / classes) / math.log(classes)


def _slope(x: Values, y: Values) -> float:
    """Least-squares slope of a line through the origin."""
    return float(x @ y) / (float(x @ x) or 1.0)


STATISTICS: Mapping[str, Callable[[LayerStats], float]] = {
    "noise of the folded weights": lambda layer: 10 ** (-(layer.weight_sqnr_db or 100.0) / 10),
    "noise of the activations": lambda layer: 10 ** (-(layer.activation_sqnr_db or 100.0) / 10),
    "lost channel precision": lambda layer: -math.log2(max(layer.folded_precision, 2**-8)),
}
"""Statistics summed over the convolutions that replace a layer: noise as a share of the signal's energy; bits."""


def statistics_features(history: History, probes: Probes) -> list[Feature]:
    """Features from the layer statistics of each rate: measured in evaluated plans where known, else by the probes.

    Probed values are shifted by the mean difference that training makes where both are known.
    """
    features = []
    legal = legal_rates(history.space)
    for name, value in STATISTICS.items():
        probed: dict[tuple[str, int], float] = {}
        for probe in probes.changes:
            probed[probe.layer, probe.rate] = sum(map(value, probe.layers))
        trained: dict[tuple[str, int], list[float]] = {}
        for evaluation in history.evaluations:
            measured = {stats.layer: value(stats) for stats in evaluation.layers}
            for layer, rate in evaluation.plan.rates if measured else ():
                total = sum(measured[name] for name in convolutions(layer, rate))
                trained.setdefault((layer, rate), []).append(total)
        means = {key: float(np.mean(values)) for key, values in trained.items()}
        differences = [means[key] - probed[key] for key in means.keys() & probed.keys()]
        shift = float(np.mean(sorted(differences))) if differences else 0.0
        amounts = {**{key: amount + shift for key, amount in probed.items()}, **means}
        table = {
            layer: np.array(
                [amounts.get((layer, rate), 0.0) - amounts.get((layer, probes.plan[layer]), 0.0) for rate in rates]
            )
            for layer, rates in legal.items()
        }
        features.append(_scaled(name, table))
    return features


def rate_features(history: History) -> list[Feature]:
    """Features without probes: the logarithm of each layer's rate."""
    legal = legal_rates(history.space)
    return [
        _scaled(
            f"rate of {layer}",
            {name: np.log2(rates) if name == layer else np.zeros(len(rates)) for name, rates in legal.items()},
            harmful=False,
        )
        for layer in legal
    ]


@dataclass(frozen=True)
class Model:
    """Predicts the accuracies of plans: a Gaussian process, linear in the features, with the probes' prior as its mean.

    It has two outputs, quint8 and fp32 accuracy. `evaluations` are those that it is fitted to.
    """

    history: History
    features: tuple[Feature, ...]
    base: tuple[float, float]
    """quint8 and fp32 accuracy of the probed network."""
    evaluations: tuple[Evaluation, ...]
    noise: float
    """Binomial standard error of a score on the validation split; 0 if its size is not amounts."""
    process: GaussianProcessRegressor

    @staticmethod
    def of(policy: LayerGuided, history: History) -> "Model":
        """The model fitted to a history. Raises FnetError if the host has measured no probes."""
        probes = probes_of(history, policy)
        features = probe_features(history, probes) if policy.by_probes else rate_features(history)
        if policy.statistics and policy.by_probes:
            features += statistics_features(history, probes)
        metric = history.constraints.metric
        measured = [evaluation for evaluation in history.evaluations if evaluation.scores(metric).quint8 is not None]
        # A host may have probed a network that is not in its history: then another evaluation may have its number.
        of_probes = (known for known in measured if (known.number, known.plan) == (probes.number, probes.plan))
        probed = next(of_probes, None)
        trained = tuple(evaluation for evaluation in measured if evaluation is not probed)
        fp32, quint8 = _scores(probed or probes.unchanged, history)
        images = max((evaluation.effective_images(metric) for evaluation in trained), default=0)
        noise = math.sqrt(quint8 * (1 - quint8) / images) if images else 0.0
        doubt = max(LEAST_DOUBT, DOUBT * sum(abs(feature.prior[0]) for feature in features))
        # DotProduct(s) is x y + s^2: weights of variance doubt^2 and an offset of variance OFFSET^2.
        kernel: Kernel = ConstantKernel(doubt**2, "fixed") * DotProduct(OFFSET / doubt, "fixed")
        process = GaussianProcessRegressor(kernel, alpha=noise**2 + TRAINING**2, optimizer=None)
        model = Model(history, tuple(features), (quint8, fp32), trained if policy.learning else (), noise, process)
        return model._fitted()

    def _fitted(self) -> "Model":
        """Fits to the evaluations; then also to the running plans, with their predictions as results."""
        plans, running = [evaluation.plan for evaluation in self.evaluations], list(self.history.running)
        drop = self.base[1] - self.base[0]  # of the probed network, for hosts that only know quint8 accuracies
        scores = [evaluation.scores(self.history.constraints.metric) for evaluation in self.evaluations]
        outputs = [(quint8 or 0.0, (quint8 or 0.0) + drop if fp32 is None else fp32) for fp32, quint8 in scores]
        observed = np.array(outputs, dtype=np.float64).reshape(-1, 2)
        if plans:
            self.process.fit(self.inputs(plans), observed - self.prior(plans))
        if running:
            plans_and_running, expected = [*plans, *running], self.predict(running)[0]
            self.process.fit(
                self.inputs(plans_and_running), np.vstack([observed, expected]) - self.prior(plans_and_running)
            )
        return self

    def inputs(self, plans: list[FactorizationPlan]) -> Values:
        """The features of plans, [plans, features]."""
        rows = [indices(self.history.space, plan) for plan in plans]
        columns = [
            [sum(float(values[at]) for values, at in zip(feature.table.values(), row, strict=True)) for row in rows]
            for feature in self.features
        ]
        return np.array(columns, dtype=np.float64).T

    def prior(self, plans: list[FactorizationPlan]) -> Values:
        """Expected accuracies before any evaluation, quint8 and fp32, [plans, 2]."""
        weights = np.array([feature.prior for feature in self.features])
        return np.asarray(np.array(self.base) + self.inputs(plans) @ weights)

    def predict(self, plans: list[FactorizationPlan]) -> tuple[Values, Values]:
        """Expected accuracies, quint8 and fp32, [plans, 2], and the covariance of either, [plans, plans]."""
        x = self.inputs(plans)
        mean, covariance = self.process.predict(x, return_cov=True)
        if covariance.ndim == 3:
            covariance = covariance[..., 0]  # the same for both outputs
        return np.asarray(self.prior(plans) + mean.reshape(len(plans), -1)), covariance

    @property
    def weights(self) -> Values:
        """The expected weights of the features on the quint8 accuracy, [features]."""
        outputs: Values = self.process.predict(self._basis)
        return self._weights(outputs)

    def draws(self, rng: np.random.Generator) -> list[Values]:
        """DRAWS draws of the weights; a positive weight of a harmful feature is set to 0."""
        drawn = self.process.sample_y(self._basis, DRAWS, int(rng.integers(2**31)))
        weights = [self._weights(drawn[..., draw]) for draw in range(DRAWS)]
        harmful = np.array([feature.harmful for feature in self.features])
        return [np.where(harmful, np.minimum(weight, 0.0), weight) for weight in weights]

    @property
    def _basis(self) -> Values:
        """Inputs that determine a linear function: the origin and the unit vectors, [1 + features, features]."""
        return np.vstack([np.zeros(len(self.features)), np.eye(len(self.features))])

    def _weights(self, outputs: Values) -> Values:
        """Weights on the quint8 accuracy from the process's outputs at `_basis`, the prior included."""
        quint8 = np.asarray(outputs, dtype=np.float64).reshape(len(self.features) + 1, -1)[:, 0]
        prior = np.array([feature.prior[0] for feature in self.features])
        return np.asarray(quint8[1:] - quint8[0] + prior)

    def scores(self, weights: Values) -> Table:
        """Per layer and rate, the score under these weights: summed over layers, a plan's quint8 accuracy up to a
        constant."""
        return {
            layer: sum(
                (weight * feature.table[layer] for weight, feature in zip(weights, self.features, strict=True)),
                np.zeros(len(rates)),
            )
            for layer, rates in legal_rates(self.history.space).items()
        }

    def improvement(self, plans: list[FactorizationPlan]) -> tuple[Values, Values]:
        """Per plan: the probability that it meets the constraints and beats the best one so far by more than the noise,
        and its expected improvement, a fraction of 1, times the probability that it meets the constraints."""
        constraints = self.history.constraints
        done = [evaluation.plan for evaluation in self.evaluations if constraints.feasible(evaluation)]
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
