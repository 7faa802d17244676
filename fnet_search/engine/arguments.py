"""The parameters of `search` and `evaluate`, as users write them, and the `Request` that they make.

The command line and the Python API both build these; an option of the command line has the name of its field.
"""

import re
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fnet_search.arch.macroarchitecture import Macroarchitecture, factorizing, normalising
from fnet_search.arch.plan import FactorizationPlan, check_plan, parse_plan
from fnet_search.base.errors import FnetError, check_least
from fnet_search.engine.request import Machine, Request
from fnet_search.importing.spaces import load_space
from fnet_search.optuna_bridge.storage_url import LEASE_SECONDS, check_there
from fnet_search.policy.constraints import parse_constraints
from fnet_search.policy.evaluation import SplitName
from fnet_search.policy.fixed_plans import FixedPlans
from fnet_search.policy.protocol import Policy
from fnet_search.policy.registry import check_policy, load_policy
from fnet_search.quant.scheme import AUTO, Scheme, parse_schemes
from fnet_search.rundir.config_file import config_file
from fnet_search.training.dataset_names import check_dataset
from fnet_search.training.recipe import Fidelity, Recipe, load_recipe

if TYPE_CHECKING:
    from fnet_search.engine.display import Display
    from fnet_search.training.deadline import Deadline

Space = Macroarchitecture | Path | str


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What both have but for the network and the data set, which come first."""

    validation: Path | str | None = None
    recipe: Recipe | str | None = None
    epochs: int | None = None
    class_weights: str | None = None
    finetune: bool = False
    input_shape: tuple[int, int, int] | None = None
    weights: str | None = None
    normalise: str | None = None
    factorize: Iterable[str] = ()
    keep: Iterable[str] = ()
    scheme: Scheme | str = AUTO
    seed: int = 0
    out: Path | str | None = None
    storage: str | None = None
    machine: Machine | None = None
    display: "Display | None" = None
    deadline: "Deadline | None" = None

    def check_paths(self, dataset: str) -> None:
        """Raises FnetError for a data set, a file or a folder that is not there; before what is slow to import."""
        check_dataset(dataset, absolute_path(self.validation))
        if self.storage is not None:
            check_there(self.storage, new=True)
        if self.machine is not None and self.machine.numerics_of is not None:
            config_file(self.machine.numerics_of)

    def _request(self, space: Space, dataset: str) -> Request:
        """What both ask for: a network for images as large as the data set's unless another size is asked for."""
        if not isinstance(space, Macroarchitecture):
            space = load_space(str(space), self.input_shape, self.weights, partial(_natural_shape, dataset))
        space = factorizing(normalising(space, self.normalise), tuple(self.factorize), tuple(self.keep))
        if self.finetune and space.weights is None:
            raise FnetError("`finetune` is for networks with weights; name them with `weights`")
        check_least(1, epochs=self.epochs)
        named = self.recipe or ("finetune" if self.finetune else "quick")
        recipe = (named if isinstance(named, Recipe) else load_recipe(named)).with_epochs(self.epochs)
        if self.class_weights is not None:
            recipe = recipe.changed({"class_weights": self.class_weights})
        return Request(
            space=space,
            dataset=absolute(dataset),
            validation=absolute_path(self.validation),
            recipe=recipe,
            schemes=parse_schemes(self.scheme) if isinstance(self.scheme, str) else (self.scheme,),
            seed=self.seed,
            fidelity=Fidelity(finetune=self.finetune),
            storage=self.storage,
            machine=self.machine or Machine(),
        )


@dataclass(frozen=True)
class SearchArguments(Arguments):
    """The parameters of `fnet_search.search`, which says what each means."""

    space: Space = "factorizenet"
    dataset: str = "digits"
    _: KW_ONLY
    budget: str | int
    min_quint8: str | float | None = None
    max_drop: str | float | None = None
    max_params: str | int | None = None
    metric: str = "accuracy"
    policy: Policy | str = "layer-guided"
    trials: int = 6
    warm_start: bool = True
    warm_epochs: float | None = None
    prune: bool = True
    final_epochs: int | None = None
    audit_all: bool = False
    artifacts: str | None = None
    lease: float = LEASE_SECONDS

    def request(self) -> Request:
        """Raises FnetError for whatever is wrong with it that can be seen without data."""
        asked = self._request(self.space, self.dataset)
        final_epochs = self.final_epochs
        if final_epochs is None:
            final_epochs = asked.recipe.epochs if self.warm_start else 0
        limits = self.budget, self.max_params, self.min_quint8, self.max_drop, self.metric
        constraints = parse_constraints(asked.space, *limits)  # before a policy, which may take a second to import
        policy, name = self.policy, self.policy if isinstance(self.policy, str) else type(self.policy).__name__
        return replace(
            asked,
            fidelity=Fidelity(self.warm_start, self.warm_epochs, self.prune, final_epochs, self.finetune),
            policy=load_policy(policy) if isinstance(policy, str) else check_policy(policy, name),
            policy_name=name,
            trials=self.trials,
            constraints=constraints,
            audit_all=self.audit_all,
            artifacts=self.artifacts,
            lease=self.lease,
        )

    def folder(self, request: Request) -> Path:
        """The run folder of the request that these arguments made."""
        budget = self.budget if isinstance(self.budget, str) else str(request.constraints.conv_macs)
        name = [request.space.name, dataset_name(self.dataset), request.policy_name, budget.replace("%", "pct")]
        return folder_of(self.out, "-".join(name))


@dataclass(frozen=True)
class EvaluateArguments(Arguments):
    """The parameters of `fnet_search.evaluate`, which says what each means."""

    plans: FactorizationPlan | str | Iterable[FactorizationPlan | str]
    space: Space = "factorizenet"
    dataset: str = "digits"
    _: KW_ONLY
    split: SplitName = "test"

    def request(self) -> Request:
        """Raises FnetError for whatever is wrong with it that can be seen without data."""
        asked = self._request(self.space, self.dataset)
        wanted = [self.plans] if isinstance(self.plans, FactorizationPlan | str) else self.plans
        plans = [parse_plan(asked.space, plan) if isinstance(plan, str) else plan for plan in wanted]
        if not plans:
            raise FnetError("no plan is given; name one, as in init2")
        for plan in plans:
            check_plan(asked.space, plan)
        return replace(asked, split=self.split, policy=FixedPlans(tuple(dict.fromkeys(plans))), audit_all=True)

    def folder(self, request: Request) -> Path:
        """The run folder of the request that these arguments made."""
        split = ["validation"] if request.split != "test" else []
        return folder_of(self.out, "-".join(["evaluate", request.space.name, dataset_name(self.dataset), *split]))


def _natural_shape(dataset: str, channels: int) -> tuple[int, int, int]:
    from fnet_search.training.datasets import natural_shape  # torch takes seconds to import

    return natural_shape(dataset, channels)


def absolute(dataset: str) -> str:
    """A data set, of folders by their absolute path."""
    kind, colon, path = dataset.partition(":")
    return f"{kind}:{absolute_path(path)}" if kind == "imagefolder" and colon else dataset


def absolute_path(path: Path | str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


def dataset_name(dataset: str) -> str:
    """What a run folder's name says of a data set."""
    return Path(dataset.partition(":")[2]).expanduser().resolve().name if ":" in dataset else dataset


def folder_of(out: Path | str | None, name: str) -> Path:
    """The run folder that was asked for, or one of that name."""
    return Path(out) if out is not None else Path("runs") / re.sub(r"[^\w.+-]+", "_", name)
