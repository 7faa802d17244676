"""Our MAC counter beside others: whether they agree, how long each takes, and all plans of a space at once.

    pip install -e ".[bench]" && python benchmarks/macs.py

Claims: our counts are those of torch's own counter to the MAC; what others count more is BatchNorm, biases, ReLU and
pooling, to the operation; all 14,224,896 plans of factorizenet are counted in at most 0.5 s and 1 GB.

Ours starts from the plan: `network_cost(factorize(space, plan))`, no torch. The others run a network that was built
before, on one image, and are not charged for building it; each round times all of them, one right after the other.
"""

import multiprocessing
import resource
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from math import prod
from time import perf_counter

import click
from machine import machine, ratio, spread

from fnet_search.arch.costs import all_conv_macs, network_cost, plan_cost
from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Activation, BatchNorm, Dense, Flatten, Pool
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan, parse_plan
from fnet_search.importing.spaces import load_space

PLANS = ("regular", "f2", "f4", "f16", "dws", "init2")
SPACES = ("factorizenet", "factorizenet-gap")
MACS = 14_224_896
"""Plans of factorizenet."""

Counter = Callable[..., int]
"""From a module and an image to MACs in all layers."""


def of_torch(network, image) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        network(image)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


def of_fvcore(network, image) -> int:
    from fvcore.nn import FlopCountAnalysis

    counted = FlopCountAnalysis(network, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return int(counted.total())


def of_ptflops(network, image) -> int:
    from ptflops import get_model_complexity_info

    return int(get_model_complexity_info(network, tuple(image.shape[1:]), False, False, backend="pytorch")[0])


def of_torchinfo(network, image) -> int:
    from torchinfo import summary

    return int(summary(network, input_data=image, verbose=0).total_mult_adds)


OTHERS: dict[str, tuple[str, Counter, dict[str, int]]] = {
    "torch": ("torch.utils.flop_counter", of_torch, {}),
    "fvcore": ("fvcore", of_fvcore, {"norm": 2, "average": 1}),
    "ptflops": ("ptflops", of_ptflops, {"norm": 2, "relu": 2, "max pool": 2, "average": 2, "bias": 1}),
    "torchinfo": ("torchinfo", of_torchinfo, {"affine": 1, "bias": 1}),
}
"""Module, counter, and what it counts more than ours, in terms of `extras`. ptflops counts nn.ReLU, and once more the
function that it calls; so with pooling."""


def extras(network: Macroarchitecture) -> dict[str, int]:
    """What others count as well, for one image.

    norm, relu: elements that leave BatchNorm and ReLU layers; max pool, average: those that go into such pooling; bias:
    those of dense layers; affine: weights and biases of BatchNorm.
    """
    found = dict.fromkeys(("norm", "relu", "max pool", "average", "bias", "affine"), 0)
    for node in network.nodes:
        size, taken = (prod(network.shapes[name]) for name in (node.name, node.inputs[0]))
        match node.layer:
            case BatchNorm():
                found["norm"] += size
                found["affine"] += 2 * network.shapes[node.name][0]
            case Activation():
                found["relu"] += size
            case Pool(reduction):
                found["max pool" if reduction == "max" else "average"] += taken
            case Dense(bias=True):
                found["bias"] += size
    return found


def built(network: Macroarchitecture):
    """A chain as torch users build one: every layer a module, since some counters see modules only."""
    from torch import nn

    from fnet_search.training.network import Network

    trained, modules = Network(network), []
    for before, node in zip((INPUT, *(node.name for node in network.order)), network.order, strict=False):
        assert node.inputs == (before,)
        match node.layer:
            case Activation("relu"):
                modules.append(nn.ReLU())
            case Pool("max", kernel):
                modules.append(nn.MaxPool2d(kernel))
            case Pool("global_average"):
                modules.append(nn.AdaptiveAvgPool2d(1))
            case Flatten():
                modules.append(nn.Flatten())
            case _:
                modules.append(trained.layer(node.name))
    return nn.Sequential(*modules).eval()


def counted(space: Macroarchitecture, plan: FactorizationPlan, tools: list[str], rounds: int) -> dict[str, list[float]]:
    """Prints what each tool counts more than ours; returns the seconds of each side, round by round."""
    import torch

    network = factorize(space, plan)
    module, image = built(network), torch.zeros(1, *space.input_shape)
    cost, more = plan_cost(space, plan), extras(network)
    assert cost == network_cost(network)
    found = {tool: OTHERS[tool][1](module, image) for tool in tools}
    cells = []
    for tool, count in found.items():
        expected = sum(times * more[term] for term, times in OTHERS[tool][2].items())
        surplus = count - cost.total_macs
        cells.append("equal" if surplus == 0 else f"{surplus:+,}{'' if surplus == expected else ' UNEXPLAINED'}")
    click.echo(f"{cost.conv_macs:14,} {cost.total_macs:14,}" + "".join(f"{cell:>14}" for cell in cells))
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: network_cost(factorize(space, plan)),
        "ours, by table": lambda: plan_cost(space, plan),
        **{tool: (lambda counter=OTHERS[tool][1]: counter(module, image)) for tool in tools},
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, count in sides.items():
            start = perf_counter()
            count()
            seconds[side].append(perf_counter() - start)
    return seconds


def enumerated() -> None:
    """Prints what it takes to count all plans; for a process of its own."""
    space = load_space("factorizenet")
    before, start = _peak(), perf_counter()
    macs = all_conv_macs(space)
    seconds = perf_counter() - start
    peak = _peak()
    assert macs.size == MACS
    click.echo(f"all {macs.size:,} plans of {space.name}, {int(macs.min()):,} to {int(macs.max()):,} conv MACs:")
    click.echo(f"{seconds:.3f} s (claim: 0.5); peak of the process {peak:,.0f} MB (claim: 1,000), {before:,.0f} before")


def _peak() -> float:
    """The most memory that this process ever held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="A plan.")
def main(rounds: int) -> None:
    """Counts six plans of two spaces with every counter that is installed."""
    tools = [tool for tool, (module, _, _) in OTHERS.items() if find_spec(module.partition(".")[0])]
    missing = [tool for tool in OTHERS if tool not in tools]
    click.echo(machine(*(tool for tool in tools if tool != "torch")))
    if missing:
        click.echo(f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}, or .[bench]")
    # First: a process counts the memory of the one that started it as its own, and torch is not in this one yet.
    process = multiprocessing.get_context("spawn").Process(target=enumerated)
    process.start()
    process.join()
    warnings.simplefilter("ignore")
    for tool in tools:
        import_module(OTHERS[tool][0])
    import torch

    torch.set_num_threads(1)
    click.echo("MACs in all layers: what each counts more than ours, + what that is, exactly")
    click.echo(f"{'':25}{'conv, ours':>14} {'all, ours':>14}" + "".join(f"{tool:>14}" for tool in tools))
    seconds: dict[str, list[float]] = {}
    for name in SPACES:
        space = load_space(name)
        for plan in PLANS:
            click.echo(f"{name:17} {plan:7}", nl=False)
            for side, taken in counted(space, parse_plan(space, plan), tools, rounds).items():
                seconds.setdefault(side, []).extend(taken)
    for tool in tools:
        terms = "".join(f" + {f'{times} ' * (times > 1)}{term}" for term, times in OTHERS[tool][2].items())
        click.echo(f"{tool} = ours{terms}")
    click.echo(f"{'':16}{'ms, median (quartiles)':>28}{'times ours, of each round':>34}")
    for side, taken in seconds.items():
        click.echo(f"{side:16}{spread([1e3 * one for one in taken])!s:>28}{ratio(taken, seconds['ours'])!s:>34}")


if __name__ == "__main__":
    main()
