"""Factorization plans: legal rates, named plans, and their text forms."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from os.path import isfile
from pathlib import Path

import tomli_w

from fnet_search.arch.layers import Conv
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.base.errors import FnetError, unknown
from fnet_search.base.toml_tables import read_table


@dataclass(frozen=True)
class FactorizationPlan:
    """One factorization rate per factorizable layer, in the space's order (paper, section 2).

    A rate *f* above 1 replaces a K x K convolution by one of *f* groups and a pointwise one; 1 leaves it as it is.
    Hashable. Make one with `make_plan` or `parse_plan`, which raise FnetError for illegal rates.
    """

    rates: tuple[tuple[str, int], ...]

    @cached_property
    def by_layer(self) -> Mapping[str, int]:
        return dict(self.rates)

    def __getitem__(self, layer: str) -> int:
        return self.by_layer[layer]

    def __str__(self) -> str:
        return ",".join(f"{layer}={rate}" for layer, rate in self.rates)


def rates_of(channels: int) -> tuple[int, ...]:
    """Legal rates of a layer with `channels` input channels: the powers of two that divide them, and `channels`."""
    powers = [1 << k for k in range(channels.bit_length()) if channels % (1 << k) == 0]
    return tuple(powers) if powers[-1] == channels else (*powers, channels)


@lru_cache(maxsize=64)
def legal_rates(space: Macroarchitecture) -> Mapping[str, tuple[int, ...]]:
    """Legal rates of each factorizable layer, ascending; layers in file order. Optimizers see the index in a tuple."""
    return {
        node.name: rates_of(space.shapes[node.inputs[0]][0])
        for node in space.nodes
        if isinstance(node.layer, Conv) and node.layer.factorize
    }


def make_plan(space: Macroarchitecture, rates: Mapping[str, int]) -> FactorizationPlan:
    """The plan with these rates; layers without one get rate 1.

    Raises FnetError for an unknown layer (naming the nearest) or an illegal rate (listing the legal ones).
    """
    legal = legal_rates(space)
    for layer, rate in rates.items():
        if layer not in legal:
            if layer in space.by_name:
                raise FnetError(f"layer {layer!r} cannot be factorized; factorizable layers: {', '.join(legal)}")
            raise unknown("layer", layer, legal)
        if rate not in legal[layer]:
            raise FnetError(
                f"illegal rate {rate} for layer {layer!r}; legal rates: {', '.join(map(str, legal[layer]))}"
            )
    return FactorizationPlan(tuple((layer, rates.get(layer, 1)) for layer in legal))


def check_plan(space: Macroarchitecture, plan: FactorizationPlan) -> None:
    """Raises FnetError unless `plan` names exactly the factorizable layers of `space`, in order, with legal rates."""
    if make_plan(space, plan.by_layer) != plan:
        raise FnetError(
            f"plan {plan} does not name the layers of space {space.name!r} in order: {', '.join(legal_rates(space))}"
        )


def indices(space: Macroarchitecture, plan: FactorizationPlan) -> tuple[int, ...]:
    """Index of each layer's rate among its legal rates, the parameters that optimizers see."""
    return tuple(rates.index(plan[layer]) for layer, rates in legal_rates(space).items())


def from_indices(space: Macroarchitecture, chosen: tuple[int, ...]) -> FactorizationPlan:
    """Inverse of `indices`."""
    rates = zip(legal_rates(space).items(), chosen, strict=True)
    return FactorizationPlan(tuple((layer, legal[index]) for (layer, legal), index in rates))


def regular(space: Macroarchitecture) -> FactorizationPlan:
    """Rate 1 everywhere."""
    return make_plan(space, {})


def depthwise(space: Macroarchitecture) -> FactorizationPlan:
    """Rate C_in everywhere: depthwise separable convolutions."""
    return make_plan(space, {layer: rates[-1] for layer, rates in legal_rates(space).items()})


def doublings(space: Macroarchitecture) -> tuple[int, ...]:
    """The uniform rates of progressive doubling (paper, section 3): 1, 2, 4, ... until every layer is depthwise."""
    return tuple(1 << k for k in range(max(map(len, legal_rates(space).values()), default=0)))


def uniform(space: Macroarchitecture, rate: int) -> FactorizationPlan:
    """``f<rate>``: the same rate in every layer, or C_in where a layer has fewer input channels (paper, section 3).

    Raises FnetError for a rate that is not in `doublings`.
    """
    if rate not in doublings(space):
        known = ", ".join(f"f{doubled}" for doubled in doublings(space))
        raise FnetError(f"unknown plan 'f{rate}'; uniform rates are {known}")
    index = rate.bit_length() - 1
    return make_plan(space, {layer: rates[min(index, len(rates) - 1)] for layer, rates in legal_rates(space).items()})


