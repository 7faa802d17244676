import subprocess
import sys
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
import torch

from fnet_search.base.errors import FnetError
from fnet_search.quant.ranges import observer_of, passes
from fnet_search.quant.scheme import (
    CHOICE,
    MINMAX,
    MSE,
    PAPER,
    RangeMethod,
    Scheme,
    parse_ranges,
    parse_scheme,
    parse_schemes,
    schemes_text,
)
from tests.support.packages import install


@pytest.mark.parametrize(
    ("text", "method", "shown"),
    [
        ("minmax", MINMAX, "minmax"),
        ("percentile:0", MINMAX, "minmax"),
        ("percentile:00.000", MINMAX, "minmax"),
        ("mse", MSE, "mse"),
        ("percentile:1", RangeMethod("percentile", Fraction(1)), "percentile:1"),
        ("percentile:0.1", RangeMethod("percentile", Fraction(1, 10)), "percentile:0.1"),
        ("percentile:0.000001", RangeMethod("percentile", Fraction(1, 10**6)), "percentile:1e-06"),
        ("percentile:49", RangeMethod("percentile", Fraction(49)), "percentile:49"),
        ("percentile:49.999", RangeMethod("percentile", Fraction(49_999, 1000)), "percentile:49.999"),
        ("percentile:02.50", RangeMethod("percentile", Fraction(5, 2)), "percentile:2.5"),
    ],
)
def test_methods(text: str, method: RangeMethod, shown: str) -> None:
    assert parse_ranges(text) == method
    assert str(method) == shown


def test_the_papers_method_is_the_default() -> None:
    assert RangeMethod() == parse_ranges("percentile:1")
    assert Scheme() == Scheme(parse_ranges("percentile:1"), per_channel=False, equalize=False, bias_correct=False)


UNKNOWN = [
    *("", "min-max", "MinMax", "MSE", "percentile", "percentile:", "percentile:50", "percentile:99", "percentile:-1"),
    *("percentile:nan", "percentile:inf", "percentile:1%", "percentile:1e-1", "percentile: 1", "percentile:.5"),
]


@pytest.mark.parametrize("text", UNKNOWN)
def test_unknown_methods(text: str) -> None:
    with pytest.raises(FnetError) as caught:
        parse_ranges(text)
    assert str(caught.value) == (
        f"unknown range method {text!r}; write minmax, mse or percentile:P with 0 <= P < 50, as in percentile:0.1"
    )


@pytest.mark.parametrize("ranges", ["minmax", "mse", "percentile:1", "percentile:0.1", "percentile:12.345"])
def test_a_scheme_is_read_back_from_its_text(ranges: str) -> None:
    schemes = [Scheme(parse_ranges(ranges), *helps) for helps in product([False, True], repeat=3)]
    assert [parse_scheme(str(scheme)) for scheme in schemes] == schemes
    assert len({str(scheme) for scheme in schemes}) == 8


def test_schemes_as_text() -> None:
    assert str(Scheme()) == "percentile:1"
    assert str(Scheme(MSE, per_channel=True)) == "mse+per-channel"
    assert str(Scheme(MSE, True, True, True)) == "mse+per-channel+equalize+bias-correct"
    assert parse_scheme("minmax+bias-correct+equalize") == Scheme(MINMAX, equalize=True, bias_correct=True)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("mse+equalise", "unknown part of a quantization scheme 'equalise'; did you mean 'equalize'?"),
        ("mse+per_channel", "unknown part of a quantization scheme 'per_channel'; did you mean 'per-channel'?"),
        ("mse+", "unknown part of a quantization scheme ''"),
        ("equalize", "unknown range method 'equalize'; write minmax, mse or percentile:P"),
        ("equalize+mse", "unknown part of a quantization scheme 'mse'"),
        ("", "unknown range method ''; write minmax, mse or percentile:P"),
    ],
)
def test_bad_schemes(text: str, complaint: str) -> None:
    with pytest.raises(FnetError) as caught:
        parse_scheme(text)
    assert str(caught.value).startswith(complaint)


