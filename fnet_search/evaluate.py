"""From a plan to its Evaluation: build, train, quantize, measure, audit, profile."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import starmap
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from fnet_search.audit import compare
from fnet_search.data import DataSet, Split
from fnet_search.errors import FnetError, first_line
from fnet_search.export import quantized_model
from fnet_search.fold import FoldedNetwork
from fnet_search.macro import Macroarchitecture
from fnet_search.metric import ClassResult, MetricName
from fnet_search.network import Network, build, pretrained
from fnet_search.numerics import Numerics
from fnet_search.paired import as_bits
from fnet_search.plan import FactorizationPlan, factorize, plan_cost, regular
from fnet_search.policy import Audit, Evaluation, Role, SplitName, State
from fnet_search.prepare import (
    AT_ONCE,
    CALIBRATION_SAMPLES,
    Quantized,
    calibrated_for,
    calibration,
    folded_for,
    least_divergent,
)
from fnet_search.profile import profile
from fnet_search.quantities import percent
from fnet_search.quantize import QuantizedNetwork
from fnet_search.recipe import Fidelity, Recipe
from fnet_search.runtime import Runtime
from fnet_search.scheme import PAPER, Scheme, schemes_text
from fnet_search.train import Report, TrainingFailed, TrainingProgress, accuracy, train
from fnet_search.warmstart import warm_start
from fnet_search.weights import digest, read_tensors, write_tensors

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
    """What all candidates of a study have in common. Each is quantized with the one of `schemes` that diverges least;
    `split` is what they are measured on; with `audited`, each is also run in ONNX Runtime on it. `metric`: what is
    watched after each epoch."""

    space: Macroarchitecture
    recipe: Recipe
    schemes: tuple[Scheme, ...]
    numerics: Numerics
    seed: int
    split: SplitName
    audited: bool = False
    fidelity: Fidelity = field(default_factory=Fidelity)
    metric: MetricName = "accuracy"
    referenced: bool = False
    """Whether the regular network is trained first: then its scheme is that of the run's probes and of its history."""
    validation: str = ""
    """What the validation split is (`Evaluation.validation`)."""

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
    """The trained network that a candidate starts from, its files in `folder`; `epochs` in all led to it, `scheme` is
    what its codes were made with."""

    number: int
    plan: FactorizationPlan
    folder: Path
    epochs: int
    scheme: Scheme = PAPER


@dataclass(frozen=True)
class Job:
    """One candidate to train, its files to go to `folder`; from scratch, or from `start`. Policies see it as quantized
    with `common`, the scheme of the whole run."""

    number: int
    plan: FactorizationPlan
    folder: Path
    role: Role = "candidate"
    start: Start | None = None
    common: Scheme | None = None


Confusion = tuple[tuple[int, int, int], ...]
"""Class, the class that the quint8 network predicts, and how many images: those pairs that have any, in order."""


