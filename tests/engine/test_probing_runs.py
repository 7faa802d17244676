"""Searches of a policy that is told of single layers."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from optuna.artifacts import get_all_artifact_meta

from fnet_policies import LayerGuided
from fnet_search.arch.plan import legal_rates
from fnet_search.engine.reporting import open_record
from fnet_search.engine.run import run_study
from fnet_search.engine.search_loop import Event, ProbesProgressed, Started
from fnet_search.report.outcome import Outcome
from fnet_search.rundir.recorded_run import open_run
from fnet_search.rundir.run_folder import RunFolder
from fnet_search.training.deadline import Deadline, TimeUp
from fnet_search.training.recipe import Fidelity
from tests.support.pictures import reports_of_one_picture
from tests.support.runs import TINY, WARM, Notes, go, reported

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
    study = open_record(open_run(folder), None).study
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


@pytest.fixture
def one_small_picture() -> Iterator[None]:
    """`guided` has all of them."""
    with reports_of_one_picture():
        yield


@pytest.mark.usefixtures("one_small_picture")
@pytest.mark.parametrize("after", [pytest.param(1, marks=pytest.mark.slow), 9])
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


@pytest.mark.usefixtures("one_small_picture")
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


@pytest.mark.usefixtures("one_small_picture")
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


@pytest.mark.usefixtures("one_small_picture")
def test_from_scratch_the_regular_network_is_trained_to_be_probed(tmp_path: Path) -> None:
    request = replace(GUIDED, fidelity=Fidelity())
    outcome, _ = go(tmp_path / "run", 1, request, LayerGuided())
    assert [(one.role, one.parent) for one in outcome.evaluations] == [("reference", None), ("candidate", None)]
    assert (tmp_path / "run" / "probes.csv").is_file()
