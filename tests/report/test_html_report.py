import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import make_plan, regular
from fnet_search.importing.spaces import load_space
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import MAYBE_KNOWN, Audit, Evaluation, LayerStats
from fnet_search.policy.metric import ClassResult
from fnet_search.policy.ranking import ranking
from fnet_search.report.csv_tables import COLUMNS as TYPES
from fnet_search.report.csv_tables import candidate_line, candidates_csv, layers_csv
from fnet_search.report.figures import run_figures, save_figures
from fnet_search.report.html_report import DETAILED, GLOSSARY, write_report
from tests.support.evaluations import failed, outcome, paper_evaluations, pruned, refused, residual_space, trained
from tests.support.html import Page

SPACE = load_space("factorizenet")
BUDGET = Constraints(conv_macs=120_000_000)
PAPER = paper_evaluations(SPACE)
INIT2 = PAPER[5]
ODD = (
    refused(SPACE, make_plan(SPACE, {"conv_64_1": 2}), 8, "252,000,000 conv MACs exceed the budget of 120,000,000"),
    failed(SPACE, make_plan(SPACE, {"conv_64_1": 4}), 9, "loss became NaN & stayed so <twice>"),
)
COLUMNS = (
    "number,plan,label,role,state,reason,feasible,split,validation,scheme,epochs,trained_images,parent,"
    "inherited_epochs,zero_shot_accuracy,last_epoch_accuracy,conv_macs,total_macs,params,images,fp32_accuracy,"
    "quint8_accuracy,fp32_balanced_accuracy,quint8_balanced_accuracy,fp32_loss,quint8_loss,common_scheme,"
    "common_quint8_accuracy,qmse,qce,kl,relative_drop,audited_codes,differing_codes"
)


def report(
    folder: Path,
    evaluations: Sequence[Evaluation],
    constraints: Constraints = BUDGET,
    space: Macroarchitecture = SPACE,
    title: str = "study",
    test: Evaluation | None = None,
    settings: Mapping[str, str] | None = None,
    drawn: bool = False,
) -> tuple[str, Page]:
    """The page, with all figures where they are `drawn`, which takes seconds."""
    found = outcome(space, constraints, evaluations, folder, test=test)
    pictures = save_figures(run_figures(found), folder.with_name(f"{folder.name}-figures")) if drawn else []
    write_report(found, title, settings or {}, pictures)
    assert [file.name for file in folder.iterdir()] == ["report.html"]
    html = found.report.read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    tested = replace(INIT2, split="test", fp32_accuracy=0.8523, quint8_accuracy=0.7977)
    return report(
        tmp_path_factory.mktemp("run"),
        (*PAPER, *ODD),
        test=tested,
        settings={"policy": "tpe", "data": "imagefolder:a&b"},
        drawn=True,
    )


# The page


def test_headline_names_the_winner_its_macs_and_its_accuracies(paper: tuple[str, Page]) -> None:
    _, page = paper
    head = page.text[: page.text.index("How it was searched")]
    assert "init2 won: 80.31 % in quint8 at 104.3 MMAC. It meets every constraint." in head
    for value in ("80.31 %", "86.01 %", "79.77 %", "85.23 %", "18,371,018", "39.2 % of the unfactorized"):
        assert value in head
    assert "8 trained, 1 refused before training, 1 failed" in head
    assert str(INIT2.plan) in head


def test_what_to_know_before_the_accuracies_are_believed(tmp_path: Path) -> None:
    known = replace(INIT2, validation=MAYBE_KNOWN)
    found = replace(outcome(SPACE, Constraints(min_quint8=0.9), (known,), tmp_path), has_test=False)
    write_report(found, "run", {}, [])
    text = Page(found.report.read_text(encoding="utf-8")).text
    assert f"80.31 % in quint8 on the validation images ({MAYBE_KNOWN}) are below 90.00 %." in text
    assert "The validation images are a part of the training images, which the weights may have been trained" in text
    assert "The data set has no test images (test/)" in text
    assert list(pd.read_csv(io.StringIO(csv([known])))["validation"]) == [MAYBE_KNOWN]


def test_every_candidate_is_there_with_its_numbers(paper: tuple[str, Page]) -> None:
    _, page = paper
    table = page.text[page.text.index("Candidates", page.text.index("How it was")) : page.text.index("Figures")]
    for one in (*PAPER, *ODD):
        assert str(one.plan) in table
        assert one.reason in table
    for value in ("88.37", "85.60", "3.13", "266.0", "19,759,434", "1.654", "0.5754", "0.1754"):
        assert value in table
    ids = [name for name in page.attributes("tr", "id") if name]
    assert ids[0] == f"candidate-{INIT2.number}"
    assert sorted(ids) == [f"candidate-{number}" for number in range(10)]
    assert ids[-2:] == ["candidate-8", "candidate-9"]  # those without a rank come last
    links = [link for link in page.attributes("a", "href") if link]
    assert {link.removeprefix("#") for link in links} == set(page.attributes("details", "id"))


