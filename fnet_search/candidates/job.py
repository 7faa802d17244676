"""What workers are told: the setup that all candidates of a study share, and one candidate to train."""

from dataclasses import dataclass, field
from pathlib import Path

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan, regular
from fnet_search.policy.evaluation import Evaluation, Role, SplitName, State
from fnet_search.policy.metric import MetricName
from fnet_search.quant.scheme import PAPER, Scheme, schemes_text
from fnet_search.training.numerics import Numerics
from fnet_search.training.recipe import Fidelity, Recipe


@dataclass(frozen=True)
class Setup:
    """What all candidates of a study have in common. Each is quantized with the one of `schemes` that diverges least;
    `split` is what they are measured on; with `audited`, each is also run in ONNX Runtime on it. `metric`: what is
    watched after each epoch."""

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
    """Whether the regular network is trained first: then its scheme is that of the run's probes and of its history."""
    validation: str = ""
    """What the validation split is (`Evaluation.validation`)."""

    def recipe_of(self, job: "Job") -> Recipe:
        """How a candidate is trained."""
        if job.role == "final":
            return self.recipe.with_epochs(self.fidelity.final_epochs)
        if self.imported(job) and job.plan == regular(self.space) and not self.fidelity.finetune:
            return self.recipe.with_epochs(0)
        warm = job.start is not None and job.role == "candidate"
        return self.recipe.warm(self.fidelity.warm_epochs) if warm else self.recipe

    def imported(self, job: "Job") -> bool:
        """Whether a candidate starts from the weights that the space was imported with."""
        return job.start is None and self.space.weights is not None

    def threads_of(self, job: "Job") -> int:
        """Of the worker that trains it. The network that all others start from, and the final one, are alone."""
        first = self.fidelity.warm_start and job.plan == regular(self.space)
        return self.numerics.alone_threads if first or job.role == "final" else self.numerics.threads


@dataclass(frozen=True)
class Start:
    """The trained network that a candidate starts from, its files in `folder`; `epochs` in all led to it, `scheme` is
    what its codes were made with."""

    number: int
    plan: FactorizationPlan
    folder: Path
    epochs: int
    scheme: Scheme = PAPER


@dataclass(frozen=True)
class Job:
    """One candidate to train, its files to go to `folder`; from scratch, or from `start`. Policies see it as quantized
    with `common`, the scheme of the whole run."""

    number: int
    plan: FactorizationPlan
    folder: Path
    role: Role = "candidate"
    start: Start | None = None
    common: Scheme | None = None


def unfinished(setup: Setup, job: Job, state: State, reason: str) -> Evaluation:
    """The evaluation of a candidate that has nothing measured."""
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
