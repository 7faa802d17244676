import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import FactorizationPlan, depthwise, legal_rates, make_plan, regular, uniform
from fnet_search.candidates.job import Job, Setup, Start
from fnet_search.candidates.pool import Finished, Progressed
from fnet_search.engine import progress as module
from fnet_search.engine.progress import TerminalDisplay, candidates_table, clock
from fnet_search.engine.search_loop import ProbesProgressed, Started
from fnet_search.importing.spaces import load_space
from fnet_search.policy.asktell import Refused
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Audit, Evaluation, Role
from fnet_search.policy.metric import ClassResult
from fnet_search.quant.scheme import PAPER
from fnet_search.rundir.run_folder import RunFolder
from fnet_search.training.numerics import Numerics
from fnet_search.training.recipe import Fidelity, load_recipe
from fnet_search.training.train import TrainingProgress
from tests.support.evaluations import failed, outcome, pruned, refused, trained

TINY = load_space("tiny")
CPU = Numerics("cpu", "bfloat16", True, 1)
F2, F4 = uniform(TINY, 2), uniform(TINY, 4)
REGULAR = regular(TINY)
ENDED = TrainingProgress(1, 4, True, 0.25, 1.5, 0.5, "validation")


def trained_with(fidelity: Fidelity) -> Setup:
    return Setup(TINY, load_recipe("quick").with_epochs(4), (PAPER,), CPU, 0, "validation", fidelity=fidelity)


COLD, WARM = trained_with(Fidelity()), trained_with(Fidelity(True, warm_epochs=1, prune=True, final_epochs=8))


def started(number: int, plan: FactorizationPlan, role: Role = "candidate", parent: int | None = None) -> Started:
    start = None if parent is None else Start(parent, REGULAR, Path(), 4)
    return Started(Job(number, plan, Path(), role, start))


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is, in the only element."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def display(terminal: bool = False) -> tuple[TerminalDisplay, io.StringIO]:
    out = io.StringIO()
    return TerminalDisplay(Console(file=out, width=100, force_terminal=terminal, color_system=None)), out


def begun(trials: int = 4, done: int = 0, setup: Setup = COLD) -> tuple[TerminalDisplay, io.StringIO]:
    shown, out = display()
    shown.begin(RunFolder(Path("runs/one")), setup, trials, done)
    return shown, out


def last(out: io.StringIO) -> str:
    return out.getvalue().splitlines()[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (0.6, "0:01"),
        (59.6, "1:00"),
        (245, "4:05"),
        (3599, "59:59"),
        (3599.5, "1:00:00"),
        (90061, "25:01:01"),
    ],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_without_a_terminal_there_is_a_line_an_epoch(time: list[float]) -> None:
    shown, out = display()
    with shown:
        shown.status("reading digits")
        shown.begin(RunFolder(Path("runs/one")), COLD, 2, 0)
        shown.show(Refused(refused(TINY, regular(TINY), 0, "811,008 conv MACs exceed the budget of 507,904")))
        shown.show(started(1, F2))
        time[0] += 10
        shown.show(Progressed(1, replace(ENDED, ended=False, done=0.2, accuracy=None)))
        shown.show(Progressed(1, ENDED))
        shown.show(Progressed(1, replace(ENDED, ended=False, stage="measuring", done=0.9)))
        time[0] += 55
        shown.show(Finished(trained(TINY, F2, 1, 0.975, 0.9251), 65.4))
        shown.show(started(2, make_plan(TINY, {"conv_8": 4})))
        shown.show(Finished(failed(TINY, make_plan(TINY, {"conv_8": 4}), 2, "no luck"), 3.2))
        shown.status("drawing figures and the report")
    assert out.getvalue().splitlines() == [
        "reading digits ...",
        "study one in runs/one: up to 2 candidates; cpu, bfloat16, channels_last, 1 thread per worker",
        "candidate 0 (regular) refused: 811,008 conv MACs exceed the budget of 507,904",
        "candidate 1 (f2, 0.508 MMAC) starts",
        "candidate 1 (f2): epoch 1 of 4, validation accuracy 50.0 %; 1:10 left",
        "candidate 1 (f2) fp32 97.50 %, quint8 92.51 % (validation); took 1:05",
        "candidate 2 (4-1-1, 0.586 MMAC) starts",
        "candidate 2 (4-1-1) failed: no luck; took 0:03",
        "drawing figures and the report ...",
    ]


