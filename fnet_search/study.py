"""The Optuna study behind a search: one trial a suggestion, with everything measured in its attributes.

Suggestion numbers are ours: a suggestion whose worker or host died is issued again under its number, in a new trial;
the old one is told as failed and carries no number that counts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from fnet_search.errors import FnetError
from fnet_search.macro import Macroarchitecture
from fnet_search.plan import FactorizationPlan, indices, label, legal_rates, plan_cost
from fnet_search.policy import Audit, Constraints, Evaluation, History, SplitName, ranking
from fnet_search.runfolder import RunFolder
from fnet_search.train import TrainingProgress

EVALUATION = "evaluation"
"""User attribute with the whole evaluation as JSON: what `history` is rebuilt from."""
SECONDS = "train_seconds"
"""User attribute of candidates that were trained: how long it took, failed ones too."""


def open_url(url: str) -> BaseStorage:
    """The storage behind an Optuna URL. Raises FnetError for one that cannot be opened."""
    try:
        return optuna.storages.get_storage(url)
    except Exception as error:  # whatever SQLAlchemy and its drivers raise for a bad URL
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FnetError(f"cannot open storage ({reason}); an Optuna URL is wanted, as in sqlite:///study.db") from None


def open_journal(journal: Path) -> BaseStorage:
    """The journal file of a run folder whose lock is held.

    A torn last line is cut off, and the lock of a process that was killed is dropped. Raises FnetError for a file of
    something else.
    """
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    with journal.open("a+b") as opened:
        opened.seek(0)
        opened.truncate(opened.read().rfind(b"\n") + 1)
    try:
        return JournalStorage(JournalFileBackend(str(journal)))
    except Exception as error:  # whatever Optuna raises for lines that it did not write
        raise FnetError(f"cannot read journal {journal}: {type(error).__name__}: {error}") from None


def has_study(storage: BaseStorage, name: str) -> bool:
    return name in optuna.get_all_study_names(storage)


class _GivenPlan(optuna.samplers.BaseSampler):
    """Puts the plan that a policy chose into the next trial, so that asking for it is one atomic step."""

    def __init__(self) -> None:
        self.params: dict[str, int] = {}
        self.space: dict[str, BaseDistribution] = {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]
    ) -> dict[str, Any]:
        return dict(self.params)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.params[param_name]


def distributions(space: Macroarchitecture) -> dict[str, BaseDistribution]:
    """An optimizer's view of a space: per layer the index of its rate among the legal ones."""
    return {layer: IntDistribution(0, len(rates) - 1) for layer, rates in legal_rates(space).items()}


