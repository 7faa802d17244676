"""Ask-and-tell: drives a policy from any loop. No torch, no Optuna.

`propose` is what every host does between policy and training: `AskTell`, `engine.search_loop` and
`optuna_bridge.sampler` share it.
"""

from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Protocol

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan, check_plan, label
from fnet_search.base.errors import FnetError
from fnet_search.base.plugins import fault
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation, Probes
from fnet_search.policy.protocol import History, Policy, probes_of, requirements
from fnet_search.policy.ranking import ranking
from fnet_search.policy.registry import check_policy

REFUSALS_OF_ONE_PLAN, REFUSALS_IN_A_ROW = 10, 1000
"""The search ends when the policy suggests a plan that was refused REFUSALS_OF_ONE_PLAN times since a plan was last
accepted, or after REFUSALS_IN_A_ROW refusals of any plans: a policy may pass over many plans, as one with a fixed list
does, but not for ever."""


@dataclass(frozen=True)
class Refused:
    """A refused plan, recorded and not to be trained."""

    evaluation: Evaluation


def suggestion(policy: Policy, history: History) -> FactorizationPlan | None:
    """The plan that the policy suggests, or None. Raises FnetError if the policy raises or suggests no plan of the
    space."""
    failed = f"policy {type(policy).__name__} failed at suggestion {history.number}"
    try:
        plan = policy.suggest(history)
    except Exception as error:
        raise FnetError(f"{failed}: {fault(error, type(policy).__module__)}") from error
    if plan is not None and not isinstance(plan, FactorizationPlan):
        raise FnetError(f"{failed}: {plan!r} is neither a FactorizationPlan nor None")
    try:
        if plan is not None:
            check_plan(history.space, plan)
    except FnetError as error:
        raise FnetError(f"{failed}: {error}") from error
    return plan


def check_refusal(history: History, plan: FactorizationPlan, reason: str) -> None:
    """Raises FnetError if refusing this plan too would exceed REFUSALS_OF_ONE_PLAN or REFUSALS_IN_A_ROW."""
    row = list(takewhile(lambda evaluation: evaluation.state == "refused", reversed(history.evaluations)))
    again = sum(evaluation.plan == plan for evaluation in row)
    if again >= REFUSALS_OF_ONE_PLAN:
        name = label(history.space, plan)
        raise FnetError(
            f"the policy keeps suggesting plan {name}, refused {again} times since a plan was last accepted: {reason}"
        )
    if len(row) >= REFUSALS_IN_A_ROW:
        raise FnetError(f"the policy suggested {len(row)} refused plans in a row; the last: {reason}")


def lowest_free(taken: Collection[int]) -> int:
    """The number of the next suggestion: the lowest free one, so that the number of a lost worker is issued again."""
    return next(number for number in range(len(taken) + 1) if number not in taken)


class SuggestionRecord(Protocol):
    """Where a host records suggestions."""

    def history(self) -> History:
        """The past, with the number of the next suggestion."""
        ...

    def refuse(self, plan: FactorizationPlan, reason: str) -> Evaluation | None:
        """Records a refused plan. None if another process has taken the number meanwhile."""
        ...


def propose(
    policy: Policy, record: SuggestionRecord, enough: Callable[[History], bool] = lambda history: False
) -> Generator[Refused, None, FactorizationPlan | None]:
    """Asks the policy until it suggests a plan that may be trained, and returns that; yields each refused plan.

    Returns None if the policy does, or as soon as `enough` holds for the history. Raises FnetError as `suggestion` and
    `check_refusal`.
    """
    while True:
        history = record.history()
        plan = None if enough(history) else suggestion(policy, history)
        if plan is None or not (reason := history.refusal(plan)):
            return plan
        check_refusal(history, plan, reason)
        if (refused := record.refuse(plan, reason)) is not None:
            yield Refused(refused)


@dataclass
class AskTell:
    """A search in a loop of your own: `ask` for a plan, train it, `tell` the evaluation (as Optuna's ``Study.ask`` and
    ``Study.tell``, without Optuna).

    `evaluations` is its whole state: given again, the search continues. Policies that require `probes` must get them:
    raises FnetError if they are missing. Several plans may be out at once, and are told in any order.
    """

    policy: Policy
    space: Macroarchitecture
    constraints: Constraints = field(default_factory=Constraints)
    seed: int = 0
    probes: Probes | None = None
    evaluations: tuple[Evaluation, ...] = ()
    """In order of numbers, including refused plans."""
    _running: dict[int, FactorizationPlan] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_policy(self.policy, type(self.policy).__name__)
        if requirements(self.policy):
            probes_of(self.history(), self.policy)

    def history(self) -> History:
        """What the policy sees when it is asked next."""
        running = tuple(self._running[number] for number in sorted(self._running))
        number = self._next()
        return History(self.space, self.constraints, self.evaluations, running, number, self.seed, self.probes)

    def _next(self) -> int:
        return lowest_free({evaluation.number for evaluation in self.evaluations} | self._running.keys())

    def ask(self) -> FactorizationPlan | None:
        """The next plan to train. Plans above a ceiling and repeats are recorded as refused, and the policy asked
        again.

        None while plans are out: ask again after one of them is told. None while none is out: the search is done.
        Raises FnetError for a policy that fails or suggests only refused plans (`check_refusal`).
        """
        asking = propose(self.policy, self)
        while True:
            try:
                next(asking)
            except StopIteration as done:
                plan: FactorizationPlan | None = done.value
                break
        if plan is not None:
            self._running[self._next()] = plan
        return plan

    def tell(self, evaluation: Evaluation) -> Evaluation:
        """Records the evaluation of a plan (see `Evaluation.of`), and returns it with the number of its suggestion.

        Plans that were never asked for, as from another search, get the next free number. Raises FnetError for a plan
        that does not belong to the space or was told before (a refusal may be told again), for a complete evaluation
        without its quint8 accuracy, and for one without `classes` if the metric is balanced accuracy.
        """
        check_plan(self.space, evaluation.plan)
        if evaluation.state == "complete" and evaluation.quint8_accuracy is None:
            raise FnetError(
                f"plan {evaluation.plan} has no quint8_accuracy; give it, or state='failed' if the training failed"
            )
        limits = self.constraints
        if limits.metric != "accuracy" and evaluation.state == "complete" and not evaluation.classes:
            raise FnetError(f"{limits.measured} needs results by class; give the evaluation classes=(...)")
        number = next((number for number, plan in self._running.items() if plan == evaluation.plan), None)
        if number is None and evaluation.state != "refused":
            for earlier in self.evaluations:
                if earlier.plan == evaluation.plan and earlier.state != "refused":
                    raise FnetError(f"plan {earlier.plan} was told before, as candidate {earlier.number}")
        number = self._next() if number is None else number
        self._running.pop(number, None)
        numbered = replace(evaluation, number=number)
        self.evaluations = tuple(sorted((*self.evaluations, numbered), key=lambda earlier: earlier.number))
        return numbered

    def refuse(self, plan: FactorizationPlan, reason: str) -> Evaluation:
        """Records a plan as refused."""
        return self.tell(Evaluation.of(self.space, plan, state="refused", reason=reason))

    @property
    def best(self) -> Evaluation | None:
        """The feasible evaluation with the highest quint8 accuracy (`policy.ranking`); None if none is feasible."""
        ranked = ranking(self.evaluations, self.constraints)
        return ranked[0] if ranked and self.constraints.feasible(ranked[0]) else None
