"""A study that several processes work on, possibly on other hosts: what the run publishes in it for workers that join
(docs/sharing.md)."""

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
from fnet_search.deploy.weight_type import WeightType
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
"""System attribute of a study: the `SharedRun` that its run published."""
IMPORTED_WEIGHTS = "imported.safetensors"
"""Artifact of a study: the weights of an imported network."""
VERSION = f"{__version__}, format {FORMAT}"
"""Version and folder format, which all workers on a study must have in common. They are one text, so that versions
from before the formats, which compare the version only, refuse the study too."""


@dataclass(frozen=True)
class SharedRun:
    """What a run publishes in its study for workers that join."""

    version: str
    """VERSION of the process that published it."""
    config: Mapping[str, Any]
    """`Request.config` without the storage, whose URL may differ between hosts and may hold a password."""
    data: Mapping[str, Any]
    """Fingerprint and classes of the data set, and the source of its validation images (`DataSet.validation`)."""
    fidelity: Mapping[str, Any]
    trials: int
    audit_all: bool
    weight_type: WeightType | None
    artifacts: str
    """The artifact store with the weights, as in `Request.artifacts`."""
    lease: float
    """Seconds, as in `Request.lease`."""

    def request(self, join: JoinRequest) -> Request:
        """The run's request, for the host of a worker. Raises FnetError if this version reads the configuration
        differently."""
        request = request_from(
            self.config,
            self.fidelity,
            trials=self.trials,
            audit_all=self.audit_all,
            weight_type=self.weight_type,
            lease=self.lease,
            machine=join.machine,
            storage=join.storage,
            validation=join.validation or self.data.get("validation", HELD_OUT),
            artifacts=join.artifacts or self.artifacts,
        )
        read_back = {**_config(request), "weights": self.config["weights"]}
        if changed := differences(completed(self.config), read_back):
            raise FnetError(f"this version reads the study's configuration differently ({'; '.join(changed)})")
        policy, dataset = load_policy(request.policy_name), join.dataset or request.dataset
        return replace(request, policy=policy, dataset=dataset)


def _config(request: Request) -> dict[str, Any]:
    config = request.config()
    del config["storage"]
    return config


def read_shared_run(storage: BaseStorage, name: str) -> SharedRun:
    """What the run of a study has published.

    Raises FnetError if there is no such study, if it was not begun by a shared run, and for another version or format.
    """
    facts = _read_facts(storage, name)
    if facts.get("version") != VERSION:
        raise FnetError(
            f"study {name!r} was written by fnet-search {facts.get('version')}; this is fnet-search {VERSION}: install "
            "the same version"
        )
    return SharedRun(**facts)


def _read_facts(storage: BaseStorage, name: str) -> Mapping[str, Any]:
    """The fields of a `SharedRun`, as whichever version wrote them. Raises FnetError if there are none."""
    if not has_study(storage, name):
        raise FnetError(f"the storage has no study {name!r}; start one with fnet-search run --storage ... --out {name}")
    facts = storage.get_study_system_attrs(storage.get_study_id_from_name(name)).get(SHARED_RUN)
    if facts is None:
        raise FnetError(f"study {name!r} was not begun by fnet-search run --storage: it has no configuration")
    published: Mapping[str, Any] = facts
    return published


def share_run(study: Study, request: Request, data: DataSet, artifacts: Path | str) -> None:
    """Publishes a run in its study, as a `SharedRun`. A resumed run publishes itself again, as its number of trials may
    have changed.

    Raises FnetError if another configuration was published before.
    """
    facts = {"fingerprint": data.fingerprint(), "classes": list(data.classes), "validation": data.validation}
    shared = SharedRun(
        VERSION,
        _config(request),
        facts,
        asdict(request.fidelity),
        request.trials,
        request.audit_all,
        request.weight_type,
        str(artifacts),
        request.lease,
    )
    before = study._storage.get_study_system_attrs(study._study_id).get(SHARED_RUN)
    if before is not None and (changed := differences(completed(before["config"]), shared.config)):
        raise FnetError(f"the study in the storage was begun with another configuration ({'; '.join(changed)})")
    study._storage.set_study_system_attr(study._study_id, SHARED_RUN, as_json(asdict(shared)))


def check_data(shared: SharedRun, data: DataSet) -> None:
    """Raises FnetError if the data are not those of the run, by their fingerprint."""
    if data.fingerprint() != shared.data["fingerprint"]:
        raise FnetError(
            f"the data set here is not the run's: its fingerprint is {data.fingerprint()}, the run's "
            f"{shared.data['fingerprint']}; name the same images with `dataset` and `validation`"
        )


def sharing_of(request: Request, run: RunFolder) -> Sharing:
    """How a run, or a worker that joined it, shares its study. Raises FnetError if the artifact store cannot be
    opened."""
    return Sharing(run.worker, open_artifacts(artifacts_of(request, run)), request.lease)


def shared_storage(opened: RecordedRun, storage: str | None) -> tuple[BaseStorage, Sharing | None] | None:
    """The storage of a recorded run's study, and how the study is shared (None in a run of given plans).

    None if the study is in the run folder. Raises FnetError if the storage cannot be opened or has no such study.

    Args:
        storage: URL of the storage; None: the recorded one.
    """
    run, url = opened.run, storage or opened.config.get("storage")
    if url is None:
        return None
    opened_storage = open_url(url, new=False)
    if not has_study(opened_storage, run.name):
        raise FnetError(f"storage {masked(url)} has no study {run.name!r}; give the URL that the run had as `storage`")
    if not opened.searching:
        return opened_storage, None
    facts = _read_facts(opened_storage, run.name)  # the version need not be the same: nothing is trained
    return opened_storage, Sharing(run.worker, open_artifacts(facts["artifacts"]), facts["lease"])


def artifacts_of(request: Request, run: RunFolder) -> str:
    """The artifact store of a run: a URL, or an absolute path, because workers run in other working directories."""
    store = request.artifacts or str(run.artifacts)
    return store if "://" in store else str(Path(store).expanduser().resolve())


def share_weights(study: Study, store: "ArtifactStore", space: Macroarchitecture) -> None:
    """Publishes the weights of an imported network, if there are any, as an artifact of the study; only once."""
    if space.weights is None or any(meta.filename == IMPORTED_WEIGHTS for meta in get_all_artifact_meta(study)):
        return
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / IMPORTED_WEIGHTS
        write_tensors(path, space.weights, {"space": space.name})
        upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=study)


def with_weights(
    space: Macroarchitecture, wanted: str | None, study: Study, store: "ArtifactStore"
) -> Macroarchitecture:
    """The space with the weights that the run has published (`share_weights`).

    Raises FnetError if they are missing, or are not those of the run.

    Args:
        wanted: the digest of the weights; None: the run has none, and the space is returned as it is.
    """
    if wanted is None:
        return space
    ids = [meta.artifact_id for meta in get_all_artifact_meta(study) if meta.filename == IMPORTED_WEIGHTS]
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / IMPORTED_WEIGHTS
        try:
            with store.open_reader(ids[0]) as opened:
                path.write_bytes(opened.read())
        except (IndexError, OSError, ArtifactNotFound):
            raise FnetError(
                "the weights of the network are not in the artifact store; name the run's store with `artifacts`"
            ) from None
        weights, _ = read_tensors(path)
    if digest(weights) != wanted:
        raise FnetError("the weights of the network in the artifact store are not those of the run")
    return replace(space, weights=weights)
