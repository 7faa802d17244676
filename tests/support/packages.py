"""Packages of third parties."""

from collections.abc import Mapping
from pathlib import Path


def install(site: Path, name: str, code: str, entry_points: Mapping[str, Mapping[str, str]]) -> Path:
    """Writes an installed package with one module, and its entry points by group and name, into a folder that the
    caller puts on ``sys.path``; returns that folder."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{key} = {to}\n" for key, to in of.items()) for group, of in entry_points.items()
    ]
    (info / "entry_points.txt").write_text("".join(lines))
    (site / f"{name}.py").write_text(code)
    return site
