"""What is found out before a run begins or goes on: other configurations, other images, what cannot be run."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fnet_search.base.errors import FnetError
from fnet_search.engine.preparation import check_same_config
from fnet_search.engine.request import Machine
from fnet_search.importing.spaces import load_space
from fnet_search.policy.constraints import Constraints
from fnet_search.quant.scheme import parse_scheme
from fnet_search.report.outcome import Outcome
from fnet_search.rundir.run_folder import RunFolder
from fnet_search.training.recipe import Fidelity
from tests.support.command_line import files_in
from tests.support.runs import SEARCH, WARM, go

pytestmark = pytest.mark.usefixtures("one_picture")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "seed: 3 recorded, 4 wanted"),
        ({"policy_name": "tpe"}, "policy: 'random' recorded, 'tpe' wanted"),
        ({"split": "test"}, "split: 'validation' recorded, 'test' wanted"),
        ({"dataset": "fashion-mnist"}, "dataset: 'digits' recorded, 'fashion-mnist' wanted"),
        ({"constraints": Constraints(conv_macs=1)}, "`budget` (conv MACs): 600000 recorded, 1 wanted"),
        (
            {"constraints": Constraints(600_000, 2_000_000, 0.5, 0.05, "balanced-accuracy")},
            "`max_params`: None recorded, 2000000 wanted; `min_quint8`: None recorded, 0.5 wanted; "
            "`max_drop`: None recorded, 0.05 wanted; `metric`: 'accuracy' recorded, 'balanced-accuracy' wanted",
        ),
        (
            {"recipe": replace(SEARCH.recipe, batch_size=32, epochs=2, class_weights="balanced")},
            "recipe.epochs: 1 recorded, 2 wanted; recipe.batch_size: 64 recorded, 32 wanted; "
            "`class_weights`: 'none' recorded, 'balanced' wanted",
        ),
        ({"fidelity": Fidelity(prune=True)}, "fidelity.prune: False recorded, True wanted"),
        ({"fidelity": Fidelity(True, final_epochs=9)}, "fidelity.warm_start: False recorded, True wanted"),
        (
            {"fidelity": Fidelity(True, 2)},
            "fidelity.warm_start: False recorded, True wanted; fidelity.warm_epochs: 1 recorded, 2 wanted",
        ),
        (
            {"schemes": (parse_scheme("minmax+equalize"),)},
            "`scheme`: 'percentile:1' recorded, 'minmax+equalize' wanted",
        ),
        ({"space": load_space("factorizenet")}, "space"),
        ({"storage": "sqlite:///x.db"}, "storage: None recorded, 'sqlite:///x.db' wanted"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_configuration_is_refused(whole: tuple[Path, Outcome], change: dict[str, object], named: str) -> None:
    with pytest.raises(FnetError) as caught:
        check_same_config(RunFolder(whole[0]), replace(SEARCH, **change).config())
    same = ", or give `scheme` percentile:1" if "schemes" in change else ""
    assert str(caught.value) == f"{whole[0]} was made with another configuration ({named}); choose another `out`{same}"


def test_a_run_that_is_refused_stays_as_it_was(run: Path) -> None:
    """For what was asked for, and for how this machine computes."""
    before = files_in(run)
    otherwise = {
        "seed: 3 recorded, 4 wanted": replace(SEARCH, seed=4),
        "numerics.dtype: 'float32' recorded, 'bfloat16' wanted": replace(
            SEARCH, machine=replace(SEARCH.machine, dtype="bfloat16")
        ),
    }
    for named, request in otherwise.items():
        with pytest.raises(FnetError, match=rf"made with another configuration \({re.escape(named)}\); choose another"):
            go(run, request=request)
    assert files_in(run) == before


def test_a_run_computes_as_another_one_did(run: Path, tmp_path: Path) -> None:
    """Also in what this device would not choose."""
    recorded = json.loads((run / "config.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(run, other)
    recorded["numerics"] |= {"channels_last": False, "group_widths": [32, 16, 16, 8, 16], "alone_threads": 5}
    (other / "config.json").write_text(json.dumps(recorded))
    like = replace(SEARCH, machine=Machine(numerics_of=other))
    _, notes = go(tmp_path / "new", 1, like)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["numerics"] == recorded["numerics"]
    assert not any("choosing the fastest" in text for text in notes.texts)

    with pytest.raises(FnetError, match=f"^{re.escape(str(tmp_path / 'none'))} is not a run folder"):
        go(tmp_path / "third", request=replace(WARM, machine=Machine(numerics_of=tmp_path / "none")))
    assert not (tmp_path / "third").exists()
    with pytest.raises(FnetError, match=r"\(numerics\.channels_last: True recorded, False wanted; "):
        go(run, request=replace(SEARCH, machine=Machine(numerics_of=other)))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of small grey images in three classes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 5)):
        for label, level in (("dark", 30), ("grey", 120), ("light", 210)):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(rng.normal(level, 20, (9, 7)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


def test_other_images_under_the_same_name_are_refused(images: Path, tmp_path: Path) -> None:
    """And the classes of a data set decide how many parameters there are."""
    request = replace(SEARCH, dataset=f"imagefolder:{images}", constraints=Constraints(params=1_459))
    fewest = 1_578 - 7 * (16 + 1)
    with pytest.raises(FnetError, match=rf"^a limit of 1,458 parameters is below .* which has {fewest:,}$"):
        go(tmp_path / "run", request=replace(request, constraints=Constraints(params=fewest - 1)))
    assert not (tmp_path / "run").exists()
    outcome, notes = go(tmp_path / "run", 1, request)
    assert outcome.space.classes == 3
    assert [one.cost.params for one in outcome.evaluations] == [fewest]
    assert "reading images: 75 of 75" in notes.texts
    Image.new("L", (9, 7), 255).save(images / "train" / "dark" / "0.png")
    with pytest.raises(FnetError, match=r"made with another configuration \(data\.fingerprint: '\w{16}' recorded"):
        go(tmp_path / "run", 1, request)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "digit"}, "unknown data set 'digit'"),
        ({"machine": Machine("cuda:99")}, "device 'cuda:99' is not available"),
        ({"storage": "garbage"}, "give an Optuna storage URL"),
        ({"constraints": Constraints(params=1_577)}, "a limit of 1,577 parameters is below the smallest network"),
        (
            {"machine": Machine("cpu", "tf32")},
            r"^dtype tf32 needs a CUDA device of compute capability 8\.0 or more, not cpu$",
        ),
        ({"machine": Machine(dtype="tf32")}, "^dtype tf32 needs a CUDA device of compute capability"),
        (
            {"workers": 1_000_000},
            r"^1000000 workers need about [\d.]+ GB, of which [\d.]+ GB are free; use `workers` \d+ ",
        ),
    ],
)
def test_what_cannot_be_run_leaves_no_folder(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    workers = change.pop("workers", 0)
    if change.get("machine") == Machine(dtype="tf32") and torch.cuda.is_available():
        pytest.skip("this machine has what cannot be there")
    with pytest.raises(FnetError, match=message):
        go(tmp_path / "run", request=replace(SEARCH, **change), workers=workers)
    assert list(tmp_path.iterdir()) == []
