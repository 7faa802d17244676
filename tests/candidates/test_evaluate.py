import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Activation, Conv, Dense, Flatten
from fnet_search.arch.plan import FactorizationPlan, parse_plan
from fnet_search.base.errors import FnetError
from fnet_search.candidates.evaluate import child, evaluate, transform_samples
from fnet_search.candidates.job import Job, Setup, Start, unfinished
from fnet_search.candidates.measure import MEASURED, measure
from fnet_search.candidates.network_files import CHECKPOINT, QUANTIZED, WEIGHTS, load_quantized, load_trained
from fnet_search.deploy.export import quantized_model
from fnet_search.deploy.runtime import Runtime
from fnet_search.importing.spaces import load_space
from fnet_search.policy.evaluation import Audit, Evaluation, Role
from fnet_search.policy.metric import ClassResult
from fnet_search.quant.bias_correction import correct_biases
from fnet_search.quant.calibration import AT_ONCE, CALIBRATION_SAMPLES, CORRECTION_SAMPLES, calibration, prepare
from fnet_search.quant.equalize import equalize
from fnet_search.quant.fold import FoldedNetwork, fold
from fnet_search.quant.quantize import quantize
from fnet_search.quant.ranges import calibrate
from fnet_search.quant.scheme import PAPER, RangeMethod, Scheme, parse_scheme
from fnet_search.quant.simulator import QuantizedNetwork
from fnet_search.training.datasets import DataSet, Split, load_dataset
from fnet_search.training.network import build
from fnet_search.training.recipe import Augmentation, Fidelity, Recipe
from fnet_search.training.train import Checkpoint, Report, TrainingFailed, TrainingProgress, Watch, accuracy, train
from fnet_search.training.weights import read_tensors, write_tensors
from tests.support.networks import CPU, FAST, MIXED, batches_of, compiled, digits, noise, normal, randomized, sequence

TINY = load_space("tiny")
PLAN = parse_plan(TINY, "f2")
REGULAR = parse_plan(TINY, "regular")
RECIPE = Recipe("test", 3, 32, 0.1, weight_decay=5e-4, augmentation=Augmentation(shift=0.05))
SETUP = Setup(TINY, RECIPE, (PAPER,), CPU, 7, "validation")


def load_candidate(plan: FactorizationPlan, folder: Path) -> tuple[FoldedNetwork, QuantizedNetwork]:
    return load_quantized(load_trained(TINY, plan, folder), Scheme(), folder)


def silent(progress: TrainingProgress) -> None:
    pass


@pytest.fixture(scope="module")
def data() -> DataSet:
    return digits(400)


class Outcome:
    """An evaluation, its folder, and what was reported on the way."""

    def __init__(self, data: DataSet, folder: Path, setup: Setup = SETUP, job: Job | None = None) -> None:
        self.folder, self.seen = folder, list[TrainingProgress]()
        self.evaluation = evaluate(setup, data, job or Job(12, PLAN, folder), self.seen.append)


