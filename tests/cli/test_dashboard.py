"""In a real browser, where there is one: Chromium or Chrome on the PATH, or what Playwright has installed."""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.artifacts import get_all_artifact_meta

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import label, legal_rates, make_plan, regular, uniform
from fnet_search.base.units import mmac
from fnet_search.importing.spaces import load_space
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.metric import ClassResult
from fnet_search.report.figures import run_figures, save_figures
from fnet_search.report.html_report import write_report
from fnet_search.rundir.recorded_run import open_run
from tests.support.command_line import PLAIN, Result, in_process
from tests.support.evaluations import failed, outcome, refused, trained

pytest.importorskip("optuna_dashboard", reason="no dashboard: install fnet-search[dashboard]")

from fnet_search.cli.dashboard import open_dashboard, pareto_figure, study_note, trial_note

pytestmark = pytest.mark.slow
TINY = load_space("tiny")
EVIL = "<script>window.evil=1<|script>"
"""The name of a study; a slash would lead into another folder."""


@contextmanager
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="no browser: install playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    with sync.sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pyramids, the first refused, on digits."""
    cwd = tmp_path_factory.mktemp("dashboard")
    asked = ("--space", "tiny", "--budget", "80%", "--epochs", "1", "--trials", "2", "--final-epochs", "0")
    code, _, err = in_process("run", "--policy", "reverse-pyramid", *asked, "--out", str(cwd / EVIL), *PLAIN)
    assert code == 0, err
    return cwd / EVIL


def test_a_browser_shows_the_run(run: Path) -> None:
    shown = open_dashboard(open_run(run), None)
    shown.annotate()
    opened = open_run(run)
    with shown.serve("127.0.0.1", 0) as server, browser() as chromium:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = chromium.new_page(viewport={"width": 1400, "height": 1000})
        wrong = list[str]()
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        url = f"http://127.0.0.1:{server.server_port}/dashboard/studies/{shown.study._study_id}"

        def text(path: str, wanted: str) -> str:
            page.goto(url + path)
            page.get_by_text(wanted).first.wait_for(timeout=30_000)
            return str(page.inner_text("body"))

        # The study's note explains the search and names the winner.
        assert opened.winner is not None
        winner = opened.winner.evaluation
        note = text("/note", "Constraints:")
        assert EVIL in note
        assert "conv MACs at most 0.649 MMAC." in note
        assert "3 trained, 1 refused before training." in note
        assert f"Winner: candidate {winner.number}, {label(opened.space, winner.plan)}, " in note

        # The table has what is known of each trial as columns, and sorts by them.
        table = text("/smartSelection", "UserAttribute conv_macs")
        for name in ("plan", "conv_macs", "fp32_accuracy", "quint8_accuracy", "feasible", "reason"):
            assert f"UserAttribute {name}" in table.replace("\n", " ")
        assert "696,320 conv MACs exceed the budget of 648,806" in table
        heads = [cell.inner_text().splitlines() for cell in page.get_by_role("columnheader").all()]
        sortable = {head[0] for head in heads if len(head) > 1}  # only numbers are
        wanted = ("conv_macs", "fp32_accuracy", "quint8_accuracy", "feasible")
        assert {f"UserAttribute {name}" for name in wanted} <= sortable
        column = [head[0] for head in heads].index("UserAttribute conv_macs")
        page.get_by_role("columnheader").nth(column).locator("span").first.click()
        rows = page.get_by_role("row").all()[1:]
        macs = [int(row.get_by_role("cell").nth(column).inner_text()) for row in rows]
        assert len(macs) == 4
        assert macs in (sorted(macs), sorted(macs, reverse=True))

        # Each trial's note has its layers; its artifacts open; nothing is wider than the page.
        trial = next(one for one in shown.study.trials if one.user_attrs["number"] == winner.number)
        layers = text(f"/trials?numbers={trial.number}", "folded weights")
        for one in winner.layers:
            assert one.layer in layers
        assert page.evaluate("document.documentElement.scrollWidth") <= 1400
        with page.expect_download() as download:
            page.get_by_role("link").filter(has=page.locator("[data-testid=DownloadIcon]")).first.click()
        assert download.value.suggested_filename in ("layers.csv", "plan.toml")
        refusal = text(f"/trials?numbers={_refused(shown.study)}", "Why:")
        assert "Why: 696,320 conv MACs exceed the budget of 648,806" in refusal

        # The Pareto picture, and the figures of the study.
        overview = text("", "Accuracy against MACs")
        assert "MACs in convolutions (MMAC)" in overview
        names = [meta.filename for meta in get_all_artifact_meta(shown.study)]
        assert {"accuracy_vs_macs.png", "layer_ranges.png", "layer_precisions.png"} <= set(names)
        images = page.locator("img")
        images.first.wait_for(timeout=30_000)
        assert all(page.evaluate("[...document.images].map(one => one.complete && one.naturalWidth > 0)"))
        assert page.evaluate("window.evil") is None
        assert wrong == []
        server.shutdown()


def _refused(study: Any) -> int:
    return next(trial.number for trial in study.trials if "reason" in trial.user_attrs)


