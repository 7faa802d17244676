from dataclasses import replace
from pathlib import Path

import pytest

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.layers import BatchNorm, Conv
from fnet_search.arch.plan import parse_plan
from fnet_search.base import shipped
from fnet_search.base.errors import FnetError
from fnet_search.comparison.definition import Comparison, PublishedResult, SearchOptions, load_comparison
from fnet_search.importing.spaces import load_space
from fnet_search.training.recipe import Augmentation, load_recipe

PAPER, SPACE = load_recipe("paper"), load_space("factorizenet")
LEAST = 'space = "tiny"\ndataset = "digits"\nrecipe = "quick"\nplans = ["f2"]\n'
SEARCH = LEAST.replace('plans = ["f2"]\n', "")
OPTIONS = '[search]\npolicy = "tpe"\nbudget = "50%"\n'


def test_the_studies_that_ship() -> None:
    assert shipped.names("studies") == [
        "budget-120mmac",
        "clipping",
        "first-layer-no-batchnorm",
        "initializers",
        "paper",
        "schedules",
    ]
    assert all(load_comparison(name).description for name in shipped.names("studies"))


def test_the_paper() -> None:
    """Eight networks; what it says of them is in its section 4."""
    study = load_comparison("paper")
    macs = [plan_cost(SPACE, parse_plan(SPACE, plan)).conv_macs / 1e6 for plan in study.plans]
    assert [round(one, 1) for one in macs] == [266.0, 153.8, 92.5, 61.8, 46.5, 104.3, 67.7, 33.4]
    (variant,) = study.variants
    assert (variant.space, variant.recipe) == (SPACE, PAPER)
    assert (study.dataset, study.seeds, study.schemes) == ("cifar10", (0,), ("percentile:1",))
    regular = study.published["regular"]
    assert regular == PublishedResult(0.8837, 0.8560, 0.0313)
    drop = (0.8837 - 0.8560) / 0.8837
    assert regular.relative_drop == pytest.approx(drop, abs=5e-5)
    assert study.published.keys() == {"regular", "f2", "f16", "init2", "dws"}


def test_what_the_others_vary() -> None:
    schemes = load_comparison("clipping").schemes
    assert schemes == ("percentile:1", "percentile:0.1", "minmax", "mse")
    recipes = {one.name: one.recipe for one in load_comparison("initializers").variants}
    assert recipes == {
        "glorot": PAPER,
        "he": replace(PAPER, initializer="he_normal"),
        "orthogonal": replace(PAPER, initializer="orthogonal"),
    }
    assert [one.recipe.schedule for one in load_comparison("schedules").variants] == ["steps", "cosine", "one-cycle"]
    with_norm, without = (one.space for one in load_comparison("first-layer-no-batchnorm").variants)
    assert with_norm == SPACE
    layers = [{node.name: node.layer for node in one.nodes} for one in (with_norm, without)]
    assert {name for name in layers[0] if name not in layers[1]} == {"conv_in.bn"}
    assert [type(layer) for name, layer in layers[0].items() if name == "conv_in.bn"] == [BatchNorm]
    changed = [name for name in layers[1] if layers[0][name] != layers[1][name]]
    assert changed == ["conv_in"]
    assert isinstance(first := layers[1]["conv_in"], Conv)
    assert first.bias
    found = load_comparison("budget-120mmac")
    assert found.search == SearchOptions("layer-guided", "120MMAC")
    assert [part.name for part in found.parts] == ["seed0", "seed1", "seed2"]


def written(folder: Path, text: str) -> Comparison:
    path = folder / "mine.toml"
    path.write_text(text)
    return load_comparison(str(path))


def test_one_of_your_own(tmp_path: Path) -> None:
    assert written(tmp_path, f"{LEAST}[variants]") == replace(written(tmp_path, LEAST))
    mild = "[variants.mild]\nrecipe.augmentation.shift = 0.25\nrecipe.milestones = [1]\n"
    study = written(tmp_path, f'{LEAST}seeds = [4, 2]\n{mild}[variants.other]\nrecipe = "paper"\n')
    assert (study.name, study.description, study.plans) == ("mine", "", ("f2",))
    assert [part.name for part in study.parts] == ["mild-seed4", "mild-seed2", "other-seed4", "other-seed2"]
    quick = load_recipe("quick")
    augmentation = replace(quick.augmentation, shift=0.25)
    assert augmentation == Augmentation(shift=0.25, horizontal_flip=True)
    assert study.variants[0].recipe == replace(quick, augmentation=augmentation, milestones=(1,))
    assert study.variants[1].recipe == PAPER


def test_a_study_may_weight_classes_and_search_for_balanced_accuracy(tmp_path: Path) -> None:
    variants = '[variants.plain]\n[variants.weighted]\nrecipe.class_weights = "balanced"\n'
    study = written(tmp_path, f'{SEARCH}{OPTIONS}metric = "balanced-accuracy"\n{variants}')
    assert [one.recipe.class_weights for one in study.variants] == ["none", "balanced"]
    assert str(study.variants[1]).endswith(", classes weighted alike")
    assert study.search is not None
    assert study.search.constraints(study.variants[0].space).metric == "balanced-accuracy"


def test_steps_of_the_rate_move_with_the_epochs_of_a_variant(tmp_path: Path) -> None:
    text = LEAST.replace("quick", "paper") + "[variants.a]\nrecipe.epochs = 20\n[variants.b.recipe]\nepochs = 20\n"
    short, stepped = written(tmp_path, f"{text}milestones = [3]\n").variants
    assert short.recipe == PAPER.with_epochs(20)
    assert stepped.recipe == replace(PAPER, epochs=20, milestones=(3,))


