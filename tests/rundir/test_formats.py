"""Run folders of earlier formats: each that this version reads can be reported on and resumed.

`data/format-0` was made by the version before formats had numbers (commit 51f848a), without its artifacts, figures and
report, by::

    fnet-search run --space tiny --dataset digits --budget 100% --policy reverse-pyramid --trials 2 --epochs 1 \\
        --no-warm-start --workers 1 --threads 1 --dtype float32 --no-fused --out format-0
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fnet_search.rundir.recorded_run import open_run
from fnet_search.rundir.run_folder import FORMAT
from fnet_search.training.datasets import load_dataset
from tests.support.command_line import SMALL, files_in

DATA = Path(__file__).parent / "data"
FOLDERS = sorted(path.name for path in DATA.iterdir())


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / request.param, tmp_path / request.param))


def test_there_is_a_folder_of_each_format_before_this_one() -> None:
    assert [f"format-{number}" for number in range(FORMAT)] == FOLDERS


def test_it_is_reported_on(folder: Path, fnet: Callable) -> None:
    before = files_in(folder)
    code, out, err = fnet("report", folder.name)
    assert (code, err) == (0, "")
    assert "winner: candidate 0 (init1), 0.696 MMAC, validation fp32 37.28 % quint8 37.98 %" in out
    assert "test fp32 36.39 % quint8 36.11 %" in out
    after = files_in(folder)
    assert {name: after[name] for name in ("candidates.csv", "config.json")} == {
        name: before[name] for name in ("candidates.csv", "config.json")
    }
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(f'id="candidate-{number}"' in page for number in (0, 1))
    assert len(list((folder / "figures").iterdir())) == 7


def test_it_is_resumed(folder: Path, fnet: Callable) -> None:
    data, recorded = load_dataset("digits", (3, 32, 32), split="validation"), open_run(folder).config["data"]
    if data.fingerprint() != recorded["fingerprint"]:
        pytest.skip("this machine resizes the digits with other roundings")
    before = files_in(folder)
    code, out, _ = fnet("run", *SMALL, "--out", folder.name)
    assert code == 0
    assert "files in format-0/best" in out
    after = files_in(folder)
    kept = [name for name in before if name != "journal.log"]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert after["journal.log"].startswith(before["journal.log"])