@pytest.fixture(scope="module")
def outcome(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Outcome(data, tmp_path_factory.mktemp("candidate"))


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
    stats = calibrate(folded, calibration(data, 7, CALIBRATION_SAMPLES), RangeMethod())
    assert quantize(folded, stats).params == quantized.params
    low, high = (float(value) for value in data.normalise(data.train.images).aminmax())
    assert (stats["input"].low, stats["input"].high) == (low, high)


def same_tensors(one: Path, other: Path) -> bool:
    """Files may differ: safetensors writes metadata in any order."""
    (tensors, metadata), (others, other_metadata) = read_tensors(one), read_tensors(other)
    assert (tensors.keys(), metadata) == (others.keys(), other_metadata)
    return all(torch.equal(tensors[name], others[name]) for name in tensors)


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


def test_calibration_samples_are_random_training_images_and_always_the_same(data: DataSet) -> None:
    batches = calibration(data, 3, 300)
    first, second = torch.cat(list(batches())), torch.cat(list(batches()))
    assert [len(batch) for batch in batches()] == [128, 128, 44]
    assert torch.equal(first, second)
    training = {image.numpy().tobytes() for image in data.normalise(data.train.images)}
    drawn = {image.numpy().tobytes() for image in first}
    assert drawn <= training
    assert len(drawn) > 290
    assert not torch.equal(first, torch.cat(list(calibration(data, 4, 300)())))
    assert sum(map(len, calibration(data, 3, CALIBRATION_SAMPLES)())) == 400


def test_metrics_by_hand() -> None:
    """One weight that 8 bits do not hold, two classes, three images."""
    folded = fold(randomized(sequence((1, 1, 1), f=Flatten(), d=Dense(2))))
    folded.weight["d"].copy_(torch.tensor([[1.0], [-0.3]]))
    folded.bias["d"].copy_(torch.tensor([0.0, 0.5]))
    split = Split(torch.tensor([0, 100, 255], dtype=torch.uint8).view(3, 1, 1, 1), torch.tensor([1, 1, 1]))
    data = DataSet("d", ("a", "b"), split, split, split, (0.0,), (1.0,), True)
    x = data.normalise(split.images)
    quantized = quantize(folded, calibrate(folded, batches_of(x), RangeMethod()))
    counts: list[int] = []
    found = measure(folded, quantized, data, split, counts.append)
    y, y8 = folded(x).double(), quantized(x).double()
    assert not torch.equal(y, y8)
    p, q = y.exp() / y.exp().sum(1, True), y8.exp() / y8.exp().sum(1, True)
    assert found.qmse == pytest.approx(sum(float(d) ** 2 for d in (y - y8).flatten()) / 6)
    assert found.qce == pytest.approx(
        -sum(float(a * b.log()) for a, b in zip(p.flatten(), q.flatten(), strict=True)) / 3
    )
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum()) / 3, rel=1e-6)
    assert found.fp32_accuracy == pytest.approx(1 / 3)  # 0 < 0.5, but 0.39 > 0.38 and 1 > 0.2
    assert found.fp32_loss == pytest.approx(-float(p[:, 1].log().mean()))
    assert found.quint8_loss == pytest.approx(-float(q[:, 1].log().mean()))
    assert counts == [3]
    assert found.confusion == ((1, 0, 2), (1, 1, 1))
    assert found.classes == (ClassResult(0, 0, 0, 2, 2, "a"), ClassResult(3, 1, 1, 1, 1, "b"))
    kept = found.complete(Evaluation(0, REGULAR, plan_cost(TINY, REGULAR)))
    assert (kept.classes, kept.fp32_balanced_accuracy, kept.constant) == (found.classes, 1 / 3, "")


def test_ties_go_to_the_lowest_class() -> None:
    """All logits are zero, in both networks; a tenth of the labels are 0."""
    folded = fold(randomized(sequence((1, 2, 2), f=Flatten(), d=Dense(10))))
    folded.weight["d"].zero_()
    folded.bias["d"].zero_()
    split = Split(torch.zeros(600, 1, 2, 2, dtype=torch.uint8), torch.arange(600) % 10)
    data = DataSet("d", tuple("0123456789"), split, split, split, (0.5,), (1.0,), True)
    quantized = quantize(folded, calibrate(folded, batches_of(data.normalise(split.images)), RangeMethod()))
    counts: list[int] = []
    found = measure(folded, quantized, data, split, counts.append)
    assert (found.fp32_accuracy, found.quint8_accuracy) == (0.1, 0.1)
    assert found.qmse == 0
    assert found.kl == pytest.approx(0, abs=1e-12)
    assert found.qce == pytest.approx(np.log(10))
    assert counts == [*range(MEASURED, 600 + 1, MEASURED)]
    assert found.quint8_loss == pytest.approx(np.log(10))
    assert (found.images, found.right) == (600, f"{2**60 - 1:x}")  # bits in order of the classes: all of class 0
    assert found.classes == (
        ClassResult(60, 60, 60, 600, 600, "0"),
        *[ClassResult(60, 0, 0, name=name) for name in "123456789"],
    )
    assert found.confusion == tuple((label, 0, 60) for label in range(10))
    assert (
        found.complete(Evaluation(0, REGULAR, plan_cost(TINY, REGULAR))).constant
        == "fp32 and quint8 predict class '0' for every image"
    )


