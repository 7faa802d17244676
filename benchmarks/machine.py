"""What the benchmarks share: on what they ran, and how far figures spread. Loads neither torch nor numpy."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles

ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "bf16", "i8mm", "sve")
"""What a processor may have that decides how fast a network runs on it (x86, then ARM), as Linux calls it."""


def machine(*packages: str) -> str:
    """One line: processor, cores that this process may use, what of `ISA` it has, versions of torch and of `packages`,
    date."""
    path = Path("/proc/cpuinfo")
    entries = (line.partition(":") for line in (path.read_text() if path.is_file() else "").splitlines())
    known = {name.strip(): value.strip() for name, _, value in entries}
    model = known.get("model name") or platform.processor() or platform.machine()
    flags = (known.get("flags") or known.get("Features") or "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = [f"{package} {version(package)}" for package in ("torch", *packages)]
    isa = " ".join(name for name in ISA if name in flags) or "instruction set unknown"
    facts = [model, f"{cores} cores", isa, f"Python {platform.python_version()}", *versions]
    return "; ".join([*facts, date.today().isoformat()])


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{_digits(self.median)} ({_digits(self.low)} to {_digits(self.high)})"


def _digits(value: float) -> str:
    """Three digits or so, never an exponent."""
    return f"{value:,.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"


def spread(values: Sequence[float]) -> Spread:
    """Of one value or more."""
    return Spread(*quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Of ours / theirs, round by round: both were measured in each round, one right after the other."""
    return spread([one / other for one, other in zip(ours, theirs, strict=True)])
