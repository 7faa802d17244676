"""Constraints on networks: one class per constraint, with its check, its messages and its line in figures."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar, cast, get_args

from fnet_search.arch.costs import Cost, cost_table, plan_cost, smallest_conv_macs
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import legal_rates, regular
from fnet_search.base.errors import FnetError, unknown
from fnet_search.base.units import (
    budgets_meant,
    counts_meant,
    millions,
    mmac,
    parse_budget,
    parse_count,
    parse_share,
    percent,
)
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.metric import MetricName, Scores, exact


@dataclass(frozen=True)
class Constraint(ABC):
    """A limit on a measured value. `Ceiling` is one that is known before training."""

    limit: Any
    metric: MetricName = "accuracy"
    name: ClassVar[str]
    """Its field in `Constraints`, and so its key in config.json and in Optuna's attributes."""
    axis: ClassVar[str] = ""
    """The panel of figures (`report.macs_figures.PANELS`) that shows it as a line; ``conv_macs``: a vertical line in
    all."""
    on_images: ClassVar[bool] = True
    """Whether it is checked on images."""

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise FnetError(f"{self.name} must be above 0, got {self.limit}")

    @abstractmethod
    def violation(self, evaluation: Evaluation) -> float | None:
        """How far an evaluation misses the limit, as a share of it: at most 0 if met, exactly 0 at the limit. None if
        not known, for lack of a training."""

    @abstractmethod
    def described(self) -> tuple[str, str]:
        """The name of the limited value, and the limit, for display: ``conv MACs``, ``at most 120 MMAC``."""

    @abstractmethod
    def missed(self, evaluation: Evaluation, measured_on: str) -> str:
        """Says how an evaluation misses the limit; `measured_on` names the images of its accuracies."""

    @property
    @abstractmethod
    def line(self) -> str:
        """The legend of its line in figures."""

    def check(self, space: Macroarchitecture) -> None:  # noqa: B027 (only some know before a training)
        """Raises FnetError if no network of the space can meet it."""

    @property
    def of_metric(self) -> str:
        """The metric with a leading space, if it is not accuracy."""
        return "" if self.metric == "accuracy" else f" {self.metric.replace('-', ' ')}"

    def scores(self, evaluation: Evaluation) -> Scores:
        return evaluation.scores(self.metric)


class Ceiling(Constraint):
    """A limit on a function of a plan's `Cost`, known before training: plans above it are refused."""

    on_images = False

    @abstractmethod
    def value(self, cost: Cost) -> float: ...

    @abstractmethod
    def refusal(self, cost: Cost) -> str:
        """Says why a plan of this cost, above the limit, is refused."""

    def excess(self, cost: Cost) -> float:
        """`violation` of a plan of this cost."""
        return self.value(cost) / float(self.limit) - 1

    def violation(self, evaluation: Evaluation) -> float:
        return self.excess(evaluation.cost)


class ConvMacs(Ceiling):
    """The most multiply-accumulates per image in convolutions, as the paper counts them."""

    name = axis = "conv_macs"

    @staticmethod
    def parse(text: str, space: Macroarchitecture) -> int:
        """conv MACs from ``"120MMAC"`` or ``"45%"``. Raises FnetError as `parse_budget`, and below the smallest
        network."""
        whole, smallest = plan_cost(space, regular(space)).conv_macs, smallest_conv_macs(space)
        units = budgets_meant(text, smallest, whole)
        try:
            conv_macs = parse_budget(text, whole)
        except FnetError:
            if not units:
                raise
            conv_macs = 0
        if conv_macs < smallest:
            share = f"{100 * smallest / whole:.1f} % of the regular one"
            instead = f"; did you mean {' or '.join(units)}?" if units else ""
            raise FnetError(
                f"budget {text} is below the smallest network of space {space.name!r}, "
                f"which has {mmac(smallest)} ({smallest:,} conv MACs, {share}){instead}"
            )
        return conv_macs

    def value(self, cost: Cost) -> int:
        return cost.conv_macs

    def refusal(self, cost: Cost) -> str:
        return f"{cost.conv_macs:,} conv MACs exceed the budget of {self.limit:,}"

    def described(self) -> tuple[str, str]:
        return "conv MACs", f"at most {mmac(self.limit)}"

    def missed(self, evaluation: Evaluation, measured_on: str) -> str:
        macs, budget = millions(evaluation.cost.conv_macs), millions(self.limit)
        return f"{macs} MMAC are above the budget of {budget} MMAC"

    @property
    def line(self) -> str:
        return f"budget {millions(self.limit)} MMAC"


