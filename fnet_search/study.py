"""The Optuna study behind a search: one trial a suggestion, with everything measured in its attributes.

Suggestion numbers are ours: a suggestion whose worker or host died is issued again under its number, in a new trial;
the old one is told as failed and carries no number that counts.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState, create_trial

from fnet_search.asktell import lowest_free
from fnet_search.errors import FnetError
from fnet_search.evaluate import Job, Setup, Start
from fnet_search.macro import Macroarchitecture
from fnet_search.plan import FactorizationPlan, depthwise, legal_rates, plan_cost, regular
from fnet_search.policy import (
    Audit,
    Constraints,
    Evaluation,
    History,
    Probe,
    Probes,
    Role,
    SplitName,
    choose_parent,
    ranking,
)
from fnet_search.probes import ProbeTask, probe_tasks, probes_from
from fnet_search.prune import EPOCHS, ROLE, START, EqualStart
from fnet_search.report import candidate_line
from fnet_search.runfolder import RunFolder, kept
from fnet_search.train import TrainingProgress
from fnet_search.trials import describe, distributions, outcome, parameters, recorded, suggested

PROBED = "fnet_search:probes"
"""Prefix of system attributes of the study, one a layer: the network probed, and what was measured."""
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
        return JournalStorage(_Journal(str(journal)))
    except Exception as error:  # whatever Optuna raises for lines that it did not write
        raise FnetError(f"cannot read journal {journal}: {type(error).__name__}: {error}") from None


class _Journal(JournalFileBackend):
    """A journal file in which what is recorded `together` is one write, or none where that fails."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._held: list[dict[str, Any]] | None = None

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self._held is None:
            super().append_logs(logs)
        else:
            self._held += logs

    @contextmanager
    def together(self) -> Iterator[None]:
        held = self._held = []
        try:
            yield
        finally:
            self._held = None
        self.append_logs(held)


@contextmanager
def _together(storage: BaseStorage) -> Iterator[None]:
    """Attributes that are set meanwhile reach a journal in one write: each is synced to the disk, which takes
    milliseconds on some. They cannot be read before."""
    journal = getattr(storage, "_backend", None)
    with journal.together() if isinstance(journal, _Journal) else nullcontext():
        yield


def has_study(storage: BaseStorage, name: str) -> bool:
    return name in optuna.get_all_study_names(storage)