WARM = (
    replace(PAPER[0], role="reference", epochs=10, trained_images=450_000),
    replace(INIT2, number=1, epochs=1, parent=0, inherited_epochs=10, zero_shot_accuracy=0.795, accuracies=(0.81,)),
    replace(pruned(SPACE, PAPER[4].plan, 2, (0.25, 0.3125)), parent=0, inherited_epochs=10, zero_shot_accuracy=0.125),
    replace(PAPER[7], number=3, epochs=4, accuracies=(0.5, 0.6, 0.7, 0.75)),
    replace(
        replace(INIT2, number=4, role="final", epochs=10, parent=1, inherited_epochs=11, zero_shot_accuracy=0.8601),
        **{"fp32_accuracy": 0.9, "quint8_accuracy": 0.89, "accuracies": (0.9,) * 10},
    ),
)
"""A search that started from the regular network and stopped one candidate; the last was trained on from number 1."""


def rows(html: str) -> list[list[str]]:
    """The cells of the table of candidates, as text."""
    (found,) = re.findall("<h2>Candidates</h2>.*?<tbody>(.*?)</tbody>", html, re.DOTALL)
    return [
        [Page(cell).text for cell in re.findall("<td.*?>(.*?)</td>", row, re.DOTALL)]
        for row in re.findall("<tr.*?>(.*?)</tr>", found, re.DOTALL)
    ]


def test_what_networks_started_from(tmp_path: Path) -> None:
    html, page = report(tmp_path, WARM)
    head = page.text[: page.text.index("How it was searched")]
    assert "init2 won: 89.00 % in quint8 at 104.3 MMAC." in head
    assert "Candidates: 2 trained, 1 stopped early. Images trained on in all: 945,000." in head
    shown = [(row[0], row[1], row[3], row[4], row[-1]) for row in rows(html)]
    assert shown == [
        ("1", "4", "trained on", "10 epochsfrom 1 (11 epochs), 86.01 % before", "yes"),
        ("2", "1", "trained", "1 epochfrom 0 (10 epochs), 79.50 % before", "yes"),
        ("3", "3", "trained", "4 epochs", "yes"),
        ("-", "0", "reference", "10 epochs", "no"),
        (
            *("-", "2", "prunedbehind the others after epoch 2 of 8 (31.2 %)"),
            *("2 epochsfrom 0 (10 epochs), 12.50 % before", "-"),
        ),
    ]
    for term in ("reference", "trained on", "training"):
        assert term in GLOSSARY
        assert GLOSSARY[term] in page.text


def test_a_reference_alone_is_no_winner_and_no_given_plan(tmp_path: Path) -> None:
    _, page = report(tmp_path, [WARM[0], failed(SPACE, INIT2.plan, 1)])
    assert "No candidate was trained." in page.text
    assert "Given plans" not in page.text
    assert "Candidates: 1 failed. Images trained on in all: 450,000." in page.text


def test_settings_say_how_it_was_searched(paper: tuple[str, Page]) -> None:
    _, page = paper
    for text in ("policy", "tpe", "imagefolder:a&b"):
        assert text in page.text


def test_the_winners_layers_are_shown_and_terms_explained(paper: tuple[str, Page]) -> None:
    _, page = paper
    layers = page.text[page.text.rindex("dead channels", 0, page.text.index("5: init2")) :]
    for layer in INIT2.layers:
        assert layer.layer in layers
    for term, meaning in GLOSSARY.items():
        assert term in page.text
        assert meaning in page.text


def test_page_needs_nothing_but_itself(paper: tuple[str, Page]) -> None:
    html, page = paper
    assert re.search(r"https?:|//|url\(|@import", re.sub(r"base64,[^\"]*", "", html)) is None
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    images = page.attributes("img", "src")
    assert len(images) == 8  # seven figures and the drawing
    for source in images:
        assert source is not None
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.format == "PNG"
            assert min(image.size) > 300
    assert all(page.attributes("img", "alt"))


def test_user_text_is_shown_as_text(tmp_path: Path) -> None:
    nasty = "<script>alert('x')</script> & \"$x_1$\""
    space = load_space("tiny")
    renamed = Macroarchitecture(nasty, space.input_shape, space.nodes)
    odd = failed(renamed, make_plan(renamed, {"conv_8": 2}), 1, nasty)
    evaluations = (trained(renamed, regular(renamed), 0, 0.9, 0.8), odd)
    html, page = report(tmp_path, evaluations, Constraints(), renamed, nasty, settings={nasty: nasty}, drawn=True)
    assert "<script" not in html
    assert page.text.count(nasty) >= 4  # title, heading, setting's name and value, reason
    assert "script" not in {tag for tag, _ in page.tags}


