"""The commands that work on a recorded run. Heavy modules are imported inside them, as in `cli`."""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from fnet_search.base.errors import FnetError
from fnet_search.base.terminal import PlainTable, console
from fnet_search.cli.printing import print_outcome
from fnet_search.cli.shared_options import (
    data_dir_option,
    dataset_option,
    moved_option,
    parse_scheme_options,
    quiet,
    scheme_options,
    weight_type_option,
)
from fnet_search.rundir.config_path import config_path

if TYPE_CHECKING:
    from onnx import ModelProto

    from fnet_search.deploy.weight_type import WeightType
    from fnet_search.engine.progress import TerminalDisplay
    from fnet_search.engine.study_record import StudyRecord
    from fnet_search.report.outcome import Outcome
    from fnet_search.rundir.recorded_run import RecordedNetwork, RecordedRun
    from fnet_search.training.datasets import DataSet

CODES_DIFFER = 4
"""Exit code if an audit found codes that differ."""


def _check_run(context: click.Context, parameter: click.Parameter, folder: Path) -> Path:
    """Checks the run folder at once, before the command imports torch, which takes seconds."""
    config_path(folder)
    return folder


_run = click.argument("folder", metavar="RUN", type=click.Path(path_type=Path), callback=_check_run)
_storage = click.option(
    "--storage",
    show_default="the journal file in the run folder",
    help="Optuna storage URL of the study, which the report is made from.",
)


def _networks(**attributes: Any) -> Callable[[Any], Any]:
    """The option ``--candidate`` with further attributes of `click.option`."""
    return click.option(
        "--candidate",
        "candidates",
        metavar="ID",
        help="Candidate number; with a scheme, as in 7/mse+equalize, a network that quantize made of it.",
        **attributes,
    )


_every = {"multiple": True, "show_default": "the winner; of given plans, all"}
_one = {"show_default": "the winner"}


def _opened(folder: Path) -> "RecordedRun":
    from fnet_search.rundir.recorded_run import open_run

    return open_run(folder)


@click.command()
@_run
@_networks(**_one)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="ONNX file to write."
)
@click.option("--float", "as_float", is_flag=True, help="Export the folded float32 network instead of the quint8 one.")
@weight_type_option
def export(
    folder: Path, candidates: str | None, output: Path, as_float: bool, weight_type: "WeightType | None"
) -> None:
    """Write a trained network of a run as an ONNX file.

    quint8 networks become a QDQ graph with int8 or uint8 weights, uint8 activations and int32 biases. The input is
    float32 of shape [N, C, H, W], normalised as the file's metadata say.
    """
    from fnet_search.deploy.export import IR_VERSION, OPSET, float_model, quantized_model, write_model
    from fnet_search.rundir.recorded_run import metadata

    opened = _opened(folder)
    if not output.parent.is_dir():
        raise FnetError(f"-o {output}: the folder {output.parent} does not exist")
    network, *further = opened.find([candidates] if candidates else [])
    if further:
        raise FnetError(f"{folder} has no winner; name a network with --candidate")
    folded, quantized = network.load(opened.space)
    precision = "float32" if as_float else "quint8"
    facts = metadata(opened.config, opened.space, network.evaluation, opened.test(network), precision)
    weight_type = weight_type or opened.run.weight_type
    write_model(output, float_model(folded, facts) if as_float else quantized_model(quantized, facts, weight_type))
    size = output.stat().st_size / 1e3
    stored = "" if as_float else f" with {weight_type} weights"
    shape = "x".join(map(str, opened.space.input_shape))
    click.echo(
        f"{output}: candidate {network.id} ({facts['plan_label']}), {precision}{stored}, {size:,.0f} kB, "
        f"ONNX opset {OPSET}, IR version {IR_VERSION}, input Nx{shape} float32"
    )