def test_what_is_read_from_a_checkpoint_took_no_time(time: list[float]) -> None:
    shown, out = begun(trials=2)
    shown.show(started(0, F2))
    time[0] += 5
    before = out.getvalue()
    shown.show(Progressed(0, replace(ENDED, loss=None)))
    shown.show(Progressed(0, replace(ENDED, epoch=2, done=0.5, loss=None)))
    assert out.getvalue() == before, "no epoch is told again"
    shown.show(Progressed(0, replace(ENDED, epoch=3, done=0.5, ended=False)))
    assert last(out) == "candidate 0 goes on from epoch 3"
    time[0] += 10
    shown.show(Progressed(0, replace(ENDED, epoch=3, done=0.75)))
    assert last(out).endswith("; 0:50 left"), "1 + 4 epochs of 10 s"
    assert out.getvalue().count("goes on") == 1
    shown.show(started(1, F4))
    shown.show(Progressed(1, replace(ENDED, epoch=4, done=0.9, loss=None)))
    shown.show(Progressed(1, replace(ENDED, epoch=4, ended=False, stage="calibrating", done=0.9)))
    assert last(out) == "candidate 1 goes on after its last epoch"


def test_the_time_left_with_some_trained_before_and_several_at_once(time: list[float]) -> None:
    shown, out = begun(trials=5, done=2)
    assert last(out).startswith("study one in runs/one: up to 5 candidates, 2 trained before; ")
    shown.show(started(3, F2))
    shown.show(started(4, F4))
    time[0] += 30
    shown.show(Progressed(4, ENDED))
    assert last(out) == "candidate 4 (f4): epoch 1 of 4, validation accuracy 50.0 %; 5:30 left"
    shown.show(Progressed(3, replace(ENDED, done=0.5)))
    assert last(out).startswith("candidate 3 (f2): ")
    assert last(out).endswith("; 1:30 left"), "three quarters of three in 30 seconds"
    shown.show(Finished(trained(TINY, F4, 4, 0.9, 0.8), 40))
    shown.show(Progressed(3, replace(ENDED, epoch=2, accuracy=0.0)))
    assert last(out).startswith("candidate 3 (f2): epoch 2 of 4, validation accuracy 0.0 %; ")


def test_what_a_warm_search_says(time: list[float]) -> None:
    """An epoch takes ten seconds here, whatever the network."""
    shown, out = begun(trials=2, setup=WARM)
    shown.show(started(0, REGULAR, "reference"))
    time[0] += 20
    shown.show(Progressed(0, replace(ENDED, epoch=2, done=0.5)))
    time[0] += 20
    shown.show(Finished(replace(trained(TINY, REGULAR, 0, 0.9, 0.875), role="reference"), 40))
    shown.show(started(1, F2, parent=0))
    shown.show(Progressed(1, TrainingProgress(1, 1, False, 0.0, 0.0, None, "", "starting from candidate 0")))
    time[0] += 10
    shown.show(Progressed(1, replace(ENDED, epochs=1, done=1.0)))
    shown.show(Finished(replace(trained(TINY, F2, 1, 0.8, 0.75), parent=0), 10))
    shown.show(started(2, F4, parent=0))
    shown.show(Finished(replace(pruned(TINY, F4, 2), parent=0), 10))
    shown.show(started(3, F2, "final", parent=1))
    time[0] += 10
    shown.show(Progressed(3, replace(ENDED, epochs=8, done=0.125)))
    shown.show(Finished(replace(trained(TINY, F2, 3, 0.9, 0.85), role="final", parent=1), 80))
    assert out.getvalue().splitlines()[1:] == [
        "reference 0 (regular, 0.811 MMAC) starts",
        "reference 0 (regular): epoch 2 of 4, validation accuracy 50.0 %; 2:00 left",
        "reference 0 (regular) fp32 90.00 %, quint8 87.50 % (validation); took 0:40",
        "candidate 1 (f2, 0.508 MMAC) starts, from candidate 0",
        "candidate 1 (f2): epoch 1 of 1, validation accuracy 50.0 %; 1:30 left",
        "candidate 1 (f2) fp32 80.00 %, quint8 75.00 % (validation); took 0:10",
        "candidate 2 (f4, 0.397 MMAC) starts, from candidate 0",
        "candidate 2 (f4) pruned: behind the others after epoch 1 of 8 (25.0 %); took 0:10",
        "final training 3 (f2, 0.508 MMAC) starts, from candidate 1",
        "final training 3 (f2): epoch 1 of 8, validation accuracy 50.0 %; 1:00 left",
        "final training 3 (f2) fp32 90.00 %, quint8 85.00 % (validation); took 1:20",
    ]


