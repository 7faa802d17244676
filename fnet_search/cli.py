"""The command line. Heavy modules are imported inside the commands, so that ``--help`` answers at once."""

import json
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fnet_search import __version__
from fnet_search.commands import analyze, audit, export, latency, quantize
from fnet_search.errors import FnetError
from fnet_search.options import (
    NOTHING_FEASIBLE,
    Commands,
    add_options,
    dataset_option,
    machine_of,
    machine_options,
    moved_option,
    parse_scheme_options,
    parse_shape,
    quiet,
    scheme_options,
    space_options,
    until_time_is_up,
    validation_option,
)
from fnet_search.study_commands import study
from fnet_search.terminal import PlainTable, console

if TYPE_CHECKING:
    from fnet_search.macro import Macroarchitecture
    from fnet_search.outcome import Outcome
    from fnet_search.plan import FactorizationPlan

T = TypeVar("T")

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120, "show_default": True}


@click.group(cls=Commands, context_settings=_SETTINGS, invoke_without_command=True)
@click.version_option(__version__, prog_name="fnet-search")
@click.option(
    "--debug", is_flag=True, expose_value=False, help="Of an error, show the whole trace too; of any command."
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Factorize a CNN layer by layer under a MAC budget and a quint8 accuracy floor.

    \b
    Start with:  fnet-search run --budget 120MMAC
    Look at a space:  fnet-search show factorizenet --plan init2
    Share its work:  run --storage, worker
    On what a run left:  dashboard, export, audit, quantize, analyze, latency, report
    The paper's table and figures:  study
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _shared(command: Any) -> Any:
    """Options that `run` and `evaluate` have in common."""
    options = [
        click.option(
            "--space",
            default="factorizenet",
            help="A shipped space, the path of a TOML file, torchvision:NAME, or FILE.py:FUNCTION or package:FUNCTION, "
            "which is run and returns a torch module.",
        ),
        click.option(
            "--dataset",
            default="digits",
            help="digits, cifar10, cifar100, fashion-mnist, or imagefolder:PATH (class folders in train/, test/ and, "
            "for validation, val/).",
        ),
        validation_option,
        click.option(
            "--recipe",
            show_default="quick; with --finetune finetune",
            help="How candidates are trained: quick, paper, finetune, or the path of a TOML file.",
        ),
        click.option("--epochs", type=click.IntRange(1), show_default="the recipe's", help="Epochs of each training."),
        click.option(
            "--class-weights",
            type=click.Choice(["none", "balanced"]),
            show_default="the recipe's",
            help="What an image counts in the training: all alike, or so that all classes count alike.",
        ),
        click.option(
            "--finetune",
            is_flag=True,
            help="Train a network with --weights on the data set first, gently; its last layer anew for other classes.",
        ),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Seed of policy and trainings."),
        click.option(
            "--out",
            type=click.Path(path_type=Path),
            show_default="runs/<study name>",
            help="Run folder; an earlier run in it goes on. Its name is the study's.",
        ),
        click.option(
            "--storage",
            envvar="FNET_SEARCH_STORAGE",
            show_default="a journal file in the run folder",
            help="Optuna storage URL, as in postgresql+psycopg://USER@HOST/DB, mysql+pymysql://..., grpc://HOST:PORT, "
            "journal:PATH. On the study of run others may work too: fnet-search worker.",
        ),
    ]
    return space_options(scheme_options(machine_options(add_options(command, options))))


_artifacts = click.option(
    "--artifacts",
    metavar="FOLDER|s3://BUCKET|gs://BUCKET",
    help="Where the weights lie that workers start from: a folder that all of them see, or a bucket; with --storage.  "
    "[default: in the run folder; for a worker, as the run says]",
)


@cli.command()
@click.option(
    "--budget", required=True, help="Most conv MACs: 120MMAC, 0.12GMAC, 120e6, or 45% of the unfactorized network."
)
@click.option("--min-quint8", help="Least quint8 accuracy on the validation split, as in 0.8 or 80%.")
@click.option("--max-drop", help="Largest relative drop from fp32 to quint8 accuracy, as in 5%.")
@click.option("--max-params", help="Most parameters, as in 2M.")
@click.option(
    "--metric",
    type=click.Choice(["accuracy", "balanced-accuracy"]),
    default="accuracy",
    help="What candidates are compared by, and --min-quint8 and --max-drop are of. Balanced accuracy is the mean over "
    "classes: all count alike, however few images they have.",
)
@click.option(
    "--policy",
    default="layer-guided",
    help="What proposes plans: layer-guided, greedy, fisher, progressive-doubling, reverse-pyramid, tpe, nsga2, "
    "random, an installed plug-in, or a class of your own: FILE.py:NAME.",
)
@click.option(
    "--audit",
    type=click.Choice(["winner", "all"]),
    default="winner",
    help="Whose ONNX export is run in ONNX Runtime and held against the integer simulator, code for code.",
)
@click.option("--trials", type=click.IntRange(1), default=6, help="Candidates to train; refused plans do not count.")
@click.option(
    "--warm-start/--no-warm-start",
    default=True,
    help="Train the regular network first, above the budget too, and start candidates from trained networks.",
)
@click.option(
    "--warm-epochs",
    type=click.FloatRange(0, min_open=True),
    show_default="a fifth of --epochs",
    help="Epochs of candidates that start from a trained network: whole ones, or a part of one, as in 0.25.",
)
@click.option(
    "--prune/--no-prune",
    default=True,
    help="Stop candidates that are behind the others after equal epochs, early; takes two epochs or more.",
)
@click.option(
    "--final-epochs",
    type=click.IntRange(0),
    show_default="--epochs with --warm-start, else none",
    help="Epochs that the best candidate is trained on for at the end of the search; unless it had them from scratch.",
)
@_artifacts
@click.option(
    "--lease",
    type=click.IntRange(2),
    default=120,
    help="Seconds after which a candidate whose worker is silent is taken over; with --storage.",
)
@_shared
def run(**options: Any) -> None:
    """Search the best network under a budget; the same command again goes on where it stopped.

    Candidates are compared on validation images, val/ of the image folder or held out of the training images; the
    winner is measured on the test split once. Exit code 3: no candidate met the constraints, the nearest is named.
    """
    from fnet_search.api import search

    given = ("space", "dataset", "budget", "min_quint8", "max_drop", "max_params", "policy", "trials", "recipe")
    more = ("metric", "epochs", "class_weights", "warm_start", "warm_epochs", "prune", "final_epochs", "finetune")
    shared = ("seed", "out", "storage", "artifacts", "lease", "validation")
    asked = {name: options[name] for name in (*given, *more, *shared)}
    outcome = _work(search, options, **asked, audit_all=options["audit"] == "all")
    if not outcome.feasible:
        sys.exit(NOTHING_FEASIBLE)


@cli.command()
@click.option(
    "--plan",
    "plans",
    multiple=True,
    required=True,
    help="regular, f2, init2, dws, layer=rate,... or the path of a plan file; may be given several times.",
)
@click.option(
    "--split",
    type=click.Choice(["test", "validation"]),
    default="test",
    help="What networks are measured on: test images, for reporting, or validation images, to choose by.",
)
@_shared
def evaluate(**options: Any) -> None:
    """Train, quantize and profile given plans, with no policy.

    Trains on all training images (but for those that are held out, with --split validation), measures each network on
    the split, and audits its export there. More plans may be added to an earlier run in the same folder.
    """
    from fnet_search.api import evaluate as evaluate_plans

    given = ("plans", "space", "dataset", "split", "validation", "recipe", "epochs", "class_weights")
    more = ("finetune", "seed", "out", "storage")
    _work(evaluate_plans, options, **{name: options[name] for name in (*given, *more)})


@cli.command()
@click.option("--storage", required=True, envvar="FNET_SEARCH_STORAGE", help="Optuna storage URL of the run.")
@click.option("--study", required=True, help="Name of the run's study: that of its folder.")
@dataset_option
@moved_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    show_default="runs/<study>-worker",
    help="Folder of this worker; started again in it, it goes on with what it was at.",
)
@_artifacts
@machine_options
def worker(
    study: str,
    storage: str,
    dataset: str | None,
    validation: str | None,
    out: Path | None,
    artifacts: str | None,
    **more: Any,
) -> None:
    """Work on the search of another host, until it is done; several workers share its candidates.

    The run, fnet-search run --storage URL, leaves its configuration in the storage and weights in its --artifacts. What
    a worker that vanishes was at is taken over by others.
    """
    from fnet_search.api import absolute, absolute_path, folder_of
    from fnet_search.run import join_study
    from fnet_search.runfolder import RunFolder

    folder = RunFolder(folder_of(out, f"{study}-worker"))
    machine, images = machine_of(more), None if dataset is None else absolute(dataset)
    where = images, absolute_path(validation), artifacts
    done = until_time_is_up(
        more, lambda display, until: join_study(storage, study, folder, machine, *where, display, until)
    )
    click.echo(done)


