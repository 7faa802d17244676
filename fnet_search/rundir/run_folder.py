"""The run folder: the files of a run. Each file is either complete or absent.

config.json        the resolved configuration, with versions and the format of the folder
journal.log        the Optuna study (unless another storage was given)
artifacts/         files attached to the study and its trials
candidates.csv     one row for each plan, refused ones too; no timings, so that two runs can be compared byte for byte
timings.csv        seconds that each candidate took
probes.csv         one row for each layer and rate, if the policy asked for probes
choices.csv        the winner's layers and the steps to the next rates, if the policy explains its choice
front.csv          likewise: the best plan at every budget, as the policy expects it
candidates/007/    plan.toml, evaluation.json, layers.csv, and the weights of the best few
candidates/007/mse+equalize/   the same network, requantized with that scheme; a file `promoted` marks that it may win
best/              the winner's files, confusion.csv, model.onnx, and test.json if there are test images
figures/, report.html

`format` in config.json is the version of this layout, `FORMAT`. A folder without it has format 0: it was written before
formats were numbered, and is the same as format 1 otherwise. A change of the layout raises FORMAT and documents here
what older folders lack.
"""

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from socket import gethostname
from tempfile import TemporaryFile
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout
from onnx import ModelProto

from fnet_search.arch.plan import plan_toml
from fnet_search.base.errors import FnetError
from fnet_search.base.files import read_json, write_json, write_text
from fnet_search.base.version import __version__
from fnet_search.candidates.network_files import CHECKPOINT, QUANTIZED, WEIGHTS
from fnet_search.deploy.export import MODEL, read_weight_type, write_model
from fnet_search.deploy.weight_type import WeightType
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import HELD_OUT, Audit, Evaluation, Probes
from fnet_search.policy.explanation import Explanation
from fnet_search.policy.ranking import ranking
from fnet_search.report import class_balance as balance
from fnet_search.report.csv_tables import candidates_csv, choices_csv, front_csv, layers_csv, probes_csv
from fnet_search.rundir.config_path import CONFIG, config_path
from fnet_search.training.numerics import Numerics

FORMAT = 1
"""The format of the folders that this version writes. It reads all formats up to this one."""
KEPT = 3
"""Number of the best candidates whose weights are kept."""
PROMOTED = "promoted"
"""Name of the file that marks a requantized network which may win, as candidates may."""

_RECORDED = {
    **dict.fromkeys(("space", "dataset", "policy", "scheme", "split"), str),
    **dict.fromkeys(("recipe", "constraints", "data", "numerics"), dict),
    "seed": int,
}
"""Required keys of a configuration, with their types."""
_DATA = {"fingerprint", "classes", "mean", "std"}
"""Required keys of its `data`."""


