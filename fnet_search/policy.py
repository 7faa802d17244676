"""What a policy sees and what it returns. No torch and no Optuna: a host needs this file, `plan` and `macro` only.

A policy is a function of the past (design, section 5). It keeps no state that matters between calls, and its random
numbers come from ``(history.seed, history.number)``; so a resumed search suggests what an uninterrupted one would
have, and any number of workers can share one policy.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, fields, replace
from fractions import Fraction
from importlib.metadata import entry_points
from math import inf, prod
from typing import Any, Literal, Protocol, cast, get_args

import numpy as np
import numpy.typing as npt

from fnet_search.errors import FnetError, unknown
from fnet_search.macro import Macroarchitecture
from fnet_search.metric import ClassResult, MetricName, Scored, Scores, exact, score
from fnet_search.plan import Cost, FactorizationPlan, check_plan, legal_rates, plan_cost, regular, smallest_conv_macs
from fnet_search.plugins import fault, importable, load_object
from fnet_search.quantities import budgets_meant, millions, mmac, parse_budget, parse_count, parse_share, percent

State = Literal["complete", "pruned", "refused", "failed"]
Role = Literal["candidate", "reference", "final"]
SplitName = Literal["validation", "test"]
HELD_OUT = "held out of the training images"
"""What a validation split is that has no images of its own."""
MAYBE_KNOWN = f"{HELD_OUT}, which the weights may know"
"""And what it is where training starts from weights that were given."""


@dataclass(frozen=True, slots=True)
class LayerStats:
    """What one trained convolution or dense layer looks like (paper, section 2).

    Precisions are average channel precisions, paper equation (3), between 0 and 1. Activations are those after the
    layer's ReLU where one follows, clipped to the quantized range. SQNR in dB, None where there is no noise or no
    signal. Channels whose values never change are dead: they count 0 in a precision, and are counted here.
    """

    layer: str
    kind: str
    macs: int
    params: int
    weight_min: float
    weight_max: float
    weight_precision: float
    folded_min: float
    folded_max: float
    folded_precision: float
    activation_min: float
    activation_max: float
    activation_precision: float
    weight_sqnr_db: float | None
    activation_sqnr_db: float | None
    """Only this activation quantized."""
    accumulated_sqnr_db: float | None
    """This activation and everything before it quantized."""
    sparsity: float
    """Share of the activation's elements that are exactly zero."""
    dead_weight_channels: int
    dead_activation_channels: int


@dataclass(frozen=True)
class Audit:
    """How an exported network agreed with the integer simulator when ONNX Runtime ran it on `images` images.

    `differing` of its output `codes` were not the same, and so many `predictions` (classes of images).
    """

    images: int = 0
    codes: int = 0
    differing: int = 0
    predictions: int = 0

    def __add__(self, other: "Audit") -> "Audit":
        return Audit(
            self.images + other.images,
            self.codes + other.codes,
            self.differing + other.differing,
            self.predictions + other.predictions,
        )

    def __str__(self) -> str:
        codes = f"{self.differing:,} of {self.codes:,} output codes"
        return f"{codes} and {self.predictions:,} of {self.images:,} predictions differ"


