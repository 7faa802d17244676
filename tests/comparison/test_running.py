import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import label, uniform
from fnet_search.base.errors import FnetError
from fnet_search.candidates.job import Setup
from fnet_search.comparison.definition import Comparison, Part, PublishedResult, SearchOptions, Variant
from fnet_search.comparison.result_figures import result_figures
from fnet_search.comparison.result_page import write_results
from fnet_search.comparison.results import compared_networks, result_remarks, result_rows
from fnet_search.comparison.running import ComparisonFolder, epochs, run_parts
from fnet_search.engine.request import Machine
from fnet_search.engine.search_loop import Event, Started
from fnet_search.importing.spaces import load_space
from fnet_search.rundir.recorded_run import RecordedRun
from fnet_search.rundir.run_folder import RunFolder
from fnet_search.training.deadline import Deadline, TimeUp
from fnet_search.training.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("one_picture")

TINY, QUICK = load_space("tiny"), load_recipe("quick").with_epochs(1)
HALF, MINMAX = "percentile:0.5", "minmax"
STUDY = Comparison(
    "mine",
    "What is tried",
    "digits",
    (Variant("glorot", TINY, QUICK), Variant("he", TINY, replace(QUICK, initializer="he_normal"))),
    ("f2", "dws"),
    seeds=(3, 1),
    schemes=(HALF, MINMAX),
    compare=("dws",),
    published={"f2": PublishedResult(0.9, None, 0.25)},
)
PLAIN = Machine("cpu", "float32", 1, False, workers=0)


