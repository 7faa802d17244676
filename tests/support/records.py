"""The record of a study, worked on as a search does, with made-up evaluations."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from optuna.trial import FrozenTrial

from fnet_search.arch.plan import FactorizationPlan, depthwise, regular, uniform
from fnet_search.candidates.job import Job, Setup
from fnet_search.engine.study_record import StudyRecord
from fnet_search.importing.spaces import load_space
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation, Role
from fnet_search.quant.scheme import PAPER
from fnet_search.training.numerics import Numerics
from fnet_search.training.recipe import Fidelity, load_recipe
from tests.support.evaluations import trained

TINY = load_space("tiny")
REGULAR, F2, F4, DWS = regular(TINY), uniform(TINY, 2), uniform(TINY, 4), depthwise(TINY)
LIMITS = Constraints(conv_macs=500_000, min_quint8=0.6, max_drop=0.1)


def trained_with(fidelity: Fidelity) -> Setup:
    recipe = load_recipe("quick").with_epochs(8)
    return Setup(TINY, recipe, (PAPER,), Numerics("cpu"), 3, "validation", fidelity=fidelity)


PLAIN = trained_with(Fidelity())
WARM = trained_with(Fidelity(warm_start=True, warm_epochs=2, prune=True, final_epochs=8))
STORAGES = pytest.mark.parametrize("kind", ["journal", "sqlite"])
Opened = Callable[..., StudyRecord]


def start(record: StudyRecord, plan: FactorizationPlan, role: Role = "candidate", number: int | None = None) -> Job:
    job = record.start(plan, role, number)
    assert job is not None
    return job


def begin(record: StudyRecord, plan: FactorizationPlan, role: Role = "candidate") -> int:
    return start(record, plan, role).number


def finish(
    record: StudyRecord, plan: FactorizationPlan, fp32: float, quint8: float, role: Role = "candidate"
) -> Evaluation:
    """As a worker does, which leaves weights."""
    job = start(record, plan, role)
    return end(record, job, trained(TINY, plan, job.number, fp32, quint8))


def end(record: StudyRecord, job: Job, evaluation: Evaluation) -> Evaluation:
    start = job.start
    parent = {} if start is None else {"parent": start.number, "inherited_epochs": start.epochs}
    evaluation = replace(evaluation, role=job.role, **parent)
    if evaluation.state == "complete":
        job.folder.mkdir(parents=True, exist_ok=True)
        for name in ("weights", "quantized"):
            (job.folder / f"{name}.safetensors").write_text("")
    record.finish(evaluation, 1.25)
    return evaluation


def having_weights(record: StudyRecord) -> list[int]:
    return sorted(int(path.parent.name) for path in record.run.path.glob("candidates/*/weights.safetensors"))


def trials(record: StudyRecord) -> list[FrozenTrial]:
    return record.study.get_trials()
