"""A whole run: configuration, data, workers and record brought together; the winner named, tested and reported."""

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import optuna
import torch
from optuna.storages import BaseStorage

from fnet_search import balance, latency, requantize
from fnet_search.audit import audit
from fnet_search.data import DataSet, load_dataset
from fnet_search.deadline import Deadline
from fnet_search.errors import FnetError
from fnet_search.evaluate import WEIGHTS, Setup, load_trained, measure
from fnet_search.export import quantized_model
from fnet_search.figures import figures, save_figures
from fnet_search.imagefolder import listing
from fnet_search.macro import Macroarchitecture
from fnet_search.numerics import Numerics, check_device, check_dtype, check_kernels, resolve
from fnet_search.outcome import Outcome, cautions
from fnet_search.plan import cost_table
from fnet_search.plugins import fault
from fnet_search.policy import (
    FIXED_PLANS,
    HELD_OUT,
    MAYBE_KNOWN,
    Audit,
    Constraints,
    Evaluation,
    Explanation,
    Policy,
    load_policy,
    requirements,
)
from fnet_search.quantities import counted, counts_meant
from fnet_search.recorded import RecordedNetwork, RecordedRun, metadata, open_run
from fnet_search.report import write_report
from fnet_search.request import Machine, Request, as_json, completed
from fnet_search.runfolder import PROMOTED, RunFolder, differences, versions
from fnet_search.runtime import Runtime
from fnet_search.scheme import AUTO
from fnet_search.search import Event, FixedPlans, search, trained
from fnet_search.sharing import (
    artifacts_of,
    check_data,
    elsewhere,
    publish,
    published,
    share_weights,
    sharing,
    with_weights,
)
from fnet_search.storage import has_study, open_artifacts, open_journal, open_url, read_journal, telling
from fnet_search.study import StudyRecord
from fnet_search.trials import recorded
from fnet_search.workers import Finished, WorkerPool, cores, how_many

OPTIONS = {
    "constraints.conv_macs": "--budget (conv MACs)",
    "constraints.params": "--max-params",
    "constraints.min_quint8": "--min-quint8",
    "constraints.max_drop": "--max-drop",
    "scheme": "--scheme",
    "constraints.metric": "--metric",
    "recipe.class_weights": "--class-weights",
}
"""What people call parts of a configuration."""
BY_FINGERPRINT = {"validation", "has_test", "skipped", "images"}
"""What is known of data whose fingerprint is the same, wherever they lie."""


class Display(Protocol):
    """Shows a user what goes on."""

    def status(self, text: str) -> None:
        """What is being done now."""
        ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def advance(self, what: str, done: int, total: int) -> None:
        """How many of the images are through `what`, reading or measuring."""
        ...

    def begin(self, run: RunFolder, setup: Setup, trials: int, done: int) -> None:
        """The search starts, or goes on with `done` candidates trained before."""
        ...

    def show(self, event: Event) -> None:
        """Something happened in the search."""
        ...


def run_study(
    request: Request,
    policy: Policy,
    run: RunFolder,
    trials: int,
    display: Display,
    deadline: Deadline | None = None,
) -> Outcome:
    """Searches until `trials` candidates are trained or the policy is done, going on where an earlier run stopped.

    Of `FixedPlans`, all are trained. A search whose storage was named is shared with whoever joins it (`join_study`).
    Raises FnetError, before anything is written, for data or a storage that cannot be read, a device that is not there,
    a limit that no network of the space meets, or a folder that was made with another configuration; TimeUp at the
    deadline.
    """
    if run.exists:
        compare(run, request.config())
    prepared = _prepare(request, policy, run, display)
    if request.artifacts is not None:
        open_artifacts(request.artifacts)  # or fail before anything is written
    storage = _storage(request.storage, run)
    with run.locked():
        _configure(run, prepared.config)
        with closing(_record(prepared, run, storage)) as record:
            if record.sharing is not None:
                telling(record.storage, display.status)
                publish(record.study, request, prepared.data, trials, artifacts_of(request, run))
                share_weights(record.study, record.artifacts, request.space)
            if isinstance(policy, FixedPlans):
                past = {one.plan for one in record.evaluations}
                trials = trained(record.evaluations) + len(set(policy.plans) - past)
            with _pool(prepared, record, trials, display) as pool:
                _search(policy, record, pool, trials, display, deadline)
                test = _test(record, prepared.data, pool, display)
            display.status("drawing figures and the report")
            return _outcome(record, test, policy)


