"""The parameters of `search` and `evaluate` as users write them, and the `Request` that they make.

The command line and the Python API both build these classes: options of the command line are named after their fields.
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
from fnet_search.deploy.weight_type import WeightType
from fnet_search.engine.request import Machine, Request
from fnet_search.importing.spaces import load_space
from fnet_search.optuna_bridge.storage_url import LEASE_SECONDS, check_there
from fnet_search.policy.constraints import parse_constraints
from fnet_search.policy.evaluation import SplitName
from fnet_search.policy.fixed_plans import FixedPlans
from fnet_search.policy.protocol import Policy
from fnet_search.policy.registry import check_policy, load_policy
from fnet_search.quant.scheme import AUTO, Scheme, parse_schemes
from fnet_search.rundir.config_path import config_path
from fnet_search.training.dataset_names import check_dataset
from fnet_search.training.recipe import Fidelity, Recipe, load_recipe

if TYPE_CHECKING:
    from fnet_search.engine.display import Display
    from fnet_search.training.deadline import Deadline

Space = Macroarchitecture | Path | str


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The parameters that `search` and `evaluate` share, except `space` and `dataset`, whose positions differ."""

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
    weight_type: WeightType | None = None
    seed: int = 0
    out: Path | str | None = None
    storage: str | None = None
    machine: Machine | None = None
    display: "Display | None" = None
    deadline: "Deadline | None" = None

    def check_paths(self, dataset: str) -> None:
        """Raises FnetError for a data set, a file or a folder that is missing. Called before the slow imports."""
        check_dataset(dataset, absolute_path(self.validation))
        if self.storage is not None:
            check_there(self.storage, new=True)
        if self.machine is not None and self.machine.numerics_of is not None:
            config_path(self.machine.numerics_of)

    def _request(self, space: Space, dataset: str) -> Request:
        """The part of the request that both functions share. The input of an imported network has the size of the data
        set's images unless `input_shape` is given."""
        if not isinstance(space, Macroarchitecture):
            space = load_space(str(space), self.input_shape, self.weights, partial(_natural_shape, dataset))
        space = factorizing(normalising(space, self.normalise), tuple(self.factorize), tuple(self.keep))
        if self.finetune and space.weights is None:
            raise FnetError("`finetune` requires `weights`; give them too, or leave it out")
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
            weight_type=self.weight_type,
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
        """The request. Raises FnetError for whatever is wrong with it that can be seen without data."""
        shared = self._request(self.space, self.dataset)
        final_epochs = self.final_epochs
        if final_epochs is None:
            final_epochs = shared.recipe.epochs if self.warm_start else 0
        limits = self.budget, self.max_params, self.min_quint8, self.max_drop, self.metric
        constraints = parse_constraints(shared.space, *limits)  # before the policy, whose import may take a second
        policy, name = self.policy, self.policy if isinstance(self.policy, str) else type(self.policy).__name__
        return replace(
            shared,
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
        """The run folder of the request that `request` returned."""
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
        """The request. Raises FnetError for whatever is wrong with it that can be seen without data."""
        shared = self._request(self.space, self.dataset)
        given = [self.plans] if isinstance(self.plans, FactorizationPlan | str) else self.plans
        plans = [parse_plan(shared.space, plan) if isinstance(plan, str) else plan for plan in given]
        if not plans:
            raise FnetError("no plan is given; name one, as in init2")
        for plan in plans:
            check_plan(shared.space, plan)
        return replace(shared, split=self.split, policy=FixedPlans(tuple(dict.fromkeys(plans))), audit_all=True)

    def folder(self, request: Request) -> Path:
        """The run folder of the request that `request` returned."""
        split = ["validation"] if request.split != "test" else []
        return folder_of(self.out, "-".join(["evaluate", request.space.name, dataset_name(self.dataset), *split]))


def _natural_shape(dataset: str, channels: int) -> tuple[int, int, int]:
    from fnet_search.training.datasets import natural_shape  # torch takes seconds to import

    return natural_shape(dataset, channels)


def absolute(dataset: str) -> str:
    """The name of a data set, with the path of an image folder made absolute."""
    kind, colon, path = dataset.partition(":")
    return f"{kind}:{absolute_path(path)}" if kind == "imagefolder" and colon else dataset


def absolute_path(path: Path | str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


def dataset_name(dataset: str) -> str:
    """A data set's part of a run folder's name: the last part of a path."""
    return Path(dataset.partition(":")[2]).expanduser().resolve().name if ":" in dataset else dataset


def folder_of(out: Path | str | None, name: str) -> Path:
    """The run folder `out`; if that is None, the folder `name` in ``runs/``."""
    return Path(out) if out is not None else Path("runs") / re.sub(r"[^\w.+-]+", "_", name)