@dataclass(frozen=True)
class RunFolder:
    """The paths and files of one run."""

    path: Path

    @property
    def name(self) -> str:
        """The name of the study: that of the folder when the run began, so that the folder may be moved."""
        recorded = self.config() if self.config_path.is_file() else {}
        return str(recorded.get("study", self.path.resolve().name))

    @property
    def journal(self) -> Path:
        return self.path / "journal.log"

    @property
    def artifacts(self) -> Path:
        folder = self.path / "artifacts"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def confusion(self) -> Path:
        """The file of the winner's confusion matrix, on the images that `read_test` was measured on."""
        return self.best / "confusion.csv"

    @property
    def config_path(self) -> Path:
        return self.path / CONFIG

    def candidate(self, number: int) -> Path:
        return self.path / "candidates" / f"{number:03d}"

    @property
    def exists(self) -> bool:
        """Whether a run was begun here. Raises FnetError if the path is a file or a folder of other files."""
        if self.config_path.is_file():
            return True
        if self.path.exists() and (not self.path.is_dir() or any(self._foreign())):
            raise FnetError(f"{self.path} exists and is not a run folder; choose another `out`")
        return False

    def _foreign(self) -> Iterator[Path]:
        return (entry for entry in self.path.iterdir() if not entry.name.startswith("."))

    def config(self) -> dict[str, Any]:
        """The recorded configuration, completed with defaults for the keys that earlier versions did not write.

        Raises FnetError if it is missing or invalid, or if the folder has a later format.
        """
        config = read_json(config_path(self.path))
        if not isinstance(config, dict):
            raise FnetError(f"{self.config_path} is not the configuration of a run")
        _check_format(self.path, config)
        for key, kind in _RECORDED.items():
            if not isinstance(config.get(key), kind):
                raise FnetError(f"{self.config_path} is not the configuration of a run: it has no proper {key!r}")
        valid = {
            "data": config["data"].keys() >= _DATA,
            "constraints": config["constraints"].keys() <= {field.name for field in fields(Constraints)},
            "numerics": _are_numerics(config["numerics"]),
        }
        for key, is_valid in valid.items():
            if not is_valid:
                raise FnetError(f"{self.config_path} is not the configuration of a run: it has no proper {key!r}")
        defaults = {"validation": HELD_OUT if config["split"] == "validation" else None, "has_test": True, "skipped": 0}
        return {**config, "data": {**defaults, **config["data"]}}

    @property
    def writable(self) -> bool:
        """Whether files can be written here. Tries it: permissions do not show that a file system is read-only."""
        try:
            with TemporaryFile(dir=self.path):
                return True
        except OSError:
            return False

    @contextmanager
    def locked_if_writable(self) -> Iterator[bool]:
        """Locks the folder as `locked` does if it is writable; yields whether it is."""
        if self.writable:
            with self.locked():
                yield True
        else:
            yield False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder for this process, and deletes the unfinished files of processes that were killed.

        Raises FnetError if another process holds the lock, or if the folder cannot be written.
        """
        lock = FileLock(self.path / ".lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout:
            raise FnetError(
                f"{self.path} is in use by another fnet-search process; wait for it, or name another run folder"
            ) from None
        except OSError as error:
            raise FnetError(f"cannot write to {self.path}: {error.strerror}") from None
        try:
            for unfinished in self.path.rglob(".*.tmp"):
                unfinished.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def write_config(self, config: Mapping[str, Any]) -> None:
        write_json(self.config_path, {"study": self.name, "format": FORMAT, **config, "versions": versions()})

    @property
    def worker(self) -> str:
        """The name of this folder's worker among those that share its study.

        It is generated at the first use, and anew in a folder that was moved or copied: no two folders share a name.
        """
        path, place = self.path / ".worker", f"{gethostname()}:{self.path.resolve()}"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if lines[1:] != [place]:
            lines = [f"{gethostname()}-{uuid4().hex[:8]}", place]
            write_text(path, "\n".join(lines) + "\n")
        return lines[0]

    def write_candidates(self, lines: Mapping[int, str]) -> None:
        """Writes candidates.csv from the `candidate_line` of every candidate, by number."""
        write_text(self.path / "candidates.csv", candidates_csv(lines))

    def listed(self) -> set[int]:
        """The numbers of the candidates in candidates.csv; lines that cannot be parsed are skipped."""
        path = self.path / "candidates.csv"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        return {int(line.partition(",")[0]) for line in lines if line.partition(",")[0].isdecimal()}

    def write_timings(self, seconds: Mapping[int, float]) -> None:
        lines = [f"{number},{seconds[number]}\n" for number in sorted(seconds)]
        write_text(self.path / "timings.csv", "".join(["number,seconds\n", *lines]))

    def write_probes(self, probes: Probes) -> Path:
        path = self.path / "probes.csv"
        write_text(path, probes_csv(probes))
        return path

    def write_explanation(self, explanation: Explanation) -> list[Path]:
        choices, front = self.path / "choices.csv", self.path / "front.csv"
        write_text(choices, choices_csv(explanation))
        write_text(front, front_csv(explanation))
        return [choices, front]

    def requantized(self, number: int) -> list[Path]:
        """The folders of a candidate's requantized networks, each named after its scheme."""
        return sorted(path.parent for path in self.candidate(number).glob("*/evaluation.json"))

    @property
    def promoted(self) -> tuple[Evaluation, ...]:
        """The evaluations of the requantized networks that may win. Raises FnetError as `read_evaluation` does."""
        marks = sorted(self.path.glob(f"candidates/[0-9]*/*/{PROMOTED}"))
        return tuple(read_evaluation(mark.with_name("evaluation.json")) for mark in marks)

    def codes(self, evaluation: Evaluation) -> Path:
        """The folder with the codes of an evaluated network, a candidate or a promoted requantized one."""
        candidate = self.candidate(evaluation.number)
        requantized = scheme_folder(candidate, evaluation.scheme)
        return requantized if (requantized / PROMOTED).is_file() else candidate

    def audits(self) -> dict[int, Audit]:
        """The audits in the candidates' files, by number. The study lacks those of winners, which are audited after
        their evaluations were recorded.

        Raises FnetError, naming the file, for one that is broken.
        """
        paths = [*self.path.glob("candidates/[0-9]*/evaluation.json"), *self.path.glob("best/evaluation.json")]
        evaluations = [read_evaluation(path) for path in paths]
        return {evaluation.number: evaluation.audit for evaluation in evaluations if evaluation.audit is not None}

    def write_candidate(self, evaluation: Evaluation, folder: Path | None = None) -> list[Path]:
        """Writes all files of a candidate but its weights; returns the paths of those that a user may want to read."""
        folder = folder or self.candidate(evaluation.number)
        write_text(folder / "plan.toml", plan_toml(evaluation.plan))
        write_json(folder / "evaluation.json", evaluation.to_json())
        write_text(folder / "layers.csv", layers_csv(evaluation))
        return [folder / "layers.csv", folder / "plan.toml"]

    def prune(
        self,
        evaluations: tuple[Evaluation, ...],
        constraints: Constraints,
        parents: Iterable[int] = (),
        among: Collection[int] | None = None,
        searching: bool = True,
    ) -> set[int]:
        """Deletes the checkpoints of finished candidates, and the weights of those that nobody needs.

        Kept are the weights of `kept_networks`, of `parents` and of candidates that were requantized.

        Args:
            among: numbers of the candidates that may have such files; None: any may.

        Returns the numbers to pass as `among` the next time, together with those of new candidates.
        """
        needed = kept_networks(evaluations, constraints, searching).union(parents)
        for number in [evaluation.number for evaluation in evaluations] if among is None else among:
            folder = self.candidate(number)
            (folder / CHECKPOINT).unlink(missing_ok=True)
            if number not in needed and not self.requantized(number):
                (folder / WEIGHTS).unlink(missing_ok=True)
                (folder / QUANTIZED).unlink(missing_ok=True)
        return needed

    def write_best(
        self, winner: Evaluation, test: Evaluation | None, model: ModelProto, confusion: balance.Confusion = ()
    ) -> None:
        """Replaces ``best/`` by the winner's files and ONNX file, and its test result and confusion matrix if given."""
        fresh = self.path / ".best"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        for folder in dict.fromkeys((self.candidate(winner.number), self.codes(winner))):
            for path in folder.iterdir():
                if path.is_file() and not path.name.startswith(".") and path.name not in (CHECKPOINT, PROMOTED):
                    shutil.copyfile(path, fresh / path.name)
        if test is not None:
            write_json(fresh / "test.json", test.to_json())
        if confusion:
            names = [result.name for result in (test or winner).classes]
            write_text(fresh / self.confusion.name, balance.confusion_csv(names, confusion))
        write_model(fresh / MODEL, model)
        shutil.rmtree(self.best, ignore_errors=True)
        fresh.rename(self.best)

    @property
    def weight_type(self) -> WeightType:
        """How the run's exported files store weights: as ``best/model.onnx``, or as int8 if there is none."""
        return read_weight_type(self.best / MODEL) or "int8"

    def has_best(self, winner: Evaluation, weight_type: WeightType) -> bool:
        """Whether ``best/`` holds the files of this very network, its ONNX file with weights of this type."""
        same = self._best(winner, "evaluation.json") is not None
        return same and read_weight_type(self.best / MODEL) == weight_type

    def read_test(self, winner: Evaluation) -> Evaluation | None:
        """The winner's test result, if this very network was measured before."""
        return self._best(winner, "test.json")

    def _best(self, winner: Evaluation, name: str) -> Evaluation | None:
        path = self.best / name
        if not path.is_file():
            return None
        try:
            evaluation = read_evaluation(path)
        except FnetError:  # a broken file is measured again
            return None
        return evaluation if _same(evaluation, winner) else None