@click.command()
@_run
@_networks(**_every)
@click.option(
    "--onnx",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    show_default="best/model.onnx for the winner, else a new export",
    help="Exported file to audit.",
)
@click.option(
    "--layers", is_flag=True, help="Also compare the inner activations, and name the first tensor that differs."
)
@dataset_option
@moved_option
@data_dir_option
def audit(
    folder: Path,
    candidates: tuple[str, ...],
    file: Path | None,
    layers: bool,
    dataset: str | None,
    validation: str | None,
    data_dir: Path,
) -> None:
    """Compare exported networks in ONNX Runtime with the integer simulator, and count the codes that differ.

    Runs all test images, or the validation images if there are none. Exit code 4: codes differ.
    """
    opened = _opened(folder)
    networks = opened.find(candidates)
    if file is not None and len(networks) > 1:
        raise FnetError(f"--onnx {file} holds one network; name it with one --candidate")
    models = [_exported(opened, network, file, bool(candidates)) for network in networks]
    differ = False
    with _display() as display:
        data = _data(opened, data_dir, dataset, validation, display)
        for network, model in zip(networks, models, strict=True):
            differ |= _audit(opened, network, model, data, layers, display)
    if differ:
        sys.exit(CODES_DIFFER)


def _exported(
    opened: "RecordedRun", network: "RecordedNetwork", file: Path | None, named: bool
) -> "tuple[str, ModelProto]":
    """Origin of the graph to audit, for messages, and the graph. Raises FnetError if the file is of another network."""
    from fnet_search.deploy.export import MODEL, quantized_model, read_model
    from fnet_search.rundir.recorded_run import metadata

    if file is None and network.folder != network.candidate:
        file = network.folder / MODEL
    elif file is None and not named and opened.split == "validation":
        file = opened.run.best / MODEL
    if file is None:
        _, quantized = network.load(opened.space)
        return "a fresh export", quantized_model(quantized, weight_type=opened.run.weight_type)
    model, facts = read_model(file)
    if facts.get("precision") != "quint8":
        raise FnetError(f"{file} is a {facts.get('precision')} export; the audit needs a quint8 export")
    expected = metadata(opened.config, opened.space, network.evaluation, None, "quint8")
    for name, value in expected.items():
        if name != "fnet_search" and name in facts and facts[name] != value:  # earlier versions wrote fewer facts
            raise FnetError(f"{file} is not candidate {network.id}: its {name} is {facts[name]}, not {value}")
    return str(file), model


def _audit(
    opened: "RecordedRun",
    network: "RecordedNetwork",
    exported: "tuple[str, ModelProto]",
    data: "DataSet",
    layers: bool,
    display: "TerminalDisplay",
) -> bool:
    """Audits one network and prints the result. Returns whether any code differs."""
    import torch

    from fnet_search.arch.plan import label
    from fnet_search.deploy.audit import LayerAudit, audit, audit_layers
    from fnet_search.deploy.export import coded, codes_name
    from fnet_search.deploy.runtime import Runtime, with_outputs
    from fnet_search.policy.evaluation import Audit

    origin, model = exported
    quantized = network.load(opened.space)[1]
    tensors = [codes_name(name) for name in coded(quantized)] if layers else []
    runtime = Runtime(with_outputs(model, tensors), torch.get_num_threads())
    split, split_name = (data.test, "test") if data.has_test else (data.evaluation, "validation")
    batches = (data.normalise(images) for images, _ in split.batches(250))
    name = f"candidate {network.id} ({label(opened.space, network.evaluation.plan)})"
    total, inner = Audit(), dict[str, LayerAudit]()
    audits = (
        audit_layers(quantized, runtime, batches)
        if layers
        else ((batch_audit, ()) for batch_audit in audit(quantized, runtime, batches))
    )
    with torch.inference_mode():
        for batch_audit, layer_audits in audits:
            total += batch_audit
            inner |= {
                layer.layer: inner[layer.layer] + layer if layer.layer in inner else layer for layer in layer_audits
            }
            display.advance(f"auditing {name}", total.images, len(split))
    display.say(f"{name}: {total}; {split_name} images, {origin} in ONNX Runtime {runtime.version}")
    if layers:
        differing = [layer for layer in inner.values() if layer.differing]
        codes = f"{sum(layer.differing for layer in differing):,} of {sum(layer.codes for layer in inner.values()):,}"
        first = f"; the first is {differing[0]}" if differing else ""
        display.say(f"  inner activations: {codes} codes differ in {len(differing)} of {len(inner)} tensors{first}")
    return total.differing > 0 or any(layer.differing for layer in inner.values())