def test_the_regular_network_as_a_candidate_takes_more_epochs_than_others(time: list[float]) -> None:
    shown, out = begun(trials=3, setup=WARM)
    shown.show(started(0, REGULAR))
    time[0] += 10
    shown.show(Progressed(0, ENDED))
    assert last(out).endswith("; 2:10 left"), "one of 4 + 2 + 8 epochs in ten seconds"


def test_the_time_left_counts_what_is_measured_between_trainings(time: list[float]) -> None:
    """Probes, or other quantizations, after which the trainings before have still taken their time."""
    shown, out = begun(trials=2)
    shown.show(started(0, REGULAR))
    time[0] += 120
    shown.show(Progressed(0, replace(ENDED, epoch=4, done=1.0)))
    for done in (1, 2):
        time[0] += 10
        shown.show(ProbesProgressed(done, 2))
    assert out.getvalue().splitlines()[-1] == "probing the rates of all layers: 2 of 2, 0:00 left"
    assert shown.left() == "2:20 left", "another 4 epochs"


def test_of_a_long_study_a_time_is_guessed_after_an_epoch(time: list[float]) -> None:
    shown, out = begun(trials=100)
    shown.part("seed1", later=600)
    shown.show(started(0, F2))
    time[0] += 10
    shown.show(Progressed(0, ENDED))
    assert last(out).endswith(f"; {(100 * 4 + 600 - 1) * 10 // 3600}:46:30 left")


def test_before_a_hundredth_is_done_no_time_is_guessed(time: list[float]) -> None:
    shown, out = begun()
    shown.show(started(0, F2))
    shown.show(Progressed(0, replace(ENDED, done=0.03)))
    assert last(out).endswith("; time left: measuring")


def test_reading_images_is_a_line_a_quarter(time: list[float]) -> None:
    shown, out = display()
    for done in range(100, 1100, 100):
        shown.advance("reading images", done, 1000)
        time[0] += 1
    assert out.getvalue().splitlines() == [
        "reading images: 100 of 1,000, 0:00 left",
        "reading images: 300 of 1,000, 0:05 left",
        "reading images: 500 of 1,000, 0:04 left",
        "reading images: 800 of 1,000, 0:02 left",
        "reading images: 1,000 of 1,000, 0:00 left",
    ]


def test_names_are_shown_as_they_are_and_lines_are_not_broken() -> None:
    """Brackets are markup to Rich."""
    shown, out = display()
    name = "[/b][red]" + "-long" * 40
    shown.status(name)
    shown.begin(RunFolder(Path(f"runs/{name}")), COLD, 1, 0)
    assert out.getvalue().splitlines() == [
        f"{name} ...",
        f"study {Path(name).name} in runs/{name}: up to 1 candidate; {CPU}",
    ]


def test_a_terminal_shows_a_live_table(time: list[float]) -> None:
    shown, out = display(terminal=True)
    with shown:
        shown.status("reading digits")
        shown.advance("reading images", 256, 1000)
        shown.begin(RunFolder(Path("runs/one")), COLD, 4, 1)
        shown.show(started(1, F2))
        shown.show(started(2, F4))
        time[0] += 30
        shown.show(Progressed(1, ENDED))
        shown.show(Finished(trained(TINY, F2, 1, 0.9, 0.8), 40))
    seen = out.getvalue()
    for words in (
        "reading digits ...",
        "candidate 1 (f2, 0.508 MMAC) starts",
        "candidate 1 (f2) fp32 90.00 %, quint8 80.00 % (validation); took 0:40",
        "candidate 2 (f4)",
        "worker starting",
        "2 of 4 candidates trained",
    ):
        assert words in seen, words
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") == 1, "the cursor is hidden, and shown again"


