"""The commands that compare several runs: ``fnet-search study run``, ``list`` and ``show``."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fnet_search.cli.shared_options import (
    NOTHING_FEASIBLE,
    Commands,
    machine_of,
    machine_options,
    until_time_is_up,
    validation_option,
)

if TYPE_CHECKING:
    from fnet_search.comparison.definition import Comparison
    from fnet_search.engine.progress import TerminalDisplay
    from fnet_search.training.deadline import Deadline


@click.group(cls=Commands, invoke_without_command=True)
@click.pass_context
def study(context: click.Context) -> None:
    """Compare several runs: the paper's table and figures, and comparisons for its open questions."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@study.command("list")
def list_() -> None:
    """List the shipped comparisons."""
    from fnet_search.base import shipped
    from fnet_search.comparison.definition import load_comparison

    names = shipped.names("studies")
    for name in names:
        click.echo(f"{name:{max(map(len, names))}}  {load_comparison(name).description}")


@study.command()
@click.argument("name", metavar="STUDY")
def show(name: str) -> None:
    """Print what a comparison trains and quantizes. STUDY: a shipped comparison, or the path of a TOML file."""
    from fnet_search.comparison.definition import load_comparison

    for line in described(load_comparison(name)):
        click.echo(line)


def described(comparison: "Comparison") -> list[str]:
    """The lines that `show` prints of a comparison."""
    from fnet_search.base.units import counted
    from fnet_search.comparison.running import epochs

    networks = f"plans {', '.join(comparison.plans)}"
    if comparison.search is not None:
        options = comparison.search
        networks = f"search of {counted(options.trials, 'candidate')} by {options.policy} under {options.budget}"
    seeds = f"seed{'s' * (len(comparison.seeds) > 1)} {', '.join(map(str, comparison.seeds))}"
    description = f": {comparison.description}" if comparison.description else ""
    lines = [f"{comparison.name}{description}", f"data set {comparison.dataset}; {seeds}; {networks}"]
    lines += map(str, comparison.variants)
    total = sum(epochs(comparison, part) for part in comparison.parts)
    lines.append(f"quantized with {', '.join(comparison.schemes)}; about {total:,.0f} epochs in all")
    return lines


@study.command()
@click.argument("name", metavar="STUDY")
@click.option("--dataset", show_default="that of STUDY", help="Another data set, as for `fnet-search run`.")
@validation_option
@click.option(
    "--epochs",
    type=click.IntRange(1),
    show_default="the recipe's",
    help="Epochs of each training; learning-rate steps move in proportion.",
)
@click.option(
    "--seed",
    "seeds",
    type=click.IntRange(0, 2**32 - 1),
    multiple=True,
    show_default="those of STUDY",
    help="Seed of a run of each variant. May be repeated.",
)
@click.option(
    "--ranges",
    multiple=True,
    help="Further activation ranges for the same trained networks, as for `fnet-search quantize`. May be repeated.",
)
@click.option(
    "--scheme",
    "schemes",
    metavar="auto|paper|SCHEME",
    multiple=True,
    show_default="those of STUDY",
    help="Quantization scheme, as for `fnet-search run`. May be repeated, for the same trained networks.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    show_default="runs/study-<name>-<data set>",
    help="Folder of the comparison.",
)
@machine_options
def run(**options: Any) -> None:
    """Train, quantize and compare all networks of a comparison. The same command resumes one that stopped.

    STUDY: a shipped comparison (see `fnet-search study list`), or the path of a TOML file. Each variant and seed is a
    run in the comparison's folder; results.md there has the table and the figures, networks.csv and layers.csv the
    measurements. Other seeds in the same folder are added to those recorded there. Exit code 3: no candidate of a
    search met its constraints; the nearest is named.
    """
    from fnet_search.comparison.definition import load_comparison
    from fnet_search.engine.arguments import absolute, absolute_path, dataset_name, folder_of
    from fnet_search.training.dataset_names import check_dataset

    comparison = load_comparison(options["name"], options["dataset"], options["validation"]).with_options(
        options["epochs"], options["seeds"], options["ranges"], options["schemes"]
    )
    comparison = replace(
        comparison, dataset=absolute(comparison.dataset), validation=absolute_path(comparison.validation)
    )
    check_dataset(comparison.dataset, comparison.validation)  # before pandas, matplotlib and torch are imported
    from fnet_search.comparison.result_page import RESULTS
    from fnet_search.comparison.results import compared_networks, markdown, result_remarks, result_rows, result_table
    from fnet_search.comparison.running import ComparisonFolder, run_parts
    from fnet_search.training.deadline import TimeUp

    default = "-".join(["study", comparison.name, dataset_name(comparison.dataset)])
    folder = ComparisonFolder(folder_of(options["out"], default))

    def work(display: "TerminalDisplay", deadline: "Deadline | None") -> None:
        try:
            run_parts(comparison, folder, machine_of(options), display, deadline)
        except TimeUp:
            display.say(f"results so far: {folder.path / RESULTS}")
            raise

    until_time_is_up(options, work)
    extended = folder.whole(comparison)
    runs = folder.recorded(extended)
    networks = compared_networks(extended, runs)
    if listed := result_rows(extended, networks):
        click.echo(markdown(result_table(extended, listed)))
    for remark in result_remarks(extended, runs):
        click.echo(remark)
    click.echo(f"results: {folder.path / RESULTS}")
    if any(network.missed for network in networks):
        sys.exit(NOTHING_FEASIBLE)
