import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import FactorizationPlan, parse_plan
from fnet_search.base.errors import FnetError
from fnet_search.candidates.evaluate import evaluate
from fnet_search.candidates.job import Job, Start, unfinished
from fnet_search.candidates.measure import measure_split
from fnet_search.candidates.network_files import CHECKPOINT, QUANTIZED, WEIGHTS, load_quantized, load_trained
from fnet_search.policy.evaluation import Audit, Evaluation, Role
from fnet_search.quant.calibration import CALIBRATION_SAMPLES, calibration_batches
from fnet_search.quant.fold import FoldedNetwork
from fnet_search.quant.quantize import quantize
from fnet_search.quant.ranges import calibrate
from fnet_search.quant.scheme import RangeMethod, Scheme, parse_scheme
from fnet_search.quant.simulator import QuantizedNetwork
from fnet_search.training.datasets import DataSet, load_dataset
from fnet_search.training.recipe import Fidelity, Recipe
from fnet_search.training.train import Report, TrainingFailed, TrainingProgress
from fnet_search.training.weights import read_tensors, write_tensors
from tests.support.candidates import PLAN, RECIPE, REGULAR, SETUP, TINY, Outcome, same_tensors, silent
from tests.support.networks import FAST, compiled


def load_candidate(plan: FactorizationPlan, folder: Path) -> tuple[FoldedNetwork, QuantizedNetwork]:
    return load_quantized(load_trained(TINY, plan, folder), Scheme(), folder)


def test_what_is_recorded(outcome: Outcome, data: DataSet) -> None:
    found = outcome.evaluation
    assert (found.number, found.plan, found.cost) == (12, PLAN, plan_cost(TINY, PLAN))
    assert (found.state, found.reason) == ("complete", "")
    assert (found.split, found.scheme, found.seed, found.epochs) == ("validation", "percentile:1", 7, 3)
    assert found.trained_images == 3 * 400
    assert (found.role, found.parent, found.inherited_epochs, found.zero_shot_accuracy) == ("candidate", None, 0, None)
    ended = tuple(progress.accuracy for progress in outcome.seen if progress.ended)
    assert found.accuracies == ended
    assert len(ended) == 3
    assert found.audit is None
    assert [layer.layer for layer in found.layers][:3] == ["conv_in", "conv_8.grouped", "conv_8.pointwise"]
    assert Evaluation.from_json(found.to_json()) == found


