"""A run in the Optuna dashboard: notes on the study and its trials, its Pareto figure, its files.

The search itself writes the attributes of trials (`optuna_bridge.trials`). Notes and the figure are attributes of the
study, so they can be added at any time, also during the search.
"""

import threading
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna
import plotly.graph_objects as go
from optuna.artifacts import FileSystemArtifactStore
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna_dashboard import get_note, save_note, save_plotly_graph_object, wsgi

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import label
from fnet_search.base.errors import FnetError
from fnet_search.base.units import millions, mmac, percent
from fnet_search.engine.shared_study import shared_storage
from fnet_search.optuna_bridge.storage import has_study
from fnet_search.optuna_bridge.trials import read_evaluation
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation, LayerStats
from fnet_search.policy.ranking import ranking
from fnet_search.report.html_report import STATES
from fnet_search.report.style import COLOURS
from fnet_search.rundir.recorded_run import RecordedRun

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

REFRESHED = 10.0
"""Seconds between updates of the notes and the figure while the search goes on."""

_UNSAFE = str.maketrans({"<": "&lt;", ">": "&gt;", "|": "&#124;", "`": "&#96;", "*": "\\*", "_": "\\_"})
"""Escapes Markdown and HTML in texts from users."""


@dataclass
class Dashboard:
    """A run with the storage of its study and its artifacts, to be shown in the Optuna dashboard."""

    opened: RecordedRun
    storage: BaseStorage
    artifacts: "ArtifactStore"

    @property
    def study(self) -> optuna.Study:
        """The study as it is in the storage now."""
        return optuna.load_study(study_name=self.opened.run.name, storage=self.storage)

    def annotate(self) -> None:
        """Writes the notes and the figure that are missing or out of date."""
        study, space, constraints = self.study, self.opened.space, self.opened.constraints
        evaluations = []
        for trial in study.get_trials(deepcopy=False):
            if (evaluation := read_evaluation(trial)) is not None:
                evaluations.append(evaluation)
                _note(_Trial(study, study._storage, trial._trial_id), trial_note(space, constraints, evaluation))
        competing = (*evaluations, *self.opened.run.promoted)
        ranked = ranking(competing, constraints) if self.opened.searching else []
        setting = f"{self.opened.config['dataset']}, policy {self.opened.config['policy']}"
        metric_names = [f"quint8 {constraints.measured} ({self.opened.config['split']}, fraction of 1)"]
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            if study.metric_names != metric_names:
                study.set_metric_names(metric_names)
        if _note(study, study_note(space, constraints, evaluations, ranked[:1], setting)):
            figure = pareto_figure(space, constraints, evaluations, ranked[:1])
            save_plotly_graph_object(study, figure, graph_object_id="pareto")

    def serve(self, host: str, port: int) -> WSGIServer:
        """A server that listens on this address, not running yet. Raises FnetError if the address cannot be used."""
        app = wsgi(self.storage, artifact_store=self.artifacts)
        try:
            return make_server(host, port, app, _Server, _Quiet)
        except (OSError, OverflowError) as error:
            raise FnetError(f"cannot listen on {host}:{port} ({error}); choose another --port or --host") from None

    def watch(self) -> None:
        """Starts a thread that annotates every REFRESHED seconds until the process ends."""

        def annotate_repeatedly() -> None:
            while not threading.Event().wait(REFRESHED):
                with suppress(Exception):  # a storage that fails now may work next time
                    self.annotate()

        threading.Thread(target=annotate_repeatedly, daemon=True).start()


