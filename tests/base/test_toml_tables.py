from dataclasses import dataclass, field

import pytest

from fnet_search.base.errors import FnetError
from fnet_search.base.toml_tables import IntPair, Numbers, build, is_int


@dataclass(frozen=True)
class Part:
    depth: int = 1


@dataclass(frozen=True)
class Sample:
    count: int
    share: float = 0.5
    on: bool = False
    label: str = "none"
    kernel: IntPair = (1, 1)
    stride: IntPair | None = None
    steps: tuple[float, ...] = ()
    slopes: Numbers | None = None
    part: Part = field(default_factory=Part)


def test_what_is_left_out_has_its_default() -> None:
    assert build(Sample, {"count": 3}, "a sample") == Sample(3)


def test_every_type() -> None:
    table = {
        "count": -2,
        "share": 1,
        "on": True,
        "label": "",
        "kernel": 5,
        "stride": [1, 2],
        "steps": [1, 2.5],
        "slopes": [1, 2.5],
        "part": Part(7),
    }
    expected = Sample(-2, 1.0, True, "", (5, 5), (1, 2), (1.0, 2.5), (1.0, 2.5), Part(7))
    assert build(Sample, table, "a sample") == expected
    assert build(Sample, {"count": 1, "slopes": 2}, "a sample") == Sample(1, slopes=2.0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "a sample needs 'count'"),
        ({"count": 1, "sare": 1.0}, "a sample has no 'sare'; did you mean 'share'?"),
        ({"count": 1, "zzzz": 1.0}, "a sample has no 'zzzz'; known: count, share"),
        ({"count": 1.0}, "count must be an integer, got 1.0"),
        ({"count": True}, "count must be an integer, got True"),
        ({"count": "1"}, "count must be an integer, got '1'"),
        ({"count": 1, "share": "half"}, "share must be a number, got 'half'"),
        ({"count": 1, "share": False}, "share must be a number, got False"),
        ({"count": 1, "on": 1}, "on must be true or false, got 1"),
        ({"count": 1, "label": 4}, "label must be a string, got 4"),
        ({"count": 1, "kernel": 2.0}, "kernel must be an integer or two of them [height, width], got 2.0"),
        ({"count": 1, "kernel": True}, "kernel must be an integer or two of them [height, width], got True"),
        ({"count": 1, "kernel": [3]}, "kernel must be an integer or two of them [height, width], got [3]"),
        ({"count": 1, "stride": [1, 2, 3]}, "stride must be an integer or two of them [height, width], got [1, 2, 3]"),
        ({"count": 1, "stride": [1, True]}, "stride must be an integer or two of them [height, width], got [1, True]"),
        ({"count": 1, "steps": 3}, "steps must be a list of numbers, got 3"),
        ({"count": 1, "steps": [1, "2"]}, "steps must be a list of numbers, got [1, '2']"),
        ({"count": 1, "steps": [True]}, "steps must be a list of numbers, got [True]"),
        ({"count": 1, "slopes": True}, "slopes must be a number or a list of numbers, got True"),
        ({"count": 1, "slopes": ["1"]}, "slopes must be a number or a list of numbers, got ['1']"),
    ],
)
def test_errors_say_what_would_be_right(table: dict[str, object], message: str) -> None:
    with pytest.raises(FnetError) as caught:
        build(Sample, table, "a sample")
    assert str(caught.value).startswith(message)


def test_a_bool_is_no_integer() -> None:
    assert [is_int(value) for value in (0, -7, True, False, 1.0, "1", None)] == [True, True] + 5 * [False]