def join_study(
    url: str,
    name: str,
    run: RunFolder,
    machine: Machine,
    dataset: str | None,
    validation: str | None,
    artifacts: str | None,
    display: Display,
    deadline: Deadline | None = None,
) -> str:
    """Works on the study of another process's search until it is done; returns what came of it, in a line.

    `url` of its storage; `dataset`, `validation` and `artifacts` where this host names them otherwise. Raises
    FnetError, before anything is written, where the study, its data or its weights are not there, or others; TimeUp at
    the deadline.
    """
    storage = open_url(url, new=False)
    telling(storage, display.status)
    known = published(storage, name)
    request = known.request(url, machine, dataset, validation, artifacts)
    policy = load_policy(request.policy_name)
    study, store = optuna.load_study(study_name=name, storage=storage), open_artifacts(artifacts_of(request, run))
    request = replace(request, space=with_weights(request.space, known.config["weights"], study, store))
    if run.exists:
        compare(run, {**request.config(), "study": name})
    prepared = _prepare(request, policy, run, display)
    check_data(known, prepared.data)
    with run.locked():
        _configure(run, {**prepared.config, "study": name})
        with closing(_record(prepared, run, storage)) as record:
            before = {one.number for one in record.evaluations}
            with _pool(prepared, record, known.trials, display) as pool:
                own = _search(policy, record, pool, known.trials, display, deadline)
        new = sum(one.number not in before for one in record.evaluations)
    return f"study {name} is done; of {new} candidates since, this worker has finished {own}"


@dataclass(frozen=True)
class _Prepared:
    """A request, with its data read and how this machine computes."""

    request: Request
    data: DataSet
    workers: int
    setup: Setup

    @property
    def config(self) -> dict[str, Any]:
        data = self.data
        facts = {
            "fingerprint": data.fingerprint(),
            "classes": data.classes,
            "mean": data.mean,
            "std": data.std,
            "validation": data.validation,
            "has_test": data.has_test,
            "skipped": len(data.unreadable),
            "images": self.counts,
        }
        return {**self.request.config(), "data": as_json(facts), "numerics": self.setup.numerics.to_json()}

    @property
    def counts(self) -> dict[str, list[int]]:
        """By split, the images of each class."""
        splits = {"training": self.data.train, self.setup.split: self.data.evaluation}
        if self.data.has_test:
            splits["test"] = self.data.test
        classes = len(self.data.classes)
        return {name: torch.bincount(split.labels, minlength=classes).tolist() for name, split in splits.items()}


def _prepare(request: Request, policy: Policy, run: RunFolder, display: Display) -> _Prepared:
    machine = request.machine
    check_dtype(check_device(machine.device), machine.dtype)
    display.status(f"reading {request.dataset}")
    shape, reading = request.space.input_shape, partial(display.advance, "reading images")
    validation = request.validation
    if validation is None and run.exists:  # as it was, also where a folder val/ has come since
        validation = run.config()["data"]["validation"]
    data = load_dataset(
        request.dataset,
        shape,
        machine.data_dir,
        machine.download,
        reading,
        request.split,
        validation,
        machine.skip_unreadable,
    )
    if data.unreadable:
        display.say(f"left out, {counted(len(data.unreadable), 'unreadable image')}: {listing(data.unreadable)}")
    space = request.space.with_classes(len(data.classes))
    if space.weights is not None and space != request.space and not request.fidelity.finetune:
        raise FnetError(
            f"the weights of {space.name} are for {request.space.classes} classes, the data set has {space.classes}: "
            "its last layer is new and wants training; add --finetune"
        )
    if space.mean:
        data = replace(data, mean=space.mean, std=space.std)
    known = MAYBE_KNOWN if data.validation == HELD_OUT and space.weights is not None else data.validation
    for text in cautions(known or "", data.has_test or request.policy_name == FIXED_PLANS):
        display.say(f"warning: {text}")
    _check_params(space, request.constraints)
    recorded = _recorded(run, machine)
    device = recorded.device if recorded else check_device(machine.device)
    threads = recorded.threads if recorded else machine.threads or 1
    workers = how_many(machine.workers, device, threads, space, request.recipe, data)
    if recorded is None:
        display.status("measuring what this device is fast with")
    elif recorded.fused and not run.exists:
        check_kernels(recorded)
    numerics = recorded or resolve(device, machine.dtype, workers, cores(), machine.threads, machine.fused)
    setup = Setup(
        space,
        request.recipe,
        request.schemes,
        numerics,
        request.seed,
        request.split,
        request.audit_all,
        request.fidelity,
        request.constraints.metric,
        request.fidelity.warm_start or bool(requirements(policy)),
        known or "",
    )
    prepared = _Prepared(request, data, workers, setup)
    display.say(balance.counts_line(data.classes, prepared.counts))
    for text in balance.warnings(data.classes, prepared.counts):
        display.say(f"warning: {text}")
    return prepared