def test_an_imported_network_is_as_large_as_the_images(tmp_path: Path) -> None:
    text = LEAST.replace("tiny", "torchvision:resnet18").replace("f2", "regular")
    assert written(tmp_path, text).variants[0].space.input_shape == (3, 32, 32), "as fnet-search evaluate takes digits"


def test_validation_images_of_a_search(tmp_path: Path) -> None:
    study = written(tmp_path, f'{SEARCH}validation = "mine"\n{OPTIONS}')
    assert study.validation == "mine"
    assert load_comparison("budget-120mmac").validation is None
    assert load_comparison("budget-120mmac", validation="other").validation == "other"
    with pytest.raises(FnetError, match=r"paper\.toml: validation images require a \[search\]"):
        load_comparison("paper", validation="other")


def test_options_of_the_command_line() -> None:
    study = load_comparison("paper")
    assert study.with_options(None, (), ("percentile:1.0",)) == study
    assert [str(one) for one in study.with_options(None, (), ("mse", "minmax")).schemes] == [
        *("percentile:1", "mse", "minmax")
    ]
    with pytest.raises(FnetError, match="takes one scheme"):
        load_comparison("budget-120mmac").with_options(None, (), ("mse",))
    changed = load_comparison("paper", "digits").with_options(10, (3, 1))
    assert (changed.dataset, changed.seeds) == ("digits", (3, 1))
    assert changed.variants[0].recipe == replace(
        PAPER, epochs=10, milestones=tuple(epoch * 10 / 200 for epoch in (75, 120, 170))
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a comparison needs 'space'"),
        ("plan = 1", "unknown key 'plan'; did you mean 'plans'?"),
        ("seeds = 3", "seeds must be a list, got 3"),
        (f"{LEAST}seeds = [-1]", "seeds must be a list of different non-negative integers, got [-1]"),
        (f"{LEAST}seeds = [1, 1]", "seeds must be a list of different non-negative integers, got [1, 1]"),
        (f'{LEAST}[variants."../a"]', "variants.'../a' names a folder: write letters, digits, '_', '.', '+' and '-'"),
        (f"{LEAST}seeds = []", "seeds must be a list of different non-negative integers, got []"),
        (f'{LEAST}[search]\npolicy = "tpe"\nbudget = "50%"', "a comparison needs either plans or a [search]"),
        (LEAST.replace("f2", "f3"), "unknown plan 'f3'; uniform rates are f1, f2, f4, f8, f16"),
        (LEAST.replace('"f2"', ""), 'plans must name at least one plan, as in ["regular"]'),
        (LEAST.replace('"f2"', '"f2", "f2"'), "plans must be a list of different strings, got ['f2', 'f2']"),
        (LEAST.replace('plans = ["f2"]', "[search]\nbudget = '50%'"), "a search needs 'policy'"),
        (LEAST.replace("tiny", "tiyn"), "unknown space 'tiyn'; did you mean 'tiny'?"),
        (LEAST.replace("quick", "quik"), "unknown recipe 'quik'; did you mean 'quick'?"),
        (
            f'{LEAST}ranges = ["mse", "percentile:1", "percentile:1.0"]',
            "schemes must differ, got ['mse', 'percentile:1', ",
        ),
        (
            f'{SEARCH}ranges = ["mse", "minmax"]\n{OPTIONS}',
            "a [search] takes one scheme, because its result depends on it",
        ),
        (
            f'{LEAST}validation = "x"',
            "validation images require a [search]; given plans are measured on the test images",
        ),
        (f"{SEARCH}{OPTIONS}trials = 0", "trials must be at least 1, got 0"),
        (f'{SEARCH}{OPTIONS}metric = "balanced"', "unknown metric 'balanced'; did you mean 'balanced-accuracy'?"),
        (f"{SEARCH}{OPTIONS}".replace("50%", "0.1%"), "budget 0.1% is below the smallest network of space"),
        (f"{SEARCH}{OPTIONS}".replace("tpe", "tpu"), "unknown policy 'tpu'; did you mean 'tpe'?"),
        (f'{LEAST}ranges = ["max"]', "unknown range method 'max'; write minmax, mse or percentile:P"),
        (f'{LEAST}compare = ["f4"]', "compare: 'f4' is not among the plans"),
        (f"{LEAST}[published]\nf4 = {{ fp32_accuracy = 0.9 }}", "published: 'f4' is not among the plans"),
        (f"{LEAST}[published]\nf2 = {{ fp32_accuracy = 90 }}", "fp32_accuracy must be a fraction of 1, got 90"),
        (
            f"{LEAST}[published]\nf2 = {{ fp32 = 0.9 }}",
            "the published result of 'f2' has no 'fp32'; known: fp32_accuracy, ",
        ),
        (f"{LEAST}[published]\nf2 = 0.9", "published.f2 must be a table, got 0.9"),
        (f"{LEAST}[variants.a]\nplans = []", "variants.a has no 'plans'; it may have space and recipe"),
        (
            f"{LEAST}[variants.a]\nrecipe = 3",
            "variants.a: space must be a name or a path, recipe a name, a path or a table of",
        ),
        (f"{LEAST}[variants.a]\nrecipe.epoch = 3", "a recipe has no 'epoch'; did you mean 'epochs'?"),
        (f"{LEAST}[variants.a]\nrecipe.augmentation = 3", "augmentation must be a table, as in [augmentation]"),
        ("plans = [", "cannot read study"),
    ],
)
def test_bad_studies(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FnetError) as caught:
        written(tmp_path, text)
    assert message in str(caught.value)
    assert str(tmp_path / "mine.toml") in str(caught.value)
