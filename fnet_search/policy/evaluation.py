"""The measurements of candidates and probes, as data."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fnet_search.arch.costs import Cost, plan_cost
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan, check_plan, legal_rates
from fnet_search.base.errors import FnetError
from fnet_search.policy.metric import ClassResult, Scored, Scores, score

State = Literal["complete", "pruned", "refused", "failed"]
Role = Literal["candidate", "reference", "final"]
SplitName = Literal["validation", "test"]
HELD_OUT = "held out of the training images"
"""`Evaluation.validation` of a split without images of its own."""
MAYBE_KNOWN = f"{HELD_OUT}, which the weights may know"
"""The same, where training starts from given weights: they may have been trained on these images."""


@dataclass(frozen=True, slots=True)
class LayerStats:
    """Statistics of one trained convolution or dense layer (paper, section 2).

    Precisions are average channel precisions, paper equation (3), between 0 and 1. Activations are those after the
    layer's ReLU, if one follows, clipped to the quantized range. SQNR is in dB, None without noise or signal. A channel
    whose values never change is dead: it counts as 0 in a precision.
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
    """With only this activation quantized."""
    accumulated_sqnr_db: float | None
    """With this activation and everything before it quantized."""
    sparsity: float
    """Share of the activation's elements that are exactly zero."""
    dead_weight_channels: int
    dead_activation_channels: int


