"""Candidates that are stopped early."""

from dataclasses import replace

import pandas as pd
import pytest
from optuna.trial import TrialState

from fnet_search.arch.plan import FactorizationPlan
from fnet_search.engine.study_record import StudyRecord
from fnet_search.policy.evaluation import Evaluation, Role
from fnet_search.training.recipe import Fidelity
from fnet_search.training.train import TrainingProgress
from tests.support.evaluations import pruned, trained
from tests.support.records import REGULAR, STORAGES, TINY, WARM, Opened, end, finish, start, trained_with, trials

# Candidates that are stopped early


def watched(
    record: StudyRecord,
    plan: FactorizationPlan,
    accuracies: tuple[float, ...],
    role: Role = "candidate",
    number: int | None = None,
) -> Evaluation:
    """Trained for as many epochs as planned, unless the record says after one that it is to stop."""
    job = start(record, plan, role, number)
    epochs = WARM.recipe_of(job).epochs
    for epoch, accuracy in enumerate(accuracies[:epochs], 1):
        if record.progress(job.number, TrainingProgress(epoch, epochs, True, 0.5, 1.0, accuracy, "validation")):
            return end(record, job, pruned(TINY, plan, job.number, accuracies[:epoch]))
    evaluation = trained(TINY, plan, job.number, accuracies[-1], accuracies[-1])
    return end(record, job, replace(evaluation, epochs=epochs, accuracies=accuracies[:epochs]))


@STORAGES
def test_what_is_behind_is_stopped_and_recorded(opened: Opened, plans: list[FactorizationPlan]) -> None:
    record = opened(WARM)
    watched(record, REGULAR, (0.9,) * 8, "reference")
    for plan in plans[:4]:
        assert watched(record, plan, (0.7, 0.8)).state == "complete", "too few to compare with"
    assert watched(record, plans[4], (0.71, 0.6)).state == "complete"
    stopped = watched(record, plans[5], (0.65, 0.9))
    assert (stopped.number, stopped.state, stopped.epochs, stopped.accuracies) == (6, "pruned", 1, (0.65,))
    final = watched(record, plans[0], (0.1,) * 8, "final")
    assert (final.state, final.role) == ("complete", "final"), "a final training is not stopped"
    history = opened(WARM).history()
    assert history.evaluations[-1] == stopped
    trial = trials(record)[6]
    assert (trial.state, trial.value, trial.intermediate_values) == (TrialState.PRUNED, 0.65, {1: 0.65})
    assert trial.user_attrs["epochs"] == 1
    assert trial.user_attrs["reason"] == "behind the others after epoch 1 of 8 (65.0 %)"
    table = pd.read_csv(record.run.path / "candidates.csv")
    row = table[table["number"] == 6].iloc[0]
    assert (row["state"], row["epochs"], row["last_epoch_accuracy"], row["feasible"]) == ("pruned", 1, 0.65, False)
    assert list(table["state"] == "pruned") == [False] * 6 + [True, False]


@pytest.mark.parametrize("role", ["reference", "final"])
def test_only_candidates_are_stopped(opened: Opened, plans: list[FactorizationPlan], role: Role) -> None:
    """However many there are to compare with."""
    record = opened(WARM)
    finish(record, plans[0], 0.9, 0.8)
    for number in range(6):
        assert watched(record, plans[0], (0.9 - 0.1 * number,) * 8, role).state == "complete"


def test_from_scratch_and_from_a_parent_are_not_compared(opened: Opened, plans: list[FactorizationPlan]) -> None:
    """The reference, from scratch and better after eight epochs, stops none; nor do longer trainings."""
    record = opened(WARM)
    watched(record, REGULAR, (0.99,) * 8, "reference")
    for plan in plans[:5]:
        watched(record, plan, (0.5, 0.5))
    assert watched(record, plans[5], (0.5, 0.5)).state == "complete"
    assert watched(record, plans[6], (0.4, 0.5)).state == "pruned"


def test_nothing_is_stopped_without_pruning(opened: Opened, plans: list[FactorizationPlan]) -> None:
    record = opened(trained_with(Fidelity(warm_start=True, warm_epochs=2)))
    for number, plan in enumerate(plans[:8]):
        assert watched(record, plan, (0.9 - 0.1 * number,) * 8).state == "complete"


def test_a_candidate_that_was_cut_off_does_not_count_twice(opened: Opened, plans: list[FactorizationPlan]) -> None:
    """It is judged as it would have been."""
    record = opened(WARM)
    watched(record, REGULAR, (0.9,) * 8, "reference")
    for plan in plans[:4]:
        watched(record, plan, (0.7, 0.8))
    number = None
    for _ in range(3):
        job = start(record, plans[4], number=number)
        progress = TrainingProgress(1, 2, True, 0.5, 1.0, 0.8, "validation")
        assert not record.progress(job.number, progress)
        record = opened(WARM)
        lost = record.lost()
        assert lost is not None
        number = lost.number
    assert watched(record, plans[4], (0.8, 0.8), number=number).number == job.number
    assert watched(record, plans[5], (0.7, 0.8)).state == "complete", "one of four in 0.7 and one in 0.8"


def test_a_worker_that_takes_over_is_told_the_same(opened: Opened, plans: list[FactorizationPlan]) -> None:
    """It reports again what the checkpoint had reached."""
    record = opened(trained_with(Fidelity(prune=True)))
    for plan in plans[:4]:
        job = start(record, plan, "candidate")
        for epoch in range(1, 9):
            assert not record.progress(job.number, TrainingProgress(epoch, 8, True, 0.5, None, 0.5, "validation"))
        end(record, job, trained(TINY, plan, job.number, 0.5, 0.5))
    job = start(record, plans[4], "candidate")
    reports = [(1, 0.3), (2, 0.6), (1, 0.3), (2, 0.6), (3, 0.1), (4, 0.4), (1, 0.3), (4, 0.4)]
    told = [
        record.progress(job.number, TrainingProgress(epoch, 8, True, 0.5, None, accuracy, "validation"))
        for epoch, accuracy in reports
    ]
    assert told == [False, False, False, False, False, True, False, True]
    assert trials(record)[4].intermediate_values == {1: 0.3, 2: 0.6, 3: 0.1, 4: 0.4}


def test_the_last_epoch_is_not_stopped(opened: Opened, plans: list[FactorizationPlan]) -> None:
    record = opened(WARM)
    for plan in plans[:6]:
        assert watched(record, plan, (0.5, 0.9)).state == "complete"
    assert watched(record, plans[6], (0.5, 0.1)).state == "complete"
