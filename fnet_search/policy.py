"""What a policy sees and what it returns. No torch and no Optuna: a host needs this file, `plan` and `macro` only.

A policy is a function of the past (design, section 5). It keeps no state that matters between calls, and its random
numbers come from ``(history.seed, history.number)``; so a resumed search suggests what an uninterrupted one would
have, and any number of workers can share one policy.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from functools import lru_cache
from importlib.metadata import entry_points
from math import prod
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from fnet_search.errors import FnetError, first_line, unknown
from fnet_search.macro import Macroarchitecture
from fnet_search.plan import Cost, FactorizationPlan, check_plan, legal_rates, plan_cost, regular, smallest_conv_macs
from fnet_search.plugins import importable, load_object
from fnet_search.quantities import millions, mmac, parse_budget, parse_count, parse_share, percent

State = Literal["complete", "pruned", "refused", "failed"]
Role = Literal["candidate", "reference", "final"]
SplitName = Literal["validation", "test"]


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
class Evaluation:
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
    training images where nothing is held out."""
    fp32_accuracy: float | None = None
    quint8_accuracy: float | None = None
    images: int = 0
    """Of `split`, that the accuracies were measured on."""
    qmse: float | None = None
    """Mean of (y_fp32 - y_quint8)^2 over samples and classes, on the logits."""
    qce: float | None = None
    """Cross entropy of softmax(y_quint8) under softmax(y_fp32), natural log."""
    kl: float | None = None
    """`qce` less the entropy of softmax(y_fp32)."""
    audit: Audit | None = None
    """On the images of `split`; None: not audited."""
    layers: tuple[LayerStats, ...] = ()

    @property
    def relative_drop(self) -> float | None:
        """(fp32 - quint8) / fp32 accuracy."""
        if not self.fp32_accuracy or self.quint8_accuracy is None:
            return None
        return (self.fp32_accuracy - self.quint8_accuracy) / self.fp32_accuracy

    @staticmethod
    def of(space: Macroarchitecture, plan: FactorizationPlan, **measured: Any) -> "Evaluation":
        """One made by a host of its own: the costs are counted here, the other fields are given, as in
        ``Evaluation.of(space, plan, quint8_accuracy=0.81)``. Raises FnetError for a plan that is not of the space, for
        an accuracy that is not a fraction of 1, and for a complete one without its quint8 accuracy."""
        check_plan(space, plan)
        made = Evaluation(**{"number": 0, "plan": plan, "cost": plan_cost(space, plan), **measured})
        needed = {"fp32_accuracy": False, "quint8_accuracy": made.state == "complete"}
        for name, must in needed.items():
            value = getattr(made, name)
            if must if value is None else not 0 <= value <= 1:
                raise FnetError(f"{name} must be a fraction of 1, got {value}; if it failed, say state='failed'")
        return made

    def to_json(self) -> dict[str, Any]:
        """JSON-able form; `from_json` gives an equal Evaluation back."""
        return {**asdict(self), "plan": dict(self.plan.rates)}

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
                "layers": tuple(LayerStats(**layer) for layer in data["layers"]),
            }
        )


