"""The Optuna study behind a search: one trial for each suggestion, with everything measured in its attributes.

Suggestions have numbers of our own. If the worker or host of a suggestion dies, the suggestion is taken over under its
number in a new trial; the old trial fails and its number no longer counts. Several processes may share a study
(`optuna_bridge.leases`).
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
from fnet_search.deploy.weight_type import WeightType
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
"""Prefix of the study's system attributes with probes, one for each layer: the number of the probed network, and the
probes."""
SECONDS = "train_seconds"
"""User attribute of trained candidates, failed ones too: the seconds that it took."""
POLL = 0.5
"""Seconds between two reads of a shared study, for the work of other processes."""


@dataclass(frozen=True)
class Sharing:
    """How a study is shared with other processes, possibly on other hosts."""

    worker: str
    """The name of this process: the same for every process that works in this run folder (`RunFolder.worker`)."""
    artifacts: "ArtifactStore"
    """Holds the weights that other processes need."""
    lease: float = LEASE_SECONDS
    """A lease that is not renewed for this many seconds expires."""


@dataclass
class StudyRecord:
    """Records a search in an Optuna study and in the run folder. Implements `search_loop.SearchRecord`, which documents
    the methods.

    The study is the source: the run folder's tables are derived from it, and written again after each change.
    """

    storage: BaseStorage
    run: RunFolder
    space: Macroarchitecture
    constraints: Constraints
    seed: int
    split: SplitName
    setup: Setup | None = None
    """How candidates are trained; None if none will be trained, as when a report is made again."""
    searching: bool = True
    """False in a run of given plans."""
    sharing: Sharing | None = None
    """None: no other process works on the study."""
    _trials: dict[int, Trial] = field(default_factory=dict)
    """The trials of the candidates that this process trains now, by number."""
    _jobs: dict[int, Job] = field(default_factory=dict)
    """The jobs of the same candidates."""
    _reported: dict[int, int] = field(default_factory=dict)
    """By number: the last epoch whose accuracy was reported to the trial."""
    _stopped: set[int] = field(default_factory=set)
    """Numbers of the candidates that were told to stop."""
    _probed: dict[str, tuple[int, tuple[Probe, ...]]] = field(default_factory=dict)
    """By layer: the number of the probed network, and the probes."""
    _seconds: dict[int, float] = field(default_factory=dict)
    """By number: SECONDS."""
    _lines: dict[int, str] = field(default_factory=dict)
    """The lines of candidates.csv by number, each formatted once."""
    _kept: set[int] | None = None
    """Numbers of the candidates that may have weights in the run folder; None: not known yet."""
    _refreshed_at: float = 0.0
    """When the shared study was last read (`time.monotonic`)."""
    _news: bool = False
    """Whether other processes have finished something since the run folder was written."""

    def __post_init__(self) -> None:
        self._audits = self.run.audits()
        name, pruner = self.run.name, EqualStart()
        if not has_study(self.storage, name):  # checked first, so that opening an existing study writes nothing
            optuna.create_study(storage=self.storage, study_name=name, direction="maximize", load_if_exists=True)
        self.study = optuna.load_study(storage=self.storage, study_name=name, pruner=pruner)
        sharing = self.sharing
        self.artifacts = FileSystemArtifactStore(self.run.artifacts) if sharing is None else sharing.artifacts
        lease = () if sharing is None else (sharing.worker, sharing.lease)
        self._ledger = Ledger(self.study, self.space, self._take, self.constraints.metric, *lease)
        self._ledger.refresh()
        self._read_probes()
        self._write()

    def _read_probes(self) -> None:
        """Reads the probes in the study's attributes, this process's own and those of others."""
        attributes = self.storage.get_study_system_attrs(self.study._study_id)
        for name, facts in attributes.items():
            if name.startswith(f"{PROBED}:"):
                probes = tuple(map(Probe.from_json, facts["probes"]))
                self._probed[name.removeprefix(f"{PROBED}:")] = facts["number"], probes

    def look(self, again_after: float = POLL) -> None:
        """Reads what other processes have recorded. Does nothing if that was done less than `again_after` seconds ago,
        or if the study is not shared."""
        if self.sharing is None or time.monotonic() - self._refreshed_at < again_after:
            return
        self._ledger.refresh()
        if self.searching and self.probes is None:
            self._read_probes()
        if self._news:
            self._write()
        self._refreshed_at = time.monotonic()

    def wait(self) -> None:
        if self.sharing is not None:
            time.sleep(POLL)
            self.look()

    def lost(self) -> Claim | None:
        self.look()
        if not self.searching:  # `FixedPlans` suggests the given plans again, if this run still has them
            self._ledger.lost.clear()
        lost = self._ledger.lost
        return lost[min(lost)] if lost else None

    def close(self) -> None:
        """Ends the work of this process. In a shared study, others may take over its unfinished candidates at once."""
        self._ledger.close()

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """All recorded evaluations in order of their numbers, including refused plans."""
        evaluations = self._ledger.evaluations
        return tuple(evaluations[number] for number in sorted(evaluations))

    @property
    def audited(self) -> tuple[Evaluation, ...]:
        """`evaluations`, with the audits of winners, which are made after their evaluations are recorded."""
        return tuple(map(self._audited, self.evaluations))

    def _audited(self, evaluation: Evaluation) -> Evaluation:
        return replace(evaluation, audit=evaluation.audit or self._audits.get(evaluation.number))

    def _take(self, evaluation: Evaluation, trial: FrozenTrial) -> None:
        """Takes in an evaluation from the study: called once for each (`Ledger.on_evaluation`)."""
        number = evaluation.number
        self._lines[number] = candidate_line(self.space, self.constraints, self._audited(evaluation))
        if SECONDS in trial.user_attrs:
            self._seconds[number] = trial.user_attrs[SECONDS]
        if self.sharing is None or number in self._jobs:  # this process's own: `finish` writes the run folder
            return
        self._news = True
        if self._kept is not None:
            self._kept.add(number)
        if evaluation.state == "complete" and not (self.run.candidate(number) / "evaluation.json").is_file():
            self.run.write_candidate(evaluation)

    def audit(self, evaluation: Evaluation, audit: Audit) -> Evaluation:
        """Records an audit made after its evaluation was recorded, in the run folder. Returns the evaluation with the
        audit."""
        self._audits[evaluation.number] = audit
        audited = replace(evaluation, audit=audit)
        self.run.write_candidate(audited)
        self._lines[audited.number] = candidate_line(self.space, self.constraints, audited)
        self.run.write_candidates(self._lines)
        return audited

    @property
    def winner(self) -> Evaluation | None:
        """The first of the ranking, including promoted requantized networks; if nothing is feasible, the nearest to it.

        None if there is no complete evaluation, and in a run of given plans.
        """
        ranked = ranking((*self.evaluations, *self.run.promoted), self.constraints)
        return ranked[0] if ranked and self.searching else None

    def history(self) -> History:
        """The past as the policy sees it.

        Final trainings are left out and do not count in the number of the suggestion. So a search that is continued
        after a final training suggests what it would have suggested without it.
        """
        self.look(again_after=0.0)
        open_claims = {**self._ledger.lost, **self._ledger.claims}
        claims = [open_claims[number] for number in sorted(open_claims)]
        running = tuple(claim.plan for claim in claims if claim.role is not None)
        roles = [evaluation.role for evaluation in self.evaluations] + [claim.role for claim in claims]
        past = tuple(evaluation.common or evaluation for evaluation in self.evaluations if evaluation.role != "final")
        number = self._next() - roles.count("final")
        return History(self.space, self.constraints, past, running, number, self.seed, self.probes)

    def _next(self) -> int:
        return lowest_free(self._ledger.numbers)

    @property
    def probes(self) -> Probes | None:
        """The probes of the search; None if there are none, or not yet those of all layers."""
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
        # Layers are not leased: each worker begins at another one, so that few are measured twice.
        first = hash(self.sharing.worker) % len(tasks)
        return tasks[first:] + tasks[:first]

    def probed(self, task: ProbeTask, probes: tuple[Probe, ...]) -> None:
        if task.layer in self._probed:  # another process was faster
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
        if job.start is not None and not self.fetch(job.start.number):
            self._ledger.leave(trial._trial_id, "released")
            # Another process may have removed the parent's weights because better networks replaced it: then the claim
            # is taken over with another parent. If they should have been kept, the artifact store is the wrong one.
            if job.start.number in kept_networks(self.evaluations, self.constraints, self.searching):
                raise self._gone(job.start.number)
            return None
        self._trials[number], self._jobs[number] = trial, job
        if (lost := self._ledger.takeovers[number]) > TAKEOVERS:
            self.finish(unfinished(self._setup, job, "failed", f"its worker was lost {lost} times"), 0.0)
            return None
        return job

    def again(self, evaluation: Evaluation) -> Job:
        """The job that led to an evaluation, to be trained again with the same result."""
        parent = None if evaluation.parent is None else self._ledger.evaluations[evaluation.parent]
        return self._job(evaluation.number, evaluation.plan, evaluation.role, parent)

    def _job(self, number: int, plan: FactorizationPlan, role: Role, parent: Evaluation | None) -> Job:
        start = None if parent is None else self._start(parent)
        return Job(number, plan, self.run.candidate(number), role, start, self._common(plan, role))

    def _start(self, parent: Evaluation) -> Start:
        epochs, scheme = parent.epochs + parent.inherited_epochs, parse_scheme(parent.scheme)
        return Start(parent.number, parent.plan, self.run.candidate(parent.number), epochs, scheme)

    def _common(self, plan: FactorizationPlan, role: Role) -> Scheme | None:
        """The common scheme of the run, which the history has candidates quantized with (`Job.common`): that of the
        regular network if it is trained first, else the first of the setup's schemes.

        None if the network is only quantized with its own scheme.
        """
        setup, regular_plan = self._setup, regular(self.space)
        is_reference = setup.referenced and plan == regular_plan
        if len(setup.schemes) == 1 or not self.searching or role != "candidate" or is_reference:
            return None
        schemes = (
            evaluation.scheme
            for evaluation in self.evaluations
            if evaluation.plan == regular_plan and evaluation.state == "complete"
        )
        scheme = next(schemes, None) if setup.referenced else None
        return setup.schemes[0] if scheme is None else parse_scheme(scheme)

    def _parent(self, plan: FactorizationPlan, role: Role) -> Evaluation | None:
        """The network to start from, among those whose weights are kept; None: from scratch.

        Depends on nothing but what is recorded, so that a resumed search starts from the same one.
        """
        if role == "final":
            return self._best()
        if role == "reference" or not self._setup.fidelity.warm_start:
            return None
        kept = kept_networks(self.evaluations, self.constraints, self.searching)
        possible = (
            evaluation for evaluation in self.evaluations if evaluation.number in kept and evaluation.role != "final"
        )
        return choose_parent(possible, plan, self.constraints.metric)

    @property
    def weight_type(self) -> WeightType:
        """How the run's exported files store weights."""
        return (self.setup and self.setup.weight_type) or self.run.weight_type

    @property
    def _setup(self) -> Setup:
        assert self.setup is not None
        return self.setup

    def _best(self) -> Evaluation | None:
        """The best candidate: no final training, no promoted network."""
        candidates = tuple(evaluation for evaluation in self.evaluations if evaluation.role == "candidate")
        ranked = ranking(candidates, self.constraints)
        return ranked[0] if ranked else None

    @property
    def starts(self) -> list[Evaluation]:
        """The complete networks that others start from: parents of candidates, the regular network, and the candidate
        whose final training is still to come."""
        parents = {evaluation.parent for evaluation in self.evaluations if evaluation.role == "candidate"}
        parents |= {evaluation.number for evaluation in self.evaluations if evaluation.plan == regular(self.space)}
        if best := self.to_finish():
            parents.add(best.number)
        complete = (
            evaluation
            for evaluation in self.evaluations
            if evaluation.state == "complete" and evaluation.role != "final"
        )
        return [evaluation for evaluation in complete if evaluation.number in parents]

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
        if progress.epoch <= self._reported.get(number, 0):  # reported again by the worker that replaced a dead one
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
        if not counts:  # another process has taken it over: its evaluation belongs to its weights, not to ours
            self._ledger.leave(trial._trial_id, "withdrawn")
            for name in (WEIGHTS, QUANTIZED, CHECKPOINT, "evaluation.json"):
                (self.run.candidate(number) / name).unlink(missing_ok=True)
        del self._trials[number], self._jobs[number]
        if counts and self._kept is not None:
            self._kept.add(number)
        self._write()
        return counts

    def _to_share(self, evaluation: Evaluation) -> list[Path]:
        """The files that another process needs to start from a network, if it will be kept; else none."""
        if self.sharing is None:
            return []
        kept = kept_networks((*self.evaluations, evaluation), self.constraints, self.searching)
        if evaluation.number not in kept:
            return []
        return [self.run.candidate(evaluation.number) / name for name in (WEIGHTS, QUANTIZED)]

    def fetch(self, number: int) -> bool:
        """Copies the weights of a candidate from the artifact store, unless they are in the run folder. Returns whether
        they are there then.

        Always True if the study is not shared: loading missing weights then raises an error that names the file.
        """
        folder = self.run.candidate(number)
        if all((folder / name).is_file() for name in (WEIGHTS, QUANTIZED)):
            return True
        if self.sharing is None:
            return True
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
            f"the weights of candidate {number} are not in the artifact store; name the run's store with `artifacts`"
        )

    def _shared_files(self, number: int) -> dict[str, str]:
        """The artifact ids of a candidate's weights, by file name."""
        trial = self.storage.get_trial(self._ledger.trials[number])
        metas = get_all_artifact_meta(trial, storage=self.storage)
        return {meta.filename: meta.artifact_id for meta in metas if meta.filename in (WEIGHTS, QUANTIZED)}

    def attach(self, paths: Iterable[Path]) -> None:
        """Attaches files to the study, replacing those that were attached under the same name."""
        attached = {meta.filename: meta.artifact_id for meta in get_all_artifact_meta(self.study)}
        for path in paths:
            if path.name in attached:
                with path.open("rb") as opened:
                    self.artifacts.write(attached[path.name], opened)
            else:
                upload_artifact(artifact_store=self.artifacts, file_path=str(path), study_or_trial=self.study)

    def _write(self) -> None:
        """Writes the run folder's tables from the study, and deletes weights that are no longer kept, in the folder and
        in the artifact store.

        Also called when the record is opened, because an earlier process may have been killed between the study and the
        folder.
        """
        self._news = False
        self.run.write_candidates(self._lines)
        self.run.write_timings(self._seconds)
        if (probes := self.probes) is not None:
            self.run.write_probes(probes)
        parents = {claim.parent for claim in self._ledger.claims.values() if claim.parent is not None}
        kept_before = self._kept or set()
        self._kept = self.run.prune(self.evaluations, self.constraints, parents, self._kept, self.searching)
        if self.sharing is not None:
            for number in kept_before - self._kept:
                for artifact in self._shared_files(number).values():
                    with suppress(ArtifactNotFound):
                        self.artifacts.remove(artifact)
