"""The line that a run ends with."""

from dataclasses import replace
from pathlib import Path

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import parse_plan
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.metric import ClassResult
from fnet_search.policy.significance import as_bits, interval
from fnet_search.report.outcome import Outcome
from tests.support.evaluations import trained
from tests.support.runs import TINY


def test_headlines(tmp_path: Path) -> None:
    plan = parse_plan(TINY, "init2")
    strict = Constraints(conv_macs=600_000, min_quint8=0.9, max_drop=0.05)
    near = trained(TINY, plan, 4, 0.9, 0.8)
    outcome = Outcome(Path("x"), TINY, strict, "validation", (near,), near, replace(near, split="test"))
    accuracies = "fp32 90.00 % quint8 80.00 %"
    found = f"candidate 4 (init2), 0.434 MMAC, validation {accuracies}; test {accuracies}"
    missed = "no candidate met the constraints; nearest, missing min_quint8, max_drop:"
    found, place = (
        f"{found}; constraints checked on the validation images",
        "; quantized with percentile:1; files in x/best",
    )
    assert outcome.headline() == f"{missed} {found}{place}"
    assert replace(outcome, constraints=Constraints(min_quint8=0.8)).headline() == f"winner: {found}{place}"
    assert replace(outcome, winner=None).headline() == "1 network measured; files in x"
    reference = replace(near, role="reference")
    assert replace(outcome, winner=None, evaluations=(reference,)).headline() == ("no candidate was trained; see x")
    final = replace(near, number=7, role="final", parent=4)
    assert replace(outcome, winner=final, test=None).headline() == (
        f"{missed} candidate 7 (init2, candidate 4 trained on), 0.434 MMAC, validation {accuracies}"
        f"; constraints checked on the validation images{place}"
    )
    assert replace(outcome, winner=None, evaluations=()).headline() == "no candidate was trained; see x"
    always = (ClassResult(90, 81, 90, 85, 100, "cat"), ClassResult(10, 9, 0, 15, 0, "dog"))
    one = replace(near, classes=always, quint8_accuracy=0.9)
    balanced = replace(outcome, constraints=Constraints(metric="balanced-accuracy"), winner=one, test=None)
    assert balanced.headline() == (
        "winner: candidate 4 (init2), 0.434 MMAC, validation balanced accuracy fp32 90.00 % quint8 50.00 % "
        f"(accuracy fp32 90.00 % quint8 90.00 %) (quint8 predicts class 'cat' for every image){place}"
    )


def test_the_headline_says_how_sure_the_winner_is(tmp_path: Path) -> None:
    """And which is the cheapest of those that the same images do not tell from it."""
    cheap, dear = parse_plan(TINY, "f4"), parse_plan(TINY, "f2")
    best = replace(trained(TINY, dear, 3, 0.95, 0.9), images=200, right=as_bits([True] * 180 + [False] * 20))
    near = replace(trained(TINY, cheap, 1, 0.95, 0.885), images=200, right=as_bits([True] * 177 + [False] * 23))
    far = replace(near, number=2, quint8_accuracy=0.8, right=as_bits([True] * 160 + [False] * 40))
    outcome = Outcome(Path("x"), TINY, Constraints(), "validation", (near, far, best), best)
    low, high = (f"{100 * end:.1f}" for end in interval(180, 200))
    fewer = 100 * (1 - plan_cost(TINY, cheap).conv_macs / plan_cost(TINY, dear).conv_macs)
    assert outcome.headline() == (
        f"winner: candidate 3 (f2), 0.508 MMAC, validation fp32 95.00 % quint8 90.00 % ({low} to {high}, 200 images); "
        f"quantized with percentile:1; candidate 1: not distinguishable, {fewer:.0f} % fewer MACs; files in x/best"
    )
    assert "not distinguishable" not in replace(outcome, evaluations=(far, best)).headline()
    dearer = replace(near, plan=parse_plan(TINY, "regular"), cost=plan_cost(TINY, parse_plan(TINY, "regular")))
    assert "not distinguishable" not in replace(outcome, evaluations=(dearer, best)).headline(), "it saves nothing"
