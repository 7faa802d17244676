"""The examples, as a user runs them; the sample policy package and the package for OptunaHub."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from fnet_search.arch.plan import legal_rates
from fnet_search.importing.spaces import load_space

ROOT = Path(__file__).parent.parent
HUB = ROOT / "hub" / "package" / "samplers" / "fnet_progressive"


def python(*arguments: object, folder: Path = ROOT, installed: Path = ROOT) -> str:
    """What a Python process prints that has to end well; `installed` has packages of others."""
    path = os.pathsep.join(map(str, (installed, ROOT, ROOT / "policies")))
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr or done.stdout
    return done.stdout


def own_tests(package: Path, installed: Path = ROOT) -> str:
    """Runs the tests that a package brings along, without our configuration."""
    alone = ("-p", "no:cacheprovider", "-c", os.devnull, "-n", "0", "--rootdir", package)
    return python("-m", "pytest", "-q", *alone, package / "tests", installed=installed)


@cache
def trained(plan: Any) -> float:
    """The accuracy of a plan in the loop of the examples, which is trained once for all of them."""
    return float(import_module("bare_loop").original(plan))


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Runs an example with these arguments in this process; the lines that it prints."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    bare = import_module("bare_loop")
    monkeypatch.setattr(bare, "original", bare.train, raising=False)
    monkeypatch.setattr(bare, "train", trained)

    def run(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        if name != "bare_loop":
            monkeypatch.delitem(sys.modules, name, raising=False)  # it may have been imported with another `train`
        import_module(name).main()
        return capsys.readouterr().out.splitlines()

    return run


def test_the_bare_loop_trains_what_the_policy_suggests(example: Callable[..., list[str]]) -> None:
    *rows, refused, best = example("bare_loop")
    accuracies = {row.split()[0]: float(row.split()[-2]) for row in rows}
    assert list(accuracies) == ["init2", "init4", "dws"]
    assert refused == "not trained: init1 (696,320 conv MACs exceed the budget of 600,000)"
    assert best == f"best: {max(accuracies, key=accuracies.__getitem__)}"
    assert max(accuracies.values()) > 50


@pytest.mark.slow
def test_the_layer_guided_loop_asks_for_what_its_probes_say(example: Callable[..., list[str]]) -> None:
    first, *rows, best = example("layer_guided")
    changes = sum(len(rates) - 1 for rates in legal_rates(load_space("tiny")).values())
    assert first == f"{changes} probes, each on 128 images"
    found = {row.split()[0]: (int(row.split()[1].replace(",", "")), float(row.split()[-2])) for row in rows}
    assert 1 <= len(found) <= 3
    assert all(macs <= 0.6 * 811_008 for macs, _ in found.values())
    assert best == f"best: {max(found, key=lambda name: (found[name][1], -found[name][0]))}"
    assert found[best.removeprefix("best: ")][1] > 50


@pytest.mark.slow
def test_the_evolution_begins_with_the_pyramids(example: Callable[..., list[str]]) -> None:
    *rows, best = example("evolution")
    found = [re.fullmatch(r"generation (\d): (\S+) +([\d.]+) %", row) for row in rows]
    generations = [(int(match[1]), match[2]) for match in found if match]
    assert generations[:3] == [(0, "init2"), (0, "init4"), (0, "dws")]
    assert [generation for generation, _ in generations[3:]] == [1, 1, 1, 2, 2, 2]
    assert len({plan for _, plan in generations}) == 9
    assert re.fullmatch(r"best: \S+, [\d,]+ MACs", best)


def test_a_study_of_ones_own_goes_on_where_it_was(example: Callable[..., list[str]], tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    first = example("optuna_objective", storage)
    assert first[0] == "696,320 conv MACs exceed the budget of 648,806"
    assert [line.split()[1:3] for line in first[1:4]] == [[plan, "COMPLETE"] for plan in ("init2", "init4", "dws")]
    again = example("optuna_objective", storage)
    assert again[:4] == first[:4]
    assert again[4:] == ["the policy is done", first[4]]


@pytest.mark.slow
def test_a_package_of_somebody_elses_is_used_by_name(tmp_path: Path) -> None:
    """Installed into a folder of its own, as `pip install` does; its tests pass there."""
    target = tmp_path / "installed"
    package = ROOT / "examples" / "policy_package"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", target, package)
    command = ("run", "--space", "tiny", "--budget", "60%", "--policy", "level", "--epochs", "1", "--trials", "1")
    plain = ("--no-warm-start", "--workers", "1")
    out = python("-m", "fnet_search", *command, *plain, folder=tmp_path, installed=target)
    assert "files in runs/tiny-digits-level-60pct/best" in out
    assert "10 passed" in own_tests(package, target)


@pytest.mark.slow
def test_the_package_for_optunahub_loads_and_its_example_runs() -> None:
    pytest.importorskip("optunahub", reason="no registry of Optuna: install optunahub")
    assert python(HUB / "example.py").splitlines()[-1].startswith("best: init")
    assert "3 passed" in own_tests(HUB)


def test_the_package_for_optunahub_has_what_the_registry_asks_for() -> None:
    _, front, text = (HUB / "README.md").read_text().split("---\n", 2)
    keys = [line.partition(":")[0] for line in front.splitlines()]
    assert keys == ["author", "title", "description", "tags", "optuna_versions", "license"]
    assert "tags: [sampler, " in front
    assert "license: MIT License" in front
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Abstract", "APIs", "Installation", "Example", "Others"]
    assert (HUB / "LICENSE").read_text().startswith("MIT License\n")
