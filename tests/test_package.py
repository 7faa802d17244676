import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import fnet_search

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "torchvision", "optuna", "matplotlib", "pandas", "sklearn", "scipy"}


def loaded(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded once it ran `code`."""
    report = "\nimport sys; print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return HEAVY.intersection(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import fnet_search, fnet_search.cli.main",
        "import fnet_search.policy.protocol, fnet_search.policy.ranking, fnet_search.arch.costs",
        "from fnet_search.cli.main import main\nimport sys\nsys.argv = ['fnet-search', '--help']\n"
        "try: main()\nexcept SystemExit: pass",
        "from fnet_search.cli.main import main\nimport sys\nsys.argv = ['fnet-search', 'run', '--help']\n"
        "try: main()\nexcept SystemExit: pass",
        "from fnet_search.cli.main import main\nimport sys\nsys.argv = ['fnet-search', 'show', 'tiny']\n"
        "try: main()\nexcept SystemExit: pass",
    ],
)
def test_what_needs_no_training_loads_nothing_heavy(code: str) -> None:
    assert loaded(code) == set()


MISTAKES = (
    "run --budget 45% --space nothing",
    "run --budget 1MMAC",
    "run --budget 45% --policy nope",
    "run --budget 45% --dataset nope",
    "run --budget 45% --dataset imagefolder:nowhere",
    "run --budget 45% --validation nowhere",
    "run --budget 45% --recipe nope",
    "run --budget 45% --scheme nope",
    "run --budget 45% --min-quint8 80x",
    "run --budget 45% --device tpu",
    "run --budget 45% --space no.py:make",
    "run --budget 45% --weights no.safetensors",
    "run --budget 45% --numerics-of nowhere",
    "run --budget 45% --storage journal:nowhere/x",
    "run --budget 45% --time-limit x",
    "evaluate --plan f3",
    "evaluate --plan nothing.toml",
    "worker --study x --storage journal:nowhere/x",
    "report nowhere",
    "export nowhere -o x.onnx",
    "audit nowhere",
    "quantize nowhere --candidate 1",
    "analyze nowhere",
    "latency nowhere",
    "dashboard nowhere",
    "study run nope",
    "study show nope",
)


def test_mistakes_and_lists_are_answered_before_anything_heavy_is_imported() -> None:
    commands = [(line, 2) for line in MISTAKES] + [(f"list {what}", 0) for what in ("policies", "spaces", "recipes")]
    code = (
        "import sys; from fnet_search.cli.main import main\n"
        f"for line, wanted in {[*commands, ('study list', 0)]!r}:\n"
        "    sys.argv = ['fnet-search', *line.split()]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert end.code == wanted, line\n"
    )
    assert loaded(code) == set()


def test_heavy_packages_would_be_seen() -> None:
    assert "optuna" in loaded("import optuna")


def test_versions_agree() -> None:
    assert version("fnet-search") == fnet_search.__version__


def test_type_hints_are_shipped() -> None:
    assert (Path(fnet_search.__file__).parent / "py.typed").is_file()


def test_each_dependency_names_a_file_that_imports_it() -> None:
    """The first file of its comment in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    modules = {"pillow": "PIL", "scikit-learn": "sklearn", "tomli-w": "tomli_w", "optuna-dashboard": "optuna_dashboard"}
    named = re.findall(r'"([\w-]+)(?:\[\w+\])?>=[^"]*", *# (fnet_search/[\w/]+\.py)', text)
    assert len(named) > 20
    for package, file in named:
        assert re.search(rf"^\s*(import|from) {modules.get(package, package)}\b", (ROOT / file).read_text(), re.M), file
