"""A PostgreSQL server of one's own, from Debian's packages (or any other), on loopback."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

PASSWORD = "se/c:r@t"
"""What a URL needs to have written otherwise, is hard to hide in it."""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _binary(name: str) -> str:
    found = shutil.which(name) or next(iter(sorted(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")))), None)
    if found is None:
        pytest.skip("no PostgreSQL server: install Debian's package postgresql")
    return found


@contextmanager
def postgres(host: str = "127.0.0.1") -> Iterator[str]:
    """Starts a server with an empty data base; its URL. It refuses to run as root: as nobody then."""
    initdb, server = _binary("initdb"), _binary("postgres")
    user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="fnet-postgres-") as folder:
        Path(folder, "password").write_text(PASSWORD)
        if user:
            for path in (folder, Path(folder, "password")):
                shutil.chown(path, "postgres", "postgres")
        data, port = str(Path(folder, "data")), free_port()
        options = ("-U", "me", "-A", "scram-sha-256", "--pwfile", str(Path(folder, "password")), "--no-sync")
        subprocess.run([initdb, "-D", data, *options], check=True, capture_output=True, **user)  # type: ignore[call-overload]
        with Path(data, "pg_hba.conf").open("a") as rules:
            rules.write("host all all 0.0.0.0/0 scram-sha-256\n")
        settings = ("-p", str(port), "-k", folder, "-c", f"listen_addresses={host}", "-c", "fsync=off")
        running = subprocess.Popen(  # type: ignore[call-overload]
            [server, "-D", data, *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **user
        )
        try:
            _wait(host, port, running)
            yield f"postgresql+psycopg://me:{quote(PASSWORD, safe='')}@{host}:{port}/postgres"
        finally:
            running.send_signal(signal.SIGINT)  # at once, with clients still connected
            running.wait()


def _wait(host: str, port: int, running: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + 60
    while True:
        assert running.poll() is None, "the server has ended"
        try:
            with socket.create_connection((host, port), timeout=1):
                return
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.1)