@dataclass(frozen=True)
class Probe:
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

    @property
    def logit_noise(self) -> float:
        """Energy of the noise of the float logits as a share of the signal's."""
        return 0.0 if self.logit_snr_db is None else 10 ** (-self.logit_snr_db / 10)

    @property
    def quint8_logit_noise(self) -> float:
        """That of the quantized logits."""
        return 0.0 if self.logit_sqnr_db is None else 10 ** (-self.logit_sqnr_db / 10)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Probe":
        return Probe(**{**data, "layers": tuple(LayerStats(**layer) for layer in data["layers"])})


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
    known after.
    """

    conv_macs: int | None = None
    params: int | None = None
    min_quint8: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
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
        violations = self.of_cost(evaluation.cost)
        complete, images = evaluation.state == "complete", evaluation.images
        if self.min_quint8 is not None and (complete or evaluation.quint8_accuracy is not None):
            floor, quint8 = _exact(self.min_quint8), _exact(evaluation.quint8_accuracy or 0.0, images)
            violations["min_quint8"] = float((floor - quint8) / (floor or 1))
        if self.max_drop is not None and complete:
            fp32, quint8 = (
                _exact(one or 0.0, images) for one in (evaluation.fp32_accuracy, evaluation.quint8_accuracy)
            )
            most, drop = _exact(self.max_drop), (fp32 - quint8) / fp32 if fp32 else Fraction(1)
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

    def described(self) -> list[tuple[str, str]]:
        """What is limited, and to what, for people."""
        limits = [("conv MACs", f"at most {mmac(self.conv_macs)}")] if self.conv_macs is not None else []
        if self.params is not None:
            limits.append(("parameters", f"at most {self.params:,}"))
        if self.min_quint8 is not None:
            limits.append(("quint8 accuracy", f"at least {percent(self.min_quint8)}"))
        if self.max_drop is not None:
            limits.append(("relative drop", f"at most {percent(self.max_drop)}"))
        return limits

    def missed(self, evaluation: Evaluation) -> tuple[str, ...]:
        """Names of the constraints that an evaluation does not meet, as far as they are known."""
        return tuple(name for name, value in self.of(evaluation).items() if value > 0)

    def feasible(self, evaluation: Evaluation) -> bool:
        """Trained, and every constraint met."""
        return evaluation.state == "complete" and not self.missed(evaluation)


@lru_cache(maxsize=4096)
def _exact(share: float, images: int = 0) -> Fraction:
    """The fraction of 1 that a float stands for: so many of the images; where their number is not known, or the share
    is no count of them, the nearest of a small denominator, which both ``0.05`` and ``2 / 3`` have."""
    count = round(share * images)
    counted = images and abs(share * images - count) < 0.01  # some hosts average in float32
    return Fraction(count, images) if counted else Fraction(share).limit_denominator(10**9)


def parse_constraints(
    space: Macroarchitecture,
    budget: str | int,
    max_params: str | int | None = None,
    min_quint8: str | float | None = None,
    max_drop: str | float | None = None,
) -> Constraints:
    """Constraints as people write them: a budget of ``"120MMAC"`` or ``"45%"``, ``"2M"`` parameters, ``"80%"``.

    Raises FnetError for what cannot be read, and for a budget below the smallest network of the space.
    """
    if not legal_rates(space):
        raise FnetError(f"space {space.name!r} has no factorizable layer; set factorize = true on a conv layer")
    conv_macs = parse_budget(str(budget), plan_cost(space, regular(space)).conv_macs)
    smallest = smallest_conv_macs(space)
    if conv_macs < smallest:
        whole = plan_cost(space, regular(space)).conv_macs
        share = f"{100 * smallest / whole:.1f} % of the regular one"
        percents = re.fullmatch(r"\s*([0-9.]+)\s*", str(budget))
        meant = f"; did you mean {percents[1]}%?" if percents and smallest <= float(percents[1]) * whole / 100 else ""
        raise FnetError(
            f"budget {budget} is below the smallest network of space {space.name!r}, "
            f"which has {mmac(smallest)} ({smallest:,} conv MACs, {share}){meant}"
        )
    return Constraints(
        conv_macs,
        None if max_params is None else parse_count(str(max_params), "--max-params"),
        None if min_quint8 is None else parse_share(str(min_quint8), "--min-quint8"),
        None if max_drop is None else parse_share(str(max_drop), "--max-drop"),
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
    """To another rate of one layer: the conv MACs and the quint8 accuracy (fraction of 1) that are expected to be more
    then, or less (negative)."""

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
            f"policy {type(policy).__name__} needs probes of a trained network: the host must measure them with "
            "fnet_search.probes.probe_network and give them as History(probes=...)"
        )
    return history.probes


def ranking(evaluations: tuple[Evaluation, ...], constraints: Constraints) -> list[Evaluation]:
    """The trained evaluations, best first: feasible ones by quint8 accuracy, then fewest conv MACs; then the others,
    least summed violation first. The first is a search's winner, if it is feasible; else the nearest to it."""

    def key(evaluation: Evaluation) -> tuple[float, float, int, int]:
        excess = sum(max(0.0, value) for value in constraints.of(evaluation).values())
        return excess, -(evaluation.quint8_accuracy or 0.0), evaluation.cost.conv_macs, evaluation.number

    return sorted((one for one in evaluations if one.state == "complete" and one.role != "reference"), key=key)


def choose_parent(evaluations: Iterable[Evaluation], plan: FactorizationPlan) -> Evaluation | None:
    """What a child of this plan starts from: of the trained networks each of whose rates divides the child's, the least
    factorized one (smallest product of rates: of it a child loses least), then the highest fp32 accuracy, then the
    lowest number. None if there is none.

    So all children of a search start from its reference, if it was trained: they had equal training, and which ended
    before does not matter.
    """

    def key(one: Evaluation) -> tuple[int, float, int]:
        return prod(one.plan.by_layer.values()), -(one.fp32_accuracy or 0.0), one.number

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
            raise FnetError(f"policy {name} cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
        return check_policy(own, name)
    found = entry_points(group="fnet_search.policies", name=name)
    if not found:
        raise unknown("policy", name, policy_names())
    try:
        policy: Policy = next(iter(found)).load()()
    except Exception as error:
        raise FnetError(f"policy {name!r} cannot be loaded: {error}") from error
    return check_policy(policy, name)


def check_policy(policy: Policy, name: str) -> Policy:
    """The policy, if it is one. Raises FnetError for a class, and for what suggests nothing."""
    if isinstance(policy, type):
        raise FnetError(f"{policy.__name__} is a class; give a policy, as in {policy.__name__}()")
    if not callable(getattr(policy, "suggest", None)):
        raise FnetError(f"policy {name!r} has no method suggest(history)")
    return policy
