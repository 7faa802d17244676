"""From a plan to its Evaluation: build, train, fold, calibrate, quantize, measure, audit, profile."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from fnet_search.audit import compare
from fnet_search.correct import correct_biases
from fnet_search.data import DataSet, Split
from fnet_search.equalize import equalize
from fnet_search.errors import FnetError, first_line
from fnet_search.export import quantized_model
from fnet_search.fold import FoldedNetwork, fold
from fnet_search.macro import Macroarchitecture
from fnet_search.network import Network, build, pretrained
from fnet_search.numerics import Numerics
from fnet_search.plan import FactorizationPlan, factorize, plan_cost, regular
from fnet_search.policy import Audit, Evaluation, Role, SplitName, State
from fnet_search.profile import profile
from fnet_search.quantities import percent
from fnet_search.quantize import QuantizedNetwork, quantize
from fnet_search.ranges import Batches, TensorStats, calibrate, passes
from fnet_search.recipe import Fidelity, Recipe
from fnet_search.runtime import Runtime
from fnet_search.scheme import Scheme
from fnet_search.train import Report, TrainingFailed, TrainingProgress, accuracy, train
from fnet_search.warmstart import warm_start
from fnet_search.weights import digest, read_tensors, write_tensors

CALIBRATION_SAMPLES = 1024
"""Random training samples for the activation ranges (paper, section 3)."""
CORRECTION_SAMPLES = 256
"""Of these, for bias correction."""
SQNR_SAMPLES = 128
MEASURED = 50
"""Images at a time that are measured: few, so that what a layer gives stays in a cache."""
TRANSFORM_SAMPLES = 256
"""Random training samples that a network is fitted to its parent on; fewer where its feature maps are large."""
FITTED = 1 << 26
"""Values that a layer gives for all of them, at most: a quarter of a gigabyte."""
ATTEMPTS = 2

WEIGHTS = "weights.safetensors"
QUANTIZED = "quantized.safetensors"
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Setup:
    """What all candidates of a study have in common. `split` is what they are measured on; with `audited`, each is
    also run in ONNX Runtime on it."""

    space: Macroarchitecture
    recipe: Recipe
    scheme: Scheme
    numerics: Numerics
    seed: int
    split: SplitName
    audited: bool = False
    fidelity: Fidelity = field(default_factory=Fidelity)

    def recipe_of(self, job: "Job") -> Recipe:
        """How a candidate is trained."""
        if job.role == "final":
            return self.recipe.with_epochs(self.fidelity.final_epochs)
        if self.imported(job) and job.plan == regular(self.space) and not self.fidelity.finetune:
            return self.recipe.with_epochs(0)
        warm = job.start is not None and job.role == "candidate"
        return self.recipe.warm(self.fidelity.warm_epochs) if warm else self.recipe

    def imported(self, job: "Job") -> bool:
        """Whether a candidate starts from the weights that the space was imported with."""
        return job.start is None and self.space.weights is not None

    def threads_of(self, job: "Job") -> int:
        """Of the worker that trains it. The network that all others start from, and the final one, are alone."""
        first = self.fidelity.warm_start and job.plan == regular(self.space)
        return self.numerics.alone_threads if first or job.role == "final" else self.numerics.threads


@dataclass(frozen=True)
class Start:
    """The trained network that a candidate starts from, its files in `folder`; `epochs` in all led to it."""

    number: int
    plan: FactorizationPlan
    folder: Path
    epochs: int


@dataclass(frozen=True)
class Job:
    """One candidate to train, its files to go to `folder`; from scratch, or from `start`."""

    number: int
    plan: FactorizationPlan
    folder: Path
    role: Role = "candidate"
    start: Start | None = None


@dataclass(frozen=True)
class Quantized:
    """A trained network made ready for 8 bits: folded (and equalized), its calibrated tensors, the integer network."""

    folded: FoldedNetwork
    stats: Mapping[str, TensorStats]
    network: QuantizedNetwork


def folded_for(scheme: Scheme, trained: Network) -> FoldedNetwork:
    """The float network that a scheme quantizes: folded, and equalized where it says so."""
    folded = fold(trained)
    return equalize(folded) if scheme.equalize else folded


def prepare(
    trained: Network,
    scheme: Scheme,
    data: DataSet,
    seed: int,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> Quantized:
    """Folds and quantizes a trained network in evaluation mode, as `scheme` says, on training images of `data`.

    `seen` is told how many of how many calibration images, over all passes, were taken. Raises FnetError for
    activations that are not finite, and where an int32 accumulation could overflow.
    """
    folded = folded_for(scheme, trained)
    batches, done = calibration(data, seed, CALIBRATION_SAMPLES), 0
    total = passes(scheme.ranges) * min(CALIBRATION_SAMPLES, len(data.train))

    def counted() -> Iterator[Tensor]:
        nonlocal done
        for batch in batches():
            yield batch
            done += len(batch)
            seen(done, total)

    stats = calibrate(folded, counted, scheme.ranges)
    network = quantize(folded, stats, scheme.per_channel)
    if scheme.bias_correct:
        network = correct_biases(folded, network, calibration(data, seed, CORRECTION_SAMPLES))
    return Quantized(folded, stats, network)


@dataclass(frozen=True)
class Measures:
    """Accuracies (fractions of 1) and distances between the float and the quantized logits; see `Evaluation`."""

    fp32_accuracy: float
    quint8_accuracy: float
    qmse: float
    qce: float
    kl: float
    audit: Audit | None = None


@torch.no_grad()
def measure(
    folded: FoldedNetwork,
    quantized: QuantizedNetwork,
    data: DataSet,
    split: Split,
    seen: Callable[[int], None] = lambda images: None,
    runtime: Runtime | None = None,
) -> Measures:
    """Runs both networks over a split (design, section 3, metrics). Ties in the logits go to the lowest class.

    `runtime` has the quantized network in ONNX Runtime, if it is to be audited; `seen` is told after each batch how
    many images were measured.
    """
    sums, audit, count = torch.zeros(5, dtype=torch.float64), Audit(), 0
    for images, labels in split.batches(MEASURED):
        x = data.normalise(images).to(memory_format=torch.channels_last)  # faster than torch's default
        y, y8 = folded(x), quantized(x)
        if runtime is not None:
            audit += compare(y8, runtime(x))
        log_p, log_q = F.log_softmax(y.double(), 1), F.log_softmax(y8.double(), 1)
        qce = -(log_p.exp() * log_q).sum()
        entropy = -(log_p.exp() * log_p).sum()
        squares = (y.double() - y8.double()).square().mean(1).sum()
        hits = ((logits.argmax(1) == labels).sum().double() for logits in (y, y8))
        sums += torch.stack([*hits, squares, qce, qce - entropy]).cpu()
        count += len(labels)
        seen(count)
    measures = Measures(*(sums / len(split)).tolist())
    return measures if runtime is None else replace(measures, audit=audit)


def transform_samples(space: Macroarchitecture) -> int:
    """How many training samples a network of a space is fitted to its parent on."""
    return max(32, min(TRANSFORM_SAMPLES, FITTED // max(map(prod, space.shapes.values()))))


def calibration(data: DataSet, seed: int, samples: int) -> Batches:
    """The same random training samples, normalised, not augmented, in batches of 128, at each call."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.train), generator=generator)[:samples]

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(chosen), 128):
            images = data.train.images[chosen[start : start + 128].to(data.train.images.device)]
            yield data.normalise(images).to(memory_format=torch.channels_last)  # faster than torch's default

    return batches


