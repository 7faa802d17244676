import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

import fnet_search
from fnet_policies import Random, ReversePyramid
from fnet_search import AskTell, Evaluation, FnetError, PolicySampler, evaluate, report_evaluation, search, suggest_plan
from fnet_search.arch.plan import make_plan, parse_plan, regular
from fnet_search.engine.request import Machine
from fnet_search.importing.spaces import load_space
from fnet_search.optuna_bridge.trials import EVALUATION, index_distributions, index_parameters, suggestion_attributes
from tests.support.command_line import files_in

pytestmark = pytest.mark.usefixtures("one_picture")

PLAIN = Machine(workers=0, dtype="float32", fused=False)


@pytest.mark.slow
def test_the_tour_of_the_readme(tmp_path: Path) -> None:
    """As a script, which workers must not run again."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    tour = re.search(r"<!-- tour -->\n```python\n(.*?)```", readme, re.DOTALL)
    assert tour is not None
    (tmp_path / "tour.py").write_text(tour[1])
    assert len([line for line in tour[1].splitlines() if line]) <= 10
    done = subprocess.run([sys.executable, "tour.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"best: conv_8=\d+,conv_16_1=\d+,conv_16_2=\d+, \d+\.\d\d % in quint8", lines[-1])
    assert sum(re.match(r"winner: candidate \d ", line) is not None for line in lines) == 1
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "evaluate-tiny-digits-validation",
        "tiny-digits-layer-guided-60pct",
    ]


def test_names_are_loaded_when_they_are_used() -> None:
    code = (
        "import sys, fnet_search; assert not {'torch', 'optuna', 'numpy'} & sys.modules.keys();"
        "from fnet_search import AskTell, PolicySampler, SamplerPolicy; assert 'torch' not in sys.modules;"
        "assert callable(fnet_search.search);"
        "from fnet_search import *; assert callable(evaluate)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(fnet_search.__all__) <= set(dir(fnet_search))
    with pytest.raises(AttributeError, match="module 'fnet_search' has no attribute 'serach'"):
        _ = fnet_search.serach


def test_every_public_name_is_documented() -> None:
    assert set(fnet_search.__all__) == fnet_search._API.keys()
    for name in fnet_search.__all__:
        text = inspect.getdoc(getattr(fnet_search, name))
        assert text is not None, name
        assert len(text) > 40, name
    for name in ("search", "evaluate", "suggest_plan", "report_evaluation", "load_space", "parse_plan"):
        assert "aises" in (inspect.getdoc(getattr(fnet_search, name)) or ""), name


def test_a_policy_may_be_an_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    verbosity = optuna.logging.get_verbosity()
    asked = {"budget": 600_000, "trials": 1, "epochs": 1, "warm_start": False, "machine": PLAIN}
    outcome = search("tiny", policy=ReversePyramid(), **asked)
    assert outcome.folder == Path("runs/tiny-digits-ReversePyramid-600000")
    assert [one.state for one in outcome.evaluations] == ["refused", "complete"]
    assert outcome.winner is not None
    assert outcome.winner.plan == outcome.evaluation("init2").plan
    assert optuna.logging.get_verbosity() == verbosity
    before = files_in(tmp_path)
    again = search("tiny", policy=ReversePyramid(), **asked)
    assert again.evaluations == outcome.evaluations
    assert {name for name, text in files_in(tmp_path).items() if before.get(name) != text} <= {
        "runs/tiny-digits-ReversePyramid-600000/report.html",
        "runs/tiny-digits-ReversePyramid-600000/journal.log",
    }


def test_one_policy_suggests_the_same_in_a_run_in_optuna_and_in_a_bare_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given what the run measured, reference and refused plans included."""
    monkeypatch.chdir(tmp_path)
    run = search("tiny", budget="80%", policy="random", trials=3, epochs=1, final_epochs=0, seed=5, machine=PLAIN)
    measured = {one.plan: one for one in run.evaluations}
    assert [one.role for one in run.evaluations] == ["reference", *["candidate"] * 3]

    loop = AskTell(Random(), run.space, run.constraints, seed=5, evaluations=run.evaluations[:1])
    while len(loop.evaluations) < len(run.evaluations):
        plan = loop.ask()
        assert plan is not None
        loop.tell(measured[plan])
    assert loop.evaluations == run.evaluations

    sampler = PolicySampler(Random(), run.space, constraints=run.constraints, seed=5)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trial(optuna.create_trial(value=0.0, **described(run.evaluations[0])))
    study.optimize(lambda trial: report_evaluation(trial, measured[suggest_plan(trial, run.space)]), n_trials=3)
    assert sampler.history(study).evaluations == run.evaluations