def test_without_a_feasible_candidate_it_says_what_the_nearest_misses(tmp_path: Path) -> None:
    constraints = Constraints(params=10_000_000, conv_macs=120_000_000, min_quint8=0.9, max_drop=0.01)
    _, page = report(tmp_path, [replace(one, layers=()) for one in PAPER], constraints)
    best = ranking(PAPER, constraints)[0]
    head = page.text[: page.text.index("How it was searched")]
    assert "No candidate met the constraints; nearest is" in head
    assert f"{best.cost.params:,} parameters are above the limit of 10,000,000" in head
    assert "are below 90.00 %" in head
    assert "is above 1.00 %" in head
    assert "MMAC are above" not in head


@pytest.mark.parametrize("evaluations", [(), ODD], ids=["none", "none trained"])
def test_nothing_trained_is_a_page_too(tmp_path: Path, evaluations: Sequence[Evaluation]) -> None:
    _, page = report(tmp_path, evaluations, drawn=True)
    assert "No candidate was trained." in page.text
    assert page.attributes("img", "src") == []
    assert len(page.attributes("tr", "id")) == len(evaluations)


def test_values_that_were_not_measured_are_dashes(tmp_path: Path) -> None:
    layers = tuple(
        replace(layer, weight_sqnr_db=None, activation_sqnr_db=None, accumulated_sqnr_db=None)
        for layer in PAPER[0].layers
    )
    bare = replace(PAPER[0], qmse=None, qce=None, kl=None, layers=layers)
    html, page = report(tmp_path, (bare, replace(PAPER[1], layers=(), quint8_accuracy=None)), Constraints())
    assert "None" not in page.text
    assert "nan" not in page.text.lower().replace("nano", "")
    assert "Not profiled." in page.text
    assert html.count('<td class="number">-</td>') >= 3 + 3 * len(layers)


def test_a_long_search_shows_the_layers_of_the_best(tmp_path: Path) -> None:
    space = load_space("tiny")
    plans = [make_plan(space, {"conv_8": 2**a, "conv_16_1": 2**b, "conv_16_2": 2**c})
             for a in range(4) for b in range(4) for c in range(3)]  # fmt: skip
    evaluations = [trained(space, plan, number, 0.9, 0.5 + number / 1000) for number, plan in enumerate(plans)]
    _, page = report(tmp_path, evaluations, Constraints(), space)
    shown = page.attributes("details", "id")
    assert shown == [f"layers-{number}" for number in range(47, 47 - DETAILED, -1)]
    assert len(page.attributes("tr", "id")) == 48


def test_a_residual_space_and_a_second_report(tmp_path: Path) -> None:
    space = residual_space()
    evaluations = [
        trained(space, regular(space), 0, 0.9, 0.8),
        trained(space, make_plan(space, {"block1.conv1": 4}), 1, 0.9, 0.85),
    ]
    first, page = report(tmp_path, evaluations, Constraints(), space)
    assert "block1.conv1.pointwise" in page.text
    assert report(tmp_path, evaluations, Constraints(), space)[0] == first


UNEVEN = (ClassResult(90, 80, 72, 95, 100, "<cat>"), ClassResult(10, 4, 1, 5, 0, "dog"))
"""Balanced accuracies of (80 / 90 + 0.4) / 2 and (0.8 + 0.1) / 2; all images are taken for cats in quint8."""


def test_a_search_for_balanced_accuracy_names_it(tmp_path: Path) -> None:
    one = replace(INIT2, classes=UNEVEN)
    balanced = replace(BUDGET, metric="balanced-accuracy")
    page = report(tmp_path, [one], balanced, test=replace(one, split="test"))[1].text
    assert "init2 won: 45.00 % balanced accuracy in quint8 at 104.3 MMAC. It meets every constraint." in page
    for split in ("validation", "test"):
        assert f"On the {split} split quint8 predicts class '<cat>' for every image." in page
        assert f"quint8 balanced accuracy, {split}45.00 %fp32 {100 * (80 / 90 + 0.4) / 2:.2f} %" in page
    strict = replace(balanced, min_quint8=0.5, max_drop=0.1)
    drop = 1 - 0.45 / ((80 / 90 + 0.4) / 2)
    images = "the validation images"
    missed = (
        f"45.00 % balanced accuracy in quint8 on {images} are below 50.00 %; "
        f"a relative drop of {100 * drop:.2f} % on {images} is above 10.00 %"
    )
    assert f"nearest is init2: {missed}." in report(tmp_path, [one], strict)[1].text


