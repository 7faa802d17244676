import pytest

from fnet_search.base.errors import FnetError
from fnet_search.base.units import (
    budgets_meant,
    counted,
    counts_meant,
    millions,
    mmac,
    parse_budget,
    parse_count,
    parse_duration,
    parse_share,
    percent,
)

WHOLE = 266_010_624


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("120MMAC", 120 * 10**6),
        ("120mmacs", 120 * 10**6),
        (" 120 MMAC ", 120 * 10**6),
        ("0.12GMAC", 120 * 10**6),
        (".5GMAC", 500 * 10**6),
        ("120e6", 120 * 10**6),
        ("1.2E+8", 120 * 10**6),
        ("5.", 5),
        ("7KMAC", 7 * 10**3),
        ("33415168MAC", 33_415_168),
        ("1", 1),
        ("1e-9GMAC", 1),
        ("2.01GMAC", 2_010 * 10**6),
        ("1.9999999MMAC", 1_999_999),
        ("45%", WHOLE * 45 // 100),
        ("12.5 %", WHOLE // 8),
        ("100%", WHOLE),
        ("150%", WHOLE * 3 // 2),
    ],
)
def test_budgets(text: str, budget: int) -> None:
    assert parse_budget(text, WHOLE) == budget


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("120", ["120MMAC"]),
        ("45", ["45MMAC", "45%"]),
        ("12.6", ["12.6%"]),
        ("12.5", []),
        ("0.45", ["45%"]),
        (".126", [".126GMAC", "12.6%"]),
        ("0.2", ["0.2GMAC", "20%"]),
        ("1", []),
        ("100", ["100MMAC", "100%"]),
        ("266", ["266MMAC"]),
        ("267", []),
        ("34000", ["34000KMAC"]),
        ("0", []),
        *((text, []) for text in ("120MMAC", "45%", "", "much", "-5")),
    ],
)
def test_what_a_budget_without_a_unit_may_mean(text: str, meant: list[str]) -> None:
    """Budgets that some networks meet: from 33.4 to 266.01 MMAC."""
    assert budgets_meant(text, 33_415_168, WHOLE) == meant


def test_what_a_count_without_a_unit_may_mean() -> None:
    assert counts_meant("2", "", 1_500, 3 * 10**6) == ["2K", "2M"]
    assert counts_meant("2", "", 2_001, 2 * 10**6) == ["2M"]
    assert counts_meant("2M", "", 1, 10**12) == []


@pytest.mark.parametrize(
    "text",
    [
        *("MMAC", "%", "abc", "120MB", "120M", "1,000", "1_000", "1e", "0x10", "120%MAC", "1..2", "..", ".", "+-3"),
        *("-5MMAC", "-1", "-45%", "inf", "-inf", "Infinity", "nan", "infMMAC", "nan%", "1e999", "1e999%"),
        *("", " ", "120 M MAC", "1 2MMAC", "120MMAC\n1", "\N{ARABIC-INDIC DIGIT ONE}MMAC", "9" * 400),
    ],
)
def test_malformed_budgets(text: str) -> None:
    with pytest.raises(FnetError) as caught:
        parse_budget(text, WHOLE)
    assert str(caught.value) == f"malformed budget {text.strip()!r}; write 120MMAC, 0.12GMAC, 120e6 or 45%"


@pytest.mark.parametrize("text", ["0", "0.0", "0MMAC", "0%", "0.9", "1e-10GMAC", "1e-99", "0.0000001%"])
def test_budgets_of_less_than_one_mac(text: str) -> None:
    with pytest.raises(FnetError, match=r"is less than one MAC; write a positive one"):
        parse_budget(text, WHOLE)


def test_every_budget_that_is_taken_can_be_shown() -> None:
    assert len(mmac(parse_budget("9" * 30 + "e99GMAC", WHOLE))) > 100


@pytest.mark.parametrize(
    ("text", "share"), [("0.8", 0.8), ("80%", 0.8), ("7 %", 0.07), ("1", 1.0), ("100%", 1.0), (" .5 ", 0.5)]
)
def test_shares(text: str, share: float) -> None:
    assert parse_share(text, "min_quint8") == share


@pytest.mark.parametrize(
    "text", ["", "0", "0%", "1.01", "101%", "80", "-0.1", "-5%", "inf", "nan", "nan%", "half", "1e99"]
)
def test_bad_shares(text: str) -> None:
    with pytest.raises(FnetError) as caught:
        parse_share(text, "max_drop")
    meant = "80%" if text == "80" else "1.01%" if text == "1.01" else "0.8 or 80%"
    assert str(caught.value) == f"`max_drop` {text!r} must be above 0 and at most 1; write {meant}"


@pytest.mark.parametrize(
    ("text", "count"),
    [("2M", 2 * 10**6), ("250K", 250 * 10**3), ("0.3g", 300 * 10**6), ("2e6", 2 * 10**6), ("2000000", 2 * 10**6)],
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text, "max_params") == count


@pytest.mark.parametrize("text", ["", "0", "0.5", "-2M", "2MB", "2%", "inf", "nan", "1e999", "M"])
def test_bad_counts(text: str) -> None:
    with pytest.raises(FnetError) as caught:
        parse_count(text, "max_params")
    assert str(caught.value) == f"`max_params` {text!r} must be a positive number; write 2M, 250K or 2000000"


def test_what_people_read() -> None:
    assert mmac(104_267_776) == "104.3 MMAC"
    assert mmac(1_234_567_890) == "1,234.6 MMAC"
    assert [millions(macs) for macs in (10_000_000, 9_876_543, 1_234_567, 123_456, 0)] == [
        "10.0",
        "9.88",
        "1.23",
        "0.123",
        "0",
    ]
    assert percent(0.972549) == "97.25 %"
    assert percent(0.972549, 1) == "97.3 %"
    assert percent(0.0) == "0.00 %"
    assert percent(None) == ""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("25m", 25 * 60),
        ("90s", 90),
        ("1h30m", 90 * 60),
        (" 1h 2min 3s ", 3600 + 2 * 60 + 3),
        ("1.5H", 90 * 60),
        ("0.5s", 0.5),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text, "time_limit") == seconds


@pytest.mark.parametrize("text", ["", "0m", "-5m", "m", "1.2.3h", "30m1h", "5 weeks", "infs", "nanm"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(FnetError, match=r"^`time_limit` '.*' must be a time above 0; write 25m, 90s or 1h30m$"):
        parse_duration(text, "time_limit")


@pytest.mark.parametrize("text", ["25", " 1.5"])
def test_a_duration_without_a_unit(text: str) -> None:
    with pytest.raises(FnetError, match=rf"needs a unit; write {text.strip()}m for minutes, or s or h$"):
        parse_duration(text, "time_limit")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 epochs"), (0.25, "0.25 epochs"), (1, "1 epoch"), (2, "2 epochs"), (1200, "1,200 epochs")],
)
def test_numbers_of_things(number: float, text: str) -> None:
    assert counted(number, "epoch") == text
