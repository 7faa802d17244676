"""Optuna storages by URL, the journal file of a run folder, and artifact stores.

Calls to a storage that cannot be reached are repeated until it answers, for up to PATIENCE seconds.
"""

import re
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import optuna
from filelock import FileLock
from optuna.artifacts import Backoff, Boto3ArtifactStore, FileSystemArtifactStore, GCSArtifactStore
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from fnet_search.base.errors import FnetError, first_line
from fnet_search.optuna_bridge.storage_url import cannot_open, check_there, masked

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

PATIENCE = 600.0
"""Seconds that a storage may be unreachable before the work on its study ends: enough to restart a server."""
PAUSE = 2.0
"""Seconds between two attempts to reach a storage."""
TIMEOUT = 30
"""Seconds after which a connection to PostgreSQL or MySQL without an answer counts as lost."""
GRACE = 3
"""Seconds after which the lock of a journal file counts as left by a killed process."""
ATTEMPTS = 10
"""At most this many attempts, half a second apart, to open a database while another process creates its tables."""


def open_url(url: str, new: bool = True) -> BaseStorage:
    """The storage behind a URL: one of SQLAlchemy (``optuna.storages.RDBStorage``), ``grpc://host:port``
    (``GrpcStorageProxy``), or ``journal:PATH``, a journal file that several processes share. `new` creates its file.

    Raises FnetError, which hides the password, if it cannot be opened.
    """
    check_there(url, new)
    try:
        if url.startswith("journal:"):
            return _shared_journal(Path(url.removeprefix("journal:")))
        return _patient(_grpc(url) if url.startswith("grpc://") else optuna.storages.get_storage(_rdb(url)))
    except Exception as error:  # whatever SQLAlchemy, its drivers and gRPC raise for a bad URL
        raise cannot_open(url, _without_password(first_line(error), url)) from None


def _without_password(text: str, url: str) -> str:
    """A message of a library that may quote the URL, with the password masked."""
    text = text.replace(url, masked(url))
    for secret in re.findall(r"(?<=://)[^:/@]*:(.+)@", url):
        text = text.replace(secret, "***").replace(unquote(secret), "***")
    return text


def _rdb(url: str) -> RDBStorage:
    """A relational database. Connections are tested before use and dropped if no answer comes for TIMEOUT seconds."""
    from sqlalchemy.exc import SQLAlchemyError

    limits: dict[str, Any] = {}
    if url.startswith(("postgresql", "postgres")):
        alive = {"keepalives": 1, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 4}
        limits = {"connect_timeout": 10, "tcp_user_timeout": 1000 * TIMEOUT, **alive}
    elif url.startswith("mysql"):
        limits = {"connect_timeout": 10, "read_timeout": TIMEOUT, "write_timeout": TIMEOUT}
    attempt = 1
    while True:
        try:
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True, "connect_args": limits})
        except SQLAlchemyError as error:  # another process is creating the tables
            if attempt == ATTEMPTS or not re.search(r"(?i)already exists|duplicate", str(error)):
                raise
        attempt += 1
        time.sleep(0.5)


def _grpc(url: str) -> BaseStorage:
    address = re.fullmatch(r"grpc://([^:/]+|\[[^\]]+\]):(\d{1,5})/?", url)
    if address is None:
        raise ValueError("no host and port")
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        proxy = GrpcStorageProxy(host=address[1], port=int(address[2]))
    proxy.wait_server_ready(timeout=10)
    return proxy


# Storages that are unreachable for a while


def _patiently(name: str) -> Callable[..., Any]:
    def call(self: "_Patient", *args: Any, **kwargs: Any) -> Any:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return getattr(self.storage, name)(*args, **kwargs)
            except Exception as error:
                if not _unreachable(error):
                    raise
                if time.monotonic() > until:
                    raise FnetError(f"the storage has been out of reach for {PATIENCE:.0f} s: {_line(error)}") from None
                self.tell(f"the storage is out of reach, trying again ({_line(error)})")
            time.sleep(PAUSE)

    return call


class _Patient:
    """A storage whose methods (those of `BaseStorage`) are repeated while it cannot be reached.

    A call whose answer was lost may take effect twice. That is harmless for attributes and states, which are set to the
    same value again; a second trial is recognized as such (`leases`).
    """

    def __init__(self, storage: BaseStorage) -> None:
        self.storage = storage
        self.tell: Callable[[str], None] = lambda text: None
        """Called with a message after each failed attempt."""


_methods = {name: _patiently(name) for name in dir(BaseStorage) if not name.startswith("_")}
_PatientStorage = type("_PatientStorage", (_Patient, BaseStorage), _methods)


def _patient(storage: BaseStorage) -> BaseStorage:
    patient: BaseStorage = _PatientStorage(storage)
    return patient


def telling(storage: BaseStorage, tell: Callable[[str], None]) -> None:
    """Lets `tell` be called with a message whenever the storage cannot be reached."""
    if isinstance(storage, _Patient):
        storage.tell = tell


