"""What studies/paper says was measured is what lies beside it, and the scripts there put it together."""

import shutil
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

PAPER = Path(__file__).parents[2] / "studies" / "paper"
KEPT = ("networks.csv", "layers.csv")


def tables(text: str) -> list[str]:
    """Its Markdown tables."""
    return [block for block in text.split("\n\n") if block.strip().startswith("|")]


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PAPER))
    return import_module("claims")


@pytest.fixture
def collect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, beside a copy of what was measured."""
    monkeypatch.syspath_prepend(str(PAPER))
    found, here = import_module("collect"), tmp_path / "paper"
    here.mkdir()
    for name in KEPT:
        shutil.copy(PAPER / name, here)
    monkeypatch.setattr(found, "HERE", here)
    return found


def test_the_results_are_those_of_the_files(collect: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    collect.main([])
    printed = capsys.readouterr().out.strip()
    assert printed in tables((PAPER / "RESULTS.md").read_text())
    assert len(printed.splitlines()) == 2 + 8  # the eight networks of the paper
    for name in KEPT:
        assert (collect.HERE / name).read_bytes() == (PAPER / name).read_bytes()
    assert {path.name for path in collect.HERE.glob("*.png")} == {path.name for path in PAPER.glob("*.png")}


def test_the_claims_are_those_of_the_files(claims: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    claims.main(PAPER)
    printed = [table.strip() for table in tables(capsys.readouterr().out)]
    written = [table.strip() for table in tables((PAPER / "RESULTS.md").read_text())]
    assert len(printed) == 3
    for table in printed:
        assert table in written


def test_what_is_measured_again_replaces_what_was(
    collect: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only where network, seed and ranges are the same; the order stays that of the study."""
    for name in KEPT:
        kept = pd.read_csv(PAPER / name, keep_default_na=False, dtype=str)
        new = kept[(kept["plan"] == "f8") & (kept["scheme"] == "percentile:1")].copy()
        if "fp32_accuracy" in new:
            new["fp32_accuracy"] = "0.5"
        other_seed = new.assign(seed="1")
        pd.concat([other_seed, new]).to_csv(tmp_path / name, index=False)
    collect.main([tmp_path])
    before, after = (pd.read_csv(folder / "networks.csv") for folder in (PAPER, collect.HERE))
    plans = list(dict.fromkeys(before["plan"]))
    assert list(dict.fromkeys(after["plan"])) == plans
    f8 = after[after["plan"] == "f8"]
    assert list(f8["seed"]) == [0, 1]
    assert list(f8["fp32_accuracy"]) == [0.5, 0.5]
    pd.testing.assert_frame_equal(
        after[after["plan"] != "f8"].reset_index(drop=True), before[before["plan"] != "f8"].reset_index(drop=True)
    )
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| f8 |")]
    assert "| 2 | 50.00 ± 0.00 |" in row  # two seeds


def test_noise_and_means_of_the_claims(claims: ModuleType) -> None:
    assert claims.noise(50.0) == pytest.approx(196 * (0.5 * 0.5 / 10_000) ** 0.5)
    assert claims.noise(100.0) == 0.0
    networks = pd.DataFrame(
        {"plan": ["f2", "dws", "f2"], "scheme": ["percentile:1", "mse", "mse"], "value": [0.5, 0.25, 0.75], "seed": 0}
    )
    found = claims.by_scheme(pd.concat([networks, networks.assign(value=networks["value"] / 2, seed=1)]), "value")
    assert list(found.index) == ["f2", "dws"]
    assert found.loc["f2"].to_dict() == {"percentile:1": 100 * (0.5 + 0.25) / 2, "mse": 100 * (0.75 + 0.375) / 2}
    assert pd.isna(found.loc["dws", "percentile:1"])
