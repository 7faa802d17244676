"""Whatever is written, the readers of spaces, plans and budgets raise nothing but our own error, in one line.

``FUZZ_EXAMPLES=5000 pytest tests/test_fuzz.py`` draws so many for each of them.
"""

import os
import tomllib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fnet_search.arch.costs import network_cost
from fnet_search.arch.layers import KINDS
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import check_plan, load_plan, parse_plan, plan_toml
from fnet_search.arch.space_file import parse_space, to_toml
from fnet_search.base import shipped
from fnet_search.base.errors import FnetError
from fnet_search.base.units import parse_budget, parse_count, parse_duration, parse_share
from fnet_search.importing.spaces import load_space
from fnet_search.policy.constraints import parse_constraints

TINY = load_space("tiny")
SPACES = [shipped.find("spaces", "space", name).read_text() for name in shipped.names("spaces")]
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100")),
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    database=None,
)


def only_ours(call: Callable[[], object]) -> object:
    """What a call gives; None where it raises our error, with one line."""
    found: object = None
    try:
        found = call()
    except FnetError as error:
        said = str(error)
    else:
        return found
    assert said
    assert "\n" not in said
    return None


# Values of any kind, with those that a reader expects among them.

NUMBERS = st.one_of(
    st.integers(-2, 300),
    st.sampled_from([0, 1, 2, 3, 16, 64, 2**31, 2**63 - 1, -(2**63)]),
    st.floats(allow_nan=True, allow_infinity=True),
)
WORDS = st.one_of(
    st.sampled_from(["", "input", "conv_8", "conv_16_1", "same", "valid", "max", "average", "global_average", "relu"]),
    st.sampled_from([node.name for node in TINY.nodes]),
    st.text(max_size=8),
)
VALUES = st.recursive(
    st.one_of(NUMBERS, WORDS, st.booleans()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)
OPTIONS = sorted({name for kind in KINDS.values() for name in getattr(kind, "__dataclass_fields__", {})})
LAYERS = st.dictionaries(st.one_of(st.sampled_from(["name", "kind", "inputs", *OPTIONS]), st.text(max_size=5)), VALUES)
LIKELY = st.builds(
    lambda name, kind, rest, inputs: {"name": name, "kind": kind, **rest, **inputs},
    WORDS,
    st.sampled_from(sorted(KINDS)),
    st.dictionaries(st.sampled_from(OPTIONS), st.one_of(NUMBERS, st.booleans(), VALUES), max_size=4),
    st.one_of(st.just({}), st.lists(WORDS, max_size=3).map(lambda names: {"inputs": names})),
)


def read(text: str) -> None:
    """A space that is read is whole: it has a cost, and its own text gives it again."""
    space = only_ours(lambda: parse_space(text, "space"))
    if isinstance(space, Macroarchitecture):
        network_cost(space)
        assert parse_space(to_toml(space), "again") == space


@FUZZ
@given(
    st.dictionaries(st.sampled_from(["name", "description", "input", "mean", "std", "weights", "x"]), VALUES), VALUES
)
def test_tables_that_are_no_spaces(table: dict[str, Any], layers: Any) -> None:
    read(tomli_w.dumps({**table, "layer": layers}))


@FUZZ
@given(
    st.lists(st.one_of(LAYERS, LIKELY), min_size=1, max_size=5), st.lists(st.integers(-1, 40), min_size=3, max_size=3)
)
def test_spaces_of_drawn_layers(layers: list[dict[str, Any]], shape: list[int]) -> None:
    read(tomli_w.dumps({"input": shape, "layer": layers}))


@FUZZ
@given(st.data())
def test_shipped_spaces_with_changes(data: st.DataObject) -> None:
    """An entry set, taken away or repeated."""
    table = tomllib.loads(data.draw(st.sampled_from(SPACES)))
    for _ in range(data.draw(st.integers(1, 3))):
        layers = table["layer"]
        place = data.draw(st.integers(0, len(layers) - 1))
        match data.draw(st.integers(0, 4)):
            case 0:
                layers[place][data.draw(st.sampled_from(["name", "kind", "inputs", *OPTIONS]))] = data.draw(VALUES)
            case 1:
                layers[place].pop(data.draw(st.sampled_from(sorted(layers[place]))))
            case 2:
                layers.insert(place, dict(layers[place]))
            case 3 if len(layers) > 1:
                layers.pop(place)
            case _:
                table[data.draw(st.sampled_from(["name", "input", "mean", "std", "weights"]))] = data.draw(VALUES)
    read(tomli_w.dumps(table))


@FUZZ
@given(st.data())
def test_shipped_spaces_that_are_cut_or_garbled(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(SPACES))
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    read(text[:start] + data.draw(st.text(max_size=6)) + text[end:])


@FUZZ
@given(st.text())
def test_texts_that_are_no_spaces(text: str) -> None:
    read(text)


NAMES = st.one_of(st.sampled_from(["conv_8", "conv_16_1", "conv_16_2", "stem", ""]), st.text(max_size=6))
ENTRIES = st.builds("{}={}".format, NAMES, st.one_of(st.integers(-1, 20), st.text(max_size=4), NUMBERS))


@FUZZ
@given(
    st.one_of(
        st.text(),
        st.text(min_size=250, max_size=5000),
        st.lists(ENTRIES, max_size=5).map(",".join),
        st.builds("{}{}".format, st.sampled_from(["f", "init", "dws", "regular", "F"]), st.one_of(NUMBERS, st.text())),
    )
)
def test_plans_as_text(text: str) -> None:
    plan = only_ours(lambda: parse_plan(TINY, text))
    if plan is not None:
        check_plan(TINY, plan)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans") / "plan.toml"


@FUZZ
@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.dictionaries(st.one_of(st.just("rates"), st.text(max_size=4)), VALUES).map(tomli_w.dumps).map(str.encode),
        st.dictionaries(NAMES, st.one_of(NUMBERS, VALUES)).map(lambda one: tomli_w.dumps({"rates": one}).encode()),
        st.integers(0, 60).map(lambda end: plan_toml(parse_plan(TINY, "f4")).encode()[:end]),
    )
)
def test_plan_files(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    plan = only_ours(lambda: load_plan(TINY, path))
    if plan is not None:
        check_plan(TINY, plan)  # type: ignore[arg-type]


UNITS = st.sampled_from(["MMAC", " GMACs", "%", " %", "k", "M", ""])
AMOUNTS = st.one_of(
    st.text(), st.text("0123456789.eE+-%KMGACmacs hminx_²٣", max_size=14), st.builds("{}{}".format, NUMBERS, UNITS)
)


@FUZZ
@given(AMOUNTS)
def test_budgets(text: str) -> None:
    budget = only_ours(lambda: parse_budget(text, 266_010_624))
    if budget is not None:
        assert isinstance(budget, int)
        assert budget >= 1


@FUZZ
@given(AMOUNTS)
def test_shares_counts_and_times(text: str) -> None:
    for parse, most in ((parse_share, 1.0), (parse_count, float("inf")), (parse_duration, float("inf"))):
        value = only_ours(partial(parse, text, "--option"))  # type: ignore[arg-type]
        assert value is None or (0 < value <= most and isfinite(value))  # type: ignore[arg-type, operator]


@FUZZ
@given(AMOUNTS, st.none() | AMOUNTS, st.none() | AMOUNTS, st.none() | AMOUNTS)
def test_constraints(budget: str, params: str | None, quint8: str | None, drop: str | None) -> None:
    with suppress(FnetError):
        found = parse_constraints(TINY, budget, params, quint8, drop)
        assert found.conv_macs is not None
        assert found.conv_macs >= 1
