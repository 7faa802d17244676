import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
import pandas as pd
import pytest
from evaluations import failed, trained
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from fnet_search.errors import FnetError
from fnet_search.macro import load_space
from fnet_search.plan import FactorizationPlan, depthwise, indices, make_plan, regular, uniform
from fnet_search.policy import Constraints, Evaluation
from fnet_search.runfolder import RunFolder
from fnet_search.study import StudyRecord, distributions, has_study, open_journal, open_url
from fnet_search.train import TrainingProgress

TINY = load_space("tiny")
REGULAR, F2, F4, DWS = regular(TINY), uniform(TINY, 2), uniform(TINY, 4), depthwise(TINY)
LIMITS = Constraints(conv_macs=500_000, min_quint8=0.6, max_drop=0.1)


STORAGES = pytest.mark.parametrize("kind", ["journal", "sqlite"])


@pytest.fixture
def kind() -> str:
    """Where the study is recorded."""
    return "journal"


@pytest.fixture
def opened(kind: str, tmp_path: Path) -> Callable[[], StudyRecord]:
    """Opens the record of one run, as each process does that works on it."""
    run = RunFolder(tmp_path / "study")
    run.path.mkdir()

    def storage() -> BaseStorage:
        return open_journal(run.journal) if kind == "journal" else open_url(f"sqlite:///{tmp_path}/study.db")

    return lambda: StudyRecord(storage(), run, TINY, LIMITS, 3, "validation")


def finish(record: StudyRecord, plan: FactorizationPlan, fp32: float, quint8: float) -> Evaluation:
    number = record.start(plan)
    evaluation = trained(TINY, plan, number, fp32, quint8)
    record.finish(evaluation, 1.25)
    return evaluation


def trials(record: StudyRecord) -> list[FrozenTrial]:
    return record.study.get_trials()


@STORAGES
def test_a_search_is_recorded_and_found_again(opened: Callable[[], StudyRecord]) -> None:
    record = opened()
    assert record.history().number == 0
    assert record.winner is None
    refused = record.refuse(REGULAR, "too much")
    good = finish(record, F4, 0.9, 0.85)
    number = record.start(DWS)
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
    record = StudyRecord(open_journal(run.journal), run, TINY, Constraints(), 0, "test")
    finish(record, F4, 0.9, 0.85)
    assert len(record.evaluations) == 1
    assert record.winner is None


def test_what_a_person_sorts_by_is_an_attribute_of_the_trial(opened: Callable[[], StudyRecord]) -> None:
    record = opened()
    record.refuse(REGULAR, "too much")
    evaluation = finish(record, F4, 0.9, 0.75)
    first, second = trials(record)
    assert second.value == 0.75
    assert second.params == dict(zip(distributions(TINY), indices(TINY, F4), strict=True))
    shown = {
        **{"number": 1, "label": "f4", "plan": str(F4), "feasible": False, "train_seconds": 1.2},
        **{"conv_macs": evaluation.cost.conv_macs, "total_macs": evaluation.cost.total_macs},
        **{"params": evaluation.cost.params, "fp32_accuracy": 0.9, "quint8_accuracy": 0.75},
        **{"qmse": evaluation.qmse, "qce": evaluation.qce, "kl": evaluation.kl},
        "relative_drop": pytest.approx(0.15 / 0.9),
        "violation_conv_macs": evaluation.cost.conv_macs / 500_000 - 1,
        "violation_min_quint8": (0.6 - 0.75) / 0.6,
        "violation_max_drop": pytest.approx((0.15 / 0.9 - 0.1) / 0.1),
    }
    assert {name: second.user_attrs[name] for name in shown} == shown
    assert second.constraints == {
        name.removeprefix("violation_"): second.user_attrs[name] for name in shown if name.startswith("violation_")
    }
    assert first.user_attrs["reason"] == "too much"
    assert first.user_attrs["feasible"] is False
    assert first.constraints == {"conv_macs": pytest.approx(811_008 / 500_000 - 1)}


def test_running_candidates_are_part_of_the_history(opened: Callable[[], StudyRecord]) -> None:
    """Numbers are given once, also when a later candidate ends first."""
    record = opened()
    assert [record.start(plan) for plan in (F4, DWS, F2)] == [0, 1, 2]
    record.finish(trained(TINY, DWS, 1, 0.9, 0.8), 1.0)
    history = record.history()
    assert (history.number, history.running) == (3, (F4, F2))
    assert history.seen == {F4, DWS, F2}
    assert [evaluation.number for evaluation in history.evaluations] == [1]


@STORAGES
def test_the_numbers_of_a_run_that_was_cut_off_are_given_again(opened: Callable[[], StudyRecord]) -> None:
    """To new trials: Optuna's numbers have holes, ours do not."""
    record = opened()
    for plan in (F4, DWS, F2):
        record.start(plan)
    ended = trained(TINY, DWS, 1, 0.9, 0.8)
    record.finish(ended, 1.0)
    record = opened()
    assert record.history().evaluations == (ended,)
    assert record.history().running == ()
    assert [record.start(plan) for plan in (F4, F2)] == [0, 2]
    assert [trial.state for trial in trials(record)] == [
        *(TrialState.FAIL, TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING, TrialState.RUNNING)
    ]
    assert [trial.user_attrs["number"] for trial in trials(record)] == [0, 1, 2, 0, 2]


