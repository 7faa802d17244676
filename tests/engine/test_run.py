import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from optuna.artifacts import get_all_artifact_meta
from optuna.storages.journal._storage import JournalOperation
from PIL import Image

from fnet_policies import LayerGuided, Random
from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import legal_rates, parse_plan, regular
from fnet_search.base.errors import FnetError
from fnet_search.candidates.job import Setup
from fnet_search.candidates.measure import measure
from fnet_search.deploy.audit import compare
from fnet_search.deploy.export import read_model
from fnet_search.deploy.runtime import Runtime
from fnet_search.engine.reporting import open_study, report_again
from fnet_search.engine.request import Machine, Request
from fnet_search.engine.run import run_study
from fnet_search.engine.search_loop import Event, ProbesProgressed, Started
from fnet_search.importing.spaces import load_space
from fnet_search.optuna_bridge.trials import EVALUATION
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Audit, Evaluation
from fnet_search.policy.fixed_plans import FixedPlans
from fnet_search.policy.metric import ClassResult
from fnet_search.policy.protocol import Policy
from fnet_search.policy.significance import as_bits, interval
from fnet_search.quant.scheme import PAPER, parse_scheme
from fnet_search.report.class_balance import read_confusion
from fnet_search.report.outcome import Outcome
from fnet_search.rundir.recorded_run import RecordedNetwork, open_run
from fnet_search.rundir.run_folder import RunFolder
from fnet_search.training import numerics
from fnet_search.training.datasets import hold_out, load_dataset
from fnet_search.training.deadline import Deadline, TimeUp
from fnet_search.training.recipe import Fidelity, load_recipe
from fnet_search.training.weights import read_tensors
from tests.support.evaluations import trained

TINY = load_space("tiny")
SEARCH = Request(
    space=TINY,
    dataset="digits",
    recipe=load_recipe("quick").with_epochs(1),
    schemes=(PAPER,),
    seed=3,
    policy_name="random",
    constraints=Constraints(conv_macs=600_000),
    machine=Machine("cpu", "float32", 1, False, workers=1),
)
RANDOM = Random()
WARM = replace(SEARCH, fidelity=Fidelity(warm_start=True, warm_epochs=1, prune=True, final_epochs=2))
GIVEN = replace(SEARCH, policy_name="fixed plans", constraints=Constraints(), split="test", audit_all=True)


def reported(folder: Path, storage: str | None = None) -> Outcome:
    opened = open_run(folder)
    with opened.run.locked():
        return report_again(open_study(opened, storage))


