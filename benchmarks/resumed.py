"""Claim: a search that is killed at any moment and started again ends with the same candidates.csv, byte for byte.

    python benchmarks/resumed.py --out FOLDER

One worker, real training on the digits: reference, probes, candidates, final training, test, report. Each time the
whole process group is killed (SIGKILL) once, at a moment drawn evenly over the time that the uninterrupted search took.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from machine import machine
from rich.progress import track

SEARCH = ("run", "--space", "tiny", "--budget", "60%", "--epochs", "2", "--trials", "2")


def start(out: Path) -> "subprocess.Popen[bytes]":
    """Computing as the uninterrupted one did: equal numerics give equal bits."""
    whole = out.parent / "whole"
    alike = ("--numerics-of", str(whole)) if out != whole else ("--dtype", "float32", "--no-fused")
    command = [sys.executable, "-m", "fnet_search", *SEARCH, "--workers", "1", *alike, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def finish(out: Path) -> bytes:
    """Runs to the end; candidates.csv."""
    process = start(out)
    _, said = process.communicate()
    if process.returncode != 0:
        sys.exit(f"{out}: exit code {process.returncode}: {said.decode()}")
    return (out / "candidates.csv").read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    print(machine(), flush=True)
    began = time.monotonic()
    whole = finish(options.out / "whole")
    seconds = time.monotonic() - began
    chance, equal, begun = random.Random(options.seed), 0, 0
    for number in track(range(options.kills), "killing", disable=not sys.stdout.isatty()):
        out = options.out / f"{number:02d}"
        process = start(out)
        time.sleep(chance.uniform(0, seconds))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        begun += (out / "candidates.csv").exists()
        same = finish(out) == whole
        equal += same
        if same:
            shutil.rmtree(out)
        else:
            print(f"{out} differs", flush=True)
    rows = len(whole.splitlines()) - 1
    print(f"uninterrupted: {rows} candidates in {seconds:.0f} s")
    print(f"killed: {options.kills}, {begun} of them after the study was opened")
    print(f"the same candidates.csv: {equal} of {options.kills}")
    sys.exit(equal < options.kills)


if __name__ == "__main__":
    main()
