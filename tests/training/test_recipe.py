from dataclasses import replace
from math import isclose
from pathlib import Path

import pytest

from fnet_search.base.errors import FnetError
from fnet_search.training.recipe import Augmentation, Recipe, load_recipe

LEAST = "epochs = 3\nbatch_size = 16\nlearning_rate = 0.1\n"


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_papers_recipe() -> None:
    paper = load_recipe("paper")
    assert paper == Recipe(
        name="paper",
        epochs=200,
        batch_size=128,
        learning_rate=0.01,
        momentum=0.9,
        initializer="glorot_uniform",
        schedule="steps",
        milestones=(75, 120, 170),
        augmentation=Augmentation(0.1, 0.1, 15, True, True),
    )
    assert (paper.weight_decay, paper.label_smoothing, paper.nesterov) == (0, 0, False)


def test_steps_drop_by_ten_at_each_milestone() -> None:
    paper, steps = load_recipe("paper"), 391
    for epoch, rate in [(0, 1e-2), (74, 1e-2), (75, 1e-3), (119, 1e-3), (120, 1e-4), (169, 1e-4), (170, 1e-5)]:
        assert isclose(paper.learning_rate_at(epoch * steps, steps), rate)
        assert isclose(paper.learning_rate_at(epoch * steps + steps - 1, steps), rate)
    assert isclose(paper.learning_rate_at(200 * steps - 1, steps), 1e-5)


def test_milestones_move_with_the_number_of_epochs() -> None:
    paper = load_recipe("paper")
    short = paper.with_epochs(20)
    assert short.epochs == 20
    assert short.milestones == (75 * 20 / 200, 120 * 20 / 200, 170 * 20 / 200)
    assert isclose(short.learning_rate_at(74, 10), 1e-2)
    assert isclose(short.learning_rate_at(75, 10), 1e-3)
    assert paper.with_epochs(None) == paper.with_epochs(200) == paper
    assert short.augmentation == paper.augmentation


def test_one_cycle_rises_and_falls_linearly() -> None:
    recipe = Recipe("r", epochs=4, batch_size=2, learning_rate=0.5, warmup=0.25)
    rates = [recipe.learning_rate_at(step, 5) for step in range(4 * 5)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates[5:] == pytest.approx([0.5 * left / 16 for left in range(15, 0, -1)])


@pytest.mark.parametrize(
    ("epochs", "steps", "warmup"), [(1, 1, 0.2), (1, 2, 0.9), (3, 1, 0.0), (1, 7, 0.99), (2, 3, 0)]
)
def test_one_cycle_reaches_its_peak_once_and_stays_positive(epochs: int, steps: int, warmup: float) -> None:
    recipe = Recipe("r", epochs, 2, 0.5, warmup=warmup)
    rates = [recipe.learning_rate_at(step, steps) for step in range(epochs * steps)]
    assert max(rates) <= 0.5
    assert min(rates) > 0
    assert max(rates) >= 0.5 * (1 - 1 / len(rates))
    peak = rates.index(max(rates))
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, LEAST + "nesterov = true\n[augmentation]\nrotation = 5\n"))
    assert recipe == Recipe("mine", 3, 16, 0.1, nesterov=True, augmentation=Augmentation(rotation=5))
    assert load_recipe(written(tmp_path, 'name = "other"\n' + LEAST)).name == "other"


@pytest.mark.parametrize(
    ("epochs", "share", "expected"),
    [(20, 0.2, 4), (6, 0.2, 1), (8, 0.2, 2), (1, 0.2, 1), (2, 0.2, 1), (200, 0.05, 10), (7, 1, 7)],
)
def test_a_warm_training_is_a_share_of_the_whole_one(epochs: int, share: float, expected: int) -> None:
    """Rounded, and at least an epoch."""
    recipe = Recipe("r", epochs, 16, 0.4, warmup=0.3, warm_share=share)
    assert recipe.warm().epochs == expected
    assert recipe.warm(3).epochs == 3


def test_class_weights(tmp_path: Path) -> None:
    assert load_recipe("quick").class_weights == load_recipe("paper").class_weights == "none"
    own = load_recipe(written(tmp_path, LEAST + 'class_weights = "balanced"\n'))
    assert own.class_weights == own.warm().class_weights == own.with_epochs(9).class_weights == "balanced"
    assert own.changed({"class_weights": "none"}) == replace(own, class_weights="none")
    with pytest.raises(FnetError, match=r"unknown class_weights 'balance'.*balanced"):
        replace(own, class_weights="balance")  # type: ignore[arg-type]


def test_a_warm_training_may_be_a_part_of_an_epoch() -> None:
    recipe = Recipe("r", 20, 16, 0.4, milestones=(10,), schedule="steps")
    quarter = recipe.warm(0.25)
    assert (quarter.epochs, quarter.epoch_share, quarter.milestones) == (1, 0.25, (0.5,))
    assert (quarter.images(1000), recipe.images(1000), quarter.images(3)) == (250, 1000, 2)
    assert recipe.warm(1.0) == recipe.warm(1)
    with pytest.raises(FnetError, match=r"epoch_share must be in \(0, 1\]"):
        replace(recipe, epoch_share=0.0)


