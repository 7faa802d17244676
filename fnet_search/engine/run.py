"""A whole run: prepares data and workers, searches or trains given plans, tests the winner, and writes the report."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import optuna
from optuna.storages import BaseStorage

from fnet_search.candidates.in_process import InProcessPool
from fnet_search.candidates.pool import Finished, Pool
from fnet_search.candidates.workers import WorkerPool
from fnet_search.engine.display import Display
from fnet_search.engine.preparation import Prepared, check_same_config, configure, own_storage, prepare_run
from fnet_search.engine.reporting import make_outcome
from fnet_search.engine.request import JoinRequest, Request
from fnet_search.engine.search_loop import search, trained
from fnet_search.engine.shared_study import (
    artifacts_of,
    check_data,
    read_shared_run,
    share_run,
    share_weights,
    sharing_of,
    with_weights,
)
from fnet_search.engine.study_record import StudyRecord
from fnet_search.engine.winner import restore, test_winner
from fnet_search.optuna_bridge.storage import open_artifacts, open_journal, open_url, telling
from fnet_search.policy.fixed_plans import FixedPlans
from fnet_search.policy.protocol import Policy
from fnet_search.report.outcome import Outcome
from fnet_search.rundir.run_folder import RunFolder
from fnet_search.training.deadline import Deadline
from fnet_search.training.numerics import check_kernels


def run_study(request: Request, run: RunFolder, display: Display, deadline: Deadline | None = None) -> Outcome:
    """Searches until `Request.trials` candidates are trained or the policy is done, resuming an earlier run in the
    folder. Given plans (`FixedPlans`) are all trained.

    A search in a named storage is shared with the workers that join it (`join_study`).

    Raises FnetError, before anything is written, for data or a storage that cannot be read, a device that is not
    available, a limit that no network of the space meets, and a folder of another configuration; TimeUp at the
    deadline.
    """
    if run.exists:
        check_same_config(run, request.config())
    prepared = prepare_run(request, run, display)
    policy, trials = request.policy, request.trials
    if request.artifacts is not None:
        open_artifacts(request.artifacts)  # fails, if it does, before anything is written
    storage = own_storage(request.storage, run)
    with run.locked():
        configure(run, prepared.config)
        with closing(_record(prepared, run, storage)) as record:
            if record.sharing is not None:
                telling(record.storage, display.status)
                share_run(record.study, request, prepared.data, artifacts_of(request, run))
                share_weights(record.study, record.artifacts, request.space)
            if isinstance(policy, FixedPlans):
                past = {evaluation.plan for evaluation in record.evaluations}
                trials = trained(record.evaluations) + len(set(policy.plans) - past)
            with _pool(prepared, record, trials, display) as pool:
                _search(policy, record, pool, trials, display, deadline)
                test = test_winner(record, prepared.data, pool, display)
            display.status("drawing figures and the report")
            return make_outcome(record, test, policy)


def join_study(join: JoinRequest, run: RunFolder, display: Display, deadline: Deadline | None = None) -> str:
    """Works on the study of another process's search until it is done. Returns a line that says how many candidates
    were finished.

    Raises FnetError, before anything is written, if the study, its data or its weights are missing or differ from the
    run's; TimeUp at the deadline.
    """
    storage, name = open_url(join.storage, new=False), join.study
    telling(storage, display.status)
    shared = read_shared_run(storage, name)
    request = shared.request(join)
    study, store = optuna.load_study(study_name=name, storage=storage), open_artifacts(artifacts_of(request, run))
    request = replace(request, space=with_weights(request.space, shared.config["weights"], study, store))
    if run.exists:
        check_same_config(run, {**request.config(), "study": name})
    prepared = prepare_run(request, run, display)
    check_data(shared, prepared.data)
    with run.locked():
        configure(run, {**prepared.config, "study": name})
        with closing(_record(prepared, run, storage)) as record:
            before = {evaluation.number for evaluation in record.evaluations}
            with _pool(prepared, record, request.trials, display) as pool:
                finished = _search(request.policy, record, pool, request.trials, display, deadline)
        new = sum(evaluation.number not in before for evaluation in record.evaluations)
    return f"study {name} is done; this worker finished {finished} of the {new} candidates since it joined"


def _record(prepared: Prepared, run: RunFolder, storage: BaseStorage | None) -> StudyRecord:
    request = prepared.request
    return StudyRecord(
        storage or open_journal(run.journal),
        run,
        prepared.setup.space,
        request.constraints,
        request.seed,
        request.split,
        prepared.setup,
        request.searching,
        sharing_of(request, run) if storage is not None and request.searching else None,
    )


@contextmanager
def _pool(prepared: Prepared, record: StudyRecord, trials: int, display: Display) -> Iterator[Pool]:
    """The workers of a run. Announces to the display that the search begins."""
    done, setup = trained(record.evaluations), prepared.setup
    to_train = done < trials or record.to_finish() is not None
    if to_train and setup.numerics.fused:  # the run began on a machine with a compiler; this one may have none
        check_kernels(setup.numerics)
    display.begin(record.run, setup, trials, done)
    in_process, scratch = prepared.request.machine.workers == 0, record.run.path
    with (
        InProcessPool(setup, prepared.data, scratch)
        if in_process
        else WorkerPool(prepared.workers, setup, prepared.data, scratch)
    ) as pool:
        yield pool


def _search(
    policy: Policy, record: StudyRecord, pool: Pool, trials: int, display: Display, deadline: Deadline | None
) -> int:
    """Runs the search loop and shows its events. Returns the number of trainings that this process has finished."""
    unfinished = trained(record.evaluations) < trials or record.to_finish() is not None
    if unfinished and pool.setup.referenced:
        restore(record, pool, display)
    finished = 0
    for event in search(policy, record, pool, trials, deadline):
        display.show(event)
        finished += isinstance(event, Finished)
    return finished
