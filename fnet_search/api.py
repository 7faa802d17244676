"""What the command line does, as calls: `search` and `evaluate`, which `fnet_search` itself names.

Both show their progress on the terminal, go on where an earlier call with the same folder stopped, and raise FnetError,
in one line that says what would be right, for whatever is wrong with what was asked.
"""

import re
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import get_args

import optuna

from fnet_search.arch.macroarchitecture import Macroarchitecture, factorizing, normalising
from fnet_search.arch.plan import FactorizationPlan, check_plan, legal_rates, parse_plan
from fnet_search.base.errors import FnetError, unknown
from fnet_search.base.terminal import console
from fnet_search.engine.display import Display
from fnet_search.engine.progress import TerminalDisplay
from fnet_search.engine.request import Machine, Request
from fnet_search.engine.run import run_study
from fnet_search.engine.search_loop import FixedPlans
from fnet_search.importing.spaces import load_space
from fnet_search.optuna_bridge.leases import LEASE_SECONDS
from fnet_search.policy.constraints import parse_constraints
from fnet_search.policy.evaluation import SplitName
from fnet_search.policy.protocol import Policy
from fnet_search.policy.registry import check_policy, load_policy
from fnet_search.quant.scheme import AUTO, Scheme, parse_schemes
from fnet_search.report.outcome import Outcome
from fnet_search.rundir.run_folder import RunFolder
from fnet_search.training.datasets import natural_shape
from fnet_search.training.deadline import Deadline
from fnet_search.training.recipe import Fidelity, Recipe, load_recipe