def described(one: Evaluation) -> dict[str, Any]:
    """An evaluation as a finished trial: the way into a study that it was not measured in."""
    space = load_space("tiny")
    return {
        "params": index_parameters(space, one.plan),
        "distributions": index_distributions(space),
        "user_attrs": suggestion_attributes(space, one.number, one.plan),
        "system_attrs": {EVALUATION: one.to_json()},
    }


def test_plans_on_the_validation_split_have_no_winner_and_leave_the_test_images_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    space = load_space("tiny")
    first = evaluate("init2", space, split="validation", epochs=1, machine=PLAIN)
    assert (first.winner, first.test) == (None, None)
    one = first.evaluation("init2")
    assert (one.split, one.images) == ("validation", 287)  # a fifth of 1,437 training images, by class
    assert not (first.folder / "best").exists()
    plan = make_plan(space, {"conv_8": 4})
    both = evaluate(["init2", plan], space, split="validation", epochs=1, machine=PLAIN)
    assert both.evaluation("init2") == one
    assert both.evaluation(plan).plan == plan
    assert "each measured on the validation split" in both.report.read_text()
    with pytest.raises(FnetError, match="plan dws was not evaluated in runs/evaluate-tiny-digits-validation"):
        both.evaluation(parse_plan(space, "dws"))


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"budget": "12 parsecs"}, "malformed budget '12 parsecs'; write 120MMAC"),
        ({"budget": "1%"}, "below the smallest network of space 'tiny'"),
        ({"policy": "tep"}, "unknown policy 'tep'; did you mean 'tpe'?"),
        ({"policy": 7}, "policy 'int' has no method suggest(history)"),
        ({"policy": ReversePyramid}, "ReversePyramid is a class; give a policy, as in ReversePyramid()"),
        ({"scheme": "percentile:99"}, "unknown range method 'percentile:99'"),
        ({"min_quint8": 1.5}, "'1.5' must be above 0 and at most 1"),
        ({"warm_epochs": 0.25, "warm_start": False}, "requires `warm_start`; set that too"),
        ({"warm_epochs": -1}, "-1 must be a whole number or a part of one epoch"),
        ({"recipe": "slow"}, "unknown recipe 'slow'"),
        ({"epochs": 0}, "`epochs` must be at least 1"),
        ({"trials": 0}, "`trials` must be at least 1, not 0"),
        ({"final_epochs": -1}, "`final_epochs` must be at least 0, not -1"),
        ({"seed": -1}, "`seed` must be from 0 to 4294967295, not -1"),
        ({"space": Path("mine.toml")}, "mine.toml"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_search_is_said_before_anything_is_written(
    asked: dict[str, Any], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FnetError) as caught:
        search(**{"space": "tiny", "budget": "60%", **asked})
    assert complaint in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("plans", "asked", "complaint"),
    [
        ("init2", {"split": "validaton"}, "unknown split 'validaton'; did you mean 'validation'?"),
        ([], {}, "no plan is given; name one, as in init2"),
        ("init3", {}, "unknown plan 'init3'"),
        (regular(load_space("factorizenet")), {}, "'conv_64_1'"),
        ("init2", {"seed": 2**32}, "`seed` must be from 0 to 4294967295"),
    ],
    ids=str,
)
def test_what_is_wrong_with_an_evaluation_is_said_before_anything_is_written(
    plans: Any, asked: dict[str, Any], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FnetError) as caught:
        evaluate(plans, "tiny", **asked)
    assert complaint in str(caught.value)
    assert list(tmp_path.iterdir()) == []
