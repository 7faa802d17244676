"""`SamplerPolicy`: an Optuna sampler as a policy. No torch."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import TrialState, create_trial

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan
from fnet_search.base.errors import FnetError
from fnet_search.optuna_bridge.trials import index_distributions, index_parameters, plan_from_indices, value_and_state
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.exact_choice import sample_plan
from fnet_search.policy.protocol import History


@dataclass(frozen=True)
class SamplerPolicy:
    """Any Optuna sampler as a policy: ``SamplerPolicy(optuna.samplers.NSGAIISampler)``.

    The sampler sees the candidates of the history as a study that maximises their quint8 score under constraints: the
    trained ones; pruned and refused ones as pruned trials; running plans as running trials. The first `startup` plans
    are drawn uniformly under the ceilings. After that, the policy suggests the first of up to `proposals` proposals
    that is unseen and under the ceilings, or else the result of `otherwise`; None if no plan is left.

    Args:
        sampler: called with ``seed=...`` for each suggestion: a class, or ``functools.partial(TPESampler, ...)``.
        replay: True for samplers that store more in a study than trials, as a genetic algorithm stores generations. The
            history is then replayed with the sampler in order of the numbers; otherwise its trials are only added.
    """

    sampler: Callable[..., BaseSampler]
    startup: int = 10
    proposals: int = 32
    replay: bool = True
    _past: list["_Past"] = field(default_factory=list, init=False, repr=False, compare=False)
    """A cache: the study of the last suggestion, to be extended."""

    def __post_init__(self) -> None:
        if isinstance(self.sampler, BaseSampler):
            name = type(self.sampler).__name__
            raise FnetError(f"SamplerPolicy needs a sampler class, not an instance: SamplerPolicy({name})")

    def suggest(self, history: History) -> FactorizationPlan | None:
        space, constraints, seen, rng = history.space, history.constraints, history.seen, history.rng
        if sum(evaluation.state == "complete" for evaluation in _candidates(history)) < self.startup:
            return sample_plan(space, constraints, seen, rng)
        for plan in self.proposed(history, int(rng.integers(2**31))):
            if plan not in seen and not constraints.refusal(plan_cost(space, plan)):
                return plan
        return self.otherwise(history)

    def proposed(self, history: History, seed: int) -> Iterator[FactorizationPlan]:
        """Up to `proposals` plans from the sampler with this seed: they may be seen or above the ceilings."""
        with self.study(history, seed) as study:
            for _ in range(self.proposals):
                plan = plan_from_indices(history.space, study.ask(index_distributions(history.space)).params)
                assert plan is not None
                yield plan

    def otherwise(self, history: History) -> FactorizationPlan | None:
        """The suggestion if no proposal qualifies: drawn uniformly from the unseen plans under the ceilings."""
        rng = history.rng
        rng.integers(2**31)  # the sampler's seed
        return sample_plan(history.space, history.constraints, history.seen, rng)

    @contextmanager
    def study(self, history: History, seed: int) -> Iterator[optuna.Study]:
        """The history as an in-memory study, with a sampler of this seed.

        The study leaves the cache while it is in use, so another thread makes its own.
        """
        candidates, past = _candidates(history), None
        with suppress(IndexError):
            past = self._past.pop()
        if past is None or not past.begins(history, candidates):
            past = _Past(history.space, history.constraints, _study(InMemoryStorage()))
        _end(past.study)
        for evaluation in candidates[len(past.evaluations) :]:
            past.take(evaluation, self.sampler(seed=evaluation.number) if self.replay else None)
        study = _study(copy.deepcopy(past.study._storage)) if self.replay else past.study
        study.sampler = self.sampler(seed=seed)
        for plan in history.running:
            trial = _fixed(study, history.space, plan)
            if self.replay:
                _ = trial.relative_params
        try:
            yield study
        finally:
            self._past[:] = [past]


@dataclass
class _Past:
    """A study, and the `evaluations` that it already holds."""

    space: Macroarchitecture
    constraints: Constraints
    study: optuna.Study
    evaluations: tuple[Evaluation, ...] = ()

    def begins(self, history: History, candidates: tuple[Evaluation, ...]) -> bool:
        same = self.space == history.space and self.constraints == history.constraints
        return same and candidates[: len(self.evaluations)] == self.evaluations

    def take(self, evaluation: Evaluation, sampler: BaseSampler | None) -> None:
        """Adds an evaluation to the study; with a `sampler`, as if that had proposed it."""
        self.evaluations += (evaluation,)
        value, state = value_and_state(evaluation, self.constraints.metric)
        violations = {name: max(0.0, value) for name, value in self.constraints.of(evaluation).items()}
        if sampler is None:
            trial = create_trial(
                value=(evaluation.accuracies or (None,))[-1] if state is TrialState.PRUNED else value,
                state=state,
                params=index_parameters(self.space, evaluation.plan),
                distributions=index_distributions(self.space),
                intermediate_values=dict(enumerate(evaluation.accuracies, 1)),
                constraints=violations,
            )
            self.study.add_trial(trial)
            return
        self.study.sampler = sampler
        walked = _fixed(self.study, self.space, evaluation.plan)
        _ = walked.relative_params
        for epoch, accuracy in enumerate(evaluation.accuracies, 1):
            walked.report(accuracy, epoch)
        for name, violation in violations.items():
            walked.set_constraint(name, violation)
        self.study.tell(walked, *((value, state) if state is TrialState.COMPLETE else (None, state)))


def _fixed(study: optuna.Study, space: Macroarchitecture, plan: FactorizationPlan) -> optuna.Trial:
    """A running trial with the rates of `plan`."""
    study.enqueue_trial(index_parameters(space, plan))
    return study.ask(index_distributions(space))


def _candidates(history: History) -> tuple[Evaluation, ...]:
    """The evaluations that a sampler sees: not the reference, which exceeds the ceilings, nor those without a value."""

    def told(evaluation: Evaluation) -> bool:
        value, state = value_and_state(evaluation, history.constraints.metric)
        known = value is not None if state is TrialState.COMPLETE else state is not TrialState.FAIL
        return evaluation.role == "candidate" and known

    return tuple(filter(told, history.evaluations))


def _study(storage: BaseStorage) -> optuna.Study:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(storage=storage, study_name="history", direction="maximize", load_if_exists=True)
    finally:
        optuna.logging.set_verbosity(before)


def _end(study: optuna.Study) -> None:
    """Fails the running trials, which samplers then ignore: the study holds the history alone again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
