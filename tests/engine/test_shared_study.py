"""A study that several processes share, with real servers, real kills and real training."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import pandas as pd
import pytest
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta
from optuna.storages import run_grpc_proxy_server

from fnet_policies import Random
from fnet_search.api import search
from fnet_search.arch.factorize import factorize
from fnet_search.arch.plan import regular
from fnet_search.base.errors import FnetError
from fnet_search.base.version import __version__
from fnet_search.engine.request import JoinRequest, Machine, Request
from fnet_search.engine.run import run_study
from fnet_search.engine.shared_study import SHARED_RUN, read_shared_run, share_weights, with_weights
from fnet_search.importing.spaces import load_space
from fnet_search.optuna_bridge.storage import open_url
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import HELD_OUT
from fnet_search.quant.scheme import Scheme
from fnet_search.rundir.recorded_run import open_run
from fnet_search.rundir.run_folder import RunFolder
from fnet_search.training.deadline import Deadline, TimeUp
from fnet_search.training.network import build
from fnet_search.training.recipe import Fidelity, load_recipe
from fnet_search.training.weights import digest
from tests.support.command_line import PLAIN, Result, files_in, in_process, process
from tests.support.runs import WARM, Notes
from tests.support.servers import PASSWORD, free_port, postgres

ROOT = Path(__file__).parents[2]
TINY = load_space("tiny")
pytestmark = pytest.mark.usefixtures("one_picture")


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    pytest.importorskip("psycopg", reason="no PostgreSQL client: install fnet-search[postgresql]")
    with postgres() as url:
        yield url


@pytest.fixture
def grpc(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("grpc", reason="no gRPC: install grpcio")
    port = free_port()
    server = multiprocessing.get_context("spawn").Process(
        target=run_grpc_proxy_server,
        args=(optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/study.db"),),
        kwargs={"port": port},
        daemon=True,
    )
    server.start()
    optuna.storages.GrpcStorageProxy(port=port).wait_server_ready(timeout=60)
    yield f"grpc://127.0.0.1:{port}"
    server.terminate()


def faults(storage: str, out: Path) -> dict[str, str]:
    """The table of the benchmark, small: real processes, SIGKILL."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "policies")])
    asked = ["--workers", "3", "--plans", "30", "--kills", "4", "--lease", "3", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "benchmarks/faults.py", storage, *asked],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert PASSWORD not in done.stdout + done.stderr
    return {line[:52].strip(): line[52:].strip() for line in done.stdout.splitlines()}


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["journal", "database", "grpc"])
def test_workers_that_are_killed_lose_nothing(storage: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    rows = faults("journal" if storage == "journal" else request.getfixturevalue(storage), tmp_path / "faults")
    found = [rows[name] for name in ("plans finished", "killed", "finished twice", "lost", "still running")]
    assert found == ["30", "4", "0", "0", "0"]


ASKED = ("--space", "tiny", "--budget", "60%", "--policy", "random", "--epochs", "2", "--trials", "4")


@pytest.mark.slow
def test_a_run_and_a_worker_share_candidates_and_no_password(database: str, tmp_path: Path) -> None:
    """Two processes, one of which is killed as soon as it trains, and started again."""
    url = ("--storage", database)
    run = process("run", *ASKED, *url, "--lease", "20", "--out", "shared", *PLAIN, cwd=tmp_path)
    until = time.monotonic() + 120
    while not (tmp_path / "shared" / "candidates.csv").is_file():
        assert time.monotonic() < until
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    joined = ("worker", *url, "--study", "shared", *PLAIN)
    worker = process(*joined, cwd=tmp_path)
    assert worker.stdout is not None
    said = next(line for line in worker.stdout if re.match(r"candidate \d+ .*: epoch", line) or "is done" in line)
    os.killpg(worker.pid, 9)
    killed = (said, *worker.communicate())
    worker = process(*joined, cwd=tmp_path)
    texts = [*killed, *run.communicate(), *worker.communicate()]
    assert (run.returncode, worker.returncode) == (0, 0), texts
    tables = [pd.read_csv(tmp_path / folder / "candidates.csv") for folder in ("shared", "runs/shared-worker")]
    assert (
        tables[0]
        .drop(columns=["audited_codes", "differing_codes"])
        .equals(tables[1].drop(columns=["audited_codes", "differing_codes"]))
    )
    table = tables[0]
    assert table["number"].tolist() == list(range(len(table)))
    assert (table["role"] == "reference").sum() == 1
    assert (table["role"] == "final").sum() == 1
    trained = table[(table["role"] == "candidate") & (table["state"] != "refused")]
    assert len(trained) == 4
    assert trained["plan"].is_unique
    assert (tmp_path / "shared" / "best" / "model.onnx").is_file()
    # The password of the data base is in no file and no line.
    assert PASSWORD.encode() not in b"".join([*files_in(tmp_path).values(), *(text.encode() for text in texts)])
    config = json.loads((tmp_path / "shared" / "config.json").read_text())
    assert config["storage"].startswith("postgresql+psycopg://me:***@127.0.0.1:")
    # What is done again afterwards leaves the shared study as it is.
    report = process("report", "shared", *url, cwd=tmp_path)
    _, err = report.communicate()
    assert report.returncode == 0, err
    assert not set(Path(tmp_path, "shared").glob("*.tmp"))
    study = optuna.load_study(study_name="shared", storage=open_url(database))
    assert sum(trial.state.name == "COMPLETE" for trial in study.trials) == (table["state"] == "complete").sum()


def test_a_worker_ends_what_a_run_has_begun(fnet: Callable[..., Result], tmp_path: Path) -> None:
    """The run was stopped after its reference; with the worker's candidates it has all of them."""
    url = f"journal:{tmp_path}/study.log"
    request = replace(WARM, policy=Random(), trials=1, storage=url, artifacts=str(tmp_path / "store"))
    with pytest.raises(TimeUp):
        run_study(request, RunFolder(tmp_path / "shared"), Notes(), Deadline(0))
    code, out, _ = fnet("worker", "--storage", url, "--study", "shared", *PLAIN)
    assert code == 0
    assert out.splitlines()[-1] == "study shared is done; this worker finished 2 of the 2 candidates since it joined"
    notes = Notes()
    outcome = run_study(request, RunFolder(tmp_path / "shared"), notes)
    assert notes.started == []
    assert [one.role for one in outcome.evaluations] == ["reference", "candidate", "final"]
    assert outcome.winner is not None
    assert (tmp_path / "shared" / "best" / "model.onnx").is_file()


# What a worker refuses


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The storage of a run that is done, and its folder."""
    folder = tmp_path_factory.mktemp("begun")
    code, _, err = in_process(
        *("run", "--space", "tiny", "--budget", "100%", "--policy", "reverse-pyramid", "--epochs", "1"),
        *("--trials", "1", "--no-warm-start", "--final-epochs", "0", "--storage", f"journal:{folder}/study.log"),
        *("--artifacts", str(folder / "store"), "--out", str(folder / "study"), *PLAIN),
    )
    assert code == 0, err
    return f"journal:{folder}/study.log", folder / "study"


def test_a_worker_that_comes_when_all_is_done(begun: tuple[str, Path], fnet: Callable[..., Result]) -> None:
    code, out, _ = fnet("worker", "--storage", begun[0], "--study", "study", *PLAIN)
    assert code == 0
    assert out.splitlines()[-1] == "study study is done; this worker finished 0 of the 0 candidates since it joined"


@pytest.mark.slow
def test_the_dashboard_of_a_shared_study_serves_its_artifacts(begun: tuple[str, Path]) -> None:
    pytest.importorskip("optuna_dashboard", reason="no dashboard: install fnet-search[dashboard]")
    from fnet_search.cli.dashboard import open_dashboard

    shown = open_dashboard(open_run(begun[1]), None)
    (picture,) = (one for one in get_all_artifact_meta(shown.study) if one.filename == "accuracy_vs_macs.png")
    with shown.artifacts.open_reader(picture.artifact_id) as opened:
        assert opened.read() == (begun[1] / "figures" / "accuracy_vs_macs.png").read_bytes()
    assert (begun[1].parent / "store" / picture.artifact_id).is_file()


def test_a_worker_of_a_study_that_is_not_there(begun: tuple[str, Path], refused: Callable[..., str]) -> None:
    line = refused("worker", "--storage", begun[0], "--study", "other")
    assert line == "the storage has no study 'other'; start one with fnet-search run --storage ... --out other"


@pytest.mark.parametrize("other", ["9.9, format 1", f"{__version__}, format 2", __version__])
def test_a_worker_of_another_version(
    begun: tuple[str, Path], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """Or of the version before formats had numbers, which compares the same text."""
    monkeypatch.setattr("fnet_search.engine.shared_study.VERSION", other)
    line = refused("worker", "--storage", begun[0], "--study", "study")
    written, here = f"fnet-search {__version__}, format 1", f"fnet-search {other}"
    assert line == f"study 'study' was written by {written}; this is {here}: install the same version"


def test_a_worker_with_other_images(begun: tuple[str, Path], refused: Callable[..., str], tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for name in "0123456789":
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(12):
                Image.new("L", (8, 8), number * 20).save(folder / f"{number}.png")
    images = ("--dataset", f"imagefolder:{tmp_path}/images")
    line = refused("worker", "--storage", begun[0], "--study", "study", *images, *PLAIN)
    assert line.startswith("the data set here is not the run's: its fingerprint is ")


def test_a_worker_of_a_study_of_somebody_else(refused: Callable[..., str], tmp_path: Path) -> None:
    url = f"journal:{tmp_path}/other.log"
    optuna.create_study(storage=open_url(url), study_name="study").ask()
    line = refused("worker", "--storage", url, "--study", "study")
    assert line == "study 'study' was not begun by fnet-search run --storage: it has no configuration"


def test_a_second_run_of_the_same_name_is_shown_the_worker(
    begun: tuple[str, Path], refused: Callable[..., str]
) -> None:
    asked = ("--space", "tiny", "--budget", "100%", "--storage", begun[0], "--out", "study", *PLAIN)
    assert refused("run", *asked).endswith("or work on it too: fnet-search worker --storage ... --study study")


def test_artifacts_are_of_shared_studies(refused: Callable[..., str]) -> None:
    for option, value in (("--artifacts", "store"), ("--lease", "5")):
        assert refused("run", "--budget", "100%", option, value) == (
            f"{option} requires --storage; give that too, or leave it out"
        )


# What is published


def request(**changes: object) -> Request:
    known = {
        "space": TINY,
        "dataset": "digits",
        "recipe": load_recipe("quick").with_epochs(3),
        "fidelity": Fidelity(True, 0.5, True, 3),
        "policy_name": "random",
        "constraints": Constraints(conv_macs=500_000, min_quint8=0.5),
        "schemes": (Scheme(per_channel=True),),
        "seed": 7,
        "split": "validation",
        "storage": "journal:study.log",
        "lease": 60.0,
    }
    return Request(**{**known, **changes})  # type: ignore[arg-type]


def test_a_request_travels_in_the_study(begun: tuple[str, Path]) -> None:
    known = read_shared_run(open_url(begun[0]), "study")
    asked = request()
    config = asked.config()
    del config["storage"]
    fidelity = vars(asked.fidelity)
    there = replace(known, config=json.loads(json.dumps(config)), fidelity=json.loads(json.dumps(fidelity)), lease=60.0)
    machine = Machine(workers=3)
    assert there.request(JoinRequest("grpc://host:1", "study", machine, artifacts="store")) == replace(
        asked, storage="grpc://host:1", machine=machine, artifacts="store", validation=HELD_OUT
    )
    moved = there.request(JoinRequest("x", "study", machine, "imagefolder:/there", "/there/val", "store"))
    assert (moved.dataset, moved.validation) == ("imagefolder:/there", "/there/val")


@pytest.mark.parametrize("missing", ["recipe", "space", "constraints", "seed"])
def test_a_configuration_of_another_time_is_refused(begun: tuple[str, Path], missing: str) -> None:
    known = read_shared_run(open_url(begun[0]), "study")
    config = {name: value for name, value in known.config.items() if name != missing}
    with pytest.raises(FnetError, match="configuration"):
        replace(known, config=config).request(JoinRequest("x", "study"))


def test_one_configuration_a_study(tmp_path: Path) -> None:
    """Two runs that begin at the same moment under one name."""
    asked = {"budget": "100%", "policy": "reverse-pyramid", "epochs": 1, "trials": 1, "warm_start": False}
    machine = Machine(dtype="float32", fused=False, workers=0)
    url = f"journal:{tmp_path}/study.log"
    first = search("tiny", **asked, storage=url, out=tmp_path / "a" / "study", machine=machine)  # type: ignore[arg-type]
    assert first.winner is not None
    with pytest.raises(FnetError, match="the storage has a study 'study' of another run folder"):
        search("tiny", **asked, storage=url, out=tmp_path / "b" / "study", machine=machine)  # type: ignore[arg-type]
    with pytest.raises(FnetError, match=r"another configuration \(seed: 0 recorded, 1 wanted\)"):
        search("tiny", **asked, seed=1, storage=url, out=tmp_path / "a" / "study", machine=machine)  # type: ignore[arg-type]
    facts = open_url(url).get_study_system_attrs(0)[SHARED_RUN]
    assert facts["trials"] == 1
    assert "storage" not in facts["config"]


def test_imported_weights_travel_as_an_artifact(tmp_path: Path) -> None:
    weights = build(factorize(TINY, regular(TINY)), "glorot_uniform", 0).state_dict()
    space = replace(TINY, weights=weights)
    study, store = optuna.create_study(), FileSystemArtifactStore(tmp_path)
    for _ in range(2):
        share_weights(study, store, space)
    assert len(list(tmp_path.iterdir())) == 1
    found = with_weights(TINY, digest(weights), study, store).weights
    assert found is not None
    assert digest(found) == digest(weights)
    assert with_weights(TINY, None, study, store) is TINY
    with pytest.raises(FnetError, match="are not those of the run"):
        with_weights(TINY, "0" * 16, study, store)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(FnetError, match="are not in the artifact store"):
        with_weights(TINY, digest(weights), study, store)
