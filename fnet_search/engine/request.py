"""The request for a run, as data, with the checks that need no data set: `engine.arguments` builds it from a user's
parameters, the rest of the engine reads it."""

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.space_file import parse_space, to_toml
from fnet_search.base.errors import FnetError, check_least, unknown
from fnet_search.deploy.weight_type import WeightType
from fnet_search.optuna_bridge.storage_url import LEASE_SECONDS, masked
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import SplitName
from fnet_search.policy.fixed_plans import FIXED_PLANS, FixedPlans
from fnet_search.policy.protocol import Policy
from fnet_search.quant.scheme import Scheme, parse_schemes, schemes_text
from fnet_search.training.recipe import Augmentation, Fidelity, Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from fnet_search.training.numerics import Numerics


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes, and where its data lie. It does not change what the run searches for.

    Raises FnetError for values that are out of range or contradict each other.
    """

    device: str = "auto"
    """``auto`` (CUDA if available), ``cpu``, ``cuda`` or ``cuda:N``."""
    dtype: str = "auto"
    """``auto`` (the fastest), or as in `Numerics`."""
    threads: int | None = None
    """Threads of a worker on the CPU; None: as many as are fastest."""
    fused: bool | None = None
    """Whether BatchNorm and its ReLU are one compiled pass; None: if that is faster."""
    numerics_of: Path | None = None
    """The folder of an earlier run, whose numerics are used. Excludes `device`, `dtype`, `threads` and `fused`."""
    workers: int | None = None
    """None: one per core, 2 on CUDA. 0: train in this process, which is slower; for debugging."""
    data_dir: Path = Path("data")
    """The folder of torchvision's data sets."""
    download: bool = False
    """Whether missing data sets are downloaded into `data_dir`."""
    skip_unreadable: bool = False
    """Whether images that cannot be read are left out, instead of raising an error. The fingerprint of the others is
    still compared with that of the run."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise unknown("device", self.device, ("auto", "cpu", "cuda", "cuda:N"))
        check_least(1, threads=self.threads)
        check_least(0, workers=self.workers)
        for name in _NUMERICS if self.numerics_of is not None else ():
            if getattr(self, name) != getattr(Machine, name):
                raise FnetError(f"`numerics_of` sets `{name}` too; leave one of them out")

    def agrees(self, numerics: "Numerics") -> bool:
        """Whether these numerics meet the fields that ask for some."""
        return all(getattr(self, name) in (getattr(Machine, name), getattr(numerics, name)) for name in _NUMERICS)

    def computing_as(self, run: Path) -> "Machine":
        """The same machine with the numerics of an earlier run."""
        return replace(self, device="auto", dtype="auto", threads=None, fused=None, numerics_of=run)


_NUMERICS = ("device", "dtype", "threads", "fused")
"""The fields of `Machine` that choose numerics; their defaults leave the choice open."""


@dataclass(frozen=True)
class Request:
    """A user's request. What `config` returns of it cannot change between runs in one folder.

    Raises FnetError for whatever is wrong with it that can be seen without data.
    """

    space: Macroarchitecture
    dataset: str
    recipe: Recipe
    schemes: tuple[Scheme, ...]
    """Each candidate is quantized with the one of them whose outputs diverge least from the float network's."""
    seed: int
    policy: Policy = field(default=FixedPlans(()), compare=False)
    policy_name: str = FIXED_PLANS
    """The recorded name of the policy. A process that joins the study loads the policy by this name."""
    trials: int = 1
    """Number of candidates to train. Has no effect on given plans, which are all trained."""
    constraints: Constraints = field(default_factory=Constraints)
    fidelity: Fidelity = field(default_factory=Fidelity)
    split: SplitName = "validation"
    validation: str | None = None
    """The source of the validation images, as in `datasets.load_dataset`. What that resolves to is recorded with the
    data."""
    audit_all: bool = False
    """Whether every candidate is audited, not only the winner."""
    weight_type: WeightType | None = None
    """How exported files store weights; None: as those of the run do, int8 in a new one. It changes no result, so a run
    may be resumed with another one."""
    storage: str | None = None
    """URL of the storage that the study is shared in; None: the study is in the run folder."""
    artifacts: str | None = None
    """The artifact store with the weights that other workers on the shared study need: a folder or a bucket. None: in
    the run folder."""
    lease: float = LEASE_SECONDS
    """A candidate whose worker has not renewed its lease for this many seconds is taken over."""
    machine: Machine = Machine()

    def __post_init__(self) -> None:
        if self.weight_type is not None and self.weight_type not in get_args(WeightType):
            raise unknown("`weight_type`", self.weight_type, get_args(WeightType))
        if self.split not in get_args(SplitName):
            raise unknown("split", self.split, get_args(SplitName))
        if self.split == "test" and self.validation is not None:
            raise FnetError("`validation` requires `split` validation; give that too, or leave it out")
        if not 0 <= self.seed < 2**32:
            raise FnetError(f"`seed` must be from 0 to {2**32 - 1}, not {self.seed}")
        if self.searching and self.space.weights is not None and not self.fidelity.warm_start:
            raise FnetError("`weights` requires `warm_start` in a search; set that too, or leave it out")
        for name in ("artifacts", "lease") if self.storage is None else ():
            if getattr(self, name) != getattr(Request, name):
                raise FnetError(f"`{name}` requires `storage`; give that too, or leave it out")
        check_least(1, trials=self.trials, lease=self.lease)

    @property
    def searching(self) -> bool:
        """Whether the run is a search; otherwise it trains given plans."""
        return self.policy_name != FIXED_PLANS

    def config(self) -> dict[str, Any]:
        """The part of the configuration that a request determines, as JSON data. It must be the same whenever a run is
        resumed, as must the data's fingerprint and the numerics (`Prepared.config`)."""
        return {
            "space": to_toml(self.space),
            "weights": None if self.space.weights is None else self._digest(self.space.weights),
            "dataset": self.dataset,
            "recipe": as_json(self.recipe.to_json()),
            "fidelity": self._fidelity(),
            "policy": self.policy_name,
            "constraints": asdict(self.constraints),
            "scheme": schemes_text(self.schemes),
            "seed": self.seed,
            "split": self.split,
            "storage": self.storage and masked(self.storage),
        }

    @staticmethod
    def _digest(weights: "Mapping[str, Tensor]") -> str:
        from fnet_search.training.weights import digest  # torch takes seconds to import

        return digest(weights)

    def _fidelity(self) -> dict[str, Any]:
        """The fidelity without the final training, which comes after the search and may be made longer."""
        facts = asdict(self.fidelity)
        del facts["final_epochs"]
        warm = self.recipe.warm(self.fidelity.warm_epochs)
        return {**facts, "warm_epochs": warm.epochs if warm.epoch_share == 1 else warm.epoch_share}


