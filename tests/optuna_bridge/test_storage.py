"""Storages by URL, journal files that several processes write to, and storages that are out of reach for a while."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from sqlalchemy.exc import DataError, InterfaceError, OperationalError

from fnet_search.base.errors import FnetError
from fnet_search.optuna_bridge import storage as storages
from fnet_search.optuna_bridge.storage import has_study, open_artifacts, open_journal, open_url
from fnet_search.optuna_bridge.storage_url import masked
from tests.support.storages import opened_as


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://me:secret@host:5432/db", "postgresql+psycopg://me:***@host:5432/db"),
        ("postgresql://me:se/c:r@t@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("postgresql://host/db?user=me&password=secret&sslmode=require", "postgresql://host/db?user=me&password=***&sslmode=require"),
        ("mysql+pymysql://me:@host/db", "mysql+pymysql://me:***@host/db"),
        ("sqlite:///folder/study.db", "sqlite:///folder/study.db"),
        ("journal:/folder/study.log", "journal:/folder/study.log"),
        ("grpc://host:13000", "grpc://host:13000"),
    ],
)  # fmt: skip
def test_passwords_are_masked(url: str, shown: str) -> None:
    assert masked(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "",
        "garbage",
        "sqlite:////no/such/folder/s.db",
        "nothing://me:secret@host/db",
        "mysql://me:secret@host/db",
        "postgresql+psycopg://me:secret@127.0.0.1:1/db",
        "grpc://host",
        "grpc://127.0.0.1:port",
        "journal:/no/such/folder/study.log",
        "journal:",
        "redis://me:secret@host",
    ],
)
def test_urls_that_cannot_be_opened(url: str) -> None:
    with pytest.raises(FnetError, match=r"^cannot open storage .*\(.+\); give an Optuna storage URL, as in ") as bad:
        open_url(url)
    assert "\n" not in str(bad.value)
    assert "secret" not in str(bad.value)


def test_studies_are_known_by_name(tmp_path: Path) -> None:
    storage = open_url(f"sqlite:///{tmp_path}/study.db")
    assert not has_study(storage, "one")
    optuna.create_study(storage=storage, study_name="one")
    assert has_study(storage, "one")
    assert not has_study(storage, "two")


# A storage that is out of reach


class Unreachable:
    """A storage whose first calls fail."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times = error, times

    def get_all_studies(self) -> list[Any]:
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return ["a study"]


def wrapped(cause: Exception) -> StorageInternalError:
    error = StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = cause
    return error


