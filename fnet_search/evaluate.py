"""From a plan to its Evaluation: build, train, fold, calibrate, quantize, measure, profile."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from fnet_search.data import DataSet, Split
from fnet_search.errors import FnetError
from fnet_search.fold import FoldedNetwork, fold
from fnet_search.macro import Macroarchitecture
from fnet_search.network import Network, build
from fnet_search.numerics import Numerics
from fnet_search.plan import FactorizationPlan, factorize, plan_cost
from fnet_search.policy import Evaluation, SplitName
from fnet_search.profile import profile
from fnet_search.quantize import QuantizedNetwork, quantize
from fnet_search.ranges import Batches, RangeMethod, calibrate
from fnet_search.recipe import Recipe
from fnet_search.train import Report, TrainingFailed, TrainingProgress, train
from fnet_search.weights import read_tensors, write_tensors

CALIBRATION_SAMPLES = 1024
"""Random training samples for the activation ranges (paper, section 3)."""
SQNR_SAMPLES = 128
ATTEMPTS = 2

WEIGHTS = "weights.safetensors"
QUANTIZED = "quantized.safetensors"
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Setup:
    """What all candidates of a study have in common. `split` is what they are measured on."""

    space: Macroarchitecture
    recipe: Recipe
    ranges: RangeMethod
    numerics: Numerics
    seed: int
    split: SplitName


@dataclass(frozen=True)
class Measures:
    """Accuracies (fractions of 1) and distances between the float and the quantized logits; see `Evaluation`."""

    fp32_accuracy: float
    quint8_accuracy: float
    qmse: float
    qce: float
    kl: float


@torch.no_grad()
def measure(
    folded: FoldedNetwork,
    quantized: QuantizedNetwork,
    data: DataSet,
    split: Split,
    seen: Callable[[int], None] = lambda images: None,
) -> Measures:
    """Runs both networks over a split (design, section 3, metrics). Ties in the logits go to the lowest class.

    `seen` is told after each batch how many images were measured.
    """
    sums, count = torch.zeros(5, dtype=torch.float64), 0
    for images, labels in split.batches(250):
        x = data.normalise(images)
        y, y8 = folded(x), quantized(x)
        log_p, log_q = F.log_softmax(y.double(), 1), F.log_softmax(y8.double(), 1)
        qce = -(log_p.exp() * log_q).sum()
        entropy = -(log_p.exp() * log_p).sum()
        squares = (y.double() - y8.double()).square().mean(1).sum()
        hits = ((logits.argmax(1) == labels).sum().double() for logits in (y, y8))
        sums += torch.stack([*hits, squares, qce, qce - entropy]).cpu()
        count += len(labels)
        seen(count)
    return Measures(*(sums / len(split)).tolist())


def calibration(data: DataSet, seed: int, samples: int) -> Batches:
    """The same random training samples, normalised, not augmented, in batches of 128, at each call."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.train), generator=generator)[:samples]

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(chosen), 128):
            yield data.normalise(data.train.images[chosen[start : start + 128].to(data.train.images.device)])

    return batches


def evaluate(
    setup: Setup, data: DataSet, number: int, plan: FactorizationPlan, folder: Path, report: Report
) -> Evaluation:
    """Trains and measures one candidate; leaves its weights, float and quantized, in `folder`.

    A training that fails (loss not finite, out of memory, not quantizable) is tried once more with another seed, then
    the evaluation is ``failed`` with the reason. Errors of files are raised.
    """
    reason = ""
    for attempt in range(ATTEMPTS):
        seed = setup.seed + 1_000_000 * attempt
        try:
            return _attempt(setup, data, number, plan, folder, seed, report)
        except TrainingFailed as failure:
            reason = str(failure)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            reason = f"out of memory: {str(error).splitlines()[0]}" if str(error) else "out of memory"
            if setup.numerics.device.startswith("cuda"):
                torch.cuda.empty_cache()
        (folder / CHECKPOINT).unlink(missing_ok=True)
    cost = plan_cost(setup.space, plan)
    return Evaluation(
        number, plan, cost, "failed", f"{reason} (tried {ATTEMPTS} times)", setup.split, str(setup.ranges), setup.seed
    )


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text or "enough memory" in text
    )


