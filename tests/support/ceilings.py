"""A constraint of one's own, which is not a sum over layers."""

from dataclasses import dataclass

from fnet_search.arch.costs import Cost
from fnet_search.policy.constraints import Ceiling, Constraints, limited_by
from fnet_search.policy.evaluation import Evaluation


class Larger(Ceiling):
    """On the larger of two numbers: a MAC, and 150 times a parameter."""

    name = "larger"

    def value(self, cost: Cost) -> int:
        return max(cost.conv_macs, 150 * cost.params)

    def refusal(self, cost: Cost) -> str:
        return f"the larger number, {self.value(cost):,}, exceeds {self.limit:,}"

    def described(self) -> tuple[str, str]:
        return "the larger number", f"at most {self.limit:,}"

    def missed(self, evaluation: Evaluation, measured_on: str) -> str:
        return self.refusal(evaluation.cost)

    @property
    def line(self) -> str:
        return f"larger {self.limit:,}"


@dataclass(frozen=True)
class WithLarger(Constraints):
    larger: int | None = limited_by(Larger)