@dataclass(frozen=True)
class Evaluation(Scored):
    """Everything measured on one candidate (paper, section 2). Accuracies and `relative_drop` are fractions of 1.

    A refused plan (constraint, repeat) was never trained; a failed one could not be; of a pruned one the training was
    stopped early. All say why in `reason`.
    """

    number: int
    plan: FactorizationPlan
    cost: Cost
    state: State = "complete"
    reason: str = ""
    role: Role = "candidate"
    """``reference``: above the ceilings, trained since others start from it; never wins. ``final``: the best candidate
    trained on, at the end of a search."""
    split: SplitName = "validation"
    validation: str = ""
    """What the validation split is, where it is `split`: the folder of its images, HELD_OUT or MAYBE_KNOWN."""
    scheme: str = ""
    """How it was quantized: `scheme.Scheme` as text."""
    seed: int = 0
    epochs: int = 0
    """Its own; what it started from had `inherited_epochs` before."""
    trained_images: int = 0
    """In its own epochs."""
    parent: int | None = None
    """Number of the candidate that it started from; None: from scratch."""
    inherited_epochs: int = 0
    zero_shot_accuracy: float | None = None
    """As `accuracies`, of a network that starts from a parent, before it is trained."""
    accuracies: tuple[float, ...] = ()
    """After each of its own epochs: of the float network as trained, on at most 2,000 images of the split; on the
    training images where nothing is held out. In a search for balanced accuracy, that."""
    fp32_accuracy: float | None = None
    quint8_accuracy: float | None = None
    fp32_loss: float | None = None
    """Mean cross entropy with the labels, nats; as `quint8_loss`."""
    quint8_loss: float | None = None
    images: int = 0
    """Of `split`, that the accuracies were measured on."""
    right: str = ""
    """Which of them the quint8 network classifies right: a bit an image, in order of their classes, the first one the
    lowest, as a hexadecimal number (`paired`). Empty: not known."""
    classes: tuple[ClassResult, ...] = ()
    """In the order of the data set's; empty: not known."""
    qmse: float | None = None
    """Mean of (y_fp32 - y_quint8)^2 over samples and classes, on the logits."""
    qce: float | None = None
    """Cross entropy of softmax(y_quint8) under softmax(y_fp32), natural log."""
    kl: float | None = None
    """`qce` less the entropy of softmax(y_fp32)."""
    audit: Audit | None = None
    """On the images of `split`; None: not audited."""
    layers: tuple[LayerStats, ...] = ()
    common: "Evaluation | None" = None
    """The same network quantized with the one scheme that the whole run has for its policy: what a history holds, so
    that candidates stay comparable. None: this one."""

    @property
    def relative_drop(self) -> float | None:
        """(fp32 - quint8) / fp32 accuracy."""
        return Scores(self.fp32_accuracy, self.quint8_accuracy).relative_drop

    @property
    def remark(self) -> str:
        """What is to be said of it: the reason why it was not measured, or that a network answers always the same."""
        return self.reason or self.constant

    @staticmethod
    def of(space: Macroarchitecture, plan: FactorizationPlan, **measured: Any) -> "Evaluation":
        """One made by a host of its own: the costs are counted here, the other fields are given, as in
        ``Evaluation.of(space, plan, quint8_accuracy=0.81)``. Raises FnetError for a plan that is not of the space, for
        an accuracy that is not a fraction of 1, and for a complete one without its quint8 accuracy."""
        check_plan(space, plan)
        classes = measured.get("classes", ())
        for network in ("fp32", "quint8"):  # which classes tell
            found = score("accuracy", ((getattr(one, f"{network}_right"), one.images) for one in classes))
            measured = {f"{network}_accuracy": found, **measured}
        made = Evaluation(**{"number": 0, "plan": plan, "cost": plan_cost(space, plan), **measured})
        needed = {"fp32_accuracy": False, "quint8_accuracy": made.state == "complete"}
        for name, must in needed.items():
            value = getattr(made, name)
            if must if value is None else not 0 <= value <= 1:
                raise FnetError(f"{name} must be a fraction of 1, got {value}; if it failed, say state='failed'")
        return made

    def to_json(self) -> dict[str, Any]:
        """JSON-able form; `from_json` gives an equal Evaluation back."""
        common = None if self.common is None else self.common.to_json()
        facts = {**asdict(replace(self, common=None)), "classes": [*map(astuple, self.classes)]}
        return {**facts, "plan": dict(self.plan.rates), "common": common}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Evaluation":
        known = {option.name for option in fields(Evaluation)}
        values = {key: value for key, value in data.items() if key in known}
        return Evaluation(
            **{
                **values,
                "plan": FactorizationPlan(tuple(data["plan"].items())),
                "cost": Cost(**data["cost"]),
                "audit": Audit(**data["audit"]) if data.get("audit") else None,
                "accuracies": tuple(data.get("accuracies", ())),
                "classes": _class_results(data),
                "layers": tuple(LayerStats(**layer) for layer in data["layers"]),
                "common": Evaluation.from_json(data["common"]) if data.get("common") else None,
            }
        )