class Params(Ceiling):
    """The most weights and biases."""

    name = "params"

    def value(self, cost: Cost) -> int:
        return cost.params

    def refusal(self, cost: Cost) -> str:
        return f"{cost.params:,} parameters exceed the limit of {self.limit:,}"

    def described(self) -> tuple[str, str]:
        return "parameters", f"at most {self.limit:,}"

    def missed(self, evaluation: Evaluation, measured_on: str) -> str:
        return f"{evaluation.cost.params:,} parameters are above the limit of {self.limit:,}"

    @property
    def line(self) -> str:
        return f"at most {self.limit:,} parameters"

    def check(self, space: Macroarchitecture) -> None:
        table = cost_table(space)
        fewest, most = (
            table.fixed.params + sum(end(cost.params for cost in costs) for costs in table.by_layer.values())
            for end in (min, max)
        )
        if self.limit < fewest:
            units = counts_meant(str(self.limit), "", fewest, most)
            raise FnetError(
                f"a limit of {self.limit:,} parameters is below the smallest network of space {space.name!r}, "
                f"which has {fewest:,}{f'; did you mean {units[0]}?' if units else ''}"
            )


class MinQuint8(Constraint):
    """The least quint8 score under the metric, a fraction of 1."""

    name, axis = "min_quint8", "accuracy"

    def violation(self, evaluation: Evaluation) -> float | None:
        _, quint8 = evaluation.exact_scores(self.metric)
        if evaluation.state != "complete" and quint8 is None:
            return None
        floor = exact(self.limit)
        return float((floor - (quint8 or 0)) / (floor or 1))

    def described(self) -> tuple[str, str]:
        return f"quint8 {self.metric.replace('-', ' ')}", f"at least {percent(self.limit)}"

    def missed(self, evaluation: Evaluation, measured_on: str) -> str:
        reached = f"{percent(self.scores(evaluation).quint8)}{self.of_metric}"
        return f"{reached} in quint8 on {measured_on} are below {percent(self.limit)}"

    @property
    def line(self) -> str:
        return f"quint8 at least {100 * self.limit:g} %"


class MaxDrop(Constraint):
    """The largest relative drop of the score from fp32 to quint8, a fraction of 1; 0: none at all."""

    name, axis = "max_drop", "drop"

    def __post_init__(self) -> None:
        if not self.limit >= 0:
            raise FnetError(f"{self.name} must not be negative, got {self.limit}")

    def violation(self, evaluation: Evaluation) -> float | None:
        if evaluation.state != "complete":
            return None
        fp32, quint8 = evaluation.exact_scores(self.metric)
        most, drop = exact(self.limit), (fp32 - (quint8 or 0)) / fp32 if fp32 else Fraction(1)
        return float((drop - most) / (most or 1))

    def described(self) -> tuple[str, str]:
        of = f" of{self.of_metric}" if self.of_metric else ""
        return f"relative drop{of}", f"at most {percent(self.limit)}"

    def missed(self, evaluation: Evaluation, measured_on: str) -> str:
        drop = percent(self.scores(evaluation).relative_drop)
        return f"a relative drop of {drop} on {measured_on} is above {percent(self.limit)}"

    @property
    def line(self) -> str:
        return f"at most {100 * self.limit:g} %"


def limited_by(kind: type[Constraint]) -> Any:
    """A field of `Constraints`: the limit of a constraint of this class, None for no limit."""
    return field(default=None, metadata={"constraint": kind})


