import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta
from optuna.distributions import IntDistribution
from optuna.trial import TrialState, create_trial

from fnet_search.arch.plan import indices, make_plan
from fnet_search.engine.study_record import StudyRecord
from fnet_search.optuna_bridge.storage import open_journal
from fnet_search.optuna_bridge.trials import EVALUATION, index_distributions, index_parameters, suggestion_attributes
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Audit
from fnet_search.policy.metric import ClassResult
from fnet_search.quant.scheme import CHOICE
from fnet_search.rundir.run_folder import RunFolder
from fnet_search.training.train import TrainingProgress
from tests.support.evaluations import failed, trained
from tests.support.records import (
    DWS,
    F2,
    F4,
    LIMITS,
    PLAIN,
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
    trials,
)


@STORAGES
def test_a_search_is_recorded_and_found_again(opened: Opened) -> None:
    record = opened()
    assert record.history().number == 0
    assert record.winner is None
    refused = record.refuse(REGULAR, "too much")
    good = finish(record, F4, 0.9, 0.85)
    number = begin(record, DWS)
    record.finish(failed(TINY, DWS, number, "no luck"), 2.0)
    bad = finish(record, F2, 0.9, 0.5)
    assert (refused.number, good.number, number, bad.number) == (0, 1, 2, 3)
    assert refused.reason == "too much"
    history = record.history()
    assert history.evaluations == (refused, good, failed(TINY, DWS, 2, "no luck"), bad)
    assert (history.number, history.seed, history.running, history.constraints) == (4, 3, (), LIMITS)
    assert record.winner == good
    timings = record.run.path / "timings.csv"
    assert timings.read_text() == "number,seconds\n1,1.2\n2,2.0\n3,1.2\n"
    timings.unlink()
    again = opened()
    assert again.history() == history
    assert again.winner == good
    assert [trial.state for trial in trials(again)] == [
        *(TrialState.PRUNED, TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE)
    ]
    table = pd.read_csv(again.run.path / "candidates.csv")
    assert table["state"].tolist() == ["refused", "complete", "failed", "complete"]
    assert timings.read_text() == "number,seconds\n1,1.2\n2,2.0\n3,1.2\n"


