"""Requantization: a trained network quantized with another scheme, as a new evaluation beside the old one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path

import pandas as pd
import torch

from fnet_search.arch.plan import label
from fnet_search.base.errors import FnetError
from fnet_search.base.files import write_text
from fnet_search.candidates.measure import evaluate_quantized
from fnet_search.deploy.export import MODEL, quantized_model, write_model
from fnet_search.deploy.runtime import Runtime
from fnet_search.policy.evaluation import Evaluation
from fnet_search.quant.calibration import calibrate_for
from fnet_search.quant.scheme import Scheme, schemes_text
from fnet_search.quant.scheme_choice import least_divergent
from fnet_search.report.html_page import NONE, plain_table
from fnet_search.rundir.recorded_run import RecordedNetwork, RecordedRun, metadata
from fnet_search.rundir.run_folder import PROMOTED, scheme_folder
from fnet_search.training.datasets import DataSet

_COLUMNS = (
    "fp32_accuracy",
    "quint8_accuracy",
    "relative_drop",
    "fp32_balanced_accuracy",
    "quint8_balanced_accuracy",
    "qmse",
    "qce",
    "kl",
)
"""Fields of an evaluation that are columns of `requantized_frame`."""


def requantize(
    opened: RecordedRun,
    network: RecordedNetwork,
    schemes: Sequence[Scheme],
    data: DataSet,
    advance: Callable[[str, int, int], None] = lambda what, done, total: None,
    scratch: Path | None = None,
) -> RecordedNetwork:
    """Quantizes a candidate's trained network with the one of `schemes` that diverges least; without training.

    The result is measured on the run's split, audited, and written with its layers, codes and ONNX file to the
    candidate's folder of that scheme. If that network exists already and `schemes` has several, it is returned instead.
    Raises FnetError if the network exists and its scheme is the only one, if the candidate's weights are missing or
    broken, or if it cannot be quantized so.

    Args:
        advance: called with the step, the number of images that are done and their total.
        scratch: a folder to write to instead, for a run folder that is read-only.
    """
    _check_new(opened, network, schemes)  # before any work
    trained = network.load_trained(opened.space)
    subject, seed = f"candidate {network.id} with {schemes_text(schemes)}", opened.config["seed"]

    def on_images(images: int) -> None:
        advance(f"measuring {subject}, in ONNX Runtime too", images, len(data.evaluation))

    calibrated = calibrate_for(trained, schemes, data, seed, partial(advance, f"calibrating {subject}"))
    choosing = partial(advance, f"choosing a scheme for candidate {network.id}")
    quantized = least_divergent(calibrated, schemes, data, seed, choosing)
    if (recorded := opened.quantized(network, (quantized.scheme,))) is not None:
        return recorded
    folder = scratch or scheme_folder(network.candidate, str(quantized.scheme))
    weight_type = opened.run.weight_type
    runtime = Runtime(quantized_model(quantized.network, weight_type=weight_type), torch.get_num_threads())
    evaluation = replace(network.evaluation, layers=(), audit=None, common=None)
    requantized = evaluate_quantized(evaluation, trained, quantized, data, seed, folder, runtime, on_images)
    facts = metadata(opened.config, opened.space, requantized, None, "quint8")
    write_model(folder / MODEL, quantized_model(quantized.network, facts, weight_type))
    opened.run.write_candidate(requantized, folder)
    if scratch is None:
        frame = requantized_frame(opened)
        write_text(opened.run.path / "requantized.csv", frame.to_csv(index=False, lineterminator="\n"))
    return RecordedNetwork(requantized, network.candidate, folder)


def _check_new(opened: RecordedRun, network: RecordedNetwork, schemes: Sequence[Scheme]) -> None:
    """Raises FnetError if the only one of `schemes` was used already."""
    if (recorded := opened.quantized(network, schemes)) is not None:
        raise FnetError(f"candidate {network.id} is quantized with {recorded.scheme} already, as {recorded.id}")


def promote(opened: RecordedRun, network: RecordedNetwork) -> bool:
    """Promotes a requantized network if it is better than the winner; returns whether it is."""
    better = opened.better(network)
    if better:
        (network.folder / PROMOTED).touch()
    return better


def requantized_frame(opened: RecordedRun) -> pd.DataFrame:
    """One row for each of `requantized_networks`. Accuracies are fractions of 1."""
    rows = [
        {
            "network": network.id,
            "label": label(opened.space, network.evaluation.plan),
            "scheme": network.evaluation.scheme,
            "split": network.evaluation.split,
            **{name: getattr(network.evaluation, name) for name in _COLUMNS},
            "audited_codes": network.evaluation.audit.codes if network.evaluation.audit else None,
            "differing_codes": network.evaluation.audit.differing if network.evaluation.audit else None,
        }
        for network in requantized_networks(opened)
    ]
    return pd.DataFrame(rows).astype({"audited_codes": "Int64", "differing_codes": "Int64"})


def requantized_networks(opened: RecordedRun) -> list[RecordedNetwork]:
    """All networks of the candidates that were requantized, the one of the run before the requantized ones."""
    networks = opened.networks
    candidates = {network.candidate for network in networks if network.folder != network.candidate}
    return [network for network in networks if network.candidate in candidates]


HEADINGS = ("network", "plan", "quantized with")
MEASURED = ("fp32 %", "quint8 %", "drop %", "QMSE", "KL", "audit")


def scheme_row(opened: RecordedRun, evaluation: Evaluation, name: str) -> tuple[list[str], list[str]]:
    """An evaluation's row: the cells under `HEADINGS`, and those under `MEASURED`.

    Args:
        name: the id of its network.
    """
    shares = [
        f"{100 * (value or 0):.2f}"
        for value in (evaluation.fp32_accuracy, evaluation.quint8_accuracy, evaluation.relative_drop)
    ]
    audit = f"{evaluation.audit.differing:,} of {evaluation.audit.codes:,}" if evaluation.audit else NONE
    measured = [*shares, f"{evaluation.qmse:.4g}", f"{evaluation.kl:.4g}", audit]
    return [name, label(opened.space, evaluation.plan), evaluation.scheme], measured


def schemes_section(opened: RecordedRun) -> Sequence[tuple[str, str]]:
    """The report's section of requantized candidates; empty if there are none."""
    networks = requantized_networks(opened)
    if not networks:
        return ()
    rows = [scheme_row(opened, network.evaluation, network.id) for network in networks]
    remarks = "".join(
        f'<p class="soft">{escape(text)}</p>' for text in (f"On the {opened.split} split.", *requantize_remarks(opened))
    )
    return [("Requantized candidates", f"{remarks}{plain_table(HEADINGS, MEASURED, rows)}")]


def requantize_remarks(opened: RecordedRun) -> list[str]:
    """The requantized networks that are better than the winner, one line each, with the command that promotes them."""
    better = [network for network in requantized_networks(opened) if not network.competes and opened.better(network)]
    return [
        f"{network.id} is better than the winner: fnet-search quantize {opened.run.path} --candidate "
        f"{network.evaluation.number} --scheme {network.scheme} --promote makes it best/."
        for network in better
    ]
