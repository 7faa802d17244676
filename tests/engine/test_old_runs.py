"""Runs of versions before."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from optuna.storages.journal._storage import JournalOperation

from fnet_search.base.errors import FnetError
from fnet_search.engine.request import Request
from fnet_search.optuna_bridge.trials import EVALUATION
from fnet_search.report.outcome import Outcome
from fnet_search.rundir.recorded_run import open_run
from tests.support.command_line import files_in
from tests.support.runs import SEARCH, WARM, go, reported

pytestmark = pytest.mark.usefixtures("one_picture")


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
    assert str(caught.value) == f"{old} was made by an earlier version, which trained differently; choose another `out`"
    assert files_in(old) == before