def _attempt(
    setup: Setup, data: DataSet, number: int, plan: FactorizationPlan, folder: Path, seed: int, report: Report
) -> Evaluation:
    trained = build(factorize(setup.space, plan), setup.recipe.initializer, seed)
    watch = data.evaluation if setup.split == "validation" else None
    key = f"{plan} seed={seed}"
    stages = _Stages(report, setup.recipe.epochs * len(data.train), CALIBRATION_SAMPLES, len(data.evaluation))
    images = train(trained, data, setup.recipe, setup.numerics, seed, stages.training, folder / CHECKPOINT, key, watch)
    trained.eval().to(memory_format=torch.contiguous_format)
    folded = fold(trained)
    samples = calibration(data, setup.seed, CALIBRATION_SAMPLES)
    stages.after("calibrating", 0)
    try:
        stats = calibrate(folded, samples, setup.ranges)
        quantized = quantize(folded, stats)
    except FnetError as error:
        raise TrainingFailed(f"cannot be quantized: {error}") from None
    measures = measure(folded, quantized, data, data.evaluation, lambda count: stages.after("measuring", count))
    layers = profile(trained, folded, quantized, stats, calibration(data, setup.seed, SQNR_SAMPLES))
    write_tensors(folder / WEIGHTS, trained.state_dict(), {"plan": str(plan)})
    write_tensors(folder / QUANTIZED, quantized.to_tensors(), {"plan": str(plan), "ranges": str(setup.ranges)})
    return Evaluation(
        number=number,
        plan=plan,
        cost=plan_cost(setup.space, plan),
        split=setup.split,
        ranges=str(setup.ranges),
        seed=seed,
        epochs=setup.recipe.epochs,
        trained_images=images,
        fp32_accuracy=measures.fp32_accuracy,
        quint8_accuracy=measures.quint8_accuracy,
        qmse=measures.qmse,
        qce=measures.qce,
        kl=measures.kl,
        layers=layers,
    )


class _Stages:
    """Passes on the progress of a training, and of what comes after it, as shares of the whole.

    The unit is an image trained on; one calibrated with or measured costs about as much (each passes twice).
    """

    def __init__(self, report: Report, trained: int, calibrated: int, measured: int) -> None:
        self.report, self.trained, self.calibrated = report, trained, calibrated
        self.whole = trained + calibrated + measured
        self.last = TrainingProgress(1, 1, False, 0.0, 0.0, None, "")

    def training(self, progress: TrainingProgress) -> None:
        self.last = progress
        self.report(replace(progress, done=progress.done * self.trained / self.whole))

    def after(self, stage: str, measured: int) -> None:
        done = self.trained + (self.calibrated + measured if stage == "measuring" else 0)
        self.report(replace(self.last, ended=False, done=done / self.whole, stage=stage))


def load_candidate(
    space: Macroarchitecture, plan: FactorizationPlan, folder: Path
) -> tuple[FoldedNetwork, QuantizedNetwork]:
    """The folded float network and the quantized one that `evaluate` left in `folder`, on the CPU.

    Raises FnetError, naming the file, where weights are missing, broken, or of another plan.
    """
    network = Network(factorize(space, plan))
    tensors, _ = read_tensors(folder / WEIGHTS)
    try:
        network.load_state_dict(tensors)
    except RuntimeError:
        raise FnetError(f"{folder / WEIGHTS} does not hold the weights of plan {plan}") from None
    folded = fold(network.eval())
    codes, _ = read_tensors(folder / QUANTIZED)
    return folded, QuantizedNetwork.from_tensors(folded.network, codes)
