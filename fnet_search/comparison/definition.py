"""Studies as data (``studies/*.toml``, or a user's own file by path): what is trained, measured and compared."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import parse_plan
from fnet_search.base import shipped
from fnet_search.base.errors import FnetError, unknown
from fnet_search.base.toml_tables import build, read_table
from fnet_search.base.units import counted
from fnet_search.importing.spaces import load_space
from fnet_search.policy.constraints import Constraints, parse_constraints
from fnet_search.policy.registry import check_policy_name
from fnet_search.quant.scheme import AUTO, parse_schemes, schemes_text
from fnet_search.training.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class PublishedResult:
    """What somebody else reported of a network; fractions of 1."""

    fp32_accuracy: float | None = None
    quint8_accuracy: float | None = None
    relative_drop: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 <= value <= 1:
                raise FnetError(f"{name} must be a fraction of 1, got {value}")


@dataclass(frozen=True)
class Variant:
    """A side of a comparison: the study on this space, with this recipe."""

    name: str
    space: Macroarchitecture
    recipe: Recipe

    def __str__(self) -> str:
        recipe = self.recipe
        name = f"variant {self.name}: " if self.name else ""
        training = (
            f"{counted(recipe.epochs, 'epoch')}, batch {recipe.batch_size}, {recipe.schedule}, {recipe.initializer}"
        )
        weights = ", classes weighted alike" if recipe.class_weights == "balanced" else ""
        return f"{name}space {self.space.name}; recipe {recipe.name}, {training}{weights}"


@dataclass(frozen=True)
class SearchOptions:
    """Of a study that searches: what ``fnet-search run`` has as options, with its defaults."""

    policy: str
    budget: str
    trials: int = 6
    min_quint8: str | None = None
    max_drop: str | None = None
    max_params: str | None = None
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise FnetError(f"trials must be at least 1, got {self.trials}")

    def constraints(self, space: Macroarchitecture) -> Constraints:
        """Raises FnetError for limits that cannot be read, or that no network of the space meets."""
        return parse_constraints(space, self.budget, self.max_params, self.min_quint8, self.max_drop, self.metric)


@dataclass(frozen=True)
class Part:
    """One run of a study: a variant with a seed."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """Of its run folder: ``seed0``, or ``he-seed0``."""
        return f"{self.variant.name}-seed{self.seed}".removeprefix("-")


@dataclass(frozen=True)
class Comparison:
    """Given `plans` on every variant, or a search on every variant, each with every seed.

    Networks of given plans are trained on all training images, quantized as the first of `schemes` says, and measured
    on the test split; then quantized as each other one says, without training.
    """

    name: str
    description: str
    dataset: str
    variants: tuple[Variant, ...]
    plans: tuple[str, ...] = ()
    search: SearchOptions | None = None
    seeds: tuple[int, ...] = (0,)
    schemes: tuple[str, ...] = (AUTO,)
    """As `scheme.parse_schemes` reads them: ``auto`` may be the first."""
    compare: tuple[str, ...] = ()
    """Plans that are drawn layer by layer beside each other (the paper's Figure 6); none: the figure is left out."""
    published: Mapping[str, PublishedResult] = field(default_factory=dict)
    """By plan, as it is written in `plans`."""
    validation: str | None = None
    """Of a search: the folder of its validation images, as of `run`."""
    published_on: str = ""
    """The data set of the published numbers, where another one was asked for."""

    @property
    def parts(self) -> list[Part]:
        return [Part(variant, seed) for variant, seed in product(self.variants, self.seeds)]

    def with_options(
        self,
        epochs: int | None,
        seeds: tuple[int, ...],
        ranges: tuple[str, ...] = (),
        schemes: tuple[str, ...] = (),
    ) -> "Comparison":
        """The same study with other epochs (learning-rate steps move in proportion), other seeds, with further ranges
        or with other schemes.

        Raises FnetError for schemes that cannot be read, and for several of a search.
        """
        if ranges and schemes:
            raise FnetError("`schemes` says all of how to quantize; leave it or `ranges` out")
        variants = tuple(replace(variant, recipe=variant.recipe.with_epochs(epochs)) for variant in self.variants)
        further = (text for text in map(_normal, ranges) if text not in self.schemes)
        wanted = _schemes(schemes or (*self.schemes, *dict.fromkeys(further)), self.search)
        return replace(self, variants=variants, seeds=seeds or self.seeds, schemes=wanted)


def _normal(text: str) -> str:
    return schemes_text(parse_schemes(text))


def _schemes(texts: tuple[str, ...], search: SearchOptions | None) -> tuple[str, ...]:
    """How the networks of a study are quantized, each text as results have it. Raises FnetError for what cannot be."""
    normal = tuple(map(_normal, texts))
    if len(set(normal)) < len(normal):
        raise FnetError(f"schemes must differ, got {list(texts)!r}")
    if AUTO in normal[1:]:
        raise FnetError(f"{AUTO} is how networks are quantized first; name it before {normal[0]}")
    if search is not None and len(normal) > 1:
        raise FnetError("a [search] is for one scheme: what it finds depends on it; write a study for each")
    return normal


def load_comparison(name: str, dataset: str | None = None, validation: str | None = None) -> Comparison:
    """A shipped study by name, or a TOML file by path; of another data set, or other validation images, where they are
    named.

    Raises FnetError for whatever is wrong with it.
    """
    path = shipped.find("studies", "study", name)
    table = read_table(path, "study")
    own = table.get("dataset")
    others = {key: text for key, text in (("dataset", dataset), ("validation", validation)) if text}
    try:
        comparison = _comparison(path.stem, {**table, **others})
        return (
            replace(comparison, published_on=own) if isinstance(own, str) and own != comparison.dataset else comparison
        )
    except FnetError as error:
        raise FnetError(f"{path}: {error}") from None


_KEYS = {
    "description": str,
    "space": str,
    "dataset": str,
    "validation": str,
    "recipe": str,
    "seeds": list,
    "plans": list,
    "search": dict,
    "ranges": list,
    "compare": list,
    "variants": dict,
    "published": dict,
}
_NAMES = {str: "a string", list: "a list", dict: "a table"}


def _comparison(name: str, table: Mapping[str, Any]) -> Comparison:
    for key, value in table.items():
        if key not in _KEYS:
            raise unknown("key", key, _KEYS)
        if not isinstance(value, _KEYS[key]):
            raise FnetError(f"{key} must be {_NAMES[_KEYS[key]]}, got {value!r}")
    for key in ("space", "dataset", "recipe"):
        if key not in table:
            raise FnetError(f"a study needs {key!r}")
    if ("plans" in table) == ("search" in table):
        raise FnetError("a study needs either plans or a [search]")
    if "validation" in table and "search" not in table:
        raise FnetError("validation images require a [search]; given plans are measured on the test images")
    seeds = table.get("seeds", [0])
    if (
        len(set(map(str, seeds))) < len(seeds)
        or not seeds
        or not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds)
    ):
        raise FnetError(f"seeds must be a list of different whole numbers from 0 on, got {seeds!r}")
    variants = tuple(_variants(table))
    texts = {key: _texts(key, table) for key in ("plans", "ranges", "compare")}
    for variant, plan in product(variants, texts["plans"]):
        parse_plan(variant.space, plan)
    if "plans" in table and not texts["plans"]:
        raise FnetError('plans must name one at least, as in ["regular"]')
    published = {
        plan: build(PublishedResult, entry, f"what is published of {plan!r}")
        for plan, entry in _tables(table, "published")
    }
    for key, plans in (("compare", texts["compare"]), ("published", tuple(published))):
        for plan in plans:
            if plan not in texts["plans"]:
                raise FnetError(f"{key}: {plan!r} is not among the plans")
    search = build(SearchOptions, table["search"], "a search") if "search" in table else None
    schemes = _schemes(texts["ranges"] or (AUTO,), search)
    if search is not None:
        check_policy_name(search.policy)
        for variant in variants:
            search.constraints(variant.space)
    return Comparison(
        name=name,
        description=table.get("description", ""),
        dataset=table["dataset"],
        variants=variants,
        plans=texts["plans"],
        search=search,
        seeds=tuple(seeds),
        schemes=schemes,
        compare=texts["compare"],
        published=published,
        validation=table.get("validation"),
    )