def unfinished(setup: Setup, job: Job, state: State, reason: str) -> Evaluation:
    """The evaluation of a candidate that has nothing measured."""
    return Evaluation(
        job.number,
        job.plan,
        plan_cost(setup.space, job.plan),
        state,
        reason,
        role=job.role,
        split=setup.split,
        scheme=str(setup.scheme),
        seed=setup.seed,
        parent=job.start.number if job.start else None,
        inherited_epochs=job.start.epochs if job.start else 0,
    )


def evaluate(setup: Setup, data: DataSet, job: Job, report: Report) -> Evaluation:
    """Trains and measures one candidate; leaves its weights, float and quantized, in its folder.

    A training that fails (loss not finite, not quantizable) is tried once more with another seed, one that was out of
    memory from its checkpoint on; then the evaluation is ``failed`` with the reason. Errors of files are raised, also
    where those of the parent cannot be read.
    """
    reason, seed, judged = "", setup.seed, report

    def unjudged(progress: TrainingProgress) -> None:
        """What the first seed reached has been compared with others: a second one is not stopped for it."""
        report(progress)

    for _ in range(ATTEMPTS):
        try:
            return _attempt(setup, data, job, seed, judged)
        except TrainingFailed as failure:
            reason, seed, judged = str(failure), seed + 1_000_000, unjudged  # not from its checkpoint: the key differs
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            reason = f"out of memory: {first_line(error)}" if str(error) else "out of memory"
            if setup.numerics.device.startswith("cuda"):
                torch.cuda.empty_cache()
    (job.folder / CHECKPOINT).unlink(missing_ok=True)
    return unfinished(setup, job, "failed", f"{reason} (tried {ATTEMPTS} times)")


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text or "enough memory" in text
    )