def open_dashboard(opened: RecordedRun, storage: str | None) -> Dashboard:
    """The dashboard of a recorded run. It takes no lock on the run, which may still be searching.

    Raises FnetError if the storage cannot be opened or does not hold the run's study.

    Args:
        storage: URL of the study's storage; None: the recorded one, or the journal file in the run folder.
    """
    shared = shared_storage(opened, storage)
    study_storage, sharing = shared or (JournalStorage(JournalFileBackend(str(opened.run.journal))), None)
    if not has_study(study_storage, opened.run.name):
        raise FnetError(
            f"the storage has no study {opened.run.name!r}; give the URL that the run was started with as --storage"
        )
    run_artifacts = FileSystemArtifactStore(opened.run.artifacts)
    return Dashboard(opened, study_storage, run_artifacts if sharing is None else sharing.artifacts)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing: a line for each request would not help the user."""


@dataclass
class _Trial:
    """The attributes of a trial that `save_note` reads. Creating an Optuna trial instead would start it again."""

    study: optuna.Study
    storage: BaseStorage
    _trial_id: int


def _note(target: "optuna.Study | _Trial", text: str) -> bool:
    """Saves a note, unless the study or trial has the same one already. Returns whether it was saved."""
    changed: bool = get_note(target) != text
    if changed:
        save_note(target, text)
    return changed


def _safe(text: str) -> str:
    return text.translate(_UNSAFE)


def study_note(
    space: Macroarchitecture,
    constraints: Constraints,
    evaluations: Iterable[Evaluation],
    winner: Iterable[Evaluation],
    about: str,
) -> str:
    """The study's note in Markdown: constraints, progress, the winner so far, and how to read the trials."""
    evaluations = list(evaluations)
    validation = next(
        (f"validation images ({evaluation.validation})" for evaluation in evaluations if evaluation.validation), ""
    )
    limits = [f"{name} {limit}" for name, limit in constraints.described(_safe(validation))]
    states = [evaluation.state for evaluation in evaluations]
    counts = [f"{states.count(state)} {word}" for state, word in STATES.items() if state in states]
    lines = [
        f"## {_safe(space.name)}, {_safe(about)}",
        _safe(space.description),
        f"**Constraints:** {'; '.join(limits) or 'none'}.",
        f"**Trials:** {', '.join(counts) or 'none yet'}.",
    ]
    for evaluation in winner:
        fp32, quint8 = evaluation.scores(constraints.metric)
        met = "**Winner**" if constraints.feasible(evaluation) else "**None is feasible; nearest**"
        lines.append(
            f"{met}: candidate {evaluation.number}, `{label(space, evaluation.plan)}`, "
            f"{mmac(evaluation.cost.conv_macs)}, {evaluation.split} {constraints.measured} {percent(fp32)} fp32, "
            f"{percent(quint8)} quint8 ({evaluation.scheme})."
        )
        lines.append(f"Its rates: `{evaluation.plan}`")
    lines.append(
        "Each trial is a candidate. Its parameters are its rates (in a study begun by an earlier version: the indices "
        f"of the rates), its value is the quint8 {constraints.measured} on the evaluation split (fraction of 1). The "
        "table under *Smart Selection* lists all trials and sorts them by plan, label, `conv_macs`, `fp32_accuracy`, "
        "`quint8_accuracy`, `quint8_balanced_accuracy`, `relative_drop`, `feasible`, `reason` (why a candidate was "
        "refused, stopped or failed) and `violation_...` (above 0: the constraint is missed). Under *Trials*, the note "
        "of a trial lists its layers, and its artifacts are its files. The Pareto figure, and the figures and tables "
        "of the study, are under *History*. (The dashboard ignores constraints: its *best trial* may be infeasible.)"
    )
    return "\n\n".join(lines)


def trial_note(space: Macroarchitecture, constraints: Constraints, evaluation: Evaluation) -> str:
    """A trial's note in Markdown: the candidate's measures, and a table with a row for each layer."""
    parts = [
        f"`{label(space, evaluation.plan)}`, {mmac(evaluation.cost.conv_macs)}, {evaluation.cost.params:,} parameters"
    ]
    if evaluation.state == "complete":
        parts.append(
            f"{evaluation.split} fp32 {percent(evaluation.fp32_accuracy)}, quint8 {percent(evaluation.quint8_accuracy)}"
        )
        if evaluation.classes:
            fp32, quint8 = evaluation.scores("balanced-accuracy")
            parts.append(f"balanced accuracy fp32 {percent(fp32)}, quint8 {percent(quint8)}")
        parts.append(f"relative drop {percent(evaluation.relative_drop)} ({evaluation.scheme})")
    feasible = "meets every constraint" if constraints.feasible(evaluation) else "feasible: no"
    lines = [
        f"**Candidate {evaluation.number}** ({evaluation.role}, {STATES[evaluation.state]}): {parts[0]}; {feasible}.",
        *(f"{part}." for part in parts[1:]),
        *([f"Why: {_safe(evaluation.reason)}"] if evaluation.reason else []),
        *([f"Note: {_safe(evaluation.constant)}."] if evaluation.constant else []),
        f"Rates: `{evaluation.plan}`",
    ]
    if evaluation.layers:
        lines.append(
            "\n".join(["|".join(["", *_LAYER, ""]), "|" + "---|" * len(_LAYER), *map(_row, evaluation.layers)])
        )
    return "\n\n".join(lines)