def test_it_measures_what_it_saved(outcome: Outcome, data: DataSet) -> None:
    folded, quantized = load_candidate(PLAN, outcome.folder)
    x, labels = data.normalise(data.evaluation.images), data.evaluation.labels.numpy()
    y, y8 = (network(x).double().numpy() for network in (folded, quantized))
    found = outcome.evaluation
    assert found.fp32_accuracy is not None
    assert found.quint8_accuracy is not None
    assert found.qce is not None
    assert found.kl is not None

    def log_softmax(
        logits: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return np.asarray(logits - np.log(np.exp(logits).sum(1, keepdims=True)))

    p, log_p, log_q = np.exp(log_softmax(y)), log_softmax(y), log_softmax(y8)
    assert found.fp32_accuracy == pytest.approx((y.argmax(1) == labels).mean(), abs=1e-12)
    assert found.quint8_accuracy == pytest.approx((y8.argmax(1) == labels).mean(), abs=1e-12)
    assert found.fp32_accuracy > 0.3
    assert found.qmse == pytest.approx(np.square(y - y8).mean(), rel=1e-4)
    assert found.qce == pytest.approx(-(p * log_q).sum(1).mean(), rel=1e-4)
    assert found.kl == pytest.approx((p * (log_p - log_q)).sum(1).mean(), rel=1e-3)
    assert found.qce > found.kl > 0
    assert found.relative_drop == (found.fp32_accuracy - found.quint8_accuracy) / found.fp32_accuracy


def test_ranges_come_from_the_training_images(outcome: Outcome, data: DataSet) -> None:
    folded, quantized = load_candidate(PLAN, outcome.folder)
    stats = calibrate(folded, calibration_batches(data, 7, CALIBRATION_SAMPLES), RangeMethod())
    assert quantize(folded, stats).params == quantized.params
    low, high = (float(value) for value in data.normalise(data.train.images).aminmax())
    assert (stats["input"].low, stats["input"].high) == (low, high)


def test_the_same_evaluation_twice(outcome: Outcome, data: DataSet, tmp_path: Path) -> None:
    again = Outcome(data, tmp_path)
    assert again.evaluation == outcome.evaluation
    assert again.seen == outcome.seen
    for name in (WEIGHTS, QUANTIZED):
        assert same_tensors(tmp_path / name, outcome.folder / name)


def test_progress_runs_from_the_first_step_to_the_last_measurement(outcome: Outcome) -> None:
    shares = [progress.done for progress in outcome.seen]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.1
    assert shares[-1] == 1
    assert [progress.epoch for progress in outcome.seen if progress.ended] == [1, 2, 3]
    assert {progress.split for progress in outcome.seen} == {"validation"}
    stages = [progress.stage for progress in outcome.seen]
    assert list(dict.fromkeys(stages)) == ["", "quantizing", "measuring"]


@pytest.mark.parametrize(("stage", "epoch"), [("", 1), ("", 2), ("quantizing", 3), ("measuring", 3)])
def test_an_interrupted_evaluation_goes_on(
    outcome: Outcome, data: DataSet, tmp_path: Path, stage: str, epoch: int
) -> None:
    def report(progress: TrainingProgress) -> None:
        if (progress.stage, progress.epoch) == (stage, epoch) and (stage or progress.ended):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(SETUP, data, Job(12, PLAN, tmp_path), report)
    assert not (tmp_path / QUANTIZED).exists()
    resumed = Outcome(data, tmp_path)
    assert resumed.evaluation == outcome.evaluation
    assert [progress.epoch for progress in resumed.seen if progress.ended] == [1, 2, 3]
    trained = {progress.epoch for progress in resumed.seen if not progress.ended and not progress.stage}
    assert trained == set(range(epoch + 1, 4))


def test_a_study_of_fixed_plans_is_measured_on_the_test_images(data: DataSet, tmp_path: Path) -> None:
    whole = load_dataset("digits", (3, 32, 32))
    small = replace(whole, train=data.train, test=whole.test.take(torch.arange(60)))
    small = replace(small, evaluation=small.test)
    result = Outcome(small, tmp_path, replace(SETUP, split="test", recipe=RECIPE.with_epochs(1)))
    found = result.evaluation
    assert found.split == "test"
    assert {progress.split for progress in result.seen} == {"training"}
    folded, _ = load_candidate(PLAN, tmp_path)
    hits = folded(small.normalise(small.test.images)).argmax(1) == small.test.labels
    assert found.fp32_accuracy == pytest.approx(float(hits.double().mean()))


def test_a_training_that_fails_is_tried_twice_and_recorded(data: DataSet, tmp_path: Path) -> None:
    result = Outcome(data, tmp_path, replace(SETUP, recipe=replace(RECIPE, learning_rate=1e30)))
    found = result.evaluation
    assert found.state == "failed"
    assert found.reason == "the loss was not finite in epoch 1 of 3 (tried 2 times)"
    assert (found.number, found.plan, found.cost, found.split) == (12, PLAN, plan_cost(TINY, PLAN), "validation")
    assert (found.fp32_accuracy, found.quint8_accuracy, found.layers) == (None, None, ())
    steps = 400 // 32 + 1
    assert len(result.seen) == 2 * steps
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_quantized_is_recorded(data: DataSet, tmp_path: Path) -> None:
    """Its only step is one too far, after a finite loss."""
    recipe = replace(RECIPE, epochs=1, batch_size=400, learning_rate=1e30)
    found = Outcome(data, tmp_path, replace(SETUP, recipe=recipe)).evaluation
    assert found.state == "failed"
    assert found.reason.startswith("cannot be quantized: the activations of ")
    assert found.reason.endswith(" are not finite (tried 2 times)")
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "out of memory (tried 2 times)"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "out of memory: CUDA out of memory. (tried 2 times)"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "out of memory: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes (tried 2 times)",
        ),
    ],
)
def test_out_of_memory_is_recorded(data: DataSet, tmp_path: Path, error: Exception, reason: str) -> None:
    def report(progress: TrainingProgress) -> None:
        raise error

    found = evaluate(SETUP, data, Job(0, PLAN, tmp_path), report)
    assert (found.state, found.reason) == ("failed", reason)