def search(
    space: Macroarchitecture | Path | str = "factorizenet",
    dataset: str = "digits",
    *,
    validation: Path | str | None = None,
    budget: str | int,
    min_quint8: str | float | None = None,
    max_drop: str | float | None = None,
    max_params: str | int | None = None,
    metric: str = "accuracy",
    policy: Policy | str = "layer-guided",
    trials: int = 6,
    recipe: Recipe | str | None = None,
    epochs: int | None = None,
    class_weights: str | None = None,
    warm_start: bool = True,
    warm_epochs: float | None = None,
    prune: bool = True,
    final_epochs: int | None = None,
    finetune: bool = False,
    input_shape: tuple[int, int, int] | None = None,
    weights: str | None = None,
    normalise: str | None = None,
    factorize: Iterable[str] = (),
    keep: Iterable[str] = (),
    scheme: Scheme | str = AUTO,
    audit_all: bool = False,
    seed: int = 0,
    out: Path | str | None = None,
    storage: str | None = None,
    artifacts: str | None = None,
    lease: float = LEASE_SECONDS,
    machine: Machine | None = None,
    display: Display | None = None,
    deadline: Deadline | None = None,
) -> Outcome:
    """Searches the best network under a budget (paper, section 2): ``fnet-search run``, whose options these are.

    `space` by name, path, as an object, or ``"torchvision:resnet18"``, ``"mymodel.py:make"``. `budget` in conv MACs, as
    a number, ``"120MMAC"`` or ``"45%"`` of the unfactorized network; accuracies and drops as fractions of 1 or
    ``"80%"``. `metric`: ``"accuracy"`` or ``"balanced-accuracy"``, which networks are compared by and the limits on
    accuracy are of. `policy` by name, or an object with ``suggest(history)``. `trials`: candidates to train. With
    `weights` (`imported.load_imported`) candidates start from the network as it is, or as `finetune` trained it on the
    data set. `class_weights`: ``"none"`` or ``"balanced"``, instead of the recipe's. `factorize` and `keep` are
    patterns of layers' names (`macro.factorizing`); `input_shape` is (C, H, W). `scheme` is how candidates are
    quantized: ``"auto"`` (of several schemes the one whose outputs diverge least from the float network's),
    ``"paper"``, or a scheme. `audit_all`: every candidate is run in ONNX Runtime, not only the winner. `machine` says
    where and how to compute,
    `display` shows progress otherwise than on the terminal. Files are left in the folder `out`,
    ``runs/<space>-<data set>-<policy>-<budget>`` if none is given. The winner is measured on the test split once;
    nothing else is. Where an image folder has no test images, it is not.

    Candidates are compared on the images of the folder `validation`, which holds class folders; else on those in
    ``val/`` of the image folder; else on a part of the training images, which is held out.

    A study in a `storage` (`storage.open_url`) is shared with whoever joins it (`run.join_study`): `artifacts` is where
    weights lie that others need, and a candidate whose worker is silent for `lease` seconds is taken over.

    Raises FnetError, and TimeUp at the `deadline`.
    """
    loaded = _space(space, dataset, input_shape, weights, normalise, factorize, keep)
    if not legal_rates(loaded):
        raise FnetError(
            f"there is nothing to factorize in {loaded.name}: name convolutions with --factorize (in a TOML file, set "
            "factorize = true), or quantize it as it is: fnet-search evaluate --plan regular"
        )
    limits = parse_constraints(loaded, budget, max_params, min_quint8, max_drop, metric)
    chosen = load_policy(policy) if isinstance(policy, str) else check_policy(policy, type(policy).__name__)
    named = policy if isinstance(policy, str) else type(policy).__name__
    request = _request(
        loaded, dataset, validation, recipe, epochs, class_weights, finetune, scheme, seed, storage, machine
    )
    if warm_epochs and not warm_start:
        raise FnetError("--warm-epochs is of candidates that start from others; leave it or --no-warm-start out")
    if warm_epochs is not None and (warm_epochs <= 0 or (warm_epochs > 1 and warm_epochs % 1)):
        raise FnetError(f"--warm-epochs {warm_epochs:g} is neither a whole number nor a part of one epoch")
    if loaded.weights is not None and not warm_start:
        raise FnetError("candidates start from the weights of the network; leave --weights or --no-warm-start out")
    if final_epochs is None:
        final_epochs = request.recipe.epochs if warm_start else 0
    if artifacts is not None and storage is None:
        raise FnetError("--artifacts is of studies that several workers share; name their storage with --storage")
    if lease != LEASE_SECONDS and storage is None:
        raise FnetError("--lease is of studies that several workers share; name their storage with --storage")
    _at_least(1, trials=trials, lease=int(lease))
    _at_least(0, final_epochs=final_epochs)
    request = replace(
        request,
        fidelity=Fidelity(warm_start, warm_epochs, prune, final_epochs, finetune),
        policy_name=named,
        constraints=limits,
        audit_all=audit_all,
        artifacts=artifacts,
        lease=lease,
    )
    asked = budget if isinstance(budget, str) else str(limits.conv_macs)
    name = "-".join([loaded.name, dataset_name(dataset), named, asked.replace("%", "pct")])
    return _run(request, chosen, folder_of(out, name), trials, display, deadline)


def evaluate(
    plans: FactorizationPlan | str | Iterable[FactorizationPlan | str],
    space: Macroarchitecture | Path | str = "factorizenet",
    dataset: str = "digits",
    *,
    split: SplitName = "test",
    validation: Path | str | None = None,
    recipe: Recipe | str | None = None,
    epochs: int | None = None,
    class_weights: str | None = None,
    finetune: bool = False,
    input_shape: tuple[int, int, int] | None = None,
    weights: str | None = None,
    normalise: str | None = None,
    factorize: Iterable[str] = (),
    keep: Iterable[str] = (),
    scheme: Scheme | str = AUTO,
    seed: int = 0,
    out: Path | str | None = None,
    storage: str | None = None,
    machine: Machine | None = None,
    display: Display | None = None,
    deadline: Deadline | None = None,
) -> Outcome:
    """Trains, quantizes and profiles given plans, each from scratch: ``fnet-search evaluate``.

    A plan as an object, by name as ``"init2"``, or as ``"layer=rate,..."``; ``outcome.evaluation(plan)`` is what it
    came to. `split` ``"test"`` trains on all training images, and is for reporting; a loop that chooses plans by the
    outcome asks for ``"validation"``, whose images are those of `search`. What was evaluated in the folder `out`
    before, ``runs/evaluate-<space>-<data set>`` if none is given, is not trained again.

    Raises FnetError, and TimeUp at the `deadline`.
    """
    loaded = _space(space, dataset, input_shape, weights, normalise, factorize, keep)
    if split not in get_args(SplitName):
        raise unknown("split", split, get_args(SplitName))
    if validation is not None and split == "test":
        raise FnetError("--validation names the images of --split validation; leave it out, or say that split")
    wanted = [plans] if isinstance(plans, FactorizationPlan | str) else plans
    chosen = tuple(dict.fromkeys(parse_plan(loaded, plan) if isinstance(plan, str) else plan for plan in wanted))
    if not chosen:
        raise FnetError("no plan is given; name one, as in init2")
    for plan in chosen:
        check_plan(loaded, plan)
    request = _request(
        loaded, dataset, validation, recipe, epochs, class_weights, finetune, scheme, seed, storage, machine
    )
    request = replace(request, split=split, audit_all=True)
    name = "-".join(["evaluate", loaded.name, dataset_name(dataset), *(["validation"] if split != "test" else [])])
    return _run(request, FixedPlans(chosen), folder_of(out, name), len(chosen), display, deadline)