def _attempt(setup: Setup, data: DataSet, job: Job, seed: int, report: Report) -> Evaluation:
    recipe, folder = setup.recipe_of(job), job.folder
    stages = _Stages(report, recipe.epochs * recipe.images(len(data.train)), CALIBRATION_SAMPLES, len(data.evaluation))
    trained = build(factorize(setup.space, job.plan), setup.recipe.initializer, seed)
    watch = data.evaluation if setup.split == "validation" else None
    evaluation = replace(unfinished(setup, job, "complete", ""), seed=seed)
    key = f"{job.plan} seed={seed} epochs={recipe.epochs}"
    if job.start is not None or setup.imported(job):
        parent = f"candidate {job.start.number}" if job.start else "the imported weights"
        stages.before(f"starting from {parent}")
        try:
            trained = child(setup, data, job.start, trained)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # torch does not export it
            raise TrainingFailed(f"cannot start from {parent}: {error}") from None
        zero_shot = accuracy(trained, data, data.evaluation, setup.numerics)
        evaluation = replace(evaluation, zero_shot_accuracy=zero_shot)
        key += f" parent={job.start.number if job.start else 'imported'}"
    found = train(trained, data, recipe, setup.numerics, seed, stages.training, folder / CHECKPOINT, key, watch)
    evaluation = replace(
        evaluation, epochs=len(found.accuracies), trained_images=found.images, accuracies=found.accuracies
    )
    if found.stopped:
        behind = f"behind the others after epoch {evaluation.epochs} of {recipe.epochs}"
        return replace(evaluation, state="pruned", reason=f"{behind} ({percent(found.accuracies[-1], 1)})")
    trained.eval().to(memory_format=torch.contiguous_format)
    stages.after("calibrating", 0)
    try:
        quantized = prepare(trained, setup.scheme, data, setup.seed)
    except FnetError as error:
        raise TrainingFailed(f"cannot be quantized: {error}") from None
    write_tensors(folder / WEIGHTS, trained.state_dict(), {"plan": str(job.plan)})
    runtime = Runtime(quantized_model(quantized.network), setup.numerics.threads) if setup.audited else None
    return record(
        evaluation,
        trained,
        quantized,
        setup.scheme,
        data,
        setup.seed,
        folder,
        runtime,
        partial(stages.after, "measuring"),
    )


def child(setup: Setup, data: DataSet, start: Start | None, fresh: Network) -> Network:
    """A freshly built network, made to compute nearly what the one that it starts from does, a trained one or, without
    `start`, the imported one; in evaluation mode.

    Raises FnetError, naming the file, where weights of the parent are missing or broken.
    """
    device = setup.numerics.device
    if start is None:
        parent = pretrained(setup.space, setup.recipe.initializer, setup.seed).eval().to(device)
    else:
        parent = load_trained(setup.space, start.plan, start.folder).to(device)
    fresh.eval().to(device)
    warm_start(parent, fresh, calibration(data, setup.seed, transform_samples(setup.space)))
    return fresh.to(memory_format=setup.numerics.memory_format)