def test_a_second_try_has_another_seed(data: DataSet, tmp_path: Path) -> None:
    """And is not stopped: it is the first one that was compared with others."""
    steps = []

    def report(progress: TrainingProgress) -> bool:
        steps.append(progress)
        if len(steps) == 5:
            raise TrainingFailed("the loss was not finite in epoch 1 of 2")
        return progress.ended

    setup = replace(SETUP, recipe=RECIPE.with_epochs(1))
    found = evaluate(setup, data, Job(0, PLAN, tmp_path), report)
    assert (found.state, found.seed, found.trained_images) == ("complete", 7 + 1_000_000, 400)
    direct = evaluate(replace(setup, seed=7 + 1_000_000), data, Job(0, PLAN, tmp_path / "direct"), silent)
    assert same_tensors(tmp_path / WEIGHTS, tmp_path / "direct" / WEIGHTS)
    assert direct.fp32_accuracy == found.fp32_accuracy
    found = evaluate(
        replace(SETUP, recipe=RECIPE.with_epochs(2)), data, Job(0, PLAN, tmp_path / "two"), failing(report)
    )
    assert (found.state, found.epochs) == ("complete", 2)


def failing(report: Report) -> Report:
    """Whose first epoch fails, once."""
    told = iter(range(10**9))

    def failing(progress: TrainingProgress) -> bool | None:
        if next(told) == 0:
            raise TrainingFailed("the loss was not finite in epoch 1 of 2")
        return report(progress)

    return failing


def test_out_of_memory_goes_on_from_the_checkpoint(data: DataSet, tmp_path: Path) -> None:
    """With the same seed: the network is that of a training with enough memory. Also after the last epoch."""
    setup, expected = replace(SETUP, recipe=RECIPE.with_epochs(2)), []
    for name, when in (("plain", None), ("in epoch 2", (2, "")), ("measuring", (2, "measuring"))):
        told: list[TrainingProgress] = []

        def report(progress: TrainingProgress, when: object = when, told: list[TrainingProgress] = told) -> None:
            told.append(progress)
            if (progress.epoch, progress.stage) == when and [(one.epoch, one.stage) for one in told].count(when) == 1:
                raise MemoryError

        expected.append(evaluate(setup, data, Job(0, PLAN, tmp_path / name), report))
        first_epoch = [one for one in told if one.epoch == 1 and not one.ended]
        assert len(first_epoch) == math.ceil(400 / RECIPE.batch_size)
        assert same_tensors(tmp_path / name / WEIGHTS, tmp_path / "plain" / WEIGHTS)
    assert expected[1:] == expected[:1] * 2


def test_other_errors_are_raised(data: DataSet, tmp_path: Path) -> None:
    def report(progress: TrainingProgress) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        evaluate(SETUP, data, Job(0, PLAN, tmp_path), report)
    (tmp_path / "file").write_text("where the folder should be")
    with pytest.raises(OSError, match="file"):
        evaluate(SETUP, data, Job(0, PLAN, tmp_path / "file"), silent)


def test_files_that_do_not_fit_are_named(outcome: Outcome, tmp_path: Path) -> None:
    def fault(plan: FactorizationPlan = PLAN) -> str:
        with pytest.raises(FnetError) as caught:
            load_candidate(plan, tmp_path)
        return str(caught.value).replace(str(tmp_path), "FOLDER")

    assert fault().startswith("cannot read weights FOLDER/weights.safetensors")
    shutil.copy(outcome.folder / WEIGHTS, tmp_path / WEIGHTS)
    assert fault().startswith("cannot read weights FOLDER/quantized.safetensors")
    regular = parse_plan(TINY, "regular")
    assert fault(regular) == f"FOLDER/weights.safetensors does not hold the weights of plan {regular}"
    shutil.copy(tmp_path / WEIGHTS, tmp_path / QUANTIZED)
    foreign = "FOLDER/quantized.safetensors does not hold the codes of FOLDER/weights.safetensors quantized with "
    assert fault() == f"{foreign}percentile:1"
    shutil.copy(outcome.folder / QUANTIZED, tmp_path / QUANTIZED)
    load_candidate(PLAN, tmp_path)
    codes, facts = read_tensors(tmp_path / QUANTIZED)
    write_tensors(tmp_path / QUANTIZED, codes, {**facts, "weights": "0" * 16})
    assert fault() == f"{foreign}percentile:1", "of another training"
    write_tensors(tmp_path / QUANTIZED, codes, {**facts, "scheme": "mse"})
    assert fault() == f"{foreign}percentile:1", "of another scheme"
    write_tensors(tmp_path / QUANTIZED, codes | {"conv_in.weight": codes["conv_in.weight"][:, :1]}, facts)
    assert fault().startswith("FOLDER/quantized.safetensors: the quantized weights do not fit the network: those of ")
    assert fault().endswith("'conv_in' have another shape")
    del codes["conv_in.weight"]
    write_tensors(tmp_path / QUANTIZED, codes, facts)
    assert "FOLDER/quantized.safetensors: the quantized weights do not fit the network: 'conv_in.weight'" in fault()


