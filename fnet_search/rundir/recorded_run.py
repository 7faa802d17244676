"""Recorded runs: a run folder opened again, to work on its networks after the search."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import label
from fnet_search.arch.space_file import parse_space
from fnet_search.base.errors import FnetError
from fnet_search.base.version import __version__
from fnet_search.candidates.network_files import QUANTIZED, WEIGHTS, load_quantized, load_trained
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation, SplitName
from fnet_search.policy.fixed_plans import FIXED_PLANS
from fnet_search.policy.ranking import ranking
from fnet_search.quant.fold import FoldedNetwork
from fnet_search.quant.scheme import Scheme, parse_scheme
from fnet_search.quant.simulator import QuantizedNetwork
from fnet_search.rundir.run_folder import KEPT, PROMOTED, RunFolder, read_evaluation, scheme_folder
from fnet_search.training.dataset_names import FOLDER
from fnet_search.training.datasets import DataSet, load_dataset
from fnet_search.training.imagefolder import READING
from fnet_search.training.network import Network


@dataclass(frozen=True)
class RecordedNetwork:
    """A trained and quantized network of a run.

    A candidate that was requantized has several networks, with the same weights.
    """

    evaluation: Evaluation
    candidate: Path
    """The folder of the candidate, with the weights."""
    folder: Path
    """The folder with the codes: that of the candidate, or of the scheme that it was requantized with."""

    @property
    def id(self) -> str:
        """The name that commands take: ``7``, or ``7/mse+equalize`` if it was requantized."""
        number = str(self.evaluation.number)
        return number if self.folder == self.candidate else f"{number}/{self.scheme}"

    @property
    def competes(self) -> bool:
        """Whether it may win: it was quantized by the run itself, or promoted since."""
        return self.folder == self.candidate or (self.folder / PROMOTED).is_file()

    @property
    def scheme(self) -> Scheme:
        return parse_scheme(self.evaluation.scheme)

    @property
    def has_weights(self) -> bool:
        return (self.candidate / WEIGHTS).is_file() and (self.folder / QUANTIZED).is_file()

    def load_trained(self, space: Macroarchitecture) -> Network:
        """The network in float. Raises FnetError, naming the file, if its weights are missing, broken or of another
        plan."""
        return load_trained(space, self.evaluation.plan, self.candidate)

    def load(self, space: Macroarchitecture) -> tuple[FoldedNetwork, QuantizedNetwork]:
        """The evaluated networks, folded float and integer. Raises FnetError as `load_trained` does."""
        return load_quantized(self.load_trained(space), self.scheme, self.folder)


@dataclass(frozen=True)
class RecordedRun:
    """A run folder with its configuration."""

    run: RunFolder
    config: Mapping[str, Any]
    space: Macroarchitecture
    constraints: Constraints

    @property
    def split(self) -> SplitName:
        return "test" if self.config["split"] == "test" else "validation"

    @property
    def searching(self) -> bool:
        """Whether the run is a search; otherwise it trained given plans."""
        return bool(self.config["policy"] != FIXED_PLANS)

    @property
    def networks(self) -> list[RecordedNetwork]:
        """The trained networks, by number: for each candidate its own, then its requantized ones.

        Raises FnetError as `read_evaluation` does.
        """
        networks = []
        for path in sorted(self.run.path.glob("candidates/[0-9]*/evaluation.json")):
            networks.append(RecordedNetwork(read_evaluation(path), path.parent, path.parent))
            for folder in self.run.requantized(int(path.parent.name)):
                network = RecordedNetwork(read_evaluation(folder / "evaluation.json"), path.parent, folder)
                if folder == scheme_folder(path.parent, network.evaluation.scheme):  # skips copies that a user made
                    networks.append(network)
        return networks

    @property
    def winner(self) -> RecordedNetwork | None:
        """The winner's network, or the nearest to it if nothing is feasible; None in a run of given plans."""
        competing = {network.evaluation: network for network in self.networks if network.competes}
        ranked = ranking(tuple(competing), self.constraints)
        return competing[ranked[0]] if ranked and self.searching else None

    def quantized(self, network: RecordedNetwork, schemes: Sequence[Scheme]) -> RecordedNetwork | None:
        """The recorded network with the weights of `network`, quantized with the only one of `schemes`.

        None if there is none, or if `schemes` has several.
        """
        matching = [
            recorded
            for recorded in self.networks
            if recorded.candidate == network.candidate and (recorded.scheme,) == tuple(schemes)
        ]
        return matching[0] if matching else None

    def better(self, network: RecordedNetwork) -> bool:
        """Whether a network would beat the winner if it were promoted."""
        winner = self.winner
        if winner is None or winner.id == network.id:
            return False
        return ranking((winner.evaluation, network.evaluation), self.constraints)[:1] == [network.evaluation]

    def test(self, network: RecordedNetwork) -> Evaluation | None:
        """The evaluation of a network on the test split, None if it was not measured there."""
        if network.evaluation.split == "test":
            return network.evaluation
        return self.run.read_test(network.evaluation)

    def find(self, names: Sequence[str]) -> list[RecordedNetwork]:
        """The networks with these ids, each once.

        Without ids: the winner, or in a run of given plans the own network of every candidate that has weights.
        Raises FnetError if an id is unknown or its network has no weights, and if there is no network to return.
        """
        networks = {network.id: network for network in self.networks}
        if not names:
            winner = self.winner
            own = [
                network for network in networks.values() if network.has_weights and network.folder == network.candidate
            ]
            names = [winner.id] if winner else [network.id for network in own]
        if not names:
            raise FnetError(f"{self.run.path} has no trained network with its weights")
        return list(dict.fromkeys(self._named(name, networks) for name in names))

    def _named(self, name: str, networks: Mapping[str, RecordedNetwork]) -> RecordedNetwork:
        number, slash, scheme = name.partition("/")
        wanted = (str(int(number)) if re.fullmatch(r"[0-9]{1,9}", number) else number) + slash + scheme
        ids = {network_id.replace(":", "-"): network_id for network_id in networks}  # by name of `scheme_folder`
        wanted = ids.get(wanted.replace(":", "-"), wanted)
        kept = [network.id for network in networks.values() if network.has_weights]
        if wanted not in networks:
            raise FnetError(
                f"{self.run.path} has no network {name!r}; networks with weights: {', '.join(kept) or 'none'}"
            )
        if not networks[wanted].has_weights:
            raise FnetError(
                f"candidate {name} has no weights (a search keeps those of the best {KEPT}); networks with weights: "
                f"{', '.join(kept) or 'none'}"
            )
        return networks[wanted]

    def data(
        self,
        data_dir: Path,
        seen: Callable[[int, int], None],
        dataset: str | None = None,
        validation: str | None = None,
    ) -> DataSet:
        """The run's data set, split and normalised as in the run.

        Raises FnetError if it cannot be read or differs from the run's.

        Args:
            data_dir: the folder of downloaded data sets.
            seen: called with the numbers of images read and of all images.
            dataset: the data set's name, if it lies elsewhere than recorded.
            validation: the folder of its validation images, likewise.
        """
        name, recorded = dataset or self.config["dataset"], self.config["data"]
        kind, _, path = name.partition(":")
        if dataset is None and kind == "imagefolder" and not Path(path).is_dir():
            raise FnetError(f"the run's images are not in {path} on this machine; give the same ones with `dataset`")
        shape, folder = self.space.input_shape, validation or recorded["validation"]
        if validation is None and folder is not None and Path(folder).is_absolute() and not Path(folder).is_dir():
            raise FnetError(
                f"the run's validation images are not in {folder} on this machine; give the same ones with `validation`"
            )
        data = load_dataset(name, shape, data_dir, False, seen, self.split, folder, recorded["skipped"] > 0)
        if data.fingerprint() != recorded["fingerprint"]:
            raise FnetError(
                f"data set {name} differs from the run's: its fingerprint is {data.fingerprint()}, the recorded one "
                f"is {recorded['fingerprint']}"
            )
        mean, std = (tuple(recorded[key]) for key in ("mean", "std"))
        return replace(data, mean=mean, std=std)