def record(
    evaluation: Evaluation,
    trained: Network,
    quantized: Quantized,
    scheme: Scheme,
    data: DataSet,
    seed: int,
    folder: Path,
    runtime: Runtime | None = None,
    seen: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Completes an evaluation of a trained network: what it measures with this quantization, whose codes are left in
    `folder`. `runtime` and `seen` as in `measure`."""
    measures = measure(quantized.folded, quantized.network, data, data.evaluation, seen, runtime)
    samples = ((x, x) for x in calibration(data, seed, SQNR_SAMPLES)())
    layers = profile(trained, quantized.folded, quantized.network, quantized.stats, samples)
    write_codes(folder, evaluation.plan, trained, quantized.network, scheme)
    images = len(data.evaluation)
    return replace(evaluation, scheme=str(scheme), images=images, **vars(measures), layers=layers)


class _Stages:
    """Passes on the progress of a training, and of what comes after it, as shares of the whole.

    The unit is an image trained on; one calibrated with or measured costs about as much (each passes twice).
    """

    def __init__(self, report: Report, trained: int, calibrated: int, measured: int) -> None:
        self.report, self.trained, self.calibrated = report, trained, calibrated
        self.whole = trained + calibrated + measured
        self.last = TrainingProgress(1, 1, False, 0.0, 0.0, None, "")

    def before(self, stage: str) -> None:
        self.report(replace(self.last, stage=stage))

    def training(self, progress: TrainingProgress) -> bool | None:
        self.last = progress
        return self.report(replace(progress, done=progress.done * self.trained / self.whole))

    def after(self, stage: str, measured: int) -> None:
        done = self.trained + (self.calibrated + measured if stage == "measuring" else 0)
        self.report(replace(self.last, ended=False, done=done / self.whole, stage=stage))


def load_trained(space: Macroarchitecture, plan: FactorizationPlan, folder: Path) -> Network:
    """The trained network that `evaluate` left in `folder`, on the CPU, in evaluation mode.

    Raises FnetError, naming the file, where weights are missing, broken, or of another plan.
    """
    network = Network(factorize(space, plan))
    tensors, _ = read_tensors(folder / WEIGHTS)
    try:
        network.load_state_dict(tensors)
    except RuntimeError:
        raise FnetError(f"{folder / WEIGHTS} does not hold the weights of plan {plan}") from None
    return network.eval()


def write_codes(
    folder: Path, plan: FactorizationPlan, trained: Network, quantized: QuantizedNetwork, scheme: Scheme
) -> None:
    """Leaves in `folder` what `load_quantized` reads."""
    facts = {"plan": str(plan), "scheme": str(scheme), "weights": _digest(trained)}
    write_tensors(folder / QUANTIZED, quantized.to_tensors(), facts)


def load_quantized(trained: Network, scheme: Scheme, folder: Path) -> tuple[FoldedNetwork, QuantizedNetwork]:
    """The folded (and equalized) network of a trained one, and the quantized one whose codes are in `folder`.

    Raises FnetError, naming the file, where codes are missing, broken, or of another network.
    """
    folded = folded_for(scheme, trained)
    path = folder / QUANTIZED
    codes, facts = read_tensors(path)
    if (facts.get("weights"), facts.get("scheme")) != (_digest(trained), str(scheme)):
        raise FnetError(f"{path} does not hold the codes of {folder / WEIGHTS} quantized with {scheme}")
    try:
        return folded, QuantizedNetwork.from_tensors(folded.network, codes)
    except FnetError as error:
        raise FnetError(f"{path}: {error}") from None


def _digest(trained: Network) -> str:
    """Of the weights: that codes are theirs can be checked."""
    return digest(trained.state_dict())
