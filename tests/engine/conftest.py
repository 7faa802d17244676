"""Runs that the tests of this room look at, and go on with copies of."""

import pickle
import shutil
from collections.abc import Iterator
from math import inf
from pathlib import Path

import pytest
from optuna.storages import BaseStorage

from fnet_search.arch.plan import FactorizationPlan, make_plan
from fnet_search.engine.search_loop import Event
from fnet_search.engine.study_record import StudyRecord
from fnet_search.optuna_bridge.storage import open_journal, open_url
from fnet_search.report.outcome import Outcome
from fnet_search.rundir.run_folder import RunFolder
from fnet_search.training import numerics
from tests.support.records import F4, LIMITS, PLAIN, TINY, Opened, finish
from tests.support.runs import WARM, go
from tests.support.shared import made_once


@pytest.fixture(scope="module", autouse=True)
def plain_choices() -> Iterator[None]:
    """Measured, they may differ from run to run: runs are the same for equal numerics."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(numerics, "CLEAR", inf)
        numerics.resolve.cache_clear()
        yield
    numerics.resolve.cache_clear()


@pytest.fixture(scope="module")
def whole(one_picture: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """An uninterrupted search for two candidates, made once for all test processes. Copy it before it is changed."""

    def make(folder: Path) -> None:
        outcome, _ = go(folder / "whole")
        (folder / "outcome.pickle").write_bytes(pickle.dumps(outcome))

    folder = made_once(tmp_path_factory, "search", make)
    return folder / "whole", pickle.loads((folder / "outcome.pickle").read_bytes())


@pytest.fixture
def run(whole: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A copy of the uninterrupted search."""
    return Path(shutil.copytree(whole[0], tmp_path / "copy"))


@pytest.fixture(scope="module")
def children(one_picture: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, list[Event]]:
    """A reference, two candidates that start from it, and the better one trained on. Copy it before it is changed."""
    folder = tmp_path_factory.mktemp("run") / "children"
    outcome, notes = go(folder, request=WARM)
    return folder, outcome, notes.events


@pytest.fixture
def warm(children: tuple[Path, Outcome, list[Event]], tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(children[0], tmp_path / "copy"))


@pytest.fixture
def kind() -> str:
    """Where the study is recorded."""
    return "journal"


@pytest.fixture
def opened(kind: str, tmp_path: Path) -> Opened:
    """Opens the record of one run, as each process does that works on it."""
    run = RunFolder(tmp_path / "study")
    run.path.mkdir()

    def storage() -> BaseStorage:
        return open_journal(run.journal) if kind == "journal" else open_url(f"sqlite:///{tmp_path}/study.db")

    return lambda setup=PLAIN: StudyRecord(storage(), run, TINY, LIMITS, 3, "validation", setup)


@pytest.fixture
def plans() -> list[FactorizationPlan]:
    return [make_plan(TINY, {"conv_8": a, "conv_16_1": b}) for a in (2, 4, 8) for b in (2, 4, 8, 16)]


# Journals of processes that were killed


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """The journal of a run with one candidate."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    finish(StudyRecord(open_journal(run.journal), run, TINY, LIMITS, 0, "validation", PLAIN), F4, 0.9, 0.8)
    return run.journal