@dataclass(frozen=True)
class Probe(Scored):
    """What one change does: a trained network in which one layer has another rate, made by warm start and not trained.

    Measured on `images` held-out training images. Losses are mean cross entropies in nats, accuracies fractions of 1.
    """

    layer: str
    """Empty: the network as it is."""
    rate: int
    conv_macs: int
    """Of the whole network, so changed."""
    images: int
    loss: float
    quint8_loss: float
    fp32_accuracy: float
    quint8_accuracy: float
    logit_snr_db: float | None
    """Signal to noise of the float logits, the logits without the change being the signal; None: no noise."""
    logit_sqnr_db: float | None
    """Of the quantized logits, against the same."""
    layers: tuple[LayerStats, ...]
    """Of the changed layer's convolutions; of all that can be factorized where nothing is changed."""
    fisher: float | None = None
    """Fisher score of the whole network at initialisation, for policies that ask for it (`Policy`)."""
    classes: tuple[ClassResult, ...] = ()
    """As of `Evaluation`; empty in a search for accuracy."""

    @property
    def logit_noise(self) -> float:
        """Energy of the noise of the float logits as a share of the signal's."""
        return 0.0 if self.logit_snr_db is None else 10 ** (-self.logit_snr_db / 10)

    @property
    def quint8_logit_noise(self) -> float:
        """That of the quantized logits."""
        return 0.0 if self.logit_sqnr_db is None else 10 ** (-self.logit_sqnr_db / 10)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "classes": [*map(astuple, self.classes)]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Probe":
        layers = tuple(LayerStats(**layer) for layer in data["layers"])
        return Probe(**{**data, "layers": layers, "classes": _class_results(data)})


def _class_results(data: Mapping[str, Any]) -> tuple[ClassResult, ...]:
    return tuple(ClassResult(*one) for one in data.get("classes", ()))


@dataclass(frozen=True)
class Probes:
    """What was measured on one trained network, candidate `number`, of this `plan`: as it is, and for every layer and
    legal rate that can start from it (the multiples of the layer's own rate), with that one change."""

    number: int
    plan: FactorizationPlan
    unchanged: Probe
    changes: tuple[Probe, ...]

    def increase(self, space: Macroarchitecture, value: Callable[[Probe], float]) -> dict[str, npt.NDArray[np.float64]]:
        """Per layer and legal rate, how much more a value is than without the change.

        0 where nothing is changed, and for rates that were not probed since the network is factorized further.
        """
        base, measured = value(self.unchanged), {(one.layer, one.rate): value(one) for one in self.changes}
        return {
            layer: np.array([measured.get((layer, rate), base) - base for rate in rates])
            for layer, rates in legal_rates(space).items()
        }


