"""The examples, as a user runs them; the sample policy package and the package for OptunaHub."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HUB = ROOT / "hub" / "package" / "samplers" / "fnet_progressive"


def ran(path: Path, *arguments: str, folder: Path = ROOT, code: int = 0) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "policies")])}
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout


def test_the_bare_loop_trains_what_the_policy_suggests() -> None:
    *rows, refused, best = ran(ROOT / "examples" / "bare_loop.py").splitlines()
    accuracies = {row.split()[0]: float(row.split()[-2]) for row in rows}
    assert list(accuracies) == ["init2", "init4", "dws"]
    assert refused == "not trained: init1 (696,320 conv MACs exceed the budget of 600,000)"
    assert best == f"best: {max(accuracies, key=accuracies.__getitem__)}"
    assert max(accuracies.values()) > 50


def test_the_evolution_begins_with_the_pyramids() -> None:
    *rows, best = ran(ROOT / "examples" / "evolution.py").splitlines()
    found = [re.fullmatch(r"generation (\d): (\S+) +([\d.]+) %", row) for row in rows]
    generations = [(int(match[1]), match[2]) for match in found if match]
    assert generations[:3] == [(0, "init2"), (0, "init4"), (0, "dws")]
    assert [generation for generation, _ in generations[3:]] == [1, 1, 1, 2, 2, 2]
    assert len({plan for _, plan in generations}) == 9
    assert re.fullmatch(r"best: \S+, [\d,]+ MACs", best)


def test_a_study_of_ones_own_goes_on_where_it_was(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    first = ran(ROOT / "examples" / "optuna_objective.py", storage).splitlines()
    assert first[0] == "696,320 conv MACs exceed the budget of 648,806"
    assert [line.split()[1:3] for line in first[1:4]] == [[plan, "COMPLETE"] for plan in ("init2", "init4", "dws")]
    again = ran(ROOT / "examples" / "optuna_objective.py", storage).splitlines()
    assert again[:4] == first[:4]
    assert again[4:] == ["the policy is done", first[4]]


def test_a_package_of_somebody_elses_is_used_by_name(tmp_path: Path) -> None:
    """Installed into a folder of its own, as `pip install` does; its tests pass there."""
    target = tmp_path / "installed"
    package = ROOT / "examples" / "policy_package"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(package)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    path = os.pathsep.join([str(target), str(ROOT), str(ROOT / "policies")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = ["run", "--space", "tiny", "--budget", "60%", "--policy", "level", "--epochs", "1", "--trials", "1"]
    run = subprocess.run(
        [sys.executable, "-m", "fnet_search.cli", *command, "--no-warm-start", "--workers", "1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "files in runs/tiny-digits-level-60pct/best" in run.stdout
    suite = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "-n", "0"]
    tests = [*suite, "--rootdir", str(package), str(package / "tests")]
    done = subprocess.run(tests, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
    assert "9 passed" in done.stdout


def test_the_package_for_optunahub_loads_and_its_example_runs() -> None:
    pytest.importorskip("optunahub")
    assert ran(HUB / "example.py").splitlines()[-1].startswith("best: init")
    suite = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "-n", "0"]
    tests = [*suite, "--rootdir", str(HUB), str(HUB / "tests")]
    done = subprocess.run(tests, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout


def test_the_package_for_optunahub_has_what_the_registry_asks_for() -> None:
    _, front, text = (HUB / "README.md").read_text().split("---\n", 2)
    keys = [line.partition(":")[0] for line in front.splitlines()]
    assert keys == ["author", "title", "description", "tags", "optuna_versions", "license"]
    assert "tags: [sampler, " in front
    assert "license: MIT License" in front
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Abstract", "APIs", "Installation", "Example", "Others"]
    assert (HUB / "LICENSE").read_text().startswith("MIT License\n")