def test_a_study_of_given_plans_has_no_winner(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    record = StudyRecord(open_journal(run.journal), run, TINY, Constraints(), 0, "test", PLAIN, searching=False)
    finish(record, F4, 0.9, 0.85)
    assert len(record.evaluations) == 1
    assert record.winner is None


def test_what_a_person_sorts_by_is_an_attribute_of_the_trial(opened: Opened) -> None:
    record = opened()
    record.refuse(REGULAR, "too much")
    evaluation = finish(record, F4, 0.9, 0.75)
    first, second = trials(record)
    assert second.value == 0.75
    assert second.params == dict(F4.rates)
    assert second.distributions == {
        "conv_8": IntDistribution(1, 8, log=True),
        "conv_16_1": IntDistribution(1, 16, log=True),
        "conv_16_2": IntDistribution(1, 16, log=True),
    }
    shown = {
        **{"number": 1, "label": "f4", "plan": str(F4), "feasible": False, "train_seconds": 1.2},
        **{"role": "candidate", "start": "scratch", "planned_epochs": 8, "epochs": 3},
        **{"conv_macs": evaluation.cost.conv_macs, "total_macs": evaluation.cost.total_macs},
        **{"params": evaluation.cost.params, "fp32_accuracy": 0.9, "quint8_accuracy": 0.75},
        **{"qmse": evaluation.qmse, "qce": evaluation.qce, "kl": evaluation.kl},
        "relative_drop": pytest.approx(0.15 / 0.9),
        "violation_conv_macs": evaluation.cost.conv_macs / 500_000 - 1,
        "violation_min_quint8": -0.25,  # (0.6 - 0.75) / 0.6, exactly
        "violation_max_drop": pytest.approx((0.15 / 0.9 - 0.1) / 0.1),
    }
    assert {name: second.user_attrs[name] for name in shown} == shown
    assert second.constraints == {
        name.removeprefix("violation_"): second.user_attrs[name] for name in shown if name.startswith("violation_")
    }
    absent = {"parent", "zero_shot_accuracy", "inherited_epochs", "differing_codes"}
    assert not absent & second.user_attrs.keys()
    assert first.user_attrs["reason"] == "too much"
    assert first.user_attrs["feasible"] == 0
    assert first.constraints == {"conv_macs": pytest.approx(811_008 / 500_000 - 1)}


def test_the_value_of_a_trial_is_what_the_search_compares(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "study")
    run.path.mkdir()
    limits = Constraints(min_quint8=0.6, metric="balanced-accuracy")
    record = StudyRecord(open_journal(run.journal), run, TINY, limits, 3, "validation", PLAIN)
    job = start(record, F4)
    classes = (ClassResult(90, 90, 90, 95, 100, "cat"), ClassResult(10, 5, 0, 5, 0, "dog"))
    end(record, job, replace(trained(TINY, F4, job.number, 0.95, 0.9), classes=classes))
    (trial,) = trials(record)
    assert trial.value == trial.user_attrs["quint8_balanced_accuracy"] == (1 + 0) / 2
    assert trial.user_attrs["fp32_balanced_accuracy"] == (1 + 0.5) / 2
    assert trial.constraints == {"min_quint8": pytest.approx((0.6 - 0.5) / 0.6)}
    assert trial.user_attrs["reason"] == "quint8 predicts class 'cat' for every image"
    again = StudyRecord(open_journal(run.journal), run, TINY, limits, 3, "validation", PLAIN)
    assert again.evaluations[0].classes == classes


def test_running_candidates_are_part_of_the_history(opened: Opened) -> None:
    """Numbers are given once, also when a later candidate ends first."""
    record = opened()
    assert [begin(record, plan) for plan in (F4, DWS, F2)] == [0, 1, 2]
    record.finish(trained(TINY, DWS, 1, 0.9, 0.8), 1.0)
    history = record.history()
    assert (history.number, history.running) == (3, (F4, F2))
    assert history.seen == {F4, DWS, F2}
    assert [evaluation.number for evaluation in history.evaluations] == [1]


@STORAGES
def test_what_a_run_that_was_cut_off_was_at_is_taken_over(opened: Opened) -> None:
    """In new trials: Optuna's numbers have holes, ours do not."""
    record = opened()
    for plan in (F4, DWS, F2):
        begin(record, plan)
    ended = trained(TINY, DWS, 1, 0.9, 0.8)
    record.finish(ended, 1.0)
    record = opened()
    assert record.history().evaluations == (ended,)
    assert record.history().running == (F4, F2)
    assert record.history().number == 3
    again = []
    while (lost := record.lost()) is not None:
        again.append(start(record, lost.plan, "candidate", lost.number))
    assert [(job.number, job.plan) for job in again] == [(0, F4), (2, F2)]
    assert record.history().running == (F4, F2)
    assert [trial.state for trial in trials(record)] == [
        *(TrialState.FAIL, TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING, TrialState.RUNNING)
    ]
    assert [trial.user_attrs["number"] for trial in trials(record)] == [0, 1, 2, 0, 2]


def test_a_trial_that_was_cut_off_before_its_last_write_is_ended(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything was written but its state, and the files that follow."""
    record = opened()
    number = begin(record, F4)
    evaluation = trained(TINY, F4, number, 0.9, 0.8)

    def cut_off(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(record.study, "tell", cut_off)
        with pytest.raises(KeyboardInterrupt):
            record.finish(evaluation, 1.0)
    assert len(pd.read_csv(record.run.path / "candidates.csv")) == 0
    checkpoint = record.run.candidate(number) / "checkpoint.safetensors"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text("")
    record = opened()
    assert record.evaluations == (evaluation,)
    (trial,) = trials(record)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.8)
    assert pd.read_csv(record.run.path / "candidates.csv")["quint8_accuracy"].tolist() == [0.8]
    assert (record.run.path / "timings.csv").read_text() == "number,seconds\n0,1.0\n"
    assert not checkpoint.exists()


def test_validation_accuracies_are_reported_once_an_epoch(opened: Opened) -> None:
    record = opened()
    number = begin(record, F4)
    progress = TrainingProgress(1, 3, False, 0.1, 2.0, None, "validation")
    steps = ((1, False, None), (1, True, 0.5), (2, False, 0.5), (2, True, 0.625), (1, True, 0.4))
    with warnings.catch_warnings(action="error"):  # Optuna warns of a second one
        for epoch, ended, accuracy in steps:
            record.progress(number, replace(progress, epoch=epoch, ended=ended, accuracy=accuracy))
    (trial,) = trials(record)
    assert trial.intermediate_values == {1: 0.5, 2: 0.625}


def test_files_are_artifacts(opened: Opened, tmp_path: Path) -> None:
    record = opened()
    finish(record, F4, 0.9, 0.8)
    figure = tmp_path / "figure.png"
    for content in (b"one", b"two"):
        figure.write_bytes(content)
        opened().attach([figure])
    (meta,) = get_all_artifact_meta(record.study)
    assert meta.filename == "figure.png"
    store = FileSystemArtifactStore(record.run.artifacts)
    with store.open_reader(meta.artifact_id) as reader:
        assert reader.read() == b"two"
    (trial,) = trials(record)
    attached = get_all_artifact_meta(trial, storage=record.storage)
    assert sorted(meta.filename for meta in attached) == ["layers.csv", "plan.toml"]


def test_a_study_of_an_earlier_version_goes_on_with_indices(opened: Opened) -> None:
    record = opened()
    evaluation = trained(TINY, F4, 0, 0.9, 0.75)
    record.study.add_trial(
        create_trial(
            value=0.75,
            params=index_parameters(TINY, F4),
            distributions=index_distributions(TINY),
            user_attrs=suggestion_attributes(TINY, 0, F4),
            system_attrs={EVALUATION: evaluation.to_json()},
        )
    )
    again = opened()
    assert [one.plan for one in again.evaluations] == [F4]
    finish(again, F2, 0.9, 0.8)
    assert [trial.params for trial in trials(again)] == [index_parameters(TINY, F4), index_parameters(TINY, F2)]
    assert [one.plan for one in opened().evaluations] == [F4, F2]


def test_a_space_is_a_rate_index_a_layer() -> None:
    assert {layer: (one.low, one.high) for layer, one in index_distributions(TINY).items()} == {  # type: ignore[attr-defined]
        "conv_8": (0, 3),
        "conv_16_1": (0, 4),
        "conv_16_2": (0, 4),
    }
    assert indices(TINY, make_plan(TINY, {"conv_16_1": 16})) == (0, 4, 0)


# Schemes


def test_the_policy_sees_all_candidates_quantized_as_the_reference_is(opened: Opened) -> None:
    """The winner, and what is feasible, goes by the schemes that count: as the policy sees it, f4 drops too much."""
    record = opened(replace(WARM, schemes=CHOICE, referenced=True))
    reference = start(record, REGULAR, "reference")
    assert reference.common is None
    scheme = str(CHOICE[5])
    end(record, reference, replace(trained(TINY, REGULAR, 0, 0.9, 0.8), scheme=scheme))
    found = []
    for plan, own, common in ((F2, 0.85, 0.7), (F4, 0.84, 0.75)):
        job = start(record, plan)
        assert job.common == CHOICE[5]
        assert job.start is not None
        assert job.start.scheme == CHOICE[5], "whose codes it has"
        made = replace(trained(TINY, plan, job.number, 0.9, own), scheme=str(CHOICE[0]))
        seen = replace(made, scheme=scheme, quint8_accuracy=common, parent=0, inherited_epochs=3)
        found.append(end(record, job, replace(made, common=seen)))
    past = record.history().evaluations
    assert [one.quint8_accuracy for one in past] == [0.8, 0.7, 0.75]
    assert {one.scheme for one in past} == {scheme}
    assert record.winner == found[1]
    assert LIMITS.feasible(found[1])
    assert LIMITS.missed(past[2]) == ("max_drop",)
    frame = pd.read_csv(record.run.path / "candidates.csv")
    assert frame["scheme"].tolist() == [scheme, str(CHOICE[0]), str(CHOICE[0])]
    assert frame["common_scheme"].tolist() == [scheme] * 3
    assert frame["common_quint8_accuracy"].tolist() == [0.8, 0.7, 0.75]
    record.close()
    again = opened(replace(WARM, schemes=CHOICE, referenced=True))
    assert again.history() == record.history(), "also when it is opened again"
    assert start(again, DWS).common == CHOICE[5]


def test_without_a_reference_the_policy_sees_one_scheme_too(opened: Opened) -> None:
    record = opened(replace(PLAIN, schemes=CHOICE))
    end(record, start(record, REGULAR), replace(trained(TINY, REGULAR, 0, 0.9, 0.8), scheme=str(CHOICE[5])))
    assert start(record, F2).common == CHOICE[0]
    assert start(opened(PLAIN), F4).common is None, "there is but one"


def test_candidates_csv_is_whole_after_every_step(opened: Opened) -> None:
    """And what a process that opens the study finds is what one that went on has written, byte for byte."""
    record = opened()
    path = record.run.path / "candidates.csv"
    steps: list[Callable[[], object]] = [
        lambda: record.refuse(REGULAR, "too, much"),
        lambda: finish(record, F4, 0.9, 0.85),
        lambda: finish(record, F2, 0.9, 0.5),
        lambda: record.audit(record.evaluations[1], Audit(10, 100, 3, 0)),
        lambda: finish(record, DWS, 0.9, 0.7),
    ]
    numbers = []
    for step in steps:
        step()
        text = path.read_bytes()
        numbers.append(pd.read_csv(path)["number"].tolist())
        assert StudyRecord(record.storage, record.run, TINY, LIMITS, 3, "validation").evaluations == record.evaluations
        assert path.read_bytes() == text
    assert numbers == [[0], [0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3]]
    assert pd.read_csv(path)["differing_codes"].tolist()[1] == 3


def test_weights_that_are_beaten_are_dropped_as_the_search_goes_on(opened: Opened) -> None:
    record, left = opened(), []
    for rate, accuracy in ((1, 0.6), (2, 0.8), (4, 0.7), (8, 0.9)):
        finish(record, make_plan(TINY, {"conv_8": rate, "conv_16_1": 16}), 0.95, accuracy)
        left.append(having_weights(record))
    assert left == [[0], [0, 1], [0, 1, 2], [1, 2, 3]]


def test_what_a_trial_ends_with_is_two_writes(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is synced to the disk: first all attributes, then the state."""
    record = StudyRecord(open_journal(journal), RunFolder(journal.parent), TINY, LIMITS, 0, "validation", PLAIN)
    job = start(record, F2, "candidate")
    syncs: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", syncs.append)
        record.finish(trained(TINY, F2, job.number, 0.9, 0.8), 1.0)
        assert len(syncs) == 2
        record.refuse(REGULAR, "too much")
        assert len(syncs) == 2 + 3
    assert StudyRecord(open_journal(journal), record.run, TINY, LIMITS, 0, "validation").history() == record.history()


def test_attributes_that_could_not_all_be_set_are_not_written(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = StudyRecord(open_journal(journal), RunFolder(journal.parent), TINY, LIMITS, 0, "validation", PLAIN)
    job = start(record, F2, "candidate")
    before = journal.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(record.run.__class__, "write_candidate", full)
        with pytest.raises(OSError, match="No space left"):
            record.finish(trained(TINY, F2, job.number, 0.9, 0.8), 1.0)
    assert journal.read_bytes() == before
    record.finish(trained(TINY, F2, job.number, 0.9, 0.8), 1.0)
    assert trials(record)[-1].state == TrialState.COMPLETE


def test_a_trial_is_there_with_all_that_is_known_of_it_or_not_at_all(journal: Path) -> None:
    """Its beginning is one line of the journal, and so one transaction of a data base."""
    record = StudyRecord(open_journal(journal), RunFolder(journal.parent), TINY, LIMITS, 0, "validation", PLAIN)
    before = journal.read_bytes()
    record.start(F2, "candidate")
    added = journal.read_bytes().removeprefix(before)
    assert added.count(b"\n") == 1
    trial = trials(record)[-1]
    assert trial.params == dict(F2.rates)
    assert (trial.state, trial.user_attrs["number"], trial.user_attrs["label"]) == (TrialState.RUNNING, 1, "f2")


@pytest.mark.parametrize("kept", [0, 1, 200, -1])
def test_a_journal_that_ends_anywhere_can_be_opened(journal: Path, kept: int) -> None:
    journal.write_bytes(journal.read_bytes()[:kept])
    record = StudyRecord(open_journal(journal), RunFolder(journal.parent), TINY, LIMITS, 0, "validation", PLAIN)
    assert finish(record, F2, 0.9, 0.8).plan == F2
