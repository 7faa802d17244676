import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import fnet_search

HEAVY = {"torch", "torchvision", "optuna", "matplotlib", "pandas", "sklearn", "scipy"}


def loaded(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded once it ran `code`."""
    report = "\nimport sys; print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return HEAVY.intersection(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import fnet_search, fnet_search.cli",
        "import fnet_search.policy, fnet_search.plan, fnet_search.macro",
        "from fnet_search.cli import main\nimport sys\nsys.argv = ['fnet-search', '--help']\n"
        "try: main()\nexcept SystemExit: pass",
        "from fnet_search.cli import main\nimport sys\nsys.argv = ['fnet-search', 'run', '--help']\n"
        "try: main()\nexcept SystemExit: pass",
        "from fnet_search.cli import main\nimport sys\nsys.argv = ['fnet-search', 'show', 'tiny']\n"
        "try: main()\nexcept SystemExit: pass",
    ],
)
def test_what_needs_no_training_loads_nothing_heavy(code: str) -> None:
    assert loaded(code) == set()


def test_heavy_packages_would_be_seen() -> None:
    assert "optuna" in loaded("import optuna")


def test_versions_agree() -> None:
    assert version("fnet-search") == fnet_search.__version__


def test_type_hints_are_shipped() -> None:
    assert (Path(fnet_search.__file__).parent / "py.typed").is_file()


# The map of the README

MODULES = {path.stem: path for path in Path(fnet_search.__file__).parent.glob("*.py") if path.stem != "__init__"}


def imported(statements: list[ast.stmt]) -> Iterator[str]:
    """Our modules that are loaded with one: not those that a function or a type checker asks for."""
    for one in statements:
        if isinstance(one, ast.ImportFrom) and one.module == "fnet_search":
            yield from (alias.name for alias in one.names if alias.name in MODULES)
        elif isinstance(one, ast.ImportFrom) and (one.module or "").startswith("fnet_search."):
            yield str(one.module).removeprefix("fnet_search.")


def test_each_file_imports_only_from_those_before_it() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    drawn = readme.partition("each file importing only from those before it:")[2].split("```")[1]
    order = [name for line in drawn.splitlines() for name in re.findall(r"\w+", line.partition("  ")[0])]
    assert sorted(order) == sorted(MODULES)
    assert {
        (name, other)
        for place, name in enumerate(order)
        for other in imported(ast.parse(MODULES[name].read_text()).body)
        if other not in order[:place]
    } == set()
