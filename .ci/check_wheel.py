"""Builds the wheel and checks that it exposes `fnet_search` and `fnet_policies` only, and carries its data."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
WANTED = {"fnet_search", "fnet_policies"}
DATA = {
    *(f"fnet_search/spaces/{path.name}" for path in (ROOT / "spaces").glob("*.toml")),
    *(f"fnet_search/studies/{path.name}" for path in (ROOT / "studies").glob("*.toml")),
    *(f"fnet_search/recipes/{path.name}" for path in (ROOT / "fnet_search" / "recipes").glob("*.toml")),
    "fnet_search/py.typed",
    "fnet_policies/py.typed",
}

with tempfile.TemporaryDirectory() as folder:
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(ROOT)], check=True)
    (wheel,) = Path(folder).glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
missing = DATA - set(names)
if top != WANTED or missing:
    sys.exit(f"wheel: top-level names {sorted(top)}, wanted {sorted(WANTED)}; missing data {sorted(missing)}")
print(f"wheel: {len(names)} files, top-level names {sorted(top)}, {len(DATA)} data files")
