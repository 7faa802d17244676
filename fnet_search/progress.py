"""What a user sees while a search runs, and at its end."""

import time
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fnet_search.macro import Macroarchitecture
from fnet_search.numerics import Numerics
from fnet_search.plan import label, plan_cost
from fnet_search.policy import Constraints, Evaluation
from fnet_search.quantities import millions, mmac, percent
from fnet_search.runfolder import RunFolder
from fnet_search.search import Event, Refused, Started
from fnet_search.train import TrainingProgress
from fnet_search.workers import Finished, Progressed


def clock(seconds: float) -> str:
    """``4:05`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TerminalDisplay:
    """A live table on a terminal, a line an epoch elsewhere. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._space: Macroarchitecture | None = None
        self._labels: dict[int, str] = {}
        self._running: dict[int, TrainingProgress | None] = {}
        self._trials = self._before = self._finished = 0
        self._start = time.monotonic()
        self._what, self._quarter = "", -1

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
        if what != self._what:
            self._what, self._start, self._quarter = what, time.monotonic(), -1
        left = (time.monotonic() - self._start) / done * (total - done)
        text = f"{what}: {done:,} of {total:,}, {clock(left)} left"
        if self._live:
            self._live.update(Text(text))
        elif 4 * done // total > self._quarter:
            self.say(text)
        self._quarter = 4 * done // total

    def begin(self, run: RunFolder, numerics: Numerics, space: Macroarchitecture, trials: int, done: int) -> None:
        self._space, self._trials, self._before, self._start = space, trials, done, time.monotonic()
        going_on = f", {done} trained before" if done else ""
        self.say(f"study {run.name} in {run.path}: up to {trials} candidates{going_on}; {numerics}")

    def show(self, event: Event) -> None:
        match event:
            case Refused(evaluation):
                self.say(f"candidate {evaluation.number} ({self._label(evaluation)}) refused: {evaluation.reason}")
            case Started(number, plan):
                assert self._space is not None
                self._labels[number] = label(self._space, plan)
                self._running[number] = None
                cost = plan_cost(self._space, plan)
                self.say(f"candidate {number} ({self._labels[number]}, {mmac(cost.conv_macs)}) starts")
            case Progressed(number, progress):
                self._running[number] = progress
                if not self._live and progress.ended:
                    self.say(f"{self._describe(number, progress)}; {self._left()}")
            case Finished(evaluation, seconds):
                self._finished += 1
                self._running.pop(evaluation.number, None)
                self.say(
                    f"candidate {evaluation.number} ({self._label(evaluation)}) {_result(evaluation)}, {clock(seconds)}"
                )
        if self._live:
            self._live.update(self._table())

    def _label(self, evaluation: Evaluation) -> str:
        assert self._space is not None
        return label(self._space, evaluation.plan)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _describe(self, number: int, progress: TrainingProgress) -> str:
        place = f"{self._before + self._finished + sorted(self._running).index(number) + 1} of {self._trials}"
        accuracy = (
            f", {progress.split} accuracy {percent(progress.accuracy, 1)}" if progress.accuracy is not None else ""
        )
        epoch = progress.stage or f"epoch {progress.epoch} of {progress.epochs}"
        return f"candidate {number} ({self._labels[number]}), {place}: {epoch}{accuracy}"

    def _share(self) -> float:
        """Of what this run has to do, done: candidates and parts of them."""
        parts = sum(progress.done for progress in self._running.values() if progress)
        return (self._finished + parts) / max(1, self._trials - self._before)

    def _left(self) -> str:
        share = self._share()
        if share < 0.01:  # a guess from less would be wild
            return "time left: measuring"
        return f"{clock((time.monotonic() - self._start) * (1 - share) / share)} left"

    def _table(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        for number, progress in sorted(self._running.items()):
            if progress is None:
                grid.add_row(f"candidate {number} ({self._labels[number]})", "", "worker starting")
            else:
                grid.add_row(self._describe(number, progress), ProgressBar(width=20, completed=100 * progress.done), "")
        done = f"{self._before + self._finished} of {self._trials} candidates trained"
        overall = Table.grid(padding=(0, 1))
        overall.add_row(done, ProgressBar(width=20, completed=100 * self._share()), self._left())
        return Group(grid, overall)


def _result(evaluation: Evaluation) -> str:
    if evaluation.state == "failed":
        return f"failed: {evaluation.reason}"
    return (
        f"fp32 {percent(evaluation.fp32_accuracy)}, quint8 {percent(evaluation.quint8_accuracy)} ({evaluation.split})"
    )


def candidates_table(space: Macroarchitecture, constraints: Constraints, evaluations: tuple[Evaluation, ...]) -> Table:
    """The candidates for the terminal, in order of their numbers. Of an audit: how many output codes differ."""
    split = evaluations[0].split if evaluations else "validation"
    table = Table(title=f"candidates (accuracies on the {split} split)", title_justify="left")
    for name in ("#", "plan"):
        table.add_column(name, justify="right" if name == "#" else "left", overflow="fold")
    for name in ("conv MMAC", "params k", "fp32 %", "quint8 %", "drop %", "QMSE", "QCE", "audit"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", overflow="fold")
    for one in evaluations:
        measured = [
            "" if value is None else f"{value:{form}}"
            for value, form in (
                (one.fp32_accuracy and 100 * one.fp32_accuracy, ".2f"),
                (one.quint8_accuracy and 100 * one.quint8_accuracy, ".2f"),
                (one.relative_drop and 100 * one.relative_drop, ".2f"),
                (one.qmse, ".4f"),
                (one.qce, ".4f"),
            )
        ]
        state = one.state if not one.reason else f"{one.state}: {one.reason}"
        if one.state == "complete" and not constraints.feasible(one):
            missed = [name for name, value in constraints.of(one).items() if value > 0]
            state = f"infeasible: {', '.join(missed)}"
        audit = "" if one.audit is None else f"{one.audit.differing:,} of {one.audit.codes:,}"
        macs, params = millions(one.cost.conv_macs), f"{one.cost.params / 1e3:,.0f}"
        table.add_row(str(one.number), label(space, one.plan), macs, params, *measured, audit, Text(state))
    return table
