"""The preparation of a run: its data, its numerics, its number of workers, and the check of its folder.

The order matters, because every step needs the ones before it, and because a run that is refused must leave nothing:

1. *Data*. The number of classes completes the space, the size of the data set limits the workers that fit into memory,
   and only the images show whether a folder was made with the same data.
2. *Numerics*. They are timed, which takes seconds, for the number of workers, which the data have limited. A run that
   is resumed keeps the recorded ones, since its results depend on them.
3. *Folder*. `prepare_run` writes nothing to it. The caller (`engine.run`) then locks the folder and calls `configure`,
   which writes config.json or compares the whole configuration with the recorded one. Only after that are the study,
   the tables and the weights written: a folder with any of them has its configuration.

Before all this, `engine.run` compares the request alone with the recorded configuration, which takes no time.
"""

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
"""The parameters that users give, by the key of the configuration that they become; for messages."""
BY_FINGERPRINT = {"validation", "has_test", "skipped", "images"}
"""Keys of the configuration's `data` that are not compared: equal fingerprints mean equal images, wherever they lie."""


@dataclass(frozen=True)
class Prepared:
    """A request with its data, and the setup of its workers."""

    request: Request
    data: DataSet
    workers: int
    """Number of worker processes."""
    setup: Setup

    @property
    def config(self) -> dict[str, Any]:
        """The whole configuration, as config.json records it: that of the request, with facts on the data and the
        numerics."""
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
        """The number of images of each class, by split."""
        splits = {"training": self.data.train, self.setup.split: self.data.evaluation}
        if self.data.has_test:
            splits["test"] = self.data.test
        classes = len(self.data.classes)
        return {name: torch.bincount(split.labels, minlength=classes).tolist() for name, split in splits.items()}


def prepare_run(request: Request, run: RunFolder, display: Display) -> Prepared:
    """Reads the data, chooses numerics and the number of workers, and checks the request against them. Writes nothing
    to the run folder. The module's docstring gives the reasons for the order.

    Raises FnetError for data that cannot be read, a device, dtype or kernels that are not available, weights of other
    classes, limits that no network of the space meets, and workers that do not fit into memory.
    """
    machine = request.machine
    check_dtype(check_device(machine.device), machine.dtype)  # first: reading the images may take minutes
    display.status(f"reading {request.dataset}")
    shape, reading = request.space.input_shape, partial(display.advance, "reading images")
    validation = request.validation
    if validation is None and run.exists:  # the recorded one, even if a folder val/ was added since
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
            "its last layer is new and needs training; set `finetune`"
        )
    if space.mean:  # an imported network reads its images in its own normalisation
        data = replace(data, mean=space.mean, std=space.std)
    maybe_known = data.validation == HELD_OUT and space.weights is not None
    validation_images = MAYBE_KNOWN if maybe_known else data.validation or ""
    for text in cautions(validation_images, data.has_test or not request.searching):
        display.say(f"warning: {text}")
    request.constraints.check(space)
    recorded = _recorded(run, machine)  # before the workers are counted: device and threads limit their number
    device = recorded.device if recorded else check_device(machine.device)
    threads = recorded.threads if recorded else machine.threads or 1
    workers = how_many(machine.workers, device, threads, space, request.recipe, data)
    if recorded is None:
        display.status("choosing the fastest numerics on this device")
    elif recorded.fused and not run.exists:  # `numerics_of` another run, whose machine had a compiler
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
        validation_images,
        request.weight_type,
    )
    prepared = Prepared(request, data, workers, setup)
    display.say(balance.counts_line(data.classes, prepared.counts))
    for text in balance.balance_warnings(data.classes, prepared.counts):
        display.say(f"warning: {text}")
    return prepared


def configure(run: RunFolder, config: dict[str, Any]) -> None:
    """Writes the configuration of a new run, or checks that an existing run has the same one (`check_same_config`). The
    caller holds the folder's lock.

    It is the first file of a run: `RunFolder.exists` means that it is there.
    """
    if run.exists:
        check_same_config(run, config)
    else:
        run.write_config(config)


def own_storage(url: str | None, run: RunFolder) -> BaseStorage | None:
    """The storage at a URL, None without one.

    Raises FnetError if it cannot be opened, and for a new run if it already has a study of that name: it belongs to
    another run folder.
    """
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
    """Raises FnetError if the recorded configuration of a run differs from `config`.

    `config` may lack data and numerics (`Request.config`), so that most differences are found before the data are read.
    """
    recorded = run.config()
    if "fidelity" not in recorded:
        raise FnetError(f"{run.path} was made by an earlier version, which trained differently; choose another `out`")
    recorded = completed(recorded)
    not_compared = {key: value for key, value in config.get("data", {}).items() if key in BY_FINGERPRINT}
    recorded["data"] = {**recorded["data"], **not_compared}
    if (recorded["policy"] == FIXED_PLANS) != (config["policy"] == FIXED_PLANS):
        kind = "a run of given plans" if recorded["policy"] == FIXED_PLANS else "a search"
        raise FnetError(f"{run.path} is {kind}; choose another `out`")
    parted = (line.partition(":") for line in differences(recorded, config))
    changed = [f"{PARAMETERS.get(key, key)}{colon}{values}" for key, colon, values in parted]
    if changed:
        same = f", or give `scheme` {recorded['scheme']}" if recorded["scheme"] != config["scheme"] else ""
        raise FnetError(
            f"{run.path} was made with another configuration ({'; '.join(changed)}); choose another `out`{same}"
        )


def recorded_numerics(run: RunFolder) -> Numerics:
    """The numerics of a recorded run. Raises FnetError if its configuration cannot be read."""
    return Numerics.from_json(run.config()["numerics"])


def _recorded(run: RunFolder, machine: Machine) -> Numerics | None:
    """The numerics recorded in the run `machine.numerics_of`, or in this run.

    None if this run is new, or if the machine's parameters ask for others: then they are chosen anew. (`configure`
    refuses a run that is resumed with other numerics.) Raises FnetError if the recorded device is not available any
    more, or if the run cannot be read.
    """
    source = RunFolder(machine.numerics_of) if machine.numerics_of is not None else run
    if source is run and not run.exists:
        return None
    numerics = recorded_numerics(source)
    if not machine.agrees(numerics):
        return None
    check_device(numerics.device)
    return numerics
