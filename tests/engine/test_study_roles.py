"""What the record of a study makes of references, parents, final trainings and probes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fnet_policies import Random
from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import FactorizationPlan, legal_rates, make_plan, uniform
from fnet_search.base.errors import FnetError
from fnet_search.candidates.job import Job, Start
from fnet_search.engine.study_record import StudyRecord
from fnet_search.optuna_bridge.storage import open_journal
from fnet_search.policy.conformance import made_up_probes as probes
from fnet_search.rundir.run_folder import KEPT, RunFolder
from fnet_search.training.recipe import Fidelity
from tests.support.evaluations import failed, pruned, trained
from tests.support.records import (
    DWS,
    F2,
    F4,
    LIMITS,
    REGULAR,
    STORAGES,
    TINY,
    WARM,
    Opened,
    begin,
    end,
    finish,
    having_weights,
    start,
    trained_with,
    trials,
)

# Children and parents


def test_a_candidate_starts_from_the_least_factorized_network_that_divides_it(opened: Opened) -> None:
    record = opened(WARM)
    reference = start(record, REGULAR, "reference")
    assert (reference.number, reference.role, reference.start) == (0, "reference", None)
    end(record, reference, trained(TINY, REGULAR, 0, 0.9, 0.8))
    job = start(record, F2, "candidate")
    folder = record.run.candidate(0)
    assert job == Job(1, F2, record.run.candidate(1), "candidate", Start(0, REGULAR, folder, 3))
    end(record, job, trained(TINY, F2, 1, 0.95, 0.85))
    job = start(record, F4)
    assert job.start == Start(0, REGULAR, folder, 3), "f2, which divides f4 too, is more accurate"
    evaluation = replace(trained(TINY, F4, 2, 0.92, 0.8), zero_shot_accuracy=0.75)
    end(record, job, evaluation)
    attributes = [trial.user_attrs for trial in trials(record)]
    names = ("role", "start", "planned_epochs", "parent", "inherited_epochs", "zero_shot_accuracy")
    assert [tuple(found.get(name) for name in names) for found in attributes] == [
        ("reference", "scratch", 8, None, None, None),
        ("candidate", "warm", 2, 0, 3, None),
        ("candidate", "warm", 2, 0, 3, 0.75),
    ]
    again = opened(WARM)
    assert [(one.role, one.parent, one.inherited_epochs) for one in again.evaluations] == [
        *(("reference", None, 0), ("candidate", 0, 3), ("candidate", 0, 3))
    ]
    table = pd.read_csv(record.run.path / "candidates.csv", keep_default_na=False, dtype=str)
    columns = ["role", "parent", "inherited_epochs", "zero_shot_accuracy"]
    assert table[columns].to_numpy().tolist() == [
        *(["reference", "", "0", ""], ["candidate", "0", "3", ""], ["candidate", "0", "3", "0.75"])
    ]
    assert again.again(again.evaluations[2]) == job
    assert again.again(again.evaluations[0]) == reference


def test_without_warm_start_all_start_from_scratch(opened: Opened) -> None:
    record = opened()
    finish(record, REGULAR, 0.9, 0.8)
    assert start(record, F2).start is None
    assert trials(record)[1].user_attrs["start"] == "scratch"
    assert "parent" not in trials(record)[1].user_attrs


def test_a_parent_is_one_whose_weights_are_kept(opened: Opened) -> None:
    """Those that fell out of the best few have none; what failed, was stopped or ended a search is none either."""
    record = opened(WARM)
    first = finish(record, make_plan(TINY, {"conv_8": 2}), 0.99, 0.70)
    job = start(record, F4)
    assert job.start == Start(0, first.plan, record.run.candidate(0), 3)
    record.finish(failed(TINY, F4, job.number, "no luck"), 1.0)
    for number in range(KEPT):
        finish(record, make_plan(TINY, {"conv_16_1": 2 << number}), 0.9, 0.81 + 0.01 * number)
    assert having_weights(record) == [2, 3, 4]
    job = start(record, F4)
    assert job.start is not None
    assert job.start.number == 2, "of those that divide f4, equally good, the one with the most MACs"
    end(record, job, failed(TINY, F4, job.number))
    job = start(record, uniform(TINY, 8), "candidate")
    end(record, job, pruned(TINY, job.plan, job.number))
    final = finish(record, make_plan(TINY, {"conv_16_1": 8}), 1.0, 0.99, "final")
    assert final.number in having_weights(record)
    job = start(record, DWS, "candidate")
    assert job.start is not None
    assert job.start.number in (2, 3, 4)


def test_the_weights_of_parents_are_kept(opened: Opened) -> None:
    record = opened(WARM)
    parent = finish(record, make_plan(TINY, {"conv_8": 2}), 0.99, 0.70)
    child = start(record, F2, "candidate")
    assert child.start is not None
    assert child.start.number == parent.number
    for number in range(KEPT):
        finish(record, make_plan(TINY, {"conv_16_1": 2 << number}), 0.9, 0.81 + 0.01 * number)
    assert having_weights(record) == [0, 2, 3, 4], "no longer of the best, but in use"
    end(record, child, trained(TINY, F2, child.number, 0.9, 0.5))
    assert having_weights(record) == [0, 2, 3, 4], "others may start from it too"


def test_the_reference_keeps_its_weights_and_never_wins(opened: Opened) -> None:
    record = opened(WARM)
    finish(record, REGULAR, 0.99, 0.99, "reference")
    assert record.winner is None
    assert record.to_finish() is None
    for number in range(KEPT + 1):
        finish(record, make_plan(TINY, {"conv_8": 8, "conv_16_1": 2 << number}), 0.9, 0.61 + 0.01 * number)
    assert having_weights(record) == [0, 2, 3, 4]
    assert record.winner == record.evaluations[4]
    assert [one.role for one in record.history().evaluations] == ["reference", *["candidate"] * 4]


# The final training


def test_the_best_candidate_is_trained_on_and_both_compete(opened: Opened) -> None:
    record = opened(WARM)
    finish(record, REGULAR, 0.9, 0.8, "reference")
    finish(record, F4, 0.8, 0.7)
    best = finish(record, DWS, 0.85, 0.77)
    assert record.to_finish() == best
    before = record.history()
    assert before.number == 3
    job = start(record, DWS, "final")
    assert job == Job(3, DWS, record.run.candidate(3), "final", Start(2, DWS, record.run.candidate(2), 6))
    assert record.history().number == 3, "a final training takes no number of a suggestion"
    assert trials(record)[3].user_attrs["planned_epochs"] == 8
    evaluation = replace(trained(TINY, DWS, 3, 0.9, 0.88), epochs=8)
    final = end(record, job, evaluation)
    assert (final.role, final.parent, final.inherited_epochs) == ("final", 2, 6)
    assert record.winner == final
    assert record.to_finish() is None
    assert record.history() == before
    again = opened(WARM)
    assert (again.history(), again.to_finish(), again.winner) == (before, None, final)
    assert having_weights(again) == [0, 1, 2, 3]
    finish(again, F2, 0.96, 0.95)
    assert [one.number for one in again.history().evaluations] == [0, 1, 2, 4]
    assert again.history().number == 4


def test_a_final_training_that_made_it_worse_does_not_win(opened: Opened) -> None:
    record = opened(WARM)
    best = finish(record, F4, 0.8, 0.75)
    finish(record, F4, 0.9, 0.62, "final")
    assert record.winner == best


@pytest.mark.parametrize(
    ("epochs", "final_epochs", "warm", "wanted"),
    [
        (8, 8, False, False),
        (8, 7, False, False),
        (8, 9, False, True),
        (2, 8, False, True),
        (8, 8, True, True),
        (8, 0, True, False),
        (8, 0, False, False),
    ],
)
def test_whether_the_best_is_trained_on(
    opened: Opened, epochs: int, final_epochs: int, warm: bool, wanted: bool
) -> None:
    """Not if it has had as much from scratch."""
    record = opened(trained_with(Fidelity(warm_start=True, final_epochs=final_epochs)))
    if warm:
        finish(record, REGULAR, 0.9, 0.8, "reference")
    job = start(record, F4)
    end(record, job, replace(trained(TINY, F4, job.number, 0.9, 0.8), epochs=epochs))
    assert (record.to_finish() is not None) == wanted


@pytest.mark.parametrize(
    ("final", "again"),
    [
        ({"epochs": 8}, False),
        ({"epochs": 9}, False),
        ({"epochs": 7}, True),
        ({"epochs": 8, "parent": 0}, True),
        ({"epochs": 0, "state": "failed", "quint8_accuracy": None}, False),
    ],
)
def test_when_it_is_trained_on_again(opened: Opened, final: dict[str, Any], again: bool) -> None:
    """Where more epochs are wanted than it had, or another is the best now; not after a failure."""
    record = opened(WARM)
    finish(record, REGULAR, 0.9, 0.8, "reference")
    best = finish(record, F4, 0.9, 0.8)
    number = begin(record, F4, "final")
    record.finish(replace(trained(TINY, F4, number, 0.9, 0.7), **{"role": "final", "parent": 1, **final}), 1.0)
    assert record.to_finish() == (best if again else None)
    assert opened(WARM).to_finish() == (best if again else None)


def test_a_final_training_that_was_cut_off_is_done_again(opened: Opened) -> None:
    record = opened(WARM)
    finish(record, REGULAR, 0.9, 0.8, "reference")
    best = finish(record, F4, 0.9, 0.8)
    job = start(record, F4, "final")
    again = opened(WARM)
    assert again.to_finish() == best
    assert start(again, F4, "final") == job


def test_random_suggests_the_same_after_a_final_training(opened: Opened, tmp_path: Path) -> None:
    record, policy = opened(WARM), Random()
    whole = StudyRecord(
        open_journal(tmp_path / "journal.log"), RunFolder(tmp_path), TINY, LIMITS, 3, "validation", WARM
    )
    suggested: list[list[FactorizationPlan]] = [[], []]
    for number in range(6):
        for one, plans in zip((record, whole), suggested, strict=True):
            plan = policy.suggest(one.history())
            assert plan is not None
            plans.append(plan)
            finish(one, plan, 0.8, 0.6 + 0.01 * number)
        if number in (2, 4):
            best = record.to_finish()
            assert best is not None
            finish(record, best.plan, 0.99, 0.98, "final")
            record = opened(WARM)
    assert suggested[0] == suggested[1]
    assert [(one.plan, one.parent) for one in whole.evaluations if one.parent is None] == [
        (one.plan, one.parent) for one in record.evaluations if one.parent is None
    ]
    assert [one.number for one in record.evaluations if one.role == "final"] == [3, 6]


# Probes


@STORAGES
def test_probes_are_recorded_layer_by_layer_and_found_again(opened: Opened) -> None:
    record = opened(WARM)
    reference = finish(record, REGULAR, 0.9, 0.85, "reference")
    measured = replace(probes(TINY), number=reference.number)
    tasks = record.to_probe(fisher=True)
    assert [task.layer for task in tasks] == list(legal_rates(TINY))
    assert all(task.fisher for task in tasks)
    start = Start(0, REGULAR, record.run.candidate(0), reference.epochs)
    assert {task.start for task in tasks} == {start}
    by_layer = {layer: tuple(one for one in measured.changes if one.layer == layer) for layer in legal_rates(TINY)}
    by_layer[tasks[-1].layer] = (measured.unchanged, *by_layer[tasks[-1].layer])
    for done, task in enumerate(tasks):
        assert record.probes is record.history().probes is None
        record.probed(task, by_layer[task.layer])
        record = opened(WARM)
        assert record.to_probe(fisher=False) == [replace(one, fisher=False) for one in tasks[done + 1 :]]
    assert record.probes == record.history().probes == measured
    table = pd.read_csv(record.run.path / "probes.csv")
    assert len(table) == 1 + len(measured.changes)
    assert table["conv_macs_saved"].tolist()[1:] == [
        plan_cost(TINY, REGULAR).conv_macs - one.conv_macs for one in measured.changes
    ]
    assert table["quint8_loss"].tolist()[1:] == [one.quint8_loss for one in measured.changes]
    lowest = [min(part.folded_precision for part in one.layers) for one in measured.changes]
    assert table["folded_precision"].tolist()[1:] == lowest


def test_without_a_trained_network_there_is_nothing_to_probe(opened: Opened) -> None:
    record = opened(WARM)
    with pytest.raises(FnetError, match=r"^there is no trained network to probe \(none was trained\)$"):
        record.to_probe(fisher=False)
    number = begin(record, REGULAR, "reference")
    record.finish(replace(failed(TINY, REGULAR, number, "loss is NaN"), role="reference"), 2.0)
    with pytest.raises(FnetError, match=r"no trained network to probe \(candidate 0: loss is NaN\)"):
        record.to_probe(fisher=False)
