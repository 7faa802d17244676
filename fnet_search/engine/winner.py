"""The end of a search: measures the winner on the test split, audits it and exports it."""

from dataclasses import replace
from functools import partial

import torch

from fnet_search.base.errors import FnetError
from fnet_search.candidates.measure import measure_split
from fnet_search.candidates.network_files import WEIGHTS, load_trained
from fnet_search.candidates.pool import Pool
from fnet_search.deploy.audit import audit
from fnet_search.deploy.export import quantized_model
from fnet_search.deploy.runtime import Runtime
from fnet_search.engine.display import Display
from fnet_search.engine.study_record import StudyRecord
from fnet_search.policy.evaluation import Audit, Evaluation
from fnet_search.rundir.recorded_run import RecordedNetwork, metadata
from fnet_search.rundir.run_folder import PROMOTED
from fnet_search.training.datasets import DataSet


def test_winner(record: StudyRecord, data: DataSet, pool: Pool, display: Display) -> Evaluation | None:
    """Measures the winner on the test split, and audits it there and on the split that it was evaluated on. Returns
    the evaluation on the test split; None if there is no winner, or if there are no test images.

    It measures the very network that was evaluated: the recorded codes are read, not computed again. The result is kept
    in ``best/`` with the winner's files, and returned from there if it is of this winner.
    """
    run, winner = record.run, record.winner
    if winner is None:
        return None
    measured = run.read_test(winner)
    if run.has_best(winner, record.weight_type) and (measured or not data.has_test):
        return measured
    network = RecordedNetwork(winner, run.candidate(winner.number), run.codes(winner))
    record.fetch(winner.number)
    try:
        network.load(record.space)
    except FnetError as error:
        if network.folder != network.candidate:
            display.say(f"the files of {network.id} are lost ({error}): it is not promoted any more")
            (network.folder / PROMOTED).unlink()
            return test_winner(record, data, pool, display)
        display.status(f"training candidate {winner.number} once more ({error})")
        run.write_candidate(winner)
        _train_again(record, pool, winner)
        run.prune(record.evaluations, record.constraints)
    return measure_winner(record, network, data, display)


def measure_winner(record: StudyRecord, network: RecordedNetwork, data: DataSet, display: Display) -> Evaluation | None:
    """Audits the winner of a run unless it was audited before, measures it on the test split, and fills ``best/``.

    Without test images the other split is measured, for the confusion matrix in ``best/``, and None is returned.
    """
    run, winner = record.run, network.evaluation
    folded, quantized = network.load(record.space)
    runtime = Runtime(quantized_model(quantized, weight_type=record.weight_type), torch.get_num_threads())
    if winner.audit is None:
        total = Audit()
        for part in audit(quantized, runtime, (data.normalise(images) for images, _ in data.evaluation.batches(250))):
            total += part
            display.advance("auditing the winner in ONNX Runtime", total.images, len(data.evaluation))
        winner = record.audit(winner, total)
    split = data.test if data.has_test else data.evaluation
    measuring = partial(display.advance, f"measuring the winner on {'test' if data.has_test else 'validation'} images")
    measures = measure_split(folded, quantized, data, split, lambda done: measuring(done, len(split)), runtime)
    test = None
    if data.has_test:
        test = measures.complete(replace(winner, split="test", validation="", layers=(), common=None))
    facts = metadata(run.config(), record.space, winner, test, "quint8")
    run.write_best(winner, test, quantized_model(quantized, facts, record.weight_type), measures.confusion)
    return test


def restore(record: StudyRecord, pool: Pool, display: Display) -> None:
    """Trains the networks again that others start from (`StudyRecord.starts`), if their weights are lost."""
    for evaluation in record.starts:
        folder = record.run.candidate(evaluation.number)
        record.fetch(evaluation.number)
        try:
            load_trained(record.space, evaluation.plan, folder)
        except FnetError as error:
            display.status(f"training candidate {evaluation.number} once more ({error})")
            (folder / WEIGHTS).unlink(missing_ok=True)
            _train_again(record, pool, evaluation)


def _train_again(record: StudyRecord, pool: Pool, evaluation: Evaluation) -> None:
    """Trains a network again: the same training gives the same network. If the weights of its parent are lost too,
    trains the parent first."""
    job = record.again(evaluation)
    if job.start is not None and not (job.start.folder / WEIGHTS).is_file():
        parent = next(candidate for candidate in record.evaluations if candidate.number == evaluation.parent)
        _train_again(record, pool, parent)
    pool.submit(job)
    while pool.busy:
        for _ in pool.events():
            pass