@dataclass(frozen=True)
class JoinRequest:
    """The request for a worker that joins a shared study: the storage's URL and the study's name.

    `dataset`, `validation` and `artifacts` replace those of the run, if this host has them elsewhere.
    """

    storage: str
    study: str
    machine: Machine = Machine()
    dataset: str | None = None
    validation: str | None = None
    artifacts: str | None = None


def request_from(config: Mapping[str, Any], fidelity: Mapping[str, Any], **others: Any) -> Request:
    """The request with a configuration: inverse of `Request.config`, except for the weights of an imported network.

    Raises FnetError for a configuration that this version cannot read.

    Args:
        fidelity: all fields of `Fidelity`; the configuration has only some.
        others: fields of `Request` that the configuration lacks.
    """
    try:
        recipe, augmentation = config["recipe"], Augmentation(**config["recipe"]["augmentation"])
        recipe_facts = {**recipe, "augmentation": augmentation, "milestones": tuple(recipe["milestones"])}
        request = Request(
            space=parse_space(config["space"], "the space of the study"),
            dataset=config["dataset"],
            recipe=Recipe(**recipe_facts),
            fidelity=Fidelity(**fidelity),
            policy_name=config["policy"],
            constraints=Constraints(**config["constraints"]),
            schemes=parse_schemes(config["scheme"]),
            seed=config["seed"],
            split=config["split"],
            **others,
        )
    except (KeyError, TypeError) as error:
        raise FnetError(f"this version cannot read the study's configuration ({error})") from None
    return request


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded configuration, with defaults for the fields of recipe and constraints that the version which wrote it
    did not know."""
    parts = {"recipe": Recipe, "constraints": Constraints}
    return {**config, **{name: {**_defaults(kind), **config[name]} for name, kind in parts.items()}}


def _defaults(kind: type) -> Any:
    return as_json({field.name: field.default for field in fields(kind) if field.default is not MISSING})


def as_json(facts: dict[str, Any]) -> Any:
    """The data as reading their JSON gives them back: tuples become lists."""
    return json.loads(json.dumps(facts))