@dataclass(frozen=True)
class Audit:
    """The comparison of an exported network in ONNX Runtime with the integer simulator, on `images` images.

    `differing` counts the differing ones of its output `codes`, `predictions` the images whose predicted class differs.
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

    `reason` says why a plan was refused (a limit, a repeat: never trained), failed, or was pruned (stopped early).
    """

    number: int
    plan: FactorizationPlan
    cost: Cost
    state: State = "complete"
    reason: str = ""
    role: Role = "candidate"
    """``reference``: above the ceilings, trained because others start from it; never wins. ``final``: the best
    candidate trained on, at the end of a search."""
    split: SplitName = "validation"
    validation: str = ""
    """What the validation split is, if `split` is that: the folder of its images, HELD_OUT or MAYBE_KNOWN."""
    scheme: str = ""
    """How it was quantized: `quant.scheme.Scheme` as text."""
    seed: int = 0
    epochs: int = 0
    """Its own epochs, without `inherited_epochs`."""
    trained_images: int = 0
    """Images trained on in its own epochs."""
    parent: int | None = None
    """Number of the candidate that it started from; None: from scratch."""
    inherited_epochs: int = 0
    """Epochs of the network that it started from."""
    zero_shot_accuracy: float | None = None
    """As `accuracies`, after the warm start from its parent and before any training."""
    accuracies: tuple[float, ...] = ()
    """After each of its own epochs: the score of the float network, by the search's metric, on at most 2,000 images of
    the split, or of the training images if none are held out."""
    fp32_accuracy: float | None = None
    quint8_accuracy: float | None = None
    fp32_loss: float | None = None
    """Mean cross entropy with the labels, nats; `quint8_loss` likewise."""
    quint8_loss: float | None = None
    images: int = 0
    """Number of images of `split` that the accuracies were measured on."""
    right: str = ""
    """Which of them the quint8 network classifies right: one bit per image, ordered by class, the first one lowest, as
    a hexadecimal number (`significance.as_bits`). Empty: not known."""
    classes: tuple[ClassResult, ...] = ()
    """Results by class, in the data set's order; empty: not known."""
    qmse: float | None = None
    """Mean of (y_fp32 - y_quint8)^2 over samples and classes, on the logits."""
    qce: float | None = None
    """Cross entropy of softmax(y_quint8) under softmax(y_fp32), natural log."""
    kl: float | None = None
    """`qce` minus the entropy of softmax(y_fp32)."""
    audit: Audit | None = None
    """On the images of `split`; None: not audited."""
    layers: tuple[LayerStats, ...] = ()
    common: "Evaluation | None" = None
    """The same network quantized with the run's common scheme, which the history holds so that candidates stay
    comparable; None: this evaluation itself."""

    @property
    def relative_drop(self) -> float | None:
        """(fp32 - quint8) / fp32 accuracy."""
        return Scores(self.fp32_accuracy, self.quint8_accuracy).relative_drop

    @property
    def remark(self) -> str:
        """A remark for display: why it was not measured, or that a network predicts one class for every image."""
        return self.reason or self.constant

    @staticmethod
    def of(space: Macroarchitecture, plan: FactorizationPlan, **measured: Any) -> "Evaluation":
        """An evaluation from measurements of your own, as in ``Evaluation.of(space, plan, quint8_accuracy=0.81)``.

        The costs are computed; accuracies that are not given follow from `classes`. Raises FnetError for a plan that
        does not belong to the space, an accuracy that is not a fraction of 1, and a complete evaluation without its
        quint8 accuracy.
        """
        check_plan(space, plan)
        classes = measured.get("classes", ())
        for network in ("fp32", "quint8"):
            accuracy = score("accuracy", ((getattr(result, f"{network}_right"), result.images) for result in classes))
            measured = {f"{network}_accuracy": accuracy, **measured}
        made = Evaluation(**{"number": 0, "plan": plan, "cost": plan_cost(space, plan), **measured})
        needed = {"fp32_accuracy": False, "quint8_accuracy": made.state == "complete"}
        for name, must in needed.items():
            value = getattr(made, name)
            if must if value is None else not 0 <= value <= 1:
                raise FnetError(
                    f"{name} must be a fraction of 1, got {value}; give state='failed' if the training failed"
                )
        return made

    def to_json(self) -> dict[str, Any]:
        """As JSON data, from which `from_json` makes an equal Evaluation."""
        common = None if self.common is None else self.common.to_json()
        facts = {**asdict(replace(self, common=None)), "classes": [*map(astuple, self.classes)]}
        return {**facts, "plan": dict(self.plan.rates), "common": common}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Evaluation":
        """Inverse of `to_json`. Ignores unknown keys; missing ones get their defaults."""
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
    """The effect of one change: a trained network in which one layer has another rate, warm-started and not trained.

    Measured on `images` validation images. Losses are mean cross entropies in nats, accuracies fractions of 1.
    """

    layer: str
    """The changed layer; empty: no change."""
    rate: int
    conv_macs: int
    """Of the whole changed network."""
    images: int
    loss: float
    quint8_loss: float
    fp32_accuracy: float
    quint8_accuracy: float
    logit_snr_db: float | None
    """Signal-to-noise ratio of the float logits; the float logits without the change are the signal. None: no noise."""
    logit_sqnr_db: float | None
    """As `logit_snr_db`, of the quantized logits against the same signal."""
    layers: tuple[LayerStats, ...]
    """Statistics of the changed layer's convolutions; without a change, of all factorizable layers."""
    fisher: float | None = None
    """Fisher score of the whole network at initialisation, for policies that require it (`protocol.FISHER`)."""
    classes: tuple[ClassResult, ...] = ()
    """As in `Evaluation`; empty if the metric is accuracy."""

    @property
    def logit_noise(self) -> float:
        """Energy of the noise of the float logits as a share of the signal's."""
        return 0.0 if self.logit_snr_db is None else 10 ** (-self.logit_snr_db / 10)

    @property
    def quint8_logit_noise(self) -> float:
        """The same of the quantized logits."""
        return 0.0 if self.logit_sqnr_db is None else 10 ** (-self.logit_sqnr_db / 10)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "classes": [*map(astuple, self.classes)]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Probe":
        layers = tuple(LayerStats(**layer) for layer in data["layers"])
        return Probe(**{**data, "layers": layers, "classes": _class_results(data)})


def _class_results(data: Mapping[str, Any]) -> tuple[ClassResult, ...]:
    return tuple(ClassResult(*values) for values in data.get("classes", ()))


@dataclass(frozen=True)
class Probes:
    """The probes of candidate `number`, a trained network of this `plan`: one without a change, and one for each layer
    and each legal rate that is a larger multiple of the layer's own."""

    number: int
    plan: FactorizationPlan
    unchanged: Probe
    changes: tuple[Probe, ...]

    def increase(self, space: Macroarchitecture, value: Callable[[Probe], float]) -> dict[str, npt.NDArray[np.float64]]:
        """Per layer and legal rate, the increase of `value` over its value without the change.

        0 at the layer's own rate, and at rates that were not probed because they are not multiples of it.
        """
        base, measured = value(self.unchanged), {(probe.layer, probe.rate): value(probe) for probe in self.changes}
        return {
            layer: np.array([measured.get((layer, rate), base) - base for rate in rates])
            for layer, rates in legal_rates(space).items()
        }
