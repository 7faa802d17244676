"""A study that several processes work on, on other hosts too: what its run leaves in it for whoever joins."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from optuna.artifacts import get_all_artifact_meta, upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import BaseStorage
from optuna.study import Study

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.base.errors import FnetError
from fnet_search.base.version import __version__
from fnet_search.engine.request import JoinRequest, Request, as_json, completed, request_from
from fnet_search.engine.study_record import Sharing
from fnet_search.optuna_bridge.storage import has_study, open_artifacts, open_url
from fnet_search.optuna_bridge.storage_url import masked
from fnet_search.policy.evaluation import HELD_OUT
from fnet_search.policy.registry import load_policy
from fnet_search.rundir.recorded_run import RecordedRun
from fnet_search.rundir.run_folder import FORMAT, RunFolder, differences
from fnet_search.training.datasets import DataSet
from fnet_search.training.weights import digest, read_tensors, write_tensors

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

SHARED_RUN = "fnet_search:run"
"""System attribute of a study: what was published."""
IMPORTED_WEIGHTS = "imported.safetensors"
"""Artifact of a study: the weights of an imported network."""
VERSION = f"{__version__}, format {FORMAT}"
"""What all workers on a study must have in common. One text, so that versions which knew no formats refuse it too."""


@dataclass(frozen=True)
class SharedRun:
    """What a worker must know that joins a study."""

    version: str
    """VERSION of the run."""
    config: Mapping[str, Any]
    """As `Request.config`, but for where the storage is, which each host may name otherwise."""
    data: Mapping[str, Any]
    """Fingerprint and classes of the data set, and where its validation images are."""
    fidelity: Mapping[str, Any]
    trials: int
    audit_all: bool
    artifacts: str
    """Where weights lie, as `Request.artifacts`."""
    lease: float
    """Seconds."""

    def request(self, join: JoinRequest) -> Request:
        """What the run was asked for, on another host. Raises FnetError where this version makes another of it."""
        request = request_from(
            self.config,
            self.fidelity,
            trials=self.trials,
            audit_all=self.audit_all,
            lease=self.lease,
            machine=join.machine,
            storage=join.storage,
            validation=join.validation or self.data.get("validation", HELD_OUT),
            artifacts=join.artifacts or self.artifacts,
        )
        again = {**_config(request), "weights": self.config["weights"]}
        if odd := differences(completed(self.config), again):
            raise FnetError(f"this version understands the study's configuration otherwise ({'; '.join(odd)})")
        policy, dataset = load_policy(request.policy_name), join.dataset or request.dataset
        return replace(request, policy=policy, dataset=dataset)


def _config(request: Request) -> dict[str, Any]:
    config = request.config()
    del config["storage"]
    return config


def read_shared_run(storage: BaseStorage, name: str) -> SharedRun:
    """Raises FnetError where there is no such study, it is not one of a shared run, or of another version or format."""
    facts = _read_facts(storage, name)
    if facts.get("version") != VERSION:
        raise FnetError(
            f"study {name!r} is one of fnet-search {facts.get('version')}, this is {VERSION}; install the same"
        )
    return SharedRun(**facts)


def _read_facts(storage: BaseStorage, name: str) -> Mapping[str, Any]:
    """The fields of `SharedRun`, as some version wrote them."""
    if not has_study(storage, name):
        raise FnetError(f"the storage has no study {name!r}; start one with fnet-search run --storage ... --out {name}")
    facts = storage.get_study_system_attrs(storage.get_study_id_from_name(name)).get(SHARED_RUN)
    if facts is None:
        raise FnetError(f"study {name!r} was not begun by fnet-search run --storage: it has no configuration")
    known: Mapping[str, Any] = facts
    return known


def share_run(study: Study, request: Request, data: DataSet, artifacts: Path | str) -> None:
    """Leaves the configuration in a study, and the weights of an imported network in the artifact store; again where a
    run goes on, with more trials. Raises FnetError where another run has left another one."""
    facts = {"fingerprint": data.fingerprint(), "classes": list(data.classes), "validation": data.validation}
    new = SharedRun(
        VERSION,
        _config(request),
        facts,
        asdict(request.fidelity),
        request.trials,
        request.audit_all,
        str(artifacts),
        request.lease,
    )
    known = study._storage.get_study_system_attrs(study._study_id).get(SHARED_RUN)
    if known is not None and (odd := differences(completed(known["config"]), new.config)):
        raise FnetError(f"the study in the storage was begun with another configuration ({'; '.join(odd)})")
    study._storage.set_study_system_attr(study._study_id, SHARED_RUN, as_json(asdict(new)))


def check_data(known: SharedRun, data: DataSet) -> None:
    """Raises FnetError for other data than the run's."""
    if data.fingerprint() != known.data["fingerprint"]:
        raise FnetError(
            f"the data set here is not the run's: its fingerprint is {data.fingerprint()}, the run's "
            f"{known.data['fingerprint']}; name the same images with `dataset`, `validation`"
        )


def sharing_of(request: Request, run: RunFolder) -> Sharing:
    """How a run, or a worker that joined it, shares its study. Raises FnetError for an artifact store that cannot be
    opened."""
    return Sharing(run.worker, open_artifacts(artifacts_of(request, run)), request.lease)


def shared_storage(opened: RecordedRun, storage: str | None) -> tuple[BaseStorage, Sharing | None] | None:
    """The storage that the study of a recorded run is in, and how it is shared; None: it is in the run folder.

    `storage` is the URL of another place to find it than the recorded one. Raises FnetError for one without the study.
    """
    run, url = opened.run, storage or opened.config.get("storage")
    if url is None:
        return None
    opened_storage = open_url(url, new=False)
    if not has_study(opened_storage, run.name):
        raise FnetError(f"storage {masked(url)} has no study {run.name!r}; give the URL that the run had as `storage`")
    if not opened.searching:
        return opened_storage, None
    known = _read_facts(opened_storage, run.name)  # of any version whose folders can be read: nothing is trained
    return opened_storage, Sharing(run.worker, open_artifacts(known["artifacts"]), known["lease"])


def artifacts_of(request: Request, run: RunFolder) -> str:
    """Where weights lie that others need: absolute, since others work in other folders."""
    where = request.artifacts or str(run.artifacts)
    return where if "://" in where else str(Path(where).expanduser().resolve())


def share_weights(study: Study, store: "ArtifactStore", space: Macroarchitecture) -> None:
    """Leaves the weights of an imported network in the artifact store, once."""
    if space.weights is None or any(meta.filename == IMPORTED_WEIGHTS for meta in get_all_artifact_meta(study)):
        return
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / IMPORTED_WEIGHTS
        write_tensors(path, space.weights, {"space": space.name})
        upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=study)


def with_weights(
    space: Macroarchitecture, wanted: str | None, study: Study, store: "ArtifactStore"
) -> Macroarchitecture:
    """The space with the weights that the run has left, if it has any (`wanted`: their digest). Raises FnetError where
    they are missing, or others."""
    if wanted is None:
        return space
    ids = [meta.artifact_id for meta in get_all_artifact_meta(study) if meta.filename == IMPORTED_WEIGHTS]
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / IMPORTED_WEIGHTS
        try:
            with store.open_reader(ids[0]) as opened:
                path.write_bytes(opened.read())
        except (IndexError, OSError, ArtifactNotFound):
            missing = "the weights of the network are not in the artifact store; name the run's with `artifacts`"
            raise FnetError(missing) from None
        weights, _ = read_tensors(path)
    if digest(weights) != wanted:
        raise FnetError("the weights of the network in the artifact store are not the run's")
    return replace(space, weights=weights)
