from pathlib import Path

import optuna
import optunahub
import pytest

from fnet_search import load_space, suggest_plan

FnetProgressiveSampler = optunahub.load_local_module(
    "samplers/fnet_progressive", registry_root=str(Path(__file__).resolve().parents[3])
).FnetProgressiveSampler


@pytest.mark.parametrize(
    ("policy", "budget", "trained"),
    [
        ("reverse-pyramid", None, ["init1", "init2", "init4", "dws"]),
        ("reverse-pyramid", "80%", ["init2", "init4", "dws"]),
        ("progressive-doubling", None, ["regular", "f2", "f4", "f8", "dws"]),
    ],
)
def test_walks_its_plans_and_stops(policy: str, budget: str | None, trained: list[str]) -> None:
    study = optuna.create_study(direction="maximize", sampler=FnetProgressiveSampler("tiny", policy, budget=budget))
    study.optimize(lambda trial: 1 / len(str(suggest_plan(trial, load_space("tiny")))))
    complete = [trial for trial in study.trials if trial.state is optuna.trial.TrialState.COMPLETE]
    assert [trial.user_attrs["label"] for trial in complete] == trained
