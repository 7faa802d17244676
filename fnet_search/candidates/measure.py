"""Accuracies, losses and layer statistics of a trained network and its quantized one on a split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import starmap
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from fnet_search.candidates.network_files import write_codes
from fnet_search.deploy.audit import compare_codes
from fnet_search.deploy.runtime import Runtime
from fnet_search.policy.evaluation import Audit, Evaluation
from fnet_search.policy.metric import ClassResult
from fnet_search.policy.significance import as_bits
from fnet_search.quant.calibration import (
    CALIBRATION_BATCH,
    Quantized,
    calibration_batches,
)
from fnet_search.quant.fold import FoldedNetwork
from fnet_search.quant.layer_statistics import profile
from fnet_search.quant.simulator import QuantizedNetwork
from fnet_search.training.datasets import DataSet, Split
from fnet_search.training.network import Network

SQNR_SAMPLES = 128
"""Training images for the SQNR of each layer."""
MEASURED_BATCH = 50
"""Images in a batch: few, so that a layer's output stays in the processor's cache."""

Confusion = tuple[tuple[int, int, int], ...]
"""Class, the class that the quint8 network predicts, and the number of images, in order; pairs without images are left
out."""


@dataclass(frozen=True)
class Measures:
    """The fields of `Evaluation` that are measured on a split."""

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
        """The evaluation with these measures, except for the confusion, which only winners keep."""
        measures = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "confusion"}
        return replace(evaluation, **measures)


@torch.no_grad()
def measure_split(
    folded: FoldedNetwork,
    quantized: QuantizedNetwork,
    data: DataSet,
    split: Split,
    seen: Callable[[int], None] = lambda images: None,
    runtime: Runtime | None = None,
) -> Measures:
    """Measures the float and the quantized network on a split (docs/quint8.md, metrics). Ties in the logits go to the
    lowest class.

    Args:
        seen: called after each batch with the number of images that are measured.
        runtime: the quantized network in ONNX Runtime, if it is to be audited.
    """
    sums, audit, count, predictions = torch.zeros(5, dtype=torch.float64), Audit(), 0, []
    for images, labels in split.batches(MEASURED_BATCH):
        x = data.normalise(images).to(memory_format=torch.channels_last)  # faster than torch's default
        y, y8 = folded(x), quantized(x)
        if runtime is not None:
            audit += compare_codes(y8, runtime(x))
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
        tuple((*divmod(pair, classes), count) for pair, count in zip(pairs.tolist(), images.tolist(), strict=True)),
        None if runtime is None else audit,
    )


def class_results(predicted: Tensor, labels: Tensor, classes: Sequence[str]) -> tuple[ClassResult, ...]:
    """The results of each class, from the predictions of the float and the quantized network [2, N] and labels [N]."""
    parts = (labels, *(labels[classes_of == labels] for classes_of in predicted), *predicted)
    counts = [torch.bincount(part, minlength=len(classes)).tolist() for part in parts]
    return tuple(starmap(ClassResult, zip(*counts, classes, strict=True)))


def evaluate_quantized(
    evaluation: Evaluation,
    trained: Network,
    quantized: Quantized,
    data: DataSet,
    seed: int,
    folder: Path,
    runtime: Runtime | None = None,
    seen: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """As `with_measures`. Also writes the codes into `folder`."""
    measured = with_measures(evaluation, trained, quantized, data, seed, runtime, seen)
    write_codes(folder, measured.plan, trained, quantized)
    return measured


def with_measures(
    evaluation: Evaluation,
    trained: Network,
    quantized: Quantized,
    data: DataSet,
    seed: int,
    runtime: Runtime | None = None,
    seen: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """The evaluation of a trained network, completed with its measures and layer statistics under this quantization.
    `runtime` and `seen` as in `measure_split`."""
    measures = measure_split(quantized.folded, quantized.network, data, data.evaluation, seen, runtime)
    samples = ((x, x) for x in calibration_batches(data, seed, SQNR_SAMPLES, CALIBRATION_BATCH)())
    layers = profile(trained, quantized.folded, quantized.network, quantized.stats, samples)
    return replace(measures.complete(evaluation), scheme=str(quantized.scheme), layers=layers)
