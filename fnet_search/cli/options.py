"""Options that several commands have, and what is made of them."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fnet_search.base.errors import FnetError, unknown
from fnet_search.base.units import parse_duration

if TYPE_CHECKING:
    from fnet_search.engine.progress import TerminalDisplay
    from fnet_search.engine.request import Machine
    from fnet_search.training.deadline import Deadline

T = TypeVar("T")

NOTHING_FEASIBLE = 3
"""Exit code of a search in which no candidate met the constraints."""
TIME_UP = 5
"""Exit code of work that its time limit stopped."""


class Commands(click.Group):
    """Commands; of an unknown one, the nearest is named, and errors name options."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FnetError as error:
            if (command := self.commands.get(ctx.invoked_subcommand or "")) is not None:
                error.args = (with_options(str(error), command),)
            raise

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in self.commands:
            raise unknown("command", args[0], self.commands)
        return super().resolve_command(ctx, args)


def with_options(message: str, command: click.Command) -> str:
    """An error with the command's options in place of the parameters, in backquotes, that it names."""
    options = dict[str | None, str]()
    for option in (parameter for parameter in command.params if isinstance(parameter, click.Option)):
        words = [name.removeprefix("--").replace("-", "_") for name in option.opts]
        options |= dict.fromkeys((option.name, *words), option.opts[0])
    return re.sub(r"`(\w+)`", lambda match: options.get(match[1], match[0]), message)


def add_options(command: Any, options: Sequence[Callable[[Any], Any]]) -> Any:
    """A command with options, which its help lists in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def scheme_options(command: Any) -> Any:
    """The options that say how a network is quantized."""
    options = [
        click.option(
            "--scheme",
            metavar="auto|paper|SCHEME",
            show_default="auto",
            help="How a network is quantized: auto, of several schemes the one whose outputs diverge least from the "
            "float network's; paper, which is percentile:1; or one, as in mse+per-channel+bias-correct.",
        ),
        click.option(
            "--ranges",
            show_default="percentile:1, where one of the following is given",
            help="Activation ranges: minmax, percentile:P (P % clipped at the top and at the bottom), or mse (least "
            "squared error).",
        ),
        click.option(
            "--per-channel", is_flag=True, help="A weight scale for each output channel, not for each tensor."
        ),
        click.option(
            "--equalize", is_flag=True, help="Cross-layer equalization: the same function, weight ranges evened out."
        ),
        click.option(
            "--bias-correct", is_flag=True, help="Correct the means that quantization shifts, in the int32 biases."
        ),
    ]
    return add_options(command, options)


def parse_scheme_options(options: dict[str, Any]) -> str:
    """The scheme that the options of `scheme_options` name, as text. Raises FnetError for two that contradict."""
    from fnet_search.quant.scheme import AUTO, PAPER, Scheme, parse_ranges

    parts = ("ranges", "per_channel", "equalize", "bias_correct")
    given = [f"--{name.replace('_', '-')}" for name in parts if options[name]]
    if options["scheme"] is not None and given:
        raise FnetError(f"--scheme says all of how to quantize; leave it or {', '.join(given)} out")
    if not given:
        return options["scheme"] or AUTO
    ranges = PAPER.ranges if options["ranges"] is None else parse_ranges(options["ranges"])
    return str(Scheme(ranges, options["per_channel"], options["equalize"], options["bias_correct"]))


def space_options(command: Any) -> Any:
    """The options that say which network, and what of it may be factorized."""
    options = [
        click.option(
            "--input",
            "input_shape",
            metavar="CxHxW",
            show_default="as large as the data set's images",
            help="Of an imported network: the image that it reads, as in 3x224x224.",
        ),
        click.option(
            "--weights",
            metavar="FILE|NAME|own",
            help="Trained weights, which candidates start from: a file (safetensors, as runs leave them, or a state "
            "dict that torch saved); of an imported network also one of torchvision's (DEFAULT), or own for those that "
            "it comes with.",
        ),
        click.option(
            "--normalise",
            metavar="MEAN/STD",
            show_default="with those of the training images",
            help="What its weights want images normalised with, a channel in [0, 1]: imagenet, or a number a channel, "
            "as in 0.5,0.5,0.5/0.2,0.2,0.2.",
        ),
        click.option(
            "--factorize",
            metavar="PATTERN",
            multiple=True,
            help="Convolutions to factorize too, by name, as in 'layer4.*'; may be given several times.",
        ),
        click.option("--keep", metavar="PATTERN", multiple=True, help="Convolutions to leave as they are."),
    ]
    return add_options(command, options)


def parse_shape(text: str | None) -> tuple[int, int, int] | None:
    """Of ``--input``. Raises FnetError for anything but three positive integers."""
    if text is None:
        return None
    sizes = re.fullmatch(r"(\d{1,5})x(\d{1,5})x(\d{1,5})", text.strip().lower())
    if sizes is None or not all(map(int, sizes.groups())):
        raise FnetError(f"--input {text}: write channels, height and width, as in 3x224x224")
    return int(sizes[1]), int(sizes[2]), int(sizes[3])


def quiet() -> None:
    """Optuna reports each trial on its own; we have our own lines for that."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)