class Notes:
    """A display that remembers."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.begun: list[tuple[int, int]] = []
        self.events: list[Event] = []

    def status(self, text: str) -> None:
        self.texts.append(text)

    say = status

    def advance(self, what: str, done: int, total: int) -> None:
        self.texts.append(f"{what}: {done} of {total}")

    def begin(self, run: RunFolder, setup: Setup, trials: int, done: int) -> None:
        self.begun.append((trials, done))

    def show(self, event: Event) -> None:
        self.events.append(event)

    @property
    def started(self) -> list[int]:
        return [event.job.number for event in self.events if isinstance(event, Started)]


def go(
    folder: Path, trials: int = 2, request: Request = SEARCH, policy: Policy = RANDOM, workers: int = 1
) -> tuple[Outcome, Notes]:
    notes = Notes()
    machine = replace(request.machine, workers=workers)
    request = replace(request, policy=policy, trials=trials, machine=machine)
    return run_study(request, RunFolder(folder), notes), notes


@pytest.fixture(scope="module", autouse=True)
def plain_choices() -> Iterator[None]:
    """Measured, they may differ from run to run: runs are the same for equal numerics."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(numerics, "_faster", lambda one, other: False)
        numerics.resolve.cache_clear()
        yield
    numerics.resolve.cache_clear()


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """An uninterrupted search for two candidates. Copy it before anything is changed."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    return folder, go(folder)[0]


@pytest.fixture
def run(whole: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A copy of the uninterrupted search."""
    return Path(shutil.copytree(whole[0], tmp_path / "copy"))


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
    assert measure(*networks, data, data.evaluation).complete(winner) == winner
    tested = measure(*networks, data, data.test)
    assert (tested.quint8_accuracy, tested.classes) == (test.quint8_accuracy, test.classes)
    assert read_confusion(folder / "best" / "confusion.csv", data.classes) == list(tested.confusion)
    assert Evaluation.from_json(json.loads((folder / "best" / "test.json").read_text())) == test
    model, facts = read_model(folder / "best" / "model.onnx")
    assert test.audit == Audit(len(data.test), 10 * len(data.test), 0, 0)
    assert sum((compare(networks[1](x), Runtime(model)(x)) for x in [data.normalise(data.test.images)]), Audit()) == (
        test.audit
    )
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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "seed: 3 recorded, 4 wanted"),
        ({"policy_name": "tpe"}, "policy: 'random' recorded, 'tpe' wanted"),
        ({"split": "test"}, "split: 'validation' recorded, 'test' wanted"),
        ({"constraints": Constraints(conv_macs=1)}, "`budget` (conv MACs): 600000 recorded, 1 wanted"),
        (
            {"recipe": replace(SEARCH.recipe, batch_size=32)},
            "recipe.batch_size: 64 recorded, 32 wanted",
        ),
        ({"fidelity": Fidelity(prune=True)}, "fidelity.prune: False recorded, True wanted"),
        (
            {"fidelity": Fidelity(warm_start=True, final_epochs=9)},
            "fidelity.warm_start: False recorded, True wanted",
        ),
        (
            {"fidelity": Fidelity(warm_start=True, warm_epochs=2)},
            "fidelity.warm_start: False recorded, True wanted; fidelity.warm_epochs: 1 recorded, 2 wanted",
        ),
        (
            {"machine": replace(SEARCH.machine, threads=9)},
            "numerics.threads: 1 recorded, 9 wanted; numerics.alone_threads: 1 recorded, 9 wanted",
        ),
        (
            {"schemes": (parse_scheme("minmax+equalize"),)},
            "`scheme`: 'percentile:1' recorded, 'minmax+equalize' wanted",
        ),
        ({"space": load_space("factorizenet")}, "space"),
        (
            {"machine": replace(SEARCH.machine, dtype="bfloat16")},
            "numerics.dtype: 'float32' recorded, 'bfloat16' wanted",
        ),
        ({"storage": "sqlite:///x.db"}, "storage: None recorded, 'sqlite:///x.db' wanted"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_configuration_is_refused(run: Path, change: dict[str, object], named: str) -> None:
    before = files_in(run)
    with pytest.raises(FnetError) as caught:
        go(run, request=replace(SEARCH, **change))
    same = ", or say `scheme` percentile:1" if "schemes" in change else ""
    assert str(caught.value) == f"{run} was made with another configuration ({named}); choose another `out`{same}"
    assert files_in(run) == before


def test_a_run_computes_as_another_one_did(run: Path, tmp_path: Path) -> None:
    """Also in what this device would not choose."""
    recorded = json.loads((run / "config.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(run, other)
    recorded["numerics"] |= {"channels_last": False, "group_widths": [32, 16, 16, 8, 16], "alone_threads": 5}
    (other / "config.json").write_text(json.dumps(recorded))
    like = replace(WARM, machine=Machine(numerics_of=other))
    _, notes = go(tmp_path / "new", request=like)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["numerics"] == recorded["numerics"]
    assert not any("measuring what" in text for text in notes.texts)

    with pytest.raises(FnetError, match=f"^{re.escape(str(tmp_path / 'none'))} is not a run folder"):
        go(tmp_path / "third", request=replace(WARM, machine=Machine(numerics_of=tmp_path / "none")))
    assert not (tmp_path / "third").exists()
    with pytest.raises(FnetError, match=r"\(numerics\.channels_last: True recorded, False wanted; "):
        go(run, request=replace(SEARCH, machine=Machine(numerics_of=other)))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of small grey images in three classes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 5)):
        for label, level in (("dark", 30), ("grey", 120), ("light", 210)):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(rng.normal(level, 20, (9, 7)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


def test_other_images_under_the_same_name_are_refused(images: Path, tmp_path: Path) -> None:
    """And the classes of a data set decide how many parameters there are."""
    request = replace(SEARCH, dataset=f"imagefolder:{images}", constraints=Constraints(params=1_459))
    fewest = 1_578 - 7 * (16 + 1)
    with pytest.raises(FnetError, match=rf"^a limit of 1,458 parameters is below .* which has {fewest:,}$"):
        go(tmp_path / "run", request=replace(request, constraints=Constraints(params=fewest - 1)))
    assert not (tmp_path / "run").exists()
    outcome, notes = go(tmp_path / "run", 1, request)
    assert outcome.space.classes == 3
    assert [one.cost.params for one in outcome.evaluations] == [fewest]
    assert "reading images: 75 of 75" in notes.texts
    Image.new("L", (9, 7), 255).save(images / "train" / "dark" / "0.png")
    with pytest.raises(FnetError, match=r"made with another configuration \(data\.fingerprint: '\w{16}' recorded"):
        go(tmp_path / "run", 1, request)


def test_headlines(tmp_path: Path) -> None:
    plan = parse_plan(TINY, "init2")
    strict = Constraints(conv_macs=600_000, min_quint8=0.9, max_drop=0.05)
    near = trained(TINY, plan, 4, 0.9, 0.8)
    outcome = Outcome(Path("x"), TINY, strict, "validation", (near,), near, replace(near, split="test"))
    accuracies = "fp32 90.00 % quint8 80.00 %"
    found = f"candidate 4 (init2), 0.434 MMAC, validation {accuracies}; test {accuracies}"
    missed = "no candidate met the constraints; nearest, missing min_quint8, max_drop:"
    found, place = (
        f"{found}; constraints checked on the validation images",
        "; quantized with percentile:1; files in x/best",
    )
    assert outcome.headline() == f"{missed} {found}{place}"
    assert replace(outcome, constraints=Constraints(min_quint8=0.8)).headline() == f"winner: {found}{place}"
    assert replace(outcome, winner=None).headline() == "1 network measured; files in x"
    reference = replace(near, role="reference")
    assert replace(outcome, winner=None, evaluations=(reference,)).headline() == ("no candidate was trained; see x")
    final = replace(near, number=7, role="final", parent=4)
    assert replace(outcome, winner=final, test=None).headline() == (
        f"{missed} candidate 7 (init2, candidate 4 trained on), 0.434 MMAC, validation {accuracies}"
        f"; constraints checked on the validation images{place}"
    )
    assert replace(outcome, winner=None, evaluations=()).headline() == "no candidate was trained; see x"
    always = (ClassResult(90, 81, 90, 85, 100, "cat"), ClassResult(10, 9, 0, 15, 0, "dog"))
    one = replace(near, classes=always, quint8_accuracy=0.9)
    balanced = replace(outcome, constraints=Constraints(metric="balanced-accuracy"), winner=one, test=None)
    assert balanced.headline() == (
        "winner: candidate 4 (init2), 0.434 MMAC, validation balanced accuracy fp32 90.00 % quint8 50.00 % "
        f"(accuracy fp32 90.00 % quint8 90.00 %) (quint8 predicts class 'cat' for every image){place}"
    )


def test_the_headline_says_how_sure_the_winner_is(tmp_path: Path) -> None:
    """And which is the cheapest of those that the same images do not tell from it."""
    cheap, dear = parse_plan(TINY, "f4"), parse_plan(TINY, "f2")
    best = replace(trained(TINY, dear, 3, 0.95, 0.9), images=200, right=as_bits([True] * 180 + [False] * 20))
    near = replace(trained(TINY, cheap, 1, 0.95, 0.885), images=200, right=as_bits([True] * 177 + [False] * 23))
    far = replace(near, number=2, quint8_accuracy=0.8, right=as_bits([True] * 160 + [False] * 40))
    outcome = Outcome(Path("x"), TINY, Constraints(), "validation", (near, far, best), best)
    low, high = (f"{100 * end:.1f}" for end in interval(180, 200))
    fewer = 100 * (1 - plan_cost(TINY, cheap).conv_macs / plan_cost(TINY, dear).conv_macs)
    assert outcome.headline() == (
        f"winner: candidate 3 (f2), 0.508 MMAC, validation fp32 95.00 % quint8 90.00 % ({low} to {high}, 200 images); "
        f"quantized with percentile:1; candidate 1: not distinguishable, {fewer:.0f} % fewer MACs; files in x/best"
    )
    assert "not distinguishable" not in replace(outcome, evaluations=(far, best)).headline()
    dearer = replace(near, plan=parse_plan(TINY, "regular"), cost=plan_cost(TINY, parse_plan(TINY, "regular")))
    assert "not distinguishable" not in replace(outcome, evaluations=(dearer, best)).headline(), "it saves nothing"


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
    outcome, notes = go(tmp_path / "given", 1, GIVEN, FixedPlans(plans[1:]), workers=2)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "digit"}, "unknown data set 'digit'"),
        ({"machine": Machine("cuda:99")}, "device 'cuda:99' is not there"),
        ({"storage": "garbage"}, "an Optuna URL is wanted"),
        ({"constraints": Constraints(params=1_577)}, "a limit of 1,577 parameters is below the smallest network"),
        (
            {"machine": Machine("cpu", "tf32")},
            r"^dtype tf32 needs a CUDA device of compute capability 8\.0 or more, not cpu$",
        ),
        ({"machine": Machine(dtype="tf32")}, "^dtype tf32 needs a CUDA device of compute capability"),
        (
            {"workers": 1_000_000},
            r"^1000000 workers need about [\d.]+ GB, of which [\d.]+ GB are free; use `workers` \d+ ",
        ),
    ],
)
def test_what_cannot_be_run_leaves_no_folder(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    workers = change.pop("workers", 1)
    if change.get("machine") == Machine(dtype="tf32") and torch.cuda.is_available():
        pytest.skip("this machine has what cannot be there")
    with pytest.raises(FnetError, match=message):
        go(tmp_path / "run", request=replace(SEARCH, **change), workers=workers)
    assert list(tmp_path.iterdir()) == []


# Candidates that start from others


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, list[Event]]:
    """A reference, two candidates that start from it, and the better one trained on. Copy it before it is changed."""
    folder = tmp_path_factory.mktemp("run") / "children"
    outcome, notes = go(folder, request=WARM)
    return folder, outcome, notes.events


