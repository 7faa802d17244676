"""Accuracy and balanced accuracy, and what follows from results by class."""

import json
from dataclasses import replace
from math import sqrt

import pytest

from fnet_search.arch.plan import regular
from fnet_search.importing.spaces import load_space
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.metric import ClassResult, Scores, score
from tests.support.evaluations import trained

SPACE = load_space("tiny")
CLASSES = (ClassResult(600, 540, 510, 600, 700, "cat"), ClassResult(40, 10, 8, 40, 20, "dog"), ClassResult(0, 0, 0))


def evaluation(classes: tuple[ClassResult, ...] = CLASSES) -> Evaluation:
    return replace(trained(SPACE, regular(SPACE), 0, 550 / 640, 518 / 640), images=640, classes=classes)


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_that_have_images() -> None:
    one = evaluation()
    assert one.fp32_balanced_accuracy == (540 / 600 + 10 / 40) / 2
    assert one.quint8_balanced_accuracy == (510 / 600 + 8 / 40) / 2
    assert one.scores("balanced-accuracy") == (one.fp32_balanced_accuracy, one.quint8_balanced_accuracy)
    assert one.scores("accuracy") == (550 / 640, 518 / 640)
    drop = (540 / 600 + 10 / 40 - 510 / 600 - 8 / 40) / (540 / 600 + 10 / 40)
    assert one.scores("balanced-accuracy").relative_drop == pytest.approx(drop)
    assert one.scores("accuracy").relative_drop == one.relative_drop


def test_a_network_that_always_answers_the_same_has_one_part_of_the_classes() -> None:
    counts = [(480, 480), (0, 160), (0, 32)]
    assert score("accuracy", counts) == 480 / 672
    assert score("balanced-accuracy", counts) == 1 / 3


def test_what_is_not_known_is_none() -> None:
    one = evaluation(())
    assert one.scores("balanced-accuracy") == Scores(None, None)
    assert one.scores("balanced-accuracy").relative_drop is None
    assert one.constant == ""
    assert one.effective_images("balanced-accuracy") == 0
    assert score("accuracy", [(0, 0)]) is None


def test_effective_images_give_an_accuracy_the_same_noise() -> None:
    """The standard error of a mean of recalls, each of a class of its own size, all of them p."""
    one, p = evaluation(), 0.7
    error = sqrt(p * (1 - p) / 600 + p * (1 - p) / 40) / 2
    assert sqrt(p * (1 - p) / one.effective_images("balanced-accuracy")) == pytest.approx(error)
    assert one.effective_images("accuracy") == 640
    equal = evaluation((ClassResult(320, 0, 0),) * 2)
    assert equal.effective_images("balanced-accuracy") == pytest.approx(640)


@pytest.mark.parametrize(
    ("fp32", "quint8", "said"),
    [
        ((640, 0), (640, 0), "fp32 and quint8 predict class 'cat' for every image"),
        ((600, 40), (0, 640), "quint8 predicts class 'dog' for every image"),
        (
            (640, 0),
            (0, 640),
            "fp32 predicts class 'cat' for every image, quint8 predicts class 'dog' for every image",
        ),
        ((639, 1), (1, 639), ""),
        ((0, 0), (0, 0), ""),  # not known
    ],
)
def test_a_constant_predictor_is_said_to_be_one(fp32: tuple[int, int], quint8: tuple[int, int], said: str) -> None:
    names = ("cat", "dog")
    one = evaluation(
        tuple(ClassResult(320, 0, 0, *both, name) for *both, name in zip(fp32, quint8, names, strict=True))
    )
    assert one.constant == said
    assert one.remark == said
    assert replace(one, reason="behind").remark == "behind"


def test_a_class_that_is_all_right_while_all_others_are_wrong_is_no_constant_answer() -> None:
    one = evaluation(
        (ClassResult(9, 9, 9, 9, 9, "a"), ClassResult(5, 0, 0, 4, 4, "b"), ClassResult(4, 0, 0, 5, 5, "c"))
    )
    assert one.constant == ""


def test_results_by_class_come_back_from_json() -> None:
    one = evaluation()
    text = json.dumps(one.to_json())
    assert Evaluation.from_json(json.loads(text)) == one
    assert json.loads(text)["classes"][0] == [600, 540, 510, 600, 700, "cat"], "short: a line a class in each of many"