data_dir_option = click.option(
    "--data-dir", type=click.Path(path_type=Path), default=Path("data"), help="Where torchvision's data sets lie."
)


validation_option = click.option(
    "--validation",
    metavar="PATH",
    show_default="val/ of the image folder; else held out of the training images",
    help="Folder of class folders whose images candidates are compared on.",
)
moved_option = click.option(
    "--validation", metavar="PATH", show_default="as recorded", help="Where the same validation images are now."
)
dataset_option = click.option(
    "--dataset",
    show_default="as the run",
    help="Where the run's images are here: imagefolder:PATH. Others are refused, by their fingerprint.",
)


def _check_duration(context: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    """Before a command imports torch for what is no time."""
    if text is not None:
        parse_duration(text, "time_limit")
    return text


def machine_options(command: Any) -> Any:
    """Where and how a command trains, how long, and where its data are."""
    options = [
        click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N."),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "tf32", "bfloat16"]),
            default="auto",
            help="Arithmetic of the training; auto measures what this device is fast with.",
        ),
        click.option(
            "--fused/--no-fused",
            default=None,
            show_default="what is measured to be faster",
            help="Train with BatchNorm and ReLU in one pass, compiled by torch.compile; takes a C++ compiler.",
        ),
        click.option(
            "--workers",
            type=click.IntRange(0),
            show_default="one per core; on CUDA 2",
            help="Processes that train candidates at the same time; 0: this process trains, for debugging.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(1),
            show_default="1, or a worker's share of the cores if that is measured to be faster",
            help="Threads of a worker on the CPU.",
        ),
        click.option(
            "--numerics-of",
            metavar="RUN",
            type=click.Path(path_type=Path),
            help="Compute as this earlier run did, measuring nothing: equal runs then give equal bits.",
        ),
        click.option(
            "--time-limit",
            metavar="TIME",
            callback=_check_duration,
            help="Stop at the end of an epoch within 25m, 1h30m, ...; the same command goes on. Exit code 5.",
        ),
        click.option("--download", is_flag=True, help="Let torchvision download a data set that is not there."),
        click.option("--skip-unreadable", is_flag=True, help="Leave out images that cannot be read, and name them."),
    ]
    return data_dir_option(add_options(command, options))


def machine_of(options: dict[str, Any]) -> "Machine":
    from fnet_search.engine.request import Machine

    return Machine(**{field.name: options[field.name] for field in fields(Machine)})


def until_time_is_up(options: dict[str, Any], work: "Callable[[TerminalDisplay, Deadline | None], T]") -> T:
    """Does the work of a command with ``--time-limit``, showing its progress; at the limit exits with TIME_UP."""
    from fnet_search.base.terminal import console
    from fnet_search.engine.progress import TerminalDisplay
    from fnet_search.training.deadline import Deadline, TimeUp

    limit = options["time_limit"]
    deadline = None if limit is None else Deadline(parse_duration(limit, "time_limit"))
    quiet()
    with TerminalDisplay(console()) as display:
        try:
            return work(display, deadline)
        except TimeUp:
            display.say(f"time limit of {limit} reached, {display.left()}; the same command goes on from here")
            sys.exit(TIME_UP)
