"""Figures, tables and report of a run, from what was recorded."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import optuna
from optuna.storages import BaseStorage

from fnet_search.base.errors import FnetError
from fnet_search.base.plugins import fault
from fnet_search.base.units import counted
from fnet_search.engine.shared_study import (
    shared_storage,
)
from fnet_search.engine.study_record import StudyRecord
from fnet_search.inspection import latency, requantize
from fnet_search.optuna_bridge.storage import has_study, open_journal, read_journal
from fnet_search.optuna_bridge.trials import read_evaluation
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.explanation import Explanation
from fnet_search.policy.protocol import Policy
from fnet_search.policy.registry import load_policy
from fnet_search.quant.scheme import AUTO
from fnet_search.report import class_balance as balance
from fnet_search.report.figures import run_figures, save_figures
from fnet_search.report.html_report import write_report
from fnet_search.report.outcome import Outcome
from fnet_search.rundir.recorded_run import RecordedRun, open_run
from fnet_search.rundir.run_folder import RunFolder, versions
from fnet_search.training.numerics import Numerics


def make_outcome(record: StudyRecord, test: Evaluation | None, policy: Policy | None) -> Outcome:
    """Table, figures and report of a run from what was recorded."""
    run, probes, explanation = record.run, record.probes, _explanation(record, policy)
    outcome = Outcome(
        run.path,
        record.space,
        record.constraints,
        record.split,
        record.audited,
        record.winner,
        test,
        probes,
        explanation,
        run.config()["data"]["has_test"],
    )
    pictures = save_figures(run_figures(outcome), run.path / "figures")
    tables = [] if probes is None else [run.write_probes(probes)]
    if explanation is not None:
        tables += run.write_explanation(explanation)
    record.attach([*pictures, *tables])
    opened = open_run(run.path)
    measured = test if outcome.has_test else record.winner
    more = [*_classes(run, measured), *requantize.schemes_section(opened), *latency.latency_section(opened)]
    write_report(outcome, run.name, dict(_settings(run.config(), outcome)), pictures, more)
    return outcome


def _classes(run: RunFolder, winner: Evaluation | None) -> list[tuple[str, str]]:
    """The report's section on the classes of the data, and of the winner as it was measured last."""
    data = run.config()["data"]
    confusion = [] if winner is None else balance.read_confusion(run.confusion, data["classes"])
    return balance.classes_section(data["classes"], data.get("images", {}), winner, confusion)


def _explanation(record: StudyRecord, policy: Policy | None) -> Explanation | None:
    """Why the winner, where the policy was told of layers and can say so."""
    explain = getattr(policy, "explain", None)
    if record.winner is None or record.probes is None or explain is None:
        return None
    try:
        explanation = explain(record.history(), record.winner.plan)
    except FnetError:  # the winner may have been found by other means
        return None
    except Exception as error:
        name = type(policy).__name__
        raise FnetError(
            f"policy {name} failed to explain the winner: {fault(error, type(policy).__module__)}"
        ) from error
    return explanation if isinstance(explanation, Explanation) else None


def _settings(config: dict[str, Any], outcome: Outcome) -> Iterator[tuple[str, str]]:
    recipe = config["recipe"]
    yield "space", f"{outcome.space.name}: {outcome.space.description}"
    data = config["data"]
    left_out = f", {counted(data['skipped'], 'unreadable image')} left out" if data["skipped"] else ""
    no_test = "" if data["has_test"] else ", no test images"
    facts = f"(fingerprint {data['fingerprint']}), {len(data['classes'])} classes{left_out}{no_test}"
    yield "data set", f"{config['dataset']} {facts}"
    if outcome.split == "validation":
        yield "validation images", outcome.validation or data["validation"]
    yield "policy", config["policy"]
    if outcome.constraints.metric != "accuracy":
        yield "metric", outcome.constraints.measured
    described = outcome.constraints.described(outcome.measured_on)
    yield from ((f"limit on {name}", text) for name, text in described)
    training = f"{counted(recipe['epochs'], 'epoch')}, batch {recipe['batch_size']}, {recipe['schedule']}"
    weights = ", classes weighted alike" if recipe.get("class_weights") == "balanced" else ""
    yield "recipe", f"{recipe['name']}: {training}, learning rate {recipe['learning_rate']}{weights}"
    fidelity = config.get("fidelity", {})
    if fidelity.get("warm_start"):
        epochs = fidelity["warm_epochs"]
        yield "warm start", f"from trained parents, {counted(epochs, 'epoch')}, a smaller learning rate"
    if fidelity.get("prune"):
        yield "pruning", "successive halving over validation accuracies"
    for evaluation in outcome.evaluations:
        if evaluation.role == "final" and evaluation.state == "complete":
            more = counted(evaluation.epochs, "epoch")
            yield "final training", f"of candidate {evaluation.parent}, for {more}, as candidate {evaluation.number}"
    yield "quantization", _quantization(config["scheme"], outcome)
    yield "seed", str(config["seed"])
    yield "numerics", str(Numerics.from_json(config["numerics"]))
    yield "versions", ", ".join(f"{name} {number}" for name, number in config.get("versions", versions()).items())


def _quantization(scheme: str, outcome: Outcome) -> str:
    """How networks are quantized, and which scheme the policy knows."""
    if scheme != AUTO:
        return scheme
    seen = (
        evaluation.common or evaluation
        for evaluation in outcome.evaluations
        if evaluation.state == "complete" and evaluation.role != "final"
    )
    common = next((evaluation.scheme for evaluation in seen), "")
    policy = f"; the policy learns from {common}" if common and outcome.winner is not None else ""
    return f"each network with the scheme whose outputs diverge least from its float ones{policy}"


def open_record(opened: RecordedRun, storage: str | None) -> StudyRecord:
    """The study of a recorded run whose folder is locked.

    `storage` is the URL of another place to find it than the recorded one. Raises FnetError, before anything is
    written, for a storage without it, or one that has lost candidates of candidates.csv.
    """
    location = shared_storage(opened, storage)
    _check_whole(opened.run, read_journal(opened.run.journal) if location is None else location[0])
    place, shared = location or (open_journal(opened.run.journal), None)
    return StudyRecord(
        place,
        opened.run,
        opened.space,
        opened.constraints,
        opened.config["seed"],
        opened.config["split"],
        searching=opened.searching,
        sharing=shared,
    )


def _check_whole(run: RunFolder, storage: BaseStorage) -> None:
    known = has_study(storage, run.name)
    trials = optuna.load_study(study_name=run.name, storage=storage).get_trials(deepcopy=False) if known else []
    lost = run.listed() - {evaluation.number for evaluation in map(read_evaluation, trials) if evaluation is not None}
    if lost or not known:
        what = "candidates " + ", ".join(map(str, sorted(lost))) if lost else f"the study {run.name!r}"
        raise FnetError(
            f"the journal or storage of {run.path} has lost {what}; restore it from a copy, or let fnet-search run "
            "train what is missing again"
        )


def report_again(record: StudyRecord) -> Outcome:
    """Makes candidates.csv, figures and report of a run again, from its study."""
    policy = None
    with suppress(FnetError):  # it was no plug-in, or is not installed any more
        policy = load_policy(record.run.config()["policy"])
    test = record.run.read_test(record.winner) if record.winner is not None else None
    return make_outcome(record, test, policy)