def test_an_audited_candidate(outcome: Outcome, data: DataSet, tmp_path: Path) -> None:
    """Every validation image, ten classes; all else as in one that is not audited."""
    found = Outcome(data, tmp_path, replace(SETUP, audited=True)).evaluation
    images = len(data.evaluation)
    assert found.audit == Audit(images, images * 10, 0, 0)
    assert replace(found, audit=None) == outcome.evaluation
    assert Evaluation.from_json(found.to_json()) == found


def test_a_candidate_of_another_scheme_is_read_back(data: DataSet, tmp_path: Path) -> None:
    scheme = parse_scheme("minmax+per-channel+equalize+bias-correct")
    setup = replace(SETUP, schemes=(scheme,), audited=True, recipe=RECIPE.with_epochs(1))
    found = Outcome(data, tmp_path, setup).evaluation
    assert found.scheme == str(scheme)
    assert found.audit is not None
    assert found.audit.differing == 0
    folded, quantized = load_quantized(load_trained(TINY, PLAN, tmp_path), scheme, tmp_path)
    again = measure_split(folded, quantized, data, data.evaluation)
    assert (again.fp32_accuracy, again.quint8_accuracy, again.qmse) == (
        found.fp32_accuracy,
        found.quint8_accuracy,
        found.qmse,
    )
    _, facts = read_tensors(tmp_path / QUANTIZED)
    assert (facts["plan"], facts["scheme"]) == (str(PLAN), str(scheme))


@pytest.mark.parametrize(
    ("role", "started", "expected"),
    [
        ("candidate", False, RECIPE),
        ("reference", False, RECIPE),
        ("reference", True, RECIPE),
        ("candidate", True, RECIPE.warm(2)),
        ("final", True, RECIPE.with_epochs(5)),
        ("final", False, RECIPE.with_epochs(5)),
    ],
)
def test_how_a_candidate_is_trained(role: Role, started: bool, expected: Recipe) -> None:
    setup = replace(SETUP, fidelity=Fidelity(True, 2, True, 5))
    start = Start(1, REGULAR, Path("1"), 3) if started else None
    assert setup.recipe_of(Job(12, PLAN, Path("12"), role, start)) == expected
    share = replace(setup, fidelity=Fidelity(True, None, True, 5)).recipe_of(Job(12, PLAN, Path("12"), role, start))
    assert share == (RECIPE.warm() if expected == RECIPE.warm(2) else expected)


@pytest.mark.parametrize(
    ("role", "plan", "warm", "threads"),
    [
        ("reference", REGULAR, True, 4),
        ("candidate", REGULAR, True, 4),  # within the ceilings; others start from it too
        ("candidate", REGULAR, False, 2),
        ("candidate", PLAN, True, 2),
        ("final", PLAN, True, 4),
        ("final", PLAN, False, 4),
    ],
)
def test_what_is_trained_alone_has_more_threads(role: Role, plan: FactorizationPlan, warm: bool, threads: int) -> None:
    numerics = replace(SETUP.numerics, threads=2, alone_threads=4)
    setup = replace(SETUP, numerics=numerics, fidelity=Fidelity(warm))
    assert setup.threads_of(Job(12, plan, Path("12"), role)) == threads


def test_an_evaluation_with_nothing_measured() -> None:
    start = Start(4, REGULAR, Path("4"), 9)
    assert unfinished(SETUP, Job(12, PLAN, Path("12"), "final", start), "failed", "why") == Evaluation(
        12,
        PLAN,
        plan_cost(TINY, PLAN),
        "failed",
        "why",
        role="final",
        split="validation",
        scheme="percentile:1",
        seed=7,
        parent=4,
        inherited_epochs=9,
    )


@pytest.mark.slow
@compiled
def test_fast_numerics_measure_and_save_what_plain_ones_do(data: DataSet, tmp_path: Path) -> None:
    """A network that was trained fast is an ordinary one."""
    found = Outcome(data, tmp_path, replace(SETUP, numerics=FAST)).evaluation
    folded, quantized = load_candidate(PLAN, tmp_path)
    again = measure_split(folded, quantized, data, data.evaluation)
    assert (again.fp32_accuracy, again.quint8_accuracy) == (found.fp32_accuracy, found.quint8_accuracy)
    assert found.fp32_accuracy is not None
    assert found.fp32_accuracy > 0.3
    assert found.accuracies[-1] == pytest.approx(found.fp32_accuracy, abs=0.03)
