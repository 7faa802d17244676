"""The benchmarks run, and what they say of others is so; their figures are for people to read."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from fnet_search.macro import load_space
from fnet_search.network import Network
from fnet_search.plan import factorize, network_cost, parse_plan

Import = Callable[[str], Any]


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
