"""Makes the figures, tables and report of a run from its record."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import optuna
from optuna.storages import BaseStorage

from fnet_search.base.errors import FnetError
from fnet_search.base.plugins import fault
from fnet_search.base.units import counted
from fnet_search.engine.shared_study import shared_storage
from fnet_search.engine.study_record import StudyRecord
from fnet_search.inspection import latency_report, requantize
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
    """The outcome of a run, from its record. Writes its tables, figures and report into the run folder, and attaches
    tables and figures to the study.

    Raises FnetError if the policy fails to explain the winner.

    Args:
        test: the winner's evaluation on the test split.
        policy: the policy of the run, to explain the winner; None: it is not explained.
    """
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
    sections = [*_classes(run, measured), *requantize.schemes_section(opened), *latency_report.latency_section(opened)]
    write_report(outcome, run.name, dict(_settings(run.config(), outcome)), pictures, sections)
    return outcome


def _classes(run: RunFolder, winner: Evaluation | None) -> list[tuple[str, str]]:
    """The report's section on classes: of the data, and of the winner on the images that it was last measured on."""
    data = run.config()["data"]
    confusion = [] if winner is None else balance.read_confusion(run.confusion, data["classes"])
    return balance.classes_section(data["classes"], data.get("images", {}), winner, confusion)


def _explanation(record: StudyRecord, policy: Policy | None) -> Explanation | None:
    """The policy's explanation of the winner; None if there is no winner, if there are no probes, or if the policy
    cannot explain. Raises FnetError for a policy whose `explain` raises anything but an FnetError."""
    explain = getattr(policy, "explain", None)
    if record.winner is None or record.probes is None or explain is None:
        return None
    try:
        explanation = explain(record.history(), record.winner.plan)
    except FnetError:  # the policy cannot explain this winner, which may come from another policy
        return None
    except Exception as error:
        name = type(policy).__name__
        raise FnetError(
            f"policy {name} failed to explain the winner: {fault(error, type(policy).__module__)}"
        ) from error
    return explanation if isinstance(explanation, Explanation) else None


def _settings(config: dict[str, Any], outcome: Outcome) -> Iterator[tuple[str, str]]:
    """The settings of a run for the report, as (name, text)."""
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
    limits = outcome.constraints.described(outcome.measured_on)
    yield from ((f"limit on {name}", text) for name, text in limits)
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
            epochs = counted(evaluation.epochs, "epoch")
            yield "final training", f"of candidate {evaluation.parent}, for {epochs}, as candidate {evaluation.number}"
    yield "quantization", _quantization(config["scheme"], outcome)
    yield "seed", str(config["seed"])
    yield "numerics", str(Numerics.from_json(config["numerics"]))
    yield "versions", ", ".join(f"{name} {number}" for name, number in config.get("versions", versions()).items())


def _quantization(scheme: str, outcome: Outcome) -> str:
    """The text on quantization: the scheme, or how it is chosen and which common scheme the policy sees."""
    if scheme != AUTO:
        return scheme
    history = (
        evaluation.common or evaluation
        for evaluation in outcome.evaluations
        if evaluation.state == "complete" and evaluation.role != "final"
    )
    common = next((evaluation.scheme for evaluation in history), "")
    policy = f"; the policy learns from {common}" if common and outcome.winner is not None else ""
    return f"each network with the scheme whose outputs diverge least from its float ones{policy}"


def open_record(opened: RecordedRun, storage: str | None) -> StudyRecord:
    """Opens the study of a recorded run; the caller holds the folder's lock.

    Raises FnetError, before anything is written, if the storage cannot be opened, if it has no such study, or if the
    study lacks candidates that are in candidates.csv.

    Args:
        storage: URL of the storage; None: the recorded one.
    """
    location = shared_storage(opened, storage)
    # A journal is first read without changing it: opening it may cut off its last line.
    _check_complete(opened.run, read_journal(opened.run.journal) if location is None else location[0])
    opened_storage, sharing = location or (open_journal(opened.run.journal), None)
    return StudyRecord(
        opened_storage,
        opened.run,
        opened.space,
        opened.constraints,
        opened.config["seed"],
        opened.config["split"],
        searching=opened.searching,
        sharing=sharing,
    )


def _check_complete(run: RunFolder, storage: BaseStorage) -> None:
    """Raises FnetError if the study is missing, or lacks candidates that are in candidates.csv."""
    exists = has_study(storage, run.name)
    trials = optuna.load_study(study_name=run.name, storage=storage).get_trials(deepcopy=False) if exists else []
    lost = run.listed() - {evaluation.number for evaluation in map(read_evaluation, trials) if evaluation is not None}
    if lost or not exists:
        missing = "candidates " + ", ".join(map(str, sorted(lost))) if lost else f"the study {run.name!r}"
        raise FnetError(
            f"the journal or storage of {run.path} has lost {missing}; restore it from a copy, or let fnet-search run "
            "train what is missing again"
        )


def report_again(record: StudyRecord) -> Outcome:
    """Makes candidates.csv, figures and report of a run again, from its study."""
    policy = None
    with suppress(FnetError):  # the policy was an object without a plug-in's name, or is not installed any more
        policy = load_policy(record.run.config()["policy"])
    test = record.run.read_test(record.winner) if record.winner is not None else None
    return make_outcome(record, test, policy)