def _configure(run: RunFolder, config: dict[str, Any]) -> None:
    if run.exists:
        compare(run, config)
    else:
        run.write_config(config)


def _record(prepared: _Prepared, run: RunFolder, storage: BaseStorage | None) -> StudyRecord:
    request, searching = prepared.request, prepared.request.policy_name != FIXED_PLANS
    return StudyRecord(
        storage or open_journal(run.journal),
        run,
        prepared.setup.space,
        request.constraints,
        request.seed,
        request.split,
        prepared.setup,
        searching,
        sharing(request, run) if storage is not None and searching else None,
    )


@contextmanager
def _pool(prepared: _Prepared, record: StudyRecord, trials: int, display: Display) -> Iterator[WorkerPool]:
    done, setup = trained(record.evaluations), prepared.setup
    if (done < trials or record.to_finish() is not None) and setup.numerics.fused:  # where there was a compiler
        check_kernels(setup.numerics)
    display.begin(record.run, setup, trials, done)
    with WorkerPool(prepared.workers, setup, prepared.data, record.run.path) as pool:
        yield pool


def _search(
    policy: Policy, record: StudyRecord, pool: WorkerPool, trials: int, display: Display, deadline: Deadline | None
) -> int:
    """Returns how many trainings were finished here."""
    unfinished = trained(record.evaluations) < trials or record.to_finish() is not None
    if unfinished and pool.setup.referenced:
        _restore(record, pool, display)
    finished = 0
    for event in search(policy, record, pool, trials, deadline):
        display.show(event)
        finished += isinstance(event, Finished)
    return finished


def _check_params(space: Macroarchitecture, constraints: Constraints) -> None:
    table = cost_table(space)
    fewest = table.fixed.params + sum(min(cost.params for cost in costs) for costs in table.by_layer.values())
    most = table.fixed.params + sum(max(cost.params for cost in costs) for costs in table.by_layer.values())
    if constraints.params is not None and constraints.params < fewest:
        units = counts_meant(str(constraints.params), "", fewest, most)
        raise FnetError(
            f"a limit of {constraints.params:,} parameters is below the smallest network of space {space.name!r}, "
            f"which has {fewest:,}{f'; did you mean {units[0]}?' if units else ''}"
        )


def _storage(url: str | None, run: RunFolder) -> BaseStorage | None:
    """The storage that was asked for. A new run does not go on with what another one has left in it."""
    if url is None:
        return None
    storage = open_url(url)
    if not run.exists and has_study(storage, run.name):
        raise FnetError(
            f"the storage has a study {run.name!r} of another run folder; choose another --out, or work on it too: "
            f"fnet-search worker --storage ... --study {run.name}"
        )
    return storage


