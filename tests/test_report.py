import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from evaluations import failed, paper_evaluations, refused, residual_space, trained
from PIL import Image

from fnet_search.macro import Macroarchitecture, load_space
from fnet_search.plan import make_plan, regular
from fnet_search.policy import Constraints, Evaluation, LayerStats, ranking
from fnet_search.report import DETAILED, GLOSSARY, candidates_frame, layers_frame, write_report

SPACE = load_space("factorizenet")
BUDGET = Constraints(conv_macs=120_000_000)
PAPER = paper_evaluations(SPACE)
INIT2 = PAPER[5]
ODD = (
    refused(SPACE, make_plan(SPACE, {"conv_64_1": 2}), 8, "252,000,000 conv MACs exceed the budget of 120,000,000"),
    failed(SPACE, make_plan(SPACE, {"conv_64_1": 4}), 9, "loss became NaN & stayed so <twice>"),
)
COLUMNS = (
    "number,plan,label,state,reason,feasible,split,scheme,epochs,trained_images,conv_macs,total_macs,params,"
    "fp32_accuracy,quint8_accuracy,qmse,qce,kl,relative_drop,audited_codes,differing_codes"
)


class Page(HTMLParser):
    """Text, tags and images of a page; fails where a tag is closed that is not open."""

    VOID = frozenset({"meta", "img", "wbr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def attributes(self, tag: str, name: str) -> list[str | None]:
        return [attrs[name] for found, attrs in self.tags if found == tag and name in attrs]


def report(
    folder: Path,
    evaluations: Sequence[Evaluation],
    constraints: Constraints = BUDGET,
    space: Macroarchitecture = SPACE,
    title: str = "study",
    best_test: Evaluation | None = None,
    settings: Mapping[str, str] | None = None,
) -> tuple[str, Page]:
    best = next(iter(ranking(tuple(evaluations), constraints)), None)
    path = write_report(folder, title, space, constraints, evaluations, settings or {}, best, best_test, "validation")
    assert path == folder / "report.html"
    assert [file.name for file in folder.iterdir()] == ["report.html"]
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    tested = replace(INIT2, split="test", fp32_accuracy=0.8523, quint8_accuracy=0.7977)
    return report(
        tmp_path_factory.mktemp("run"),
        (*PAPER, *ODD),
        best_test=tested,
        settings={"policy": "tpe", "data": "imagefolder:a&b"},
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
    html, page = report(tmp_path, evaluations, Constraints(), renamed, nasty, settings={nasty: nasty})
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
    _, page = report(tmp_path, evaluations)
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


# The tables


def test_candidates_frame_has_a_row_an_evaluation_in_order(tmp_path: Path) -> None:
    frame = candidates_frame(SPACE, BUDGET, (*ODD, *PAPER[::-1]))
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
    assert frame.loc[8:, "fp32_accuracy":].isna().all().all()


def test_candidates_csv_is_stable_and_reads_back() -> None:
    frame = candidates_frame(SPACE, BUDGET, (*PAPER, *ODD))
    text = frame.to_csv(index=False)
    assert candidates_frame(SPACE, BUDGET, (*ODD, *PAPER)).to_csv(index=False) == text
    assert text.splitlines()[0] == COLUMNS
    again = pd.read_csv(io.StringIO(text), keep_default_na=False, na_values={"qmse": [""]})
    assert list(again["qmse"][:8]) == [one.qmse for one in PAPER]  # every bit of a float is written
    only_refused = candidates_frame(SPACE, BUDGET, ODD[:1]).to_csv(index=False)
    assert only_refused.splitlines()[1] == text.splitlines()[9]  # a column without numbers changes nothing


def test_no_evaluation_gives_the_columns() -> None:
    assert candidates_frame(SPACE, BUDGET, ()).to_csv(index=False).strip() == COLUMNS
    assert list(layers_frame(ODD[0]).columns) == [field.name for field in fields(LayerStats)]


def test_layers_frame_has_every_field_of_every_layer() -> None:
    first = replace(INIT2.layers[0], weight_sqnr_db=None)
    frame = layers_frame(replace(INIT2, layers=(first, *INIT2.layers[1:])))
    assert list(frame.columns) == [field.name for field in fields(LayerStats)]
    assert list(frame["layer"]) == [layer.layer for layer in INIT2.layers]
    for layer, (_, row) in zip(INIT2.layers[1:], list(frame.iterrows())[1:], strict=True):
        assert row.to_dict() == {field.name: getattr(layer, field.name) for field in fields(LayerStats)}
    assert frame["weight_sqnr_db"].isna().sum() == 1
    assert frame.to_csv(index=False).splitlines()[1].count(",,") == 1
