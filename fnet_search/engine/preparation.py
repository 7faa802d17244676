"""Before a run: its data, its numerics, its number of workers, and whether its folder fits."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from optuna.storages import BaseStorage

from fnet_search.base.errors import FnetError
from fnet_search.base.units import counted
from fnet_search.candidates.job import Setup
from fnet_search.candidates.worker_count import cores, how_many
from fnet_search.engine.display import Display
from fnet_search.engine.request import Machine, Request, as_json, completed
from fnet_search.optuna_bridge.storage import has_study, open_url
from fnet_search.policy.evaluation import HELD_OUT, MAYBE_KNOWN
from fnet_search.policy.fixed_plans import FIXED_PLANS
from fnet_search.policy.protocol import requirements
from fnet_search.report import class_balance as balance
from fnet_search.report.outcome import cautions
from fnet_search.rundir.run_folder import RunFolder, differences
from fnet_search.training.datasets import DataSet, load_dataset
from fnet_search.training.imagefolder import listing
from fnet_search.training.numerics import Numerics, check_device, check_dtype, check_kernels, resolve

PARAMETERS = {
    "constraints.conv_macs": "`budget` (conv MACs)",
    "constraints.params": "`max_params`",
    "constraints.min_quint8": "`min_quint8`",
    "constraints.max_drop": "`max_drop`",
    "scheme": "`scheme`",
    "constraints.metric": "`metric`",
    "recipe.class_weights": "`class_weights`",
}
"""What people give, by the part of a configuration that it becomes."""
BY_FINGERPRINT = {"validation", "has_test", "skipped", "images"}
"""What is known of data whose fingerprint is the same, wherever they lie."""


@dataclass(frozen=True)
class Prepared:
    """A request, with its data read and how this machine computes."""

    request: Request
    data: DataSet
    workers: int
    setup: Setup

    @property
    def config(self) -> dict[str, Any]:
        data = self.data
        facts = {
            "fingerprint": data.fingerprint(),
            "classes": data.classes,
            "mean": data.mean,
            "std": data.std,
            "validation": data.validation,
            "has_test": data.has_test,
            "skipped": len(data.unreadable),
            "images": self.counts,
        }
        return {**self.request.config(), "data": as_json(facts), "numerics": self.setup.numerics.to_json()}

    @property
    def counts(self) -> dict[str, list[int]]:
        """By split, the images of each class."""
        splits = {"training": self.data.train, self.setup.split: self.data.evaluation}
        if self.data.has_test:
            splits["test"] = self.data.test
        classes = len(self.data.classes)
        return {name: torch.bincount(split.labels, minlength=classes).tolist() for name, split in splits.items()}


def prepare_run(request: Request, run: RunFolder, display: Display) -> Prepared:
    machine = request.machine
    check_dtype(check_device(machine.device), machine.dtype)
    display.status(f"reading {request.dataset}")
    shape, reading = request.space.input_shape, partial(display.advance, "reading images")
    validation = request.validation
    if validation is None and run.exists:  # as it was, also where a folder val/ has come since
        validation = run.config()["data"]["validation"]
    data = load_dataset(
        request.dataset,
        shape,
        machine.data_dir,
        machine.download,
        reading,
        request.split,
        validation,
        machine.skip_unreadable,
    )
    if data.unreadable:
        display.say(f"left out, {counted(len(data.unreadable), 'unreadable image')}: {listing(data.unreadable)}")
    space = request.space.with_classes(len(data.classes))
    if space.weights is not None and space != request.space and not request.fidelity.finetune:
        raise FnetError(
            f"the weights of {space.name} are for {request.space.classes} classes, the data set has {space.classes}: "
            "its last layer is new and wants training; set `finetune`"
        )
    if space.mean:
        data = replace(data, mean=space.mean, std=space.std)
    known = MAYBE_KNOWN if data.validation == HELD_OUT and space.weights is not None else data.validation
    for text in cautions(known or "", data.has_test or not request.searching):
        display.say(f"warning: {text}")
    request.constraints.check(space)
    recorded = _recorded(run, machine)
    device = recorded.device if recorded else check_device(machine.device)
    threads = recorded.threads if recorded else machine.threads or 1
    workers = how_many(machine.workers, device, threads, space, request.recipe, data)
    if recorded is None:
        display.status("measuring what this device is fast with")
    elif recorded.fused and not run.exists:
        check_kernels(recorded)
    numerics = recorded or resolve(device, machine.dtype, workers, cores(), machine.threads, machine.fused)
    setup = Setup(
        space,
        request.recipe,
        request.schemes,
        numerics,
        request.seed,
        request.split,
        request.audit_all,
        request.fidelity,
        request.constraints.metric,
        request.fidelity.warm_start or bool(requirements(request.policy)),
        known or "",
    )
    prepared = Prepared(request, data, workers, setup)
    display.say(balance.counts_line(data.classes, prepared.counts))
    for text in balance.balance_warnings(data.classes, prepared.counts):
        display.say(f"warning: {text}")
    return prepared


def configure(run: RunFolder, config: dict[str, Any]) -> None:
    if run.exists:
        check_same_config(run, config)
    else:
        run.write_config(config)


def own_storage(url: str | None, run: RunFolder) -> BaseStorage | None:
    """The storage that was asked for. A new run does not go on with what another one has left in it."""
    if url is None:
        return None
    storage = open_url(url)
    if not run.exists and has_study(storage, run.name):
        raise FnetError(
            f"the storage has a study {run.name!r} of another run folder; choose another `out`, or work on it too: "
            f"fnet-search worker --storage ... --study {run.name}"
        )
    return storage


def check_same_config(run: RunFolder, config: dict[str, Any]) -> None:
    """Raises FnetError where a run was recorded with another configuration than this one."""
    recorded = run.config()
    if "fidelity" not in recorded:
        raise FnetError(f"{run.path} was made by an earlier version, which trained otherwise; choose another `out`")
    recorded = completed(recorded)
    told = {key: value for key, value in config.get("data", {}).items() if key in BY_FINGERPRINT}
    recorded["data"] = {**recorded["data"], **told}
    if (recorded["policy"] == FIXED_PLANS) != (config["policy"] == FIXED_PLANS):
        kind = "given plans" if recorded["policy"] == FIXED_PLANS else "a search"
        raise FnetError(f"{run.path} is a run of {kind}; choose another `out`")
    parted = (text.partition(":") for text in differences(recorded, config))
    changed = [f"{PARAMETERS.get(name, name)}{colon}{text}" for name, colon, text in parted]
    if changed:
        same = f", or say `scheme` {recorded['scheme']}" if recorded["scheme"] != config["scheme"] else ""
        raise FnetError(
            f"{run.path} was made with another configuration ({'; '.join(changed)}); choose another `out`{same}"
        )


def recorded_numerics(run: RunFolder) -> Numerics:
    """What a run computed with. Raises FnetError where it cannot be read."""
    return Numerics.from_json(run.config()["numerics"])


def _recorded(run: RunFolder, machine: Machine) -> Numerics | None:
    """The numerics recorded in the run that was named, or here, where nothing else is wanted.

    Raises FnetError for a device that is not there any more, and where that run cannot be read.
    """
    known = RunFolder(machine.numerics_of) if machine.numerics_of is not None else run
    if known is run and not run.exists:
        return None
    numerics = recorded_numerics(known)
    if not machine.agrees(numerics):
        return None
    check_device(numerics.device)
    return numerics