def open_run(folder: Path) -> RecordedRun:
    """Opens a run folder. Raises FnetError if it is none, or if its configuration is broken."""
    run = RunFolder(folder)
    config = run.config()
    space = parse_space(config["space"], str(run.config_path)).with_classes(len(config["data"]["classes"]))
    return RecordedRun(run, config, space, Constraints(**config["constraints"]))


def metadata(
    config: Mapping[str, Any], space: Macroarchitecture, evaluation: Evaluation, test: Evaluation | None, precision: str
) -> dict[str, str]:
    """The metadata of an exported file: its entries, as text or as JSON. Accuracies are fractions of 1.

    Args:
        test: the evaluation of the same network on the test split.
        precision: ``quint8`` or ``float32``.
    """
    entries = {
        "precision": precision,
        "space": space.name,
        "plan": str(evaluation.plan),
        "plan_label": label(space, evaluation.plan),
        "conv_macs": evaluation.cost.conv_macs,
        "total_macs": evaluation.cost.total_macs,
        "parameters": evaluation.cost.params,
        "scheme": evaluation.scheme,
        "dataset": config["dataset"].partition(":")[0],
        "classes": config["data"]["classes"],
        "preprocessing": {
            "input": "N, C, H, W; float32; RGB or grey, pixel / 255, minus mean, divided by std",
            "shape": list(space.input_shape),
            "mean": config["data"]["mean"],
            "std": config["data"]["std"],
        },
        **({"image_files": list(READING)} if config["dataset"].startswith(FOLDER) else {}),
        "study": config.get("study", ""),
        "candidate": evaluation.number,
        "seed": evaluation.seed,
        "epochs": evaluation.epochs,
        "fnet_search": __version__,
    }
    if evaluation.validation:
        entries["validation"] = evaluation.validation
    for measured in (evaluation, test):
        if measured is not None:
            entries |= {
                f"{measured.split}_fp32_accuracy": measured.fp32_accuracy,
                f"{measured.split}_quint8_accuracy": measured.quint8_accuracy,
                f"{measured.split}_fp32_balanced_accuracy": measured.fp32_balanced_accuracy,
                f"{measured.split}_quint8_balanced_accuracy": measured.quint8_balanced_accuracy,
            }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in entries.items()}
