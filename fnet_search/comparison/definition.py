"""Comparisons as data (``studies/*.toml``, or a TOML file of the user): what is trained, measured and compared."""

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
    """Published measures of a network, as fractions of 1; None: not published."""

    fp32_accuracy: float | None = None
    quint8_accuracy: float | None = None
    relative_drop: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 <= value <= 1:
                raise FnetError(f"{name} must be a fraction of 1, got {value}")


@dataclass(frozen=True)
class Variant:
    """A side of a comparison: a space and the recipe that its networks are trained with."""

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
    """The options of a comparison's searches: those of ``fnet-search run``, with its defaults for all but `policy`."""

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
        """The limits of the search. Raises FnetError if they cannot be read or no network of the space meets them."""
        return parse_constraints(space, self.budget, self.max_params, self.min_quint8, self.max_drop, self.metric)


@dataclass(frozen=True)
class Part:
    """One run of a comparison: a variant with a seed."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """The name of its run folder: ``seed0``, or ``he-seed0`` for the variant ``he``."""
        return f"{self.variant.name}-seed{self.seed}".removeprefix("-")


@dataclass(frozen=True)
class Comparison:
    """Trains given `plans`, or runs a `search`, for each variant with each seed.

    Networks of given plans are trained on all training images, quantized with the first of `schemes`, and measured on
    the test split. The same trained networks are then quantized with each further scheme.
    """

    name: str
    description: str
    dataset: str
    variants: tuple[Variant, ...]
    plans: tuple[str, ...] = ()
    search: SearchOptions | None = None
    seeds: tuple[int, ...] = (0,)
    schemes: tuple[str, ...] = (AUTO,)
    """Texts for `parse_schemes`; only the first may be ``auto``."""
    compare: tuple[str, ...] = ()
    """Plans whose layers one figure shows side by side (the paper's Figure 6); empty: no such figure."""
    published: Mapping[str, PublishedResult] = field(default_factory=dict)
    """Published results by plan, spelled as in `plans`."""
    validation: str | None = None
    """The folder of a search's validation images, as for ``fnet-search run --validation``."""
    published_on: str = ""
    """The data set of the published numbers if `dataset` is another one, else empty."""

    @property
    def parts(self) -> list[Part]:
        """Each variant with each seed."""
        return [Part(variant, seed) for variant, seed in product(self.variants, self.seeds)]

    def with_options(
        self,
        epochs: int | None,
        seeds: tuple[int, ...],
        ranges: tuple[str, ...] = (),
        schemes: tuple[str, ...] = (),
    ) -> "Comparison":
        """The same comparison with other settings.

        Args:
            epochs: Epochs of each training; the learning-rate steps move in proportion. None keeps the recipes' epochs.
            seeds: The new seeds; empty keeps the old ones.
            ranges: Schemes to add to the old ones; those that it has already are skipped.
            schemes: The new schemes; empty keeps the old ones.

        Raises FnetError for a scheme that cannot be read, for several schemes in a search, and for `ranges` together
        with `schemes`.
        """
        if ranges and schemes:
            raise FnetError("`schemes` cannot be combined with `ranges`: a scheme includes the ranges")
        variants = tuple(replace(variant, recipe=variant.recipe.with_epochs(epochs)) for variant in self.variants)
        added = (text for text in map(_canonical, ranges) if text not in self.schemes)
        new_schemes = _canonical_schemes(schemes or (*self.schemes, *dict.fromkeys(added)), self.search)
        return replace(self, variants=variants, seeds=seeds or self.seeds, schemes=new_schemes)


def _canonical(text: str) -> str:
    """The spelling of a scheme in results: ``percentile:1`` for ``percentile:1.0``."""
    return schemes_text(parse_schemes(text))


def _canonical_schemes(texts: tuple[str, ...], search: SearchOptions | None) -> tuple[str, ...]:
    """The schemes of a comparison, each in the spelling of results.

    Raises FnetError for a scheme that cannot be read or repeats another, an ``auto`` after the first scheme, and
    several schemes in a search.
    """
    schemes = tuple(map(_canonical, texts))
    if len(set(schemes)) < len(schemes):
        raise FnetError(f"schemes must differ, got {list(texts)!r}")
    if AUTO in schemes[1:]:
        raise FnetError(f"{AUTO} must be the first scheme; name it before {schemes[0]}")
    if search is not None and len(schemes) > 1:
        raise FnetError("a [search] takes one scheme, because its result depends on it; write a comparison for each")
    return schemes


def load_comparison(name: str, dataset: str | None = None, validation: str | None = None) -> Comparison:
    """Reads a shipped comparison by name, or a TOML file by path. `dataset` and `validation` replace those of the file.

    Raises FnetError if there is no such file, or its contents are not valid.
    """
    path = shipped.find("studies", "study", name)
    table = read_table(path, "study")
    file_dataset = table.get("dataset")
    replaced = {key: text for key, text in (("dataset", dataset), ("validation", validation)) if text}
    try:
        comparison = _comparison(path.stem, {**table, **replaced})
        if isinstance(file_dataset, str) and file_dataset != comparison.dataset:
            return replace(comparison, published_on=file_dataset)
        return comparison
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
            raise FnetError(f"a comparison needs {key!r}")
    if ("plans" in table) == ("search" in table):
        raise FnetError("a comparison needs either plans or a [search]")
    if "validation" in table and "search" not in table:
        raise FnetError("validation images require a [search]; given plans are measured on the test images")
    seeds = table.get("seeds", [0])
    if (
        len(set(map(str, seeds))) < len(seeds)
        or not seeds
        or not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds)
    ):
        raise FnetError(f"seeds must be a list of different non-negative integers, got {seeds!r}")
    variants = tuple(_variants(table))
    texts = {key: _texts(key, table) for key in ("plans", "ranges", "compare")}
    for variant, plan in product(variants, texts["plans"]):
        parse_plan(variant.space, plan)
    if "plans" in table and not texts["plans"]:
        raise FnetError('plans must name at least one plan, as in ["regular"]')
    published = {
        plan: build(PublishedResult, entry, f"the published result of {plan!r}")
        for plan, entry in _tables(table, "published")
    }
    for key, plans in (("compare", texts["compare"]), ("published", tuple(published))):
        for plan in plans:
            if plan not in texts["plans"]:
                raise FnetError(f"{key}: {plan!r} is not among the plans")
    search = build(SearchOptions, table["search"], "a search") if "search" in table else None
    schemes = _canonical_schemes(texts["ranges"] or (AUTO,), search)
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
    """The list of strings at `key`; empty if there is none."""
    values = table.get(key, [])
    if not all(isinstance(value, str) for value in values) or len(set(values)) < len(values):
        raise FnetError(f"{key} must be a list of different strings, got {values!r}")
    return tuple(values)