# The tables


def csv(evaluations: Sequence[Evaluation]) -> str:
    return candidates_csv({one.number: candidate_line(SPACE, BUDGET, one) for one in evaluations})


def read(text: str) -> pd.DataFrame:
    """As a user does: empty cells are missing numbers, and empty words."""
    words = [name for name, kind in TYPES.items() if kind is str]
    return pd.read_csv(
        io.StringIO(text), keep_default_na=False, na_values={name: [""] for name in set(TYPES) - {*words}}
    )


def test_candidates_csv_has_a_line_an_evaluation_in_order() -> None:
    frame = read(csv((*ODD, *PAPER[::-1])))
    assert ",".join(frame.columns) == COLUMNS
    assert list(frame["number"]) == list(range(10))
    row = frame.iloc[5]
    assert row["plan"] == str(INIT2.plan)
    assert row["label"] == "init2"
    assert (row["conv_macs"], row["total_macs"], row["params"]) == (104_267_776, 122_103_808, 18_371_018)
    assert (row["fp32_accuracy"], row["quint8_accuracy"]) == (0.8601, 0.8031)
    assert row["relative_drop"] == INIT2.relative_drop
    assert list(frame["feasible"]) == [BUDGET.feasible(one) for one in (*PAPER, *ODD)]
    assert list(frame["reason"][-2:]) == [one.reason for one in ODD]
    assert list(frame["common_scheme"][-3:]) == [PAPER[0].scheme, "", ""]
    assert frame.drop(columns="common_scheme").loc[8:, "fp32_accuracy":].isna().all().all()
    assert list(frame["qmse"][:8]) == [one.qmse for one in PAPER]  # every bit of a float is written


def test_results_by_class_are_in_the_table() -> None:
    one = replace(PAPER[0], number=0, classes=UNEVEN)
    first, second, *_ = read(csv((one, *PAPER[1:]))).to_dict("records")
    assert first["fp32_balanced_accuracy"] == one.fp32_balanced_accuracy
    assert first["quint8_balanced_accuracy"] == one.quint8_balanced_accuracy
    assert first["reason"] == "quint8 predicts class '<cat>' for every image"
    assert pd.isna(second["quint8_balanced_accuracy"])
    assert second["reason"] == ""


def test_lines_are_those_that_pandas_writes() -> None:
    """For awkward texts and numbers too, whole numbers among the floats."""
    odd = [
        replace(INIT2, number=20, qmse=1e-7, qce=1e16, kl=0.1 + 0.2, fp32_accuracy=1, audit=Audit(1, 10, 3, 1)),
        replace(ODD[0], number=21, reason='a "b", c'),
        replace(ODD[1], number=22, reason="two\nlines; 1,5"),
    ]
    text = csv([*PAPER, *ODD, *odd])
    names = {int: "Int64", str: "str", bool: "bool", float: "float64"}
    frame = read(text).astype({name: names[kind] for name, kind in TYPES.items()})
    assert frame.to_csv(index=False, lineterminator="\n") == text
    assert list(frame["reason"][-2:]) == [one.reason for one in odd[1:]]
    assert text.splitlines()[7].startswith(f'6,"{PAPER[6].plan}",init4,')
    assert "1.0,0.8031,,,,,percentile:1,0.8031,1e-07,1e+16,0.30000000000000004" in text


def test_a_column_without_numbers_changes_nothing() -> None:
    assert csv(ODD[:1]).splitlines()[1] == csv((*PAPER, *ODD)).splitlines()[9]
    assert csv(()) == COLUMNS + "\n"


def test_layers_csv_has_every_field_of_every_layer() -> None:
    names = [field.name for field in fields(LayerStats)]
    first = replace(INIT2.layers[0], weight_sqnr_db=None)
    text = layers_csv(replace(INIT2, layers=(first, *INIT2.layers[1:])))
    frame = pd.read_csv(io.StringIO(text))
    assert list(frame.columns) == names
    assert list(frame["layer"]) == [layer.layer for layer in INIT2.layers]
    for layer, (_, row) in zip(INIT2.layers[1:], list(frame.iterrows())[1:], strict=True):
        assert row.to_dict() == {name: getattr(layer, name) for name in names}
    assert frame["weight_sqnr_db"].isna().sum() == 1
    assert text.splitlines()[1].count(",,") == 1
    assert frame.to_csv(index=False, lineterminator="\n") == text
    assert layers_csv(ODD[0]) == ",".join(names) + "\n"