class Notes:
    """A display that remembers."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, float]] = []
        self.said: list[str] = []
        self.started = 0

    def status(self, text: str) -> None:
        self.said.append(text)

    say = status

    def advance(self, what: str, done: int, total: int) -> None:
        if what not in self.said:
            self.said.append(what)

    def begin(self, run: RunFolder, setup: Setup, trials: int, done: int) -> None: ...

    def show(self, event: Event) -> None:
        self.started += isinstance(event, Started)

    def part(self, name: str, later: float) -> None:
        self.parts.append((name, later))


def go(
    study: Comparison, folder: Path, deadline: Deadline | None = None, like: Path | None = None
) -> tuple[dict[Part, RecordedRun], Notes]:
    """Computing like an earlier run, where one is given: what is fast is measured, and depends on what else runs."""
    notes = Notes()
    machine = PLAIN if like is None else PLAIN.computing_as(like)
    run_parts(study, ComparisonFolder(folder), machine, notes, deadline)
    return ComparisonFolder(folder).recorded(study), notes


@pytest.fixture(scope="module")
def done(one_picture: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Part, RecordedRun], Notes]:
    """The study, with its second variant, its second seed and its second scheme after all else."""
    folder = tmp_path_factory.mktemp("study") / "mine"
    first = replace(STUDY, variants=STUDY.variants[:1], seeds=(3,), schemes=(HALF,))
    assert go(first, folder)[1].started == 2
    return folder, *go(STUDY, folder)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_each_variant_and_seed_is_a_run(done: tuple[Path, dict[Part, RecordedRun], Notes]) -> None:
    folder, runs, notes = done
    assert [part.name for part in runs] == ["glorot-seed3", "glorot-seed1", "he-seed3", "he-seed1"]
    assert notes.parts == [(part.name, left) for part, left in zip(runs, (2 + 2 + 2, 2 + 2, 2, 0), strict=True)]
    assert notes.started == 3 * 2, "the first part was there"
    for part, run in runs.items():
        assert run.run.path == folder / part.name
        assert (run.config["seed"], run.config["split"]) == (part.seed, "test")
        assert run.config["recipe"]["initializer"] == part.variant.recipe.initializer
        assert [one.id for one in run.networks] == ["0", "0/minmax", "1", "1/minmax"]
        for one in run.networks:
            assert one.evaluation.audit is not None
            assert (one.evaluation.audit.images, one.evaluation.audit.differing) == (360, 0)
            assert one.evaluation.seed == part.seed
    numerics = [run.config["numerics"] for run in runs.values()]
    assert numerics == numerics[:1] * 4


def test_schemes_share_a_training_and_seeds_do_not(done: tuple[Path, dict[Part, RecordedRun], Notes]) -> None:
    found = compared_networks(STUDY, done[1])
    fp32 = {(one.part.name, one.plan, one.evaluation.scheme): one.evaluation.fp32_accuracy for one in found}
    assert len(fp32) == 4 * 2 * 2
    for part in STUDY.parts:
        for plan in STUDY.plans:
            assert fp32[part.name, plan, str(HALF)] == fp32[part.name, plan, str(MINMAX)]
    assert len({value for (_, plan, _), value in fp32.items() if plan == "f2"}) > 1
    quint8 = {one.evaluation.scheme: one.evaluation.qmse for one in found[:2]}
    assert len(set(quint8.values())) == 2


def test_a_finished_study_does_nothing_again(done: tuple[Path, dict[Part, RecordedRun], Notes], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(done[0], tmp_path / "copy"))
    runs, notes = go(STUDY, folder)
    assert notes.started == 0
    assert not any(text.startswith(("calibrating", "measuring candidate")) for text in notes.said)
    evaluations = [[[one.evaluation for one in run.networks] for run in of.values()] for of in (runs, done[1])]
    assert evaluations[0] == evaluations[1]
    results = (folder / "networks.csv").read_bytes()
    assert go(replace(STUDY, seeds=(1,)), folder)[1].started == 0
    assert sorted((folder / "networks.csv").read_text().splitlines()) == sorted(results.decode().splitlines())


def test_another_recipe_is_refused_before_anything_is_trained(
    done: tuple[Path, dict[Part, RecordedRun], Notes],
) -> None:
    """Also where only new seeds are asked for: they would be compared with the others."""
    for seeds in ((), (7,)):
        with pytest.raises(
            FnetError, match=r"glorot-seed[13] was made with another configuration \(recipe\.epochs: 1 recor"
        ):
            go(STUDY.with_options(2, seeds), done[0])
    assert not (done[0] / "glorot-seed7").exists()


def test_a_new_variant_in_front_computes_as_the_others_did(
    done: tuple[Path, dict[Part, RecordedRun], Notes], tmp_path: Path
) -> None:
    """And one that cannot be trained is said to be."""
    folder = Path(shutil.copytree(done[0] / "he-seed3", tmp_path / "mine" / "he-seed3")).parent
    path = folder / "he-seed3" / "config.json"
    config = json.loads(path.read_text())
    config["numerics"]["group_widths"] = [32, 2, 4, 8, 16]
    path.write_text(json.dumps(config))
    wild = Variant("wild", TINY, replace(QUICK, learning_rate=1e12))
    study = replace(STUDY, variants=(wild, *STUDY.variants[1:]), plans=("dws",), seeds=(3,), published={})
    runs, notes = go(study, folder)
    assert notes.started == 1
    assert [run.config["numerics"]["group_widths"] for run in runs.values()] == [[32, 2, 4, 8, 16]] * 2
    said = [
        f"wild-seed3: dws, {scheme}: failed: the loss was not finite in epoch 1 of 1 (tried 2 times)"
        for scheme in study.schemes
    ]
    assert result_remarks(study, runs) == said
    page = (folder / "results.md").read_text()
    assert all(f"- {line}" in page for line in said)
    assert "| he | dws |" in page


def test_what_is_missing_is_said(done: tuple[Path, dict[Part, RecordedRun], Notes], tmp_path: Path) -> None:
    """Two names of one plan are two rows."""
    folder = Path(shutil.copytree(done[0], tmp_path / "copy"))
    runs = ComparisonFolder(folder).recorded(STUDY)
    assert result_remarks(STUDY, runs) == []
    (folder / "he-seed1" / "candidates" / "000" / "minmax" / "evaluation.json").unlink()
    (folder / "he-seed3" / "candidates" / "001" / "minmax" / "evaluation.json").unlink()
    (folder / "he-seed3" / "candidates" / "001" / "weights.safetensors").unlink()
    study = replace(STUDY, plans=("f2", "dws", "f4"), seeds=(3, 1, 5))
    said = result_remarks(study, runs)
    assert "he-seed1: f2, minmax: not quantized yet" in said
    assert "he-seed3: dws, minmax: not quantized: its weights are gone" in said
    assert "he-seed3: f4, percentile:0.5: not trained yet" in said
    assert "he-seed5: f2, minmax: not trained yet" in said
    named = replace(STUDY, plans=("f2", "conv_8=2,conv_16_1=2,conv_16_2=2"))
    assert [row.plan for row in result_rows(named, compared_networks(named, runs))][:4:2] == list(named.plans)


def test_a_study_under_a_time_limit_gets_further_each_time_and_ends_the_same(
    done: tuple[Path, dict[Part, RecordedRun], Notes], tmp_path: Path
) -> None:
    """A network, or a quantization, each time."""
    study, folder, stops = replace(STUDY, variants=STUDY.variants[:1], seeds=(3,)), tmp_path / "mine", 0
    while True:
        try:
            runs, _ = go(study, folder, Deadline(0), done[0] / study.parts[0].name)
            break
        except TimeUp:
            stops += 1
    assert 2 <= stops <= 2 * 2
    (part,) = runs
    for name in ("candidates.csv", "requantized.csv"):
        assert (folder / part.name / name).read_bytes() == (done[0] / part.name / name).read_bytes()


def test_results(
    done: tuple[Path, dict[Part, RecordedRun], Notes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fnet_search.comparison.result_page.result_figures", result_figures)
    page = write_results(STUDY, done[1], tmp_path).read_text()
    found = table(tmp_path / "networks.csv")
    keys = [(one["variant"], one["seed"], one["plan"], one["scheme"]) for one in found]
    assert len(set(keys)) == len(keys) == 2 * 2 * 2 * 2
    assert keys[0] == ("glorot", "3", "f2", str(HALF))
    assert int(found[0]["conv_macs"]) == plan_cost(TINY, uniform(TINY, 2)).conv_macs
    layers = table(tmp_path / "layers.csv")
    assert {(one["variant"], one["seed"], one["plan"], one["scheme"]) for one in layers} == set(keys)
    assert [one["layer"] for one in layers[:2]] == ["conv_in", "conv_8.grouped"]

    same = [one for one in found if (one["variant"], one["plan"], one["scheme"]) == ("he", "f2", "minmax")]
    values = [100 * float(one["quint8_accuracy"]) for one in same]
    spread = abs(values[0] - values[1]) / 2**0.5
    line = next(line for line in page.splitlines() if line.startswith("| he | f2 |") and "minmax" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:5] == ["he", "f2", "0.508", "minmax", "2"]
    assert f"{fmean(values):.2f} ± {spread:.2f}" in cells
    assert ("90.00" in cells, "25.00" in cells) == (True, True)
    assert cells[-1] == f"0 of {2 * 360 * 10:,}"
    head = next(line for line in page.splitlines() if line.startswith("| variant |"))
    assert head.count("published") == 2, "of fp32 and of the drop: nobody published another number"
    pictures = ["tradeoff", "ranges-glorot", "compared-glorot", "ranges-he", "compared-he"]
    assert sorted(path.stem for path in (tmp_path / "figures").iterdir()) == sorted(pictures)
    assert all(f"(figures/{name}.png)" in page for name in pictures)
    again = (tmp_path / "figures" / "tradeoff.png").read_bytes()
    write_results(STUDY, done[1], tmp_path)
    assert (tmp_path / "figures" / "tradeoff.png").read_bytes() == again


def test_a_study_that_searches(tmp_path: Path) -> None:
    """Winners are measured on the test split, and said to be the nearest only; what each search costs is guessed from
    its recipe."""
    search = SearchOptions("random", "75%", trials=1, min_quint8="100%")
    study = replace(
        STUDY, variants=(Variant("", TINY, QUICK),), plans=(), search=search, seeds=(0, 1), schemes=(HALF,), compare=()
    )
    study = replace(study, published={})
    notes = Notes()
    run_parts(study, ComparisonFolder(tmp_path), PLAIN, notes)
    runs = ComparisonFolder(tmp_path).recorded(study)
    assert notes.parts == [("seed0", epochs(study, study.parts[0])), ("seed1", 0)]
    assert epochs(study, study.parts[0]) == 1 + 1 + 1, "reference, candidate, final training"
    found = compared_networks(study, runs)
    winners = [run.winner for run in runs.values()]
    for one, winner, run in zip(found, winners, runs.values(), strict=True):
        assert winner is not None
        assert one.evaluation == run.test(winner)
        assert (one.evaluation.split, one.label) == ("test", label(TINY, winner.evaluation.plan))
        assert one.evaluation.cost.conv_macs <= 0.75 * 811_008
        assert one.missed == ("min_quint8",)
    (row,) = result_rows(study, found)
    assert [network.part.seed for network in row.networks] == [0, 1]
    assert result_remarks(study, runs) == [
        f"seed{seed}: no candidate met the constraints; the nearest, {found[seed].label}, misses min_quint8"
        for seed in (0, 1)
    ]
    page = (tmp_path / "results.md").read_text()
    assert "(figures/tradeoff.png)" in page
    assert result_remarks(replace(study, seeds=(0, 1, 2)), runs)[2:] == ["seed2: not finished yet"]
    part, run = next(iter(runs.items()))
    (run.run.best / "test.json").unlink()
    untested = replace(run, config={**run.config, "data": {**run.config["data"], "has_test": False}})
    assert result_remarks(replace(study, seeds=(part.seed,)), {part: untested}) == [
        f"seed{part.seed}: no results, since the data set has no test images"
    ]


def test_a_part_that_was_killed_as_soon_as_it_was_begun(
    done: tuple[Path, dict[Part, RecordedRun], Notes], tmp_path: Path
) -> None:
    """Before its configuration was written, and before its table was."""
    (tmp_path / "mine" / "glorot-seed3").mkdir(parents=True)
    (tmp_path / "mine" / "glorot-seed3" / ".lock").touch()
    ComparisonFolder(tmp_path / "mine").check()
    folder = Path(shutil.copytree(done[0], tmp_path / "copy"))
    for path in (folder / "glorot-seed3").iterdir():
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, notes = go(replace(STUDY, seeds=(1,)), folder)
    assert notes.started == 0
    assert "- glorot-seed3: dws, minmax: not trained yet" in (folder / "results.md").read_text()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    study = replace(STUDY, variants=STUDY.variants[:1], seeds=(3,))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "results.md").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("run", "notes", "file"):
        with pytest.raises(
            FnetError, match=f"{name} exists and is not the folder of a comparison; choose another `out`"
        ):
            go(study, tmp_path / name)
    assert (tmp_path / "notes" / "results.md").read_text() == "mine"
