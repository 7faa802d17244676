"""Claim: of a study that several workers share, no candidate is lost and none is finished twice, however they die.

    python benchmarks/faults.py journal --out FOLDER
    python benchmarks/faults.py postgresql+psycopg://USER@HOST/DB --out FOLDER
    python benchmarks/faults.py journal --training --workers 2 --plans 12 --kills 5 --lease 30 --out FOLDER

Workers search with a stand-in for training that takes 0.1 s; one after the other is killed (SIGKILL) at random moments.
Every other one is started again where it was; the others' candidates wait until their leases run out. With --training
they are fnet-search run and worker, on the digits, and each is started again where it was.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

import optuna
from machine import machine
from optuna.trial import TrialState

from fnet_policies import Random
from fnet_search.candidates.job import Job, Setup
from fnet_search.candidates.network_files import QUANTIZED, WEIGHTS
from fnet_search.candidates.pool import Finished, Judge
from fnet_search.candidates.workers import WorkerPool
from fnet_search.engine.search_loop import search
from fnet_search.engine.study_record import Sharing, StudyRecord
from fnet_search.importing.spaces import load_space
from fnet_search.optuna_bridge.leases import LEFT
from fnet_search.optuna_bridge.storage import open_artifacts, open_url
from fnet_search.optuna_bridge.trials import NUMBER, PLAN, ROLE
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation
from fnet_search.quant.scheme import PAPER
from fnet_search.rundir.run_folder import RunFolder
from fnet_search.training.numerics import Numerics
from fnet_search.training.recipe import load_recipe

STUDY, MARK = "faults", "training"
SPACE = load_space("factorizenet")


@dataclass
class StandIn:
    """A pool of one worker whose training takes a while and gives an accuracy that follows from the plan."""

    setup: Setup
    seconds: float
    mark: Path
    """There while it trains."""
    count: int = 1
    paused: int = 0
    jobs: list[Job] = field(default_factory=list)

    @property
    def busy(self) -> int:
        return len(self.jobs)

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def events(self, judge: Judge = lambda number, progress: False) -> Iterator[Finished]:
        job = self.jobs.pop()
        self.mark.touch()
        time.sleep(self.seconds)
        self.mark.unlink()
        job.folder.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, QUANTIZED):
            (job.folder / name).write_text(str(job.plan))
        accuracy = random.Random(str(job.plan)).uniform(0.5, 0.9)
        known = {"number": job.number, "quint8_accuracy": accuracy, "fp32_accuracy": accuracy, "epochs": 1}
        yield Finished(Evaluation.of(self.setup.space, job.plan, **known), self.seconds)


def work(url: str, folder: Path, plans: int, lease: float, seconds: float) -> None:
    """A worker: searches until the study is done."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    run = RunFolder(folder / STUDY)
    setup = Setup(SPACE, load_recipe("quick"), (PAPER,), Numerics("cpu"), 0, "validation")
    with run.locked():
        share = Sharing(run.worker, open_artifacts(str(folder.parent / "artifacts")), lease)
        record = StudyRecord(open_url(url), run, SPACE, Constraints(), 0, "validation", setup, sharing=share)
        with closing(record):
            for _ in search(Random(), record, cast(WorkerPool, StandIn(setup, seconds, folder / MARK)), plans):
                pass


