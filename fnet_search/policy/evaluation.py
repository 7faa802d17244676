"""What is measured on candidates and probes, as data."""

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