def test_a_trial_that_was_cut_off_before_its_last_write_is_ended(
    opened: Callable[[], StudyRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything was written but its state, and the files that follow."""
    record = opened()
    number = record.start(F4)
    evaluation = trained(TINY, F4, number, 0.9, 0.8)

    def cut_off(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(record.study, "tell", cut_off)
        with pytest.raises(KeyboardInterrupt):
            record.finish(evaluation, 1.0)
    assert len(pd.read_csv(record.run.path / "candidates.csv")) == 0
    checkpoint = record.folder(number) / "checkpoint.safetensors"
    checkpoint.parent.mkdir(exist_ok=True)
    checkpoint.write_text("")
    record = opened()
    assert record.evaluations == (evaluation,)
    (trial,) = trials(record)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.8)
    assert pd.read_csv(record.run.path / "candidates.csv")["quint8_accuracy"].tolist() == [0.8]
    assert (record.run.path / "timings.csv").read_text() == "number,seconds\n0,1.0\n"
    assert not checkpoint.exists()


def test_validation_accuracies_are_reported_once_an_epoch(opened: Callable[[], StudyRecord]) -> None:
    record = opened()
    number = record.start(F4)
    progress = TrainingProgress(1, 3, False, 0.1, 2.0, None, "validation")
    steps = ((1, False, None), (1, True, 0.5), (2, False, 0.5), (2, True, 0.625), (1, True, 0.4))
    with warnings.catch_warnings(action="error"):  # Optuna warns of a second one
        for epoch, ended, accuracy in steps:
            record.progress(number, replace(progress, epoch=epoch, ended=ended, accuracy=accuracy))
    (trial,) = trials(record)
    assert trial.intermediate_values == {1: 0.5, 2: 0.625}


def test_files_are_artifacts(opened: Callable[[], StudyRecord], tmp_path: Path) -> None:
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


def test_a_space_is_a_rate_index_a_layer() -> None:
    assert {layer: (one.low, one.high) for layer, one in distributions(TINY).items()} == {  # type: ignore[attr-defined]
        "conv_8": (0, 3),
        "conv_16_1": (0, 4),
        "conv_16_2": (0, 4),
    }
    assert indices(TINY, make_plan(TINY, {"conv_16_1": 16})) == (0, 4, 0)


# Journals of processes that were killed


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """The journal of a run with one candidate."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    finish(StudyRecord(open_journal(run.journal), run, TINY, LIMITS, 0, "validation"), F4, 0.9, 0.8)
    return run.journal


@pytest.mark.parametrize("torn", [b'{"op_code":', b"{", b"\0\0\0"])
def test_a_torn_last_line_is_cut_off(journal: Path, torn: bytes) -> None:
    whole = journal.read_bytes()
    journal.write_bytes(whole + torn)
    storage = open_journal(journal)
    assert journal.read_bytes() == whole
    record = StudyRecord(storage, RunFolder(journal.parent), TINY, LIMITS, 0, "validation")
    finish(record, F2, 0.9, 0.8)
    assert len(open_journal(journal).get_all_trials(0)) == 2


@pytest.mark.parametrize("kept", [0, 1, 200, -1])
def test_a_journal_that_ends_anywhere_can_be_opened(journal: Path, kept: int) -> None:
    journal.write_bytes(journal.read_bytes()[:kept])
    record = StudyRecord(open_journal(journal), RunFolder(journal.parent), TINY, LIMITS, 0, "validation")
    assert finish(record, F2, 0.9, 0.8).plan == F2


def test_the_lock_of_a_killed_process_is_dropped(journal: Path) -> None:
    lock = journal.with_name("journal.log.lock")
    lock.symlink_to(journal)
    assert has_study(open_journal(journal), "run")
    assert not lock.is_symlink()


@pytest.mark.parametrize("garbage", [b"hello\nworld\n", b"{}\n", b"[1]\n", b'{"op_code": 99, "worker_id": "x"}\n'])
def test_a_journal_of_something_else_is_refused(journal: Path, garbage: bytes) -> None:
    journal.write_bytes(garbage)
    with pytest.raises(FnetError, match=f"^cannot read journal {journal}: "):
        open_journal(journal)


@pytest.mark.parametrize(
    "url", ["", "garbage", "sqlite:////no/such/folder/s.db", "nothing://host/db", "mysql://me@host/db"]
)
def test_urls_that_cannot_be_opened(url: str) -> None:
    with pytest.raises(
        FnetError, match=r"^cannot open storage \(.+\); an Optuna URL is wanted, as in sqlite:///"
    ) as bad:
        open_url(url)
    assert "\n" not in str(bad.value)


def test_studies_are_known_by_name(tmp_path: Path) -> None:
    storage = open_url(f"sqlite:///{tmp_path}/study.db")
    assert not has_study(storage, "one")
    optuna.create_study(storage=storage, study_name="one")
    assert has_study(storage, "one")
    assert not has_study(storage, "two")
