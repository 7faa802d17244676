"""The commands that look at spaces: show, list."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fnet_search.base.errors import FnetError
from fnet_search.base.terminal import PlainTable, console
from fnet_search.cli.shared_options import (
    parse_shape,
    space_options,
)

if TYPE_CHECKING:
    from fnet_search.arch.macroarchitecture import Macroarchitecture
    from fnet_search.arch.plan import FactorizationPlan


@click.command()
@click.argument("space_name", metavar="SPACE")
@click.option(
    "--plan",
    "plan_text",
    default="regular",
    help="Plan: regular, f2, init2, dws, layer=rate,... or the path of a plan file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--draw", type=click.Path(path_type=Path, dir_okay=False), help="Draw the network to this PNG file.")
@click.option(
    "--save",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Save the space as this TOML file, which loads without the original code; with --weights, also save these "
    "beside it.",
)
@space_options
def show(  # noqa: PLR0913 (a Click command has a parameter for each option)
    space_name: str,
    plan_text: str,
    as_json: bool,
    draw: Path | None,
    save: Path | None,
    input_shape: str | None,
    weights: str | None,
    normalise: str | None,
    factorize: tuple[str, ...],
    keep: tuple[str, ...],
) -> None:
    """Print a space under a plan: a row for each layer with shapes, rates, MACs and parameters, and the totals.

    SPACE is as for `fnet-search run --space`. An imported network reads images of 224x224 pixels without --input.
    """
    from fnet_search.arch.macroarchitecture import factorizing, normalising
    from fnet_search.arch.plan import parse_plan
    from fnet_search.importing.spaces import load_space, save_space

    space = normalising(load_space(space_name, parse_shape(input_shape), weights), normalise)
    space = factorizing(space, factorize, keep)
    plan = parse_plan(space, plan_text)
    if save is not None and save.suffix != ".toml":
        raise FnetError(f"--save {save}: a space is saved as TOML; name it {save.with_suffix('.toml')}")
    if save is not None and not save.parent.is_dir():
        raise FnetError(f"--save {save}: the folder {save.parent} does not exist")
    weights_file = None if save is None or weights is None else save.with_suffix(".safetensors")
    if weights_file is not None and weights_file.resolve() == Path(str(weights)).resolve():
        raise FnetError(f"--save {save} would overwrite the weights that are read, {weights}; choose another name")
    if draw is not None:
        from fnet_search.report.drawing import draw as draw_network

        if draw.suffix.lower() != ".png":
            raise FnetError(f"--draw {draw}: only PNG can be drawn; name it {draw.with_suffix('.png')}")
        if not draw.parent.is_dir():
            raise FnetError(f"--draw {draw}: the folder {draw.parent} does not exist")
        draw_network(space, draw, plan)
    if save is not None:
        save_space(space, save)
    if as_json:
        click.echo(json.dumps(_described(space, plan), indent=2))
    else:
        _show_table(space, plan)
        if draw is not None:
            click.echo(f"drawn into {draw}")
        if save is not None:
            click.echo(f"saved as {save}" + (f", weights {save.with_suffix('.safetensors')}" if space.weights else ""))


@click.command("list")
@click.argument("what", type=click.Choice(["spaces", "policies", "recipes"]))
def list_(what: str) -> None:
    """List the available spaces, policies or recipes. Your own can be named by file."""
    for name, text in {"spaces": _spaces, "policies": _policies, "recipes": _recipes}[what]():
        click.echo(f"{name:24}  {text}")


def _spaces() -> "Iterator[tuple[str, str]]":
    from fnet_search.arch.costs import network_cost
    from fnet_search.base import shipped
    from fnet_search.base.units import mmac
    from fnet_search.importing import torchvision_names
    from fnet_search.importing.spaces import load_space

    for name in shipped.names("spaces"):
        space = load_space(name)
        yield name, f"{mmac(network_cost(space).conv_macs)}; {space.description}"
    yield "FILE.toml", "your own space, or one written by show --save"
    yield "FILE.py:FUNCTION", "a torch module returned by your own function; also package.module:FUNCTION"
    yield "torchvision:NAME", f"a torchvision classifier: {', '.join(torchvision_names.NAMES)}"


def _policies() -> "Iterator[tuple[str, str]]":
    from fnet_search.policy.registry import policy_names, policy_summary

    for name in policy_names():
        yield name, policy_summary(name).replace("``", "")
    yield "FILE.py:NAME", "your own class with suggest(history); also package.module:NAME"


def _recipes() -> "Iterator[tuple[str, str]]":
    from fnet_search.base import shipped
    from fnet_search.training.recipe import load_recipe

    for name in shipped.names("recipes"):
        recipe = load_recipe(name)
        yield (
            name,
            f"{recipe.epochs} epochs in batches of {recipe.batch_size}, {recipe.schedule}, "
            f"learning rate {recipe.learning_rate:g}",
        )


def _described(space: "Macroarchitecture", plan: "FactorizationPlan") -> dict[str, Any]:
    """A space under a plan as JSON data; shapes are without the batch."""
    from dataclasses import asdict

    from fnet_search.arch.costs import layer_cost, plan_cost
    from fnet_search.arch.factorize import factorize
    from fnet_search.arch.plan import label, legal_rates

    network = factorize(space, plan)
    legal = legal_rates(space)
    layers = []
    for node in network.order:
        origin = node.name.removesuffix(".grouped")
        input_shapes = network.input_shapes(node)
        layers.append(
            {
                "name": node.name,
                "kind": node.layer.kind,
                "inputs": list(node.inputs),
                "input_shapes": [list(shape) for shape in input_shapes],
                "output_shape": list(network.shapes[node.name]),
                "legal_rates": list(legal[origin]) if origin in legal else None,
                "rate": plan[origin] if origin in legal else None,
                **{key: value for key, value in asdict(layer_cost(node, input_shapes)).items() if key != "conv_macs"},
            }
        )
        layers[-1]["macs"] = layers[-1].pop("total_macs")
    return {
        "space": space.name,
        "plan": {"label": label(space, plan), "rates": dict(plan.rates)},
        "layers": layers,
        **asdict(plan_cost(space, plan)),
    }


def _show_table(space: "Macroarchitecture", plan: "FactorizationPlan") -> None:
    from fnet_search.base.units import mmac, size_text

    described = _described(space, plan)
    description = f": {space.description}" if space.description else ""
    title = f"{space.name}{description}; plan {described['plan']['label']}"
    rows = [
        [
            layer["name"],
            layer["kind"],
            " + ".join(map(size_text, layer["input_shapes"])),
            size_text(layer["output_shape"]),
            " ".join(map(str, layer["legal_rates"] or [])),
            str(layer["rate"] or ""),
            f"{layer['macs']:,}" if layer["macs"] else "",
            f"{layer['params']:,}" if layer["params"] else "",
        ]
        for layer in described["layers"]
    ]
    texts = {"layer": 20, "kind": 10, "input": 10, "output": 10, "legal rates": 12}
    names = (*texts, "rate", "MACs", "parameters")
    console().print(PlainTable(title, names, rows, texts, ("kind", "input", "parameters", "output", "MACs")))
    click.echo(
        f"conv MACs {described['conv_macs']:,} ({mmac(described['conv_macs'])}), "
        f"total MACs {described['total_macs']:,}, parameters {described['params']:,}"
    )