@click.command()
@_run
@click.option("--candidate", "candidates", metavar="ID", required=True, help="Candidate number.")
@scheme_options
@click.option(
    "--promote",
    "promoting",
    is_flag=True,
    help="Make it the winner if it ranks above the winner by the run's constraints. A new winner is measured on the "
    "test split and becomes best/.",
)
@dataset_option
@moved_option
@data_dir_option
@_storage
def quantize(
    folder: Path,
    candidates: str,
    promoting: bool,
    dataset: str | None,
    validation: str | None,
    data_dir: Path,
    storage: str | None,
    **options: Any,
) -> None:
    """Quantize a trained candidate with another scheme, without training, as a new evaluation beside the old one.

    It is measured on the run's split, audited, and written with its ONNX file to the candidate's folder. If the run
    folder cannot be written, the result is only shown.
    """

    from fnet_search.engine.reporting import open_record
    from fnet_search.engine.winner import measure_winner
    from fnet_search.inspection.requantize import (
        HEADINGS,
        MEASURED,
        promote,
        requantize,
        requantize_remarks,
        scheme_row,
    )
    from fnet_search.quant.scheme import parse_schemes

    schemes = parse_schemes(parse_scheme_options(options))
    opened = _opened(folder)
    if promoting and not opened.searching:
        raise FnetError(f"{folder} is a run of given plans: it has no winner; leave --promote out")
    (network,) = opened.find([candidates])
    if network.folder != network.candidate:
        raise FnetError(f"--candidate {candidates}: name the candidate without a scheme, {network.evaluation.number}")
    earlier = {
        recorded.id: recorded.evaluation for recorded in opened.networks if recorded.candidate == network.candidate
    }
    better = False
    with _display() as display, opened.run.locked_if_writable() as writable, TemporaryDirectory() as scratch:
        if promoting and not writable:
            raise FnetError(f"{folder} cannot be written: leave --promote out")
        data = _data(opened, data_dir, dataset, validation, display)
        study = open_record(opened, storage) if writable else None  # first, since it may fail
        recorded = opened.quantized(network, schemes) if promoting else None
        requantized = recorded or requantize(
            opened, network, schemes, data, display.advance, None if writable else Path(scratch)
        )
        if promoting and study is not None and (better := promote(opened, requantized)):
            measure_winner(study, requantized, data, display)
        outcome = _reported(study, display)
    shown = {**earlier, requantized.id: requantized.evaluation}
    rows = [
        [cell for cells in scheme_row(opened, evaluation, name) for cell in cells] for name, evaluation in shown.items()
    ]
    texts, least = {"network": 12, "plan": 12, "quantized with": 12}, ("KL", "QMSE", "plan", "drop %", "fp32 %")
    title = f"candidate {requantized.evaluation.number}, {requantized.evaluation.split} split"
    console().print(PlainTable(title, (*HEADINGS, *MEASURED), rows, texts, least))
    if outcome is None:
        click.echo(_only_shown(folder))
        return
    if requantized.id in earlier:
        click.echo(f"candidate {network.id} is quantized with {requantized.scheme} already, as {requantized.id}")
    if promoting:
        click.echo(f"{requantized.id} is {'the winner now' if better else 'not better than the winner: best/ stays'}")
        click.echo(outcome.headline())
    for remark in requantize_remarks(opened):
        click.echo(remark)
    click.echo(f"report: {outcome.report}")
    click.echo(f"files in {requantized.folder}; its ID is {requantized.id}")


@click.command()
@_run
@_networks(**_every)
@click.option(
    "--images",
    type=click.IntRange(2),
    default=1000,
    show_default=True,
    help="Largest number of images, from the run's split.",
)
@dataset_option
@moved_option
@data_dir_option
def analyze(
    folder: Path,
    candidates: tuple[str, ...],
    images: int,
    dataset: str | None,
    validation: str | None,
    data_dir: Path,
) -> None:
    """Show which layers lose accuracy to quantization, and why.

    Lists each layer's ranges, precisions and noise, and the quint8 accuracy with only this layer quantized and with all
    but this layer quantized; several candidates side by side. Uses the run's validation split, or for given plans the
    test split. If the run folder cannot be written, only the table is shown.
    """
    from fnet_search.inspection.analysis import analysis_table, analyze
    from fnet_search.inspection.analysis_page import write_analysis

    opened = _opened(folder)
    networks = opened.find(candidates)
    with _display() as display:
        data = _data(opened, data_dir, dataset, validation, display)
        for network in networks:  # first, since it may fail
            network.load(opened.space)
        display.status("calibrating")
        analyses = analyze(opened, networks, data, images, partial(display.advance, "analyzing"))
        page = None
        if opened.run.writable:
            display.status("drawing the figures")
            page = write_analysis(opened, analyses)
    for analysis in analyses:
        console().print(analysis_table(analysis, console().width))
    click.echo(_only_shown(folder) if page is None else f"{page.parent / 'layers.csv'}; figures: {page}")


