"""How many images each class has, and what the winner makes of each: in a run, its files and its report."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fnet_search.arch.plan import regular
from fnet_search.engine.reporting import open_record
from fnet_search.engine.request import completed
from fnet_search.importing.spaces import load_space
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.metric import ClassResult
from fnet_search.policy.significance import score_interval
from fnet_search.report.class_balance import (
    SHOWN,
    balance_warnings,
    classes_section,
    confusion_csv,
    counts_line,
    read_confusion,
)
from fnet_search.rundir.recorded_run import open_run
from fnet_search.rundir.run_folder import read_evaluation
from tests.support.command_line import SMALL, TINY, Result
from tests.support.evaluations import trained

pytestmark = pytest.mark.usefixtures("one_picture")

SPACE = load_space("tiny")
PETS = ("cat", "dog", "ship")
COUNTS = {"training": [480, 160, 32], "validation": [120, 40, 8], "test": [300, 100, 40]}


def test_few_classes_are_counted_each_and_many_by_their_extremes() -> None:
    assert counts_line(PETS, COUNTS) == "training images: 480 cat, 160 dog, 32 ship"
    many = [f"c{number}" for number in range(100)]
    line = counts_line(many, {"training": [1_500 - number for number in range(100)]})
    assert line == "training images: 100 classes, from 1,401 (c99) to 1,500 (c0)"


@pytest.mark.parametrize(("fewest", "warned"), [(48, False), (47, True), (1, True)])
def test_a_class_below_a_tenth_of_the_largest_is_warned_of(fewest: int, warned: bool) -> None:
    found = balance_warnings(PETS, {"training": [480, 160, fewest]})
    said = f"less than a tenth of the 480 training images of cat: ship ({fewest});"
    assert [one.startswith(said) for one in found] == [True] * warned


def test_a_class_that_is_missing_from_a_split_is_warned_of() -> None:
    assert balance_warnings(PETS, {"training": [9, 9, 9], "test": [4, 0, 3]}) == [
        "no image in the test split: dog; nothing is known of them there"
    ]
    many = [f"c{number}" for number in range(9)]
    assert balance_warnings(many, {"training": [9] * 9, "validation": [1, 0, 0, 0, 0, 0, 0, 0, 0]}) == [
        "no image in the validation split: c1, c2, c3, c4, c5 and 3 more; nothing is known of them there"
    ]


def test_a_confusion_matrix_survives_its_file(tmp_path: Path) -> None:
    names, confusion = ("a, b", 'the "c"', "ä"), [(0, 0, 5), (0, 2, 1), (2, 1, 3)]
    path = tmp_path / "confusion.csv"
    path.write_text(confusion_csv(names, confusion), encoding="utf-8")
    assert pd.read_csv(path).values.tolist() == [["a, b", "a, b", 5], ["a, b", "ä", 1], ["ä", 'the "c"', 3]]
    assert read_confusion(path, names) == confusion
    assert read_confusion(path, ("other", "classes", "x")) == []
    assert read_confusion(tmp_path / "none.csv", names) == []


def measured(names: tuple[str, ...], recalls: list[float]) -> Evaluation:
    """100 images a class, those that are wrong taken for the next class."""
    right = [round(100 * recall) for recall in recalls]
    taken = [own + 100 - before for own, before in zip(right, [right[-1], *right], strict=False)]
    classes = (
        ClassResult(100, own, own, all_, all_, name) for own, all_, name in zip(right, taken, names, strict=True)
    )
    return replace(trained(SPACE, regular(SPACE), 3, 0.5, 0.5), split="test", classes=tuple(classes))


def text_of(html: str) -> list[list[str]]:
    rows = re.findall(r"<tr.*?</tr>", html, re.DOTALL)
    return [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_the_report_has_each_class_and_what_it_is_taken_for() -> None:
    one = measured(PETS, [0.9, 0.25, 0.0])
    ((heading, html),) = classes_section(
        PETS, COUNTS, one, [(0, 0, 90), (0, 1, 10), (1, 1, 25), (1, 2, 75), (2, 0, 100)]
    )
    assert heading == "Classes"
    assert html.count('class="warning"') == 1
    assert text_of(html) == [
        ["class", "training images", "validation images", "test images", "fp32 %", "quint8 %", "predicted"],
        ["cat", "480", "120", "300", "90.00", "90.00", "190"],
        ["dog", "160", "40", "100", "25.00", "25.00", "35"],
        ["ship", "32", "8", "40", "0.00", "0.00", "75"],
        ["class", *PETS],
        ["cat", "90", "10", ""],
        ["dog", "", "25", "75"],
        ["ship", "100", "", ""],
    ]
    assert 'title="dog as ship: 75.0 %"' in html


def test_of_many_classes_the_report_has_the_worst_and_the_most_frequent_confusions() -> None:
    names = tuple(f"c{number}" for number in range(200))
    one = measured(names, [number / 200 for number in range(200)])
    confusion = [(number, (number + 1) % 200, 100 - round(number / 2)) for number in range(200)]
    ((_, html),) = classes_section(names, {"training": [50] * 200}, one, confusion)
    rows = text_of(html)
    assert len(rows) == 2 * (1 + SHOWN)
    assert [row[0] for row in rows[1 : 1 + SHOWN]] == list(names[:SHOWN])
    assert rows[2 + SHOWN] == ["c0", "c1", "100", "100.0"]
    assert f"The {SHOWN} of 200 classes with the lowest accuracy." in html
    assert len(html) < 20_000


def test_an_earlier_run_has_no_such_section() -> None:
    assert classes_section(PETS, {}, replace(measured(PETS, [1, 1, 1]), classes=()), []) == []
    ((_, html),) = classes_section(PETS, COUNTS, None, [])
    assert text_of(html)[1] == ["cat", "480", "120", "300"]


# A run


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noise, of 80, 40 and 5 images, some of it brighter; one of them has no test image."""
    root, rng = tmp_path_factory.mktemp("uneven"), np.random.default_rng(0)
    for part, counts in (("train", (80, 40, 5)), ("test", (30, 10, 0))):
        for name, count, level in zip(("dark", "grey", "light"), counts, (60, 90, 120), strict=True):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(rng.normal(level, 60, (32, 32)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def test_a_search_for_balanced_accuracy(
    images: Path, fnet: Callable[..., Result], finished: tuple[Path, Result], tmp_path: Path
) -> None:
    asked = ("run", *TINY, "--policy", "reverse-pyramid", "--epochs", "1", "--trials", "2", "--no-warm-start")
    here = ("--workers", "0", "--numerics-of", str(finished[0]), "--dataset", f"imagefolder:{images}", "--out", "run")
    balanced = ("--metric", "balanced-accuracy", "--class-weights", "balanced")
    code, out, _ = fnet(*asked, *here, *balanced)
    assert code == 0
    assert "training images: 64 dark, 32 grey, 4 light" in out
    assert "warning: less than a tenth of the 64 training images of dark: light (4);" in out
    assert "warning: no image in the test split: light;" in out
    run = tmp_path / "run"
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["images"] == {"training": [64, 32, 4], "validation": [16, 8, 1], "test": [30, 10, 0]}
    assert (config["constraints"]["metric"], config["recipe"]["class_weights"]) == ("balanced-accuracy", "balanced")
    record = open_record(open_run(run), None)
    for trial, one in zip(record.study.get_trials(), record.evaluations, strict=True):
        assert [each.images for each in one.classes] == [16, 8, 1]
        recalls = [each.quint8_right / each.images for each in one.classes]
        assert trial.value == one.quint8_balanced_accuracy == pytest.approx(sum(recalls) / 3)
        assert trial.user_attrs["quint8_balanced_accuracy"] == trial.value
        assert sum(each.quint8_right for each in one.classes) == pytest.approx(25 * one.quint8_accuracy)
        assert sum(each.quint8_predicted for each in one.classes) == 25
        reported = 48 * one.accuracies[-1]  # three times a mean over classes of 16, 8 and 1 images
        assert reported == pytest.approx(round(reported))
    winner = max(record.evaluations, key=lambda one: (one.quint8_balanced_accuracy, -one.quint8_loss))
    test = read_evaluation(run / "best" / "test.json")
    assert test.number == winner.number
    line = out.splitlines()[-1]
    for one in (winner, test):
        fp32, quint8 = (100 * score for score in one.scores("balanced-accuracy"))
        low, high = (100 * end for end in score_interval(one, "balanced-accuracy"))
        sure = f"({low:.1f} to {high:.1f}, {one.images} images)"
        assert f"{one.split} balanced accuracy fp32 {fp32:.2f} % quint8 {quint8:.2f} % {sure} (accuracy fp32" in line
    pairs = pd.read_csv(run / "best" / "confusion.csv")
    assert pairs.groupby("class")["images"].sum().to_dict() == {"dark": 30, "grey": 10}
    right = pairs[pairs["class"] == pairs["predicted"]]["images"].sum()
    assert right == sum(one.quint8_right for one in test.classes) == pytest.approx(40 * test.quint8_accuracy)
    frame = pd.read_csv(run / "candidates.csv")
    assert frame["quint8_balanced_accuracy"].tolist() == [one.quint8_balanced_accuracy for one in record.evaluations]
    page = (run / "report.html").read_text()
    assert "balanced accuracy in quint8 at" in page
    assert "<h2>Classes</h2>" in page
    (run / "report.html").unlink()
    images.rename(images.with_name("gone"))
    try:
        assert fnet("report", "run")[0] == 0
    finally:
        images.with_name("gone").rename(images)
    assert (run / "report.html").read_text() == page
    code, _, err = fnet(*asked, *here)
    assert code == 2
    assert "--class-weights: 'balanced' recorded, 'none' wanted" in err
    assert "--metric: 'balanced-accuracy' recorded, 'accuracy' wanted" in err


def test_a_run_of_a_version_that_knew_no_metric_goes_on(
    fnet: Callable[..., Result], finished: tuple[Path, Result], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / finished[0].name
    shutil.copytree(finished[0], run)
    config = json.loads((run / "config.json").read_text())
    whole = completed(config)
    del config["constraints"]["metric"], config["recipe"]["class_weights"], config["data"]["images"]
    (run / "config.json").write_text(json.dumps(config))
    assert {**completed(config), "data": whole["data"]} == whole
    before = (run / "candidates.csv").read_bytes()
    assert fnet("run", *SMALL)[0] == 0
    assert (run / "candidates.csv").read_bytes() == before
    code, _, err = fnet("run", *SMALL, "--metric", "balanced-accuracy")
    assert code == 2
    assert "--metric: 'accuracy' recorded, 'balanced-accuracy' wanted" in err