def test_what_a_network_may_be_quantized_with() -> None:
    assert parse_schemes("paper") == (PAPER,) == (parse_scheme("percentile:1"),)
    assert parse_schemes("mse+per-channel") == (Scheme(MSE, per_channel=True),)
    assert parse_schemes("auto") == CHOICE
    assert {(one.ranges, one.per_channel, one.bias_correct) for one in CHOICE} == set(
        product((MINMAX, MSE), (False, True), (False, True))
    )
    assert str(CHOICE[0]) == "mse+per-channel+bias-correct", "what a run without a reference has for its policy"
    for text in ("auto", "percentile:1", "mse+equalize"):
        assert schemes_text(parse_schemes(text)) == text


@pytest.mark.parametrize("text", ["", "Auto", "best", "mse,per-channel", "mse+channel"])
def test_unknown_schemes(text: str) -> None:
    with pytest.raises(FnetError, match=r"scheme .*: unknown .*; or auto, or paper$"):
        parse_schemes(text)


THEIRS = """
from fnet_search.quant.ranges import Observer
from fnet_search.quant.scheme import RangeSpec

class Part(Observer):
    def range(self):
        return self.low * float(self.method.number), self.high * float(self.method.number)

PART, NONE, PLAIN = RangeSpec("their_ranges:Part", (0, 2)), RangeSpec("their_ranges:Gone"), RangeSpec("math:pi")
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed third-party package with range methods, good and bad."""
    points = {"part": "PART", "none": "NONE", "plain": "PLAIN", "class": "Part"}
    group = {"fnet_search.range_methods": {name: f"their_ranges:{what}" for name, what in points.items()}}
    monkeypatch.syspath_prepend(install(tmp_path, "their_ranges", THEIRS, group))


@pytest.mark.usefixtures("theirs")
def test_a_range_method_of_a_third_party() -> None:
    found = parse_scheme("part:0.25+per-channel")
    assert found == Scheme(RangeMethod("part", Fraction(1, 4)), per_channel=True)
    assert str(found) == "part:0.25+per-channel"
    x = torch.tensor([[-2.0, 1.0], [0.0, 4.0]])
    observer = observer_of(found.ranges)(found.ranges)
    observer.first_pass(x)
    stats = observer.stats("x")
    assert (stats.low, stats.high, passes(found.ranges, MINMAX), passes(found.ranges, MSE)) == (-0.5, 1.0, 1, 2)


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("part", "unknown range method 'part'; write part:P with 0 <= P < 2"),
        ("part:2", "unknown range method 'part:2'; write part:P with 0 <= P < 2"),
        ("part:x", "unknown range method 'part:x'; write part:P with 0 <= P < 2"),
        ("none", "range method 'none' cannot be loaded: unknown name 'Gone'"),
        ("class", "range method 'class' cannot be loaded: it is a type, not a RangeSpec"),
        ("other", "unknown range method 'other'; write minmax, mse or percentile:P with 0 <= P < 50, as in "),
    ],
)
def test_bad_range_methods_of_a_third_party(text: str, complaint: str) -> None:
    with pytest.raises(FnetError) as caught:
        parse_scheme(text)
    assert str(caught.value).startswith(complaint)


@pytest.mark.usefixtures("theirs")
def test_what_third_parties_add_is_named() -> None:
    with pytest.raises(FnetError, match=r"; or of other packages: class, none, part, plain$"):
        parse_ranges("other")


@pytest.mark.usefixtures("theirs")
def test_an_observer_that_is_none() -> None:
    with pytest.raises(FnetError, match="'plain' cannot be loaded: its observer must be a subclass of Observer"):
        observer_of(parse_ranges("plain"))


def test_schemes_are_read_without_torch() -> None:
    code = "import sys; from fnet_search.quant.scheme import parse_scheme; parse_scheme('mse+per-channel')"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)
