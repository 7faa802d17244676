import json
import re
import tomllib
from dataclasses import replace
from importlib import import_module
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fnet_search.arch.costs import Cost, plan_cost
from fnet_search.arch.plan import FactorizationPlan, depthwise, doublings, make_plan, regular, uniform
from fnet_search.base.errors import FnetError
from fnet_search.importing.spaces import load_space
from fnet_search.policy.asktell import AskTell
from fnet_search.policy.conformance import made_up_probes as probes
from fnet_search.policy.constraints import Constraints, parse_constraints
from fnet_search.policy.evaluation import Audit, Evaluation, LayerStats
from fnet_search.policy.explanation import LayerChoice, RateChange
from fnet_search.policy.metric import ClassResult
from fnet_search.policy.protocol import FISHER, PROBES, History, requirements
from fnet_search.policy.ranking import choose_parent, ranking
from fnet_search.policy.registry import load_policy, policy_names

TINY = load_space("tiny")
REGULAR = Evaluation(
    0, regular(TINY), plan_cost(TINY, regular(TINY)), epochs=2, fp32_accuracy=0.8, quint8_accuracy=0.6, qmse=0.5
)
STATS = LayerStats(
    layer="conv_in",
    kind="conv",
    macs=10,
    params=20,
    weight_min=-1.5,
    weight_max=1.5,
    weight_precision=0.5,
    folded_min=-2.0,
    folded_max=2.0,
    folded_precision=0.25,
    activation_min=0.0,
    activation_max=6.0,
    activation_precision=0.75,
    weight_sqnr_db=30.5,
    activation_sqnr_db=None,
    accumulated_sqnr_db=20.25,
    sparsity=0.5,
    dead_weight_channels=1,
    dead_activation_channels=2,
)


def test_an_evaluation_survives_json() -> None:
    evaluation = replace(REGULAR, scheme="percentile:1", layers=(STATS, replace(STATS, layer="conv_8")))
    assert Evaluation.from_json(json.loads(json.dumps(evaluation.to_json()))) == evaluation
    later = {**evaluation.to_json(), "added in a later version": 1}
    assert Evaluation.from_json(later) == evaluation


def test_what_it_started_from_survives_json() -> None:
    child = replace(
        REGULAR, role="final", parent=3, inherited_epochs=7, zero_shot_accuracy=0.25, accuracies=(0.5, 0.625)
    )
    data = json.loads(json.dumps(child.to_json()))
    assert Evaluation.from_json(data) == child
    for key in ("role", "parent", "inherited_epochs", "zero_shot_accuracy", "accuracies"):
        del data[key]  # of a version before
    assert Evaluation.from_json(data) == replace(
        child, role="candidate", parent=None, inherited_epochs=0, zero_shot_accuracy=None, accuracies=()
    )


def test_an_audit_survives_json() -> None:
    evaluation = replace(REGULAR, scheme="mse+per-channel", audit=Audit(178, 1780, 3, 1))
    data = json.loads(json.dumps(evaluation.to_json()))
    assert data["audit"] == {"images": 178, "codes": 1780, "differing": 3, "predictions": 1}
    assert Evaluation.from_json(data) == evaluation
    assert Evaluation.from_json({**data, "audit": None}).audit is None
    del data["audit"]  # of a version before
    assert Evaluation.from_json(data) == replace(evaluation, audit=None)


def test_audits_add_up() -> None:
    assert Audit(2, 20, 3, 1) + Audit(5, 50, 0, 2) == Audit(7, 70, 3, 3)
    assert Audit() + Audit(2, 20, 3, 1) == Audit(2, 20, 3, 1)
    assert str(Audit(2000, 20_000, 1234, 56)) == "1,234 of 20,000 output codes and 56 of 2,000 predictions differ"


def test_relative_drop() -> None:
    assert REGULAR.relative_drop == (0.8 - 0.6) / 0.8
    assert replace(REGULAR, quint8_accuracy=None).relative_drop is None
    assert replace(REGULAR, fp32_accuracy=0.0).relative_drop is None