def test_the_table_of_candidates() -> None:
    constraints = Constraints(conv_macs=507_904, min_quint8=0.7)
    evaluations = (
        refused(TINY, regular(TINY), 0, "811,008 conv MACs exceed the budget of 507,904"),
        replace(trained(TINY, F2, 1, 0.9, 0.81), audit=Audit(360, 3600, 2, 1)),
        trained(TINY, F4, 2, 0.8, 0.6),
        replace(trained(TINY, make_plan(TINY, {"conv_8": 8, "conv_16_1": 8}), 3, 0.8, 0.8), fp32_accuracy=0.0),
        failed(TINY, depthwise(TINY), 4, "no [luck]"),
        replace(trained(TINY, regular(TINY), 5, 0.9, 0.875), role="reference"),
        pruned(TINY, make_plan(TINY, {"conv_8": 2}), 6),
        replace(trained(TINY, F2, 7, 0.96, 0.84), role="final", parent=1),
        replace(trained(TINY, F4, 8, 0.8, 0.6), role="final", parent=2),
    )
    out = io.StringIO()
    Console(file=out, width=180).print(candidates_table(outcome(TINY, constraints, evaluations)))
    title, *lines = out.getvalue().splitlines()
    assert title.strip() == "candidates (accuracies on the validation split)"
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines if line[0] in "│┃"]
    plans = [REGULAR, F2, F4, None, depthwise(TINY), REGULAR, None, F2, F4]
    for row, plan in zip(rows[1:], plans, strict=True):
        params = row.pop(3)
        assert plan is None or params == f"{plan_cost(TINY, plan).params:,}"
    assert rows == [
        ["#", "plan", "conv MMAC", "parameters", "fp32 %", "quint8 %", "drop %", "QMSE", "QCE", "audit", "state"],
        ["0", "regular", "0.811", *[""] * 6, "refused: 811,008 conv MACs exceed the budget of 507,904"],
        ["1", "f2", "0.508", "90.00", "81.00", "10.00", "4.4000", "0.8500", "2 of 3,600", "complete"],
        ["2", "f4", "0.397", "80.00", "60.00", "25.00", "10.4000", "1.4500", "", "infeasible: min_quint8"],
        ["3", "8-8-1", "0.455", "0.00", "80.00", "", "0.4000", "0.4500", "", "complete"],
        ["4", "dws", "0.324", *[""] * 6, "failed: no [luck]"],
        [
            "5",
            "regular",
            "0.811",
            "90.00",
            "87.50",
            "2.78",
            "1.5111",
            "0.5611",
            "",
            "reference: others start from it",
        ],
        ["6", "2-1-1", "0.623", *[""] * 6, "pruned: behind the others after epoch 1 of 8 (25.0 %)"],
        ["7", "f2", "0.508", "96.00", "84.00", "12.50", "5.4000", "0.9500", "", "candidate 1 trained on"],
        [
            "8",
            "f4",
            "0.397",
            "80.00",
            "60.00",
            "25.00",
            "10.4000",
            "1.4500",
            "",
            "candidate 2 trained on, infeasible: min_quint8",
        ],
    ]


def by_class(one: Evaluation, *classes: tuple[int, int, int, int, int]) -> Evaluation:
    return replace(one, classes=tuple(ClassResult(*numbers, str(name)) for name, numbers in enumerate(classes)))


UNEVEN = by_class(trained(TINY, F2, 1, 0.9, 0.82), (90, 88, 81, 90, 99), (10, 2, 1, 10, 1))
"""Balanced accuracies of (88 / 90 + 2 / 10) / 2 and (0.9 + 0.1) / 2."""
EVEN = by_class(trained(TINY, F2, 1, 0.9, 0.82), (50, 45, 41, 50, 50), (50, 45, 41, 50, 50))
BALANCED = Constraints(metric="balanced-accuracy")


