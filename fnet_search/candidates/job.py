"""What workers receive: the setup that all candidates of a run share, and one candidate to train."""

from dataclasses import dataclass, field
from pathlib import Path

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan, regular
from fnet_search.deploy.weight_type import WeightType
from fnet_search.policy.evaluation import Evaluation, Role, SplitName, State
from fnet_search.policy.metric import MetricName
from fnet_search.quant.scheme import PAPER, Scheme, schemes_text
from fnet_search.training.numerics import Numerics
from fnet_search.training.recipe import Fidelity, Recipe


@dataclass(frozen=True)
class Setup:
    """What all candidates of a run have in common.

    Candidates are quantized with the least divergent of `schemes` and measured on `split`, with `audited` also in ONNX
    Runtime. `metric` is measured after each epoch.
    """

    space: Macroarchitecture
    recipe: Recipe
    schemes: tuple[Scheme, ...]
    numerics: Numerics
    seed: int
    split: SplitName
    audited: bool = False
    fidelity: Fidelity = field(default_factory=Fidelity)
    metric: MetricName = "accuracy"
    referenced: bool = False
    """Whether the regular network is trained first. Its scheme is then that of the probes and of the history."""
    validation: str = ""
    """What the validation split is (`Evaluation.validation`)."""
    weight_type: WeightType | None = None
    """How exported files store weights. None: as those of the run do, int8 in a new one."""

    def recipe_of(self, job: "Job") -> Recipe:
        """The recipe of a candidate: that of the run, with fewer or more epochs by role and start."""
        if job.role == "final":
            return self.recipe.with_epochs(self.fidelity.final_epochs)
        if self.imported(job) and job.plan == regular(self.space) and not self.fidelity.finetune:
            return self.recipe.with_epochs(0)
        warm = job.start is not None and job.role == "candidate"
        return self.recipe.warm(self.fidelity.warm_epochs) if warm else self.recipe

    def imported(self, job: "Job") -> bool:
        """Whether a candidate starts from the imported weights of the space."""
        return job.start is None and self.space.weights is not None

    def threads_of(self, job: "Job") -> int:
        """Threads of the worker that trains it: more for the reference and the final training, which run alone."""
        first = self.fidelity.warm_start and job.plan == regular(self.space)
        return self.numerics.alone_threads if first or job.role == "final" else self.numerics.threads


@dataclass(frozen=True)
class Start:
    """The trained network that a candidate starts from. Its files are in `folder`; `epochs` counts all epochs that led
    to it; `scheme` is that of its codes."""

    number: int
    plan: FactorizationPlan
    folder: Path
    epochs: int
    scheme: Scheme = PAPER


@dataclass(frozen=True)
class Job:
    """One candidate to train, from scratch or from `start`, with its files in `folder`. Policies see it quantized with
    `common`, the scheme that the whole run is compared under."""

    number: int
    plan: FactorizationPlan
    folder: Path
    role: Role = "candidate"
    start: Start | None = None
    common: Scheme | None = None


def unfinished(setup: Setup, job: Job, state: State, reason: str) -> Evaluation:
    """The evaluation of a candidate before anything is measured."""
    return Evaluation(
        job.number,
        job.plan,
        plan_cost(setup.space, job.plan),
        state,
        reason,
        role=job.role,
        split=setup.split,
        validation=setup.validation,
        scheme=schemes_text(setup.schemes),
        seed=setup.seed,
        parent=job.start.number if job.start else None,
        inherited_epochs=job.start.epochs if job.start else 0,
    )