def test_violations_are_normalised() -> None:
    cost = REGULAR.cost
    constraints = Constraints(conv_macs=cost.conv_macs // 2, params=cost.params * 2, min_quint8=0.8, max_drop=0.2)
    assert constraints.of_cost(cost) == {
        "conv_macs": cost.conv_macs / (cost.conv_macs // 2) - 1,
        "params": cost.params / (cost.params * 2) - 1,
    }
    assert constraints.of(REGULAR) == pytest.approx(
        {"conv_macs": 1.0, "params": -0.5, "min_quint8": (0.8 - 0.6) / 0.8, "max_drop": (0.25 - 0.2) / 0.2}
    )
    refused = replace(REGULAR, state="refused", fp32_accuracy=None, quint8_accuracy=None)
    assert constraints.of(refused) == constraints.of_cost(cost)
    assert Constraints().of(REGULAR) == {}


def test_a_limit_is_met_exactly() -> None:
    cost = REGULAR.cost
    at = Constraints(conv_macs=cost.conv_macs, params=cost.params, min_quint8=0.6, max_drop=0.25 + 1e-12)
    assert at.feasible(REGULAR)
    assert at.refusal(cost) == ""
    assert not at.feasible(replace(REGULAR, state="failed"))
    below = Constraints(conv_macs=cost.conv_macs - 1, params=cost.params - 1)
    assert not below.feasible(REGULAR)
    assert below.refusal(cost) == (
        f"{cost.conv_macs:,} conv MACs exceed the budget of {cost.conv_macs - 1:,}; "
        f"{cost.params:,} parameters exceed the limit of {cost.params - 1:,}"
    )


def measured(fp32: float, quint8: float, images: int) -> Evaluation:
    return replace(REGULAR, fp32_accuracy=fp32, quint8_accuracy=quint8, images=images)


@pytest.mark.parametrize("images", [50, 178, 287, 360])
@pytest.mark.parametrize("known", [True, False], ids=["images known", "images not known"])
def test_a_drop_at_the_limit_is_met_and_one_image_more_is_not(images: int, known: bool) -> None:
    """For every percentage, and every accuracy from which it is a whole number of images."""
    cases = 0
    for percent in range(1, 100):
        limit = parse_constraints(TINY, "100%", max_drop=f"{percent}%")
        for right in range(1, images + 1):
            lost, rest = divmod(right * percent, 100)
            if rest:
                continue
            cases += 1
            at, below = (
                measured(right / images, (right - lost - more) / images, images if known else 0) for more in (0, 1)
            )
            assert limit.of(at)["max_drop"] == 0
            assert limit.feasible(at)
            assert limit.of(below)["max_drop"] > 0
    assert cases == sum(images * gcd(percent, 100) // 100 for percent in range(1, 100))


@pytest.mark.parametrize(("images", "step"), [(287, 1), (10_000, 37)])
def test_an_accuracy_at_the_limit_is_met_and_one_image_less_is_not(images: int, step: int) -> None:
    for right in range(1, images, step):
        limit = parse_constraints(TINY, "100%", min_quint8=f"{right / images!r}")
        for known in (0, images):
            assert limit.of(measured(1.0, right / images, known))["min_quint8"] == 0
            assert limit.missed(measured(1.0, (right - 1) / images, known)) == ("min_quint8",)
    assert parse_constraints(TINY, "100%", min_quint8="81.37%").of(measured(1.0, 8137 / 10_000, 0))["min_quint8"] == 0


def test_accuracies_of_a_host_are_compared_as_the_decimals_that_they_are() -> None:
    limit = Constraints(max_drop=0.05)
    assert limit.of(measured(0.80, 0.76, 0))["max_drop"] == 0
    assert limit.of(measured(0.812346, 0.7717287, 0))["max_drop"] == 0  # 0.95 * 0.812346
    assert limit.of(measured(0.812346, 0.7717286, 0))["max_drop"] > 0
    single = float(np.float32(0.8)), float(np.float32(0.76))  # as float32 has them, of 500 images
    assert limit.of(measured(*single, 500))["max_drop"] == 0
    balanced = (0.9 + 0.8 + 0.7) / 3, (0.9 + 0.78 + 0.6) / 3  # no count of the 287 images
    assert limit.of(measured(*balanced, 287))["max_drop"] == 0


def test_a_budget_at_the_limit_is_met() -> None:
    whole = REGULAR.cost.conv_macs
    for percent in ("100%", "100.000%", f"{whole}", f"{whole}.0"):
        limit = parse_constraints(TINY, percent, max_params=REGULAR.cost.params)
        assert limit.of_cost(REGULAR.cost) == {"conv_macs": 0, "params": 0}
        assert limit.refusal(REGULAR.cost) == ""
    assert parse_constraints(TINY, "99.99999999999999999999999999999%").conv_macs == whole - 1


def test_what_has_no_quint8_accuracy_is_not_complete() -> None:
    for accuracy in ({}, {"quint8_accuracy": None}, {"quint8_accuracy": None, "fp32_accuracy": 0.9}):
        with pytest.raises(FnetError, match=r"quint8_accuracy must be a fraction of 1, got None; give state='failed'"):
            Evaluation.of(TINY, regular(TINY), **accuracy)
    for state in ("refused", "pruned", "failed"):
        assert Evaluation.of(TINY, regular(TINY), state=state).quint8_accuracy is None
    assert Constraints(min_quint8=0.5).of(replace(REGULAR, quint8_accuracy=None)) == {"min_quint8": 1}


def test_no_drop_at_all_may_be_asked_for() -> None:
    assert Constraints(max_drop=0.0).of(REGULAR) == {"max_drop": pytest.approx(0.25)}
    assert Constraints(max_drop=0.0).feasible(replace(REGULAR, quint8_accuracy=0.8))
    # Nothing was measured on it that would show a small drop.
    assert not Constraints(max_drop=0.5).feasible(replace(REGULAR, fp32_accuracy=0.0))


def test_ranking() -> None:
    def evaluation(number: int, quint8: float, macs: int) -> Evaluation:
        return replace(REGULAR, number=number, quint8_accuracy=quint8, fp32_accuracy=0.9, cost=Cost(macs, macs, 1))

    best, equal, heavier, worse = (evaluation(*row) for row in [(3, 0.8, 90), (4, 0.8, 90), (0, 0.8, 95), (1, 0.7, 10)])
    over, far_over = evaluation(2, 0.9, 110), evaluation(5, 0.9, 150)
    failed = replace(best, number=6, state="failed")
    constraints = Constraints(conv_macs=100)
    everything = (heavier, worse, over, best, equal, far_over, failed)
    assert ranking(everything, constraints) == [best, equal, heavier, worse, over, far_over]
    surer, sure = replace(heavier, quint8_loss=0.5), replace(equal, quint8_loss=0.6)  # of equals, the lower loss
    assert ranking((best, sure, surer, worse), constraints) == [surer, sure, best, worse]
    assert ranking((far_over, over), constraints) == [over, far_over]
    assert ranking((failed,), constraints) == []


def by_class(number: int, large: int, small: int, **changes: Any) -> Evaluation:
    """Right of 90 images of one class in fp32 and in quint8, and of 10 of another."""
    right = (large + small) / 100
    classes = (ClassResult(90, large, large), ClassResult(10, small, small))
    known = {"fp32_accuracy": right, "quint8_accuracy": right, "images": 100, "classes": classes, **changes}
    return replace(REGULAR, number=number, **known)


def test_balanced_accuracy_decides_where_it_is_the_metric() -> None:
    common, rare = by_class(0, 90, 2), by_class(1, 72, 9)
    balanced = Constraints(metric="balanced-accuracy")
    assert ranking((common, rare), Constraints()) == [common, rare]
    assert ranking((common, rare), balanced) == [rare, common]
    assert (common.quint8_balanced_accuracy, rare.quint8_balanced_accuracy) == ((1 + 0.2) / 2, (0.8 + 0.9) / 2)
    floor = replace(balanced, min_quint8=0.8)
    assert floor.of(common) == {"min_quint8": pytest.approx((0.8 - 0.6) / 0.8)}
    assert (floor.feasible(common), floor.feasible(rare)) == (False, True)
    assert Constraints(min_quint8=0.8).missed(rare) == Constraints(min_quint8=0.8).missed(common) == ()
    unknown = replace(rare, number=2, classes=())
    assert ranking((unknown, common), balanced) == [common, unknown]
    assert [choose_parent((common, rare), REGULAR.plan, metric) for metric in ("accuracy", "balanced-accuracy")] == [
        common,
        rare,
    ]


def test_the_drop_is_of_the_metric() -> None:
    """fp32 90 and 8 of 10 images, quint8 90 and 4: accuracies 0.98 and 0.94, balanced 0.9 and 0.7."""
    one = by_class(0, 90, 4, fp32_accuracy=0.98, classes=(ClassResult(90, 90, 90), ClassResult(10, 8, 4)))
    assert Constraints(max_drop=0.1).of(one) == {"max_drop": pytest.approx(((0.98 - 0.94) / 0.98 - 0.1) / 0.1)}
    limit = Constraints(max_drop=0.1, metric="balanced-accuracy")
    assert limit.of(one) == {"max_drop": pytest.approx(((0.9 - 0.7) / 0.9 - 0.1) / 0.1)}
    assert limit.of(replace(one, classes=())) == {"max_drop": pytest.approx((1 - 0.1) / 0.1)}, "unknown: not met"


def test_limits_name_the_metric() -> None:
    limits = Constraints(min_quint8=0.8, max_drop=0.05, metric="balanced-accuracy")
    assert limits.described() == [
        ("quint8 balanced accuracy", "at least 80.00 %"),
        ("relative drop of balanced accuracy", "at most 5.00 %"),
    ]
    with pytest.raises(FnetError, match=r"unknown metric 'balanced'.*balanced-accuracy"):
        parse_constraints(TINY, "50%", metric="balanced")


def test_a_reference_is_not_ranked_and_what_was_trained_on_is() -> None:
    reference = replace(REGULAR, number=0, role="reference", quint8_accuracy=0.99)
    candidate = replace(REGULAR, number=1, quint8_accuracy=0.7)
    final = replace(REGULAR, number=2, role="final", parent=1, quint8_accuracy=0.75)
    stopped = replace(REGULAR, number=3, state="pruned", quint8_accuracy=None)
    assert ranking((reference, candidate, final, stopped), Constraints()) == [final, candidate]
    assert ranking((reference,), Constraints()) == []
    assert Constraints().feasible(stopped) is False


@pytest.mark.parametrize(
    ("rates", "parent"),
    [
        ((1, 1, 1), None),
        ((2, 2, 2), "f2"),
        ((4, 4, 4), "f2"),
        ((8, 16, 16), "f2"),  # late and far divide it too, and late has more MACs
        ((8, 8, 8), "f2"),  # f4 failed, f8 was stopped
        ((8, 2, 16), "f2"),
        ((2, 4, 1), None),  # f2 does not divide the last 1
        ((1, 8, 8), "late"),
        ((1, 16, 1), None),
    ],
)
def test_a_child_starts_from_the_least_factorized_that_divides_it(
    rates: tuple[int, int, int], parent: str | None
) -> None:
    """In every layer. From regular, where that was trained."""

    def plan(*rates: int) -> FactorizationPlan:
        return make_plan(TINY, dict(zip(("conv_8", "conv_16_1", "conv_16_2"), rates, strict=True)))

    def one(number: int, plan: FactorizationPlan, fp32: float) -> Evaluation:
        return Evaluation(number, plan, plan_cost(TINY, plan), fp32_accuracy=fp32, quint8_accuracy=1 - fp32)

    known = {
        "f2": one(1, plan(2, 2, 2), 0.7),
        "late": one(2, plan(1, 8, 4), 0.8),
        "f4": replace(one(3, plan(4, 4, 4), 0.9), state="failed"),
        "f8": replace(one(4, plan(8, 8, 8), 0.95), state="pruned"),
        "far": one(5, plan(8, 16, 8), 0.2),
    }
    expected = None if parent is None else known[parent]
    assert choose_parent(known.values(), plan(*rates)) == expected
    assert choose_parent(reversed(list(known.values())), plan(*rates)) == expected
    regular = one(6, plan(1, 1, 1), 0.1)
    assert choose_parent([*known.values(), regular], plan(*rates)) == regular


def test_of_equal_parents_the_most_accurate_then_the_first() -> None:
    def one(number: int, rate: int, fp32: float | None = 0.8) -> Evaluation:
        return replace(REGULAR, number=number, plan=uniform(TINY, rate), fp32_accuracy=fp32)

    small, good, later, unmeasured = one(0, 4, 0.9), one(2, 2), one(3, 2), one(1, 2, None)
    plan = uniform(TINY, 4)
    assert choose_parent((small, later, good, unmeasured), plan) == good
    assert choose_parent((small, one(4, 2, 0.85), good), plan) == one(4, 2, 0.85)
    assert choose_parent((small, unmeasured), plan) == unmeasured
    assert choose_parent((unmeasured,), plan) == unmeasured
    assert choose_parent((), plan) is None
    assert choose_parent([replace(one(0, 2), plan=depthwise(TINY))], plan) is None


def test_history_knows_what_was_suggested() -> None:
    refused = replace(REGULAR, number=1, plan=uniform(TINY, 2), state="refused")
    history = History(TINY, evaluations=(REGULAR, refused), running=(depthwise(TINY),))
    assert history.seen == {regular(TINY), uniform(TINY, 2), depthwise(TINY)}


def test_random_numbers_come_from_seed_and_number() -> None:
    history = History(TINY, number=3, seed=7)
    assert history.rng.random() == history.rng.random() == np.random.default_rng((7, 3)).random()
    others = {replace(history, number=4).rng.random(), replace(history, seed=8).rng.random(), history.rng.random()}
    assert len(others) == 3


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed third-party distribution with policies, good and bad."""
    (tmp_path / "someones_policies.py").write_text(
        "class Steady:\n    def suggest(self, history):\n        return None\n"
        "class Mute:\n    pass\n"
        "class Broken:\n    def __init__(self):\n        raise ValueError('no licence')\n"
    )
    info = tmp_path / "someones_policies-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: someones-policies\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fnet_search.policies]\nsteady = someones_policies:Steady\nmute = someones_policies:Mute\n"
        "broken = someones_policies:Broken\ngone = someones_policies:Gone\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("plugin")
def test_a_third_partys_policy_is_found_by_name() -> None:
    assert {"steady", "mute", "broken", "gone"} <= set(policy_names())
    assert load_policy("steady").suggest(History(TINY)) is None


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("steadi", "unknown policy 'steadi'; did you mean 'steady'?"),
        ("mute", "policy 'mute' has no method suggest(history)"),
        ("broken", "policy 'broken' cannot be loaded: ValueError: no licence ("),
        ("gone", "policy 'gone' cannot be loaded: "),
    ],
)
def test_bad_policies(name: str, complaint: str) -> None:
    with pytest.raises(FnetError) as caught:
        load_policy(name)
    assert complaint in str(caught.value)


def test_our_entry_points_lead_to_policies() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    targets = project["entry-points"]["fnet_search.policies"]
    rivals = {"progressive-doubling", "random", "reverse-pyramid", "tpe", "nsga2", "greedy", "fisher"}
    assert set(targets) == rivals | {"layer-guided"}
    for target in targets.values():
        module, _, name = target.partition(":")
        assert getattr(import_module(module), name)().suggest(History(TINY, probes=probes(TINY))) is not None


def test_requirements_are_known_or_refused() -> None:
    assert requirements(load_policy("random")) == frozenset()
    assert requirements(load_policy("layer-guided")) == {PROBES}
    assert requirements(load_policy("fisher")) == {PROBES, FISHER}

    class Strange:
        requires = ("probes", "horoscopes")

        def suggest(self, history: History) -> None:
            return None

    with pytest.raises(FnetError, match="policy Strange requires horoscopes; known: probes, fisher"):
        requirements(Strange())


@pytest.mark.parametrize("name", ["layer-guided", "greedy", "fisher"])
def test_without_probes_the_method_to_provide_is_named(name: str) -> None:
    with pytest.raises(FnetError, match=r"needs probes .* fnet_search\.probes_for, .*History\(probes=...\)"):
        load_policy(name).suggest(History(TINY))


def test_reasons_are_in_words() -> None:
    lower, higher = RateChange(2, 1_500_000, 0.002), RateChange(8, -250_000, -0.0125)
    choice = LayerChoice("conv", 4, lower, higher)
    assert choice.reason == "against 2 it saves 1.5 MMAC for 0.20 points; 8 would save 0.25 MMAC for 1.25 points"
    odd = LayerChoice("conv", 4, RateChange(2, -1_000_000, -0.01), RateChange(8, 2_000_000, 0.03))
    assert odd.reason == "against 2 it costs 1 MMAC and gains 1.00 points; 8 would cost 2 MMAC and gain 3.00 points"
    nothing = LayerChoice("conv", 4, RateChange(2, 1_000_000, -0.00001), RateChange(8, -1_000_000, 0.00001))
    assert nothing.reason == "against 2 it saves 1 MMAC for 0.00 points; 8 would save 1 MMAC for 0.00 points"
    assert LayerChoice("conv", 1, None, None).reason == ""


def test_a_plan_of_another_space_has_no_evaluation() -> None:
    for plan in (regular(load_space("factorizenet")), FactorizationPlan((*regular(TINY).rates, ("more", 1)))):
        with pytest.raises(FnetError, match="layer"):
            Evaluation.of(TINY, plan, quint8_accuracy=0.5)
    illegal = FactorizationPlan(tuple((layer, 3) for layer, _ in regular(TINY).rates))
    with pytest.raises(FnetError, match="3"):
        Evaluation.of(TINY, illegal, quint8_accuracy=0.5)


@pytest.mark.parametrize("limit", [{"conv_macs": 0}, {"params": -1}, {"min_quint8": 0.0}, {"max_drop": -0.1}])
def test_limits_that_nothing_meets_are_refused(limit: dict[str, Any]) -> None:
    with pytest.raises(FnetError, match=next(iter(limit))):
        Constraints(**limit)
    assert Constraints(max_drop=0.0).missed(replace(REGULAR, fp32_accuracy=0.5, quint8_accuracy=0.5)) == ()


@pytest.mark.parametrize("accuracy", [float("nan"), 55.0, -0.1])
def test_an_accuracy_is_a_fraction_of_1(accuracy: float) -> None:
    with pytest.raises(FnetError, match=r"quint8_accuracy must be a fraction of 1, got .*; give state='failed' if"):
        Evaluation.of(TINY, regular(TINY), quint8_accuracy=accuracy)


def own_policy() -> str:
    """The one of the README."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = re.findall(r"```python\n([^`]*class Halving:.*?)```", readme, re.DOTALL)
    return str(code)


@pytest.mark.parametrize("name", ["tiny", "factorizenet", "resnet20"])
def test_a_policy_of_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "halving.py").write_text(own_policy())
    policy, space = load_policy(f"{tmp_path}/halving.py:Halving"), load_space(name)
    loop = AskTell(policy, space, Constraints())
    plans = []
    while (plan := loop.ask()) is not None:
        plans.append(plan)
        loop.tell(Evaluation.of(space, plan, quint8_accuracy=0.5))
    assert plans == [uniform(space, rate) for rate in reversed(doublings(space))]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("class Halving: ...", "Halving", "policy 'mine.py:Halving' has no method suggest"),
        ("class Halving: ...", "Halvng", "policy mine.py:Halvng: unknown name 'Halvng'; did you mean 'Halving'?"),
        (
            "import nothing_like_it",
            "Halving",
            "policy mine.py:Halving cannot be loaded: ModuleNotFoundError: ",
        ),
        (
            "def of():\n    return {}['x']\nHalving = of()",
            "Halving",
            "cannot be loaded: KeyError: 'x' (mine.py, line 2)",
        ),
        (
            "import json\nclass Halving:\n    def __init__(self):\n        json.loads('{')",
            "Halving",
            "cannot be loaded: JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1) (mine.py, line 4)",
        ),
        ("class Halving\n", "Halving", "cannot be loaded: SyntaxError: expected ':' (mine.py, line 1)"),
        (None, "Halving", "policy mine.py:Halving: the file mine.py does not exist"),
    ],
)
def test_policies_of_files_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("mine.py").write_text(text)
    with pytest.raises(FnetError) as caught:
        load_policy(f"mine.py:{name}")
    assert message in str(caught.value)
