"""Builds frozen dataclasses from TOML tables; errors say what would be right."""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_origin

from fnet_search.base.errors import FnetError, nearest

T = TypeVar("T")
IntPair = tuple[int, int]
Numbers = float | tuple[float, ...]
"""One number, or several."""


def is_int(value: object) -> bool:
    """Whether a value is an integer; a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or is_int(value)


def read_table(path: Path, what: str) -> dict[str, Any]:
    """Reads a TOML file. `what` names its kind in messages, as in "recipe". Raises FnetError if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FnetError(f"cannot read {what} {path}: {error}") from None


def build(kind: type[T], table: Mapping[str, Any], what: str) -> T:
    """The dataclass `kind` with the entries of a table. `what` names it in messages, as in "a conv layer".

    Raises FnetError for an unknown key (naming the nearest), a missing one, or a value of the wrong type.
    """
    options = {option.name: option for option in fields(cast(Any, kind))}
    values = {}
    for key, value in table.items():
        if key not in options:
            raise FnetError(f"{what} has no {key!r}{nearest(key, options)}")
        values[key] = _value(key, value, options[key].type)
    for name, option in options.items():
        if option.default is MISSING and option.default_factory is MISSING and name not in values:
            raise FnetError(f"{what} needs {name!r}")
    return kind(**values)


def _value(key: str, value: object, wanted: object) -> object:
    if wanted in (IntPair, IntPair | None):
        pair = [value, value] if is_int(value) else value
        if isinstance(pair, list) and len(pair) == 2 and all(map(is_int, pair)):
            return tuple(pair)
        raise FnetError(f"{key} must be an integer or two of them [height, width], got {value!r}")
    if wanted == tuple[int, ...]:
        if isinstance(value, list) and all(map(is_int, value)):
            return tuple(value)
        raise FnetError(f"{key} must be a list of integers, got {value!r}")
    if wanted == tuple[int, int, int]:
        if isinstance(value, list) and len(value) == 3 and all(map(is_int, value)):
            return tuple(value)
        raise FnetError(f"{key} must be a list of three integers, got {value!r}")
    if wanted in (tuple[float, ...], Numbers | None):
        if isinstance(value, list) and all(map(_is_number, value)):
            return tuple(value)
        if wanted == Numbers | None and _is_number(value):
            return value
        alone = "" if wanted == tuple[float, ...] else "a number or "
        raise FnetError(f"{key} must be {alone}a list of numbers, got {value!r}")
    if is_dataclass(wanted):
        return value  # already built by the caller
    number = _is_number(value), "a number"
    kinds: dict[object, tuple[bool, str]] = {
        bool: (isinstance(value, bool), "true or false"),
        float: number,
        float | None: number,
        int: (is_int(value), "an integer"),
    }
    if wanted in (str, str | None) or get_origin(wanted) is Literal:
        kinds[wanted] = isinstance(value, str), "a string"
    if wanted not in kinds:
        raise TypeError(f"no TOML value is read as {wanted}")
    good, name = kinds[wanted]
    if not good:
        raise FnetError(f"{key} must be {name}, got {value!r}")
    return value
