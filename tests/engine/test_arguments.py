"""What is recorded of a request, equal to what earlier versions recorded, byte for byte; and what its parts refuse."""

import inspect
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fnet_policies import Random
from fnet_search import FnetError, Machine, Scheme, evaluate, load_space, search
from fnet_search.arch.factorize import factorize
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import regular
from fnet_search.arch.space_file import to_toml
from fnet_search.engine.arguments import EvaluateArguments, SearchArguments
from fnet_search.quant.scheme import CHOICE
from fnet_search.training.network import build
from fnet_search.training.recipe import Fidelity

TINY = load_space("tiny")
QUICK = (
    '"batch_size": 64, "learning_rate": 0.04, "momentum": 0.9, "nesterov": true, "weight_decay": 0.0005, '
    '"label_smoothing": 0.1, "class_weights": "none", "initializer": "glorot_uniform", "schedule": "one-cycle", '
    '"milestones": [], "warmup": 0.2, "epoch_share": 1.0, "warm_share": 0.2, "warm_rate": 0.25, "augmentation": '
    '{"shift": 0.0625, "zoom": 0.0, "rotation": 0.0, "horizontal_flip": true, "vertical_flip": false}'
)
NO_LIMITS = '{"conv_macs": null, "params": null, "min_quint8": null, "max_drop": null, "metric": "accuracy"}'


def recorded(space: Macroarchitecture, others: str) -> str:
    return f'{{"space": {json.dumps(to_toml(space))}, "weights": null, {others}}}'


def test_a_search_of_defaults_is_recorded_as_before() -> None:
    asked = SearchArguments("tiny", budget="60%")
    made = asked.request()
    assert json.dumps(made.config()) == recorded(
        TINY,
        f'"dataset": "digits", "recipe": {{"name": "quick", "epochs": 6, {QUICK}}}, "fidelity": {{"warm_start": true, '
        '"warm_epochs": 1, "prune": true, "finetune": false}, "policy": "layer-guided", "constraints": {"conv_macs": '
        '486604, "params": null, "min_quint8": null, "max_drop": null, "metric": "accuracy"}, "scheme": "auto", '
        '"seed": 0, "split": "validation", "storage": null',
    )
    assert asked.folder(made) == Path("runs/tiny-digits-layer-guided-60pct")
    assert (made.trials, made.schemes, made.fidelity.final_epochs) == (6, CHOICE, 6)


def test_a_search_of_everything_is_recorded_as_before() -> None:
    asked = SearchArguments(
        "tiny",
        "imagefolder:/x/y z",
        budget=600_000,
        policy=Random(),
        min_quint8="80%",
        max_drop=0.05,
        max_params="2M",
        metric="balanced-accuracy",
        trials=3,
        recipe="paper",
        epochs=7,
        class_weights="balanced",
        warm_epochs=0.25,
        prune=False,
        final_epochs=2,
        factorize=["conv_in"],
        keep=("conv_8",),
        scheme=Scheme(per_channel=True),
        audit_all=True,
        seed=5,
        storage="postgresql://me:secret@h/db",
        artifacts="s3://b",
        lease=30.0,
        validation="/v",
        machine=Machine(workers=2),
    )
    made = asked.request()
    assert {node.name for node in made.space.nodes if getattr(node.layer, "factorize", False)} == {
        *("conv_in", "conv_16_1", "conv_16_2")
    }
    assert json.dumps(made.config()) == recorded(
        made.space,
        '"dataset": "imagefolder:/x/y z", "recipe": {"name": "paper", "epochs": 7, "batch_size": 128, "learning_rate": '
        '0.01, "momentum": 0.9, "nesterov": false, "weight_decay": 0.0, "label_smoothing": 0.0, "class_weights": '
        '"balanced", "initializer": "glorot_uniform", "schedule": "steps", "milestones": [2.625, 4.2, 5.95], "warmup": '
        '0.2, "epoch_share": 1.0, "warm_share": 0.2, "warm_rate": 0.25, "augmentation": {"shift": 0.1, "zoom": 0.1, '
        '"rotation": 15, "horizontal_flip": true, "vertical_flip": true}}, "fidelity": {"warm_start": true, '
        '"warm_epochs": 0.25, "prune": false, "finetune": false}, "policy": "Random", "constraints": {"conv_macs": '
        '600000, "params": 2000000, "min_quint8": 0.8, "max_drop": 0.05, "metric": "balanced-accuracy"}, "scheme": '
        '"percentile:1+per-channel", "seed": 5, "split": "validation", "storage": "postgresql://me:***@h/db"',
    )
    assert asked.folder(made) == Path("runs/tiny-y_z-Random-600000")
    assert asdict(made.fidelity)["final_epochs"] == 2
    assert (made.validation, made.artifacts, made.lease, made.audit_all) == ("/v", "s3://b", 30.0, True)


def test_an_evaluation_is_recorded_as_before() -> None:
    more = {"split": "validation", "validation": "/v", "epochs": 3, "scheme": "mse+equalize", "seed": 2**32 - 1}
    asked = EvaluateArguments(["init2", "dws", "init2"], TINY, "cifar10", **more)  # type: ignore[arg-type]
    made = asked.request()
    assert json.dumps(made.config()) == recorded(
        TINY,
        f'"dataset": "cifar10", "recipe": {{"name": "quick", "epochs": 3, {QUICK}}}, '
        '"fidelity": {"warm_start": false, "warm_epochs": 1, "prune": false, "finetune": false}, '
        f'"policy": "fixed plans", "constraints": {NO_LIMITS}, '
        '"scheme": "mse+equalize", "seed": 4294967295, "split": "validation", "storage": null',
    )
    assert asked.folder(made) == Path("runs/evaluate-tiny-cifar10-validation")
    assert made.audit_all


def test_the_calls_have_the_parameters_of_their_arguments() -> None:
    for call, arguments in ((search, SearchArguments), (evaluate, EvaluateArguments)):
        parameters = inspect.signature(call).parameters
        assert parameters == inspect.signature(arguments).parameters
        assert {name for name, one in parameters.items() if one.kind is not inspect.Parameter.KEYWORD_ONLY} == {
            *("space", "dataset"),
            *(["plans"] if call is evaluate else []),
        }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "tset"}, "unknown split 'tset'; did you mean 'test'? known: validation, test"),
        ({"seed": 2**32}, "`seed` must be from 0 to 4294967295, not 4294967296"),
        ({"trials": 0}, "`trials` must be at least 1, not 0"),
        ({"storage": "journal:x", "lease": 0.5}, "`lease` must be at least 1, not 0.5"),
        ({"artifacts": "x"}, "`artifacts` requires `storage`; give that too, or leave it out"),
        (
            {
                "space": replace(TINY, weights=build(factorize(TINY, regular(TINY)), "he_normal", 0).state_dict()),
                "fidelity": Fidelity(),
            },
            "`weights` requires `warm_start` in a search; set that too, or leave it out",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_request_that_cannot_be(change: dict[str, Any], message: str) -> None:
    """However it is made: it checks itself."""
    with pytest.raises(FnetError) as caught:
        replace(SearchArguments("tiny", budget="60%").request(), **change)
    assert str(caught.value) == message
