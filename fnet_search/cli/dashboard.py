"""A run in the Optuna dashboard: notes on the study and its trials, its Pareto picture, its files.

Trial attributes are written by the search itself (`trials`). What is here can be added at any time, also while the
search goes on: notes and pictures are attributes of the study.
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
"""Seconds between looks for what a search that goes on has added."""

_UNSAFE = str.maketrans({"<": "&lt;", ">": "&gt;", "|": "&#124;", "`": "&#96;", "*": "\\*", "_": "\\_"})
"""Of names that a user gave, as text and not as Markdown."""


@dataclass
class Dashboard:
    """A run and the storage that its study is in, to be looked at."""

    opened: RecordedRun
    storage: BaseStorage
    artifacts: "ArtifactStore"

    @property
    def study(self) -> optuna.Study:
        return optuna.load_study(study_name=self.opened.run.name, storage=self.storage)

    def annotate(self) -> None:
        """Writes the notes and the picture that are missing or not true any more."""
        study, space, constraints = self.study, self.opened.space, self.opened.constraints
        evaluations = []
        for trial in study.get_trials(deepcopy=False):
            if (evaluation := read_evaluation(trial)) is not None:
                evaluations.append(evaluation)
                _note(_Trial(study, study._storage, trial._trial_id), trial_note(space, constraints, evaluation))
        competing = (*evaluations, *self.opened.run.promoted)
        ranked = ranking(competing, constraints) if self.opened.searching else []
        about = f"{self.opened.config['dataset']}, policy {self.opened.config['policy']}"
        value = [f"quint8 {constraints.measured} ({self.opened.config['split']}, fraction of 1)"]
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            if study.metric_names != value:
                study.set_metric_names(value)
        if _note(study, study_note(space, constraints, evaluations, ranked[:1], about)):
            figure = pareto_figure(space, constraints, evaluations, ranked[:1])
            save_plotly_graph_object(study, figure, graph_object_id="pareto")

    def serve(self, host: str, port: int) -> WSGIServer:
        """A server that listens on this address, not running yet. Raises FnetError for one that cannot be used."""
        app = wsgi(self.storage, artifact_store=self.artifacts)
        try:
            return make_server(host, port, app, _Server, _Quiet)
        except (OSError, OverflowError) as error:
            raise FnetError(f"cannot listen on {host}:{port} ({error}); choose another --port or --host") from None

    def watch(self) -> None:
        """Goes on annotating, in a thread that ends with the process."""

        def keep() -> None:
            while not threading.Event().wait(REFRESHED):
                with suppress(Exception):  # the next look may find the storage well again
                    self.annotate()

        threading.Thread(target=keep, daemon=True).start()


def open_dashboard(opened: RecordedRun, storage: str | None) -> Dashboard:
    """The dashboard of a recorded run. `storage` as for `run.open_study`, whose lock is not needed here: a search may
    go on meanwhile. Raises FnetError for a storage without the study."""
    location = shared_storage(opened, storage)
    place, shared = location or (JournalStorage(JournalFileBackend(str(opened.run.journal))), None)
    if not has_study(place, opened.run.name):
        raise FnetError(f"no study {opened.run.name!r} is there; give the URL that the run had as --storage")
    own = FileSystemArtifactStore(opened.run.artifacts)
    return Dashboard(opened, place, own if shared is None else shared.artifacts)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """A line a request tells nobody anything."""


@dataclass
class _Trial:
    """What `save_note` wants of a trial; one of Optuna's own would be begun again."""

    study: optuna.Study
    storage: BaseStorage
    _trial_id: int


def _note(where: "optuna.Study | _Trial", text: str) -> bool:
    """Whether it was not there yet."""
    new: bool = get_note(where) != text
    if new:
        save_note(where, text)
    return new


def _safe(text: str) -> str:
    return text.translate(_UNSAFE)


def study_note(
    space: Macroarchitecture,
    constraints: Constraints,
    evaluations: Iterable[Evaluation],
    winner: Iterable[Evaluation],
    about: str,
) -> str:
    """Markdown: what is searched, how far it is, the winner so far, and how to read the trials."""
    everything = list(evaluations)
    validation = next(
        (f"validation images ({evaluation.validation})" for evaluation in everything if evaluation.validation), ""
    )
    limits = [f"{name} {limit}" for name, limit in constraints.described(_safe(validation))]
    states = [evaluation.state for evaluation in everything]
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
            f"{met}: candidate {evaluation.number}, `{label(space, evaluation.plan)}`, {mmac(evaluation.cost.conv_macs)}, "
            f"{evaluation.split} {constraints.measured} {percent(fp32)} fp32, {percent(quint8)} quint8 ({evaluation.scheme})."
        )
        lines.append(f"Its rates: `{evaluation.plan}`")
    lines.append(
        "A trial is a candidate: its parameters are its rates (in a study that an earlier version began: their "
        f"indices), its value is the quint8 {constraints.measured} on the evaluation split (fraction of 1). All trials "
        "are in the table under *Smart Selection*, to be sorted by plan, label, `conv_macs`, `fp32_accuracy`, "
        "`quint8_accuracy`, `quint8_balanced_accuracy`, `relative_drop`, `feasible`, `reason` (why one was refused, "
        "stopped or failed) and `violation_...` (above 0: missed). Under *Trials*, each one's note has its layers, its "
        "artifacts the files. The Pareto picture, and the figures and tables of the study, are under *History*. (The "
        "dashboard knows no constraints: its *best trial* may be infeasible.)"
    )
    return "\n\n".join(lines)


def trial_note(space: Macroarchitecture, constraints: Constraints, evaluation: Evaluation) -> str:
    """Markdown: the candidate in one line, and one row per layer."""
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
    """The quint8 score against conv MACs: feasible candidates with their front, the others, reference, and winner."""
    trained = [
        evaluation
        for evaluation in evaluations
        if evaluation.state == "complete" and _quint8(constraints, evaluation) is not None
    ]
    candidates = [evaluation for evaluation in trained if evaluation.role != "reference"]
    feasible = sorted(filter(constraints.feasible, candidates), key=lambda one: one.cost.conv_macs)
    front, best = list[Evaluation](), -1.0
    for evaluation in feasible:
        if (reached := _quint8(constraints, evaluation) or 0.0) > best:
            front.append(evaluation)
            best = reached
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
    for name, some, colour, symbol, size in groups:
        if some:
            marker = {"color": colour, "symbol": symbol, "size": size}
            figure.add_scatter(**points(some), mode="markers", marker=marker, name=name)
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


def _points(space: Macroarchitecture, constraints: Constraints, some: list[Evaluation]) -> dict[str, list[object]]:
    return {
        "x": [evaluation.cost.conv_macs / 1e6 for evaluation in some],
        "y": [100 * (_quint8(constraints, evaluation) or 0.0) for evaluation in some],
        "text": [f"candidate {evaluation.number}: {label(space, evaluation.plan)}" for evaluation in some],
    }
