"""What the command line does, as calls: `search` and `evaluate`, which `fnet_search` itself names.

Both show their progress on the terminal, go on where an earlier call with the same folder stopped, and raise FnetError,
in one line that says what would be right, for whatever is wrong with what was asked.
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
    """Lets a function that takes a dataclass take its fields instead, so that they are declared once."""

    def decorate(function: Callable[[A], Outcome]) -> Callable[P, Outcome]:
        def call(*args: P.args, **kwargs: P.kwargs) -> Outcome:
            return function(arguments(*args, **kwargs))

        update_wrapper(call, function)
        parameters = inspect.signature(arguments).replace(return_annotation=Outcome)
        call.__signature__ = parameters  # type: ignore[attr-defined]  # of any function, for `help` and `inspect`
        return call

    return decorate


@_with_parameters_of(SearchArguments)
def search(arguments: SearchArguments) -> Outcome:
    """Searches the best network under a budget (paper, section 2): ``fnet-search run``, whose options these are.

    `space` by name, path, as an object, or ``"torchvision:resnet18"``, ``"mymodel.py:make"``. `budget` in conv MACs, as
    a number, ``"120MMAC"`` or ``"45%"`` of the unfactorized network; accuracies and drops as fractions of 1 or
    ``"80%"``. `metric`: ``"accuracy"`` or ``"balanced-accuracy"``: what networks are compared by, and what limits on
    accuracy mean. `policy` by name, or an object with ``suggest(history)``. `trials`: candidates to train. With
    `weights` (`modules.load_imported`) candidates start from the network as it is, or as `finetune` trained it on the
    data set. `class_weights`: ``"none"`` or ``"balanced"``, instead of the recipe's. `factorize` and `keep` are
    patterns of layers' names (`macroarchitecture.factorizing`); `input_shape` is (C, H, W). `scheme` is how candidates
    are quantized: ``"auto"`` (of several schemes the one whose outputs diverge least from the float network's),
    ``"paper"``, or a scheme. `audit_all`: every candidate is run in ONNX Runtime, not only the winner. `machine` says
    where and how to compute, `display` shows progress otherwise than on the terminal. Files are left in the folder
    `out`, ``runs/<space>-<data set>-<policy>-<budget>`` if none is given. The winner is measured on the test split
    once; nothing else is. Where an image folder has no test images, it is not.

    Candidates are compared on the images of the folder `validation`, which holds class folders; else on those in
    ``val/`` of the image folder; else on a part of the training images, which is held out.

    A study in a `storage` (`storage.open_url`) is shared with whoever joins it (`run.join_study`): `artifacts` is where
    weights lie that others need, and a candidate whose worker is silent for `lease` seconds is taken over.

    Raises FnetError, and TimeUp at the `deadline`.
    """
    return _run(arguments)


@_with_parameters_of(EvaluateArguments)
def evaluate(arguments: EvaluateArguments) -> Outcome:
    """Trains, quantizes and profiles given plans, each from scratch: ``fnet-search evaluate``.

    A plan as an object, by name as ``"init2"``, or as ``"layer=rate,..."``; ``outcome.evaluation(plan)`` is what it
    came to. `split` ``"test"`` trains on all training images, and is for reporting; a loop that chooses plans by the
    outcome asks for ``"validation"``, whose images are those of `search`. The other parameters are those of `search`
    too. What was evaluated in the folder `out` before, ``runs/evaluate-<space>-<data set>`` if none is given, is not
    trained again.

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
    """Carries out what was asked, in a run folder. Raises FnetError, and TimeUp at the `deadline`."""
    if request.machine.workers != 0:
        start_server(request.machine.threads or 1)
    import optuna  # with what follows it takes seconds to import: what is asked is checked before

    from fnet_search.engine.progress import TerminalDisplay
    from fnet_search.engine.run import run_study
    from fnet_search.rundir.run_folder import RunFolder

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # we have our own lines for what it says
    try:
        with TerminalDisplay(console()) if display is None else nullcontext(display) as shown:
            return run_study(request, RunFolder(folder), shown, deadline)
    finally:
        optuna.logging.set_verbosity(before)