def initial_rates(space: Macroarchitecture) -> tuple[int, ...]:
    """Legal f_init of the reverse pyramid: the legal rates of the factorizable layer with the fewest input channels."""
    return min(legal_rates(space).values(), key=lambda rates: rates[-1], default=())


def reverse_pyramid(space: Macroarchitecture, initial: int) -> FactorizationPlan:
    """``init<initial>``: the rate grows with the input depth (paper, Figure 3).

    Each layer gets its largest legal rate that keeps at least (fewest C_in) / initial channels per group. Raises
    FnetError for an `initial` that is not in `initial_rates`.
    """
    if initial not in initial_rates(space):
        known = ", ".join(f"init{rate}" for rate in initial_rates(space))
        raise FnetError(f"unknown plan 'init{initial}'; reverse pyramids are {known}")
    fewest = initial_rates(space)[-1]
    return make_plan(
        space,
        {
            layer: max(rate for rate in rates if rate == 1 or rates[-1] * initial >= fewest * rate)
            for layer, rates in legal_rates(space).items()
        },
    )


def named_plans(space: Macroarchitecture) -> dict[str, FactorizationPlan]:
    """``regular``, ``dws``, ``f1``, ``f2``, ..., ``init1``, ``init2``, ...: the first name of a plan is its `label`."""
    return {
        "regular": regular(space),
        "dws": depthwise(space),
        **{f"f{rate}": uniform(space, rate) for rate in doublings(space)},
        **{f"init{rate}": reverse_pyramid(space, rate) for rate in initial_rates(space)},
    }


@lru_cache(maxsize=64)
def _names(space: Macroarchitecture) -> Mapping[FactorizationPlan, str]:
    return {plan: name for name, plan in reversed(named_plans(space).items())}


def label(space: Macroarchitecture, plan: FactorizationPlan) -> str:
    """The plan's name if it has one, else its rates in order: ``1-2-4-4-8``."""
    return _names(space).get(plan) or "-".join(str(rate) for _, rate in plan.rates)


def parse_plan(space: Macroarchitecture, text: str) -> FactorizationPlan:
    """A plan from text: a name, ``layer=rate,...``, or the path of a plan file (TOML). Raises FnetError otherwise."""
    if not legal_rates(space) and text != "regular":
        raise FnetError(
            f"space {space.name!r} has no factorizable layer, so its only plan is regular; "
            "set factorize = true on a conv layer, or name one with `factorize`"
        )
    if "=" in text and not text.endswith(".toml"):
        entries = [_assignment(part) for part in text.split(",") if part.strip()]
        rates = dict(entries)
        if len(rates) < len(entries):
            raise FnetError(f"a layer is named twice in plan {text!r}; give each layer one rate")
        return make_plan(space, rates)
    if text.endswith(".toml") or isfile(text):  # noqa: PTH113 (Path.is_file raises for a name that is too long)
        return load_plan(space, Path(text))
    if text in ("regular", "dws"):
        return named_plans(space)[text]
    if match := re.fullmatch(r"(f|init)(\d{1,9})", text):
        build = uniform if match[1] == "f" else reverse_pyramid
        return build(space, int(match[2]))
    raise unknown("plan", text, named_plans(space))


def _assignment(part: str) -> tuple[str, int]:
    layer, _, rate = part.strip().rpartition("=")
    if not layer or not re.fullmatch(r"\d{1,9}", rate.strip()):
        raise FnetError(f"malformed plan entry {part.strip()!r}; write layer=rate, as in: conv_64_1=2,conv_64_2=4")
    return layer.strip(), int(rate)


def load_plan(space: Macroarchitecture, path: Path) -> FactorizationPlan:
    """Reads a plan file: a ``[rates]`` table of layer = rate. Raises FnetError, naming the file, if it is not one."""
    rates = read_table(path, "plan").get("rates")
    if not isinstance(rates, dict):
        raise FnetError(f"{path}: a plan file needs a [rates] table of layer = rate")
    for layer, rate in rates.items():
        if type(rate) is not int:
            raise FnetError(f"{path}: the rate of {layer!r} must be a whole number, got {rate!r}")
    try:
        return make_plan(space, rates)
    except FnetError as error:
        raise FnetError(f"{path}: {error}") from None


def plan_toml(plan: FactorizationPlan) -> str:
    """The plan as the text of a plan file."""
    return tomli_w.dumps({"rates": dict(plan.rates)})