@pytest.fixture
def warm(children: tuple[Path, Outcome, list[Event]], tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(children[0], tmp_path / "copy"))


def test_a_warm_search_is_recorded_whole(children: tuple[Path, Outcome, list[Event]]) -> None:
    folder, outcome, _ = children
    reference, *candidates, final = outcome.evaluations
    assert [one.role for one in outcome.evaluations] == ["reference", "candidate", "candidate", "final"]
    best = max(candidates, key=lambda one: one.quint8_accuracy or 0.0)
    assert (reference.plan, reference.parent, reference.epochs) == (regular(TINY), None, 1)
    assert reference.cost.conv_macs == 811_008 > 600_000
    images = reference.trained_images
    for one in candidates:
        assert (one.parent, one.epochs, one.inherited_epochs, one.trained_images) == (0, 1, 1, images)
        assert one.zero_shot_accuracy is not None
        assert len(one.accuracies) == 1
    assert (final.parent, final.plan, final.epochs, final.inherited_epochs) == (best.number, best.plan, 2, 2)
    assert final.trained_images == 2 * images
    found = final.zero_shot_accuracy
    assert found == pytest.approx(best.fp32_accuracy, abs=0.01), "its own weights; in the arithmetic of the training"
    assert outcome.winner is not None
    assert outcome.winner.role != "reference"
    assert json.loads((folder / "config.json").read_text())["fidelity"] == {
        **{"warm_start": True, "warm_epochs": 1, "prune": True, "finetune": False}
    }
    table = pd.read_csv(folder / "candidates.csv")
    assert table["role"].tolist() == ["reference", "candidate", "candidate", "final"]
    assert table["parent"].tolist()[1:] == [0, 0, best.number]
    page = (folder / "report.html").read_text()
    assert "<th>warm start</th><td>from trained parents, 1 epoch, a smaller learning rate</td>" in page
    assert "<th>pruning</th>" in page
    trained_on = f"of candidate {best.number}, for 2 epochs, as candidate 3"
    assert f"<th>final training</th><td>{trained_on}</td>" in page


