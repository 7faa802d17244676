"""What is asked of a run, as data."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.space_file import parse_space, to_toml
from fnet_search.base.errors import FnetError
from fnet_search.optuna_bridge.leases import LEASE_SECONDS
from fnet_search.optuna_bridge.storage import masked
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import SplitName
from fnet_search.policy.protocol import FIXED_PLANS
from fnet_search.quant.scheme import Scheme, parse_schemes, schemes_text
from fnet_search.training.recipe import Augmentation, Fidelity, Recipe
from fnet_search.training.weights import digest


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes, and where its data lie: nothing of it changes what is looked for."""

    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    fused: bool | None = None
    numerics_of: Path | None = None
    """An earlier run, to compute as it did."""
    workers: int | None = None
    """None: one a core, on CUDA 2. 0: this process itself trains, which is slower; for debuggers."""
    data_dir: Path = Path("data")
    download: bool = False
    skip_unreadable: bool = False
    """Images that cannot be read are left out; what is read must be the same all the same, by its fingerprint."""


@dataclass(frozen=True)
class Request:
    """What a user asks for, checked as far as it can be without data. What `config` gives cannot change between runs in
    one folder."""

    space: Macroarchitecture
    dataset: str
    recipe: Recipe
    schemes: tuple[Scheme, ...]
    """Each candidate is quantized with the one of them that diverges least."""
    seed: int
    policy_name: str = FIXED_PLANS
    constraints: Constraints = field(default_factory=Constraints)
    fidelity: Fidelity = field(default_factory=Fidelity)
    split: SplitName = "validation"
    validation: str | None = None
    """Where its images are, as in `data.load_dataset`. What it comes to is recorded with the data."""
    audit_all: bool = False
    storage: str | None = None
    artifacts: str | None = None
    """Where weights lie that other workers on the storage's study need; None: in the run folder."""
    lease: float = LEASE_SECONDS
    """Seconds after which a candidate is taken over whose worker is silent."""
    machine: Machine = Machine()

    def config(self) -> dict[str, Any]:
        """What must be equal when a run goes on in the same folder, but for the data's fingerprint and the numerics."""
        return {
            "space": to_toml(self.space),
            "weights": None if self.space.weights is None else digest(self.space.weights),
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

    def _fidelity(self) -> dict[str, Any]:
        """All but the final training, which comes after the search and may be made longer."""
        facts = asdict(self.fidelity)
        del facts["final_epochs"]
        warm = self.recipe.warm(self.fidelity.warm_epochs)
        return {**facts, "warm_epochs": warm.epochs if warm.epoch_share == 1 else warm.epoch_share}


def request_from(config: Mapping[str, Any], fidelity: Mapping[str, Any], **others: Any) -> Request:
    """Inverse of `Request.config`, which leaves `others` and a part of the fidelity out; an imported network has no
    weights yet. Raises FnetError for a configuration of another version."""
    try:
        recipe, changes = config["recipe"], config["recipe"]["augmentation"]
        whole = {**recipe, "augmentation": Augmentation(**changes), "milestones": tuple(recipe["milestones"])}
        found = Request(
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
    return found


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded configuration, with the defaults of options that the version which wrote it did not know."""
    parts = {"recipe": Recipe, "constraints": Constraints}
    return {**config, **{name: {**_defaults(kind), **config[name]} for name, kind in parts.items()}}


def _defaults(kind: type) -> Any:
    return as_json({one.name: one.default for one in fields(kind) if one.default is not MISSING})


def as_json(facts: dict[str, Any]) -> Any:
    """As JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(facts))
