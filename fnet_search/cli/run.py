"""The commands that train: run, evaluate, worker."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fnet_search.cli.printing import print_outcome
from fnet_search.cli.shared_options import (
    NOTHING_FEASIBLE,
    add_options,
    dataset_option,
    machine_of,
    machine_options,
    moved_option,
    parse_scheme_options,
    parse_shape,
    scheme_options,
    space_options,
    until_time_is_up,
    validation_option,
    weight_type_option,
)

if TYPE_CHECKING:
    from fnet_search.engine.arguments import EvaluateArguments, SearchArguments
    from fnet_search.report.outcome import Outcome


def _shared(command: Any) -> Any:
    """Adds the options that `run` and `evaluate` share."""
    options = [
        click.option(
            "--space",
            default="factorizenet",
            help="Network: a shipped space, the path of a TOML file, torchvision:NAME, or FILE.py:FUNCTION or "
            "package:FUNCTION, which is called and must return a torch module.",
        ),
        click.option(
            "--dataset",
            default="digits",
            help="Data set: digits, cifar10, cifar100, fashion-mnist, or imagefolder:PATH (class folders in train/, "
            "test/ and, for validation, val/).",
        ),
        validation_option,
        click.option(
            "--recipe",
            show_default="quick, or finetune with --finetune",
            help="Training recipe: quick, paper, finetune, or the path of a TOML file.",
        ),
        click.option("--epochs", type=click.IntRange(1), show_default="the recipe's", help="Epochs of each training."),
        click.option(
            "--class-weights",
            type=click.Choice(["none", "balanced"]),
            show_default="the recipe's",
            help="Weights of images in the loss: none (all the same) or balanced (all classes count the same).",
        ),
        click.option(
            "--finetune",
            is_flag=True,
            help="Fine-tune the network of --weights on the data set first; for other classes, with a new last layer.",
        ),
        click.option(
            "--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Seed of the policy and of all trainings."
        ),
        weight_type_option,
        click.option(
            "--out",
            type=click.Path(path_type=Path),
            show_default="runs/<study name>",
            help="Run folder; an earlier run in it is resumed. The study is named after it.",
        ),
        click.option(
            "--storage",
            envvar="FNET_SEARCH_STORAGE",
            show_default="a journal file in the run folder",
            help="Optuna storage URL, as in postgresql+psycopg://USER@HOST/DB, mysql+pymysql://..., grpc://HOST:PORT, "
            "journal:PATH. Other hosts can join a search there with fnet-search worker.",
        ),
    ]
    return space_options(scheme_options(machine_options(add_options(command, options))))


_artifacts = click.option(
    "--artifacts",
    metavar="FOLDER|s3://BUCKET|gs://BUCKET",
    help="Store of the weights that workers start from: a folder that all of them see, or a bucket. Requires "
    "--storage.  [default: in the run folder; for a worker, that of the run]",
)


@click.command()
@click.option(
    "--budget",
    required=True,
    help="Largest number of conv MACs: 120MMAC, 0.12GMAC, 120e6, or 45% of the unfactorized network.",
)
@click.option("--min-quint8", help="Smallest quint8 accuracy on the validation split, as in 0.8 or 80%.")
@click.option("--max-drop", help="Largest relative drop from fp32 to quint8 accuracy, as in 5%.")
@click.option("--max-params", help="Largest number of parameters, as in 2M.")
@click.option(
    "--metric",
    type=click.Choice(["accuracy", "balanced-accuracy"]),
    default="accuracy",
    help="Metric that ranks candidates and that --min-quint8 and --max-drop limit. Balanced accuracy is the mean of "
    "the accuracies of all classes, however few images they have.",
)
@click.option(
    "--policy",
    default="layer-guided",
    help="Search policy: layer-guided, greedy, fisher, progressive-doubling, reverse-pyramid, tpe, nsga2, random, an "
    "installed plug-in, or your own class as FILE.py:NAME.",
)
@click.option(
    "--audit",
    type=click.Choice(["winner", "all"]),
    default="winner",
    help="Networks whose ONNX export is compared in ONNX Runtime with the integer simulator, code for code.",
)
@click.option(
    "--trials", type=click.IntRange(1), default=6, help="Number of candidates to train; refused plans do not count."
)
@click.option(
    "--warm-start/--no-warm-start",
    default=True,
    help="Train the regular network first, even if it exceeds the budget, and start candidates from trained networks.",
)
@click.option(
    "--warm-epochs",
    type=click.FloatRange(0, min_open=True),
    show_default="a fifth of --epochs",
    help="Epochs of candidates that start from a trained network: a whole number, or a part of one epoch, as in 0.25.",
)
@click.option(
    "--prune/--no-prune",
    default=True,
    help="Stop candidates early that are behind others after the same epochs. Requires at least two epochs.",
)
@click.option(
    "--final-epochs",
    type=click.IntRange(0),
    show_default="--epochs with --warm-start, else none",
    help="Further epochs for the best candidate at the end of the search, unless it had as many from scratch.",
)
@_artifacts
@click.option(
    "--lease",
    type=click.IntRange(2),
    default=120,
    help="Seconds without a sign of its worker after which a candidate is taken over. Requires --storage.",
)
@_shared
def run(**options: Any) -> None:
    """Search for the best network under a budget. The same command resumes a search that stopped.

    Candidates are compared on validation images: val/ of the image folder, or a part of the training images. Only the
    winner is measured on the test split, once. Exit code 3: no candidate met the constraints; the nearest is named.
    """
    from fnet_search.engine.arguments import SearchArguments

    outcome = _work(SearchArguments, {**options, "audit_all": options["audit"] == "all"})
    if not outcome.feasible:
        sys.exit(NOTHING_FEASIBLE)


@click.command()
@click.option(
    "--plan",
    "plans",
    multiple=True,
    required=True,
    help="Plan: regular, f2, init2, dws, layer=rate,... or the path of a plan file. May be repeated.",
)
@click.option(
    "--split",
    type=click.Choice(["test", "validation"]),
    default="test",
    help="Images that networks are measured on: test for reporting, validation for choosing among them.",
)
@_shared
def evaluate(**options: Any) -> None:
    """Train, quantize and profile given plans, without a search.

    Trains on all training images (with --split validation, except those held out), measures each network on the split,
    and audits its export there. More plans may be added to an earlier run in the same folder.
    """
    from fnet_search.engine.arguments import EvaluateArguments

    _work(EvaluateArguments, options)


@click.command()
@click.option("--storage", required=True, envvar="FNET_SEARCH_STORAGE", help="Optuna storage URL of the run.")
@click.option("--study", required=True, help="Name of the run's study, which is the name of its folder.")
@dataset_option
@moved_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    show_default="runs/<study>-worker",
    help="Folder of this worker. A worker restarted with the same folder resumes its candidates.",
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
    """Join the search of another host until it is done; several workers share its candidates.

    The run, started with fnet-search run --storage URL, keeps its configuration in the storage and weights in its
    --artifacts. If a worker vanishes, others take over its candidates.
    """
    from fnet_search.optuna_bridge.storage_url import check_there

    check_there(storage, new=False)  # before Optuna and torch are imported
    from fnet_search.engine.arguments import absolute, absolute_path, folder_of
    from fnet_search.engine.request import JoinRequest
    from fnet_search.engine.run import join_study
    from fnet_search.rundir.run_folder import RunFolder

    folder = RunFolder(folder_of(out, f"{study}-worker"))
    dataset = None if dataset is None else absolute(dataset)
    join = JoinRequest(storage, study, machine_of(more), dataset, absolute_path(validation), artifacts)
    click.echo(until_time_is_up(more, lambda display, until: join_study(join, folder, display, until)))


def _work(kind: "type[SearchArguments | EvaluateArguments]", options: dict[str, Any]) -> "Outcome":
    """Runs the request that the options make as arguments of this kind, then prints and returns the outcome."""
    from fnet_search.api import run_request

    given = {**options, "input_shape": parse_shape(options["input_shape"]), "scheme": parse_scheme_options(options)}
    given["machine"] = machine_of(options)
    arguments = kind(**{field.name: given[field.name] for field in fields(kind) if field.name in given})
    arguments.check_paths(arguments.dataset)
    request = arguments.request()
    folder = arguments.folder(request)
    outcome = until_time_is_up(options, lambda display, until: run_request(request, folder, display, until))
    print_outcome(outcome)
    return outcome