@dataclass(frozen=True)
class Constraints:
    """What a network must satisfy. Violations are normalised values, <= 0 when met (Optuna's convention): at a limit
    they are 0, since images are counted and fractions are exact.

    `conv_macs` (multiply-accumulates of one image in convolutions, as the paper counts them) and `params` are ceilings
    known before training; `min_quint8` (accuracy) and `max_drop` (relative, from fp32 to quint8) are fractions of 1,
    known after. `metric` says which accuracy is meant, also where networks are compared (`Evaluation.scores`).
    """

    conv_macs: int | None = None
    params: int | None = None
    min_quint8: float | None = None
    max_drop: float | None = None
    metric: MetricName = "accuracy"

    def __post_init__(self) -> None:
        if self.metric not in get_args(MetricName):
            raise unknown("metric", self.metric, get_args(MetricName))
        for name in ("conv_macs", "params", "min_quint8"):
            if (limit := getattr(self, name)) is not None and not limit > 0:
                raise FnetError(f"{name} must be above 0, got {limit}")
        if self.max_drop is not None and not self.max_drop >= 0:
            raise FnetError(f"max_drop must not be negative, got {self.max_drop}")

    def of_cost(self, cost: Cost) -> dict[str, float]:
        """Violations that need no training."""
        limits = {"conv_macs": (cost.conv_macs, self.conv_macs), "params": (cost.params, self.params)}
        return {name: value / limit - 1 for name, (value, limit) in limits.items() if limit is not None}

    def of(self, evaluation: Evaluation) -> dict[str, float]:
        """All violations of an evaluation, those after training only where it was trained."""
        violations, complete = self.of_cost(evaluation.cost), evaluation.state == "complete"
        fp32, quint8 = evaluation.exact_scores(self.metric)
        if self.min_quint8 is not None and (complete or quint8 is not None):
            floor = exact(self.min_quint8)
            violations["min_quint8"] = float((floor - (quint8 or 0)) / (floor or 1))
        if self.max_drop is not None and complete:
            most, drop = exact(self.max_drop), (fp32 - (quint8 or 0)) / fp32 if fp32 else Fraction(1)
            violations["max_drop"] = float((drop - most) / (most or 1))
        return violations

    def refusal(self, cost: Cost) -> str:
        """Why a plan of this cost must not be trained, or an empty string."""
        reasons = []
        if self.conv_macs is not None and cost.conv_macs > self.conv_macs:
            reasons.append(f"{cost.conv_macs:,} conv MACs exceed the budget of {self.conv_macs:,}")
        if self.params is not None and cost.params > self.params:
            reasons.append(f"{cost.params:,} parameters exceed the limit of {self.params:,}")
        return "; ".join(reasons)

    @property
    def measured(self) -> str:
        """The metric's name, for people."""
        return self.metric.replace("-", " ")

    @property
    def on_images(self) -> bool:
        """Whether a limit is on what images tell."""
        return self.min_quint8 is not None or self.max_drop is not None

    def described(self, checked_on: str = "") -> list[tuple[str, str]]:
        """What is limited, and to what, for people; `checked_on`: the images that tell accuracies."""
        on = f", checked on {checked_on}" if checked_on else ""
        limits = [("conv MACs", f"at most {mmac(self.conv_macs)}")] if self.conv_macs is not None else []
        if self.params is not None:
            limits.append(("parameters", f"at most {self.params:,}"))
        if self.min_quint8 is not None:
            limits.append((f"quint8 {self.measured}", f"at least {percent(self.min_quint8)}{on}"))
        if self.max_drop is not None:
            of = "" if self.metric == "accuracy" else f" of {self.measured}"
            limits.append((f"relative drop{of}", f"at most {percent(self.max_drop)}{on}"))
        return limits

    def missed(self, evaluation: Evaluation) -> tuple[str, ...]:
        """Names of the constraints that an evaluation does not meet, as far as they are known."""
        return tuple(name for name, value in self.of(evaluation).items() if value > 0)

    def feasible(self, evaluation: Evaluation) -> bool:
        """Trained, and every constraint met."""
        return evaluation.state == "complete" and not self.missed(evaluation)