def test_a_search_may_start_from_the_reference_of_another(
    children: tuple[Path, Outcome, list[Event]], tmp_path: Path
) -> None:
    """For another budget; it is measured as it is."""
    space = load_space("tiny", weights=str(children[0] / "candidates" / "000" / "weights.safetensors"))
    small = replace(WARM, space=space, constraints=Constraints(conv_macs=400_000), fidelity=Fidelity(True, 1))
    outcome, _ = go(tmp_path / "run", 1, small)
    reference, *others = outcome.evaluations
    known = children[1].evaluations[0]
    assert (reference.role, reference.epochs, reference.trained_images) == ("reference", 0, 0)
    for name in ("fp32_accuracy", "quint8_accuracy", "qmse", "layers"):
        assert getattr(reference, name) == getattr(known, name)
    assert [one.parent for one in others if one.state == "complete"] == [0]


def test_the_same_warm_search_again_gives_the_same_table(
    children: tuple[Path, Outcome, list[Event]], tmp_path: Path
) -> None:
    go(tmp_path / "again", request=WARM)
    assert (tmp_path / "again" / "candidates.csv").read_bytes() == (children[0] / "candidates.csv").read_bytes()


def test_a_warm_search_goes_on(warm: Path, children: tuple[Path, Outcome, list[Event]]) -> None:
    """The reference and the final training are done once; then more epochs of it are wanted, then more candidates."""
    _, notes = go(warm, request=WARM)
    assert (notes.started, notes.begun) == ([], [(2, 2)])
    longer = replace(WARM, fidelity=replace(WARM.fidelity, final_epochs=3))
    outcome, notes = go(warm, request=longer)
    assert notes.started == [4]
    final = outcome.evaluations[4]
    before = children[1].evaluations[3]
    assert (final.role, final.epochs, final.parent, final.plan) == ("final", 3, before.parent, before.plan)
    assert go(warm, request=WARM)[1].started == [], "it has had more than that"
    outcome, notes = go(warm, 3, longer)
    assert notes.begun == [(3, 2)]
    assert notes.started[0] == 5
    child = outcome.evaluations[5]
    assert (child.role, child.parent, child.inherited_epochs) == ("candidate", 0, 1)


