"""The command line as the tests call it."""

import ctypes
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: other tests run on the same cores

import pytest

from tests.support.command_line import SMALL, Result, files_in, in_process, process
from tests.support.pictures import reports_of_one_picture
from tests.support.shared import made_once


@pytest.fixture
def fnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command line, run in this process in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return in_process


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], None]]:
    """Makes a folder one that may only be read; by root too, who is bound by permissions meanwhile."""
    libc, header, rights = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, rights)
    before, found = rights[0], list[Path]()
    rights[0] &= ~(1 << 1)  # CAP_DAC_OVERRIDE
    libc.capset(header, rights)

    def lock(folder: Path) -> None:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
            found.append(path)

    yield lock
    for path in found:
        path.chmod(0o755)
    rights[0] = before
    libc.capset(header, rights)


@pytest.fixture(scope="module")
def one_picture() -> Iterator[None]:
    """Reports have one small figure, instead of all, which take seconds: `report/test_figures` looks at those."""
    with reports_of_one_picture():
        yield


@pytest.fixture
def refused(fnet: Callable, tmp_path: Path) -> Callable[..., str]:
    """The one line that is said of bad input, which leaves everything as it was."""

    def call(*arguments: str) -> str:
        before, entries = files_in(tmp_path), sorted(tmp_path.rglob("*"))
        code, out, err = fnet(*arguments)
        assert code == 2
        assert "Traceback" not in out
        assert files_in(tmp_path) == before
        assert sorted(tmp_path.rglob("*")) == entries
        (line,) = err.splitlines()
        assert line.startswith("fnet-search: ")
        return str(line.removeprefix("fnet-search: "))

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run in its folder, by a process with a worker process, and what it said. Copy it before anything is changed."""

    def make(folder: Path) -> None:
        run = process("run", *SMALL, "--workers", "1", cwd=folder)
        out, err = run.communicate()
        (folder / "result.json").write_text(json.dumps([run.returncode, out, err]))

    folder = made_once(tmp_path_factory, "finished", make)
    code, out, err = json.loads((folder / "result.json").read_text())
    return folder / "runs" / "tiny-digits-reverse-pyramid-100pct", (code, out, err)
