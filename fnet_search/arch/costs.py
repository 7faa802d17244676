"""Exact MACs and parameters of networks and plans, from arithmetic alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import assert_never

import numpy as np
import numpy.typing as npt

from fnet_search.arch.factorize import replacement
from fnet_search.arch.layers import Conv, Dense, Foldable, Shape, Stateless
from fnet_search.arch.macroarchitecture import Macroarchitecture, Node
from fnet_search.arch.plan import FactorizationPlan, indices, legal_rates


@dataclass(frozen=True)
class Cost:
    """Exact counts. A budget limits `conv_macs` (convolutions only, stem included); `total_macs` adds dense layers."""

    conv_macs: int = 0
    total_macs: int = 0
    params: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.conv_macs + other.conv_macs, self.total_macs + other.total_macs, self.params + other.params)


def layer_cost(node: Node, inputs: list[Shape]) -> Cost:
    """Cost of one layer, for input shapes without the batch. The formulas are methods of its class (`layers`)."""
    layer, macs, params = node.layer, node.layer.macs(inputs), node.layer.params(inputs)
    if isinstance(layer, Foldable | Stateless):
        return Cost(0, macs, params)
    match layer:
        case Conv():
            return Cost(macs, macs, params)
        case Dense():
            return Cost(0, macs, params)
        case _:
            assert_never(layer)


def network_cost(network: Macroarchitecture) -> Cost:
    """Cost of a network, its convolutions as they are."""
    return sum((layer_cost(node, network.input_shapes(node)) for node in network.nodes), Cost())


@dataclass(frozen=True)
class CostTable:
    """Costs of all plans of a space: a plan costs `fixed` plus, for each factorizable layer, the entry of its rate."""

    fixed: Cost
    by_layer: Mapping[str, tuple[Cost, ...]]


@lru_cache(maxsize=64)
def cost_table(space: Macroarchitecture) -> CostTable:
    """The exact costs of a space's plans. They add up, because a layer's cost depends on no rate but its own."""
    by_layer: dict[str, tuple[Cost, ...]] = {}
    fixed = network_cost(space)
    for layer, rates in legal_rates(space).items():
        node = space.by_name[layer]
        costs = []
        for rate in rates:
            shape = space.shapes[node.inputs[0]]
            total = Cost()
            for part in replacement(space, node, rate):
                total += layer_cost(part, [shape])
                shape = part.layer.output_shape([shape])
            costs.append(total)
        by_layer[layer] = tuple(costs)
        unchanged = costs[0]  # rate 1, which `fixed` has counted
        fixed += Cost(-unchanged.conv_macs, -unchanged.total_macs, -unchanged.params)
    return CostTable(fixed, by_layer)


def plan_cost(space: Macroarchitecture, plan: FactorizationPlan) -> Cost:
    """Exact MACs and parameters of a plan's network: multiply-accumulates of one image, weights and biases."""
    table = cost_table(space)
    costs = zip(table.by_layer.values(), indices(space, plan), strict=True)
    return sum((costs_of_layer[index] for costs_of_layer, index in costs), table.fixed)


def smallest_conv_macs(space: Macroarchitecture) -> int:
    """conv_macs of the cheapest plan (not always depthwise: MACs are not monotone in the rate)."""
    table = cost_table(space)
    return table.fixed.conv_macs + sum(min(cost.conv_macs for cost in costs) for costs in table.by_layer.values())


def all_conv_macs(space: Macroarchitecture) -> npt.NDArray[np.int64]:
    """conv_macs of every plan, shape (rates of layer 1, rates of layer 2, ...), indexed as `indices`.

    Takes 8 bytes per plan: 114 MB for the 14,224,896 plans of factorizenet.
    """
    table = cost_table(space)
    costs = [np.array([cost.conv_macs for cost in layer], dtype=np.int64) for layer in table.by_layer.values()]
    return _all_sums([np.array(table.fixed.conv_macs, dtype=np.int64), *costs])


def _all_sums(parts: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """All sums of one number from each array. Recursing on halves gives the last, largest `outer` long rows."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return np.asarray(np.add.outer(_all_sums(parts[:half]), _all_sums(parts[half:])))