def test_what_others_start_from_is_trained_again_where_it_was_lost(
    warm: Path, children: tuple[Path, Outcome, list[Event]]
) -> None:
    """To the same bits; where nothing starts from it any more, it is not."""
    reference = warm / "candidates" / "000" / "weights.safetensors"
    before = read_tensors(children[0] / reference.relative_to(warm))[0]
    reference.write_bytes(reference.read_bytes()[:1000])
    _, notes = go(warm, request=WARM)
    assert reference.stat().st_size == 1000, "this run had ended"
    outcome, notes = go(warm, 3, WARM)
    assert any(text.startswith("training candidate 0 once more (") for text in notes.texts)
    after = read_tensors(reference)[0]
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [one.state for one in outcome.evaluations[4:]] == ["complete"] * len(outcome.evaluations[4:])
    assert outcome.evaluations[4].parent == 0


# A policy that is told of layers

GUIDED = replace(WARM, policy=LayerGuided(), policy_name="layer-guided", trials=2)


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, list[Event]]:
    """Copy it before it is changed."""
    folder = tmp_path_factory.mktemp("run") / "guided"
    outcome, notes = go(folder, 2, GUIDED, LayerGuided())
    return folder, outcome, notes.events


def test_probes_are_measured_recorded_and_drawn(guided: tuple[Path, Outcome, list[Event]]) -> None:
    folder, outcome, events = guided
    assert [one.role for one in outcome.evaluations] == ["reference", "candidate", "candidate", "final"]
    assert [one.images for one in outcome.evaluations] == [287] * 4  # a fifth of the digits' training images
    probed = [index for index, event in enumerate(events) if isinstance(event, ProbesProgressed)]
    started = [index for index, event in enumerate(events) if isinstance(event, Started)]
    assert started[0] < probed[0] < probed[-1] < started[1]
    table = pd.read_csv(folder / "probes.csv")
    changes = [(layer, rate) for layer, rates in legal_rates(TINY).items() for rate in rates[1:]]
    assert list(zip(table["layer"][1:], table["rate"][1:], strict=True)) == changes
    assert table["layer"].isna().tolist() == [True] + [False] * len(changes)
    assert (folder / "figures" / "probes.png").is_file()
    page = (folder / "report.html").read_text()
    assert 'alt="probes"' in page
    assert "Why this plan" in page
    choices = pd.read_csv(folder / "choices.csv")
    assert outcome.winner is not None
    assert dict(zip(choices["layer"], choices["rate"], strict=True)) == outcome.winner.plan.by_layer
    assert all(f"<td>{reason}</td>" in page for reason in choices["reason"])
    front = pd.read_csv(folder / "front.csv")
    assert front["conv_macs"].is_monotonic_increasing
    assert front["expected_quint8_accuracy"].is_monotonic_increasing
    assert 'alt="front"' in page
    assert "noise of the fp32 logits" in page
    study = open_study(open_run(folder), None).study
    attached = {meta.filename for meta in get_all_artifact_meta(study)}
    assert {"probes.csv", "choices.csv", "front.csv", "probes.png", "front.png"} <= attached


