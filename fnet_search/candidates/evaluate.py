"""From a plan to its evaluation: build, train, quantize, measure, audit, profile."""

from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import prod

import torch

from fnet_search.arch.factorize import factorize
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.base.errors import FnetError, first_line
from fnet_search.base.units import percent
from fnet_search.candidates.job import Job, Setup, Start, unfinished
from fnet_search.candidates.measure import evaluate_quantized, with_measures
from fnet_search.candidates.network_files import CHECKPOINT, WEIGHTS, load_trained
from fnet_search.deploy.export import quantized_model
from fnet_search.deploy.runtime import Runtime
from fnet_search.policy.evaluation import Evaluation
from fnet_search.quant.calibration import CALIBRATION_SAMPLES, calibrate_for, calibration_batches
from fnet_search.quant.scheme_choice import least_divergent
from fnet_search.training.datasets import DataSet
from fnet_search.training.network import Network, build, pretrained
from fnet_search.training.train import Checkpoint, Report, TrainingFailed, TrainingProgress, Watch, accuracy, train
from fnet_search.training.warm_start import warm_start
from fnet_search.training.weights import write_tensors

TRANSFORM_SAMPLES = 256
"""Random training samples on which a child is fitted to its parent, unless its feature maps are large."""
MAX_LAYER_VALUES = 1 << 26
"""The most values of one layer over these samples: 256 MiB in float32."""
ATTEMPTS = 2
"""At a training: a second one has another seed, or continues after it was out of memory."""


def transform_samples(space: Macroarchitecture) -> int:
    """The number of training samples on which a child is fitted to its parent: at least 32."""
    return max(32, min(TRANSFORM_SAMPLES, MAX_LAYER_VALUES // max(map(prod, space.shapes.values()))))


def evaluate(setup: Setup, data: DataSet, job: Job, report: Report) -> Evaluation:
    """Trains and measures one candidate, and writes its float weights and its codes into its folder.

    A training that fails (its loss is not finite, or the network cannot be quantized) is repeated once with another
    seed; one that runs out of memory continues once from its checkpoint. After that the evaluation is ``failed`` with
    the reason. Raises FnetError or OSError for files that cannot be read or written, those of the parent included.
    """
    reason, seed, judged = "", setup.seed, report

    def unjudged(progress: TrainingProgress) -> None:
        """Ignores the host's verdict: it has compared the epochs of the first seed, not those of the second."""
        report(progress)

    for _ in range(ATTEMPTS):
        try:
            return _attempt(setup, data, job, seed, judged)
        except TrainingFailed as failure:
            reason, seed, judged = str(failure), seed + 1_000_000, unjudged  # another seed, so another checkpoint key
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
    watch = Watch(data.evaluation, setup.metric) if setup.split == "validation" else None
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
    checkpoint = Checkpoint(folder / CHECKPOINT, key)
    result = train(trained, data, recipe, setup.numerics, seed, stages.training, checkpoint, watch)
    evaluation = replace(
        evaluation, epochs=len(result.accuracies), trained_images=result.images, accuracies=result.accuracies
    )
    if result.stopped:
        behind = f"behind the others after epoch {evaluation.epochs} of {recipe.epochs}"
        return replace(evaluation, state="pruned", reason=f"{behind} ({percent(result.accuracies[-1], 1)})")
    trained.eval().to(memory_format=torch.contiguous_format)
    stages.after("quantizing", 0)
    try:
        calibrated = calibrate_for(trained, setup.schemes, data, setup.seed)
        quantized = least_divergent(calibrated, setup.schemes, data, setup.seed)
    except FnetError as error:
        raise TrainingFailed(f"cannot be quantized: {error}") from None
    write_tensors(folder / WEIGHTS, trained.state_dict(), {"plan": str(job.plan)})
    runtime = None
    if setup.audited:
        model = quantized_model(quantized.network, weight_type=setup.weight_type or "int8")
        runtime = Runtime(model, setup.numerics.threads)
    seen = partial(stages.after, "measuring")
    own = evaluate_quantized(evaluation, trained, quantized, data, setup.seed, folder, runtime, seen)
    if job.common in (None, quantized.scheme):
        return own
    with suppress(FnetError):  # if only the common scheme fails, the policy sees the candidate under its own
        common = calibrated.quantized(job.common)
        return replace(own, common=with_measures(evaluation, trained, common, data, setup.seed))
    return own


def child(setup: Setup, data: DataSet, start: Start | None, fresh: Network) -> Network:
    """Warm-starts a freshly built network from its parent: the trained network of `start` or, without it, the imported
    one. Returns `fresh`, in evaluation mode.

    Raises FnetError, naming the file, if weights of the parent are missing or broken.
    """
    device = setup.numerics.device
    if start is None:
        parent = pretrained(setup.space, setup.recipe.initializer, setup.seed).eval().to(device)
    else:
        parent = load_trained(setup.space, start.plan, start.folder).to(device)
    fresh.eval().to(device)
    warm_start(parent, fresh, calibration_batches(data, setup.seed, transform_samples(setup.space)))
    return fresh.to(memory_format=setup.numerics.memory_format)


class _Stages:
    """Reports the progress of a training, and of calibrating and measuring after it, as fractions of the whole.

    The unit is a training image. Images for calibration and measuring count the same: each of them passes twice.
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