def test_measuring_takes_an_uneven_number_of_images() -> None:
    """The mean over all images, not over batches."""
    space = sequence((3, 8, 8), c=Conv(4), f=Flatten(), d=Dense(5))
    folded = fold(randomized(space))
    images = torch.randint(0, 256, (263, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(263) % 5)
    data = DataSet("d", tuple("abcde"), split, split, split, (0.5,) * 3, (0.3,) * 3, True)
    quantized = quantize(folded, calibrate(folded, batches_of(normal(50, 3, 8, 8)), RangeMethod()))
    x = data.normalise(images)
    found = measure(folded, quantized, data, split)
    assert found.qmse == pytest.approx(float((folded(x).double() - quantized(x).double()).square().mean()), rel=1e-5)
    assert found.fp32_accuracy == pytest.approx(float((folded(x).argmax(1) == split.labels).double().mean()))


@pytest.mark.parametrize(
    "text",
    [
        *("percentile:5", "minmax+per-channel", "minmax+equalize", "percentile:1+bias-correct"),
        "minmax+per-channel+equalize+bias-correct",
    ],
)
def test_a_network_is_made_ready_as_the_scheme_says(text: str) -> None:
    trained, data, scheme = randomized(MIXED), noise(MIXED, 300), parse_scheme(text)
    told: list[tuple[int, int]] = []
    found = prepare(trained, scheme, data, 3, lambda done, total: told.append((done, total)))
    images = len(data.train) * (1 if scheme.ranges.kind == "minmax" else 2)
    assert told[-1] == (images, images), "in one pass or two"
    folded = equalize(fold(trained)) if "equalize" in text else fold(trained)
    stats = calibrate(folded, calibration(data, 3, CALIBRATION_SAMPLES, AT_ONCE), scheme.ranges)
    network = quantize(folded, stats, "per-channel" in text)
    if "bias-correct" in text:
        few = calibration(data, 3, CORRECTION_SAMPLES, AT_ONCE)
        network = correct_biases(folded, network, few)
    assert all(torch.equal(found.folded.weight[name], weight) for name, weight in folded.weight.items())
    assert {name: (one.low, one.high) for name, one in found.stats.items()} == {
        name: (one.low, one.high) for name, one in stats.items()
    }
    tensors = found.network.to_tensors()
    assert tensors.keys() == network.to_tensors().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in network.to_tensors().items())


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
    again = measure(folded, quantized, data, data.evaluation)
    assert (again.fp32_accuracy, again.quint8_accuracy, again.qmse) == (
        found.fp32_accuracy,
        found.quint8_accuracy,
        found.qmse,
    )
    _, facts = read_tensors(tmp_path / QUANTIZED)
    assert (facts["plan"], facts["scheme"]) == (str(PLAN), str(scheme))


def test_measuring_counts_what_the_runtime_gives_otherwise() -> None:
    """Over batches of 250: here the runtime has the network of other weights."""
    space = sequence((3, 8, 8), c=Conv(4), r=Activation(), f=Flatten(), d=Dense(5))
    data = noise(space, 263)
    one, other = (prepare(randomized(space), parse_scheme(text), data, 0) for text in ("minmax", "percentile:20"))
    x = data.normalise(data.evaluation.images)
    same, wrong = (
        measure(one.folded, one.network, data, data.evaluation, runtime=Runtime(quantized_model(it.network)))
        for it in (one, other)
    )
    y, y8 = one.network(x), other.network(x)
    assert same.audit == Audit(263, 263 * 5, 0, 0)
    assert wrong.audit == Audit(263, 263 * 5, int((y != y8).sum()), int((y.argmax(1) != y8.argmax(1)).sum()))
    assert wrong.audit.predictions > 0
    assert replace(wrong, audit=None) == measure(one.folded, one.network, data, data.evaluation)


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


def test_a_parent_that_is_not_finite_is_a_failed_start(data: DataSet, parent: Start, tmp_path: Path) -> None:
    state, facts = read_tensors(parent.folder / WEIGHTS)
    name = next(name for name in state if name.endswith("conv_16_1.weight") or "conv_16_1" in name)
    broken = replace(parent, folder=tmp_path / "parent")
    write_tensors(broken.folder / WEIGHTS, state | {name: torch.full_like(state[name], torch.nan)}, facts)
    found = evaluate(SETUP, data, Job(12, PLAN, tmp_path / "12", start=broken), silent)
    assert found.state == "failed"
    assert found.reason.startswith("cannot start from candidate 1: ")
    assert "\n" not in found.reason


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
    again = measure(folded, quantized, data, data.evaluation)
    assert (again.fp32_accuracy, again.quint8_accuracy) == (found.fp32_accuracy, found.quint8_accuracy)
    assert found.fp32_accuracy is not None
    assert found.fp32_accuracy > 0.3
    assert found.accuracies[-1] == pytest.approx(found.fp32_accuracy, abs=0.03)


def test_fewer_samples_of_large_images_are_fitted() -> None:
    """A quarter of a gigabyte of float32 at most, but 32 images at least."""
    assert transform_samples(load_space("factorizenet")) == 256
    wide = sequence((3, 224, 224), c=Conv(64, (7, 7), (2, 2), (3, 3)), f=Flatten(), d=Dense(2))
    assert transform_samples(wide) == 2**26 // (64 * 112 * 112)
    assert transform_samples(sequence((3, 1024, 1024), c=Conv(64, (1, 1)), f=Flatten(), d=Dense(2))) == 32