@pytest.mark.parametrize(
    ("one", "limits", "shown"),
    [(UNEVEN, Constraints(), "50.00"), (EVEN, Constraints(), None), (EVEN, BALANCED, "82.00")],
    ids=["uneven classes", "even classes", "even classes, but it counts"],
)
def test_balanced_accuracy_is_in_the_table_where_it_says_more(
    one: Evaluation, limits: Constraints, shown: str | None
) -> None:
    out = io.StringIO()
    Console(file=out, width=180).print(candidates_table(outcome(TINY, limits, (one,))))
    lines = [line for line in out.getvalue().splitlines() if line[0] in "│┃"]
    head, row = ([cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines)
    assert ("balanced %" in head) == (shown is not None)
    if shown is not None:
        assert row[head.index("quint8 %") :][:2] == ["82.00", shown]


def test_a_network_that_answers_always_the_same_is_said_to() -> None:
    said = "fp32 and quint8 predict class '0' for every image"
    one = by_class(trained(TINY, F2, 1, 0.9, 0.9), (90, 90, 90, 100, 100), (10, 0, 0, 0, 0))
    final = replace(by_class(trained(TINY, F2, 3, 0.9, 0.9), (90, 80, 90, 80, 100), (10, 0, 0, 20, 0)), role="final")
    out = io.StringIO()
    Console(file=out, width=200).print(candidates_table(outcome(TINY, Constraints(), (one, replace(final, parent=1)))))
    assert f"complete; {said}" in out.getvalue()
    assert "candidate 1 trained on; quint8 predicts class '0' for every image" in out.getvalue()
    shown, lines = begun(trials=2)
    shown.show(started(1, F2))
    shown.show(Finished(one, 40))
    assert last(lines) == f"candidate 1 (f2) fp32 90.00 %, quint8 90.00 % (validation); {said}; took 0:40"


def test_a_search_for_balanced_accuracy_shows_that() -> None:
    shown, out = begun(setup=replace(COLD, metric="balanced-accuracy"))
    shown.show(started(1, F2))
    shown.show(Progressed(1, ENDED))
    assert "epoch 1 of 4, validation balanced accuracy 50.0 %; " in last(out)
    shown.show(Finished(UNEVEN, 40))
    fp32 = f"{100 * (88 / 90 + 2 / 10) / 2:.2f}"
    assert last(out) == f"candidate 1 (f2) balanced accuracy fp32 {fp32} %, quint8 50.00 % (validation); took 0:40"


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (60, ["#", "plan", "conv MMAC", "quint8 %", "state"]),
        (80, ["#", "plan", "conv MMAC", "fp32 %", "quint8 %", "drop %", "state"]),
        (100, ["#", "plan", "conv MMAC", "parameters", "fp32 %", "quint8 %", "drop %", "state"]),
        (120, ["#", "plan", "conv MMAC", "parameters", "fp32 %", "quint8 %", "drop %", "QMSE", "audit", "state"]),
    ],
)
def test_the_table_is_as_wide_as_the_terminal(width: int, columns: list[str]) -> None:
    """The least important columns are left out; what is there has its width."""
    space = load_space("factorizenet")
    plan = make_plan(space, dict(zip(legal_rates(space), (16, 4, 2, 128, 16, 2, 4, 256), strict=True)))
    evaluations = (
        refused(space, regular(space), 0, "266,010,624 conv MACs exceed the budget of 120,000,000"),
        replace(trained(space, plan, 1, 0.9826, 0.9512), audit=Audit(287, 2870, 0, 0)),
        failed(space, depthwise(space), 12, "its worker died 5 times, lastly with exit code 1"),
    )
    out = io.StringIO()
    Console(file=out, width=width).print(candidates_table(outcome(space, Constraints(), evaluations)))
    _title, *lines = out.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    heads, *rows = ([cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines if line[0] in "│┃")
    assert heads == columns
    whole = ["".join(cells) for cells in zip(*rows, strict=True)]
    assert whole[:2] == ["0112", "regular16-4-2-128-16-2-4-256dws"]
    assert "refused:266,010,624" in whole[-1].replace(" ", "")
    assert "95.12" in whole[columns.index("quint8 %")]
    assert "…" not in out.getvalue()


@pytest.mark.parametrize(("width", "bars"), [(60, [False] * 3), (80, [False] * 2), (100, [False, True])])
def test_a_narrow_terminal_has_no_bars(width: int, bars: list[bool]) -> None:
    """A line each, where it fits; the first has nothing of a bar yet."""
    shown, _ = begun(trials=2)
    out = io.StringIO()
    shown.console = Console(file=out, width=width)
    shown.show(started(1, F2))
    shown.show(started(2, make_plan(TINY, {"conv_8": 8, "conv_16_1": 16})))
    shown.show(Progressed(2, replace(ENDED, done=0.5)))
    out.truncate(0)
    shown.console.print(shown._table())
    *rows, overall = out.getvalue().strip("\0").splitlines()
    assert "candidates trained" in overall
    assert ["━" in row for row in rows] == bars
    assert rows[0].strip() == "candidate 1 (f2): worker starting"
    assert " ".join("".join(rows[1:]).split()).startswith("candidate 2 (8-16-1): epoch 1 of 4, validation accuracy")


def test_the_table_of_nothing() -> None:
    out = io.StringIO()
    Console(file=out, width=160).print(candidates_table(outcome(TINY, Constraints(), ())))
    assert "candidates" in out.getvalue()