def parse_constraints(
    space: Macroarchitecture,
    budget: str | int,
    max_params: str | int | None = None,
    min_quint8: str | float | None = None,
    max_drop: str | float | None = None,
    metric: str = "accuracy",
) -> Constraints:
    """Constraints as people write them: a budget of ``"120MMAC"`` or ``"45%"``, ``"2M"`` parameters, ``"80%"``.

    Raises FnetError for what cannot be read, an unknown metric, and a budget below the smallest network of the space.
    """
    if not legal_rates(space):
        raise FnetError(f"space {space.name!r} has no factorizable layer; set factorize = true on a conv layer")
    whole, smallest = plan_cost(space, regular(space)).conv_macs, smallest_conv_macs(space)
    units = budgets_meant(str(budget), smallest, whole)
    try:
        conv_macs = parse_budget(str(budget), whole)
    except FnetError:
        if not units:
            raise
        conv_macs = 0
    if conv_macs < smallest:
        share = f"{100 * smallest / whole:.1f} % of the regular one"
        instead = f"; did you mean {' or '.join(units)}?" if units else ""
        raise FnetError(
            f"budget {budget} is below the smallest network of space {space.name!r}, "
            f"which has {mmac(smallest)} ({smallest:,} conv MACs, {share}){instead}"
        )
    return Constraints(
        conv_macs,
        None if max_params is None else parse_count(str(max_params), "--max-params"),
        None if min_quint8 is None else parse_share(str(min_quint8), "--min-quint8"),
        None if max_drop is None else parse_share(str(max_drop), "--max-drop"),
        cast(MetricName, metric),
    )


@dataclass(frozen=True)
class History:
    """The past of a search, as a policy sees it when suggestion `number` is asked for.

    `evaluations` holds every finished one, pruned, refused and failed ones and the reference too, in order of their
    numbers, but not final trainings; `running` the plans whose evaluations are still to come; `probes` what was
    measured before the first suggestion for policies that require it. Take random numbers from `rng` only.
    """

    space: Macroarchitecture
    constraints: Constraints = Constraints()
    evaluations: tuple[Evaluation, ...] = ()
    running: tuple[FactorizationPlan, ...] = ()
    number: int = 0
    seed: int = 0
    probes: Probes | None = None

    @property
    def seen(self) -> frozenset[FactorizationPlan]:
        """Every plan suggested so far."""
        return frozenset([evaluation.plan for evaluation in self.evaluations]).union(self.running)

    def refusal(self, plan: FactorizationPlan) -> str:
        """Why a plan must not be trained: a constraint that needs no training, or a repeat. Empty if it may be."""
        for evaluation in self.evaluations:
            if evaluation.plan == plan:
                return f"repeats candidate {evaluation.number}"
        if plan in self.running:
            return "repeats a plan that is being trained"
        return self.constraints.refusal(plan_cost(self.space, plan))

    @property
    def rng(self) -> np.random.Generator:
        """A fresh generator, the same at every access: a function of (seed, number)."""
        return np.random.default_rng((self.seed, self.number))


@dataclass(frozen=True)
class Step:
    """To another rate of one layer: the conv MACs and the quint8 accuracy (fraction of 1; of the constraints' metric)
    that are expected to be more then, or less (negative)."""

    rate: int
    conv_macs: int
    quint8_accuracy: float


@dataclass(frozen=True)
class LayerChoice:
    """A layer's rate in a plan, and the steps to the next lower and the next higher legal one."""

    layer: str
    rate: int
    lower: Step | None
    higher: Step | None

    @property
    def reason(self) -> str:
        """In words, for people."""
        parts = []
        if self.lower is not None:
            parts.append(f"against {self.lower.rate} it {_trade(-self.lower.conv_macs, -self.lower.quint8_accuracy)}")
        if self.higher is not None:
            parts.append(f"{self.higher.rate} {_trade(self.higher.conv_macs, self.higher.quint8_accuracy, 'would ')}")
        return "; ".join(parts)


def _trade(macs: int, accuracy: float, would: str = "") -> str:
    """As in: saves 1.2 MMAC for 0.10 points."""
    verbs = ("save", "cost") if would else ("saves", "costs")
    traded = f"{would}{verbs[macs > 0]} {millions(abs(macs))} MMAC"
    points = round(100 * accuracy, 2)
    if points > 0:
        return f"{traded} and {'gain' if would else 'gains'} {points:.2f} points"
    return f"{traded} for {abs(points):.2f} points"


