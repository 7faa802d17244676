"""A policy in a loop of one's own: ask for a plan, tell its evaluation. No torch and no Optuna.

What a host does between a policy and trainings is here, once: `search`, `sampler` and `AskTell` share it.
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

REPEATS_IN_A_ROW, REFUSALS_IN_A_ROW = 10, 1000
"""After so many refused plans, one after the other, all of them or as many as that of one plan, a policy is taken to
have no other."""


@dataclass(frozen=True)
class Refused:
    """A plan that was recorded, and will not be trained."""

    evaluation: Evaluation


def suggestion(policy: Policy, history: History) -> FactorizationPlan | None:
    """What the policy suggests. Raises FnetError where it fails, or suggests what is no plan of the space."""
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
    """Raises FnetError where the policy is to be asked no more, since a plan that is refused is one too many."""
    row = list(takewhile(lambda one: one.state == "refused", reversed(history.evaluations)))
    again = sum(one.plan == plan for one in row)
    if again >= REPEATS_IN_A_ROW:
        name = label(history.space, plan)
        raise FnetError(f"the policy suggests plan {name} again and again; refused {again} times in a row: {reason}")
    if len(row) >= REFUSALS_IN_A_ROW:
        raise FnetError(f"the policy suggested {len(row)} plans in a row that had to be refused, lastly: {reason}")


def lowest_free(taken: Collection[int]) -> int:
    """The number of the next suggestion: the lowest that nothing has. One that was lost is issued again."""
    return next(number for number in range(len(taken) + 1) if number not in taken)


class SuggestionRecord(Protocol):
    """Where suggestions are recorded."""

    def history(self) -> History:
        """The past, with the number of the next suggestion."""
        ...

    def refuse(self, plan: FactorizationPlan, reason: str) -> Evaluation | None:
        """Records a plan that is not trained. None where the number was taken meanwhile, by another process."""
        ...


def propose(
    policy: Policy, record: SuggestionRecord, enough: Callable[[History], bool] = lambda history: False
) -> Generator[Refused, None, FactorizationPlan | None]:
    """Asks until there is a plan that may be trained, and returns it; yields those that were refused and recorded.

    None where the policy has none, or the history that it would see is `enough`. Raises FnetError as `suggestion` and
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
    """A search whose trainings are somebody else's: `ask` for a plan, train it, `tell` the evaluation (the interface of
    Optuna's ``Study.ask`` and ``Study.tell``, without Optuna).

    It needs nothing but this list of `evaluations`; given again, the search goes on where it was. `probes` are for
    policies that require them: raises FnetError where they are missing. Several plans may be out at the same time: each
    is told when it is evaluated.
    """

    policy: Policy
    space: Macroarchitecture
    constraints: Constraints = field(default_factory=Constraints)
    seed: int = 0
    probes: Probes | None = None
    evaluations: tuple[Evaluation, ...] = ()
    """In order of their numbers, refused plans with their reasons among them."""
    _running: dict[int, FactorizationPlan] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_policy(self.policy, type(self.policy).__name__)
        if requirements(self.policy):
            probes_of(self.history(), self.policy)

    def history(self) -> History:
        """What the policy sees next."""
        running = tuple(self._running[number] for number in sorted(self._running))
        number = self._next()
        return History(self.space, self.constraints, self.evaluations, running, number, self.seed, self.probes)

    def _next(self) -> int:
        return lowest_free({one.number for one in self.evaluations} | self._running.keys())

    def ask(self) -> FactorizationPlan | None:
        """The next plan to train. Plans above the ceilings, and repeats, are recorded as refused and passed over.

        None while plans are out: the policy has none until one of them is told; None while none is: it is done.
        Raises FnetError for a policy that fails, or has none but plans that are refused: 1,000 in a row, or
        one of them ten times.
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
        """Records what a plan came to, and returns it under the number of its suggestion.

        A plan that was never asked for, as from another search, is taken too, under a number of its own. Make one from
        accuracies of your own with `Evaluation.of`. Raises FnetError for a plan that is not of the space, for one that
        was told before, for a complete evaluation without its quint8 accuracy, and for one without `classes` where
        balanced accuracy counts.
        """
        check_plan(self.space, evaluation.plan)
        if evaluation.state == "complete" and evaluation.quint8_accuracy is None:
            raise FnetError(f"plan {evaluation.plan} has no quint8_accuracy; if it failed, say state='failed'")
        limits = self.constraints
        if limits.metric != "accuracy" and evaluation.state == "complete" and not evaluation.classes:
            raise FnetError(f"{limits.measured} is taken from results by class; give the evaluation its classes=(...)")
        number = next((number for number, plan in self._running.items() if plan == evaluation.plan), None)
        if number is None and evaluation.state != "refused":
            for one in self.evaluations:
                if one.plan == evaluation.plan and one.state != "refused":
                    raise FnetError(f"plan {one.plan} was told before, as candidate {one.number}")
        number = self._next() if number is None else number
        self._running.pop(number, None)
        told = replace(evaluation, number=number)
        self.evaluations = tuple(sorted((*self.evaluations, told), key=lambda one: one.number))
        return told

    def refuse(self, plan: FactorizationPlan, reason: str) -> Evaluation:
        """Records a plan that is not trained."""
        return self.tell(Evaluation.of(self.space, plan, state="refused", reason=reason))

    @property
    def best(self) -> Evaluation | None:
        """The first of `policy.ranking` that is feasible: with the highest quint8 accuracy; None if none is."""
        ranked = ranking(self.evaluations, self.constraints)
        return ranked[0] if ranked and self.constraints.feasible(ranked[0]) else None