def _space(
    space: Macroarchitecture | Path | str,
    dataset: str,
    input_shape: tuple[int, int, int] | None,
    weights: str | None,
    normalise: str | None,
    factorize: Iterable[str],
    keep: Iterable[str],
) -> Macroarchitecture:
    """What was named, for images as large as the data set's unless another size is asked for."""
    if isinstance(space, Macroarchitecture):
        loaded = space
    else:
        loaded = load_space(str(space), input_shape, weights, lambda channels: natural_shape(dataset, channels))
    return factorizing(normalising(loaded, normalise), tuple(factorize), tuple(keep))


def _request(
    space: Macroarchitecture,
    dataset: str,
    validation: Path | str | None,
    recipe: Recipe | str | None,
    epochs: int | None,
    class_weights: str | None,
    finetune: bool,
    scheme: Scheme | str,
    seed: int,
    storage: str | None,
    machine: Machine | None,
) -> Request:
    """What both calls ask for."""
    if finetune and space.weights is None:
        raise FnetError("--finetune is of networks with weights; name them with --weights")
    if epochs is not None:
        _at_least(1, epochs=epochs)
    default = "finetune" if finetune else "quick"
    if not 0 <= seed < 2**32:
        raise FnetError(f"seed must be from 0 to {2**32 - 1}, not {seed}")
    chosen = (recipe if isinstance(recipe, Recipe) else load_recipe(recipe or default)).with_epochs(epochs)
    if class_weights is not None:
        chosen = chosen.changed({"class_weights": class_weights})
    return Request(
        space=space,
        dataset=absolute(dataset),
        validation=absolute_path(validation),
        recipe=chosen,
        schemes=parse_schemes(scheme) if isinstance(scheme, str) else (scheme,),
        seed=seed,
        fidelity=Fidelity(finetune=finetune),
        storage=storage,
        machine=machine or Machine(),
    )


def _at_least(least: int, **given: int) -> None:
    for name, value in given.items():
        if value < least:
            raise FnetError(f"{name} must be at least {least}, not {value}")


def _run(
    request: Request,
    policy: Policy,
    folder: Path,
    trials: int,
    display: Display | None,
    deadline: Deadline | None,
) -> Outcome:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # we have our own lines for what it says
    try:
        with TerminalDisplay(console()) if display is None else nullcontext(display) as shown:
            return run_study(request, policy, RunFolder(folder), trials, shown, deadline)
    finally:
        optuna.logging.set_verbosity(before)


def absolute(dataset: str) -> str:
    kind, colon, path = dataset.partition(":")
    return f"{kind}:{absolute_path(path)}" if kind == "imagefolder" and colon else dataset


def absolute_path(path: Path | str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


def dataset_name(dataset: str) -> str:
    """What a run folder's name says of a data set."""
    return Path(dataset.partition(":")[2]).expanduser().resolve().name if ":" in dataset else dataset


def folder_of(out: Path | str | None, name: str) -> Path:
    """The run folder that was asked for, or one of that name."""
    return Path(out) if out is not None else Path("runs") / re.sub(r"[^\w.+-]+", "_", name)