@cli.command()
@click.argument("space_name", metavar="SPACE")
@click.option(
    "--plan", "plan_text", default="regular", help="regular, f2, init2, dws, layer=rate,... or the path of a plan file."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--draw", type=click.Path(path_type=Path, dir_okay=False), help="Draw the network into this PNG file.")
@click.option(
    "--save",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Save the space as this TOML file, with --weights those too, beside it; it loads without the code it is from.",
)
@space_options
def show(
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
    """Print a space under a plan: a row a layer with shapes, rates, MACs and parameters, and the totals.

    SPACE as of run; an imported network reads 224 pixels a side unless --input says otherwise.
    """
    from fnet_search.macro import factorizing, load_space, normalising, save_space
    from fnet_search.plan import parse_plan

    space = normalising(load_space(space_name, parse_shape(input_shape), weights), normalise)
    space = factorizing(space, factorize, keep)
    plan = parse_plan(space, plan_text)
    if save is not None and save.suffix != ".toml":
        raise FnetError(f"--save {save}: a space is a TOML file; name it {save.with_suffix('.toml')}")
    if save is not None and not save.parent.is_dir():
        raise FnetError(f"--save {save}: the folder {save.parent} does not exist")
    beside = None if save is None or weights is None else save.with_suffix(".safetensors")
    if beside is not None and beside.resolve() == Path(str(weights)).resolve():
        raise FnetError(f"--save {save} would write over the weights that are read, {weights}; choose another name")
    if draw is not None:
        from fnet_search.draw import draw as draw_network

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


@cli.command("list")
@click.argument("what", type=click.Choice(["spaces", "policies", "recipes"]))
def list_(what: str) -> None:
    """List the spaces, policies or recipes that can be named; all of them may be of your own too."""
    for name, text in {"spaces": _spaces, "policies": _policies, "recipes": _recipes}[what]():
        click.echo(f"{name:24}  {text}")


def _spaces() -> "Iterator[tuple[str, str]]":
    from fnet_search import resources
    from fnet_search.imported import torchvision_names
    from fnet_search.macro import load_space
    from fnet_search.plan import network_cost
    from fnet_search.quantities import mmac

    for name in resources.names("spaces"):
        space = load_space(name)
        yield name, f"{mmac(network_cost(space).conv_macs)}; {space.description}"
    yield "FILE.toml", "a space of your own, or one that show --save wrote"
    yield "FILE.py:FUNCTION", "what a function of your own returns, a torch module; package.module:FUNCTION too"
    yield "torchvision:NAME", f"a classifier of torchvision: {', '.join(torchvision_names())}"


def _policies() -> "Iterator[tuple[str, str]]":
    from fnet_search.policy import load_policy, policy_names

    for name in policy_names():
        yield name, (type(load_policy(name)).__doc__ or "").strip().splitlines()[0].replace("``", "")
    yield "FILE.py:NAME", "a class of your own with suggest(history); package.module:NAME too"


def _recipes() -> "Iterator[tuple[str, str]]":
    from fnet_search import resources
    from fnet_search.recipe import load_recipe

    for name in resources.names("recipes"):
        one = load_recipe(name)
        yield name, f"{one.epochs} epochs in batches of {one.batch_size}, {one.schedule}, rate {one.learning_rate:g}"


@cli.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--storage", show_default="the journal file in the run folder", help="Optuna storage URL.")
def report(folder: Path, storage: str | None) -> None:
    """Make the figures and the report of a run again, and print its table."""
    from fnet_search.progress import TerminalDisplay
    from fnet_search.recorded import open_run
    from fnet_search.run import open_study, report_again

    quiet()
    opened = open_run(folder)
    with TerminalDisplay(console()) as display, opened.run.locked():
        display.status("drawing figures and the report")
        outcome = report_again(open_study(opened, storage))
    _print_outcome(outcome)


@cli.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--port", type=click.IntRange(0, 65535), default=8080, help="0: any that is free.")
@click.option("--host", default="127.0.0.1", help="Address to listen on; any other lets others in, without a password.")
@click.option("--storage", show_default="the journal file in the run folder", help="Optuna storage URL.")
def dashboard(folder: Path, port: int, host: str, storage: str | None) -> None:
    """Show a run in the Optuna dashboard, in a browser; a search may go on meanwhile.

    Notes explain the study and each of its trials, and are kept in the study.
    """
    from fnet_search.recorded import open_run

    opened = open_run(folder)
    try:
        from fnet_search.dashboard import open_dashboard
    except ImportError as error:
        raise FnetError(f'{error.name} is not installed; pip install "fnet-search[dashboard]"') from None
    quiet()
    shown = open_dashboard(opened, storage)
    with shown.serve(host, port) as server:
        shown.annotate()
        shown.watch()
        click.echo(f"http://{host}:{server.server_port}/dashboard/studies/{shown.study._study_id} (Ctrl-C ends it)")
        with suppress(KeyboardInterrupt):
            server.serve_forever()


for _command in (export, audit, quantize, analyze, latency, study):
    cli.add_command(_command)


def _work(call: "Callable[..., Outcome]", options: dict[str, Any], **asked: Any) -> "Outcome":
    """Makes one of the calls of `api`, prints what comes out, and returns it."""
    asked |= {name: options[name] for name in ("weights", "normalise", "factorize", "keep")}
    asked |= {"input_shape": parse_shape(options["input_shape"]), "scheme": parse_scheme_options(options)}
    asked |= {"machine": machine_of(options)}
    outcome = until_time_is_up(options, lambda display, until: call(**asked, display=display, deadline=until))
    _print_outcome(outcome)
    return outcome


def _print_outcome(outcome: "Outcome") -> None:
    from fnet_search.progress import candidates_table

    console().print(candidates_table(outcome))
    click.echo(f"report: {outcome.report}")
    for text in outcome.cautions:
        click.echo(f"warning: {text}")
    click.echo(outcome.headline())


def _described(space: "Macroarchitecture", plan: "FactorizationPlan") -> dict[str, Any]:
    """A space under a plan as JSON-able data; shapes without the batch."""
    from dataclasses import asdict

    from fnet_search.plan import factorize, label, layer_cost, legal_rates, plan_cost

    network = factorize(space, plan)
    legal = legal_rates(space)
    layers = []
    for node in network.order:
        origin = node.name.removesuffix(".grouped")
        inputs = network.input_shapes(node)
        layers.append(
            {
                "name": node.name,
                "kind": node.layer.kind,
                "inputs": list(node.inputs),
                "input_shapes": [list(shape) for shape in inputs],
                "output_shape": list(network.shapes[node.name]),
                "legal_rates": list(legal[origin]) if origin in legal else None,
                "rate": plan[origin] if origin in legal else None,
                **{key: value for key, value in asdict(layer_cost(node, inputs)).items() if key != "conv_macs"},
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
    from fnet_search.quantities import mmac, size_text

    shown = _described(space, plan)
    about = f": {space.description}" if space.description else ""
    title = f"{space.name}{about}; plan {shown['plan']['label']}"
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
        for layer in shown["layers"]
    ]
    texts = {"layer": 20, "kind": 10, "input": 10, "output": 10, "legal rates": 12}
    names = (*texts, "rate", "MACs", "parameters")
    console().print(PlainTable(title, names, rows, texts, ("kind", "input", "parameters", "output", "MACs")))
    click.echo(
        f"conv MACs {shown['conv_macs']:,} ({mmac(shown['conv_macs'])}), total MACs {shown['total_macs']:,}, "
        f"parameters {shown['params']:,}"
    )


class _Terminated(BaseException):
    """SIGTERM has come."""


def _terminate(*_: object) -> None:
    raise _Terminated


DEBUG = "--debug"


def main() -> None:
    """Entry point: errors are one line on stderr, with exit code 2; Ctrl-C gives 130, SIGTERM 143."""
    signal.signal(signal.SIGTERM, _terminate)
    warnings.filterwarnings("ignore", "Glyph .*missing from font|constrained_layout not applied")  # of a picture
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a path may have letters that the terminal's encoding has not
            stream.reconfigure(errors="backslashreplace")
    arguments = [one for one in sys.argv[1:] if one != DEBUG]
    try:
        code = cli.main(arguments, "fnet-search", standalone_mode=False)
    except FnetError as error:
        code = _fail(str(error))
    except click.ClickException as error:
        code = _fail(error.format_message())
    except OSError as error:  # a full disk, a folder that may not be written
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
    click.echo("interrupted; the same command goes on from here", err=True)
    return 128 + by


if __name__ == "__main__":
    main()