@dataclass(frozen=True)
class Constraints:
    """The limits that a network must keep. Violations are normalised, and met at 0 or below (Optuna's convention). At a
    limit they are exactly 0, because images are counted and fractions compared exactly.

    `conv_macs` (multiply-accumulates per image in convolutions, as the paper counts them) and `params` are ceilings,
    known before training. `min_quint8` and `max_drop` (relative, from fp32 to quint8) are fractions of 1, known after
    it. `metric` selects the accuracy that they, and comparisons of networks, use (`Evaluation.scores`).
    """

    conv_macs: int | None = limited_by(ConvMacs)
    params: int | None = limited_by(Params)
    min_quint8: float | None = limited_by(MinQuint8)
    max_drop: float | None = limited_by(MaxDrop)
    metric: MetricName = "accuracy"

    def __post_init__(self) -> None:
        if self.metric not in get_args(MetricName):
            raise unknown("metric", self.metric, get_args(MetricName))
        _ = self.each  # each constraint checks its limit

    @cached_property
    def each(self) -> tuple[Constraint, ...]:
        """The constraints that have a limit."""
        options = [option for option in fields(self) if "constraint" in option.metadata]
        kinds = {option.name: option.metadata["constraint"] for option in options}
        limits = {name: getattr(self, name) for name in kinds}
        return tuple(kinds[name](limit, self.metric) for name, limit in limits.items() if limit is not None)

    @property
    def ceilings(self) -> tuple[Ceiling, ...]:
        """The constraints that need no training."""
        return tuple(constraint for constraint in self.each if isinstance(constraint, Ceiling))

    def of_cost(self, cost: Cost) -> dict[str, float]:
        """Violations of the ceilings, by name."""
        return {ceiling.name: ceiling.excess(cost) for ceiling in self.ceilings}

    def of(self, evaluation: Evaluation) -> dict[str, float]:
        """All known violations of an evaluation, by name."""
        violations = {constraint.name: constraint.violation(evaluation) for constraint in self.each}
        return {name: value for name, value in violations.items() if value is not None}

    def refusal(self, cost: Cost) -> str:
        """Why a plan of this cost must not be trained; empty if it may be."""
        return "; ".join(ceiling.refusal(cost) for ceiling in self.ceilings if ceiling.value(cost) > ceiling.limit)

    @property
    def measured(self) -> str:
        """The metric's name for display."""
        return self.metric.replace("-", " ")

    @property
    def on_images(self) -> bool:
        """Whether a constraint is checked on images."""
        return any(constraint.on_images for constraint in self.each)

    def described(self, checked_on: str = "") -> list[tuple[str, str]]:
        """`Constraint.described` of each; `checked_on` names the images that accuracies are measured on."""
        on = f", checked on {checked_on}" if checked_on else ""
        return [
            (what, f"{limit}{on if constraint.on_images else ''}")
            for constraint in self.each
            for what, limit in [constraint.described()]
        ]

    def missed(self, evaluation: Evaluation) -> tuple[str, ...]:
        """Names of the constraints that an evaluation is known to miss."""
        return tuple(name for name, value in self.of(evaluation).items() if value > 0)

    def misses(self, evaluation: Evaluation, measured_on: str) -> list[str]:
        """`Constraint.missed` of each missed constraint; `measured_on` names the images of the accuracies."""
        names = self.missed(evaluation)
        return [constraint.missed(evaluation, measured_on) for constraint in self.each if constraint.name in names]

    def check(self, space: Macroarchitecture) -> None:
        """Raises FnetError if no network of the space can meet one of them."""
        for constraint in self.each:
            constraint.check(space)

    def feasible(self, evaluation: Evaluation) -> bool:
        """Whether an evaluation is complete and meets every constraint."""
        return evaluation.state == "complete" and not self.missed(evaluation)


def parse_constraints(
    space: Macroarchitecture,
    budget: str | int,
    max_params: str | int | None = None,
    min_quint8: str | float | None = None,
    max_drop: str | float | None = None,
    metric: str = "accuracy",
) -> Constraints:
    """Constraints from text: a budget of ``"120MMAC"`` or ``"45%"``, ``"2M"`` parameters, a share of ``"80%"``.

    Raises FnetError for malformed text, an unknown metric, a space without a factorizable layer, and a budget below the
    smallest network of the space.
    """
    if not legal_rates(space):
        raise FnetError(
            f"space {space.name} has no factorizable layer; name convolutions with `factorize` (in a TOML file, set "
            "factorize = true), or quantize it as it is: fnet-search evaluate --plan regular"
        )
    return Constraints(
        ConvMacs.parse(str(budget), space),
        None if max_params is None else parse_count(str(max_params), "max_params"),
        None if min_quint8 is None else parse_share(str(min_quint8), "min_quint8"),
        None if max_drop is None else parse_share(str(max_drop), "max_drop"),
        cast(MetricName, metric),
    )
