"""The terminal display: the progress of a run, and the table of its candidates at the end."""

import time
from types import TracebackType

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import FactorizationPlan, label
from fnet_search.base.terminal import PlainTable
from fnet_search.base.units import counted, millions, mmac, percent
from fnet_search.candidates.job import Job, Setup
from fnet_search.candidates.pool import Finished, Progressed
from fnet_search.engine.search_loop import Dropped, Event, ProbesProgressed, Started
from fnet_search.policy.asktell import Refused
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.metric import MetricName
from fnet_search.report.outcome import Outcome, interval
from fnet_search.rundir.run_folder import RunFolder
from fnet_search.training.train import TrainingProgress

BAR = 20
"""Width of a progress bar, in characters."""


def clock(seconds: float) -> str:
    """A duration as text: ``4:05`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TerminalDisplay:
    """The `Display` of the command line: a live table on a terminal, a line for each epoch elsewhere. A context
    manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._setup: Setup | None = None
        self._jobs: dict[int, Job] = {}
        self._running: dict[int, TrainingProgress | None] = {}
        self._resumed = set[int]()  # numbers of trainings whose last epoch so far was read from a checkpoint
        self._trials = self._started = 0
        # The time left is estimated in epochs: those done since `_start`, and the time that they took.
        self._ended_epochs = 0.0  # of the trainings that ended
        self._all_epochs = 0.0  # of all trainings of this run, as far as is known
        self._done_before = 0.0  # epochs that were done at `_start`
        self._later_epochs = 0.0  # of the comparison's runs after this one
        self._candidate_epochs = 0  # expected for each candidate
        self._start = time.monotonic()
        # What `advance` shows: the activity, the last quarter of it that was shown as a line, and when it began.
        self._activity, self._quarter, self._activity_start = "", -1, self._start

    def __enter__(self) -> "TerminalDisplay":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def status(self, text: str) -> None:
        if self._live:
            self._live.update(Text(f"{text} ..."), refresh=True)
        else:
            self.say(f"{text} ...")

    def advance(self, what: str, done: int, total: int) -> None:
        if what != self._activity:
            self._activity, self._quarter, self._activity_start = what, -1, time.monotonic()
        elapsed = time.monotonic() - self._activity_start
        left = clock(elapsed / done * (total - done)) + " left" if done else "starting"
        text = f"{what}: {done:,} of {total:,}, {left}"
        if self._live:
            self._live.update(Text(text))
        elif 4 * done // total > self._quarter:
            self.say(text)
        self._quarter = 4 * done // total

    def part(self, name: str, later: float) -> None:
        """Called before each run of a comparison; `later` is the number of epochs of the runs after it."""
        self._later_epochs = later

    def begin(self, run: RunFolder, setup: Setup, trials: int, done: int) -> None:
        self._setup, self._trials, self._started, self._start = setup, trials, done, time.monotonic()
        self._ended_epochs, self._done_before = 0.0, 0.0
        fidelity, recipe = setup.fidelity, setup.recipe
        self._candidate_epochs = (recipe.warm(fidelity.warm_epochs) if fidelity.warm_start else recipe).epochs
        self._all_epochs = max(0, trials - done) * self._candidate_epochs + fidelity.final_epochs
        before = f", {done} trained before" if done else ""
        self.say(f"study {run.name} in {run.path}: up to {counted(trials, 'candidate')}{before}; {setup.numerics}")

    def show(self, event: Event) -> None:
        match event:
            case Refused(evaluation):
                named = f"candidate {evaluation.number} ({self._label(evaluation.plan)})"
                self.say(f"{named} refused: {evaluation.reason}")
            case Started(job, again):
                assert self._setup is not None
                self._jobs[job.number], self._running[job.number] = job, None
                self._started += job.role == "candidate"
                final_epochs = self._setup.fidelity.final_epochs
                counted_before = {"candidate": self._candidate_epochs, "reference": 0, "final": final_epochs}
                self._all_epochs += self._setup.recipe_of(job).epochs - counted_before[job.role]
                cost = mmac(plan_cost(self._setup.space, job.plan).conv_macs)
                start = f", from candidate {job.start.number}" if job.start else ""
                verb = "starts again" if again else "starts"
                self.say(f"{self._name(job)} ({self._label(job.plan)}, {cost}) {verb}{start}")
            case ProbesProgressed(done, total):
                self.advance("probing the rates of all layers", done, total)
                return
            case Progressed(number, progress):
                self._running[number] = progress
                if progress.ended and progress.loss is None:  # an epoch of the checkpoint, which took no time now
                    self._done_before, self._start = self._done(), time.monotonic()
                    self._resumed.add(number)
                    return
                if number in self._resumed:
                    self._resumed.remove(number)
                    place = "after its last epoch" if progress.stage else f"from epoch {progress.epoch}"
                    self.say(f"{self._name(self._jobs[number])} goes on {place}")
                if not self._live and progress.ended:
                    self.say(f"{self._describe(number, progress)}; {self.left()}")
            case Dropped(number):
                self.say(f"{self._ended(number)} was taken over by another worker; its training here does not count")
            case Finished(evaluation, seconds):
                result = _result(evaluation, self._setup.metric if self._setup else "accuracy")
                self.say(f"{self._ended(evaluation.number)} {result}; took {clock(seconds)}")
        if self._live:
            self._live.update(self._table())

    def _ended(self, number: int) -> str:
        """Notes that a training has ended; returns its name and plan."""
        assert self._setup is not None
        self._running.pop(number, None)
        self._resumed.discard(number)
        job = self._jobs.pop(number)
        self._ended_epochs += self._setup.recipe_of(job).epochs
        return f"{self._name(job)} ({self._label(job.plan)})"

    def _name(self, job: Job) -> str:
        kind = {"candidate": "candidate", "reference": "reference", "final": "final training"}[job.role]
        return f"{kind} {job.number}"

    def _label(self, plan: FactorizationPlan) -> str:
        assert self._setup is not None
        return label(self._setup.space, plan)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _describe(self, number: int, progress: TrainingProgress | None) -> str:
        job = self._jobs[number]
        if progress is None:
            return f"{self._name(job)} ({self._label(job.plan)}): worker starting"
        measured = progress.accuracy is not None and not progress.stage
        metric = "accuracy" if self._setup is None else self._setup.metric.replace("-", " ")
        accuracy = f", {progress.split} {metric} {percent(progress.accuracy, 1)}" if measured else ""
        epoch = progress.stage or f"epoch {progress.epoch} of {progress.epochs}"
        return f"{self._name(job)} ({self._label(job.plan)}): {epoch}{accuracy}"

    def _done(self) -> float:
        """The epochs done, of `_all_epochs`. Epochs measure the work because an image costs about the same in all
        networks."""
        assert self._setup is not None
        parts = [
            progress.done * self._setup.recipe_of(self._jobs[number]).epochs
            for number, progress in self._running.items()
            if progress
        ]
        return min(self._all_epochs, self._ended_epochs + sum(parts))

    def left(self) -> str:
        """The time left, as in ``4:05 left``, for this run and the later ones of a comparison, extrapolated from the
        epochs done so far."""
        gained, total = self._done() - self._done_before, self._all_epochs + self._later_epochs
        if gained < min(1.0, 0.01 * self._all_epochs) or not gained:  # too little to extrapolate from
            return "time left: measuring"
        return f"{clock((time.monotonic() - self._start) * (total - self._done()) / gained)} left"

    def _table(self) -> RenderableType:
        texts = {number: self._describe(number, progress) for number, progress in sorted(self._running.items())}
        bars_fit = max(map(cell_len, texts.values()), default=0) + 2 + BAR <= self.console.width
        grid = Table.grid(padding=(0, 1))
        for number, text in texts.items():
            progress = self._running[number]
            bar = [ProgressBar(width=BAR, completed=100 * progress.done if progress else 0)] if bars_fit else []
            grid.add_row(Text(text), *bar)
        running = sum(self._jobs[number].role == "candidate" for number in self._running)
        done = f"{self._started - running} of {self._trials} candidates trained"
        overall = Table.grid(padding=(0, 1))
        overall.add_row(
            done, ProgressBar(width=BAR, total=max(1, self._all_epochs), completed=self._done()), self.left()
        )
        return Group(grid, overall)


