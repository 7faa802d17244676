from fractions import Fraction
from itertools import product

import pytest

from fnet_search.base.errors import FnetError
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