def compare(run: RunFolder, config: dict[str, Any]) -> None:
    """Raises FnetError where a run was recorded with another configuration than this one."""
    recorded = run.config()
    if "fidelity" not in recorded:
        raise FnetError(f"{run.path} was made by an earlier version, which trained otherwise; choose another --out")
    recorded = completed(recorded)
    told = {key: value for key, value in config.get("data", {}).items() if key in BY_FINGERPRINT}
    recorded["data"] = {**recorded["data"], **told}
    if (recorded["policy"] == FIXED_PLANS) != (config["policy"] == FIXED_PLANS):
        kind = "given plans" if recorded["policy"] == FIXED_PLANS else "a search"
        raise FnetError(f"{run.path} is a run of {kind}; choose another --out")
    parted = (text.partition(":") for text in differences(recorded, config))
    found = [f"{OPTIONS.get(name, name)}{colon}{text}" for name, colon, text in parted]
    if found:
        same = f", or say --scheme {recorded['scheme']}" if recorded["scheme"] != config["scheme"] else ""
        raise FnetError(
            f"{run.path} was made with another configuration ({'; '.join(found)}); choose another --out{same}"
        )


def _recorded(run: RunFolder, machine: Machine) -> Numerics | None:
    """The numerics recorded in the run that was named, or here, where nothing else is wanted.

    Raises FnetError for a device that is not there any more, and where that run cannot be read.
    """
    known = RunFolder(machine.numerics_of) if machine.numerics_of is not None else run
    if known is run and not run.exists:
        return None
    found = Numerics.from_json(known.config()["numerics"])
    wanted = (
        machine.device in ("auto", found.device),
        machine.dtype in ("auto", found.dtype),
        machine.threads in (None, found.threads),
        machine.fused in (None, found.fused),
    )
    if not all(wanted):
        return None
    check_device(found.device)
    return found


def _outcome(record: StudyRecord, test: Evaluation | None, policy: Policy | None) -> Outcome:
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
    pictures = save_figures(figures(outcome), run.path / "figures")
    tables = [] if probes is None else [run.write_probes(probes)]
    if explanation is not None:
        tables += run.write_explanation(explanation)
    record.attach([*pictures, *tables])
    opened = open_run(run.path)
    measured = test if outcome.has_test else record.winner
    more = [*_classes(run, measured), *requantize.section(opened), *latency.section(opened)]
    write_report(outcome, run.name, dict(_settings(run.config(), outcome)), pictures, more)
    return outcome


def _classes(run: RunFolder, winner: Evaluation | None) -> list[tuple[str, str]]:
    """The report's section on the classes of the data, and of the winner as it was measured last."""
    data = run.config()["data"]
    confusion = [] if winner is None else balance.read_confusion(run.confusion, data["classes"])
    return balance.section(data["classes"], data.get("images", {}), winner, confusion)


def _explanation(record: StudyRecord, policy: Policy | None) -> Explanation | None:
    """Why the winner, where the policy was told of layers and can say so."""
    explain = getattr(policy, "explain", None)
    if record.winner is None or record.probes is None or explain is None:
        return None
    try:
        found = explain(record.history(), record.winner.plan)
    except FnetError:  # the winner may have been found by other means
        return None
    except Exception as error:
        name = type(policy).__name__
        raise FnetError(
            f"policy {name} failed to explain the winner: {fault(error, type(policy).__module__)}"
        ) from error
    return found if isinstance(found, Explanation) else None


def _test(record: StudyRecord, data: DataSet, pool: WorkerPool, display: Display) -> Evaluation | None:
    """The winner on the test split, as the very network that was evaluated (its codes are read, not made again), and
    audited there and on the split that it was evaluated on. None: there is no winner, or there are no test images.

    What was measured before is in ``best/``; where that is not of this winner, it is now.
    """
    run, winner = record.run, record.winner
    if winner is None:
        return None
    known = run.read_test(winner)
    if run.has_best(winner) and (known or not data.has_test):
        return known
    network = RecordedNetwork(winner, run.candidate(winner.number), run.codes(winner))
    record.fetch(winner.number)
    try:
        network.load(record.space)
    except FnetError as error:  # the same training gives the same network again
        if network.folder != network.candidate:
            display.say(f"{network.id} has lost its files ({error}): it is not promoted any more")
            (network.folder / PROMOTED).unlink()
            return _test(record, data, pool, display)
        display.status(f"training candidate {winner.number} once more ({error})")
        run.write_candidate(winner)
        _again(record, pool, winner)
        run.prune(record.evaluations, record.constraints)
    return measure_winner(record, network, data, display)