def _same(first: Evaluation, second: Evaluation) -> bool:
    """Whether two evaluations are of the same quantized network."""
    facts = [
        (evaluation.number, evaluation.plan, evaluation.seed, evaluation.epochs, evaluation.scheme)
        for evaluation in (first, second)
    ]
    return facts[0] == facts[1]


def scheme_folder(candidate: Path, scheme: str) -> Path:
    """The folder of a candidate's network requantized with a scheme; without colons, which some file systems refuse."""
    return candidate / scheme.replace(":", "-")


def kept_networks(evaluations: tuple[Evaluation, ...], constraints: Constraints, searching: bool = True) -> set[int]:
    """The numbers of the networks whose weights are kept.

    In a search: the best `KEPT` candidates, the best final training, the reference and all parents. In a run of given
    plans (not `searching`): all.
    """
    if not searching:
        return {evaluation.number for evaluation in evaluations}
    ranked = ranking(evaluations, constraints)
    candidates = [evaluation.number for evaluation in ranked if evaluation.role == "candidate"][:KEPT]
    finals = [evaluation.number for evaluation in ranked if evaluation.role == "final"][:1]
    references = [evaluation.number for evaluation in evaluations if evaluation.role == "reference"]
    parents = [evaluation.parent for evaluation in evaluations if evaluation.parent is not None]
    return {*candidates, *finals, *references, *parents}