def test_a_warm_training_falls_from_a_small_rate() -> None:
    recipe = Recipe("r", 20, 16, 0.4, weight_decay=1e-4, warmup=0.3, warm_rate=0.1, augmentation=Augmentation(0.1))
    warm = recipe.warm(2)
    assert warm == Recipe(
        "r", 2, 16, 0.4 * 0.1, weight_decay=1e-4, warmup=0, warm_rate=0.1, augmentation=Augmentation(0.1)
    )
    assert [warm.learning_rate_at(step, 3) for step in range(6)] == pytest.approx(
        [0.04 * left / 6 for left in range(6, 0, -1)]
    )


def test_milestones_of_a_warm_training_move_with_its_epochs() -> None:
    warm = load_recipe("paper").warm()
    assert (warm.epochs, warm.learning_rate) == (40, 0.0025)
    assert warm.milestones == (15, 24, 34)
    drops = [
        epoch
        for epoch in range(1, 40)
        if warm.learning_rate_at(epoch * 7, 7) < 0.9 * warm.learning_rate_at(epoch * 7 - 1, 7)
    ]
    assert drops == [15, 24, 34]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = 3\n", "a recipe needs 'batch_size'"),
        (LEAST + "momentun = 0.5\n", "a recipe has no 'momentun'; did you mean 'momentum'?"),
        (LEAST + 'momentum = "much"\n', "momentum must be a number, got 'much'"),
        (LEAST.replace("3", "3.5"), "epochs must be an integer, got 3.5"),
        (LEAST.replace("3", "true"), "epochs must be an integer, got True"),
        (LEAST + "milestones = 3\n", "milestones must be a list of numbers, got 3"),
        (LEAST + "nesterov = 1\n", "nesterov must be true or false, got 1"),
        (LEAST + 'schedule = "onecycle"\n', "unknown schedule 'onecycle'; did you mean 'one-cycle'?"),
        (LEAST + 'initializer = "glorot"\n', "unknown initializer 'glorot'; did you mean 'glorot_uniform'?"),
        (LEAST + "augmentation = 3\n", "augmentation must be a table, as in [augmentation]"),
        (LEAST + "[augmentation]\nflip = true\n", "an augmentation has no 'flip'"),
        (LEAST + '[augmentation]\nzoom = "2x"\n', "zoom must be a number, got '2x'"),
        (LEAST.replace("3", "0"), "recipe 'mine': epochs must be at least 1"),
        (LEAST.replace("16", "1"), "recipe 'mine': batch_size must be at least 2"),
        (LEAST.replace("0.1", "0"), "recipe 'mine': learning_rate must be positive"),
        (LEAST.replace("0.1", "-0.1"), "recipe 'mine': learning_rate must be positive"),
        (LEAST.replace("0.1", "inf"), "recipe 'mine': learning_rate must be positive"),
        (LEAST.replace("0.1", "nan"), "recipe 'mine': learning_rate must be positive"),
        (LEAST + "momentum = 1\n", "recipe 'mine': momentum must be in [0, 1)"),
        (LEAST + "momentum = 0\nnesterov = true\n", "recipe 'mine': nesterov needs a momentum"),
        (LEAST + "weight_decay = -1e-4\n", "recipe 'mine': weight_decay must not be negative"),
        (LEAST + "label_smoothing = 1\n", "recipe 'mine': label_smoothing must be in [0, 1)"),
        (LEAST + "warmup = 1\n", "recipe 'mine': warmup must be in [0, 1)"),
        (LEAST + "warm_share = 0\n", "recipe 'mine': warm_share must be in (0, 1]"),
        (LEAST + "warm_share = 1.01\n", "recipe 'mine': warm_share must be in (0, 1]"),
        (LEAST + "warm_rate = 0\n", "recipe 'mine': warm_rate must be in (0, 1]"),
        (LEAST + "warm_rate = nan\n", "recipe 'mine': warm_rate must be in (0, 1]"),
        (LEAST + 'warm_rate = "low"\n', "warm_rate must be a number, got 'low'"),
        (LEAST + "[augmentation]\nzoom = 1\n", "recipe 'mine': zoom must be in [0, 1)"),
        (LEAST + "[augmentation]\nshift = -0.1\n", "recipe 'mine': shift must be in [0, 1)"),
        (LEAST + "[augmentation]\nrotation = nan\n", "recipe 'mine': rotation must be finite"),
    ],
)
def test_what_is_wrong_with_a_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(FnetError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_recipes_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FnetError, match=r"cannot read recipe .*mine\.toml"):
        load_recipe(written(tmp_path, "epochs ="))
    with pytest.raises(FnetError, match=r"recipe file .*none\.toml does not exist"):
        load_recipe(str(tmp_path / "none.toml"))
    with pytest.raises(FnetError, match=r"unknown recipe 'quik'; did you mean 'quick'\?"):
        load_recipe("quik")


def test_cosine_falls_to_zero() -> None:
    """From the whole rate; a half of it in the middle; symmetric about it."""
    recipe = replace(load_recipe("quick"), schedule="cosine", epochs=4)
    rates = [recipe.learning_rate_at(step, 10) for step in range(40)]
    assert rates[0] == recipe.learning_rate
    assert rates[20] == pytest.approx(recipe.learning_rate / 2)
    assert [one + other for one, other in zip(rates[1:], rates[:0:-1], strict=True)] == pytest.approx(
        [recipe.learning_rate] * 39
    )
    assert sorted(rates, reverse=True) == rates