class PulledPlug(Notes):
    """A display of a host that is gone after some of the probes."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def show(self, event: Event) -> None:
        super().show(event)
        if isinstance(event, ProbesProgressed) and event.done >= self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 9])
def test_a_search_that_was_cut_off_while_probing_ends_the_same(
    guided: tuple[Path, Outcome, list[Event]], tmp_path: Path, after: int
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_study(GUIDED, RunFolder(folder), PulledPlug(after))
    _, notes = go(folder, 2, GUIDED, LayerGuided())
    total = [event.total for event in notes.events if isinstance(event, ProbesProgressed)]
    rates = [len(rates) for rates in legal_rates(TINY).values()]
    assert total[0] == sum(rates) - 2 if after == 1 else total[0] < sum(rates) - 2
    for name in ("candidates.csv", "probes.csv", "choices.csv"):
        assert (folder / name).read_bytes() == (guided[0] / name).read_bytes()


def test_a_search_under_a_time_limit_gets_further_each_time_and_ends_the_same(
    guided: tuple[Path, Outcome, list[Event]], tmp_path: Path
) -> None:
    """The reference, a layer's probes, a candidate and the final training: one piece of work each time."""
    folder, stops = tmp_path / "run", 0
    while True:
        try:
            run_study(GUIDED, RunFolder(folder), Notes(), Deadline(0))
            break
        except TimeUp:
            stops += 1
    layers = len(legal_rates(TINY))
    epochs = sum(one.epochs for one in guided[1].evaluations)
    assert stops >= epochs - len(guided[1].evaluations) + layers
    for name in ("candidates.csv", "probes.csv", "choices.csv"):
        assert (folder / name).read_bytes() == (guided[0] / name).read_bytes()


def test_a_report_can_be_made_where_the_policy_is_gone(
    guided: tuple[Path, Outcome, list[Event]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(guided[0], tmp_path / "copy"))
    assert reported(folder).winner == guided[1].winner
    assert "Why this plan" in (folder / "report.html").read_text()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "policy": "uninstalled"}))
    assert reported(folder).winner == guided[1].winner
    assert "Why this plan" not in (folder / "report.html").read_text()


def test_from_scratch_the_regular_network_is_trained_to_be_probed(tmp_path: Path) -> None:
    request = replace(GUIDED, fidelity=Fidelity())
    outcome, _ = go(tmp_path / "run", 1, request, LayerGuided())
    assert [(one.role, one.parent) for one in outcome.evaluations] == [("reference", None), ("candidate", None)]
    assert (tmp_path / "run" / "probes.csv").is_file()