def test_a_report_of_many_layers_is_no_wider_than_its_page(tmp_path: Path) -> None:
    space = load_space("resnet20")
    plan = make_plan(space, {name: rates[-1] for name, rates in legal_rates(space).items()})
    best = trained(space, plan, 0, 0.5, 0.4)
    found = outcome(space, Constraints(), [best], tmp_path)
    write_report(found, "study", {}, save_figures(run_figures(found), tmp_path))
    with browser() as chromium:
        for width in (1400, 500):
            page = chromium.new_page(viewport={"width": width, "height": 1000})
            page.goto(found.report.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        rates = page.locator("#candidate-0 .plan")
        assert not rates.is_visible()  # until it is asked for: eighteen lines
        page.get_by_text("rates", exact=True).click()
        assert rates.is_visible()
        assert rates.inner_text() == str(plan)


def test_annotating_again_writes_nothing(finished: tuple[Path, Result], tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    shown = open_dashboard(open_run(run), None)
    shown.annotate()
    before = (run / "journal.log").read_bytes()
    shown.annotate()
    assert (run / "journal.log").read_bytes() == before


def test_what_is_wrong_is_said_in_a_line(refused: Callable[..., str], finished: tuple[Path, Result]) -> None:
    assert refused("dashboard", "nothing") == "nothing is not a run folder: it has no config.json"
    assert "'--port': 99999 is not in the range" in refused("dashboard", str(finished[0]), "--port", "99999")
    message = refused("dashboard", str(finished[0]), "--host", "256.0.0.1")
    assert message.startswith("cannot listen on 256.0.0.1:8080 (")
    assert message.endswith("; choose another --port or --host")


def test_names_are_text() -> None:
    space = load_space("tiny")
    object.__setattr__(space, "description", "<img src=x onerror=alert(1)> *not* `code`")
    note = study_note(space, Constraints(), [], [], "imagefolder:<b>")
    assert "<" not in note.replace("&lt;", "")
    assert "&lt;img src=x onerror=alert(1)&gt; \\*not\\* &#96;code&#96;" in note
    assert "**Trials:** none yet." in note
    assert "**Constraints:** none." in note


def test_notes_say_what_became_of_a_candidate() -> None:
    limits = Constraints(conv_macs=plan_cost(TINY, uniform(TINY, 2)).conv_macs, max_drop=0.05)
    one = trained(TINY, uniform(TINY, 2), 3, 0.8, 0.7)
    note = trial_note(TINY, limits, one)
    assert f"**Candidate 3** (candidate, trained): `f2`, {mmac(one.cost.conv_macs)}, " in note
    assert "feasible: no" in note
    assert "validation fp32 80.00 %, quint8 70.00 %." in note
    assert "relative drop 12.50 % (percentile:1)." in note
    assert note.count("\n|") == 2 + len(one.layers)
    bad = trial_note(TINY, limits, failed(TINY, regular(TINY), 4, "loss is <NaN>"))
    assert "**Candidate 4** (candidate, failed)" in bad
    assert "Why: loss is &lt;NaN&gt;" in bad
    assert "|" not in bad
    nearest = study_note(TINY, limits, [one], [one], "digits, policy random")
    assert "**None is feasible; nearest**: candidate 3" in nearest


def test_balanced_accuracy_is_noted_and_drawn() -> None:
    limits = Constraints(metric="balanced-accuracy")
    classes = (ClassResult(90, 81, 90, 85, 100, "cat"), ClassResult(10, 5, 0, 15, 0, "dog"))
    one = replace(trained(TINY, uniform(TINY, 2), 3, 0.86, 0.9), classes=classes)
    note = trial_note(TINY, limits, one)
    assert "balanced accuracy fp32 70.00 %, quint8 50.00 %." in note
    assert "Note: quint8 predicts class 'cat' for every image." in note
    assert "validation balanced accuracy 70.00 % fp32, 50.00 % quint8" in study_note(TINY, limits, [one], [one], "x")
    figure = pareto_figure(TINY, limits, [one], [one])
    assert [list(trace.y) for trace in figure.data if trace.name == "winner"] == [[50.0]]


def test_the_pareto_picture_has_the_front() -> None:
    limits = Constraints(conv_macs=plan_cost(TINY, uniform(TINY, 2)).conv_macs)
    accuracies = {2: 0.7, 4: 0.75, 8: 0.6, 16: 0.65}
    some = [trained(TINY, uniform(TINY, rate), rate, 0.9, reached) for rate, reached in accuracies.items()]
    over = trained(TINY, regular(TINY), 1, 0.9, 0.8)
    figure = pareto_figure(TINY, limits, [*some, over, refused(TINY, uniform(TINY, 1), 9)], [some[1]])
    drawn = {trace.name: list(zip(trace.x, trace.y, strict=True)) for trace in figure.data}
    macs = {rate: plan_cost(TINY, uniform(TINY, rate)).conv_macs / 1e6 for rate in (1, *accuracies)}
    front, best = [], 0.0
    for rate in sorted(accuracies, key=lambda rate: macs[rate]):
        if accuracies[rate] > best:
            best = accuracies[rate]
            front.append((macs[rate], 100 * best))
    assert drawn["front"] == front
    assert drawn["infeasible"] == [(macs[1], 80.0)]
    assert drawn["winner"] == [(macs[4], 75.0)]
    assert len(drawn["feasible"]) == 4