def _texts(key: str, table: Mapping[str, Any]) -> tuple[str, ...]:
    values = table.get(key, [])
    if not all(isinstance(value, str) for value in values) or len(set(values)) < len(values):
        raise FnetError(f"{key} must be a list of different strings, got {values!r}")
    return tuple(values)


def _tables(table: Mapping[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, entry in table.get(key, {}).items():
        if not isinstance(entry, dict):
            raise FnetError(f"{key}.{name} must be a table, got {entry!r}")
        yield name, entry


def _variants(table: Mapping[str, Any]) -> Iterator[Variant]:
    """Those of [variants], which may have another space, and another recipe or changes of it; or the only one."""

    def space(name: str) -> Macroarchitecture:
        return load_space(name, default_shape=natural)

    def natural(channels: int) -> tuple[int, int, int]:
        from fnet_search.training.datasets import natural_shape  # torch takes seconds to import

        return natural_shape(table["dataset"], channels)

    if not table.get("variants"):
        yield Variant("", space(table["space"]), load_recipe(table["recipe"]))
    for name, changes in _tables(table, "variants"):
        if not re.fullmatch(r"[\w.+-]+", name):
            raise FnetError(f"variants.{name!r} names a folder: write letters, digits, '_', '.', '+' and '-'")
        for key in changes:
            if key not in ("space", "recipe"):
                raise FnetError(f"variants.{name} has no {key!r}; it may have space and recipe")
        place, recipe = changes.get("space", table["space"]), changes.get("recipe", {})
        if not isinstance(place, str) or not isinstance(recipe, str | dict):
            raise FnetError(f"variants.{name}: space is a name or a path, recipe one too or a table of changes")
        loaded = load_recipe(recipe) if isinstance(recipe, str) else load_recipe(table["recipe"]).changed(recipe)
        yield Variant(name, space(place), loaded)
