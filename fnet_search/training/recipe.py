"""Recipes: how a candidate is trained, as data (``fnet_search/recipes/*.toml``, or a user's own file by path)."""

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
    """Random changes of a training image, drawn anew for every image and epoch."""

    shift: float = 0.0
    """Largest shift, as a fraction of the side; whole pixels."""
    zoom: float = 0.0
    """Scale between 1 - zoom and 1 + zoom."""
    rotation: float = 0.0
    """Largest angle in degrees."""
    horizontal_flip: bool = False
    vertical_flip: bool = False


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum; `steps` multiplies the rate by 0.1 at each epoch of `milestones`, scaled when the number of
    epochs is changed; `one-cycle` rises linearly over the first `warmup` of the steps and falls linearly to zero;
    `cosine` falls to zero as half a cosine does (SGDR without restarts, arXiv 1608.03983)."""

    name: str
    epochs: int
    """None of a network that is measured as it is; a recipe's file has one at least."""
    batch_size: int
    learning_rate: float
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    """On weights; biases and norms are not decayed."""
    label_smoothing: float = 0.0
    class_weights: ClassWeights = "none"
    """What an image counts in the loss: all alike, or (`balanced`) in inverse proportion to the training images of its
    class, so that all classes count alike; the mean over the training images is 1."""
    initializer: Initializer = "glorot_uniform"
    schedule: Schedule = "one-cycle"
    milestones: tuple[float, ...] = ()
    warmup: float = 0.2
    epoch_share: float = 1.0
    """Of the training images, those that an epoch has: drawn anew for each."""
    warm_share: float = 0.2
    """Epochs of a training that starts from a parent, as a share of `epochs`; at least one epoch."""
    warm_rate: float = 0.25
    """Its learning rate, as a share of `learning_rate`."""
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
        for problem, found in problems.items():
            if found:
                raise FnetError(f"recipe {self.name!r}: {problem}")
        for name, value, known in (
            ("schedule", self.schedule, get_args(Schedule)),
            ("initializer", self.initializer, get_args(Initializer)),
            ("class_weights", self.class_weights, get_args(ClassWeights)),
        ):
            if value not in known:
                raise unknown(name, value, known)

    def changed(self, table: Mapping[str, Any]) -> "Recipe":
        """The same recipe but for the entries of a TOML table; milestones move with `epochs` unless they are there too.

        Raises FnetError for whatever is wrong with them.
        """
        found = _build({**vars(self), "milestones": list(self.milestones)}, self.augmentation, table)
        moved = self.with_epochs(found.epochs).milestones
        return found if "milestones" in table else replace(found, milestones=moved)

    def with_epochs(self, epochs: int | None) -> "Recipe":
        """The same recipe over another number of epochs; milestones move in proportion."""
        if epochs is None or epochs == self.epochs:
            return self
        scaled = tuple(milestone * epochs / self.epochs for milestone in self.milestones)
        return replace(self, epochs=epochs, milestones=scaled)

    def warm(self, epochs: float | None = None) -> "Recipe":
        """For a network that starts from a trained parent: few epochs at a small rate, without a rise (`one-cycle`).

        A transformed network knows most already: a high rate would make it forget (docs/warm-start.md). Less than one
        epoch is one with that share of the images.
        """
        wanted = max(1, round(self.warm_share * self.epochs)) if epochs is None else epochs
        whole = replace(self, learning_rate=self.learning_rate * self.warm_rate, warmup=0.0)
        if wanted < 1:
            return replace(whole.with_epochs(1), epoch_share=wanted * self.epoch_share)
        return whole.with_epochs(round(wanted))

    def images(self, training: int) -> int:
        """Images of an epoch, where there are so many training images."""
        return max(2, round(self.epoch_share * training))

    def rate(self, step: int, steps_per_epoch: int) -> float:
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
    """How much of a recipe the candidates of a search get."""

    warm_start: bool = False
    """Children start from trained parents."""
    warm_epochs: float | None = None
    """Of those, whole ones or a part of one; None: the recipe's share."""
    prune: bool = False
    """Successive halving stops the hopeless."""
    final_epochs: int = 0
    """The best candidate is trained on for so many at the end."""
    finetune: bool = False
    """An imported network with weights is itself trained on first; else it is taken as it is."""

    def __post_init__(self) -> None:
        epochs = self.warm_epochs
        if epochs is not None and (epochs <= 0 or (epochs > 1 and epochs % 1)):
            raise FnetError(f"`warm_epochs` {epochs:g} is neither a whole number nor a part of one epoch")
        if epochs is not None and not self.warm_start:
            raise FnetError("`warm_epochs` is for candidates that start from others; leave it out, or set `warm_start`")
        check_least(0, final_epochs=self.final_epochs)


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or a TOML file by path. Raises FnetError for whatever is wrong with it."""
    path = shipped.find("recipes", "recipe", name)
    table = read_table(path, "recipe")
    try:
        return _build({"name": path.stem}, Augmentation(), table)
    except FnetError as error:
        raise FnetError(f"{path}: {error}") from None


def _build(known: Mapping[str, Any], augmentation: Augmentation, table: Mapping[str, Any]) -> Recipe:
    """What is known, with the entries of a TOML table instead."""
    changes = table.get("augmentation", {})
    if not isinstance(changes, dict):
        raise FnetError("augmentation must be a table, as in [augmentation]")
    augmentation = build(Augmentation, {**vars(augmentation), **changes}, "an augmentation")
    recipe = build(Recipe, {**known, **table, "augmentation": augmentation}, "a recipe")
    if recipe.epochs < 1:
        raise FnetError(f"recipe {recipe.name!r}: epochs must be at least 1")
    return recipe
