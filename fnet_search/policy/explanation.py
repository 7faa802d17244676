"""Why a plan: what its policy expects of it."""

from collections.abc import Mapping
from dataclasses import dataclass

from fnet_search.arch.plan import FactorizationPlan
from fnet_search.base.units import millions


@dataclass(frozen=True)
class RateChange:
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
    lower: RateChange | None
    higher: RateChange | None

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
