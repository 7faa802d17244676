"""A run that was recorded, opened again: what is done to its networks after the search."""

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
    """A trained network of a run: its evaluation, the folder of its candidate, and the one with its codes.

    A candidate that was quantized otherwise has several, with the same weights.
    """

    evaluation: Evaluation
    candidate: Path
    folder: Path

    @property
    def id(self) -> str:
        """What a user calls it: ``7``, or ``7/mse+equalize`` where it was quantized otherwise."""
        number = str(self.evaluation.number)
        return number if self.folder == self.candidate else f"{number}/{self.scheme}"

    @property
    def competes(self) -> bool:
        """Whether it may win: quantized as the run did, or promoted since."""
        return self.folder == self.candidate or (self.folder / PROMOTED).is_file()

    @property
    def scheme(self) -> Scheme:
        return parse_scheme(self.evaluation.scheme)

    @property
    def has_weights(self) -> bool:
        return (self.candidate / WEIGHTS).is_file() and (self.folder / QUANTIZED).is_file()

    def load_trained(self, space: Macroarchitecture) -> Network:
        """Raises FnetError, naming the file, for weights that are missing, broken or of another plan."""
        return load_trained(space, self.evaluation.plan, self.candidate)

    def load(self, space: Macroarchitecture) -> tuple[FoldedNetwork, QuantizedNetwork]:
        """The float network and the integer one that were evaluated. Raises FnetError as `load_trained` does."""
        return load_quantized(self.load_trained(space), self.scheme, self.folder)


@dataclass(frozen=True)
class RecordedRun:
    """A run folder with what its configuration says."""

    run: RunFolder
    config: Mapping[str, Any]
    space: Macroarchitecture
    constraints: Constraints

    @property
    def split(self) -> SplitName:
        return "test" if self.config["split"] == "test" else "validation"

    @property
    def searching(self) -> bool:
        """Or a run of given plans."""
        return bool(self.config["policy"] != FIXED_PLANS)

    @property
    def networks(self) -> list[RecordedNetwork]:
        """The trained networks, by number; those that were quantized otherwise after their own."""
        networks = []
        for path in sorted(self.run.path.glob("candidates/[0-9]*/evaluation.json")):
            networks.append(RecordedNetwork(read_evaluation(path), path.parent, path.parent))
            for folder in self.run.requantized(int(path.parent.name)):
                network = RecordedNetwork(read_evaluation(folder / "evaluation.json"), path.parent, folder)
                if folder == scheme_folder(path.parent, network.evaluation.scheme):  # and not a copy that somebody made
                    networks.append(network)
        return networks

    @property
    def winner(self) -> RecordedNetwork | None:
        """The network of the search's winner, or of the nearest to it; None in a study of given plans."""
        own = {network.evaluation: network for network in self.networks if network.competes}
        ranked = ranking(tuple(own), self.constraints)
        return own[ranked[0]] if ranked and self.searching else None

    def quantized(self, network: RecordedNetwork, schemes: Sequence[Scheme]) -> RecordedNetwork | None:
        """The network of the same weights that was quantized with the one scheme; None where there are several."""
        same = [
            recorded
            for recorded in self.networks
            if recorded.candidate == network.candidate and (recorded.scheme,) == tuple(schemes)
        ]
        return same[0] if same else None

    def better(self, network: RecordedNetwork) -> bool:
        """Whether a network would win, if it were promoted."""
        winner = self.winner
        if winner is None or winner.id == network.id:
            return False
        return ranking((winner.evaluation, network.evaluation), self.constraints)[:1] == [network.evaluation]

    def test(self, network: RecordedNetwork) -> Evaluation | None:
        """What a network reached on the test split, where it was measured there."""
        if network.evaluation.split == "test":
            return network.evaluation
        return self.run.read_test(network.evaluation)

    def find(self, names: Sequence[str]) -> list[RecordedNetwork]:
        """The networks of these ids; of none: the winner, or in a study of given plans every one that has weights.

        Raises FnetError for an id that is not there or has no weights, and for a run with no network to work on.
        """
        networks = {network.id: network for network in self.networks}
        if not names:
            winner = self.winner
            given = [
                network for network in networks.values() if network.has_weights and network.folder == network.candidate
            ]
            names = [winner.id] if winner else [network.id for network in given]
        if not names:
            raise FnetError(f"{self.run.path} has no trained network with its weights")
        return list(dict.fromkeys(self._named(name, networks) for name in names))

    def _named(self, name: str, networks: Mapping[str, RecordedNetwork]) -> RecordedNetwork:
        number, slash, scheme = name.partition("/")
        wanted = (str(int(number)) if re.fullmatch(r"[0-9]{1,9}", number) else number) + slash + scheme
        of_folder = {one.replace(":", "-"): one for one in networks}  # what `scheme_folder` makes of it
        wanted = of_folder.get(wanted.replace(":", "-"), wanted)
        kept = [network.id for network in networks.values() if network.has_weights]
        if wanted not in networks:
            raise FnetError(
                f"{self.run.path} has no network {name!r}; with weights it has: {', '.join(kept) or 'none'}"
            )
        if not networks[wanted].has_weights:
            raise FnetError(
                f"candidate {name} has no weights (a search keeps those of the best {KEPT}); there are those of: "
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
        """The run's data, split as it was; `dataset` and `validation` say where it and its validation images lie now,
        if elsewhere. Raises FnetError where it cannot be read, or is not what the run had."""
        name, facts = dataset or self.config["dataset"], self.config["data"]
        kind, _, path = name.partition(":")
        if dataset is None and kind == "imagefolder" and not Path(path).is_dir():
            raise FnetError(f"the run's images are not in {path} here; name the same ones with `dataset`")
        shape, own = self.space.input_shape, validation or facts["validation"]
        if validation is None and own is not None and Path(own).is_absolute() and not Path(own).is_dir():
            raise FnetError(f"the run's validation images are not in {own} here; name the same ones with `validation`")
        data = load_dataset(name, shape, data_dir, False, seen, self.split, own, facts["skipped"] > 0)
        recorded = facts["fingerprint"]
        if data.fingerprint() != recorded:
            raise FnetError(
                f"data set {name} is not what the run had: its fingerprint is {data.fingerprint()}, then it "
                f"was {recorded}"
            )
        mean, std = (tuple(facts[key]) for key in ("mean", "std"))
        return replace(data, mean=mean, std=std)


def open_run(folder: Path) -> RecordedRun:
    """Raises FnetError for a folder that is not a run."""
    run = RunFolder(folder)
    config = run.config()
    space = parse_space(config["space"], str(run.config_path)).with_classes(len(config["data"]["classes"]))
    return RecordedRun(run, config, space, Constraints(**config["constraints"]))


def metadata(
    config: Mapping[str, Any], space: Macroarchitecture, evaluation: Evaluation, test: Evaluation | None, precision: str
) -> dict[str, str]:
    """What an exported file says about its network: texts, numbers and JSON as text. Accuracies are fractions of 1.

    `precision` is ``quint8`` or ``float32``; `test` is the evaluation of the same network on the test split.
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
    for candidate in (evaluation, test):
        if candidate is not None:
            entries |= {
                f"{candidate.split}_fp32_accuracy": candidate.fp32_accuracy,
                f"{candidate.split}_quint8_accuracy": candidate.quint8_accuracy,
                f"{candidate.split}_fp32_balanced_accuracy": candidate.fp32_balanced_accuracy,
                f"{candidate.split}_quint8_balanced_accuracy": candidate.quint8_balanced_accuracy,
            }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in entries.items()}
