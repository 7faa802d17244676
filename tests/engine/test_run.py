"""A search from its start to its end, cut off and going on."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import pandas as pd
import pytest
import torch

from fnet_search.arch.plan import parse_plan
from fnet_search.base.errors import FnetError
from fnet_search.candidates.measure import measure_split
from fnet_search.deploy.audit import compare_codes
from fnet_search.deploy.export import read_model
from fnet_search.deploy.runtime import Runtime
from fnet_search.engine.request import Machine
from fnet_search.policy.evaluation import Audit, Evaluation
from fnet_search.policy.fixed_plans import FixedPlans
from fnet_search.report.class_balance import read_confusion
from fnet_search.report.outcome import Outcome
from fnet_search.rundir.recorded_run import RecordedNetwork
from fnet_search.rundir.run_folder import RunFolder
from fnet_search.training.datasets import hold_out, load_dataset
from fnet_search.training.weights import read_tensors
from tests.support.command_line import files_in
from tests.support.runs import GIVEN, SEARCH, TINY, go, reported

pytestmark = pytest.mark.usefixtures("one_picture")


def test_the_winner_is_measured_on_the_test_split_as_the_network_that_was_evaluated(
    whole: tuple[Path, Outcome],
) -> None:
    folder, outcome = whole
    winner, test = outcome.winner, outcome.test
    assert winner is not None
    assert test is not None
    assert [one.number for one in outcome.evaluations] == [0, 1]
    assert winner.number == max(outcome.evaluations, key=lambda one: one.quint8_accuracy or 0).number
    assert outcome.feasible
    assert (winner.split, test.split, test.number, test.layers) == ("validation", "test", winner.number, ())
    data = hold_out(load_dataset("digits", TINY.input_shape))
    networks = RecordedNetwork(winner, folder / "best", folder / "best").load(outcome.space)
    assert measure_split(*networks, data, data.evaluation).complete(winner) == winner
    tested = measure_split(*networks, data, data.test)
    assert (tested.quint8_accuracy, tested.classes) == (test.quint8_accuracy, test.classes)
    assert read_confusion(folder / "best" / "confusion.csv", data.classes) == list(tested.confusion)
    assert Evaluation.from_json(json.loads((folder / "best" / "test.json").read_text())) == test
    model, facts = read_model(folder / "best" / "model.onnx")
    assert test.audit == Audit(len(data.test), 10 * len(data.test), 0, 0)
    assert sum(
        (compare_codes(networks[1](x), Runtime(model)(x)) for x in [data.normalise(data.test.images)]), Audit()
    ) == (test.audit)
    assert json.loads(facts["test_quint8_accuracy"]) == test.quint8_accuracy
    assert json.loads(facts["validation_fp32_accuracy"]) == winner.fp32_accuracy
    assert json.loads(facts["classes"]) == list("0123456789")
    own = Audit(len(data.evaluation), 10 * len(data.evaluation), 0, 0)
    assert [one.audit for one in outcome.evaluations if one.number == winner.number] == [own]
    for place in ("best", f"candidates/{winner.number:03d}"):
        assert Evaluation.from_json(json.loads((folder / place / "evaluation.json").read_text())).audit == own
    line = outcome.headline()
    assert line.startswith(f"winner: candidate {winner.number} (")
    assert line.endswith(f"; files in {folder / 'best'}")
    assert f"validation fp32 {100 * (winner.fp32_accuracy or 0):.2f} %" in line
    assert f"test fp32 {100 * (test.fp32_accuracy or 0):.2f} %" in line


def test_the_configuration_is_recorded_whole(whole: tuple[Path, Outcome]) -> None:
    config = json.loads((whole[0] / "config.json").read_text())
    assert config["numerics"] == {
        **{"device": "cpu", "dtype": "float32", "channels_last": True, "threads": 1},
        **{"fused": False, "group_widths": [1, 2, 4, 8, 16], "alone_threads": 1},
    }
    assert config["fidelity"] == {"warm_start": False, "warm_epochs": 1, "prune": False, "finetune": False}
    limits = {"conv_macs": 600_000, "params": None, "min_quint8": None, "max_drop": None}
    assert config["constraints"] == {**limits, "metric": "accuracy"}
    assert (config["seed"], config["split"], config["study"], config["storage"]) == (3, "validation", "whole", None)
    assert config["recipe"]["epochs"] == 1
    assert config["data"]["classes"] == list("0123456789")
    assert {"fnet-search", "torch", "optuna"} <= config["versions"].keys()


def test_a_finished_run_does_nothing_again(run: Path, whole: tuple[Path, Outcome]) -> None:
    """In a folder of another name, too, and with the recorded numerics where nothing else is wanted."""
    before = files_in(run)
    outcome, notes = go(run, request=replace(SEARCH, machine=Machine()))
    assert (notes.started, notes.begun) == ([], [(2, 2)])
    assert not any("measuring" in text for text in notes.texts)
    assert replace(outcome, folder=whole[1].folder) == whole[1]
    after = files_in(run)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] in ([], ["journal.log"])


def test_more_trials_go_on_and_more_workers_may(run: Path, whole: tuple[Path, Outcome]) -> None:
    outcome, notes = go(run, 3, workers=2)
    assert (notes.started, notes.begun) == ([2], [(3, 2)])
    unaudited = [tuple(replace(one, audit=None) for one in found.evaluations[:2]) for found in (outcome, whole[1])]
    assert unaudited[0] == unaudited[1], "only the winner is audited, and that may be another one now"
    assert len({one.plan for one in outcome.evaluations}) == 3
    assert all(one.cost.conv_macs <= 600_000 for one in outcome.evaluations)


def cut_off_in_mid_write(run: Path) -> None:
    """Half a line, half a checkpoint and half of other files of the second candidate, and the lock of the journal."""
    journal = run / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    second = next(index for index, line in enumerate(lines) if b'"number":1,' in line)
    journal.write_bytes(b"".join(lines[: second + 3]) + lines[second + 3][:20])
    (run / "journal.log.lock").symlink_to(journal)
    candidate = run / "candidates" / "001"
    weights = (candidate / "weights.safetensors").read_bytes()
    for path in candidate.iterdir():
        path.unlink()
    (candidate / "checkpoint.safetensors").write_bytes(weights[: len(weights) // 2])
    (candidate / ".weights.safetensors.99.tmp").write_bytes(weights[:99])
    (run / ".candidates.csv.99.tmp").write_text("number,pl")
    (run / ".dataset.safetensors").write_bytes(weights[:99])
    (run / ".best").mkdir()


def lose_the_winner(run: Path) -> None:
    shutil.rmtree(run / "best")
    for path in run.glob("candidates/*/quantized.safetensors"):
        path.write_bytes(path.read_bytes()[:100])


def lose_all_but_configuration_journal_and_best(run: Path) -> None:
    for name in ("candidates.csv", "timings.csv", "report.html", ".lock"):
        (run / name).unlink()
    for name in ("candidates", "figures", "artifacts"):
        shutil.rmtree(run / name)


@pytest.mark.parametrize(
    ("cut_off", "again"),
    [
        (cut_off_in_mid_write, [1]),
        (lose_the_winner, []),
        (lose_all_but_configuration_journal_and_best, []),
    ],
)
def test_a_run_that_was_cut_off_goes_on_and_ends_the_same(
    run: Path, whole: tuple[Path, Outcome], cut_off: Callable[[Path], None], again: list[int]
) -> None:
    cut_off(run)
    outcome, notes = go(run)
    assert notes.started == again
    assert any("once more" in text for text in notes.texts) == (cut_off == lose_the_winner)
    assert (run / "candidates.csv").read_bytes() == (whole[0] / "candidates.csv").read_bytes()
    assert replace(outcome, folder=whole[1].folder) == whole[1]
    files = [
        {name for name in files_in(folder) if not name.startswith(("artifacts", "candidates/"))}
        for folder in (run, whole[0])
    ]
    assert files[0] == files[1]
    best = [read_tensors(folder / "best" / "quantized.safetensors")[0] for folder in (run, whole[0])]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])


def test_a_folder_in_use_is_refused(run: Path) -> None:
    before = files_in(run)
    with RunFolder(run).locked(), pytest.raises(FnetError, match="is in use by another fnet-search process"):
        go(run)
    assert files_in(run) == before


def test_a_training_that_fails_is_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    """Nothing is trained again."""
    wild = replace(SEARCH, recipe=replace(SEARCH.recipe, learning_rate=1e30))
    outcome, notes = go(tmp_path / "wild", request=wild)
    assert notes.started == [0, 1]
    assert [one.state for one in outcome.evaluations] == ["failed", "failed"]
    assert {one.reason for one in outcome.evaluations} == {
        "the loss was not finite in epoch 1 of 1 (tried 2 times)",
    }
    assert (outcome.winner, outcome.feasible, outcome.test) == (None, False, None)
    assert outcome.headline() == f"no candidate was trained; see {tmp_path / 'wild'}"
    table = pd.read_csv(tmp_path / "wild" / "candidates.csv")
    assert table["state"].tolist() == ["failed", "failed"]
    assert table["reason"].str.contains("not finite").all()
    _, notes = go(tmp_path / "wild", request=wild)
    assert notes.started == []


def test_given_plans_are_measured_on_the_test_split_and_more_may_follow(tmp_path: Path) -> None:
    plans = tuple(parse_plan(TINY, text) for text in ("init2", "conv_8=8"))
    outcome, notes = go(tmp_path / "given", 1, GIVEN, FixedPlans(plans[:1]))
    assert notes.begun == [(1, 0)]
    assert outcome.headline() == f"1 network measured; files in {outcome.folder}"
    (one,) = outcome.evaluations
    assert one.split == "test"
    assert one.trained_images == len(load_dataset("digits", TINY.input_shape).train), "all of them"
    assert one.audit == Audit(360, 3600, 0, 0)
    assert (outcome.winner, outcome.test) == (None, None)
    assert not (tmp_path / "given" / "best").exists()
    outcome, notes = go(tmp_path / "given", 1, GIVEN, FixedPlans(plans[1:]))
    assert (notes.begun, notes.started) == ([(2, 1)], [1])
    assert outcome.evaluations[0] == one
    assert [found.plan for found in outcome.evaluations] == list(plans)
    assert outcome.headline() == f"2 networks measured; files in {outcome.folder}"
    assert (tmp_path / "given" / "candidates" / "001" / "weights.safetensors").is_file()


@pytest.fixture
def quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


def test_a_run_in_a_database(tmp_path: Path, whole: tuple[Path, Outcome], quiet: None) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    request = replace(SEARCH, storage=url)
    outcome, _ = go(tmp_path / "one" / "name", 2, request)
    assert not (tmp_path / "one" / "name" / "journal.log").exists()
    assert (tmp_path / "one" / "name" / "candidates.csv").read_bytes() == (whole[0] / "candidates.csv").read_bytes()
    assert [study.study_name for study in optuna.get_all_study_summaries(url)] == ["name"]

    again = reported(tmp_path / "one" / "name")
    assert again.evaluations == outcome.evaluations, "the recorded storage is read"
    with pytest.raises(
        FnetError,
        match=r"^the storage has a study 'name' of another run folder; choose another `out`, or work on it "
        "too: fnet-search worker --storage ... --study name$",
    ):
        go(tmp_path / "two" / "name", 1, replace(request, seed=4))
    assert not (tmp_path / "two").exists()
    before = files_in(tmp_path / "one")
    with pytest.raises(FnetError, match=r"^cannot open storage sqlite:.*other\.db \(the file .* does not exist\)"):
        reported(tmp_path / "one" / "name", f"sqlite:///{tmp_path}/other.db")
    assert files_in(tmp_path / "one") == before