def _line(error: BaseException) -> str:
    return first_line(error.__cause__ or error)


def _unreachable(error: Exception) -> bool:
    """Whether an error means that the storage cannot be reached (or that SQLite is busy): the call may succeed
    later."""
    from sqlalchemy.exc import InterfaceError, OperationalError

    cause = error.__cause__ or error
    if isinstance(cause, InterfaceError | OperationalError):
        return not isinstance(cause.orig, sqlite3.Error) or "locked" in str(cause)
    code = getattr(error, "code", None)  # grpc.RpcError, recognized without importing grpc, an extra
    return callable(code) and getattr(code(), "name", "") in ("UNAVAILABLE", "DEADLINE_EXCEEDED")


# Journal files


def open_journal(journal: Path) -> BaseStorage:
    """Opens the journal file of a run folder; the caller holds the folder's lock.

    Cuts off an incomplete last line and removes the lock of a killed process. Raises FnetError if the file is not a
    journal.
    """
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    _cut_torn(journal)
    return _journal(journal, _Journal(str(journal)))


def read_journal(journal: Path) -> BaseStorage:
    """Opens a journal file without changing it. Raises FnetError if it is missing or not a journal."""
    if not journal.is_file():
        raise FnetError(f"cannot read journal {journal}: there is no such file")
    return _journal(journal, JournalFileBackend(str(journal)))


def _shared_journal(journal: Path) -> BaseStorage:
    return _journal(journal, _SharedJournal(str(journal)))


def _journal(path: Path, backend: JournalFileBackend) -> BaseStorage:
    try:
        return JournalStorage(backend)
    except Exception as error:  # whatever Optuna raises for lines that it did not write
        raise FnetError(f"cannot read journal {path}: {type(error).__name__}: {error}") from None


def _cut_torn(journal: Path) -> None:
    """Cuts off an incomplete last line, which a killed process has left. Raises FnetError if the file is not a journal:
    nothing would remain of it."""
    with journal.open("a+b") as opened:
        end = opened.seek(0, 2)
        opened.seek(max(0, end - 1))
        if opened.read(1) not in (b"", b"\n"):
            opened.seek(0)
            content = opened.read()
            whole = content.rfind(b"\n") + 1
            if not whole and not content.startswith(b"{"):
                raise FnetError(f"cannot read journal {journal}: it is not a journal of Optuna")
            opened.truncate(whole)


class _Journal(JournalFileBackend):
    """A journal file that writes what is recorded `together` at once, or not at all if the write fails."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._held: list[dict[str, Any]] | None = None

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self._held is None:
            super().append_logs(logs)
        else:
            self._held += logs

    @contextmanager
    def together(self) -> Iterator[None]:
        held = self._held = []
        try:
            yield
        finally:
            self._held = None
        self.append_logs(held)


class _SharedJournal(JournalFileBackend):
    """A journal file that several processes write to, each of which may be killed.

    Uses a file lock, which the system releases when its process ends. Optuna's own lock, which a killed process leaves
    behind, is taken too, for other programs that write to the file (the Optuna dashboard).
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, JournalFileSymlinkLock(path, grace_period=GRACE))
        self._alone = FileLock(f"{path}.flock")

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with self._alone:
            _cut_torn(Path(self._file_path))
            with suppress(RuntimeError):  # Optuna's lock was removed as stale while this process was slow to write
                super().append_logs(logs)


@contextmanager
def together(storage: BaseStorage) -> Iterator[None]:
    """Attributes that are set inside reach the journal of a run folder in one write at the end, and cannot be read
    before.

    Each write is synced to disk, which takes milliseconds on some.
    """
    journal = getattr(storage, "_backend", None)
    with journal.together() if isinstance(journal, _Journal) else nullcontext():
        yield


def has_study(storage: BaseStorage, name: str) -> bool:
    return name in optuna.get_all_study_names(storage)


# Artifact stores


def open_artifacts(where: str) -> "ArtifactStore":
    """The artifact store at a folder, ``s3://bucket`` (``optuna.artifacts.Boto3ArtifactStore``) or ``gs://bucket``
    (``GCSArtifactStore``), with the credentials that these libraries find. Raises FnetError if it cannot be opened.
    """
    kind, remote, bucket = where.partition("://")
    try:
        if not remote:
            folder = Path(where).expanduser().resolve()
            folder.mkdir(exist_ok=True)
            return FileSystemArtifactStore(folder)
        if kind not in ("s3", "gs") or not bucket:
            raise ValueError("it is neither a folder nor s3://BUCKET nor gs://BUCKET")
        return Backoff(Boto3ArtifactStore(bucket) if kind == "s3" else GCSArtifactStore(bucket))
    except Exception as error:  # whatever the clients of the stores raise
        raise FnetError(f"cannot open artifact store {where}: {_line(error)}") from None
