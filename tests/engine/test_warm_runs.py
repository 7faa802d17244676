"""Searches whose candidates start from others."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from fnet_search.arch.plan import regular
from fnet_search.engine.search_loop import Event
from fnet_search.importing.spaces import load_space
from fnet_search.policy.constraints import Constraints
from fnet_search.report.outcome import Outcome
from fnet_search.training.recipe import Fidelity
from fnet_search.training.weights import read_tensors
from tests.support.runs import TINY, WARM, go

pytestmark = pytest.mark.usefixtures("one_picture")


def test_a_warm_search_is_recorded_whole(children: tuple[Path, Outcome, list[Event]]) -> None:
    folder, outcome, _ = children
    reference, *candidates, final = outcome.evaluations
    assert [one.role for one in outcome.evaluations] == ["reference", "candidate", "candidate", "final"]
    best = max(candidates, key=lambda one: one.quint8_accuracy or 0.0)
    assert (reference.plan, reference.parent, reference.epochs) == (regular(TINY), None, 1)
    assert reference.cost.conv_macs == 811_008 > 600_000
    images = reference.trained_images
    for one in candidates:
        assert (one.parent, one.epochs, one.inherited_epochs, one.trained_images) == (0, 1, 1, images)
        assert one.zero_shot_accuracy is not None
        assert len(one.accuracies) == 1
    assert (final.parent, final.plan, final.epochs, final.inherited_epochs) == (best.number, best.plan, 2, 2)
    assert final.trained_images == 2 * images
    found = final.zero_shot_accuracy
    assert found == pytest.approx(best.fp32_accuracy, abs=0.01), "its own weights; in the arithmetic of the training"
    assert outcome.winner is not None
    assert outcome.winner.role != "reference"
    assert json.loads((folder / "config.json").read_text())["fidelity"] == {
        **{"warm_start": True, "warm_epochs": 1, "prune": True, "finetune": False}
    }
    table = pd.read_csv(folder / "candidates.csv")
    assert table["role"].tolist() == ["reference", "candidate", "candidate", "final"]
    assert table["parent"].tolist()[1:] == [0, 0, best.number]
    page = (folder / "report.html").read_text()
    assert "<th>warm start</th><td>from trained parents, 1 epoch, a smaller learning rate</td>" in page
    assert "<th>pruning</th>" in page
    trained_on = f"of candidate {best.number}, for 2 epochs, as candidate 3"
    assert f"<th>final training</th><td>{trained_on}</td>" in page


def test_a_search_may_start_from_the_reference_of_another(
    children: tuple[Path, Outcome, list[Event]], tmp_path: Path
) -> None:
    """For another budget; it is measured as it is."""
    space = load_space("tiny", weights=str(children[0] / "candidates" / "000" / "weights.safetensors"))
    small = replace(WARM, space=space, constraints=Constraints(conv_macs=400_000), fidelity=Fidelity(True, 1))
    outcome, _ = go(tmp_path / "run", 1, small)
    reference, *others = outcome.evaluations
    known = children[1].evaluations[0]
    assert (reference.role, reference.epochs, reference.trained_images) == ("reference", 0, 0)
    for name in ("fp32_accuracy", "quint8_accuracy", "qmse", "layers"):
        assert getattr(reference, name) == getattr(known, name)
    assert [one.parent for one in others if one.state == "complete"] == [0]


def test_the_same_warm_search_again_gives_the_same_table(
    children: tuple[Path, Outcome, list[Event]], tmp_path: Path
) -> None:
    go(tmp_path / "again", request=WARM)
    assert (tmp_path / "again" / "candidates.csv").read_bytes() == (children[0] / "candidates.csv").read_bytes()


def test_a_warm_search_goes_on(warm: Path, children: tuple[Path, Outcome, list[Event]]) -> None:
    """The reference and the final training are done once; then more epochs of it are wanted, then more candidates."""
    _, notes = go(warm, request=WARM)
    assert (notes.started, notes.begun) == ([], [(2, 2)])
    longer = replace(WARM, fidelity=replace(WARM.fidelity, final_epochs=3))
    outcome, notes = go(warm, request=longer)
    assert notes.started == [4]
    final = outcome.evaluations[4]
    before = children[1].evaluations[3]
    assert (final.role, final.epochs, final.parent, final.plan) == ("final", 3, before.parent, before.plan)
    assert go(warm, request=WARM)[1].started == [], "it has had more than that"
    outcome, notes = go(warm, 3, longer)
    assert notes.begun == [(3, 2)]
    assert notes.started[0] == 5
    child = outcome.evaluations[5]
    assert (child.role, child.parent, child.inherited_epochs) == ("candidate", 0, 1)


def test_what_others_start_from_is_trained_again_where_it_was_lost(
    warm: Path, children: tuple[Path, Outcome, list[Event]]
) -> None:
    """To the same bits; where nothing starts from it any more, it is not."""
    reference = warm / "candidates" / "000" / "weights.safetensors"
    before = read_tensors(children[0] / reference.relative_to(warm))[0]
    reference.write_bytes(reference.read_bytes()[:1000])
    _, notes = go(warm, request=WARM)
    assert reference.stat().st_size == 1000, "this run had ended"
    outcome, notes = go(warm, 3, WARM)
    assert any(text.startswith("training candidate 0 once more (") for text in notes.texts)
    after = read_tensors(reference)[0]
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [one.state for one in outcome.evaluations[4:]] == ["complete"] * len(outcome.evaluations[4:])
    assert outcome.evaluations[4].parent == 0


def test_within_the_budget_the_regular_network_may_win(tmp_path: Path) -> None:
    """Trained from scratch with as many epochs, it is not trained on."""
    request = replace(WARM, constraints=Constraints(conv_macs=811_008), fidelity=Fidelity(True, final_epochs=1))
    outcome, notes = go(tmp_path / "run", 1, request)
    (one,) = outcome.evaluations
    assert (one.role, one.plan) == ("candidate", regular(TINY))
    assert outcome.headline().startswith("winner: candidate 0 (regular), 0.811 MMAC, ")
    assert (notes.started, notes.begun) == ([0], [(1, 0)])


def test_a_winner_whose_ancestors_are_lost_is_trained_again_from_them(
    warm: Path, children: tuple[Path, Outcome, list[Event]]
) -> None:
    """The same networks come out."""
    shutil.rmtree(warm / "best")
    for path in warm.glob("candidates/*/*.safetensors"):
        path.unlink()
    outcome, notes = go(warm, request=WARM)
    assert notes.started == []
    assert replace(outcome, folder=children[1].folder) == children[1]
    best = [read_tensors(folder / "best" / "quantized.safetensors")[0] for folder in (warm, children[0])]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    assert (warm / "candidates.csv").read_bytes() == (children[0] / "candidates.csv").read_bytes()
