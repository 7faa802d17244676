"""Claim: a child that starts from its regular parent is, in quint8, as accurate as one trained from scratch for as
many epochs as the parent, after at most a fifth of those epochs; the transform takes at most 1 % of that training.

    python benchmarks/warm_start.py imagefolder:PATH --epochs 10 --out FOLDER

Trains the parent and the children from scratch, then the children from the parent, several at a time, and measures all
on the test split. Goes on where it was stopped. The interval is that of a paired difference: both networks on the same
test images (Wald, 95 %); more seeds show what training itself varies.
"""

import argparse
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from machine import machine

from fnet_search.arch.factorize import factorize
from fnet_search.arch.plan import parse_plan
from fnet_search.candidates.evaluate import child
from fnet_search.candidates.job import Job, Setup, Start
from fnet_search.candidates.network_files import load_quantized, load_trained
from fnet_search.candidates.pool import Finished, Progressed
from fnet_search.candidates.processes import environment
from fnet_search.candidates.worker_count import cores
from fnet_search.candidates.workers import WorkerPool
from fnet_search.deploy.export import quantized_model
from fnet_search.deploy.runtime import Runtime
from fnet_search.importing.spaces import load_space
from fnet_search.policy.evaluation import Evaluation
from fnet_search.quant.scheme import parse_scheme
from fnet_search.training.datasets import DataSet, load_dataset
from fnet_search.training.network import build
from fnet_search.training.numerics import Numerics, resolve
from fnet_search.training.recipe import Fidelity, load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--space", default="factorizenet")
    parser.add_argument("--plans", nargs="+", default=["f4", "init2"])
    parser.add_argument("--images", type=int, help="so many training images, drawn at random; else all")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--warm-epochs", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    space = load_space(options.space)
    data = load_dataset(options.dataset, space.input_shape, Path("data"))
    if options.images is not None:
        drawn = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[: options.images]
        data = replace(data, train=data.train.take(drawn))
    space = space.with_classes(len(data.classes))
    recipe = load_recipe("quick").with_epochs(options.epochs)
    options.out.mkdir(parents=True, exist_ok=True)
    _same(options)
    numerics = _numerics(options.out)
    print(machine())
    print(f"{options.dataset}: {len(data.train):,} training, {len(data.test):,} test images; {numerics}\n", flush=True)
    scheme = parse_scheme("percentile:1")
    for seed in options.seeds:
        setups = {
            epochs: Setup(space, recipe, (scheme,), numerics, seed, "test", fidelity=Fidelity(True, epochs))
            for epochs in options.warm_epochs
        }
        setup = Setup(space, recipe, (scheme,), numerics, seed, "test")
        place = options.out / f"seed{seed}"
        plans = {name: parse_plan(space, name) for name in ("regular", *options.plans)}
        scratch = {name: Job(index, plan, place / name) for index, (name, plan) in enumerate(plans.items())}
        done = _train(setup, data, scratch, options.out)
        start = Start(0, plans["regular"], place / "regular", options.epochs)
        for epochs, warm_setup in setups.items():
            jobs = {}
            for number, name in enumerate(options.plans, 10 * epochs):
                jobs[f"{name} warm {epochs}"] = Job(number, plans[name], place / f"{name}-warm{epochs}", start=start)
            done |= _train(warm_setup, data, jobs, options.out)
        _print(setup, data, done, start, place, options)


def _same(options: argparse.Namespace) -> None:
    """What is read again must have been trained alike."""
    path = options.out / "options.json"
    alike = {name: getattr(options, name) for name in ("dataset", "space", "images", "epochs")}
    if path.is_file() and json.loads(path.read_text()) != alike:
        raise SystemExit(f"{options.out} holds trainings with {path.read_text()}; choose another --out")
    path.write_text(json.dumps(alike))


def _numerics(out: Path) -> Numerics:
    """Those of the first time, where this goes on."""
    path = out / "numerics.json"
    if not path.is_file():
        path.write_text(json.dumps(resolve("auto", workers=cores(), cores=cores()).to_json()))
    return Numerics.from_json(json.loads(path.read_text()))


