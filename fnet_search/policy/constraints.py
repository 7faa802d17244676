"""What a network must satisfy: one class a constraint, which has all that is done with it and said of it."""

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
    """A limit on what is measured of a network. Where it is known before training, see `Ceiling`."""

    limit: Any
    metric: MetricName = "accuracy"
    name: ClassVar[str]
    """Its field in `Constraints`, and so its key in config.json and in Optuna's attributes."""
    axis: ClassVar[str] = ""
    """The panel of figures (`report.figures.METRICS`) in which it is a line; ``conv_macs``: a vertical line in all."""
    on_images: ClassVar[bool] = True
    """Whether images tell whether it is met."""

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise FnetError(f"{self.name} must be above 0, got {self.limit}")

    @abstractmethod
    def violation(self, evaluation: Evaluation) -> float | None:
        """How far an evaluation misses it, as a share of the limit; at most 0 where it is met, and exactly 0 at the
        limit. None: not known, since it was not trained."""

    @abstractmethod
    def described(self) -> tuple[str, str]:
        """What is limited, and to what, for people: ``conv MACs``, ``at most 120 MMAC``."""

    @abstractmethod
    def missed(self, evaluation: Evaluation, measured_on: str) -> str:
        """How an evaluation misses it, for people; `measured_on`: the images that its accuracies are of."""

    @property
    @abstractmethod
    def line(self) -> str:
        """The legend of its line in figures."""

    def check(self, space: Macroarchitecture) -> None:  # noqa: B027 (only some can tell)
        """Raises FnetError where no network of the space can meet it."""

    @property
    def of_metric(self) -> str:
        """The metric, where it is not what everybody expects."""
        return "" if self.metric == "accuracy" else f" {self.metric.replace('-', ' ')}"

    def scores(self, evaluation: Evaluation) -> Scores:
        return evaluation.scores(self.metric)


class Ceiling(Constraint):
    """A limit on what a plan costs, known before training: a plan above it is refused. Any function of its `Cost`."""

    on_images = False

    @abstractmethod
    def value(self, cost: Cost) -> float: ...

    @abstractmethod
    def refusal(self, cost: Cost) -> str:
        """Why a plan that costs more must not be trained."""

    def excess(self, cost: Cost) -> float:
        return self.value(cost) / float(self.limit) - 1

    def violation(self, evaluation: Evaluation) -> float:
        return self.excess(evaluation.cost)


class ConvMacs(Ceiling):
    """Most multiply-accumulates of one image in convolutions, as the paper counts them."""

    name = axis = "conv_macs"

    @staticmethod
    def parse(text: str, space: Macroarchitecture) -> int:
        """``"120MMAC"`` or ``"45%"``. Raises FnetError for what is below the smallest network of the space, too."""
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
    """Most weights and biases."""

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
    """Least accuracy in quint8, of the metric, a fraction of 1."""

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
    """Largest relative drop of the metric from fp32 to quint8, a fraction of 1; 0: none at all."""

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
    """A field of `Constraints`: the limit of a constraint, None where there is none."""
    return field(default=None, metadata={"constraint": kind})


@dataclass(frozen=True)
class Constraints:
    """What a network must satisfy. Violations are normalised values, <= 0 when met (Optuna's convention): at a limit
    they are 0, since images are counted and fractions are exact.

    `conv_macs` (multiply-accumulates of one image in convolutions, as the paper counts them) and `params` are ceilings
    known before training; `min_quint8` (accuracy) and `max_drop` (relative, from fp32 to quint8) are fractions of 1,
    known after. `metric` says which accuracy is meant, also where networks are compared (`Evaluation.scores`).
    """

    conv_macs: int | None = limited_by(ConvMacs)
    params: int | None = limited_by(Params)
    min_quint8: float | None = limited_by(MinQuint8)
    max_drop: float | None = limited_by(MaxDrop)
    metric: MetricName = "accuracy"

    def __post_init__(self) -> None:
        if self.metric not in get_args(MetricName):
            raise unknown("metric", self.metric, get_args(MetricName))
        _ = self.each  # each checks its limit

    @cached_property
    def each(self) -> tuple[Constraint, ...]:
        """Those that have a limit."""
        kinds = {one.name: one.metadata["constraint"] for one in fields(self) if "constraint" in one.metadata}
        limits = {name: getattr(self, name) for name in kinds}
        return tuple(kinds[name](limit, self.metric) for name, limit in limits.items() if limit is not None)

    @property
    def ceilings(self) -> tuple[Ceiling, ...]:
        """Those that need no training."""
        return tuple(one for one in self.each if isinstance(one, Ceiling))

    def of_cost(self, cost: Cost) -> dict[str, float]:
        """Violations that need no training."""
        return {one.name: one.excess(cost) for one in self.ceilings}

    def of(self, evaluation: Evaluation) -> dict[str, float]:
        """All violations of an evaluation, those after training only where it was trained."""
        violations = {one.name: one.violation(evaluation) for one in self.each}
        return {name: value for name, value in violations.items() if value is not None}

    def refusal(self, cost: Cost) -> str:
        """Why a plan of this cost must not be trained, or an empty string."""
        return "; ".join(one.refusal(cost) for one in self.ceilings if one.value(cost) > one.limit)

    @property
    def measured(self) -> str:
        """The metric's name, for people."""
        return self.metric.replace("-", " ")

    @property
    def on_images(self) -> bool:
        """Whether a limit is on what images tell."""
        return any(one.on_images for one in self.each)

    def described(self, checked_on: str = "") -> list[tuple[str, str]]:
        """What is limited, and to what, for people; `checked_on`: the images that tell accuracies."""
        on = f", checked on {checked_on}" if checked_on else ""
        return [
            (what, f"{limit}{on if one.on_images else ''}") for one in self.each for what, limit in [one.described()]
        ]

    def missed(self, evaluation: Evaluation) -> tuple[str, ...]:
        """Names of the constraints that an evaluation does not meet, as far as they are known."""
        return tuple(name for name, value in self.of(evaluation).items() if value > 0)

    def misses(self, evaluation: Evaluation, measured_on: str) -> list[str]:
        """How an evaluation misses those, for people; `measured_on`: the images that its accuracies are of."""
        names = self.missed(evaluation)
        return [one.missed(evaluation, measured_on) for one in self.each if one.name in names]

    def check(self, space: Macroarchitecture) -> None:
        """Raises FnetError where no network of the space can meet one of them."""
        for one in self.each:
            one.check(space)

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
    return Constraints(
        ConvMacs.parse(str(budget), space),
        None if max_params is None else parse_count(str(max_params), "max_params"),
        None if min_quint8 is None else parse_share(str(min_quint8), "min_quint8"),
        None if max_drop is None else parse_share(str(max_drop), "max_drop"),
        cast(MetricName, metric),
    )