@dataclass(frozen=True)
class Measures:
    """What `Evaluation` has of a float network and its quantized one on a split."""

    fp32_accuracy: float
    quint8_accuracy: float
    fp32_loss: float
    quint8_loss: float
    images: int
    right: str
    classes: tuple[ClassResult, ...]
    qmse: float
    qce: float
    kl: float
    confusion: Confusion
    audit: Audit | None = None

    def complete(self, evaluation: Evaluation) -> Evaluation:
        """The evaluation with what was measured, but for the confusion, which is kept of winners only."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "confusion"}
        return replace(evaluation, **found)


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
    sums, audit, count, predictions = torch.zeros(5, dtype=torch.float64), Audit(), 0, []
    for images, labels in split.batches(MEASURED):
        x = data.normalise(images).to(memory_format=torch.channels_last)  # faster than torch's default
        y, y8 = folded(x), quantized(x)
        if runtime is not None:
            audit += compare(y8, runtime(x))
        log_p, log_q = F.log_softmax(y.double(), 1), F.log_softmax(y8.double(), 1)
        losses = (F.nll_loss(each, labels, reduction="sum") for each in (log_p, log_q))
        qce = -(log_p.exp() * log_q).sum()
        entropy = -(log_p.exp() * log_p).sum()
        squares = (y.double() - y8.double()).square().mean(1).sum()
        predictions.append(torch.stack([logits.argmax(1) for logits in (y, y8)]).cpu())
        sums += torch.stack([*losses, squares, qce, qce - entropy]).cpu()
        count += len(labels)
        seen(count)
    predicted, labels, classes = torch.cat(predictions, dim=1), split.labels.cpu(), len(data.classes)
    right = predicted == labels
    pairs, images = torch.unique(labels * classes + predicted[1], return_counts=True)
    fp32_accuracy, quint8_accuracy = (right.sum(1).double() / count).tolist()
    fp32_loss, quint8_loss, qmse, qce, kl = (sums / count).tolist()
    return Measures(
        fp32_accuracy,
        quint8_accuracy,
        fp32_loss,
        quint8_loss,
        count,
        as_bits(right[1][labels.argsort(stable=True)].tolist()),
        class_results(predicted, labels, data.classes),
        qmse,
        qce,
        kl,
        tuple((*divmod(pair, classes), found) for pair, found in zip(pairs.tolist(), images.tolist(), strict=True)),
        None if runtime is None else audit,
    )


def class_results(predicted: Tensor, labels: Tensor, classes: Sequence[str]) -> tuple[ClassResult, ...]:
    """Of what the float and the quantized network predict, [2, N], for images of these labels [N]."""
    parts = (labels, *(labels[one == labels] for one in predicted), *predicted)
    counts = [torch.bincount(part, minlength=len(classes)).tolist() for part in parts]
    return tuple(starmap(ClassResult, zip(*counts, classes, strict=True)))


def transform_samples(space: Macroarchitecture) -> int:
    """How many training samples a network of a space is fitted to its parent on."""
    return max(32, min(TRANSFORM_SAMPLES, FITTED // max(map(prod, space.shapes.values()))))


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
        validation=setup.validation,
        scheme=schemes_text(setup.schemes),
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
        zero_shot = accuracy(trained, data, data.evaluation, setup.numerics, setup.metric)
        evaluation = replace(evaluation, zero_shot_accuracy=zero_shot)
        key += f" parent={job.start.number if job.start else 'imported'}"
    checkpoint, metric = folder / CHECKPOINT, setup.metric
    found = train(trained, data, recipe, setup.numerics, seed, stages.training, checkpoint, key, watch, metric)
    evaluation = replace(
        evaluation, epochs=len(found.accuracies), trained_images=found.images, accuracies=found.accuracies
    )
    if found.stopped:
        behind = f"behind the others after epoch {evaluation.epochs} of {recipe.epochs}"
        return replace(evaluation, state="pruned", reason=f"{behind} ({percent(found.accuracies[-1], 1)})")
    trained.eval().to(memory_format=torch.contiguous_format)
    stages.after("quantizing", 0)
    try:
        calibrated = calibrated_for(trained, setup.schemes, data, setup.seed)
        quantized = least_divergent(calibrated, setup.schemes, data, setup.seed)
    except FnetError as error:
        raise TrainingFailed(f"cannot be quantized: {error}") from None
    write_tensors(folder / WEIGHTS, trained.state_dict(), {"plan": str(job.plan)})
    runtime = Runtime(quantized_model(quantized.network), setup.numerics.threads) if setup.audited else None
    seen = partial(stages.after, "measuring")
    own = record(evaluation, trained, quantized, data, setup.seed, folder, runtime, seen)
    if job.common in (None, quantized.scheme):
        return own
    with suppress(FnetError):  # where only that scheme fails, the policy sees the candidate's own
        common = calibrated.quantized(job.common)
        return replace(own, common=measured(evaluation, trained, common, data, setup.seed))
    return own


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
    data: DataSet,
    seed: int,
    folder: Path,
    runtime: Runtime | None = None,
    seen: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """As `measured`; the codes are left in `folder`."""
    found = measured(evaluation, trained, quantized, data, seed, runtime, seen)
    write_codes(folder, found.plan, trained, quantized)
    return found


def measured(
    evaluation: Evaluation,
    trained: Network,
    quantized: Quantized,
    data: DataSet,
    seed: int,
    runtime: Runtime | None = None,
    seen: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Completes an evaluation of a trained network: what it measures with this quantization. `runtime` and `seen` as in
    `measure`."""
    measures = measure(quantized.folded, quantized.network, data, data.evaluation, seen, runtime)
    samples = ((x, x) for x in calibration(data, seed, SQNR_SAMPLES, AT_ONCE)())
    layers = profile(trained, quantized.folded, quantized.network, quantized.stats, samples)
    return replace(measures.complete(evaluation), scheme=str(quantized.scheme), layers=layers)


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


def write_codes(folder: Path, plan: FactorizationPlan, trained: Network, quantized: Quantized) -> None:
    """Leaves in `folder` what `load_quantized` reads."""
    facts = {"plan": str(plan), "scheme": str(quantized.scheme), "weights": _digest(trained)}
    write_tensors(folder / QUANTIZED, quantized.network.to_tensors(), facts)


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
