"""A trained network quantized otherwise, without training: a new evaluation, recorded beside the old one."""

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


def requantize(
    opened: RecordedRun,
    network: RecordedNetwork,
    schemes: Sequence[Scheme],
    data: DataSet,
    advance: Callable[[str, int, int], None] = lambda what, done, total: None,
    scratch: Path | None = None,
) -> RecordedNetwork:
    """Quantizes a candidate's trained network with the one of `schemes` that diverges least, measures it on the run's
    split, audits it, and writes evaluation, layers, codes and ONNX file to the candidate's folder of that scheme; or,
    of a run that cannot be written, to `scratch`.

    `advance` is told what is done, and on how many of how many images. Raises FnetError for a network that cannot be
    quantized so, or is quantized with that one scheme already; of several, the one that is there is given back.
    """
    _check_new(opened, network, schemes)  # before the work
    trained = network.load_trained(opened.space)
    named, seed = f"candidate {network.id} with {schemes_text(schemes)}", opened.config["seed"]

    def measured(images: int) -> None:
        advance(f"measuring {named}, in ONNX Runtime too", images, len(data.evaluation))

    calibrated = calibrate_for(trained, schemes, data, seed, partial(advance, f"calibrating {named}"))
    choosing = partial(advance, f"choosing a scheme for candidate {network.id}")
    quantized = least_divergent(calibrated, schemes, data, seed, choosing)
    if (known := opened.quantized(network, (quantized.scheme,))) is not None:
        return known
    folder = scratch or scheme_folder(network.candidate, str(quantized.scheme))
    runtime = Runtime(quantized_model(quantized.network), torch.get_num_threads())
    evaluation = replace(network.evaluation, layers=(), audit=None, common=None)
    requantized = evaluate_quantized(evaluation, trained, quantized, data, seed, folder, runtime, measured)
    facts = metadata(opened.config, opened.space, requantized, None, "quint8")
    write_model(folder / MODEL, quantized_model(quantized.network, facts))
    opened.run.write_candidate(requantized, folder)
    if scratch is None:
        frame = requantized_frame(opened)
        write_text(opened.run.path / "requantized.csv", frame.to_csv(index=False, lineterminator="\n"))
    return RecordedNetwork(requantized, network.candidate, folder)


def _check_new(opened: RecordedRun, network: RecordedNetwork, schemes: Sequence[Scheme]) -> None:
    if (known := opened.quantized(network, schemes)) is not None:
        raise FnetError(f"candidate {network.id} is quantized with {known.scheme} already, as {known.id}")


def promote(opened: RecordedRun, network: RecordedNetwork) -> bool:
    """Lets a network that was quantized otherwise win, where it is better than the winner; returns whether it is."""
    better = opened.better(network)
    if better:
        (network.folder / PROMOTED).touch()
    return better


def requantized_frame(opened: RecordedRun) -> pd.DataFrame:
    """One row a quantization of each candidate that has several, its own first. Accuracies are fractions of 1."""
    rows = [
        {
            "network": network.id,
            "label": label(opened.space, network.evaluation.plan),
            "scheme": network.evaluation.scheme,
            "split": network.evaluation.split,
            **{
                name: getattr(network.evaluation, name)
                for name in ("fp32_accuracy", "quint8_accuracy", "relative_drop")
            },
            **{
                name: getattr(network.evaluation, name)
                for name in ("fp32_balanced_accuracy", "quint8_balanced_accuracy")
            },
            **{name: getattr(network.evaluation, name) for name in ("qmse", "qce", "kl")},
            "audited_codes": network.evaluation.audit.codes if network.evaluation.audit else None,
            "differing_codes": network.evaluation.audit.differing if network.evaluation.audit else None,
        }
        for network in requantized_networks(opened)
    ]
    return pd.DataFrame(rows).astype({"audited_codes": "Int64", "differing_codes": "Int64"})


def requantized_networks(opened: RecordedRun) -> list[RecordedNetwork]:
    """The networks of the candidates that are quantized in several ways, a candidate's own way first."""
    networks = opened.networks
    chosen = {network.candidate for network in networks if network.folder != network.candidate}
    return [network for network in networks if network.candidate in chosen]


HEADINGS = ("network", "plan", "quantized with")
MEASURED = ("fp32 %", "quint8 %", "drop %", "QMSE", "KL", "audit")


def scheme_row(opened: RecordedRun, evaluation: Evaluation, name: str) -> tuple[list[str], list[str]]:
    """What people see of an evaluation: under HEADINGS and under MEASURED."""
    shares = [
        f"{100 * (value or 0):.2f}"
        for value in (evaluation.fp32_accuracy, evaluation.quint8_accuracy, evaluation.relative_drop)
    ]
    audit = f"{evaluation.audit.differing:,} of {evaluation.audit.codes:,}" if evaluation.audit else NONE
    measured = [*shares, f"{evaluation.qmse:.4g}", f"{evaluation.kl:.4g}", audit]
    return [name, label(opened.space, evaluation.plan), evaluation.scheme], measured


def schemes_section(opened: RecordedRun) -> Sequence[tuple[str, str]]:
    """For the report: the candidates that were quantized in several ways; nothing where there are none."""
    networks = requantized_networks(opened)
    if not networks:
        return ()
    rows = [scheme_row(opened, network.evaluation, network.id) for network in networks]
    about = "".join(
        f'<p class="soft">{escape(text)}</p>' for text in (f"On the {opened.split} split.", *requantize_remarks(opened))
    )
    return [("Quantized otherwise", f"{about}{plain_table(HEADINGS, MEASURED, rows)}")]


def requantize_remarks(opened: RecordedRun) -> list[str]:
    """Which networks that were quantized otherwise are better than the winner, and what makes them win."""
    better = [network for network in requantized_networks(opened) if not network.competes and opened.better(network)]
    return [
        f"{network.id} is better than the winner: fnet-search quantize {opened.run.path} --candidate "
        f"{network.evaluation.number} --scheme {network.scheme} --promote makes it best/."
        for network in better
    ]