@dataclass(frozen=True)
class Explanation:
    """Why a plan: what its policy expects of it, its layers, and which features the expectation rests on.

    `expected` quint8 accuracy on the evaluation split, with its standard deviation `spread`, and `expected_drop` from
    fp32, relative; fractions of 1;
    `importances` are shares of what varies over the plans of the space (features on their own, not what they share).
    """

    expected: float
    spread: float
    expected_drop: float
    choices: tuple[LayerChoice, ...]
    importances: Mapping[str, float]
    front: tuple[tuple[FactorizationPlan, int, float], ...] = ()
    """At every budget the best plan, its conv MACs, and the quint8 accuracy that is expected of it."""


PROBES, FISHER = "probes", "fisher"
"""What a policy can require: `History.probes`, and in them the Fisher scores."""


class Policy(Protocol):
    """Proposes the next plan.

    One that needs to be told more than evaluations has an attribute `requires`, of the names above, as in
    ``requires = frozenset({"probes"})``: the host measures it before the first suggestion (`requirements`). One that
    can say why has a method ``explain(history, plan) -> Explanation``; hosts show it for the winner.
    """

    def suggest(self, history: History) -> FactorizationPlan | None:
        """The next plan to train. None with plans still running: ask again when one ends; else: done."""
        ...


def requirements(policy: Policy) -> frozenset[str]:
    """What the policy needs in its history. Raises FnetError for what no host knows."""
    required = frozenset(getattr(policy, "requires", ()))
    if strange := required - {PROBES, FISHER}:
        raise FnetError(f"policy {type(policy).__name__} requires {', '.join(sorted(strange))}; known: probes, fisher")
    return required


def probes_of(history: History, policy: object) -> Probes:
    """The probes, for a policy that requires them. Raises FnetError where the host has not measured them."""
    if history.probes is None:
        raise FnetError(
            f"policy {type(policy).__name__} needs probes of a trained network: measure them with "
            "fnet_search.probes_for, and give them as AskTell(probes=...) or History(probes=...)"
        )
    return history.probes


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


FIXED_PLANS = "fixed plans"
"""What runs of given plans have as the name of their policy. They have no winner."""


def policy_names() -> list[str]:
    """Names of the installed policies: entry points of the group ``fnet_search.policies``."""
    return sorted(entry_points(group="fnet_search.policies").names)


def load_policy(name: str) -> Policy:
    """The installed policy of that name, ours or a third party's; or one of a file or module, as in
    ``halving.py:Halving``: a class, or an object.

    Raises FnetError for an unknown name or a plug-in that cannot be loaded.
    """
    where, colon, what = name.rpartition(":")
    if colon:
        try:
            with importable(where):
                made = load_object(where, what)
                own: Policy = made() if isinstance(made, type) else made
        except FnetError as error:
            raise FnetError(f"policy {name}: {error}") from None
        except Exception as error:  # a user's code raises what it likes
            raise FnetError(f"policy {name} cannot be loaded: {fault(error, where)}") from error
        return check_policy(own, name)
    found = entry_points(group="fnet_search.policies", name=name)
    if not found:
        raise unknown("policy", name, policy_names())
    entry = next(iter(found))
    try:
        policy: Policy = entry.load()()
    except Exception as error:
        raise FnetError(f"policy {name!r} cannot be loaded: {fault(error, entry.module)}") from error
    return check_policy(policy, name)


def check_policy(policy: Policy, name: str) -> Policy:
    """The policy, if it is one. Raises FnetError for a class, and for what suggests nothing."""
    if isinstance(policy, type):
        raise FnetError(f"{policy.__name__} is a class; give a policy, as in {policy.__name__}()")
    if not callable(getattr(policy, "suggest", None)):
        raise FnetError(f"policy {name!r} has no method suggest(history)")
    return policy
