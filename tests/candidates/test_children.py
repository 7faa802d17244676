"""Candidates that start from a trained parent."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Conv, Dense, Flatten
from fnet_search.base.errors import FnetError
from fnet_search.candidates.evaluate import child, evaluate, transform_samples
from fnet_search.candidates.job import Job, Start, unfinished
from fnet_search.candidates.network_files import CHECKPOINT, WEIGHTS, load_trained
from fnet_search.importing.spaces import load_space
from fnet_search.policy.evaluation import Evaluation
from fnet_search.training.datasets import DataSet
from fnet_search.training.network import build
from fnet_search.training.recipe import Fidelity
from fnet_search.training.train import Checkpoint, TrainingProgress, Watch, accuracy, train
from fnet_search.training.weights import read_tensors, write_tensors
from tests.support.candidates import PLAN, RECIPE, REGULAR, SETUP, TINY, Outcome, same_tensors, silent
from tests.support.networks import CPU, sequence


@pytest.fixture(scope="module")
def parent(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """The regular network, trained for three epochs, that others start from."""
    folder = tmp_path_factory.mktemp("parent")
    evaluate(SETUP, data, Job(1, REGULAR, folder), silent)
    return Start(1, REGULAR, folder, 3)


def test_a_child_goes_on_from_its_parent(data: DataSet, parent: Start, tmp_path: Path) -> None:
    """For a share of the epochs, at a small rate."""
    result = Outcome(data, tmp_path, job=Job(12, PLAN, tmp_path, start=parent))
    found = result.evaluation
    assert (found.state, found.plan, found.role, found.parent) == ("complete", PLAN, "candidate", 1)
    assert (found.epochs, found.inherited_epochs, found.trained_images) == (1, 3, 400)
    assert len(found.accuracies) == 1
    assert Evaluation.from_json(found.to_json()) == found
    assert (result.seen[0].stage, result.seen[0].done) == ("starting from candidate 1", 0)
    assert [progress.stage for progress in result.seen].count(result.seen[0].stage) == 1
    shares = [progress.done for progress in result.seen]
    assert shares == sorted(shares)

    network = child(SETUP, data, parent, build(factorize(TINY, PLAN), RECIPE.initializer, 7))
    assert not network.training
    assert found.zero_shot_accuracy == accuracy(network, data, data.evaluation, CPU)
    assert found.zero_shot_accuracy > 0.25, "better than chance, before it is trained"
    train(network, data, RECIPE.warm(), CPU, 7, silent, Checkpoint(tmp_path / "directly", "k"), Watch(data.evaluation))
    saved = load_trained(TINY, PLAN, tmp_path).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in network.state_dict().items())


def test_an_interrupted_child_goes_on(data: DataSet, parent: Start, tmp_path: Path) -> None:
    """It is not started anew from its parent; a training from scratch is not taken for it."""
    setup = replace(SETUP, fidelity=Fidelity(warm_start=True, warm_epochs=2))

    def job(folder: str) -> Job:
        return Job(12, PLAN, tmp_path / folder, start=parent)

    def report(progress: TrainingProgress) -> None:
        if progress.ended:
            raise KeyboardInterrupt

    for cut_off in (job("cut"), replace(job("cut"), start=None)):
        with pytest.raises(KeyboardInterrupt):
            evaluate(setup, data, cut_off, report)
        whole, resumed = (evaluate(setup, data, job(name), silent) for name in ("whole", "cut"))
        assert resumed == whole
        assert resumed.epochs == len(resumed.accuracies) == 2
        assert same_tensors(tmp_path / "whole" / WEIGHTS, tmp_path / "cut" / WEIGHTS)
        (tmp_path / "cut" / CHECKPOINT).unlink()


def test_a_parent_whose_weights_are_missing(data: DataSet, parent: Start, tmp_path: Path) -> None:
    """No fault of the candidate: an error, and no second try."""
    for start, message in (
        (replace(parent, folder=tmp_path / "gone"), f"cannot read weights {tmp_path}/gone/{WEIGHTS}"),
        (replace(parent, plan=PLAN), f"{parent.folder / WEIGHTS} does not hold the weights of plan {PLAN}"),
    ):
        seen: list[TrainingProgress] = []
        with pytest.raises(FnetError) as caught:
            evaluate(SETUP, data, Job(12, PLAN, tmp_path / "12", start=start), seen.append)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)
        assert len(seen) == 1


def test_the_best_is_trained_on_with_the_whole_recipe(data: DataSet, parent: Start, tmp_path: Path) -> None:
    setup = replace(SETUP, fidelity=Fidelity(final_epochs=2))
    found = evaluate(setup, data, Job(20, REGULAR, tmp_path, "final", parent), silent)
    assert (found.state, found.role, found.parent) == ("complete", "final", 1)
    assert (found.epochs, found.inherited_epochs, found.trained_images) == (2, 3, 800)
    before = load_trained(TINY, REGULAR, parent.folder)
    assert found.zero_shot_accuracy == accuracy(before, data, data.evaluation, CPU), "it starts from itself"
    train(
        before,
        data,
        RECIPE.with_epochs(2),
        CPU,
        7,
        silent,
        Checkpoint(tmp_path / "directly", "k"),
        Watch(data.evaluation),
    )
    saved = load_trained(TINY, REGULAR, tmp_path).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.state_dict().items())


def test_a_parent_that_is_not_finite_is_a_failed_start(data: DataSet, parent: Start, tmp_path: Path) -> None:
    state, facts = read_tensors(parent.folder / WEIGHTS)
    name = next(name for name in state if name.endswith("conv_16_1.weight") or "conv_16_1" in name)
    broken = replace(parent, folder=tmp_path / "parent")
    write_tensors(broken.folder / WEIGHTS, state | {name: torch.full_like(state[name], torch.nan)}, facts)
    found = evaluate(SETUP, data, Job(12, PLAN, tmp_path / "12", start=broken), silent)
    assert found.state == "failed"
    assert found.reason.startswith("cannot start from candidate 1: ")
    assert "\n" not in found.reason


def test_a_hopeless_candidate_is_not_measured(outcome: Outcome, data: DataSet, parent: Start, tmp_path: Path) -> None:
    found = evaluate(SETUP, data, Job(12, PLAN, tmp_path / "scratch"), lambda progress: progress.epoch == 2)
    reached = outcome.evaluation.accuracies[:2]
    reason = f"behind the others after epoch 2 of 3 ({100 * reached[1]:.1f} %)"
    expected = unfinished(SETUP, Job(12, PLAN, tmp_path), "pruned", reason)
    assert found == replace(expected, epochs=2, trained_images=800, accuracies=reached)
    assert (found.fp32_accuracy, found.quint8_accuracy, found.qmse, found.layers) == (None, None, None, ())
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == [CHECKPOINT]

    setup = replace(SETUP, fidelity=Fidelity(True, 2))
    warm = evaluate(setup, data, Job(13, PLAN, tmp_path / "warm", start=parent), lambda progress: progress.ended)
    assert warm.reason == f"behind the others after epoch 1 of 2 ({100 * warm.accuracies[0]:.1f} %)"
    assert (warm.state, warm.parent, warm.inherited_epochs, warm.epochs) == ("pruned", 1, 3, 1)
    assert warm.zero_shot_accuracy is not None


def test_fewer_samples_of_large_images_are_fitted() -> None:
    """A quarter of a gigabyte of float32 at most, but 32 images at least."""
    assert transform_samples(load_space("factorizenet")) == 256
    wide = sequence((3, 224, 224), c=Conv(64, (7, 7), (2, 2), (3, 3)), f=Flatten(), d=Dense(2))
    assert transform_samples(wide) == 2**26 // (64 * 112 * 112)
    assert transform_samples(sequence((3, 1024, 1024), c=Conv(64, (1, 1)), f=Flatten(), d=Dense(2))) == 32