def _train(setup: Setup, data: DataSet, jobs: dict[str, Job], scratch: Path) -> dict[str, tuple[Evaluation, float]]:
    """Each job's evaluation and seconds; those of jobs that were done before are read."""
    found, waiting = {}, {}
    for name, job in jobs.items():
        path = job.folder / "evaluation.json"
        if path.is_file():
            known = json.loads(path.read_text())
            found[name] = Evaluation.from_json(known["evaluation"]), known["seconds"]
        else:
            waiting[job.number] = name, job
    with WorkerPool(cores(), setup, data, scratch) as pool:
        queue = list(waiting.values())
        while queue or pool.busy:
            while queue and pool.busy < pool.count:
                pool.submit(queue.pop(0)[1])
            for event in pool.events():
                if isinstance(event, Progressed) and event.progress.ended:
                    step = event.progress
                    print(f"  {waiting[event.number][0]}: epoch {step.epoch} of {step.epochs}", flush=True)
                if isinstance(event, Finished):
                    name, job = waiting[event.evaluation.number]
                    if event.evaluation.state != "complete":
                        raise SystemExit(f"{name}: {event.evaluation.reason}")
                    facts = {"evaluation": event.evaluation.to_json(), "seconds": event.seconds}
                    (job.folder / "evaluation.json").write_text(json.dumps(facts))
                    found[name] = event.evaluation, event.seconds
    return found


def _print(setup: Setup, data: DataSet, done, start: Start, place: Path, options) -> None:
    print(f"\nseed {setup.seed}: accuracy in % on {len(data.test):,} test images")
    print(f"{'network':18}{'own epochs':>11}{'zero-shot':>11}{'fp32':>8}{'quint8':>8}{'seconds':>9}")
    for name, (one, seconds) in done.items():
        zero_shot = "" if one.zero_shot_accuracy is None else f"{100 * one.zero_shot_accuracy:.2f}"
        accuracies = f"{100 * one.fp32_accuracy:8.2f}{100 * one.quint8_accuracy:8.2f}"
        print(f"{name:18}{one.epochs:11}{zero_shot:>11}{accuracies}{seconds:9.0f}")
    print(f"\n{'warm less scratch, quint8':28}{'epochs':>10}{'difference':>12}{'95 % interval':>18}")
    for name in options.plans:
        hits = _hits(setup, data, done[name][0], place / name)
        for epochs in options.warm_epochs:
            warm = _hits(setup, data, done[f"{name} warm {epochs}"][0], place / f"{name}-warm{epochs}")
            difference = (warm - hits).double()
            mean, half = float(difference.mean()), 1.96 * float(difference.std()) / math.sqrt(len(difference))
            interval = f"{100 * (mean - half):+.2f} to {100 * (mean + half):+.2f}"
            share = f"{100 * epochs / options.epochs:.0f} %"
            print(f"{name:28}{share:>10}{100 * mean:+11.2f} {interval:>18}")
    with environment(1), ProcessPoolExecutor(cores(), mp_context=get_context("spawn")) as pool:  # side by side too
        transforms = {name: pool.submit(_transform, setup, data, start, name) for name in options.plans}
        for name, running in transforms.items():
            seconds, whole = running.result(), done[name][1]
            print(
                f"transform of {name}: {seconds:.1f} s, {100 * seconds / whole:.2f} % of the {whole:.0f} s from scratch"
            )


def _transform(setup: Setup, data: DataSet, start: Start, name: str) -> float:
    """Seconds."""
    torch.set_num_threads(setup.numerics.threads)
    fresh = build(factorize(setup.space, parse_plan(setup.space, name)), setup.recipe.initializer, 0)
    before = time.perf_counter()
    child(setup, data, start, fresh)
    return time.perf_counter() - before


def _hits(setup: Setup, data: DataSet, one: Evaluation, folder: Path) -> torch.Tensor:
    """0 or 1 for each test image, as ONNX Runtime predicts it."""
    _, quantized = load_quantized(load_trained(setup.space, one.plan, folder), setup.schemes[0], folder)
    runtime = Runtime(quantized_model(quantized), cores())
    found = [runtime(data.normalise(images)).argmax(1) == labels for images, labels in data.test.batches(250)]
    return torch.cat(found).long()


if __name__ == "__main__":
    main()
