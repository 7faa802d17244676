"""The commands that train: run, evaluate, worker."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fnet_search.cli.options import (
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
)
from fnet_search.cli.printing import print_outcome

if TYPE_CHECKING:
    from fnet_search.engine.arguments import EvaluateArguments, SearchArguments
    from fnet_search.report.outcome import Outcome


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


@click.command()
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
    help="What candidates are compared by, and --min-quint8 and --max-drop limit. Balanced accuracy is the mean over "
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
    from fnet_search.engine.arguments import EvaluateArguments

    _work(EvaluateArguments, options)


@click.command()
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
    from fnet_search.optuna_bridge.storage_url import check_there

    check_there(storage, new=False)  # before Optuna and torch are imported
    from fnet_search.engine.arguments import absolute, absolute_path, folder_of
    from fnet_search.engine.request import JoinRequest
    from fnet_search.engine.run import join_study
    from fnet_search.rundir.run_folder import RunFolder

    folder = RunFolder(folder_of(out, f"{study}-worker"))
    images = None if dataset is None else absolute(dataset)
    join = JoinRequest(storage, study, machine_of(more), images, absolute_path(validation), artifacts)
    click.echo(until_time_is_up(more, lambda display, until: join_study(join, folder, display, until)))


def _work(kind: "type[SearchArguments | EvaluateArguments]", options: dict[str, Any]) -> "Outcome":
    """Carries out what those of the options that are its arguments ask for, prints what comes out, and returns it."""
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
