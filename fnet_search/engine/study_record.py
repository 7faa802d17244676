"""The Optuna study behind a search: one trial a suggestion, with everything measured in its attributes.

Suggestion numbers are ours: a suggestion whose worker or host died is taken over under its number, in a new trial; the
old one is told as failed and carries no number that counts. Several processes may share a study (`leases`).
"""

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan, depthwise, legal_rates, regular
from fnet_search.base.errors import FnetError
from fnet_search.base.files import replacing
from fnet_search.candidates.job import Job, Setup, Start, unfinished
from fnet_search.candidates.network_files import CHECKPOINT, QUANTIZED, WEIGHTS
from fnet_search.candidates.probes import ProbeTask, probe_tasks, probes_from
from fnet_search.optuna_bridge.leases import TAKEOVERS, Claim, Ledger
from fnet_search.optuna_bridge.pruner import EqualStart
from fnet_search.optuna_bridge.storage import has_study, together
from fnet_search.optuna_bridge.storage_url import LEASE_SECONDS
from fnet_search.optuna_bridge.trials import EPOCHS, ROLE, START, write_evaluation
from fnet_search.policy.asktell import lowest_free
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Audit, Evaluation, Probe, Probes, Role, SplitName
from fnet_search.policy.protocol import History
from fnet_search.policy.ranking import choose_parent, ranking
from fnet_search.quant.scheme import Scheme, parse_scheme
from fnet_search.report.csv_tables import candidate_line
from fnet_search.rundir.run_folder import RunFolder, kept_networks
from fnet_search.training.train import TrainingProgress

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

PROBED = "fnet_search:probes"
"""Prefix of system attributes of the study, one a layer: the network probed, and what was measured."""
SECONDS = "train_seconds"
"""User attribute of candidates that were trained: how long it took, failed ones too."""
POLL = 0.5
"""Seconds between two looks at what others do."""