def _result(evaluation: Evaluation, metric: MetricName) -> str:
    """The result of a training in one line."""
    if evaluation.state != "complete":
        return f"{evaluation.state}: {evaluation.reason}"
    fp32, quint8 = evaluation.scores(metric)
    name = "" if metric == "accuracy" else f"{metric.replace('-', ' ')} "
    scores = f"{name}fp32 {percent(fp32)}, quint8 {percent(quint8)} ({evaluation.split})"
    return f"{scores}; {evaluation.constant}" if evaluation.constant else scores


LEAST = ("QCE", "QMSE", "audit", "parameters", "drop %", "95 % interval", "fp32 %", "conv MMAC")
"""Columns of the candidates that a narrow terminal leaves out, in this order: the least important first."""


def candidates_table(outcome: Outcome) -> PlainTable:
    """The candidates for the terminal, in order of their numbers.

    The column for the audit has the number of output codes that differ. Balanced accuracy is that of the quint8
    network, shown if it is the metric or if classes are uneven. The 95 % interval is that of the metric.
    """
    space, constraints, evaluations = outcome.space, outcome.constraints, outcome.evaluations
    undecided = {evaluation.number for evaluation in outcome.undecided}
    images = max((evaluation.images for evaluation in evaluations), default=0)
    on = f"accuracies on the {outcome.split} split" + (f", {counted(images, 'image')}" if images else "")
    balanced = constraints.metric != "accuracy" or any(evaluation.uneven for evaluation in evaluations)
    scores = ("quint8 %", *(["balanced %"] if balanced else []), *(["95 % interval"] if images else []))
    numbers = ("conv MMAC", "parameters", "fp32 %", *scores, "drop %", "QMSE", "QCE", "audit")
    rows = []
    for evaluation in evaluations:
        measured = [
            "" if value is None else f"{value:{form}}"
            for value, form in (
                (evaluation.fp32_accuracy and 100 * evaluation.fp32_accuracy, ".2f"),
                (evaluation.quint8_accuracy and 100 * evaluation.quint8_accuracy, ".2f"),
                *(
                    [(evaluation.quint8_balanced_accuracy and 100 * evaluation.quint8_balanced_accuracy, ".2f")]
                    if balanced
                    else []
                ),
                *(
                    [(interval(evaluation, constraints.metric).partition(",")[0] if evaluation.images else None, "")]
                    if images
                    else []
                ),
                (evaluation.relative_drop and 100 * evaluation.relative_drop, ".2f"),
                (evaluation.qmse, ".4f"),
                (evaluation.qce, ".4f"),
            )
        ]
        state = evaluation.state if not evaluation.reason else f"{evaluation.state}: {evaluation.reason}"
        if evaluation.role == "reference" and evaluation.state == "complete":
            state = "reference: others start from it"
        elif evaluation.role == "final" and evaluation.state == "complete":
            state = f"candidate {evaluation.parent} trained on"
        if evaluation.role != "reference" and evaluation.state == "complete" and not constraints.feasible(evaluation):
            infeasible = f"infeasible: {', '.join(constraints.missed(evaluation))}"
            state = f"{state}, {infeasible}" if evaluation.role == "final" else infeasible
        state = f"{state}; {evaluation.constant}" if evaluation.constant else state
        if evaluation.number in undecided:
            state += ", not distinguishable from the winner"
        audit = "" if evaluation.audit is None else f"{evaluation.audit.differing:,} of {evaluation.audit.codes:,}"
        macs, params = millions(evaluation.cost.conv_macs), f"{evaluation.cost.params:,}"
        rows.append([str(evaluation.number), label(space, evaluation.plan), macs, params, *measured, audit, state])
    return PlainTable(f"candidates ({on})", ("#", "plan", *numbers, "state"), rows, {"plan": 13, "state": 12}, LEAST)
