import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta
from optuna.distributions import IntDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from fnet_policies import Random
from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import FactorizationPlan, depthwise, indices, legal_rates, make_plan, regular, uniform
from fnet_search.base.errors import FnetError
from fnet_search.candidates.job import Job, Setup, Start
from fnet_search.engine.study_record import StudyRecord
from fnet_search.importing.spaces import load_space
from fnet_search.optuna_bridge.storage import open_journal, open_url
from fnet_search.optuna_bridge.trials import distributions, parameters
from fnet_search.policy.conformance import made_up_probes as probes
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Audit, Evaluation, Role
from fnet_search.policy.metric import ClassResult
from fnet_search.quant.scheme import CHOICE, PAPER
from fnet_search.rundir.run_folder import KEPT, RunFolder
from fnet_search.training.numerics import Numerics
from fnet_search.training.recipe import Fidelity, load_recipe
from fnet_search.training.train import TrainingProgress
from tests.support.evaluations import failed, pruned, trained

TINY = load_space("tiny")
REGULAR, F2, F4, DWS = regular(TINY), uniform(TINY, 2), uniform(TINY, 4), depthwise(TINY)
LIMITS = Constraints(conv_macs=500_000, min_quint8=0.6, max_drop=0.1)


def trained_with(fidelity: Fidelity) -> Setup:
    recipe = load_recipe("quick").with_epochs(8)
    return Setup(TINY, recipe, (PAPER,), Numerics("cpu"), 3, "validation", fidelity=fidelity)


PLAIN = trained_with(Fidelity())
WARM = trained_with(Fidelity(warm_start=True, warm_epochs=2, prune=True, final_epochs=8))

STORAGES = pytest.mark.parametrize("kind", ["journal", "sqlite"])


Opened = Callable[..., StudyRecord]


@pytest.fixture
def kind() -> str:
    """Where the study is recorded."""
    return "journal"


@pytest.fixture
def opened(kind: str, tmp_path: Path) -> Opened:
    """Opens the record of one run, as each process does that works on it."""
    run = RunFolder(tmp_path / "study")
    run.path.mkdir()

    def storage() -> BaseStorage:
        return open_journal(run.journal) if kind == "journal" else open_url(f"sqlite:///{tmp_path}/study.db")

    return lambda setup=PLAIN: StudyRecord(storage(), run, TINY, LIMITS, 3, "validation", setup)


def start(record: StudyRecord, plan: FactorizationPlan, role: Role = "candidate", number: int | None = None) -> Job:
    job = record.start(plan, role, number)
    assert job is not None
    return job


def begin(record: StudyRecord, plan: FactorizationPlan, role: Role = "candidate") -> int:
    return start(record, plan, role).number


def finish(
    record: StudyRecord, plan: FactorizationPlan, fp32: float, quint8: float, role: Role = "candidate"
) -> Evaluation:
    """As a worker does, which leaves weights."""
    job = start(record, plan, role)
    return end(record, job, trained(TINY, plan, job.number, fp32, quint8))


def end(record: StudyRecord, job: Job, evaluation: Evaluation) -> Evaluation:
    start = job.start
    parent = {} if start is None else {"parent": start.number, "inherited_epochs": start.epochs}
    evaluation = replace(evaluation, role=job.role, **parent)
    if evaluation.state == "complete":
        job.folder.mkdir(parents=True, exist_ok=True)
        for name in ("weights", "quantized"):
            (job.folder / f"{name}.safetensors").write_text("")
    record.finish(evaluation, 1.25)
    return evaluation


def having_weights(record: StudyRecord) -> list[int]:
    return sorted(int(path.parent.name) for path in record.run.path.glob("candidates/*/weights.safetensors"))


def trials(record: StudyRecord) -> list[FrozenTrial]:
    return record.study.get_trials()


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
    record._ledger.indexed = True  # as that version wrote all
    finish(record, F4, 0.9, 0.75)
    again = opened()
    assert [one.plan for one in again.evaluations] == [F4]
    finish(again, F2, 0.9, 0.8)
    assert [trial.params for trial in trials(again)] == [parameters(TINY, F4), parameters(TINY, F2)]
    assert [one.plan for one in opened().evaluations] == [F4, F2]


def test_a_space_is_a_rate_index_a_layer() -> None:
    assert {layer: (one.low, one.high) for layer, one in distributions(TINY).items()} == {  # type: ignore[attr-defined]
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


@pytest.fixture
def plans() -> list[FactorizationPlan]:
    return [make_plan(TINY, {"conv_8": a, "conv_16_1": b}) for a in (2, 4, 8) for b in (2, 4, 8, 16)]


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


# Journals of processes that were killed


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """The journal of a run with one candidate."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    finish(StudyRecord(open_journal(run.journal), run, TINY, LIMITS, 0, "validation", PLAIN), F4, 0.9, 0.8)
    return run.journal


@pytest.mark.parametrize("kept", [0, 1, 200, -1])
def test_a_journal_that_ends_anywhere_can_be_opened(journal: Path, kept: int) -> None:
    journal.write_bytes(journal.read_bytes()[:kept])
    record = StudyRecord(open_journal(journal), RunFolder(journal.parent), TINY, LIMITS, 0, "validation", PLAIN)
    assert finish(record, F2, 0.9, 0.8).plan == F2
