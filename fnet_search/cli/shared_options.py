"""Options that several commands share, and their parsing."""

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
"""Exit code if no candidate of a search met the constraints."""
TIME_UP = 5
"""Exit code if the time limit stopped the command."""


class Commands(click.Group):
    """A group of commands whose errors name options. An unknown command raises FnetError with the nearest name."""

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
    """The message with each parameter in backquotes replaced by the command's option for it, if there is one."""
    options = dict[str | None, str]()
    for option in (parameter for parameter in command.params if isinstance(parameter, click.Option)):
        words = [name.removeprefix("--").replace("-", "_") for name in option.opts]
        options |= dict.fromkeys((option.name, *words), option.opts[0])
    return re.sub(r"`(\w+)`", lambda match: options.get(match[1], match[0]), message)


def add_options(command: Any, options: Sequence[Callable[[Any], Any]]) -> Any:
    """Adds options to a command, in the order in which its help lists them."""
    for option in reversed(options):
        command = option(command)
    return command


def scheme_options(command: Any) -> Any:
    """Adds the options of the quantization scheme."""
    options = [
        click.option(
            "--scheme",
            metavar="auto|paper|SCHEME",
            show_default="auto",
            help="Quantization scheme: auto (tries several, keeps the one whose outputs diverge least from the float "
            "network's), paper (percentile:1), or a scheme such as mse+per-channel+bias-correct.",
        ),
        click.option(
            "--ranges",
            show_default="percentile:1 with any of the next three options",
            help="Activation ranges: minmax, percentile:P (clips P % at the top and at the bottom), or mse (least "
            "squared error).",
        ),
        click.option(
            "--per-channel", is_flag=True, help="Use a weight scale for each output channel instead of each tensor."
        ),
        click.option(
            "--equalize",
            is_flag=True,
            help="Even out weight ranges between layers without changing the function (cross-layer equalization).",
        ),
        click.option(
            "--bias-correct",
            is_flag=True,
            help="Correct the means that quantization shifts, by changing the int32 biases.",
        ),
    ]
    return add_options(command, options)


def parse_scheme_options(options: dict[str, Any]) -> str:
    """The text of the scheme that the options of `scheme_options` give. Raises FnetError if they contradict."""
    from fnet_search.quant.scheme import AUTO, PAPER, Scheme, parse_ranges

    names = ("ranges", "per_channel", "equalize", "bias_correct")
    given = [f"--{name.replace('_', '-')}" for name in names if options[name]]
    if options["scheme"] is not None and given:
        raise FnetError(f"--scheme cannot be combined with {', '.join(given)}: a scheme includes them")
    if not given:
        return options["scheme"] or AUTO
    ranges = PAPER.ranges if options["ranges"] is None else parse_ranges(options["ranges"])
    return str(Scheme(ranges, options["per_channel"], options["equalize"], options["bias_correct"]))


def space_options(command: Any) -> Any:
    """Adds the options of the network and of its layers that may be factorized."""
    options = [
        click.option(
            "--input",
            "input_shape",
            metavar="CxHxW",
            show_default="size of the data set's images",
            help="Input shape of an imported network, as in 3x224x224.",
        ),
        click.option(
            "--weights",
            metavar="FILE|NAME|own",
            help="Trained weights that candidates start from: a file (safetensors, as runs write them, or a state dict "
            "saved by torch); for an imported network also the name of weights in torchvision (DEFAULT), or own for "
            "the weights that the module has.",
        ),
        click.option(
            "--normalise",
            metavar="MEAN/STD",
            show_default="those of the training images",
            help="Mean and standard deviation that the weights expect images to be normalised with, on the scale "
            "[0, 1]: imagenet, or a number for each channel, as in 0.5,0.5,0.5/0.2,0.2,0.2.",
        ),
        click.option(
            "--factorize",
            metavar="PATTERN",
            multiple=True,
            help="Pattern of names of further convolutions to factorize, as in 'layer4.*'. May be repeated.",
        ),
        click.option(
            "--keep",
            metavar="PATTERN",
            multiple=True,
            help="Pattern of names of convolutions not to factorize. May be repeated.",
        ),
    ]
    return add_options(command, options)