def test_within_the_budget_the_regular_network_may_win(tmp_path: Path) -> None:
    """Trained from scratch with as many epochs, it is not trained on."""
    request = replace(WARM, constraints=Constraints(conv_macs=811_008), fidelity=Fidelity(True, final_epochs=1))
    outcome, notes = go(tmp_path / "run", 1, request)
    (one,) = outcome.evaluations
    assert (one.role, one.plan) == ("candidate", regular(TINY))
    assert outcome.headline().startswith("winner: candidate 0 (regular), 0.811 MMAC, ")
    assert (notes.started, notes.begun) == ([0], [(1, 0)])


def test_a_winner_whose_ancestors_are_lost_is_trained_again_from_them(
    warm: Path, children: tuple[Path, Outcome, list[Event]]
) -> None:
    """The same networks come out."""
    shutil.rmtree(warm / "best")
    for path in warm.glob("candidates/*/*.safetensors"):
        path.unlink()
    outcome, notes = go(warm, request=WARM)
    assert notes.started == []
    assert replace(outcome, folder=children[1].folder) == children[1]
    best = [read_tensors(folder / "best" / "quantized.safetensors")[0] for folder in (warm, children[0])]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    assert (warm / "candidates.csv").read_bytes() == (children[0] / "candidates.csv").read_bytes()


# Runs of versions before

SINCE = {"role", "parent", "inherited_epochs", "zero_shot_accuracy", "accuracies"}
"""What evaluations have since networks start from others."""


@pytest.fixture
def old(run: Path) -> Path:
    """The uninterrupted search as a version left it that knew of no warm start."""
    config = json.loads((run / "config.json").read_text())
    del config["fidelity"], config["recipe"]["warm_share"], config["recipe"]["warm_rate"]
    del config["constraints"]["metric"], config["recipe"]["class_weights"], config["data"]["images"]
    del config["numerics"]["fused"], config["numerics"]["group_widths"]
    (run / "config.json").write_text(json.dumps(config))
    for path in [*run.glob("candidates/*/evaluation.json"), *run.glob("best/*.json")]:
        path.write_text(json.dumps(without(json.loads(path.read_text()))))
    lines = []
    for line in (run / "journal.log").read_text().splitlines():
        entry = json.loads(line)
        if EVALUATION in entry.get("system_attr", {}):
            entry["op_code"] = JournalOperation.SET_TRIAL_USER_ATTR
            entry["user_attr"] = {"evaluation": without(json.loads(entry.pop("system_attr")[EVALUATION]))}
        if not entry.get("user_attr", {}).keys() & {"role", "start", "planned_epochs"}:
            lines.append(json.dumps(entry))
    (run / "journal.log").write_text("".join(f"{line}\n" for line in lines))
    return run


def without(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in evaluation.items() if name not in SINCE}


def test_a_report_of_an_old_run_can_be_made(old: Path, whole: tuple[Path, Outcome]) -> None:
    (old / "report.html").unlink()
    outcome = reported(old)
    assert outcome.evaluations == tuple(replace(one, accuracies=()) for one in whole[1].evaluations)
    assert outcome.headline().partition("; files in ")[0] == whole[1].headline().partition("; files in ")[0]
    page = (old / "report.html").read_text()
    assert "<th>warm start</th>" not in page
    assert pd.read_csv(old / "candidates.csv")["role"].tolist() == ["candidate", "candidate"]
    assert open_run(old).find([])[0].evaluation.number == whole[1].winner.number  # type: ignore[union-attr]


@pytest.mark.parametrize("request_", [SEARCH, WARM], ids=["cold", "warm"])
def test_an_old_run_does_not_go_on(old: Path, request_: Request) -> None:
    before = files_in(old)
    with pytest.raises(FnetError) as caught:
        go(old, 3, request_)
    assert str(caught.value) == f"{old} was made by an earlier version, which trained otherwise; choose another `out`"
    assert files_in(old) == before
