"""The Python API of the command line: `search` and `evaluate`, which can be imported from `fnet_search`.

Both show their progress on the terminal and resume an earlier call with the same folder. If something is wrong with the
parameters, both raise FnetError, with a message of one line that says what would be right.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from fnet_search.base.terminal import console
from fnet_search.candidates.processes import start_server
from fnet_search.engine.arguments import EvaluateArguments, SearchArguments
from fnet_search.engine.request import Request
from fnet_search.report.outcome import Outcome

if TYPE_CHECKING:
    from fnet_search.engine.display import Display
    from fnet_search.training.deadline import Deadline

P = ParamSpec("P")
A = TypeVar("A")


def _with_parameters_of(arguments: Callable[P, A]) -> Callable[[Callable[[A], Outcome]], Callable[P, Outcome]]:
    """A decorator for a function of one dataclass: the function takes the fields of the dataclass as parameters, so
    that they are declared only once."""

    def decorate(function: Callable[[A], Outcome]) -> Callable[P, Outcome]:
        def call(*args: P.args, **kwargs: P.kwargs) -> Outcome:
            return function(arguments(*args, **kwargs))

        update_wrapper(call, function)
        parameters = inspect.signature(arguments).replace(return_annotation=Outcome)
        call.__signature__ = parameters  # type: ignore[attr-defined]  # read by `help` and `inspect`
        return call

    return decorate


@_with_parameters_of(SearchArguments)
def search(arguments: SearchArguments) -> Outcome:
    """Searches for the best network under a budget (paper, section 2). The command line calls this
    ``fnet-search run``, with options of the same names.

    Only the winner is measured on the test split, once; if an image folder has no test images, it is not. Files are
    written to the run folder `out`.

    Args:
        space: the network to factorize: a name, a path, an object, ``"torchvision:resnet18"`` or
            ``"mymodel.py:make"``.
        dataset: the name of a data set, or ``"imagefolder:PATH"``.
        budget: the most conv MACs: a number, ``"120MMAC"``, or ``"45%"`` of the unfactorized network.
        min_quint8, max_drop, max_params: further limits; accuracies and drops as fractions of 1, or as ``"80%"``.
        metric: ``"accuracy"`` or ``"balanced-accuracy"``: networks are compared by it, and limits on accuracy are
            limits on it.
        policy: a name, or an object with ``suggest(history)``.
        trials: the number of candidates to train.
        warm_start, warm_epochs, prune, final_epochs: how much of the recipe candidates get (`recipe.Fidelity`).
            `final_epochs` is by default the recipe's number of epochs, 0 without a warm start.
        validation: a folder of class folders, whose images candidates are compared on. Default: ``val/`` of the image
            folder; failing that, a part of the training images is held out.
        recipe, epochs: the recipe, and a number of epochs instead of its own. Default: ``"quick"``, or ``"finetune"``
            with `finetune`.
        class_weights: ``"none"`` or ``"balanced"``, instead of the recipe's.
        weights: the weights of an imported network (`modules.load_imported`), which candidates start from.
        finetune: trains these weights on the data set first; otherwise they are used as they are.
        input_shape: (C, H, W) of an imported network. Default: the size of the data set's images.
        normalise: the normalisation of images that the weights expect: ``"imagenet"`` or ``"MEAN/STD"``.
        factorize, keep: patterns of layer names (`macroarchitecture.factorizing`).
        scheme: how candidates are quantized: ``"auto"`` (of several schemes the one whose outputs diverge least from
            the float network's), ``"paper"``, or a scheme.
        seed: of the policy and of all trainings.
        audit_all: audits every candidate in ONNX Runtime, not only the winner.
        weight_type: how ONNX files store weights, ``"int8"`` or ``"uint8"``, with the same results. Default: as those
            of the run, int8 in a new one.
        out: the run folder. Default: ``runs/<space>-<data set>-<policy>-<budget>``.
        storage: URL of a storage (`storage.open_url`) in which the study is shared with workers that join it
            (`run.join_study`).
        artifacts: the artifact store with the weights that these workers need.
        lease: seconds after which a candidate is taken over whose worker has not renewed its lease.
        machine: where and how to compute.
        display: shows the progress instead of the terminal.

    Raises FnetError, and TimeUp at the `deadline`.
    """
    return _run(arguments)


@_with_parameters_of(EvaluateArguments)
def evaluate(arguments: EvaluateArguments) -> Outcome:
    """Trains, quantizes and profiles given plans, each from scratch. The command line calls this
    ``fnet-search evaluate``.

    ``outcome.evaluation(plan)`` is the evaluation of a plan. Plans that were evaluated in the folder `out` before are
    not trained again. Parameters that are not listed mean the same as in `search`.

    Args:
        plans: one plan or several, each an object, a name such as ``"init2"``, or ``"layer=rate,..."``.
        split: ``"test"``, for reporting, trains on all training images. A loop that chooses plans by the outcome needs
            ``"validation"``, whose images are those of `search`.
        out: the run folder. Default: ``runs/evaluate-<space>-<data set>``.

    Raises FnetError, and TimeUp at the `deadline`.
    """
    return _run(arguments)


def _run(arguments: SearchArguments | EvaluateArguments) -> Outcome:
    arguments.check_paths(arguments.dataset)
    request = arguments.request()
    return run_request(request, arguments.folder(request), arguments.display, arguments.deadline)


def run_request(
    request: Request, folder: Path, display: "Display | None" = None, deadline: "Deadline | None" = None
) -> Outcome:
    """Carries out a request in a run folder. Raises FnetError, and TimeUp at the `deadline`."""
    if request.machine.workers != 0:
        start_server(request.machine.threads or 1)
    import optuna  # this and the imports below take seconds, so the request is made and checked before them

    from fnet_search.engine.progress import TerminalDisplay
    from fnet_search.engine.run import run_study
    from fnet_search.rundir.run_folder import RunFolder

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the display reports the same events
    try:
        with TerminalDisplay(console()) if display is None else nullcontext(display) as shown:
            return run_study(request, RunFolder(folder), shown, deadline)
    finally:
        optuna.logging.set_verbosity(before)