def start(options: argparse.Namespace, url: str, place: int) -> BaseProcess:
    """Forked, so that no time is lost on starting Python: nearly every kill meets a worker at work."""
    asked = (url, options.out / f"worker{place}", options.plans, options.lease, options.seconds)
    process = get_context("fork").Process(target=work, args=asked)
    process.start()
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("storage", help="journal, or an Optuna URL of an empty database")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--plans", type=int, default=200)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--lease", type=float, default=4.0, help="Seconds.")
    parser.add_argument("--seconds", type=float, default=0.1, help="Of a stand-in training.")
    parser.add_argument("--pause", type=float, default=1.0, help="Seconds between two kills, at most.")
    parser.add_argument("--training", action="store_true", help="Real training, on the digits.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out = options.out.resolve()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    url = f"journal:{options.out / 'study.log'}" if options.storage == "journal" else options.storage
    began = time.monotonic()
    kills, restarts = (training if options.training else killing)(options, url)
    report(options, url, kills, restarts, time.monotonic() - began)


def killing(options: argparse.Namespace, url: str) -> tuple[int, int]:
    """Starts workers, kills one after the other, two of three while they train, and lets the last ones end; how many
    were killed, and how many of those were started again in their folders."""
    chance, places = random.Random(options.seed), options.workers
    running = {place: start(options, url, place) for place in range(places)}
    kills = restarts = 0
    while running:
        time.sleep(chance.uniform(0, options.pause))
        for place, process in list(running.items()):
            if process.exitcode is not None:
                if process.exitcode:
                    sys.exit(f"worker {place} ended with exit code {process.exitcode}")
                del running[place]
        if kills < options.kills and len(running) == options.workers:
            place = chance.choice(training_now(options, running) if kills % 3 else list(running))
            process = running.pop(place)
            process.kill()
            process.join()
            (options.out / f"worker{place}" / MARK).unlink(missing_ok=True)
            kills += 1
            if kills % 2:
                restarts += 1
            else:
                place, places = places, places + 1
            running[place] = start(options, url, place)
    return kills, restarts


def training_now(options: argparse.Namespace, running: Mapping[int, object]) -> list[int]:
    """The workers that are at it, as soon as one is; all, if none will be."""
    until = time.monotonic() + 2
    while time.monotonic() < until:
        if found := [place for place in running if (options.out / f"worker{place}" / MARK).exists()]:
            return found
        time.sleep(0.002)
    return list(running)


def training(options: argparse.Namespace, url: str) -> tuple[int, int]:
    """A run, and workers that join it when it has recorded something; processes and all, one after the other."""
    chance = random.Random(options.seed)
    alike = ("--workers", "1", "--dtype", "float32", "--no-fused", "--storage", url)
    asked = ("--space", "tiny", "--budget", "60%", "--policy", "random", "--epochs", "10", "--warm-epochs", "3")
    more = ("--trials", options.plans, "--lease", round(options.lease), "--no-prune", "--out", STUDY)
    commands = {0: ("run", *asked, *map(str, more), *alike)}
    for place in range(1, options.workers):
        commands[place] = ("worker", "--study", STUDY, "--out", f"worker{place}", *alike)

    def begin(place: int) -> "subprocess.Popen[bytes]":
        log = (options.out / f"{place}.log").open("a")
        command = [sys.executable, "-m", "fnet_search", *commands[place]]
        return subprocess.Popen(command, cwd=options.out, stdout=log, stderr=log, start_new_session=True)

    running, kills = {0: begin(0)}, 0
    while not (options.out / STUDY / "candidates.csv").is_file():
        time.sleep(0.1)
    running |= {place: begin(place) for place in list(commands)[1:]}
    while running:
        time.sleep(chance.uniform(5, 25))
        for place, process in list(running.items()):
            if process.poll() is not None:
                if process.returncode:
                    sys.exit(f"process {place} ended with exit code {process.returncode}")
                del running[place]
        if kills < options.kills and running:
            place = chance.choice(list(running))
            os.killpg(running[place].pid, signal.SIGKILL)
            running[place].wait()
            kills += 1
            running[place] = begin(place)
    return kills, kills


def finished_and_left(url: str, name: str) -> dict[str, int]:
    """What a study's trials say."""
    trials = optuna.load_study(study_name=name, storage=open_url(url)).get_trials(deepcopy=False)
    done = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    left = Counter(trial.system_attrs.get(LEFT) for trial in trials if trial.state is TrialState.FAIL)
    numbers = Counter(trial.user_attrs[NUMBER] for trial in done)
    plans = Counter(trial.user_attrs[PLAN] for trial in done if trial.user_attrs.get(ROLE) == "candidate")
    return {
        "plans finished": len(plans),
        "candidates that a worker went on with": left["released"],
        "candidates taken over from a worker that was gone": left["expired"],
        "withdrawn, since another was faster": left["withdrawn"],
        "finished twice": sum(count - 1 for count in (plans | numbers).values()),
        "still running": sum(not trial.state.is_finished() for trial in trials),
    }


def report(options: argparse.Namespace, url: str, kills: int, restarts: int, seconds: float) -> None:
    counts = finished_and_left(url, STUDY)
    rows = {
        "workers at a time": options.workers,
        "plans wanted": options.plans,
        "killed": kills,
        "  and started again where they were": restarts,
        **counts,
        "lost": options.plans - counts["plans finished"],
        "seconds": round(seconds),
    }
    table = "\n".join(f"{name:52}{count:6}" for name, count in rows.items())
    text = f"{machine()}\n{url.partition(':')[0]}, lease {options.lease:g} s\n{table}"
    print(text)
    (options.out / "faults.txt").write_text(text + "\n")
    if rows["finished twice"] or rows["lost"] or rows["still running"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
