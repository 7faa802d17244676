"""Explanations of a plan: what its policy expects of it."""

from collections.abc import Mapping
from dataclasses import dataclass

from fnet_search.arch.plan import FactorizationPlan
from fnet_search.base.units import millions


@dataclass(frozen=True)
class RateChange:
    """The change of one layer to another rate: the expected increase (negative: decrease) of the conv MACs and of the
    quint8 score (fraction of 1, by the constraints' metric)."""

    rate: int
    conv_macs: int
    quint8_accuracy: float


@dataclass(frozen=True)
class LayerChoice:
    """A layer's rate in a plan, and the changes to the next lower and the next higher legal rate."""

    layer: str
    rate: int
    lower: RateChange | None
    higher: RateChange | None

    @property
    def reason(self) -> str:
        """The choice in words."""
        parts = []
        if self.lower is not None:
            parts.append(f"against {self.lower.rate} it {_trade(-self.lower.conv_macs, -self.lower.quint8_accuracy)}")
        if self.higher is not None:
            parts.append(f"{self.higher.rate} {_trade(self.higher.conv_macs, self.higher.quint8_accuracy, 'would ')}")
        return "; ".join(parts)


def _trade(macs: int, accuracy: float, would: str = "") -> str:
    """As in ``saves 1.2 MMAC for 0.10 points``."""
    verbs = ("save", "cost") if would else ("saves", "costs")
    traded = f"{would}{verbs[macs > 0]} {millions(abs(macs))} MMAC"
    points = round(100 * accuracy, 2)
    if points > 0:
        return f"{traded} and {'gain' if would else 'gains'} {points:.2f} points"
    return f"{traded} for {abs(points):.2f} points"


@dataclass(frozen=True)
class Explanation:
    """What a policy expects of a plan, its choice for each layer, and the features that the expectation rests on.

    `expected` is the quint8 accuracy on the evaluation split, `spread` its standard deviation, `expected_drop` the
    relative drop from fp32; all fractions of 1. `importances` are the features' shares of the variance over the plans
    of the space, each feature by itself, without covariances.
    """

    expected: float
    spread: float
    expected_drop: float
    choices: tuple[LayerChoice, ...]
    importances: Mapping[str, float]
    front: tuple[tuple[FactorizationPlan, int, float], ...] = ()
    """The best plan at every budget, its conv MACs, and its expected quint8 accuracy."""