@dataclass(frozen=True)
class Sharing:
    """How a study is shared with other processes, on other hosts too."""

    worker: str
    """What this one is called: the same whenever it works in this run folder."""
    artifacts: "ArtifactStore"
    """Where weights lie that others need."""
    lease: float = LEASE_SECONDS
    """Seconds after which a lease that is not renewed is taken over."""


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
    sharing: Sharing | None = None
    """None: no other process works on the study."""
    _trials: dict[int, Trial] = field(default_factory=dict)
    """Of this process, by number; as `_jobs`."""
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
    _looked: float = 0.0
    """When others' work was looked at."""
    _news: bool = False
    """Whether others have finished something since the run folder was written."""

    def __post_init__(self) -> None:
        self._audits = self.run.audits()
        name, pruner = self.run.name, EqualStart()
        if not has_study(self.storage, name):  # opening one writes nothing
            optuna.create_study(storage=self.storage, study_name=name, direction="maximize", load_if_exists=True)
        self.study = optuna.load_study(storage=self.storage, study_name=name, pruner=pruner)
        shared = self.sharing
        self.artifacts = FileSystemArtifactStore(self.run.artifacts) if shared is None else shared.artifacts
        how = () if shared is None else (shared.worker, shared.lease)
        self._ledger = Ledger(self.study, self.space, self._take, self.constraints.metric, *how)
        self._ledger.refresh()
        self._read_probes()
        self._write()

    def _read_probes(self) -> None:
        attributes = self.storage.get_study_system_attrs(self.study._study_id)
        for name, facts in attributes.items():
            if name.startswith(f"{PROBED}:"):
                measured = tuple(map(Probe.from_json, facts["probes"]))
                self._probed[name.removeprefix(f"{PROBED}:")] = facts["number"], measured

    def look(self, again_after: float = POLL) -> None:
        """At what other processes did, unless that was done less than so many seconds ago."""
        if self.sharing is None or time.monotonic() - self._looked < again_after:
            return
        self._ledger.refresh()
        if self.searching and self.probes is None:
            self._read_probes()
        if self._news:
            self._write()
        self._looked = time.monotonic()

    def wait(self) -> None:
        """For news of others, where there are any."""
        if self.sharing is not None:
            time.sleep(POLL)
            self.look()

    def lost(self) -> Claim | None:
        self.look()
        if not self.searching:  # plans that are given are asked for again, where they still are
            self._ledger.left.clear()
        left = self._ledger.left
        return left[min(left)] if left else None

    def close(self) -> None:
        """Where the study is shared, others may take up at once what this process has not finished."""
        self._ledger.close()

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """Finished ones, in order of their numbers."""
        evaluations = self._ledger.evaluations
        return tuple(evaluations[number] for number in sorted(evaluations))

    @property
    def audited(self) -> tuple[Evaluation, ...]:
        """`evaluations`, with the audits of winners that came after."""
        return tuple(map(self._audited, self.evaluations))

    def _audited(self, evaluation: Evaluation) -> Evaluation:
        return replace(evaluation, audit=evaluation.audit or self._audits.get(evaluation.number))

    def _take(self, evaluation: Evaluation, trial: FrozenTrial) -> None:
        number = evaluation.number
        self._lines[number] = candidate_line(self.space, self.constraints, self._audited(evaluation))
        if SECONDS in trial.user_attrs:
            self._seconds[number] = trial.user_attrs[SECONDS]
        if self.sharing is None or number in self._jobs:
            return
        self._news = True
        if self._kept is not None:
            self._kept.add(number)
        if evaluation.state == "complete" and not (self.run.candidate(number) / "evaluation.json").is_file():
            self.run.write_candidate(evaluation)

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
        """The best evaluation so far, feasible or nearest to it, also one that was promoted; None in a study of fixed
        plans."""
        ranked = ranking((*self.evaluations, *self.run.promoted), self.constraints)
        return ranked[0] if ranked and self.searching else None

    def history(self) -> History:
        """Final trainings are left out, and take no number of a suggestion: a search that goes on after one suggests
        what it would have suggested without."""
        self.look(again_after=0.0)
        open_claims = {**self._ledger.left, **self._ledger.claims}
        running = tuple(open_claims[n].plan for n in sorted(open_claims) if open_claims[n].role is not None)
        roles = [evaluation.role for evaluation in self.evaluations] + [claim.role for claim in open_claims.values()]
        past = tuple(evaluation.common or evaluation for evaluation in self.evaluations if evaluation.role != "final")
        number = self._next() - roles.count("final")
        return History(self.space, self.constraints, past, running, number, self.seed, self.probes)

    def _next(self) -> int:
        return lowest_free(self._ledger.numbers)

    @property
    def probes(self) -> Probes | None:
        """None where none were asked for, or not all are measured."""
        layers = legal_rates(self.space)
        if not layers or self._probed.keys() != set(layers):
            return None
        number, _ = self._probed[next(iter(layers))]
        measured = (probe for layer in layers for probe in self._probed[layer][1])
        return probes_from(number, self._ledger.evaluations[number].plan, measured)

    def to_probe(self, fisher: bool) -> list[ProbeTask]:
        history = self.history()
        evaluation = choose_parent(history.evaluations, depthwise(self.space), self.constraints.metric)
        if evaluation is None:
            reasons = [
                f"candidate {evaluation.number}: {evaluation.reason}"
                for evaluation in history.evaluations
                if evaluation.state == "failed"
            ]
            raise FnetError(f"there is no trained network to probe ({'; '.join(reasons) or 'none was trained'})")
        tasks = [
            task for task in probe_tasks(self.space, self._start(evaluation), fisher) if task.layer not in self._probed
        ]
        if self.sharing is None or not tasks:
            return tasks
        if not self.fetch(evaluation.number):
            raise self._gone(evaluation.number)
        first = hash(self.sharing.worker) % len(tasks)  # in an order of its own: layers are not leased
        return tasks[first:] + tasks[:first]

    def probed(self, task: ProbeTask, probes: tuple[Probe, ...]) -> None:
        if task.layer in self._probed:  # by another process, meanwhile
            return
        facts: dict[str, Any] = {"number": task.start.number, "probes": [probe.to_json() for probe in probes]}
        self.storage.set_study_system_attr(self.study._study_id, f"{PROBED}:{task.layer}", facts)
        self._probed[task.layer] = task.start.number, probes
        self._write()

    def refuse(self, plan: FactorizationPlan, reason: str) -> Evaluation | None:
        number, cost = self._next(), plan_cost(self.space, plan)
        validation = self._setup.validation
        evaluation = Evaluation(number, plan, cost, "refused", reason, split=self.split, validation=validation)
        trial = self._ledger.claim(number, plan)
        if trial is None:
            return None
        with together(self.storage):
            write_evaluation(trial, self.constraints, evaluation)
        self._ledger.tell(trial, evaluation)
        self.run.write_candidates(self._lines)
        return evaluation

    def start(self, plan: FactorizationPlan, role: Role, number: int | None = None) -> Job | None:
        number = self._next() if number is None else number
        job = self._job(number, plan, role, self._parent(plan, role))
        facts = {
            ROLE: role,
            START: "warm" if job.start else "imported" if self._setup.imported(job) else "scratch",
            EPOCHS: self._setup.recipe_of(job).epochs,
        }
        if job.start is not None:
            facts["parent"] = job.start.number
        trial = self._ledger.claim(number, plan, facts)
        if trial is None:
            return None
        if job.start is not None and not self.fetch(job.start.number):  # dropped meanwhile, for better ones
            self._ledger.leave(trial._trial_id, "released")
            if job.start.number in kept_networks(
                self.evaluations, self.constraints, self.searching
            ):  # they should be there
                raise self._gone(job.start.number)
            return None
        self._trials[number], self._jobs[number] = trial, job
        if (lost := self._ledger.takeovers[number]) > TAKEOVERS:
            self.finish(unfinished(self._setup, job, "failed", f"its worker was lost {lost} times"), 0.0)
            return None
        return job

    def again(self, evaluation: Evaluation) -> Job:
        """The job that gave this evaluation, and gives it again."""
        parent = None if evaluation.parent is None else self._ledger.evaluations[evaluation.parent]
        return self._job(evaluation.number, evaluation.plan, evaluation.role, parent)

    def _job(self, number: int, plan: FactorizationPlan, role: Role, parent: Evaluation | None) -> Job:
        start = None if parent is None else self._start(parent)
        return Job(number, plan, self.run.candidate(number), role, start, self._common(plan, role))

    def _start(self, parent: Evaluation) -> Start:
        epochs, scheme = parent.epochs + parent.inherited_epochs, parse_scheme(parent.scheme)
        return Start(parent.number, parent.plan, self.run.candidate(parent.number), epochs, scheme)

    def _common(self, plan: FactorizationPlan, role: Role) -> Scheme | None:
        """The scheme that the history has a candidate quantized with; None where that is the candidate's own."""
        setup, first = self._setup, regular(self.space)
        reference = setup.referenced and plan == first
        if len(setup.schemes) == 1 or not self.searching or role != "candidate" or reference:
            return None
        known = (
            evaluation.scheme
            for evaluation in self.evaluations
            if evaluation.plan == first and evaluation.state == "complete"
        )
        scheme = next(known, None) if setup.referenced else None
        return setup.schemes[0] if scheme is None else parse_scheme(scheme)

    def _parent(self, plan: FactorizationPlan, role: Role) -> Evaluation | None:
        """A function of what is recorded: of the networks whose weights are kept, the one to start from."""
        if role == "final":
            return self._best()
        if role == "reference" or not self._setup.fidelity.warm_start:
            return None
        having = kept_networks(self.evaluations, self.constraints, self.searching)
        past = (
            evaluation for evaluation in self.evaluations if evaluation.number in having and evaluation.role != "final"
        )
        return choose_parent(past, plan, self.constraints.metric)

    @property
    def _setup(self) -> Setup:
        assert self.setup is not None
        return self.setup

    def _best(self) -> Evaluation | None:
        ranked = ranking(
            tuple(evaluation for evaluation in self.evaluations if evaluation.role == "candidate"), self.constraints
        )
        return ranked[0] if ranked else None

    @property
    def starts(self) -> list[Evaluation]:
        """The networks that others start from: parents, the regular one, and that of the final training."""
        parents = {evaluation.parent for evaluation in self.evaluations if evaluation.role == "candidate"}
        parents |= {evaluation.number for evaluation in self.evaluations if evaluation.plan == regular(self.space)}
        if best := self.to_finish():
            parents.add(best.number)
        past = (
            evaluation
            for evaluation in self.evaluations
            if evaluation.state == "complete" and evaluation.role != "final"
        )
        return [evaluation for evaluation in past if evaluation.number in parents]

    def to_finish(self) -> Evaluation | None:
        epochs, best = self._setup.fidelity.final_epochs, self._best()
        if not epochs or best is None or (best.parent is None and best.epochs >= epochs):
            return None
        finals = [
            evaluation
            for evaluation in self.evaluations
            if evaluation.role == "final" and evaluation.parent == best.number
        ]
        done = any(evaluation.state == "failed" or evaluation.epochs >= epochs for evaluation in finals)
        return None if done else best

    def progress(self, number: int, progress: TrainingProgress) -> bool:
        if not progress.ended or progress.accuracy is None:
            return False
        if progress.epoch <= self._reported.get(number, 0):  # told again: its worker died and was replaced
            return progress.epoch == self._reported[number] and number in self._stopped
        self._reported[number] = progress.epoch
        trial = self._trials[number]
        try:
            trial.report(progress.accuracy, progress.epoch)
        except UpdateFinishedTrialError:  # another process has taken it over
            self._stopped.add(number)
            return True
        hopeless = self._setup.fidelity.prune and self._jobs[number].role == "candidate" and trial.should_prune()
        if hopeless and progress.epoch < progress.epochs:
            self._stopped.add(number)
        return number in self._stopped

    def finish(self, evaluation: Evaluation, seconds: float) -> bool:
        number, counts = evaluation.number, False
        trial = self._trials[number]
        with suppress(UpdateFinishedTrialError):
            with together(self.storage):
                trial.set_user_attr(SECONDS, round(seconds, 1))
                if evaluation.state == "complete":
                    for path in [*self.run.write_candidate(evaluation), *self._to_share(evaluation)]:
                        upload_artifact(artifact_store=self.artifacts, file_path=str(path), study_or_trial=trial)
                write_evaluation(trial, self.constraints, evaluation)
            counts = self._ledger.tell(trial, evaluation)
        if not counts:  # another process has taken it over: what it measures goes with its own weights
            self._ledger.leave(trial._trial_id, "withdrawn")
            for name in (WEIGHTS, QUANTIZED, CHECKPOINT, "evaluation.json"):
                (self.run.candidate(number) / name).unlink(missing_ok=True)
        del self._trials[number], self._jobs[number]
        if counts and self._kept is not None:
            self._kept.add(number)
        self._write()
        return counts

    def _to_share(self, evaluation: Evaluation) -> list[Path]:
        """Files that another process needs to start from a network."""
        after = (*self.evaluations, evaluation)
        if self.sharing is None or evaluation.number not in kept_networks(after, self.constraints, self.searching):
            return []
        return [self.run.candidate(evaluation.number) / name for name in (WEIGHTS, QUANTIZED)]

    def fetch(self, number: int) -> bool:
        """Whether the weights of a candidate are here, or were in the artifact store, where they are read from then."""
        folder = self.run.candidate(number)
        if all((folder / name).is_file() for name in (WEIGHTS, QUANTIZED)):
            return True
        if self.sharing is None:
            return True  # nowhere else: whoever reads them says what is missing
        files = self._shared_files(number)
        for name in (WEIGHTS, QUANTIZED):
            try:
                with self.artifacts.open_reader(files[name]) as opened, replacing(folder / name) as temporary:
                    temporary.write_bytes(opened.read())
            except (KeyError, OSError, ArtifactNotFound):
                return False
        return True

    def _gone(self, number: int) -> FnetError:
        return FnetError(
            f"the weights of candidate {number} are not in the artifact store; name the run's with `artifacts`"
        )

    def _shared_files(self, number: int) -> dict[str, str]:
        """Of a candidate: the artifacts' ids by file name."""
        trial = self.storage.get_trial(self._ledger.trials[number])
        metas = get_all_artifact_meta(trial, storage=self.storage)
        return {meta.filename: meta.artifact_id for meta in metas if meta.filename in (WEIGHTS, QUANTIZED)}

    def attach(self, paths: Iterable[Path]) -> None:
        """Attaches files to the study; one that was attached before under the same name is replaced."""
        known = {meta.filename: meta.artifact_id for meta in get_all_artifact_meta(self.study)}
        for path in paths:
            if path.name in known:
                with path.open("rb") as opened:
                    self.artifacts.write(known[path.name], opened)
            else:
                upload_artifact(artifact_store=self.artifacts, file_path=str(path), study_or_trial=self.study)

    def _write(self) -> None:
        """Brings the run folder in line with the study, also after a run that was cut off between the two."""
        self._news = False
        self.run.write_candidates(self._lines)
        self.run.write_timings(self._seconds)
        if (probes := self.probes) is not None:
            self.run.write_probes(probes)
        parents = {claim.parent for claim in self._ledger.claims.values() if claim.parent is not None}
        before = self._kept or set()
        self._kept = self.run.prune(self.evaluations, self.constraints, parents, self._kept, self.searching)
        if self.sharing is not None:
            for number in before - self._kept:
                for artifact in self._shared_files(number).values():
                    with suppress(ArtifactNotFound):
                        self.artifacts.remove(artifact)
