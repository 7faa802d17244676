"""The command line and the Python API make the same request, and say the same of the same mistake."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import pytest

from fnet_search import FnetError, Machine, evaluate, search
from fnet_search.cli.shared_options import with_options
from fnet_search.engine.request import Request
from tests.support.command_line import Result

SEARCH = {"space": "tiny", "budget": "60%"}
RUN = ("run", "--space", "tiny", "--budget", "60%")
GIVEN = {"plans": "init2", "space": "tiny"}
EVALUATE = ("evaluate", "--plan", "init2", "--space", "tiny")


@click.command()
@click.option("--input", "input_shape")
@click.option("--scheme", "schemes", multiple=True)
@click.option("--fused/--no-fused")
@click.option("-o", "--output")
@click.argument("folder")
def command(**options: Any) -> None:
    """Of options that are named in every way."""


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`input_shape` can only", "--input can only"),
        ("`input` or `schemes`, `scheme`", "--input or --scheme, --scheme"),
        ("leave it or `fused` out", "leave it or --fused out"),
        ("choose another `output`", "choose another -o"),
        ("an argument `folder`, one of another command `out`", "an argument `folder`, one of another command `out`"),
        ("fused `mse+bias-correct` '`'", "fused `mse+bias-correct` '`'"),
    ],
)
def test_errors_name_the_options_of_the_command(message: str, shown: str) -> None:
    assert with_options(message, command) == shown


@pytest.mark.parametrize(
    ("asked", "options", "message", "shown"),
    [
        (
            {"min_quint8": "80"},
            ("--min-quint8", "80"),
            "`min_quint8` '80' must be above 0 and at most 1; write 80%",
            "--min-quint8 '80' must be above 0 and at most 1; write 80%",
        ),
        (
            {"input_shape": (1, 8, 8)},
            ("--input", "1x8x8"),
            "`input_shape` can only be given for an imported network; space ",
            "--input can only be given for an imported network; space ",
        ),
        (
            {"normalise": "0.5"},
            ("--normalise", "0.5"),
            "`normalise` 0.5: write imagenet, or MEAN/STD",
            "--normalise 0.5: write imagenet, or MEAN/STD",
        ),
        (
            {"finetune": True},
            ("--finetune",),
            "`finetune` requires `weights`; give them too, or leave it out",
            "--finetune requires --weights; give them too, or leave it out",
        ),
        (
            {"warm_epochs": 1.5},
            ("--warm-epochs", "1.5"),
            "`warm_epochs` 1.5 must be a whole number or a part of one epoch",
            "--warm-epochs 1.5 must be a whole number or a part of one epoch",
        ),
        (
            {"warm_epochs": 2, "warm_start": False},
            ("--warm-epochs", "2", "--no-warm-start"),
            "`warm_epochs` requires `warm_start`; set that too, or leave it out",
            "--warm-epochs requires --warm-start; set that too, or leave it out",
        ),
        (
            {"lease": 5},
            ("--lease", "5"),
            "`lease` requires `storage`; give that too, or leave it out",
            "--lease requires --storage; give that too, or leave it out",
        ),
        (
            {"dataset": "cifar10"},
            ("--dataset", "cifar10"),
            "data set cifar10 is not in data/; set `download`, or set `data_dir` to its folder",
            "data set cifar10 is not in data/; set --download, or set --data-dir to its folder",
        ),
        (
            {"dataset": "imagefolder:."},
            ("--dataset", "imagefolder:."),
            "class folders must lie in train/ and test/",
            "class folders must lie in train/ and test/",
        ),
        (
            {"validation": "none", "dataset": "imagefolder:."},
            ("--validation", "none", "--dataset", "imagefolder:."),
            "none is not an existing folder; give one that holds class folders",
            "none is not an existing folder; give one that holds class folders",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_in_a_search(
    asked: dict[str, Any], options: tuple[str, ...], message: str, shown: str, refused: Callable[..., str]
) -> None:
    assert shown in refused(*RUN, *options)
    with pytest.raises(FnetError) as caught:
        search(**{**SEARCH, **asked})
    assert message in str(caught.value)


def test_a_mistake_in_an_evaluation(refused: Callable[..., str]) -> None:
    said = "requires {} validation; give that too, or leave it out"
    Path("here").mkdir()
    assert refused(*EVALUATE, "--validation", "here") == f"--validation {said.format('--split')}"
    with pytest.raises(FnetError) as caught:
        evaluate(**GIVEN, validation="here")  # type: ignore[arg-type]
    assert str(caught.value) == f"`validation` {said.format('`split`')}"


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ({"device": "meta"}, ("--device", "meta"), "unknown device 'meta'; known: auto, cpu, cuda, cuda:N"),
        (
            {"numerics_of": Path("run"), "dtype": "tf32"},
            ("--numerics-of", "run", "--dtype", "tf32"),
            "`numerics_of` sets `dtype` too; leave one of them out",
        ),
        (
            {"numerics_of": Path("run"), "fused": False},
            ("--numerics-of", "run", "--no-fused"),
            "`numerics_of` sets `fused` too; leave one of them out",
        ),
    ],
)
def test_a_mistake_about_the_machine(
    asked: dict[str, Any], options: tuple[str, ...], message: str, refused: Callable[..., str]
) -> None:
    with pytest.raises(FnetError) as caught:
        Machine(**asked)
    assert str(caught.value) == message
    spelled = message.replace("`numerics_of`", "--numerics-of").replace("`dtype`", "--dtype")
    assert refused(*RUN, *options) == spelled.replace("`fused`", "--fused")


def test_a_machine_of_no_threads() -> None:
    """The command line has a range for it."""
    with pytest.raises(FnetError) as caught:
        Machine(threads=0)
    assert str(caught.value) == "`threads` must be at least 1, not 0"


SEARCHES = [
    ({}, ()),
    (
        {
            "dataset": "imagefolder:data",
            "validation": "val",
            "min_quint8": "80%",
            "max_drop": "5%",
            "max_params": "2M",
            "metric": "balanced-accuracy",
            "policy": "random",
            "trials": 3,
            "recipe": "paper",
            "epochs": 7,
            "class_weights": "balanced",
            "warm_epochs": 0.25,
            "prune": False,
            "final_epochs": 2,
            "normalise": "imagenet",
            "factorize": ("conv_in",),
            "keep": ("conv_8",),
            "scheme": "mse+per-channel",
            "audit_all": True,
            "seed": 5,
            "storage": "journal:study.log",
            "artifacts": "store",
            "lease": 30,
            "out": Path("run"),
            "machine": Machine("cpu", "float32", 2, False, workers=3, data_dir=Path("there"), skip_unreadable=True),
        },
        (
            *("--dataset", "imagefolder:data", "--validation", "val", "--min-quint8", "80%", "--max-drop", "5%"),
            *("--max-params", "2M", "--metric", "balanced-accuracy", "--policy", "random", "--trials", "3"),
            *("--recipe", "paper", "--epochs", "7", "--class-weights", "balanced", "--warm-epochs", "0.25"),
            *("--no-prune", "--final-epochs", "2", "--normalise", "imagenet", "--factorize", "conv_in"),
            *("--keep", "conv_8", "--ranges", "mse", "--per-channel", "--audit", "all", "--seed", "5"),
            *("--storage", "journal:study.log", "--artifacts", "store", "--lease", "30", "--out", "run"),
            *("--device", "cpu", "--dtype", "float32", "--threads", "2", "--no-fused", "--workers", "3"),
            *("--data-dir", "there", "--skip-unreadable"),
        ),
    ),
]


def made(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> tuple[Request, Path]:
    """What is asked of a run, which is not begun, and its folder."""
    seen = []

    def run_study(request: Request, run: Any, *_: object) -> None:
        seen.append((request, run.path))
        raise FnetError("the request was made")

    monkeypatch.setattr("fnet_search.engine.run.run_study", run_study)
    with suppress(FnetError):
        call()
    (one,) = seen
    return one


@pytest.mark.parametrize(("asked", "options"), SEARCHES, ids=["defaults", "everything"])
def test_both_make_one_request_of_a_search(
    asked: dict[str, Any], options: tuple[str, ...], fnet: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("data/train").mkdir(parents=True)
    Path("val").mkdir()
    first = made(monkeypatch, lambda: fnet(*RUN, *options))
    second = made(monkeypatch, lambda: search(**SEARCH, **asked))
    assert first == second
    assert type(first[0].policy) is type(second[0].policy)


def test_both_make_one_request_of_an_evaluation(fnet: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--plan", "dws", "--plan", "init2", "--split", "validation", "--validation", "val", "--seed", "3")
    plans = {"plans": ["init2", "dws"], "split": "validation", "validation": "val", "seed": 3}
    Path("val").mkdir()
    first = made(monkeypatch, lambda: fnet(*EVALUATE, *options))
    second = made(monkeypatch, lambda: evaluate(**{**GIVEN, **plans}))
    assert first == second
    assert first[0].policy == second[0].policy


def test_an_unknown_parameter_is_named() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'budgte'"):
        search("tiny", budgte="60%")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'budget'"):
        search("tiny")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'budget'"):
        evaluate("init2", budget="60%")  # type: ignore[call-arg]