class RpcError(Exception):
    """As gRPC has them."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def code(self) -> Any:
        return self


LOST = Exception("server closed the connection unexpectedly")


@pytest.mark.parametrize(
    "error",
    [
        wrapped(OperationalError("select", {}, LOST)),
        OperationalError("select", {}, LOST),
        wrapped(InterfaceError("select", {}, LOST)),
        RpcError("UNAVAILABLE"),
        RpcError("DEADLINE_EXCEEDED"),
    ],
)
def test_a_storage_that_is_out_of_reach_is_tried_again(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "PAUSE", 0.01)
    patient = opened_as(Unreachable(error, 3), monkeypatch)
    told: list[str] = []
    storages.telling(patient, told.append)
    assert patient.get_all_studies() == ["a study"]  # type: ignore[comparison-overlap]
    assert len(told) == 3
    assert told[0].startswith("the storage is out of reach, trying again (")
    assert "\n" not in told[0]


@pytest.mark.parametrize(
    "error",
    [
        wrapped(DataError("insert", {}, Exception("value too long"))),
        UpdateFinishedTrialError("finished"),
        RpcError("NOT_FOUND"),
        KeyError("no study"),
        wrapped(OperationalError("update", {}, __import__("sqlite3").OperationalError("attempt to write a readonly"))),
    ],
)
def test_what_is_wrong_with_a_call_is_said_at_once(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = opened_as(Unreachable(error, 1), monkeypatch)
    with pytest.raises(type(error)):
        patient.get_all_studies()


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "PAUSE", 0.01)
    monkeypatch.setattr(storages, "PATIENCE", 0.05)
    patient = opened_as(Unreachable(OperationalError("select", {}, LOST), 1000), monkeypatch)
    with pytest.raises(FnetError, match=r"^the storage has been out of reach for 0 s: .*server closed the connection"):
        patient.get_all_studies()


def test_a_data_base_that_another_process_locks_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    monkeypatch.setattr(storages, "PAUSE", 0.05)
    storage = open_url(f"sqlite:///{tmp_path}/study.db?timeout=0.05")  # sqlite3 itself waits for so long
    with sqlite3.connect(tmp_path / "study.db", check_same_thread=False, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        threading.Timer(0.5, lambda: other.execute("COMMIT")).start()
        optuna.create_study(storage=storage, study_name="one")
    assert has_study(storage, "one")


# Journal files


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """The journal of a study with one trial."""
    path = tmp_path / "study.log"
    optuna.create_study(storage=open_url(f"journal:{path}"), study_name="one").ask()
    return path


def trials(storage: BaseStorage) -> list[TrialState]:
    return [trial.state for trial in storage.get_all_trials(0)]


@pytest.mark.parametrize("torn", [b'{"op_code":', b"{", b"\0\0\0"])
def test_a_line_that_a_killed_process_left_is_cut_off(journal: Path, torn: bytes) -> None:
    """When a run opens its own journal; where several processes share one, before one of them writes."""
    whole = journal.read_bytes()
    journal.write_bytes(whole + torn)
    assert trials(open_journal(journal)) == [TrialState.RUNNING]
    assert journal.read_bytes() == whole

    a = open_url(f"journal:{journal}")
    journal.write_bytes(whole + torn)
    b = open_url(f"journal:{journal}")
    assert trials(a) == trials(b) == [TrialState.RUNNING]
    optuna.load_study(study_name="one", storage=b).ask()
    assert trials(a) == trials(b) == [TrialState.RUNNING] * 2
    assert torn not in journal.read_bytes().splitlines()


def test_a_run_drops_the_lock_of_a_killed_process(journal: Path) -> None:
    lock = journal.with_name("study.log.lock")
    lock.symlink_to(journal)
    assert has_study(open_journal(journal), "one")
    assert not lock.is_symlink()


@pytest.mark.filterwarnings("ignore:The value of `grace_period`")
def test_the_lock_of_a_killed_process_holds_nobody_up_for_long(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storages.GRACE < 5, "Optuna's own patience is 30 seconds"
    monkeypatch.setattr(storages, "GRACE", 0.2)
    journal.with_name("study.log.lock").symlink_to(journal)
    began = time.monotonic()
    optuna.load_study(study_name="one", storage=open_url(f"journal:{journal}")).ask()
    assert 0.2 <= time.monotonic() - began < 15


@pytest.mark.parametrize("garbage", [b"hello\nworld\n", b"{}\n", b"[1]\n", b'{"op_code": 99, "worker_id": "x"}\n'])
def test_a_journal_of_something_else_is_refused(journal: Path, garbage: bytes) -> None:
    journal.write_bytes(garbage)
    with pytest.raises(FnetError, match=f"^cannot read journal {journal}: "):
        open_journal(journal)
    with pytest.raises(FnetError, match=f"^cannot open storage journal:{journal} "):
        open_url(f"journal:{journal}")


def test_many_processes_write_one_journal(journal: Path) -> None:
    """Each trial has a number of its own."""
    code = (
        "import optuna; from fnet_search.optuna_bridge.storage import open_url; optuna.logging.set_verbosity(40)\n"
        f"study = optuna.load_study(study_name='one', storage=open_url('journal:{journal}'))\n"
        "print([study.ask().number for _ in range(20)])"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = [number for process in running for number in eval(process.communicate()[0])]
    assert sorted(found) == list(range(1, 61))


# Artifact stores


def test_a_folder_is_an_artifact_store(tmp_path: Path) -> None:
    import io

    open_artifacts(str(tmp_path / "store")).write("one", io.BytesIO(b"weights"))
    assert (tmp_path / "store" / "one").read_bytes() == b"weights"


@pytest.mark.parametrize("where", ["/no/such/folder", "ftp://host/folder", "s3://"])
def test_stores_that_cannot_be_opened(where: str) -> None:
    with pytest.raises(FnetError, match=f"^cannot open artifact store {where}: ") as bad:
        open_artifacts(where)
    assert "\n" not in str(bad.value)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FnetError, match=r"^cannot open artifact store "):
        open_artifacts(str(tmp_path / "store"))