def measure_winner(record: StudyRecord, network: RecordedNetwork, data: DataSet, display: Display) -> Evaluation | None:
    """Measures the winner of a run on the test split, if there is one, audits it, and fills ``best/`` with it."""
    run, winner = record.run, network.evaluation
    folded, quantized = network.load(record.space)
    runtime = Runtime(quantized_model(quantized), torch.get_num_threads())
    if winner.audit is None:
        found = Audit()
        for part in audit(quantized, runtime, (data.normalise(images) for images, _ in data.evaluation.batches(250))):
            found += part
            display.advance("auditing the winner in ONNX Runtime", found.images, len(data.evaluation))
        winner = record.audit(winner, found)
    split = data.test if data.has_test else data.evaluation  # for the confusions, where that is all there is
    measuring = partial(display.advance, f"measuring the winner on {'test' if data.has_test else 'validation'} images")
    measures = measure(folded, quantized, data, split, lambda done: measuring(done, len(split)), runtime)
    test = None
    if data.has_test:
        test = measures.complete(replace(winner, split="test", validation="", layers=(), common=None))
    facts = metadata(run.config(), record.space, winner, test, "quint8")
    run.write_best(winner, test, quantized_model(quantized, facts), measures.confusion)
    return test


def _restore(record: StudyRecord, pool: WorkerPool, display: Display) -> None:
    """Trains once more what others start from, where its weights were lost since."""
    for one in record.starts:
        folder = record.run.candidate(one.number)
        record.fetch(one.number)
        try:
            load_trained(record.space, one.plan, folder)
        except FnetError as error:
            display.status(f"training candidate {one.number} once more ({error})")
            (folder / WEIGHTS).unlink(missing_ok=True)
            _again(record, pool, one)


def _again(record: StudyRecord, pool: WorkerPool, evaluation: Evaluation) -> None:
    """Trains a network once more; first the one that it started from, where its weights are gone."""
    job = record.again(evaluation)
    if job.start is not None and not (job.start.folder / WEIGHTS).is_file():
        _again(record, pool, next(one for one in record.evaluations if one.number == evaluation.parent))
    pool.submit(job)
    while pool.busy:
        for _ in pool.events():
            pass


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
    for one in outcome.evaluations:
        if one.role == "final" and one.state == "complete":
            more = counted(one.epochs, "epoch")
            yield "final training", f"of candidate {one.parent}, for {more}, as candidate {one.number}"
    yield "quantization", _quantization(config["scheme"], outcome)
    yield "seed", str(config["seed"])
    yield "numerics", str(Numerics.from_json(config["numerics"]))
    yield "versions", ", ".join(f"{name} {number}" for name, number in config.get("versions", versions()).items())


def _quantization(scheme: str, outcome: Outcome) -> str:
    """How networks are quantized, and which scheme the policy knows."""
    if scheme != AUTO:
        return scheme
    seen = (one.common or one for one in outcome.evaluations if one.state == "complete" and one.role != "final")
    common = next((one.scheme for one in seen), "")
    policy = f"; the policy learns from {common}" if common and outcome.winner is not None else ""
    return f"each network with the scheme whose outputs diverge least from its float ones{policy}"


def open_study(opened: RecordedRun, storage: str | None) -> StudyRecord:
    """The study of a recorded run whose folder is locked.

    `storage` is the URL of another place to find it than the recorded one. Raises FnetError, before anything is
    written, for a storage without it, or one that has lost candidates of candidates.csv.
    """
    found = elsewhere(opened, storage)
    _check_whole(opened.run, read_journal(opened.run.journal) if found is None else found[0])
    place, shared = found or (open_journal(opened.run.journal), None)
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
    lost = run.listed() - {one.number for one in map(recorded, trials) if one is not None}
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
    return _outcome(record, test, policy)