_LAYER = (
    "layer",
    "MMAC",
    "folded weights",
    "precision",
    "activations",
    "precision",
    "SQNR weights, activations, accumulated (dB)",
    "zeros (%)",
)


def _row(layer: LayerStats) -> str:
    sqnrs = (layer.weight_sqnr_db, layer.activation_sqnr_db, layer.accumulated_sqnr_db)
    cells = [
        _safe(layer.layer),
        millions(layer.macs),
        f"{layer.folded_min:.3g} to {layer.folded_max:.3g}",
        f"{layer.folded_precision:.3f}",
        f"{layer.activation_min:.3g} to {layer.activation_max:.3g}",
        f"{layer.activation_precision:.3f}",
        ", ".join("-" if value is None else f"{value:.1f}" for value in sqnrs),
        f"{100 * layer.sparsity:.1f}",
    ]
    return "|".join(["", *cells, ""])


def pareto_figure(
    space: Macroarchitecture, constraints: Constraints, evaluations: Iterable[Evaluation], winner: Iterable[Evaluation]
) -> go.Figure:
    """The quint8 score (%) against conv MACs (millions).

    Shows feasible candidates with their Pareto front, infeasible candidates, the reference and the winner.
    """
    trained = [
        evaluation
        for evaluation in evaluations
        if evaluation.state == "complete" and _quint8(constraints, evaluation) is not None
    ]
    candidates = [evaluation for evaluation in trained if evaluation.role != "reference"]
    feasible = sorted(filter(constraints.feasible, candidates), key=lambda evaluation: evaluation.cost.conv_macs)
    front, best = list[Evaluation](), -1.0
    for evaluation in feasible:
        if (score := _quint8(constraints, evaluation) or 0.0) > best:
            front.append(evaluation)
            best = score
    groups = [
        ("feasible", feasible, COLOURS[0], "circle", 9),
        (
            "infeasible",
            [evaluation for evaluation in candidates if not constraints.feasible(evaluation)],
            COLOURS[7],
            "x",
            9,
        ),
        (
            "reference",
            [evaluation for evaluation in trained if evaluation.role == "reference"],
            COLOURS[5],
            "square",
            9,
        ),
        ("winner", [evaluation for evaluation in winner if constraints.feasible(evaluation)], COLOURS[1], "star", 16),
    ]
    figure, points = go.Figure(), partial(_points, space, constraints)
    line = {"color": COLOURS[0], "width": 1, "shape": "hv"}
    figure.add_scatter(**points(front), mode="lines", line=line, name="front")
    for name, members, colour, symbol, size in groups:
        if members:
            marker = {"color": colour, "symbol": symbol, "size": size}
            figure.add_scatter(**points(members), mode="markers", marker=marker, name=name)
    if constraints.conv_macs is not None:
        figure.add_vline(x=constraints.conv_macs / 1e6, line={"dash": "dash", "color": COLOURS[7]})
    figure.update_layout(
        title=f"{constraints.measured.capitalize()} against MACs",
        xaxis_title="MACs in convolutions (MMAC)",
        yaxis_title=f"quint8 {constraints.measured} (%)",
        template="plotly_white",
    )
    return figure


def _quint8(constraints: Constraints, evaluation: Evaluation) -> float | None:
    return evaluation.scores(constraints.metric).quint8


def _points(
    space: Macroarchitecture, constraints: Constraints, evaluations: list[Evaluation]
) -> dict[str, list[object]]:
    """Coordinates and hover texts of these evaluations, as arguments of plotly's scatter."""
    return {
        "x": [evaluation.cost.conv_macs / 1e6 for evaluation in evaluations],
        "y": [100 * (_quint8(constraints, evaluation) or 0.0) for evaluation in evaluations],
        "text": [f"candidate {evaluation.number}: {label(space, evaluation.plan)}" for evaluation in evaluations],
    }
