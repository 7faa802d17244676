"""Parses and prints budgets, shares, counts and durations."""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from fnet_search.base.errors import FnetError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_NUMBER = r"([0-9]{0,30}\.?[0-9]{1,30}(?:[eE][+-]?[0-9]{1,2})?|[0-9]{1,30}\.)"  # short enough never to overflow a float


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        raise FnetError(f"{text!r} is not a number") from None


def parse_budget(text: str, whole: int) -> int:
    """conv MACs from ``120MMAC``, ``0.12GMAC``, ``120e6`` or ``45%`` (of `whole`), rounded down.

    Raises FnetError for anything else, and for less than one MAC.
    """
    text = text.strip()
    if match := re.fullmatch(rf"{_NUMBER}\s*%", text):
        budget = int(Fraction(_decimal(match[1])) * whole / 100)
    elif match := re.fullmatch(rf"{_NUMBER}\s*(?:([KMG]?)MACs?)?", text, re.IGNORECASE):
        budget = int(Fraction(_decimal(match[1])) * _UNITS[(match[2] or "").upper()])
    else:
        raise FnetError(f"malformed budget {text!r}; write 120MMAC, 0.12GMAC, 120e6 or 45%")
    if budget < 1:
        raise FnetError(f"budget {text!r} is less than one MAC; write a positive one, as in 120MMAC")
    return budget


def counts_meant(text: str, unit: str, least: int, most: int) -> list[str]:
    """The readings of a number without its unit: for ``120`` and ``MAC``, those of ``120KMAC``, ``120MMAC`` and
    ``120GMAC`` that lie between `least` and `most`. Empty if `text` is not a number."""
    number = text.strip()
    if not re.fullmatch(_NUMBER, number):
        return []
    return [f"{number}{k}{unit}" for k, scale in _UNITS.items() if k and least <= _decimal(number) * scale <= most]


def budgets_meant(text: str, smallest: int, whole: int) -> list[str]:
    """As `counts_meant`, for a budget between `smallest` and `whole`: a number of MACs, a percentage, or a fraction."""
    number = text.strip()
    if not re.fullmatch(_NUMBER, number):
        return []
    percents = [f"{number}%", *([f"{(100 * _decimal(number)).normalize():f}%"] if _decimal(number) < 1 else [])]
    shares = [text for text in percents if smallest <= _decimal(text.removesuffix("%")) * whole / 100 <= whole]
    return [*counts_meant(number, "MAC", smallest, whole), *shares]


def parse_share(text: str, parameter: str) -> float:
    """A fraction of 1, above 0 and at most 1, from ``0.8`` or ``80%``. Raises FnetError for anything else, naming the
    parameter."""
    match = re.fullmatch(rf"{_NUMBER}\s*(%?)", text.strip())
    value = float(_decimal(match[1]) / (100 if match[2] else 1)) if match else -1.0
    if not 0 < value <= 1:
        meant = f"{text.strip()}%" if match and not match[2] and 1 < value <= 100 else "0.8 or 80%"
        raise FnetError(f"`{parameter}` {text!r} must be above 0 and at most 1; write {meant}")
    return value


def parse_count(text: str, parameter: str) -> int:
    """A positive count from ``2M``, ``250K``, ``2e6`` or ``2000000``. Raises FnetError as `parse_share`."""
    match = re.fullmatch(rf"{_NUMBER}\s*([KMG]?)", text.strip(), re.IGNORECASE)
    value = int(Fraction(_decimal(match[1])) * _UNITS[match[2].upper()]) if match else 0
    if value < 1:
        raise FnetError(f"`{parameter}` {text!r} must be a positive number; write 2M, 250K or 2000000")
    return value


def parse_duration(text: str, parameter: str) -> float:
    """Seconds from ``25m``, ``90s``, ``1h30m`` or ``1.5h``, above 0. Raises FnetError as `parse_share`."""
    match = re.fullmatch(
        rf"(?:{_NUMBER}\s*h)?\s*(?:{_NUMBER}\s*m(?:in)?)?\s*(?:{_NUMBER}\s*s)?", text.strip(), re.IGNORECASE
    )
    parts = zip(match.groups(), (3600, 60, 1), strict=True) if match else ()
    seconds = sum(float(_decimal(part)) * unit for part, unit in parts if part)
    if seconds <= 0 and match is None and re.fullmatch(_NUMBER, text.strip()):
        raise FnetError(f"`{parameter}` {text!r} needs a unit; write {text.strip()}m for minutes, or s or h")
    if seconds <= 0:
        raise FnetError(f"`{parameter}` {text!r} must be a time above 0; write 25m, 90s or 1h30m")
    return seconds


def millions(macs: float) -> str:
    """MACs in MMAC, without the unit: with one decimal, or with three significant digits below 10."""
    value = macs / 1e6
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def mmac(macs: int) -> str:
    """MACs as in ``104.3 MMAC``."""
    return f"{millions(macs)} MMAC"


def percent(share: float | None, digits: int = 2) -> str:
    """A fraction of 1 as in ``97.25 %``; empty for None."""
    return "" if share is None else f"{100 * share:.{digits}f} %"


def counted(number: float, what: str) -> str:
    """A number with its noun: ``1 epoch``, ``0.25 epochs``, ``1,200 epochs``."""
    return f"{number:,.6g} {what}{'' if number == 1 else 's'}"


def size_text(shape: Sequence[int]) -> str:
    """A shape as in ``3x32x32``."""
    return "x".join(map(str, shape))