@dataclass
class StudyRecord:
    """Records a search in an Optuna study and its run folder; `search.Record` says what each method does."""

    storage: BaseStorage
    run: RunFolder
    space: Macroarchitecture
    constraints: Constraints
    seed: int
    split: SplitName
    setup: Setup | None = None
    """How candidates are trained; None where none will be."""
    searching: bool = True
    """Or a study of given plans."""
    _evaluations: dict[int, Evaluation] = field(default_factory=dict)
    _trials: dict[int, Trial] = field(default_factory=dict)
    _jobs: dict[int, Job] = field(default_factory=dict)
    _reported: dict[int, int] = field(default_factory=dict)
    _stopped: set[int] = field(default_factory=set)
    _probed: dict[str, tuple[int, tuple[Probe, ...]]] = field(default_factory=dict)
    """By layer: the number of the network, and what was measured."""
    _seconds: dict[int, float] = field(default_factory=dict)
    _lines: dict[int, str] = field(default_factory=dict)
    """Of candidates.csv, each made once."""
    _kept: set[int] | None = None
    """Numbers of those that may have weights; None: not known yet."""

    def __post_init__(self) -> None:
        self._audits = self.run.audits()
        self.study = optuna.create_study(
            storage=self.storage,
            study_name=self.run.name,
            pruner=EqualStart(),
            direction="maximize",
            load_if_exists=True,
        )
        self.artifacts = FileSystemArtifactStore(self.run.artifacts)
        for trial in self.study.get_trials(deepcopy=False):
            if (evaluation := recorded(trial)) is not None:
                self._take(evaluation)
                if SECONDS in trial.user_attrs:
                    self._seconds[evaluation.number] = trial.user_attrs[SECONDS]
                if not trial.state.is_finished():  # cut off between the two last writes
                    self.study.tell(trial.number, *outcome(evaluation))
            elif not trial.state.is_finished():  # of a run that was cut off; its number is issued again
                self.study.tell(trial.number, state=TrialState.FAIL)
        attributes = self.storage.get_study_system_attrs(self.study._study_id)
        for name, facts in attributes.items():
            if name.startswith(f"{PROBED}:"):
                measured = tuple(map(Probe.from_json, facts["probes"]))
                self._probed[name.removeprefix(f"{PROBED}:")] = facts["number"], measured
        self._write()

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """Finished ones, in order of their numbers."""
        return tuple(self._evaluations[number] for number in sorted(self._evaluations))

    @property
    def audited(self) -> tuple[Evaluation, ...]:
        """`evaluations`, with the audits of winners that came after."""
        return tuple(map(self._audited, self.evaluations))

    def _audited(self, evaluation: Evaluation) -> Evaluation:
        return replace(evaluation, audit=evaluation.audit or self._audits.get(evaluation.number))

    def _take(self, evaluation: Evaluation) -> None:
        self._evaluations[evaluation.number] = evaluation
        self._lines[evaluation.number] = candidate_line(self.space, self.constraints, self._audited(evaluation))

    def audit(self, evaluation: Evaluation, audit: Audit) -> Evaluation:
        """Takes an audit that came after the evaluation was recorded; returns the evaluation with it."""
        self._audits[evaluation.number] = audit
        audited = replace(evaluation, audit=audit)
        self.run.write_candidate(audited)
        self._lines[audited.number] = candidate_line(self.space, self.constraints, audited)
        self.run.write_candidates(self._lines)
        return audited

    @property
    def winner(self) -> Evaluation | None:
        """The best evaluation so far, feasible or nearest to it; None in a study of fixed plans."""
        ranked = ranking(self.evaluations, self.constraints)
        return ranked[0] if ranked and self.searching else None

    def history(self) -> History:
        """Final trainings are left out, and take no number of a suggestion: a search that goes on after one suggests
        what it would have suggested without."""
        roles = [one.role for one in self.evaluations] + [job.role for job in self._jobs.values()]
        past = tuple(one for one in self.evaluations if one.role != "final")
        running = tuple(self._jobs[n].plan for n in sorted(self._jobs))
        number = self._next() - roles.count("final")
        return History(self.space, self.constraints, past, running, number, self.seed, self.probes)

    def _next(self) -> int:
        taken = self._evaluations.keys() | self._jobs.keys()
        return lowest_free(taken)

    @property
    def probes(self) -> Probes | None:
        """None where none were asked for, or not all are measured."""
        layers = legal_rates(self.space)
        if not layers or self._probed.keys() != set(layers):
            return None
        number, _ = self._probed[next(iter(layers))]
        measured = (one for layer in layers for one in self._probed[layer][1])
        return probes_from(number, self._evaluations[number].plan, measured)

    def to_probe(self, fisher: bool) -> list[ProbeTask]:
        history = self.history()
        one = choose_parent(history.evaluations, depthwise(self.space))
        if one is None:
            reasons = [f"candidate {one.number}: {one.reason}" for one in history.evaluations if one.state == "failed"]
            raise FnetError(f"there is no trained network to probe ({'; '.join(reasons) or 'none was trained'})")
        start = Start(one.number, one.plan, self.run.candidate(one.number), one.epochs + one.inherited_epochs)
        return [task for task in probe_tasks(self.space, start, fisher) if task.layer not in self._probed]

    def probed(self, task: ProbeTask, probes: tuple[Probe, ...]) -> None:
        facts: dict[str, Any] = {"number": task.start.number, "probes": [one.to_json() for one in probes]}
        self.storage.set_study_system_attr(self.study._study_id, f"{PROBED}:{task.layer}", facts)
        self._probed[task.layer] = task.start.number, probes
        self._write()

    def refuse(self, plan: FactorizationPlan, reason: str) -> Evaluation:
        number = self._next()
        evaluation = Evaluation(number, plan, plan_cost(self.space, plan), "refused", reason, split=self.split)
        trial = self._ask(plan, number)
        with _together(self.storage):
            describe(trial, self.constraints, evaluation)
        self._tell(trial, evaluation)
        self.run.write_candidates(self._lines)
        return evaluation

    def start(self, plan: FactorizationPlan, role: Role) -> Job:
        number = self._next()
        job = self._job(number, plan, role, self._parent(plan, role))
        facts = {
            ROLE: role,
            START: "warm" if job.start else "imported" if self._setup.imported(job) else "scratch",
            EPOCHS: self._setup.recipe_of(job).epochs,
        }
        if job.start is not None:
            facts["parent"] = job.start.number
        self._trials[number], self._jobs[number] = self._ask(plan, number, facts), job
        return job

    def again(self, evaluation: Evaluation) -> Job:
        """The job that gave this evaluation, and gives it again."""
        parent = None if evaluation.parent is None else self._evaluations[evaluation.parent]
        return self._job(evaluation.number, evaluation.plan, evaluation.role, parent)

    def _job(self, number: int, plan: FactorizationPlan, role: Role, parent: Evaluation | None) -> Job:
        if parent is None:
            return Job(number, plan, self.run.candidate(number), role)
        epochs = parent.epochs + parent.inherited_epochs
        start = Start(parent.number, parent.plan, self.run.candidate(parent.number), epochs)
        return Job(number, plan, self.run.candidate(number), role, start)

    def _parent(self, plan: FactorizationPlan, role: Role) -> Evaluation | None:
        """A function of what is recorded: of the networks whose weights are kept, the one to start from."""
        if role == "final":
            return self._best()
        if role == "reference" or not self._setup.fidelity.warm_start:
            return None
        having = kept(self.evaluations, self.constraints)
        return choose_parent((one for one in self.evaluations if one.number in having and one.role != "final"), plan)

    @property
    def _setup(self) -> Setup:
        assert self.setup is not None
        return self.setup

    def _best(self) -> Evaluation | None:
        ranked = ranking(tuple(one for one in self.evaluations if one.role == "candidate"), self.constraints)
        return ranked[0] if ranked else None

    @property
    def starts(self) -> list[Evaluation]:
        """The networks that others start from: parents, the regular one, and that of the final training."""
        parents = {one.parent for one in self.evaluations if one.role == "candidate"}
        parents |= {one.number for one in self.evaluations if one.plan == regular(self.space)}
        if best := self.to_finish():
            parents.add(best.number)
        past = (one for one in self.evaluations if one.state == "complete" and one.role != "final")
        return [one for one in past if one.number in parents]

    def to_finish(self) -> Evaluation | None:
        epochs, best = self._setup.fidelity.final_epochs, self._best()
        if not epochs or best is None or (best.parent is None and best.epochs >= epochs):
            return None
        finals = [one for one in self.evaluations if one.role == "final" and one.parent == best.number]
        done = any(one.state == "failed" or one.epochs >= epochs for one in finals)
        return None if done else best

    def progress(self, number: int, progress: TrainingProgress) -> bool:
        if not progress.ended or progress.accuracy is None:
            return False
        if progress.epoch <= self._reported.get(number, 0):  # told again: its worker died and was replaced
            return progress.epoch == self._reported[number] and number in self._stopped
        self._reported[number] = progress.epoch
        trial = self._trials[number]
        trial.report(progress.accuracy, progress.epoch)
        hopeless = self._setup.fidelity.prune and self._jobs[number].role == "candidate" and trial.should_prune()
        if hopeless and progress.epoch < progress.epochs:
            self._stopped.add(number)
        return number in self._stopped

    def finish(self, evaluation: Evaluation, seconds: float) -> None:
        trial = self._trials[evaluation.number]
        self._seconds[evaluation.number] = round(seconds, 1)
        with _together(self.storage):
            trial.set_user_attr(SECONDS, self._seconds[evaluation.number])
            if evaluation.state == "complete":
                for path in self.run.write_candidate(evaluation):
                    upload_artifact(artifact_store=self.artifacts, file_path=str(path), study_or_trial=trial)
            describe(trial, self.constraints, evaluation)
        self._tell(trial, evaluation)
        del self._trials[evaluation.number], self._jobs[evaluation.number]
        assert self._kept is not None
        self._kept.add(evaluation.number)
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

    def _ask(self, plan: FactorizationPlan, number: int, facts: Mapping[str, Any] | None = None) -> Trial:
        """A running trial of this plan with its attributes, in one write: there is no moment without its parameters."""
        template = create_trial(
            state=TrialState.RUNNING,
            params=parameters(self.space, plan),
            distributions=distributions(self.space),
            user_attrs={**suggested(self.space, number, plan), **(facts or {})},
        )
        return Trial(self.study, self.storage.create_new_trial(self.study._study_id, template))

    def _tell(self, trial: Trial, evaluation: Evaluation) -> None:
        self.study.tell(trial, *outcome(evaluation))
        self._take(evaluation)

    def _write(self) -> None:
        """Brings the run folder in line with the study, also after a run that was cut off between the two."""
        self.run.write_candidates(self._lines)
        self.run.write_timings(self._seconds)
        if (probes := self.probes) is not None:
            self.run.write_probes(probes)
        parents = {job.start.number for job in self._jobs.values() if job.start is not None}
        self._kept = self.run.prune(self.evaluations, self.constraints, parents, self._kept)
