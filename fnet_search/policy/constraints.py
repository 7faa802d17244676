"""What a network must satisfy."""

from dataclasses import dataclass
from fractions import Fraction
from typing import cast, get_args

from fnet_search.arch.costs import Cost, plan_cost, smallest_conv_macs
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import legal_rates, regular
from fnet_search.base.errors import FnetError, unknown
from fnet_search.base.units import budgets_meant, mmac, parse_budget, parse_count, parse_share, percent
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.metric import MetricName, exact


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
        raise FnetError(
            f"there is nothing to factorize in {space.name}: name convolutions with `factorize` (in a TOML file, set "
            "factorize = true), or quantize it as it is: fnet-search evaluate --plan regular"
        )
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
        None if max_params is None else parse_count(str(max_params), "max_params"),
        None if min_quint8 is None else parse_share(str(min_quint8), "min_quint8"),
        None if max_drop is None else parse_share(str(max_drop), "max_drop"),
        cast(MetricName, metric),
    )
