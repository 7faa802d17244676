"""Claim: a study of 2,000 trials makes its process no more than 100 MB larger, and is opened again within 5 seconds.

    python benchmarks/long_study.py

Candidates of `random` on the space factorizenet, with made-up evaluations of all their layers, recorded as a search
records them, in a journal file.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import optuna
import psutil
from machine import machine

from fnet_policies import Random
from fnet_search.arch.plan import FactorizationPlan
from fnet_search.candidates.job import Setup
from fnet_search.engine.study_record import StudyRecord
from fnet_search.importing.spaces import load_space
from fnet_search.optuna_bridge.storage import open_journal
from fnet_search.policy.conformance import made_up_layers
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation
from fnet_search.quant.scheme import PAPER
from fnet_search.rundir.run_folder import RunFolder
from fnet_search.training.numerics import Numerics
from fnet_search.training.recipe import load_recipe

SPACE = load_space("factorizenet")


def opened(folder: Path) -> StudyRecord:
    run = RunFolder(folder)
    setup = Setup(SPACE, load_recipe("quick"), (PAPER,), Numerics("cpu"), 0, "validation")
    return StudyRecord(open_journal(run.journal), run, SPACE, Constraints(), 0, "validation", setup)


def evaluation(plan: FactorizationPlan, number: int) -> Evaluation:
    accuracy = 0.5 + number % 97 / 300
    known = {"number": number, "epochs": 2, "fp32_accuracy": accuracy + 0.02, "quint8_accuracy": accuracy, "qmse": 0.5}
    return Evaluation.of(SPACE, plan, **known, qce=0.5, kl=0.1, layers=made_up_layers(SPACE, plan))


def memory() -> float:
    """MB, of this process."""
    return float(psutil.Process().memory_info().rss) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if options.open is not None:
        before, began = memory(), time.perf_counter()
        found = len(opened(options.open).history().evaluations)
        print(f"opened again: {found:,} trials in {time.perf_counter() - began:.2f} s, {memory() - before:.0f} MB")
        return
    print(machine(), flush=True)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "study"
        folder.mkdir()
        record, before = opened(folder), memory()
        for number in range(options.trials):
            plan = Random().suggest(record.history())
            assert plan is not None
            job = record.start(plan, "candidate")
            assert job is not None
            record.finish(evaluation(plan, job.number), 1.0)
            if (number + 1) % (options.trials // 4) == 0:
                print(f"{number + 1:,} trials recorded: {memory() - before:.0f} MB more", flush=True)
        print(f"journal: {record.run.journal.stat().st_size / 1e6:.0f} MB", flush=True)
        subprocess.run([sys.executable, __file__, "--open", str(folder)], env=dict(os.environ), check=True)


if __name__ == "__main__":
    main()
