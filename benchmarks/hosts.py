"""Claim: two hosts share a study, and a link that is down for a minute costs nothing but time.

    python benchmarks/hosts.py --out FOLDER       # as root, on Linux: it makes two network namespaces

Host a has PostgreSQL and the run, host b a worker; between them is one link. It is taken down for a minute while both
train (on the digits), and comes up again.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pandas as pd
from faults import finished_and_left
from machine import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tests.support.servers import postgres

A, B = "10.177.0.1", "10.177.0.2"
SEARCH = ("--space", "tiny", "--budget", "60%", "--policy", "random", "--epochs", "10", "--warm-epochs", "4")
PLAIN = ("--workers", "1", "--dtype", "float32", "--no-fused")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def hosts() -> Iterator[None]:
    """Host a is where this process is, host b a namespace; a link between them."""
    ip("netns", "add", "fnet-b")
    try:
        ip("link", "add", "fnet-a", "type", "veth", "peer", "name", "fnet-b", "netns", "fnet-b")
        ip("addr", "add", f"{A}/24", "dev", "fnet-a")
        ip("link", "set", "fnet-a", "up")
        for command in (("addr", "add", f"{B}/24", "dev", "fnet-b"), ("link", "set", "fnet-b", "up")):
            ip("-n", "fnet-b", *command)
        ip("-n", "fnet-b", "link", "set", "lo", "up")
        yield
    finally:
        subprocess.run(["ip", "link", "del", "fnet-a"], check=False)
        ip("netns", "del", "fnet-b")


def start(host: str, out: Path, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
    inside = ["ip", "netns", "exec", "fnet-b"] if host == "b" else []
    command = [*inside, sys.executable, "-m", "fnet_search", *arguments, *PLAIN]
    return subprocess.Popen(command, cwd=out, stdout=(out / f"{name}.log").open("w"), stderr=subprocess.STDOUT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--down", type=float, default=60.0, help="Seconds that the link is down.")
    options = parser.parse_args()
    out = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    print(machine(), flush=True)
    with hosts(), postgres(A) as url:
        shared = ("--storage", url)
        asked = (*SEARCH, "--trials", str(options.trials), "--artifacts", str(out / "artifacts"), "--out", "study")
        run = start("a", out, "run", "run", *asked, *shared)
        wait_for(out / "study" / "candidates" / "000" / "evaluation.json", run)
        worker = start("b", out, "worker", "worker", *shared, "--study", "study")
        folders = [out / "study", out / "runs" / "study-worker"]
        wait_for(folders[1] / "candidates" / "002" / "checkpoint.safetensors", worker, "00[1-9]/checkpoint.safetensors")
        ip("link", "set", "fnet-a", "down")
        print(f"link down, {rows(folders[0])} candidates recorded", flush=True)
        time.sleep(options.down)
        ip("link", "set", "fnet-a", "up")
        ip("addr", "replace", f"{A}/24", "dev", "fnet-a")
        print(f"link up after {options.down:.0f} s, {rows(folders[0])} candidates recorded", flush=True)
        codes = run.wait(), worker.wait()
        counts = finished_and_left(url, "study")
    said = (out / "worker.log").read_text()
    print(f"exit codes {codes}; the worker said that the storage was out of reach: {'out of reach' in said}")
    tables = [pd.read_csv(folder / "candidates.csv") for folder in folders]
    one, other = (table.drop(columns=["audited_codes", "differing_codes"]) for table in tables)  # the run's own audit
    print(f"candidates: {len(one)}, the same in both folders: {one.equals(other)}")
    print(said.splitlines()[-1])
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))
    sys.exit(any(codes) or not one.equals(other) or counts["finished twice"] > 0)


def rows(folder: Path) -> int:
    return len((folder / "candidates.csv").read_text().splitlines()) - 1


def wait_for(path: Path, process: "subprocess.Popen[bytes]", pattern: str = "") -> None:
    until = time.monotonic() + 600
    while not (any(path.parents[1].glob(pattern)) if pattern else path.is_file()):
        if process.poll() is not None or time.monotonic() > until:
            sys.exit(f"nothing came of {process.args}")
        time.sleep(0.1)


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    main()
