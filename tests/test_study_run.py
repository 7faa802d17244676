import csv
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from fnet_search.deadline import Deadline, TimeUp
from fnet_search.errors import FnetError
from fnet_search.evaluate import Setup
from fnet_search.macro import load_space
from fnet_search.plan import label, plan_cost, uniform
from fnet_search.recipe import load_recipe
from fnet_search.recorded import RecordedRun
from fnet_search.request import Machine
from fnet_search.runfolder import RunFolder
from fnet_search.scheme import parse_scheme
from fnet_search.search import Event, Started
from fnet_search.studies import Part, Published, SearchOptions, Study, Variant
from fnet_search.study_results import networks, rows, write_results
from fnet_search.study_run import StudyFolder, epochs, recorded, run_parts

TINY, QUICK = load_space("tiny"), load_recipe("quick").with_epochs(1)
HALF, MINMAX = parse_scheme("percentile:0.5"), parse_scheme("minmax")
STUDY = Study(
    "mine",
    "What is tried",
    "digits",
    (Variant("glorot", TINY, QUICK), Variant("he", TINY, replace(QUICK, initializer="he_normal"))),
    ("f2", "dws"),
    seeds=(3, 1),
    schemes=(HALF, MINMAX),
    compare=("dws",),
    published={"f2": Published(0.9, None, 0.25)},
)
PLAIN = Machine("cpu", "float32", 1, False, workers=2)


class Notes:
    """A display that remembers."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, float]] = []
        self.said: list[str] = []
        self.started = 0

    def status(self, text: str) -> None:
        self.said.append(text)

    def advance(self, what: str, done: int, total: int) -> None:
        if what not in self.said:
            self.said.append(what)

    def begin(self, run: RunFolder, setup: Setup, trials: int, done: int) -> None: ...

    def show(self, event: Event) -> None:
        self.started += isinstance(event, Started)

    def part(self, name: str, later: float) -> None:
        self.parts.append((name, later))


def go(
    study: Study, folder: Path, deadline: Deadline | None = None, like: Path | None = None
) -> tuple[dict[Part, RecordedRun], Notes]:
    """Computing like an earlier run, where one is given: what is fast is measured, and depends on what else runs."""
    notes = Notes()
    run_parts(study, StudyFolder(folder), replace(PLAIN, numerics_of=like), notes, deadline)
    return recorded(study, StudyFolder(folder)), notes


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Part, RecordedRun], Notes]:
    """The study, with its second seed and its second scheme after all else."""
    folder = tmp_path_factory.mktemp("study") / "mine"
    first = replace(STUDY, seeds=(3,), schemes=(HALF,))
    assert go(first, folder)[1].started == 2 * 2
    return folder, *go(STUDY, folder)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_each_variant_and_seed_is_a_run(done: tuple[Path, dict[Part, RecordedRun], Notes]) -> None:
    folder, runs, notes = done
    assert [part.name for part in runs] == ["glorot-seed3", "glorot-seed1", "he-seed3", "he-seed1"]
    assert notes.parts == [(part.name, 2 * left) for part, left in zip(runs, (3, 2, 1, 0), strict=True)]
    assert notes.started == 2 * 2, "of the second seed"
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
    found = networks(STUDY, done[1])
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
    assert not any(text.startswith(("quantizing", "measuring")) for text in notes.said)
    evaluations = [[[one.evaluation for one in run.networks] for run in of.values()] for of in (runs, done[1])]
    assert evaluations[0] == evaluations[1]


def test_another_recipe_is_refused(done: tuple[Path, dict[Part, RecordedRun], Notes]) -> None:
    with pytest.raises(FnetError, match=r"glorot-seed3 was made with another configuration \(recipe\.epochs: 1 recor"):
        go(STUDY.with_options(None, 2, ()), done[0])


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


def test_results(done: tuple[Path, dict[Part, RecordedRun], Notes], tmp_path: Path) -> None:
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
    """Winners are measured on the test split; what each search costs is guessed from its recipe."""
    search = SearchOptions("random", "75%", trials=1)
    study = replace(
        STUDY, variants=(Variant("", TINY, QUICK),), plans=(), search=search, seeds=(0, 1), schemes=(HALF,), compare=()
    )
    study = replace(study, published={})
    notes = Notes()
    run_parts(study, StudyFolder(tmp_path), PLAIN, notes)
    runs = recorded(study, StudyFolder(tmp_path))
    assert notes.parts == [("seed0", epochs(study, study.parts[0])), ("seed1", 0)]
    assert epochs(study, study.parts[0]) == 1 + 1 + 1, "reference, candidate, final training"
    found = networks(study, runs)
    winners = [run.winner for run in runs.values()]
    for one, winner, run in zip(found, winners, runs.values(), strict=True):
        assert winner is not None
        assert one.evaluation == run.test(winner)
        assert (one.evaluation.split, one.plan) == ("test", label(TINY, winner.evaluation.plan))
        assert one.evaluation.cost.conv_macs <= 0.75 * 811_008
    listed = rows(study, found)
    assert sorted(network.part.seed for row in listed for network in row.networks) == [0, 1]
    page = write_results(study, runs, tmp_path).read_text()
    assert "(figures/tradeoff.png)" in page