def _tables(table: Mapping[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and contents of each table at `key`."""
    for name, entry in table.get(key, {}).items():
        if not isinstance(entry, dict):
            raise FnetError(f"{key}.{name} must be a table, got {entry!r}")
        yield name, entry


def _variants(table: Mapping[str, Any]) -> Iterator[Variant]:
    """The variants of a comparison; a single one without a name if the table lists none.

    Each may have a space of its own, and a recipe of its own or changes to the common recipe.
    """

    def load(space: str) -> Macroarchitecture:
        return load_space(space, default_shape=image_shape)

    def image_shape(channels: int) -> tuple[int, int, int]:
        from fnet_search.training.datasets import natural_shape  # torch takes seconds to import

        return natural_shape(table["dataset"], channels)

    if not table.get("variants"):
        yield Variant("", load(table["space"]), load_recipe(table["recipe"]))
    for name, changes in _tables(table, "variants"):
        if not re.fullmatch(r"[\w.+-]+", name):
            raise FnetError(f"variants.{name!r} names a folder: write letters, digits, '_', '.', '+' and '-'")
        for key in changes:
            if key not in ("space", "recipe"):
                raise FnetError(f"variants.{name} has no {key!r}; it may have space and recipe")
        space, recipe = changes.get("space", table["space"]), changes.get("recipe", {})
        if not isinstance(space, str) or not isinstance(recipe, str | dict):
            raise FnetError(
                f"variants.{name}: space must be a name or a path, recipe a name, a path or a table of changes"
            )
        loaded = load_recipe(recipe) if isinstance(recipe, str) else load_recipe(table["recipe"]).changed(recipe)
        yield Variant(name, load(space), loaded)
