"""What is asked of a run, as data. `arguments` makes it of what users write; everything below takes it."""

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.space_file import parse_space, to_toml
from fnet_search.base.errors import FnetError, check_least, unknown
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
    """Where and how a run computes, and where its data lie: nothing of it changes what is looked for."""

    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    fused: bool | None = None
    numerics_of: Path | None = None
    """An earlier run, to compute as it did; nothing else may say how then."""
    workers: int | None = None
    """None: one per core, on CUDA 2. 0: this process itself trains, which is slower; for debugging."""
    data_dir: Path = Path("data")
    download: bool = False
    skip_unreadable: bool = False
    """Images that cannot be read are left out; what is read must be the same all the same, by its fingerprint."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise unknown("device", self.device, ("auto", "cpu", "cuda", "cuda:N"))
        check_least(1, threads=self.threads)
        check_least(0, workers=self.workers)
        for name in _NUMERICS if self.numerics_of is not None else ():
            if getattr(self, name) != getattr(Machine, name):
                raise FnetError(f"`numerics_of` says how to compute; leave it or `{name}` out")

    def agrees(self, numerics: "Numerics") -> bool:
        """Whether these numerics are what is asked for."""
        return all(getattr(self, name) in (getattr(Machine, name), getattr(numerics, name)) for name in _NUMERICS)

    def computing_as(self, run: Path) -> "Machine":
        """The same machine, computing as an earlier run did."""
        return replace(self, device="auto", dtype="auto", threads=None, fused=None, numerics_of=run)


_NUMERICS = ("device", "dtype", "threads", "fused")
"""What a `Machine` says of how to compute; each by default nothing."""


@dataclass(frozen=True)
class Request:
    """What a user asks for, checked as far as it can be without data: raises FnetError for what cannot be.

    What `config` gives cannot change between runs in one folder.
    """

    space: Macroarchitecture
    dataset: str
    recipe: Recipe
    schemes: tuple[Scheme, ...]
    """Each candidate is quantized with the one of them that diverges least."""
    seed: int
    policy: Policy = field(default=FixedPlans(()), compare=False)
    policy_name: str = FIXED_PLANS
    """What the policy is recorded as; a process that joins the study loads it by this name."""
    trials: int = 1
    """Candidates to train; given plans are all trained."""
    constraints: Constraints = field(default_factory=Constraints)
    fidelity: Fidelity = field(default_factory=Fidelity)
    split: SplitName = "validation"
    validation: str | None = None
    """Where its images are, as in `datasets.load_dataset`. What it comes to is recorded with the data."""
    audit_all: bool = False
    storage: str | None = None
    artifacts: str | None = None
    """Where weights lie that other workers on the storage's study need; None: in the run folder."""
    lease: float = LEASE_SECONDS
    """Seconds after which a candidate is taken over whose worker is silent."""
    machine: Machine = Machine()

    def __post_init__(self) -> None:
        if self.split not in get_args(SplitName):
            raise unknown("split", self.split, get_args(SplitName))
        if self.split == "test" and self.validation is not None:
            raise FnetError("`validation` names the images of the validation `split`; leave it out, or say that split")
        if not 0 <= self.seed < 2**32:
            raise FnetError(f"`seed` must be from 0 to {2**32 - 1}, not {self.seed}")
        if self.searching and self.space.weights is not None and not self.fidelity.warm_start:
            raise FnetError("candidates start from the weights of a network; leave `weights` out, or set `warm_start`")
        for name in ("artifacts", "lease") if self.storage is None else ():
            if getattr(self, name) != getattr(Request, name):
                raise FnetError(f"`{name}` is for studies that several workers share; name their `storage`")
        check_least(1, trials=self.trials, lease=self.lease)

    @property
    def searching(self) -> bool:
        """Or a run of given plans."""
        return self.policy_name != FIXED_PLANS

    def config(self) -> dict[str, Any]:
        """What must be equal when a run goes on in the same folder, but for the data's fingerprint and the numerics."""
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
        """All but the final training, which comes after the search and may be made longer."""
        facts = asdict(self.fidelity)
        del facts["final_epochs"]
        warm = self.recipe.warm(self.fidelity.warm_epochs)
        return {**facts, "warm_epochs": warm.epochs if warm.epoch_share == 1 else warm.epoch_share}


@dataclass(frozen=True)
class JoinRequest:
    """What is asked of a worker that joins a shared study: the storage's URL and the study's name, and, where this host
    has them elsewhere, the data set, its validation images and the store of the weights."""

    storage: str
    study: str
    machine: Machine = Machine()
    dataset: str | None = None
    validation: str | None = None
    artifacts: str | None = None


def request_from(config: Mapping[str, Any], fidelity: Mapping[str, Any], **others: Any) -> Request:
    """Inverse of `Request.config`, which leaves `others` and a part of the fidelity out; an imported network has no
    weights yet. Raises FnetError for a configuration of another version."""
    try:
        recipe, changes = config["recipe"], config["recipe"]["augmentation"]
        whole = {**recipe, "augmentation": Augmentation(**changes), "milestones": tuple(recipe["milestones"])}
        request = Request(
            space=parse_space(config["space"], "the space of the study"),
            dataset=config["dataset"],
            recipe=Recipe(**whole),
            fidelity=Fidelity(**fidelity),
            policy_name=config["policy"],
            constraints=Constraints(**config["constraints"]),
            schemes=parse_schemes(config["scheme"]),
            seed=config["seed"],
            split=config["split"],
            **others,
        )
    except (KeyError, TypeError) as error:
        raise FnetError(f"the study's configuration is not one that this version writes ({error})") from None
    return request


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded configuration, with the defaults of options that the version which wrote it did not know."""
    parts = {"recipe": Recipe, "constraints": Constraints}
    return {**config, **{name: {**_defaults(kind), **config[name]} for name, kind in parts.items()}}


def _defaults(kind: type) -> Any:
    return as_json({field.name: field.default for field in fields(kind) if field.default is not MISSING})


def as_json(facts: dict[str, Any]) -> Any:
    """As JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(facts))
