"""Printing the outcome of a run."""

from typing import TYPE_CHECKING

import click

from fnet_search.base.terminal import console

if TYPE_CHECKING:
    from fnet_search.report.outcome import Outcome


def print_outcome(outcome: "Outcome") -> None:
    """Prints the table of candidates, the report's path, warnings, and the headline."""
    from fnet_search.engine.progress import candidates_table

    console().print(candidates_table(outcome))
    click.echo(f"report: {outcome.report}")
    for text in outcome.cautions:
        click.echo(f"warning: {text}")
    click.echo(outcome.headline())
