"""The command line. Heavy modules are imported inside the commands, so that ``--help`` answers at once."""

import signal
import sys
import traceback
import warnings
from io import TextIOWrapper

import click

from fnet_search.base.errors import FnetError
from fnet_search.base.version import __version__
from fnet_search.cli.recorded_runs import analyze, audit, dashboard, export, latency, quantize, report
from fnet_search.cli.run import evaluate, run, worker
from fnet_search.cli.shared_options import Commands
from fnet_search.cli.spaces import list_, show
from fnet_search.cli.study import study

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120, "show_default": True}


@click.group(cls=Commands, context_settings=_SETTINGS, invoke_without_command=True)
@click.version_option(__version__, prog_name="fnet-search")
@click.option(
    "--debug", is_flag=True, expose_value=False, help="Also print the traceback of an error; works with every command."
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Factorize a CNN layer by layer under a MAC budget and a quint8 accuracy floor.

    \b
    Start with:  fnet-search run --budget 120MMAC
    Look at a space:  fnet-search show factorizenet --plan init2
    Share a search between hosts:  run --storage, worker
    Work with a recorded run:  dashboard, export, audit, quantize, analyze, latency, report
    The paper's table and figures:  study
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


COMMANDS: tuple[click.Command, ...] = (
    run,
    evaluate,
    worker,
    show,
    list_,
    report,
    dashboard,
    export,
    audit,
    quantize,
    analyze,
    latency,
    study,
)
for _command in COMMANDS:
    cli.add_command(_command)


class _Terminated(BaseException):
    """Raised on SIGTERM."""


def _terminate(*_: object) -> None:
    raise _Terminated


DEBUG = "--debug"


def main() -> None:
    """Entry point: errors are one line on stderr, with exit code 2; Ctrl-C gives 130, SIGTERM 143."""
    signal.signal(signal.SIGTERM, _terminate)
    warnings.filterwarnings(
        "ignore", "Glyph .*missing from font|constrained_layout not applied"
    )  # from drawing figures
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a path may have characters outside the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    arguments = [argument for argument in sys.argv[1:] if argument != DEBUG]  # allowed after the command too
    try:
        code = cli.main(arguments, "fnet-search", standalone_mode=False)
    except FnetError as error:
        code = _fail(str(error))
    except click.ClickException as error:
        code = _fail(error.format_message())
    except OSError as error:  # such as a full disk, or a folder without write permission
        code = _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (KeyboardInterrupt, click.Abort):
        code = _interrupted(signal.SIGINT)
    except _Terminated:
        code = _interrupted(signal.SIGTERM)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    if DEBUG in sys.argv:
        traceback.print_exc()
    click.echo(f"fnet-search: {' '.join(message.split())}", err=True)
    return 2


def _interrupted(by: signal.Signals) -> int:
    click.echo("interrupted; run the same command again to resume", err=True)
    return 128 + by
