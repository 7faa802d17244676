"""Recipes: how networks are trained, as data (``recipes/*.toml``, or a user's file), and the learning rate of each
step."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import cos, isfinite, pi
from typing import Any, Literal, get_args

from fnet_search.base import shipped
from fnet_search.base.errors import FnetError, check_least, unknown
from fnet_search.base.toml_tables import build, read_table

Schedule = Literal["steps", "one-cycle", "cosine"]
Initializer = Literal["glorot_uniform", "he_normal", "orthogonal"]
ClassWeights = Literal["none", "balanced"]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images, drawn for every image and epoch."""

    shift: float = 0.0
    """Largest shift as a fraction of the side, in whole pixels."""
    zoom: float = 0.0
    """The scale lies between 1 - zoom and 1 + zoom."""
    rotation: float = 0.0
    """Largest angle in degrees."""
    horizontal_flip: bool = False
    vertical_flip: bool = False


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum.

    Schedules of the learning rate: `steps` multiplies it by 0.1 at each epoch of `milestones`, which scale with the
    number of epochs; `one-cycle` rises linearly over the first `warmup` share of the steps and falls linearly to zero;
    `cosine` falls to zero along half a cosine (SGDR without restarts, arXiv 1608.03983).
    """

    name: str
    epochs: int
    """0 for a network measured without training; at least 1 in a recipe file."""
    batch_size: int
    learning_rate: float
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    """For weights; biases and norms are not decayed."""
    label_smoothing: float = 0.0
    class_weights: ClassWeights = "none"
    """Weights of images in the loss: ``none`` gives all the same, ``balanced`` the inverse frequency of their class, so
    that all classes count the same; the mean over the training images is 1."""
    initializer: Initializer = "glorot_uniform"
    schedule: Schedule = "one-cycle"
    milestones: tuple[float, ...] = ()
    warmup: float = 0.2
    epoch_share: float = 1.0
    """Share of the training images in an epoch, drawn for each epoch."""
    warm_share: float = 0.2
    """Epochs of a training after a warm start, as a share of `epochs`; at least one epoch."""
    warm_rate: float = 0.25
    """Learning rate of a training after a warm start, as a share of `learning_rate`."""
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        problems = {
            "epochs must not be negative": self.epochs < 0,
            "batch_size must be at least 2": self.batch_size < 2,
            "learning_rate must be positive": not 0 < self.learning_rate < float("inf"),
            "momentum must be in [0, 1)": not 0 <= self.momentum < 1,
            "nesterov needs a momentum": self.nesterov and self.momentum == 0,
            "weight_decay must not be negative": not 0 <= self.weight_decay < float("inf"),
            "label_smoothing must be in [0, 1)": not 0 <= self.label_smoothing < 1,
            "warmup must be in [0, 1)": not 0 <= self.warmup < 1,
            "epoch_share must be in (0, 1]": not 0 < self.epoch_share <= 1,
            "warm_share must be in (0, 1]": not 0 < self.warm_share <= 1,
            "warm_rate must be in (0, 1]": not 0 < self.warm_rate <= 1,
            "zoom must be in [0, 1)": not 0 <= self.augmentation.zoom < 1,
            "shift must be in [0, 1)": not 0 <= self.augmentation.shift < 1,
            "rotation must be finite": not isfinite(self.augmentation.rotation),
        }
        for problem, holds in problems.items():
            if holds:
                raise FnetError(f"recipe {self.name!r}: {problem}")
        for name, value, known in (
            ("schedule", self.schedule, get_args(Schedule)),
            ("initializer", self.initializer, get_args(Initializer)),
            ("class_weights", self.class_weights, get_args(ClassWeights)),
        ):
            if value not in known:
                raise unknown(name, value, known)

    def changed(self, table: Mapping[str, Any]) -> "Recipe":
        """The recipe with the entries of a TOML table. Milestones scale with `epochs` unless the table has them too.

        Raises FnetError for unknown or invalid entries.
        """
        recipe = _build({**vars(self), "milestones": list(self.milestones)}, self.augmentation, table)
        scaled = self.with_epochs(recipe.epochs).milestones
        return recipe if "milestones" in table else replace(recipe, milestones=scaled)

    def with_epochs(self, epochs: int | None) -> "Recipe":
        """The recipe with another number of epochs; milestones scale in proportion. None changes nothing."""
        if epochs is None or epochs == self.epochs:
            return self
        scaled = tuple(milestone * epochs / self.epochs for milestone in self.milestones)
        return replace(self, epochs=epochs, milestones=scaled)

    def warm(self, epochs: float | None = None) -> "Recipe":
        """The recipe for training after a warm start: few epochs, a low learning rate, no warm-up (`one-cycle`).

        The child starts with most of what its parent learnt, which a high learning rate would destroy
        (docs/warm-start.md). `epochs` below 1 is one epoch with that share of the images; None: `warm_share`.
        """
        wanted = max(1, round(self.warm_share * self.epochs)) if epochs is None else epochs
        whole = replace(self, learning_rate=self.learning_rate * self.warm_rate, warmup=0.0)
        if wanted < 1:
            return replace(whole.with_epochs(1), epoch_share=wanted * self.epoch_share)
        return whole.with_epochs(round(wanted))

    def images(self, training: int) -> int:
        """Images per epoch, given the number of training images."""
        return max(2, round(self.epoch_share * training))

    def learning_rate_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step, counted from 0."""
        if self.schedule == "steps":
            passed = sum(step >= milestone * steps_per_epoch for milestone in self.milestones)
            return float(self.learning_rate * 0.1**passed)
        total = self.epochs * steps_per_epoch
        if self.schedule == "cosine":
            return float(self.learning_rate * (1 + cos(pi * step / total)) / 2)
        peak = max(1.0, self.warmup * total)
        rise, fall = (step + 1) / peak, (total - step) / max(1.0, total - peak + 1)
        return float(self.learning_rate * min(1.0, rise, fall))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Fidelity:
    """How much of the recipe the candidates of a search get."""

    warm_start: bool = False
    """Whether candidates start from trained parents."""
    warm_epochs: float | None = None
    """Epochs after a warm start, a whole number or a part of one; None: the recipe's `warm_share`."""
    prune: bool = False
    """Whether successive halving stops hopeless candidates."""
    final_epochs: int = 0
    """Epochs for which the best candidate is trained on at the end."""
    finetune: bool = False
    """Whether an imported network with weights is trained further before it is the reference; else it is used as it
    is."""

    def __post_init__(self) -> None:
        epochs = self.warm_epochs
        if epochs is not None and (epochs <= 0 or (epochs > 1 and epochs % 1)):
            raise FnetError(f"`warm_epochs` {epochs:g} must be a whole number or a part of one epoch")
        if epochs is not None and not self.warm_start:
            raise FnetError("`warm_epochs` requires `warm_start`; set that too, or leave it out")
        check_least(0, final_epochs=self.final_epochs)


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or a recipe file by path. Raises FnetError for an unknown name or a malformed file."""
    path = shipped.find("recipes", "recipe", name)
    table = read_table(path, "recipe")
    try:
        return _build({"name": path.stem}, Augmentation(), table)
    except FnetError as error:
        raise FnetError(f"{path}: {error}") from None


def _build(known: Mapping[str, Any], augmentation: Augmentation, table: Mapping[str, Any]) -> Recipe:
    """The recipe with the `known` entries, overridden by those of a TOML table."""
    changes = table.get("augmentation", {})
    if not isinstance(changes, dict):
        raise FnetError("augmentation must be a table, as in [augmentation]")
    augmentation = build(Augmentation, {**vars(augmentation), **changes}, "an augmentation")
    recipe = build(Recipe, {**known, **table, "augmentation": augmentation}, "a recipe")
    if recipe.epochs < 1:
        raise FnetError(f"recipe {recipe.name!r}: epochs must be at least 1")
    return recipe