def _check_format(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises FnetError if this version cannot read the folder."""
    number, recorded = config.get("format", 0), config.get("versions")
    if type(number) is not int or number < 0:
        raise FnetError(f"{folder / 'config.json'} is not the configuration of a run: it has no proper 'format'")
    if number > FORMAT:
        writer = recorded.get("fnet-search", "unknown") if isinstance(recorded, dict) else "unknown"
        raise FnetError(
            f"{folder} was written by fnet-search {writer} in format {number}; this is fnet-search {__version__}, "
            f"which reads formats 0 to {FORMAT}: install the version that wrote it, or a later one"
        )


def _are_numerics(facts: dict[str, Any]) -> bool:
    try:
        Numerics.from_json(facts)
    except TypeError:
        return False
    return True


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation in a file. Raises FnetError, naming the file, if it is missing or holds something else."""
    try:
        return Evaluation.from_json(read_json(path))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FnetError(f"{path} is not the evaluation of a candidate") from None


def versions() -> dict[str, str]:
    """The versions of fnet-search and of the packages that a result depends on."""
    installed = {"fnet-search": __version__}
    for package in ("torch", "torchvision", "optuna", "numpy", "onnx", "onnxruntime"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:  # for example torch under another distribution name
            installed[package] = "unknown"
    return installed


def differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any], path: str = "") -> list[str]:
    """The keys of `wanted` whose values differ in `recorded`, one line each: ``seed: 0 recorded, 1 wanted``."""
    lines = []
    for key in wanted:
        name = f"{path}{key}"
        old, new = recorded.get(key), wanted[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{name}.")
        elif old != new:
            short = [f"{value!r}"[:60] for value in (old, new)]
            lines.append(name if "\n" in f"{old}{new}" else f"{name}: {short[0]} recorded, {short[1]} wanted")
    return lines