@click.command()
@_run
@_networks(**_every)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Images per inference.")
@click.option("--rounds", type=click.IntRange(2), default=30, show_default=True, help="Timed samples of each graph.")
@_storage
def latency(folder: Path, candidates: tuple[str, ...], batch: int, rounds: int, storage: str | None) -> None:
    """Time the exported quint8 and fp32 graphs in ONNX Runtime, per network and per layer.

    Uses one thread and interleaved rounds, and gives median and quartiles. Needs an otherwise idle machine. If the run
    folder cannot be written, the times are only shown.
    """
    from fnet_search.engine.reporting import open_record
    from fnet_search.inspection.latency_report import (
        conditions,
        latency_pairs,
        latency_table,
        layers_table,
        time_networks,
        write_latencies,
    )

    opened = _opened(folder)
    networks = opened.find(candidates)
    with _display() as display, opened.run.locked_if_writable() as writable:
        study = open_record(opened, storage) if writable else None
        display.status("loading the networks into ONNX Runtime")
        latencies = time_networks(opened, networks, batch, rounds, partial(display.advance, "timing, samples"))
        paths = write_latencies(opened, latencies) if writable else []
        outcome = _reported(study, display)
    for pair in latency_pairs(latencies):
        if candidates or len(networks) == 1:  # else only in the report
            console().print(layers_table(opened, pair))
    console().print(latency_table(latencies))
    click.echo(conditions(latencies))
    written = None if outcome is None else f"{', '.join(map(str, paths))}; report: {outcome.report}"
    click.echo(written or _only_shown(folder))


@click.command()
@_run
@click.option("--storage", show_default="the journal file in the run folder", help="Optuna storage URL.")
def report(folder: Path, storage: str | None) -> None:
    """Draw the figures of a run again, write its report and print its table."""
    from fnet_search.engine.progress import TerminalDisplay
    from fnet_search.engine.reporting import open_record, report_again
    from fnet_search.rundir.recorded_run import open_run

    quiet()
    opened = open_run(folder)
    with TerminalDisplay(console()) as display, opened.run.locked():
        display.status("drawing figures and the report")
        outcome = report_again(open_record(opened, storage))
    print_outcome(outcome)


@click.command()
@_run
@click.option("--port", type=click.IntRange(0, 65535), default=8080, help="Port to listen on; 0: any free port.")
@click.option(
    "--host", default="127.0.0.1", help="Address to listen on; any other than this lets others in without a password."
)
@click.option("--storage", show_default="the journal file in the run folder", help="Optuna storage URL.")
def dashboard(folder: Path, port: int, host: str, storage: str | None) -> None:
    """Show a run in the Optuna dashboard, in a browser. The run may still be searching.

    Adds notes that explain the study and each of its trials; they are stored in the study.
    """
    from fnet_search.rundir.recorded_run import open_run

    opened = open_run(folder)
    try:
        from fnet_search.cli.dashboard import open_dashboard
    except ImportError as error:
        raise FnetError(f'{error.name} is not installed; pip install "fnet-search[dashboard]"') from None
    quiet()
    shown = open_dashboard(opened, storage)
    with shown.serve(host, port) as server:
        shown.annotate()
        shown.watch()
        click.echo(f"http://{host}:{server.server_port}/dashboard/studies/{shown.study._study_id} (Ctrl-C stops it)")
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def _reported(study: "StudyRecord | None", display: "TerminalDisplay") -> "Outcome | None":
    """Writes the report of a run again. None without `study`: the run folder cannot be written."""
    from fnet_search.engine.reporting import report_again

    if study is None:
        return None
    display.status("drawing figures and the report")
    return report_again(study)


def _only_shown(folder: Path) -> str:
    return f"{folder} cannot be written: the results are only shown here"


def _data(
    opened: "RecordedRun", data_dir: Path, dataset: str | None, validation: str | None, display: "TerminalDisplay"
) -> "DataSet":
    """The data of the run, from where its images are now."""
    from fnet_search.engine.arguments import absolute_path

    return opened.data(data_dir, partial(display.advance, "reading images"), dataset, absolute_path(validation))


def _display() -> "TerminalDisplay":
    from fnet_search.engine.progress import TerminalDisplay

    quiet()
    return TerminalDisplay(console())
