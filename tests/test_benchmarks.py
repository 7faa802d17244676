"""The benchmarks run, and what they say of others is so; their figures are for people to read."""

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from fnet_search.arch.costs import network_cost, plan_cost
from fnet_search.arch.factorize import factorize
from fnet_search.arch.plan import parse_plan, regular
from fnet_search.importing.spaces import load_space
from fnet_search.training.network import Network

Import = Callable[[str], Any]
TINY = load_space("tiny")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Import:
    """A benchmark by name, imported as where it is run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return import_module


def test_ratios_are_taken_round_by_round(benchmark: Import) -> None:
    """So that what slows down both sides for a while does not count."""
    machine = benchmark("machine")
    ours, theirs = [1.0, 20.0, 3.0, 4.0, 5.0], [2.0, 10.0, 6.0, 8.0, 10.0]
    assert machine.ratio(ours, theirs) == machine.Spread(0.5, 0.5, 0.5)
    assert machine.spread(ours) == machine.Spread(3.0, 4.0, 5.0)
    assert machine.spread([7.0]) == machine.Spread(7.0, 7.0, 7.0)
    assert str(machine.Spread(0.994, 9.994, 12_345.6)) == "9.99 (0.99 to 12,346)"
    assert str(machine.Spread(9.996, 99.94, 99.96)) == "99.9 (10.0 to 100)"


def test_the_machine_is_one_line(benchmark: Import) -> None:
    line = benchmark("machine").machine("optuna")
    assert "\n" not in line
    for text in (" cores", f"torch {torch.__version__.partition('+')[0]}", "optuna 5.", "Python 3."):
        assert text in line


@pytest.mark.parametrize("space", ["tiny", "factorizenet", "factorizenet-gap"])
def test_torch_counts_what_we_do_and_more_by_hand(benchmark: Import, space: str) -> None:
    macs = benchmark("macs")
    loaded = load_space(space)
    network = factorize(loaded, parse_plan(loaded, "f2"))
    module, image = macs.built(network), torch.randn(1, *loaded.input_shape)
    assert macs.of_torch(module, image) == network_cost(network).total_macs
    plain = Network(network).eval()
    plain.load_state_dict(dict(zip(plain.state_dict(), module.state_dict().values(), strict=True)))
    assert torch.equal(plain(image), module(image))


def test_what_others_count_more_by_hand(benchmark: Import) -> None:
    """Of the regular network: 3 layers of 64 channels on 32x32, 3 of 128 on 16x16, 3 of 256 on 8x8."""
    elements = 3 * (64 * 32 * 32 + 128 * 16 * 16 + 256 * 8 * 8)
    pooled, channels = 64 * 32 * 32 + 128 * 16 * 16, 3 * (64 + 128 + 256)
    common = {"norm": elements, "max pool": pooled, "affine": 2 * channels}
    extras = benchmark("macs").extras
    assert extras(load_space("factorizenet")) == {
        **common,
        **{"relu": elements + 1024 + 1024, "average": 0, "bias": 1024 + 1024 + 10},
    }
    gap = load_space("factorizenet-gap")
    dense = [node.layer.out_features for node in gap.nodes if node.layer.kind == "dense"]
    assert extras(gap) == {**common, "relu": elements + sum(dense[:-1]), "average": 256 * 8 * 8, "bias": sum(dense)}


def test_overhead_measures_a_search(benchmark: Import) -> None:
    ran = CliRunner().invoke(benchmark("overhead").main, ["--trials", "30", "--space", "tiny", "--budget", "0.6"])
    assert ran.exception is None, ran.output
    for policy in ("random", "tpe"):
        assert f"\n{policy}: " in ran.output
        assert sum(line.startswith(f"{policy} ") for line in ran.output.splitlines()) == 3


def run(name: str, *arguments: str) -> str:
    """What a benchmark prints, run as its first lines say."""
    script = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_policies_are_compared_and_ranked_on_plans_that_are_trained_once(tmp_path: Path) -> None:
    """A small comparison, whole; another benchmark goes on in the folder."""
    small = ("digits", "--space", "tiny", "--images", "200", "--validation", "100", "--out", str(tmp_path))
    options = (*small, "--seeds", "1", "--budgets", "60%", "--trials", "2", "--policies", "layer-guided", "random")
    printed = run("policies", *options)
    results = list(tmp_path.glob("seed1/*/result.json"))
    table = pd.read_csv(tmp_path / "searches.csv")
    assert table.groupby("policy")["candidate"].max().to_dict() == {"layer-guided": 2, "random": 2}
    assert len(results) == 1 + table["plan"].nunique()  # the reference too
    assert (table["trained_images"] == 50).all()  # a quarter of an epoch
    budget = 0.6 * plan_cost(TINY, regular(TINY)).conv_macs
    assert (table["conv_macs"] <= budget).all()
    assert list(tmp_path.glob("seed1/*-*/*.safetensors")) == []
    (line,) = (line for line in printed.splitlines() if line.startswith("random"))
    of_random = table[table["policy"] == "random"]
    best = of_random.loc[of_random["quint8"].idxmax()]
    assert f"{100 * best['test_quint8']:.2f} +-0.00" in line
    assert (tmp_path / "policies.png").is_file()
    ranked = run("ranking", *small, "--plans", "3", "--budget", "60%")
    assert "reference trained" in printed
    assert "reference trained" not in ranked
    assert "another seed (the ceiling)" in ranked
    assert len(pd.read_csv(tmp_path / "ranking.csv")) == 3
