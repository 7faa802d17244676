import json
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from onnx import ModelProto

from fnet_search.arch.plan import load_plan, make_plan, regular, uniform
from fnet_search.base.errors import FnetError
from fnet_search.base.version import __version__
from fnet_search.importing.spaces import load_space
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import HELD_OUT, Evaluation
from fnet_search.report.csv_tables import candidate_line
from fnet_search.rundir.run_folder import FORMAT, KEPT, RunFolder, differences, kept_networks, versions
from tests.support.evaluations import failed, pruned, refused, trained

TINY = load_space("tiny")
FREE = Constraints()
CONFIG = {
    **{"space": "", "dataset": "digits", "policy": "tpe", "scheme": "minmax", "split": "test", "seed": 0},
    **{"recipe": {"epochs": 1}, "fidelity": {"warm_start": False}, "constraints": {}, "numerics": {"device": "cpu"}},
    "data": {"fingerprint": "0f", "classes": ["a", "b"], "mean": [0.5], "std": [0.25]},
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that has begun."""
    run = RunFolder(tmp_path / "first")
    with run.locked():
        run.write_config(CONFIG)
    return run


def one(number: int, accuracy: float) -> Evaluation:
    rates = {layer: 2 ** (number // 2**bit % 2) for bit, layer in enumerate(("conv_8", "conv_16_1", "conv_16_2"))}
    return trained(TINY, make_plan(TINY, rates), number, accuracy, accuracy)


def weights(run: RunFolder) -> list[str]:
    return sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*.safetensors"))


def leave_weights(run: RunFolder, evaluation: Evaluation) -> None:
    """As a worker does."""
    folder = run.candidate(evaluation.number)
    folder.mkdir(parents=True)
    for name in ("weights", "quantized", "checkpoint"):
        (folder / f"{name}.safetensors").write_text(f"{name} of {evaluation.number}")


def test_a_folder_is_a_run_once_it_has_a_configuration(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "new" / "one")
    assert not run.exists
    with pytest.raises(FnetError, match=r"is not a run folder: it has no config\.json$"):
        run.config()
    with run.locked():
        assert not run.exists
        run.write_config(CONFIG)
    assert run.exists
    earlier = {"validation": None, "has_test": True, "skipped": 0}
    written = {"study": "one", "format": 1, "versions": versions()}
    assert run.config() == {**CONFIG, "data": {**earlier, **CONFIG["data"]}, **written}


def test_a_folder_of_a_later_format_is_refused(run: RunFolder) -> None:
    config = json.loads(run.config_path.read_text())
    run.config_path.write_text(json.dumps({**config, "format": FORMAT + 1, "versions": {"fnet-search": "9.9"}}))
    with pytest.raises(FnetError) as caught:
        run.config()
    assert str(caught.value) == (
        f"{run.path} was written by fnet-search 9.9 in format 2; this is fnet-search {__version__}, "
        "which reads formats 0 to 1: install the version that wrote it, or a later one"
    )


@pytest.mark.parametrize("wrong", ["1", 1.0, True, -1, None])
def test_a_format_is_a_number(run: RunFolder, wrong: object) -> None:
    config = json.loads(run.config_path.read_text())
    run.config_path.write_text(json.dumps({**config, "format": wrong}))
    with pytest.raises(FnetError, match=r"it has no proper 'format'$"):
        run.config()


def test_what_an_earlier_version_did_not_record_of_its_data(run: RunFolder) -> None:
    assert run.config()["data"]["validation"] is None, "its networks are measured on the test split"
    run.write_config({**CONFIG, "split": "validation"})
    assert run.config()["data"]["validation"] == HELD_OUT
    run.write_config({**CONFIG, "data": {**CONFIG["data"], "validation": "val", "has_test": False, "skipped": 2}})
    found = run.config()["data"]
    assert (found["validation"], found["has_test"], found["skipped"]) == ("val", False, 2)


def test_the_study_keeps_its_name_when_the_folder_is_moved(run: RunFolder, tmp_path: Path) -> None:
    moved = RunFolder(run.path.rename(tmp_path / "second"))
    assert moved.name == "first"


def test_a_relative_path_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunFolder(Path()).name == tmp_path.name


@pytest.mark.parametrize("kind", ["file", "folder of something"])
def test_what_is_no_run_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "other"
    if kind == "file":
        path.write_text("")
    else:
        path.mkdir()
        (path / "notes.txt").write_text("")
    with pytest.raises(FnetError, match="other exists and is not a run folder; choose another `out`"):
        _ = RunFolder(path).exists


@pytest.mark.parametrize("name", [".lock", ".config.json.12.tmp", ".DS_Store"])
def test_a_folder_with_hidden_files_only_is_as_good_as_new(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    assert not RunFolder(tmp_path).exists


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read PATH: Expecting value"),
        ("{", "cannot read PATH: Expecting property name"),
        ("[1]", "PATH is not the configuration of a run"),
        ("{}", "PATH is not the configuration of a run: it has no proper 'space'"),
        (
            json.dumps({**CONFIG, "numerics": {"device": "cpu", "of_a_later_version": 1}}),
            "PATH is not the configuration of a run: it has no proper 'numerics'",
        ),
        (json.dumps({**CONFIG, "data": 3}), "PATH is not the configuration of a run: it has no proper 'data'"),
        (json.dumps({**CONFIG, "seed": None}), "PATH is not the configuration of a run: it has no proper 'seed'"),
    ],
)
def test_broken_configurations(run: RunFolder, text: str, message: str) -> None:
    run.config_path.write_text(text)
    with pytest.raises(FnetError, match=f"^{re.escape(message.replace('PATH', str(run.config_path)))}"):
        run.config()


def test_one_process_at_a_time(run: RunFolder) -> None:
    with run.locked():
        with pytest.raises(FnetError, match="is in use by another fnet-search process; wait for it, or name another"):
            RunFolder(run.path).locked().__enter__()
        assert run.exists
    with run.locked():
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FnetError, match=r"^cannot write to .*/file/run: Not a directory$"):
        RunFolder(tmp_path / "file" / "run").locked().__enter__()


def test_what_a_killed_process_was_writing_is_cleared_away(run: RunFolder) -> None:
    leave_weights(run, one(0, 0.5))
    unfinished = (run.path / ".candidates.csv.7.tmp", run.candidate(0) / ".weights.safetensors.8.tmp")
    for path in unfinished:
        path.write_text("half a fi")
    with run.locked():
        assert not any(path.exists() for path in unfinished)
    assert len(weights(run)) == 3


def test_tables(run: RunFolder) -> None:
    evaluations = (one(0, 0.5), refused(TINY, regular(TINY), 1), failed(TINY, uniform(TINY, 4), 2))
    evaluations = (pruned(TINY, uniform(TINY, 2), 3), *evaluations)
    run.write_candidates({one.number: candidate_line(TINY, FREE, one) for one in evaluations})
    table = pd.read_csv(run.path / "candidates.csv")
    assert table["state"].tolist() == ["complete", "refused", "failed", "pruned"]
    assert b"\r" not in (run.path / "candidates.csv").read_bytes()
    run.write_timings({2: 1.5, 0: 3.0})
    assert (run.path / "timings.csv").read_text() == "number,seconds\n0,3.0\n2,1.5\n"


def test_a_candidate_is_written_whole(run: RunFolder) -> None:
    evaluation = one(5, 0.5)
    shown = run.write_candidate(evaluation)
    folder = run.candidate(5)
    assert folder.name == "005"
    assert {path.name for path in shown} == {"layers.csv", "plan.toml"}
    assert load_plan(TINY, folder / "plan.toml") == evaluation.plan
    assert Evaluation.from_json(json.loads((folder / "evaluation.json").read_text())) == evaluation
    assert pd.read_csv(folder / "layers.csv")["layer"].tolist() == [layer.layer for layer in evaluation.layers]


def test_weights_are_kept_of_the_best_few(run: RunFolder) -> None:
    evaluations = tuple(one(number, accuracy) for number, accuracy in enumerate((0.5, 0.9, 0.6, 0.8, 0.7)))
    for evaluation in evaluations:
        leave_weights(run, evaluation)
    running = one(6, 0.1)
    leave_weights(run, running)
    run.prune(evaluations, FREE)
    best = sorted(range(5), key=lambda number: -(evaluations[number].quint8_accuracy or 0))[:KEPT]
    kept = [f"candidates/{number:03d}/{name}.safetensors" for number in best for name in ("quantized", "weights")]
    kept += [f"candidates/006/{name}.safetensors" for name in ("checkpoint", "quantized", "weights")]
    assert weights(run) == sorted(kept)


def test_weights_are_looked_for_where_they_may_be(run: RunFolder) -> None:
    """What a search knows to be gone is not looked at again: here it is, and stays."""
    evaluations = tuple(one(number, 0.5 + 0.1 * number) for number in range(KEPT + 2))
    for evaluation in evaluations:
        leave_weights(run, evaluation)
    best = run.prune(evaluations[:-1], FREE, among={1, 2, 3})
    assert best == {1, 2, 3}
    assert (run.candidate(0) / "weights.safetensors").exists()
    assert run.prune(evaluations, FREE, among=best | {4}) == {2, 3, 4}
    present = [(run.candidate(number) / "weights.safetensors").exists() for number in range(KEPT + 2)]
    assert present == [True, False, True, True, True]


def leave_requantized(run: RunFolder, evaluation: Evaluation) -> None:
    run.write_candidate(replace(evaluation, scheme="mse"), run.candidate(evaluation.number) / "mse")


def test_weights_of_a_network_that_was_quantized_otherwise_are_kept(run: RunFolder) -> None:
    evaluations = tuple(one(number, 0.9 - 0.1 * number) for number in range(KEPT + 2))
    for evaluation in evaluations:
        leave_weights(run, evaluation)
    leave_requantized(run, evaluations[-1])
    run.prune(evaluations, FREE)
    assert run.requantized(KEPT) == []
    assert run.requantized(KEPT + 1) == [run.candidate(KEPT + 1) / "mse"]
    assert [(run.candidate(number) / "weights.safetensors").exists() for number in range(KEPT + 2)] == [
        *[True] * KEPT,
        False,
        True,
    ]


def test_the_best_candidates_the_best_final_one_and_the_reference_are_kept() -> None:
    """A final training of a candidate takes the place of none; parents of what is running are kept besides."""
    candidates = [one(number, accuracy) for number, accuracy in enumerate((0.5, 0.9, 0.6, 0.8, 0.7))]
    reference = replace(one(5, 0.99), role="reference")
    finals = [replace(one(number, accuracy), role="final", parent=1) for number, accuracy in ((6, 0.95), (7, 0.94))]
    evaluations = (*candidates, reference, *finals, pruned(TINY, regular(TINY), 8))
    assert kept_networks(evaluations, FREE) == {1, 3, 4, 5, 6}
    assert kept_networks(evaluations, Constraints(min_quint8=0.99)) == {1, 3, 4, 5, 6}
    assert kept_networks(evaluations, FREE, searching=False) == set(range(9)), "of given plans all"
    assert kept_networks((), FREE) == set()


def test_weights_of_parents_in_use_are_kept(run: RunFolder) -> None:
    evaluations = tuple(one(number, 0.9 - 0.1 * number) for number in range(KEPT + 3))
    for evaluation in evaluations:
        leave_weights(run, evaluation)
    run.prune(evaluations, FREE, [KEPT + 1])
    left = [number for number in range(KEPT + 3) if (run.candidate(number) / "weights.safetensors").exists()]
    assert left == [0, 1, 2, KEPT + 1]
    run.prune(evaluations, FREE)
    assert not (run.candidate(KEPT + 1) / "weights.safetensors").exists()


def test_the_checkpoint_of_what_was_stopped_is_dropped(run: RunFolder) -> None:
    stopped = pruned(TINY, regular(TINY), 0)
    run.candidate(0).mkdir(parents=True)
    (run.candidate(0) / "checkpoint.safetensors").write_text("")
    run.prune((stopped,), FREE)
    assert weights(run) == []


def test_given_plans_all_keep_their_weights(run: RunFolder) -> None:
    evaluations = tuple(replace(one(number, 0.5), split="test") for number in range(KEPT + 2))
    for evaluation in evaluations:
        leave_weights(run, evaluation)
    run.prune(evaluations, FREE, searching=False)
    assert weights(run) == sorted(
        f"candidates/{number:03d}/{name}.safetensors" for number in range(KEPT + 2) for name in ("quantized", "weights")
    )


def test_the_winner_is_copied_and_replaced(run: RunFolder) -> None:
    first, second = one(0, 0.5), one(1, 0.9)
    assert run.read_test(first) is None
    for evaluation in (first, second):
        leave_weights(run, evaluation)
        run.write_candidate(evaluation)
    (run.candidate(1) / ".weights.safetensors.8.tmp").write_text("half a fi")
    run.write_best(first, one(0, 0.4), ModelProto(producer_name="first"))
    assert run.read_test(first) == one(0, 0.4)
    assert run.read_test(second) is None
    leave_requantized(run, second)
    assert (run.has_best(first, "uint8"), run.has_best(second, "uint8")) == (True, False)
    run.write_best(second, None, ModelProto(producer_name="second"))
    assert (run.has_best(first, "uint8"), run.has_best(second, "uint8")) == (False, True)
    assert not run.has_best(second, "int8"), "the file does not say so, as those of earlier versions"
    assert run.read_test(second) is None, "there are no test images"
    run.write_best(second, one(1, 0.8), ModelProto(producer_name="second"))
    assert run.read_test(first) is None
    assert run.read_test(second) == one(1, 0.8)
    assert (run.best / "weights.safetensors").read_text() == "weights of 1"
    assert ModelProto.FromString((run.best / "model.onnx").read_bytes()).producer_name == "second"
    assert {path.name for path in run.best.iterdir()} == {
        *("plan.toml", "evaluation.json", "layers.csv", "test.json", "model.onnx"),
        *("weights.safetensors", "quantized.safetensors"),
    }


def test_the_best_of_a_run_that_was_cut_off_while_copying(run: RunFolder) -> None:
    (run.path / ".best").mkdir()
    (run.path / ".best" / "test.json").write_text("{")
    leave_weights(run, one(0, 0.5))
    run.write_best(one(0, 0.5), one(0, 0.4), ModelProto())
    assert run.read_test(one(0, 0.5)) == one(0, 0.4)
    assert not (run.path / ".best").exists()


def test_differences_are_named_key_by_key() -> None:
    recorded = {"seed": 0, "recipe": {"name": "quick", "epochs": 8}, "space": "a\nb", "split": "test", "more": 1}
    assert differences(recorded, dict(recorded)) == []
    assert differences(recorded, {"seed": 0}) == []
    assert differences(recorded, {"seed": 1, "recipe": {"name": "quick", "epochs": 2}, "space": "a\nc"}) == [
        "seed: 0 recorded, 1 wanted",
        "recipe.epochs: 8 recorded, 2 wanted",
        "space",
    ]
    assert differences({}, {"seed": 1}) == ["seed: None recorded, 1 wanted"]
    assert differences({"recipe": None}, {"recipe": {"epochs": 2}}) == [
        "recipe: None recorded, {'epochs': 2} wanted",
    ]
    assert max(map(len, differences({"a": "x" * 500}, {"a": "y" * 500}))) < 160