@dataclass
class StudyRecord:
    """Records a search in an Optuna study and its run folder; `search.Record` says what each method does."""

    storage: BaseStorage
    run: RunFolder
    space: Macroarchitecture
    constraints: Constraints
    seed: int
    split: SplitName
    _evaluations: dict[int, Evaluation] = field(default_factory=dict)
    _trials: dict[int, Trial] = field(default_factory=dict)
    _plans: dict[int, FactorizationPlan] = field(default_factory=dict)
    _reported: dict[int, int] = field(default_factory=dict)
    _seconds: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._audits = self.run.audits()
        self._sampler = _GivenPlan()
        self.study = optuna.create_study(
            storage=self.storage,
            study_name=self.run.name,
            sampler=self._sampler,
            direction="maximize",
            load_if_exists=True,
        )
        self.artifacts = FileSystemArtifactStore(self.run.artifacts)
        for trial in self.study.get_trials(deepcopy=False):
            if EVALUATION in trial.user_attrs:
                evaluation = Evaluation.from_json(trial.user_attrs[EVALUATION])
                self._evaluations[evaluation.number] = evaluation
                if SECONDS in trial.user_attrs:
                    self._seconds[evaluation.number] = trial.user_attrs[SECONDS]
                if not trial.state.is_finished():  # cut off between the two last writes
                    self.study.tell(trial.number, *_outcome(evaluation))
            elif not trial.state.is_finished():  # of a run that was cut off; its number is issued again
                self.study.tell(trial.number, state=TrialState.FAIL)
        self._write()

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """Finished ones, in order of their numbers."""
        return tuple(self._evaluations[number] for number in sorted(self._evaluations))

    @property
    def audited(self) -> tuple[Evaluation, ...]:
        """`evaluations`, with the audits of winners that came after."""
        return tuple(replace(one, audit=one.audit or self._audits.get(one.number)) for one in self.evaluations)

    def audit(self, evaluation: Evaluation, audit: Audit) -> Evaluation:
        """Takes an audit that came after the evaluation was recorded; returns the evaluation with it."""
        self._audits[evaluation.number] = audit
        audited = replace(evaluation, audit=audit)
        self.run.write_candidate(audited)
        self.run.write_candidates(self.space, self.constraints, self.audited)
        return audited

    @property
    def winner(self) -> Evaluation | None:
        """The best evaluation so far, feasible or nearest to it; None in a study of fixed plans."""
        ranked = ranking(self.evaluations, self.constraints)
        return ranked[0] if ranked and self.split == "validation" else None

    def history(self) -> History:
        number = next(n for n in range(len(self._evaluations) + len(self._plans) + 1) if not self._taken(n))
        running = tuple(self._plans[n] for n in sorted(self._plans))
        return History(self.space, self.constraints, self.evaluations, running, number, self.seed)

    def _taken(self, number: int) -> bool:
        return number in self._evaluations or number in self._plans

    def folder(self, number: int) -> Path:
        return self.run.candidate(number)

    def refuse(self, plan: FactorizationPlan, reason: str) -> Evaluation:
        number = self.history().number
        evaluation = Evaluation(number, plan, plan_cost(self.space, plan), "refused", reason, self.split)
        self._tell(self._ask(plan, number), evaluation)
        self.run.write_candidates(self.space, self.constraints, self.audited)
        return evaluation

    def start(self, plan: FactorizationPlan) -> int:
        number = self.history().number
        self._trials[number] = self._ask(plan, number)
        self._plans[number] = plan
        return number

    def progress(self, number: int, progress: TrainingProgress) -> None:
        if not progress.ended or progress.accuracy is None or progress.epoch <= self._reported.get(number, 0):
            return
        self._reported[number] = progress.epoch
        self._trials[number].report(progress.accuracy, progress.epoch)

    def finish(self, evaluation: Evaluation, seconds: float) -> None:
        trial = self._trials[evaluation.number]
        self._seconds[evaluation.number] = round(seconds, 1)
        trial.set_user_attr(SECONDS, self._seconds[evaluation.number])
        if evaluation.state == "complete":
            for path in self.run.write_candidate(evaluation):
                upload_artifact(artifact_store=self.artifacts, file_path=str(path), study_or_trial=trial)
        self._tell(trial, evaluation)
        del self._trials[evaluation.number], self._plans[evaluation.number]
        self._write()

    def attach(self, paths: Iterable[Path]) -> None:
        """Attaches files to the study; one that was attached before under the same name is replaced."""
        known = {meta.filename: meta.artifact_id for meta in get_all_artifact_meta(self.study)}
        for path in paths:
            if path.name in known:
                with path.open("rb") as opened:
                    self.artifacts.write(known[path.name], opened)
            else:
                upload_artifact(artifact_store=self.artifacts, file_path=str(path), study_or_trial=self.study)

    def _ask(self, plan: FactorizationPlan, number: int) -> Trial:
        self._sampler.space = distributions(self.space)
        self._sampler.params = dict(zip(self._sampler.space, indices(self.space, plan), strict=True))
        trial = self.study.ask(self._sampler.space)
        trial.set_user_attr("number", number)
        trial.set_user_attr("plan", str(plan))
        trial.set_user_attr("label", label(self.space, plan))
        return trial

    def _tell(self, trial: Trial, evaluation: Evaluation) -> None:
        cost = evaluation.cost
        scalars = {
            "conv_macs": cost.conv_macs,
            "total_macs": cost.total_macs,
            "params": cost.params,
            "reason": evaluation.reason or None,
            "feasible": self.constraints.feasible(evaluation),
            **{name: getattr(evaluation, name) for name in ("fp32_accuracy", "quint8_accuracy", "qmse", "qce", "kl")},
            "relative_drop": evaluation.relative_drop,
            "scheme": evaluation.scheme or None,
            "differing_codes": evaluation.audit and evaluation.audit.differing,
        }
        for name, value in scalars.items():
            if value is not None:
                trial.set_user_attr(name, value)
        for name, violation in self.constraints.of(evaluation).items():
            trial.set_constraint(name, violation)
            trial.set_user_attr(f"violation_{name}", violation)
        # Last, since a trial with this attribute that is told counts as done.
        trial.set_user_attr(EVALUATION, evaluation.to_json())
        self.study.tell(trial, *_outcome(evaluation))
        self._evaluations[evaluation.number] = evaluation

    def _write(self) -> None:
        """Brings the run folder in line with the study, also after a run that was cut off between the two."""
        self.run.write_candidates(self.space, self.constraints, self.audited)
        self.run.write_timings(self._seconds)
        self.run.prune(self.evaluations, self.constraints)


def _outcome(evaluation: Evaluation) -> tuple[float | None, TrialState]:
    """Value and state of an evaluation's trial; samplers ignore failed ones."""
    states = {"complete": TrialState.COMPLETE, "refused": TrialState.PRUNED, "failed": TrialState.FAIL}
    return evaluation.quint8_accuracy, states[evaluation.state]