def parse_shape(text: str | None) -> tuple[int, int, int] | None:
    """The (channels, height, width) of ``--input``. Raises FnetError for anything but three positive integers."""
    if text is None:
        return None
    sizes = re.fullmatch(r"(\d{1,5})x(\d{1,5})x(\d{1,5})", text.strip().lower())
    if sizes is None or not all(map(int, sizes.groups())):
        raise FnetError(f"--input {text}: write channels, height and width, as in 3x224x224")
    return int(sizes[1]), int(sizes[2]), int(sizes[3])


weight_type_option = click.option(
    "--weight-type",
    type=click.Choice(["int8", "uint8"]),
    show_default="as the run's files, int8 in a new run",
    help="How ONNX files store weights: int8 has faster kernels; the results are the same, bit for bit.",
)


def quiet() -> None:
    """Silences Optuna's own line for each trial, which the display shows already."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)


data_dir_option = click.option(
    "--data-dir", type=click.Path(path_type=Path), default=Path("data"), help="Folder of torchvision's data sets."
)


validation_option = click.option(
    "--validation",
    metavar="PATH",
    show_default="val/ of the image folder, else a part of the training images",
    help="Folder of class folders with the images that candidates are compared on.",
)
moved_option = click.option(
    "--validation", metavar="PATH", show_default="as recorded", help="Where the run's validation images are now."
)
dataset_option = click.option(
    "--dataset",
    show_default="as recorded",
    help="Where the run's images are now: imagefolder:PATH. Images with another fingerprint are refused.",
)


def _check_duration(context: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    """Checks the duration at once, before the command imports torch, which takes seconds."""
    if text is not None:
        parse_duration(text, "time_limit")
    return text


def machine_options(command: Any) -> Any:
    """Adds the options of the device, its numerics, the workers, the time limit and the data."""
    options = [
        click.option("--device", default="auto", help="Device: auto, cpu, cuda or cuda:N."),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "tf32", "bfloat16"]),
            default="auto",
            help="Arithmetic of the training; auto measures which is fastest on this device.",
        ),
        click.option(
            "--fused/--no-fused",
            default=None,
            show_default="the faster one, as measured",
            help="Train with BatchNorm and ReLU in one pass, compiled by torch.compile. Requires a C++ compiler.",
        ),
        click.option(
            "--workers",
            type=click.IntRange(0),
            show_default="one per core; on CUDA 2",
            help="Processes that train candidates in parallel. 0: train in this process, for debugging.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(1),
            show_default="1, or a worker's share of the cores if measured to be faster",
            help="CPU threads of each worker.",
        ),
        click.option(
            "--numerics-of",
            metavar="RUN",
            type=click.Path(path_type=Path),
            help="Use the numerics of this earlier run without measuring; equal runs then give equal bits.",
        ),
        click.option(
            "--time-limit",
            metavar="TIME",
            callback=_check_duration,
            help="Stop at the end of an epoch before this time is up (25m, 1h30m, ...), with exit code 5. The same "
            "command resumes.",
        ),
        click.option("--download", is_flag=True, help="Let torchvision download a missing data set."),
        click.option("--skip-unreadable", is_flag=True, help="Skip images that cannot be read, and list them."),
    ]
    return data_dir_option(add_options(command, options))


def machine_of(options: dict[str, Any]) -> "Machine":
    """The machine that the options of `machine_options` describe. Raises FnetError if they contradict each other."""
    from fnet_search.engine.request import Machine

    return Machine(**{field.name: options[field.name] for field in fields(Machine)})


def until_time_is_up(options: dict[str, Any], work: "Callable[[TerminalDisplay, Deadline | None], T]") -> T:
    """Calls `work` with a display and the deadline of ``--time-limit``; exits with TIME_UP at the limit."""
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
            display.say(f"time limit of {limit} reached, {display.left()}; run the same command again to resume")
            sys.exit(TIME_UP)
